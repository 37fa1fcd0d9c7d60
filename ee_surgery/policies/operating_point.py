"""Operating points: a policy with its results on the data it was chosen on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ee_surgery.checks import number, numbers
from ee_surgery.errors import OperatingPointError
from ee_surgery.policies.certificate import Certificate
from ee_surgery.policies.policy import Fallback, ThresholdPolicy
from ee_surgery.policies.scores import FittedScore
from ee_surgery.task import Task
from ee_surgery.text import visible


@dataclass(frozen=True)
class OperatingPoint:
    """One trade-off between accuracy and cost, with its evidence."""

    thresholds: tuple[float, ...]
    """One per branch; `inf` closes an exit."""
    score: str | FittedScore
    """A registered name, or a score fitted on the calibration data."""
    accuracy: float
    """On the calibration data, in [0, 1]; agreement with the original if there were no labels."""
    accuracy_drop: float
    """The original's accuracy minus this one, on the same data; negative if early exit is better."""
    macs_fraction: float
    """Mean MACs per sample, including every branch visited, as a fraction of the original's."""
    exit_shares: tuple[float, ...]
    """Share of the samples leaving at each exit, the original's head last."""
    samples: int
    """Number of calibration samples behind these numbers."""
    rule: str
    """The calibrator that chose the thresholds."""
    expected_accuracy: float = math.nan
    """On new data: `accuracy` minus the optimism estimated by cross-validation; NaN if not estimated."""
    fallback: Fallback = "last"
    """Whose prediction samples get that never exit early."""
    certificate: Certificate | None = None
    """The guarantee from `risk_control` for this point."""
    latency_ms: float | None = None
    """Mean milliseconds of a batch by the profile that it was calibrated with; None without one."""

    @cached_property  # the same object each time: runs are prepared for it
    def policy(self) -> ThresholdPolicy:
        """Its thresholds, of no model yet."""
        return ThresholdPolicy(self.thresholds, self.score, self.fallback)

    def policy_for(self, task: Task) -> ThresholdPolicy:
        """The policy to run for the answers of a model; the same object each time."""
        found = self._policies.get(task)
        return found or self._policies.setdefault(task, replace(self.policy, task=task))

    @cached_property
    def _policies(self) -> dict[Task, ThresholdPolicy]:
        return {}

    @classmethod
    def by_hand(
        cls, thresholds: Sequence[float] | float, score: str | FittedScore, branches: int = 1
    ) -> OperatingPoint:
        """Thresholds without calibration: accuracy and cost are unknown, NaN.

        Args:
            thresholds: one per branch, or one for all.
            score: that they are compared with.
            branches: number of branches.
        Raises:
            OperatingPointError: a threshold is not a number.
        """
        limits = {"infinite": True, "error": OperatingPointError, "hint": "Use inf to close an exit."}
        several = isinstance(thresholds, (Sequence, Tensor, np.ndarray)) and not isinstance(thresholds, str)
        if not several or (isinstance(thresholds, (Tensor, np.ndarray)) and thresholds.ndim == 0):
            taus = (number("thresholds", thresholds, **limits),) * branches
        else:
            taus = numbers("thresholds", thresholds, **limits)
        return cls(tuple(map(float, taus)), score, math.nan, math.nan, math.nan, (), samples=0, rule="by hand")

    def __str__(self) -> str:
        if not self.samples:
            return f"thresholds {self.thresholds} of {visible(self.score)}, by hand"
        shares = " ".join(f"{share:.0%}" for share in self.exit_shares)
        expected = f" ({self.expected_accuracy:.2%} expected)" if math.isfinite(self.expected_accuracy) else ""
        time = "" if self.latency_ms is None else f", {self.latency_ms:.2f} ms per batch"
        found = f"accuracy {self.accuracy:.2%}{expected} at {self.macs_fraction:.1%} of the MACs{time}"
        return f"{found}, leaving {shares}: {visible(self.rule)}, score {visible(self.score)}, {self.samples} samples"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, and the tensors of a fitted score; JSON has no number for `inf` and NaN: a string and null."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["thresholds"] = [t if math.isfinite(t) else str(t) for t in self.thresholds]
        if isinstance(self.score, FittedScore):
            data["score"] = self.score.to_dict()
        if self.certificate is not None:
            data["certificate"] = self.certificate.to_dict()
        if self.latency_ms is None:
            del data["latency_ms"]  # older versions read a point as before where there is nothing new to say
        return {key: None if isinstance(value, float) and value != value else value for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OperatingPoint:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in data.items()}
        known["latency_ms"] = data.get("latency_ms")
        known["exit_shares"] = tuple(data["exit_shares"])
        known["thresholds"] = tuple(float(t) for t in data["thresholds"])
        if not isinstance(data["score"], str):
            known["score"] = FittedScore.from_dict(data["score"])
        stored = data.get("certificate")
        known["certificate"] = None if stored is None else Certificate.from_dict(stored)
        return cls(**known)


def describe(point: OperatingPoint | None) -> dict[str, Any] | None:
    """The identity of a point as plain data; None if no sample leaves early."""
    if point is None or point.policy.closed:
        return None
    thresholds = [t if math.isfinite(t) else str(t) for t in point.thresholds]
    return {"rule": point.rule, "score": str(point.score), "thresholds": thresholds, "fallback": point.fallback}
