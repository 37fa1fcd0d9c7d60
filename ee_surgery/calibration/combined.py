"""Several scores in one: what an exit's answer is expected to be worth beside the original's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ee_surgery.calibration.records import OF_ALL, ExitRecords
from ee_surgery.policies.scores import FittedScore, ScoreOf, State, fitted
from ee_surgery.task import CLASSIFICATION, Task, TaskNames

_FIRST = "max_prob"
_RIDGE = 30.0  # in samples: how many it takes to change a weight on a standardized score
_FINITE = 1e4


def combined_names(records: ExitRecords) -> list[str]:
    """The scores of these records that look at one exit alone, `max_prob` first."""
    found = [name for name in records.recorded if name not in OF_ALL]
    return sorted((n for n in found if not ScoreOf(n, records.task).stateful), key=lambda n: (n != _FIRST, n))


@fitted("combined")
@dataclass(frozen=True, eq=False, repr=False)
class CombinedScore(FittedScore):
    """A linear combination of scores: the expected outcome of an exit minus that of the original.

    Where both are poor, as on a picture that is hard throughout, nothing is gained by going on.
    """

    tasks: ClassVar[TaskNames] = None

    names: tuple[str, ...]
    weights: Tensor
    """(K - 1, scores + 1), the constant last."""

    @property
    def of_scores(self) -> tuple[str, ...]:
        """Those it combines."""
        return self.names

    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int, task: Task = CLASSIFICATION
    ) -> tuple[Tensor, State]:
        """Expected outcome minus the original's, (B,)."""
        values = [score(logits, confidence, (), exit_index)[0] for score in _looked_up(self.names, task)]
        return _weighted(torch.stack(values, -1), self.weights[exit_index].to(logits.device)), state

    def from_scores(self, scores: Sequence[Tensor]) -> Tensor:
        """The same from recorded scores, (K - 1, N)."""
        return torch.stack([_weighted(row, weights) for row, weights in zip(torch.stack([*scores], -1), self.weights)])  # noqa: B905

    @classmethod
    def fit(cls, records: ExitRecords) -> CombinedScore:
        """By ridge regression, exit by exit, on all scores that these records hold."""
        names = tuple(combined_names(records))
        values = torch.stack([records.scores(name) for name in names], -1).clamp(-_FINITE, _FINITE).double().numpy()
        gaps = (records.outcomes[:-1] - records.outcomes[-1]).numpy()
        rows = [_ridge(x, y) for x, y in zip(values, gaps, strict=True)]
        return cls(names, torch.tensor(np.stack(rows)).float())


@lru_cache(maxsize=16)  # asked at every exit of every run
def _looked_up(names: tuple[str, ...], task: Task) -> list[ScoreOf]:
    return [ScoreOf(name, task) for name in names]


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Scores (N, S) and weights (S + 1,) -> (N,)."""
    return values @ weights[:-1] + weights[-1]


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (S + 1,), the constant last, of a ridge regression of y (N,) on x (N, S)."""
    mean, scale = x.mean(0), x.std(0).clip(1e-6)
    design = (x - mean) / scale
    slopes = np.linalg.solve(design.T @ design + _RIDGE * np.eye(x.shape[1]), design.T @ (y - y.mean())) / scale
    return np.append(slopes, y.mean() - slopes @ mean)
