"""Time in place of MACs: what stages and branches take on one engine of one device, and what operating points cost."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.errors import ConfigError, SurgeryWarning
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.text import visible


@dataclass(frozen=True)
class Profile:
    """Milliseconds of every stage and branch at some batch sizes, made by `ee.profile`.

    Stages run for the samples still in flight, so that a routed batch takes the time of ever smaller ones: between the
    sizes that were timed, times are interpolated. Deciding and compacting count as part of the branch.
    """

    engine: str
    """What ran: a backend, or onnxruntime."""
    device: str
    """Name of the processor or GPU."""
    threads: int
    """Of the engine; 0: its own choice."""
    batch_size: int
    """Samples per call."""
    sizes: tuple[int, ...]
    """Rising; the last is `batch_size`."""
    trunk_ms: tuple[tuple[float, ...], ...]
    """For each size, from the inputs up to each exit, K numbers; the last is the whole original in stages."""
    branch_ms: tuple[tuple[float, ...], ...]
    """For each size and branch, K - 1 numbers."""

    def latency_ms(self, shares: Sequence[float], visits: Sequence[bool]) -> float:
        """Mean milliseconds of a batch.

        Args:
            shares: of the samples that leave at each exit, K numbers.
            visits: which branches run, K - 1.
        """
        reached = self.batch_size * np.maximum(1 - np.cumsum([0.0, *shares[:-1]]), 0)
        sizes, stages = (0, *self.sizes), self.stage_ms(visits)
        return float(sum(np.interp(n, sizes, (0, *times)) for n, times in zip(reached, stages.T, strict=True)))

    def stage_ms(self, visits: Sequence[bool]) -> np.ndarray:
        """Milliseconds of each stage with the branch behind it, float64, (sizes, K).

        Args:
            visits: which branches run, K - 1.
        """
        stages = np.diff(self.trunk_ms, prepend=0.0)
        stages[:, :-1] += np.array(self.branch_ms) * np.array(visits)
        return stages

    @property
    def full_ms(self) -> float:
        """Milliseconds of a batch that runs through all stages and no branch."""
        return self.trunk_ms[-1][-1]

    def in_time(self, records: ExitRecords) -> ExitRecords:
        """The same records with milliseconds per sample, at the full batch size, in place of MACs.

        Raises:
            ConfigError: it is the profile of a model with another number of exits.
        """
        timed, exits = len(self.trunk_ms[-1]), len(records.trunk_macs)
        if timed != exits:
            raise ConfigError(
                f"The profile has times of {timed} exits, the model has {exits} (the original's head counts): run "
                "ee.profile on this model, or on a file exported from it."
            )
        trunk, branches = (tuple(ms / self.batch_size for ms in row[-1]) for row in (self.trunk_ms, self.branch_ms))
        return replace(records, trunk_macs=trunk, branch_macs=branches)

    def timed(self, records: ExitRecords, point: OperatingPoint) -> OperatingPoint:
        """A point with its MACs by the records, and its latency by this profile."""
        policy = point.policy_for(records.task)
        replayed = replay_point(records, policy, point.rule)
        latency = self.latency_ms(replayed.exit_shares, policy.visits(records.chained))
        known = {"expected_accuracy": point.expected_accuracy, "certificate": point.certificate}
        return replace(replayed, latency_ms=latency, **known)

    def check_device(self, device: torch.device) -> None:
        """Warn where this machine is another than the one that was timed."""
        here = dict.fromkeys([processor(device), processor(torch.device("cpu"))])
        if self.device not in here:
            warnings.warn(
                f"Times were measured on {visible(self.device)}, and this is {' with '.join(here)}: run ee.profile "
                "here and calibrate again.",
                SurgeryWarning,
                stacklevel=3,
            )

    def __str__(self) -> str:
        per_exit = " ".join(f"{ms:.2f}" for ms in self.trunk_ms[-1])
        branches = " ".join(f"{ms:.2f}" for ms in self.branch_ms[-1])
        return (
            f"{visible(self.engine)} on {visible(self.device)}, {self.threads} thread(s), batch {self.batch_size}: "
            f"ms up to each exit {per_exit}; of each branch {branches}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """The inverse of `to_dict`."""
        rows = {name: tuple(map(tuple, data[name])) for name in ("trunk_ms", "branch_ms")}
        return cls(**{**data, "sizes": tuple(data["sizes"]), **rows})


def processor(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
