"""Estimated probability that an exit is correct: a small logistic regression per exit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.policies.scores import FittedScore, State, fitted, precise
from ee_surgery.task import CHOICES, CLASSIFICATION, Task, TaskNames

_LIMIT = 15.0
_RIDGE = 100.0  # in samples: how many it takes to change a weight on a standardized feature


def exit_features(logits: Tensor, state: State, task: Task = CLASSIFICATION) -> tuple[Tensor, State]:
    """Features of one exit, (B, D), and the state for the next exit.

    Log-odds of the predicted class, their square, the margin over the second class, the entropy; and from the second
    exit on: the previous exit's log-odds of this class, whether it agreed, the log-odds of its own prediction, and the
    number of consecutive exits with this prediction. For an answer of several choices, their means.
    """
    log_p = task.log_probabilities(precise(logits))  # (B, options), or (B, choices, options)
    top = log_p.topk(2, -1)
    answer, sure = top.indices[..., 0], _odds(top.values[..., 0])
    entropy = -(log_p.exp() * log_p.clamp_min(-_LIMIT)).sum(-1)
    columns = [sure, sure.square(), (top.values[..., 0] - top.values[..., 1]).clamp_max(_LIMIT), entropy]
    if state:
        before, streak = state
        then, gave = before.max(-1)
        agrees = (gave == answer).to(log_p.dtype)
        streak = (streak + 1) * agrees
        columns += [_odds(before.gather(-1, answer[..., None])[..., 0]), agrees, _odds(then), streak.clamp_max(3)]
    else:
        streak = torch.zeros_like(sure)
    return torch.stack([task.reduce(column) for column in columns], 1), (log_p, streak)


def _odds(log_p: Tensor) -> Tensor:
    """log p / (1 - p), clipped to what float32 can resolve."""
    return (log_p - torch.log1p(-log_p.exp().clamp_max(1 - 1e-7))).clamp(-_LIMIT, _LIMIT)


@fitted("chance")
@dataclass(frozen=True, eq=False, repr=False)
class ChanceOfBeingRight(FittedScore):
    """Estimated log-odds that an exit is correct, given its logits and the previous exit's."""

    tasks: ClassVar[TaskNames] = CHOICES

    weights: tuple[Tensor, ...]
    """One vector (D + 1,) per exit, the constant last; optionally one more for the original's head."""

    stateful: ClassVar[bool] = True  # it reads the answers of the exits before

    def __call__(
        self,
        logits: Tensor,
        confidence: Tensor | None,
        state: State,
        exit_index: int,
        task: Task = CLASSIFICATION,
    ) -> tuple[Tensor, State]:
        """Log-odds (B,) of being correct."""
        features, state = exit_features(logits, state, task)
        weights = self.weights[exit_index].to(features.dtype)
        return features @ weights[:-1] + weights[-1], state

    @classmethod
    def fit(cls, records: ExitRecords) -> ChanceOfBeingRight:
        """Fit by ridge-penalised maximum likelihood: all K exits, the original's head last."""
        weights, state = [], ()
        for logits, outcome in zip(records.recorded_logits(), records.outcomes, strict=True):
            features, state = exit_features(logits, state, records.task)
            features = torch.nan_to_num(features, nan=0.0)
            weights.append(torch.tensor(logistic(features.double().numpy(), outcome.numpy())).float())
        return cls(tuple(weights))

    def probabilities(self, records: ExitRecords) -> NDArray[np.float64]:
        """Probabilities that each of the K exits is correct, (K, N)."""
        rows, state = [], ()
        for k, logits in enumerate(records.recorded_logits()):
            score, state = self(logits, None, state, k, records.task)
            rows.append(torch.sigmoid(torch.nan_to_num(score.double(), nan=0.0)))
        return torch.stack(rows).numpy()


def chances(records: ExitRecords) -> NDArray[np.float64]:
    """The probability that each exit is correct, given its own confidence and that of earlier exits, (K, N).

    An exit sees samples that earlier exits were not confident about; they are harder than its own confidence suggests.
    """
    task, rows = records.task, []
    known = [exit_features(logits, (), task)[0].nan_to_num(nan=0.0) for logits in records.recorded_logits()]
    sure = torch.stack([features[:, 0] for features in known])  # log-odds of the answer
    for k, outcome in enumerate(records.outcomes):
        columns = [known[k]]
        if k:
            columns += [sure[:k].mean(0)[:, None], sure[:k].amax(0)[:, None]]
        features = torch.cat(columns, 1).double().numpy()
        weights = logistic(features, outcome.numpy())
        rows.append(expit(features @ weights[:-1] + weights[-1]))
    return np.stack(rows)


def logistic(x: NDArray[np.float64], y: NDArray[np.float64], steps: int = 12) -> NDArray[np.float64]:
    """Ridge-penalised logistic regression of y (N,) on features (N, D).

    Returns:
        Weights (D + 1,), the constant last; only the first feature's and the constant are free of the penalty.
    """
    mean, scale = x.mean(0), x.std(0).clip(1e-6)
    design = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
    penalty = np.full(design.shape[1], _RIDGE)
    penalty[[0, -1]] = 1.0  # a little penalty: without it, all correct or all wrong has no finite solution
    w = np.zeros(design.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(design @ w).clip(-30, 30)))
        gradient = design.T @ (y - p) - penalty * w
        curvature = (design * (p * (1 - p)).clip(1e-6)[:, None]).T @ design + np.diag(penalty)
        w = w + np.linalg.solve(curvature, gradient)
    slopes = w[:-1] / scale
    return np.append(slopes, w[-1] - slopes @ mean)
