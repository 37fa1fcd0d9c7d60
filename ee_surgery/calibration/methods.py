"""Calibrators by name: each gives its operating points over the whole range on the same records."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import torch

from ee_surgery.calibration.budget import geometric_budget
from ee_surgery.calibration.cascade import accuracy_drop_rule
from ee_surgery.calibration.classwise import class_thresholds
from ee_surgery.calibration.eenet import SCORE_RATES, eenet_scheduler
from ee_surgery.calibration.pareto import pareto
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.calibration.search import search, stopping
from ee_surgery.calibration.temperature import scale_temperatures
from ee_surgery.errors import OperatingPointError
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import Fallback, ThresholdPolicy
from ee_surgery.policies.scores import FittedScore
from ee_surgery.registry import Registry
from ee_surgery.task import CHOICES

Calibrator: TypeAlias = Callable[..., list[OperatingPoint]]

CALIBRATORS: Registry[Calibrator] = Registry("calibrator", "ee_surgery.calibrators", takes_score=False, tasks=None)
"""Name -> function from records to operating points, in any order. `Frontier.trace` keeps the Pareto-optimal ones.

Properties: `takes_score=True` for one that is called as `(records, score)` for each allowed score, and so works with
`calibrate(scores=...)`; others have their own score. `tasks=` the names of those it is for, or `CHOICES`.
"""

CALIBRATORS.register("search", takes_score=True)(search)
CALIBRATORS.register("stopping", tasks=CHOICES)(stopping)

_DROPS = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)


def one_threshold(
    records: ExitRecords, score: str | FittedScore, fallback: Fallback = "last", rule: str = "shared"
) -> list[OperatingPoint]:
    """The same threshold at every exit, for 100 values of the score."""
    finite = records.scores(score)[torch.isfinite(records.scores(score))]
    values = torch.quantile(finite[:: max(1, len(finite) // 100_000)], torch.linspace(0, 1, 100)).unique().tolist()
    k = len(records.exits)
    policies = [ThresholdPolicy((tau,) * k, score, fallback) for tau in (*values, float("inf"))]
    return [replay_point(records, policy, rule) for policy in policies]


@CALIBRATORS.register("shared", tasks=CHOICES)
def shared(records: ExitRecords) -> list[OperatingPoint]:
    """One threshold on the largest probability (Shallow-Deep Networks, Zero Time Waste)."""
    return one_threshold(records, "max_prob")


@CALIBRATORS.register("most_confident", tasks=CHOICES)
def most_confident(records: ExitRecords) -> list[OperatingPoint]:
    """The same, with the most confident prediction as the fallback (Shallow-Deep Networks)."""
    return one_threshold(records, "max_prob", "most_confident", "most_confident")


@CALIBRATORS.register("scaled", tasks=CHOICES)
def scaled(records: ExitRecords) -> list[OperatingPoint]:
    """One threshold on the largest probability after temperature scaling (arXiv:1706.04599)."""
    return one_threshold(records, scale_temperatures(records), rule="scaled")


@CALIBRATORS.register("learned")
def learned(records: ExitRecords) -> list[OperatingPoint]:
    """One threshold on the confidence units, including the published 0.5 (EENets, PTEENet)."""
    half = ThresholdPolicy((0.5,) * len(records.exits), "learned")
    return [*one_threshold(records, "learned", rule="learned"), replay_point(records, half, "learned")]


@CALIBRATORS.register("patience")
def patience(records: ExitRecords) -> list[OperatingPoint]:
    """Leave when m + 1 consecutive exits agree (PABEE, arXiv:2006.04152)."""
    k = len(records.exits)
    return [replay_point(records, ThresholdPolicy((float(m),) * k, "patience"), "patience") for m in range(k + 1)]


@CALIBRATORS.register("entropy", tasks=CHOICES)
def entropy(records: ExitRecords) -> list[OperatingPoint]:
    """Thresholds on the entropy: for up to three exits, every combination of 17 values per exit, BranchyNet's grid
    search (arXiv:1709.01686); for more, where the grid is too large, one value for all exits.
    """
    scores, k = records.scores("entropy"), len(records.exits)
    if k > 3:
        return one_threshold(records, "entropy", rule="entropy")
    axes = [torch.quantile(row[torch.isfinite(row)], torch.linspace(0, 1, 16)).tolist() for row in scores]
    grid = itertools.product(*([*values, float("inf")] for values in axes))
    points = (replay_point(records, ThresholdPolicy(taus, "entropy"), "entropy") for taus in grid)
    return pareto(points, lambda p: p.macs_fraction, lambda p: p.accuracy)


@CALIBRATORS.register("cascade", tasks=CHOICES)
def cascade(records: ExitRecords) -> list[OperatingPoint]:
    """Per-exit thresholds from an accepted accuracy drop (cascaded inference, arXiv:1805.10982)."""
    return [accuracy_drop_rule(records, drop) for drop in _DROPS]


@CALIBRATORS.register("classwise", tasks=("classification",))
def classwise(records: ExitRecords) -> list[OperatingPoint]:
    """The same rule per exit and predicted class."""
    return [class_thresholds(records, drop) for drop in _DROPS]


@CALIBRATORS.register("geometric")
def geometric(records: ExitRecords) -> list[OperatingPoint]:
    """Exit shares in geometric progression, for budgets (MSDNet, arXiv:1703.09844)."""
    return list(_within(records, 40, functools.partial(geometric_budget, score=records.task.default_score)))


@CALIBRATORS.register("eenet", tasks=("classification",))
def eenet(records: ExitRecords) -> list[OperatingPoint]:
    """The learned scheduler of EENet (arXiv:2301.07099), for budgets, at the rate that is best for a medium one."""
    middle = (_cheapest(records) + 1) / 2
    try:
        tried = {rate: eenet_scheduler(records, middle, rates=[rate]) for rate in SCORE_RATES}
    except OperatingPointError:  # leaving at the first exit costs as much as never leaving
        return []
    rate = max(tried, key=lambda rate: tried[rate].accuracy)
    return [tried[rate], *_within(records, 5, functools.partial(eenet_scheduler, rates=[rate]))]


def _cheapest(records: ExitRecords) -> float:
    """The cost if all samples leave at the first exit, as a fraction of the original's."""
    return exit_costs(records.trunk_macs, records.branch_macs, [True] * len(records.exits))[0] / records.base_macs


def _within(
    records: ExitRecords, count: int, choose: Callable[[ExitRecords, float], OperatingPoint]
) -> Iterable[OperatingPoint]:
    """Points for budgets from the cheapest reachable one up to the original's cost."""
    for budget in np.linspace(_cheapest(records) * 1.001, 1, count, endpoint=False):
        try:
            yield choose(records, float(budget))
        except OperatingPointError:  # noqa: PERF203 (ties leave together: the cheapest may cost a little more)
            continue
