"""Thresholds from an accepted accuracy drop: the rule of the softmax cascade."""

from __future__ import annotations

import torch
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.checks import accuracy_drop, instance, number
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy


def tail_accuracy(score: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy over the samples with a score of at least d, for every score d that occurs.

    >>> score, correct = torch.tensor([0.9, 0.5, 0.5, 0.2]), torch.tensor([True, True, False, False])
    >>> [values.tolist() for values in tail_accuracy(score, correct)][1:]
    [[1.0, 0.6666666666666666, 0.5], [1.0, 3.0, 4.0]]

    Args:
        score: (N,), `outcome`: (N,) in [0, 1] or bool, of one exit.
    Returns:
        The distinct finite scores d in falling order (M,), the accuracy of each tail (M,) as float64, and how
        many samples are in it (M,). Samples of equal score stay together.
    """
    order = score.argsort(descending=True, stable=True)
    ranked = score[order]
    right = outcome[order].double().cumsum(0)
    count = torch.arange(1, len(score) + 1, dtype=torch.float64)
    last = torch.ones(len(score), dtype=torch.bool)
    last[:-1] = ranked[1:] != ranked[:-1]
    last &= torch.isfinite(ranked)
    return ranked[last], right[last] / count[last], count[last]


def accuracy_drop_rule(
    records: ExitRecords, drop: float, score: str = "max_prob", min_tail: float = 0.01
) -> OperatingPoint:
    """Per exit, the lowest threshold whose tail is within `drop` of that exit's best tail.

    `drop` is relative to each exit's own best tail, not to the original: the actual loss of the cascade is
    `accuracy_drop` of the result. Use `Frontier` to ask for that instead.

    Args:
        drop: accepted degradation in [0, 1]; 0.01 is one percentage point.
        min_tail: smallest share of the samples that counts as a tail: smaller ones may have a high accuracy by chance.
    Source: Berestizshevsky & Even, arXiv:1805.10982, section 3, which has no minimum tail.
    """
    instance("records", records, ExitRecords)
    drop, min_tail = accuracy_drop("drop", drop), number("min_tail", min_tail, low=0, high=1)
    rows = zip(records.scores(score), records.outcomes[:-1], strict=True)
    thresholds = tuple(lowest_good(row, outcome, drop, min_tail * len(records)) for row, outcome in rows)
    return replay_point(records, ThresholdPolicy(thresholds, score), f"accuracy_drop_rule({drop:g})")


def lowest_good(score: Tensor, outcome: Tensor, drop: float, min_tail: float, standard: float | None = None) -> float:
    """The lowest threshold whose tail is within `drop` of the standard; `inf` if there is none.

    Args:
        score, outcome: (N,), of one exit.
        min_tail: fewest samples that count as a tail.
        standard: an accuracy; by default that of the best tail.
    """
    candidates, accuracy, count = tail_accuracy(score, outcome)
    enough = count >= max(1, min_tail)
    candidates, accuracy = candidates[enough], accuracy[enough]
    if len(candidates) == 0:
        return NEVER
    good = accuracy >= (accuracy.max().item() if standard is None else standard) - drop - 1e-12
    return candidates[good].min().item() if good.any() else NEVER
