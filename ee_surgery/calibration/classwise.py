"""One threshold per exit and predicted class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ee_surgery.calibration.cascade import lowest_good, tail_accuracy
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.checks import accuracy_drop, count, instance
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.scores import SCORES, FittedScore, State, fitted
from ee_surgery.task import TaskNames, require


@fitted("classwise")
@dataclass(frozen=True, eq=False, repr=False)
class ClassThresholds(FittedScore):
    """The largest softmax probability minus the threshold of its class; a sample leaves at 0 or above."""

    tasks: ClassVar[TaskNames] = ("classification",)

    thresholds: Tensor
    """(K - 1, C); `inf` where a class never leaves."""

    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int
    ) -> tuple[Tensor, State]:
        """Scores (B,), at most 1."""
        top, _ = SCORES["max_prob"](logits, None, ())
        return top - self.thresholds[exit_index].to(top.dtype)[logits.argmax(-1)], ()


def class_thresholds(records: ExitRecords, drop: float, min_tail: int = 20) -> OperatingPoint:
    """The rule of the softmax cascade per predicted class: the lowest threshold within `drop`.

    A tail counts as good when its accuracy is within `drop` of the best tail of the whole exit.

    Args:
        drop: accepted degradation in [0, 1].
        min_tail: fewest samples that count as a tail of one class; a class predicted more rarely never leaves.
    Source: the per-class variant in the code of Berestizshevsky & Even (arXiv:1805.10982), also in CalexNet
        (arXiv:2509.08318), with the best tail of the exit as the standard instead of each class's own, which is low for
        a class that the exit does not recognize.
    """
    instance("records", records, ExitRecords)
    drop, min_tail = accuracy_drop("drop", drop), count("min_tail", min_tail)
    require("The calibrator 'classwise'", ClassThresholds.tasks, records.task)
    logits = records.recorded_logits()
    scores, answers, classes = records.scores("max_prob"), logits.argmax(-1), logits.shape[-1]
    taus = torch.full((len(records.exits), classes), NEVER)
    for k, (row, correct) in enumerate(zip(scores, records.correct[:-1], strict=True)):
        standard = _best(row, correct)
        for c in range(classes):
            mine = answers[k] == c
            if int(mine.sum()) >= min_tail:
                taus[k, c] = lowest_good(row[mine], correct[mine], drop, min_tail, standard)
    policy = ThresholdPolicy(tuple(0.0 if torch.isfinite(row).any() else NEVER for row in taus), ClassThresholds(taus))
    return replay_point(records, policy, f"class_thresholds({drop:g})")


def _best(score: Tensor, correct: Tensor) -> float:
    """The best accuracy of a tail of at least a hundredth of the samples."""
    _, accuracy, count = tail_accuracy(score, correct)
    enough = count >= max(1, 0.01 * len(score))
    return accuracy[enough].max().item() if enough.any() else 1.0
