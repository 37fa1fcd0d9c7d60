"""What every export has: metadata, a frontier, a knob, and the cost of each sample."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
METADATA = "ee_surgery"
ROUTER = "router.json"
METADATA_LIMIT = 4 << 20  # characters of metadata


class OnnxError(ValueError):
    """A file that is none of ours, or a request that it cannot meet."""


class OnnxOutput(NamedTuple):
    """Where each sample left, with what answer, at what cost."""

    logits: np.ndarray
    """(B, C)."""
    exit_index: np.ndarray
    """int64, (B,); the last is the original's own head."""
    score: np.ndarray
    """float32, (B,); NaN at the original's head."""
    macs: np.ndarray
    """int64, (B,): the stages that ran for each sample and every branch it visited."""


@dataclass(frozen=True)
class OnnxPoint:
    """An operating point of the file's frontier."""

    thresholds: tuple[float, ...]
    accuracy: float
    expected_accuracy: float
    macs_fraction: float
    samples: int
    latency_ms: float = math.nan
    """Mean milliseconds of a batch, where the model was calibrated with a profile."""

    def __str__(self) -> str:
        time = "" if math.isnan(self.latency_ms) else f", {self.latency_ms:.2f} ms per batch"
        return f"{self.macs_fraction:.1%} of the MACs ({self.expected_accuracy:.2%} expected{time})"


class Exported:
    """What a file and a folder of stages have in common: the metadata and the knob."""

    def __init__(self, text: str | None, path: object) -> None:
        self.about = about = _metadata(text, path)
        """The metadata as plain data."""
        self.exits: list[str] = about["exits"]
        """Names of the exits, the original's own head (`original`) last."""
        self.labels: list[str] | None = about["labels"]
        """Class names in order, where they are known."""
        self.preprocessing: dict[str, Any] | None = about["preprocessing"]
        """How pictures are prepared, as `timm.data.create_transform` takes it."""
        self.points: tuple[OnnxPoint, ...] = about["points"]
        """The frontier, from cheap to dear; empty where the model was not calibrated."""
        self.thresholds: tuple[float, ...] | None = None
        """In force; None: those that the model was exported with."""

    def operate(
        self,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        latency_ms: float | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> tuple[float, ...] | None:
        """Set when samples leave: exactly one argument; without any, the file's own operating point.

        Args:
            max_accuracy_drop: the cheapest point of the frontier within this drop; 0.01 is one percentage point.
            budget: the most accurate one within this fraction of the original's MACs.
            latency_ms: the most accurate one within this mean time of a batch.
            thresholds: one per branch; inf closes an exit.
        Returns:
            The thresholds in force; None for the file's own.
        Raises:
            OnnxError: several of them, or nothing meets the request.
        """
        given = [value for value in (max_accuracy_drop, budget, latency_ms, thresholds) if value is not None]
        if len(given) > 1:
            raise OnnxError("Give one of max_accuracy_drop=, budget=, latency_ms=, thresholds=.")
        if thresholds is not None:
            self.thresholds = self._checked(thresholds)
        elif not given:
            self.thresholds = None
        else:
            self.thresholds = self._chosen(max_accuracy_drop, budget, latency_ms).thresholds
        return self.thresholds

    def _chosen(self, drop: float | None, budget: float | None, latency_ms: float | None) -> OnnxPoint:
        if not self.points:
            raise OnnxError("The file has no frontier: calibrate the model before you export it, or give thresholds=.")
        if latency_ms is not None and math.isnan(self.points[0].latency_ms):
            raise OnnxError("The file has no times: calibrate the model with a profile before you export it.")
        if drop is not None:  # points are ordered from the cheapest
            least = self.about["base_accuracy"] - drop - 1e-12
            best = next((point for point in self.points if point.expected_accuracy >= least), None)
        else:
            most, cost = (budget, "macs_fraction") if latency_ms is None else (latency_ms, "latency_ms")
            fits = [point for point in self.points if getattr(point, cost) <= most]
            best = max(fits, key=lambda point: point.expected_accuracy, default=None)
        if best is None:
            low, high = self.points[0], self.points[-1]
            raise OnnxError(f"No operating point of the file meets that: its points go from {low} to {high}.")
        return best

    def _checked(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        found = tuple(float(tau) for tau in thresholds)
        if len(found) != len(self.exits) - 1 or any(math.isnan(tau) for tau in found):
            raise OnnxError(f"thresholds must be {len(self.exits) - 1} numbers, one per branch; got {thresholds}.")
        return found

    @property
    def in_force(self) -> tuple[float, ...]:
        """The thresholds that were set, else those that the model was exported with."""
        return self.about["thresholds"] if self.thresholds is None else self.thresholds

    def visits(self, thresholds: Sequence[float]) -> list[bool]:
        """Which branches run: those of open exits, and where later ones read what they hand on, those before."""
        opened = [tau < math.inf for tau in thresholds]
        return opened if self.about["closes_alone"] else [any(opened[k:]) for k in range(len(opened))]

    def _output(self, results: Sequence[np.ndarray], thresholds: Sequence[float] | None) -> OnnxOutput:
        """Logits, exits and scores with their costs."""
        logits, exit_index, score = results
        return OnnxOutput(logits, exit_index, score, self._costs(thresholds)[exit_index])

    def _costs(self, thresholds: Sequence[float] | None) -> np.ndarray:
        """MACs of leaving at each exit: the trunk up to it and every branch visited, closed exits' left out."""
        visits = self.visits(self.about["thresholds"] if thresholds is None else thresholds)
        paid = [*accumulate(m * v for m, v in zip(self.about["branch_macs"], visits, strict=True))]
        return np.array([t + p for t, p in zip(self.about["trunk_macs"], [*paid, paid[-1]], strict=True)])


def _metadata(text: str | None, path: object) -> dict[str, Any]:
    """The metadata, checked: a file may come from anyone."""
    if text is None or len(text) > METADATA_LIMIT:
        raise OnnxError(f"{path} was not written by ee_surgery: it has no metadata {METADATA!r}.")
    try:
        about = json.loads(text)
        if (version := about["format_version"]) != FORMAT_VERSION:
            raise OnnxError(f"{path} is of format {version!r:.20}; this version reads {FORMAT_VERSION}.")
        points = tuple(map(_point, about["points"]))
        costs = {name: [*map(int, about[name])] for name in ("trunk_macs", "branch_macs")}
        known = {"points": points, "thresholds": tuple(map(float, about["thresholds"])), **costs}
        missing = {"labels", "preprocessing", "closes_alone", "base_accuracy"} - about.keys()
        k = len(about["exits"])
        sizes = {len(costs["trunk_macs"]), len(costs["branch_macs"]) + 1, len(known["thresholds"]) + 1}
        if missing or k < 2 or sizes != {k} or any(len(point.thresholds) != k - 1 for point in points):
            raise ValueError("its parts do not fit together, or some are missing")
    except OnnxError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise OnnxError(f"{path} has damaged metadata: {repr(error)[:200]}.") from error
    return {**about, **known}


def _point(data: Mapping[str, Any]) -> OnnxPoint:
    names = ("accuracy", "expected_accuracy", "macs_fraction", "latency_ms")
    numbers = {name: math.nan if data.get(name) is None else float(data[name]) for name in names}
    return OnnxPoint(tuple(float(tau) for tau in data["thresholds"]), samples=int(data["samples"]), **numbers)
