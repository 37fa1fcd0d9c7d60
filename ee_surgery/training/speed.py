"""Where the time of training goes: data, the frozen original, the branches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """Of one epoch, without its first step, which also starts workers and captures."""

    images_per_second: float
    """Samples of the steps, over all processes, by the time of whole steps."""
    seconds_per_step: float
    data: float
    """Fraction of that time spent waiting for the next batch, augmentation included."""
    original: float
    """Fraction spent on the frozen original, or on reading its features back."""

    def __str__(self) -> str:
        branches = 1 - self.data - self.original
        shares = f"original {self.original:.0%}, branches {branches:.0%}, data {self.data:.0%}"
        return f"{self.images_per_second:,.0f} images/s ({shares})"


class StopWatch:
    """Adds up seconds by what they were spent on."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Count the time inside; kernels in flight belong to what launched them."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize()
            self.seconds.setdefault(what, []).append(time.perf_counter() - started)

    def read(self, samples: int) -> Speed | None:
        """The speed since the last reading; None where nothing was timed."""
        found, self.seconds = self.seconds, {}
        if not samples or "step" not in found:
            return None
        taken = len(found["step"])
        counted = max(1, taken - 1)
        data, original, steps = (
            sum(times[len(times) * (taken - counted) // taken :])
            for times in (found.get(name, []) for name in ("data", "original", "step"))
        )
        whole = data + steps
        return Speed(samples * counted / taken / whole, whole / counted, data / whole, original / whole)
