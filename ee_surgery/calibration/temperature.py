"""Temperature scaling: one number per exit that calibrates its probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import instance, word
from ee_surgery.policies.scores import SCORES, FittedScore, State, fitted, for_task
from ee_surgery.task import CLASSIFICATION, Task, TaskNames


@fitted("temperature")
@dataclass(frozen=True, eq=False, repr=False)
class ScaledScore(FittedScore):
    """A registered score of logits divided by their exit's temperature: a threshold means the same at every exit."""

    tasks: ClassVar[TaskNames] = None

    temperatures: tuple[float, ...]
    """One per exit; optionally one more for the original."""
    score: str = "max_prob"

    def __call__(
        self,
        logits: Tensor,
        confidence: Tensor | None,
        state: State,
        exit_index: int,
        task: Task = CLASSIFICATION,
    ) -> tuple[Tensor, State]:
        """Scores (B,)."""
        return for_task(SCORES[self.score], task)(logits / self.temperatures[exit_index], confidence, ())


def scale_temperatures(records: ExitRecords, score: str = "max_prob") -> ScaledScore:
    """Fit one temperature per exit by maximum likelihood of the labels, within [0.05, 20].

    Source: Guo et al., ICML 2017, arXiv:1706.04599.
    """
    from scipy.optimize import minimize_scalar  # takes as long to import as numpy

    instance("records", records, ExitRecords)
    word("score", score)
    SCORES[score]  # raises for an unknown name
    found, task = [], records.task
    for logits in records.recorded_logits():
        whole = task.finite(logits)
        z, y = logits[whole].double(), records.target[whole]

        def loss(log_t: float, z: Tensor = z, y: Tensor = y) -> float:
            return task.mean_loss(z / math.exp(log_t), y).item()

        found.append(math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x))
    return ScaledScore(tuple(found), score)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by the number of samples.

    Args:
        confidence: (N,) in [0, 1]; `correct`: bool (N,).
    Source: Guo et al., ICML 2017, arXiv:1706.04599.
    """
    place = (confidence.double() * bins).long().clamp(0, bins - 1).numpy()
    count = np.bincount(place, minlength=bins)
    gap = np.bincount(place, confidence.double().numpy() - correct.double().numpy(), minlength=bins)
    return float(np.abs(gap).sum() / max(1, count.sum()))
