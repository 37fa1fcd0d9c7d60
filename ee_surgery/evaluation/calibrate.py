"""Calibrate: the frontier of accuracy and cost of a branched model on held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.methods import CALIBRATORS
from ee_surgery.calibration.profile import Profile
from ee_surgery.calibration.risk import risk_tables
from ee_surgery.calibration.search import best_score
from ee_surgery.checks import instance, names, renamed
from ee_surgery.data.batches import Data
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import ConfigError, SurgeryWarning
from ee_surgery.evaluation.record import record
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.share.provenance import CALIBRATION
from ee_surgery.task import require
from ee_surgery.text import visible

if TYPE_CHECKING:
    from accelerate import Accelerator


def calibrate(
    branched: EarlyExitModel,
    data: Data,
    *,
    method: str = "search",
    scores: Iterable[str] | None = None,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
    profile: Profile | None = None,
    policy: str | None = None,
) -> Frontier:
    """Find the frontier of accuracy and cost of the branches, and keep it on the model.

    No sample leaves early until `branched.operate(...)` picks a point of it.

    Args:
        data: held out: neither what trained the branches nor what will be reported; its labels as for `record`.
        method: how thresholds are chosen, by its name in `CALIBRATORS`: `search`, or a paper's own way.
        scores: which scores `search` may use, each for some operating points. By default cross-validation picks one
            for all: `max_prob` unless margin, entropy, the estimated probability of being correct or, where branches
            have them, confidence units are clearly better.
        accelerator: as for `record`; every process then searches, and finds the same.
        class_map: as for `record`.
        profile: of the engine and device that will serve, by `ee.profile`: the cost is time then, and exits that do not
            pay in time are closed.
        policy: old name of `method`.
    Raises:
        ConfigError: a method or score that is not for the model's task, `scores` beside a method that has its own, an
            empty list, or a score that needs confidence units.
        UnknownNameError: no such method or score.
        DataError: as for `record`.
    """
    method = renamed("policy=", policy, "method=", method)
    takes_score = CALIBRATORS.property(method, "takes_score")  # a name that is known, before anything runs
    if scores is not None and not takes_score:
        raise ConfigError(f"The method {method!r} has its own score: leave out scores=, or use method='search'.")
    instance("branched", branched, EarlyExitModel)
    require(f"The calibrator {method!r}", CALIBRATORS.property(method, "tasks"), branched.task)
    wanted = None if scores is None else _scores(branched, scores)
    if untrained := branched.untrained:
        warnings.warn(
            f"The branches at {', '.join(map(visible, untrained))} are untrained: their answers are random, and so are "
            "thresholds chosen on them. Train first: ee.train(branched, data), or ee.augment(..., train=).",
            SurgeryWarning,
            stacklevel=2,
        )
    records = record(branched, data, batch_size=batch_size, accelerator=accelerator, class_map=class_map)
    costed = records if profile is None else instance("profile", profile, Profile).in_time(records)
    if method == "search" and wanted is None:
        points = best_score(costed)
    elif takes_score:
        units = ["learned"] if records.confidence is not None else []
        wanted = wanted or list(dict.fromkeys([records.task.default_score, *units]))
        points = [point for score in wanted for point in CALIBRATORS[method](costed, score)]
    else:
        points = CALIBRATORS[method](costed)
    frontier = Frontier.of(records, points, profile)
    branched.provenance.pop(CALIBRATION, None)
    branched.frontier = replace(frontier, risks=risk_tables(records))
    return branched.frontier


def _scores(branched: EarlyExitModel, scores: Iterable[str]) -> list[str]:
    """Names of scores that these branches have."""
    given = names("scores", scores)
    if not given:
        raise ConfigError("scores= is an empty list: name at least one score, or leave it out.")
    for name in given:
        policy = ThresholdPolicy((0.0,) * len(branched.branches), name, task=branched.task)
        policy.check(branched.num_classes, branched.branches.units, branched.branches.chained)
    return given
