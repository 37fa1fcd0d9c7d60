"""Thresholds from a budget: MSDNet's geometric distribution over exits, met by the exits actually taken."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.checks import instance, positive
from ee_surgery.errors import OperatingPointError
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.scores import FittedScore


def quota_thresholds(scores: Tensor, quotas: list[int]) -> tuple[float, ...]:
    """Thresholds so that about `quotas[k]` of the samples that reach exit k leave there.

    Args:
        scores: (K - 1, N). `quotas`: number of samples leaving at each of the K - 1 branches.
    Returns:
        One threshold per exit; ties leave together, so an exit may take more than its quota.
    """
    here = torch.ones(scores.shape[1], dtype=torch.bool)
    thresholds: list[float] = []
    for row, quota in zip(scores, quotas, strict=True):
        ranked = row[here & torch.isfinite(row)].sort(descending=True).values
        if quota <= 0 or len(ranked) == 0:
            thresholds.append(NEVER)
            continue
        tau = between(ranked.double().numpy(), min(quota, len(ranked)))
        thresholds.append(tau)
        here &= row < tau
    return tuple(thresholds)


def between(ranked: NDArray[np.float64], rank: int) -> float:
    """A threshold reached by the first `rank` of falling scores, halfway to the next: robust to rounding.

    Scores are float32, so the threshold is a float32 number too.

    >>> between(np.array([0.9, 0.75, 0.25]), 2)
    0.5
    """
    last = float(ranked[rank - 1])
    after = float(ranked[rank]) if rank < len(ranked) and np.isfinite(ranked[rank]) else last
    middle = float(np.float32((last + after) / 2))
    return middle if after < middle <= last else last


def geometric_budget(records: ExitRecords, budget: float, score: str | FittedScore = "max_prob") -> OperatingPoint:
    """Exit k gets a share proportional to g ** k; the largest g whose realised mean cost meets the budget.

    Args:
        budget: mean MACs as a fraction of the original's.
    Raises:
        OperatingPointError: even with all samples leaving at the first exit, it is not met.
    Source: budgeted batch classification of MSDNet (Huang et al., ICLR 2018, arXiv:1703.09844); the published code
    steps g and takes the first value that exceeds the budget; this bisects and stays within it.
    """
    instance("records", records, ExitRecords)
    budget = positive("budget", budget)
    scores, n = records.scores(score), len(records)
    rule = f"geometric_budget({budget:g})"

    def at(log_g: float) -> OperatingPoint:
        shares = torch.softmax(log_g * torch.arange(len(records.trunk_macs), dtype=torch.float64), 0)
        quotas = (shares[:-1] * n).round().int().tolist()
        return replay_point(records, ThresholdPolicy(quota_thresholds(scores, quotas), score), rule)

    cheap, dear = -20.0, 20.0
    best = at(cheap)
    if best.macs_fraction > budget:
        raise OperatingPointError(
            f"No exits meet a budget of {budget:g}: the cheapest possible mean is {best.macs_fraction:.3f} "
            "of the original's MACs. Add an earlier exit or allow a larger budget."
        )
    while dear - cheap > 1e-3:
        middle = (cheap + dear) / 2
        point = at(middle)
        if point.macs_fraction <= budget:
            cheap, best = middle, point
        else:
            dear = middle
    return best
