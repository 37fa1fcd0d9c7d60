"""Search thresholds for the highest accuracy at every price per MAC, with a method as simple as the records require."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from ee_surgery.calibration.combined import CombinedScore, combined_names
from ee_surgery.calibration.correctness import ChanceOfBeingRight
from ee_surgery.calibration.pareto import pareto
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.calibration.threshold_search import Floats, Ranks, ThresholdSearch
from ee_surgery.checks import accuracy_drop, choice, count, instance, names
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import Fallback
from ee_surgery.policies.scores import FittedScore

How = Literal["shared", "induction", "ascent"]
HOWS: tuple[How, ...] = get_args(How)
"""From the fewest thresholds fitted to the most."""
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)


@dataclass(frozen=True)
class Candidate:
    """A method to choose thresholds on records."""

    score: str | FittedScore
    """A registered name, a fitted score, or `chance`: the fitted probability of being correct."""
    how: How
    """How its thresholds are chosen."""
    fallback: Fallback

    def ranks(self, search: ThresholdSearch, prices: Floats) -> list[Ranks]:
        """The best ranks at each price."""
        return getattr(search, self.how)(prices)


def fit(records: ExitRecords, score: str | FittedScore) -> ThresholdSearch:
    """A search over the records, with outcomes replaced by estimated probabilities of being correct if logits exist."""
    if not records.has_probabilities:
        return ThresholdSearch(records, CombinedScore.fit(records) if score == "chance" else score)
    chance = ChanceOfBeingRight.fit(records)
    return ThresholdSearch(records, chance if score == "chance" else score, chance.probabilities(records))


@dataclass(frozen=True)
class Curve:
    """Cross-validated cost and accuracy of a candidate, arrays of shape (folds, prices)."""

    cost: Floats
    seen: Floats
    """Accuracy on the samples that the thresholds were chosen on."""
    new: Floats
    """Accuracy on the held-out fold."""

    def areas(self, low: float) -> Floats:
        """Mean held-out accuracy over costs from `low` to 1, one number per fold."""
        grid = np.linspace(low, 1, 100)
        return np.array([_interpolate(grid, cost, new).mean() for cost, new in zip(self.cost, self.new, strict=True)])

    def optimism(self, cost: float) -> float:
        """Calibration accuracy minus cross-validated accuracy at this cost, at least 0."""
        excess = np.maximum(self.seen.mean(0) - self.new.mean(0), 0)
        return float(_interpolate(np.array(cost), self.cost.mean(0), excess))


def _interpolate(grid: Floats, cost: Floats, value: Floats) -> Floats:
    order = np.argsort(cost, kind="stable")
    return np.interp(grid, cost[order], value[order])


def cross_validate(
    records: ExitRecords, candidates: Sequence[Candidate], prices: Floats, folds: int = 5
) -> list[Curve]:
    """Choose thresholds on all folds but one and evaluate them on that one: one curve per candidate."""
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    curves = np.zeros((len(candidates), 3, folds, len(prices)))  # 3: cost, seen, new
    for fold, held in enumerate(rows.tensor_split(folds)):
        fitted = functools.cache(functools.partial(fit, records.take(rows[~torch.isin(rows, held)])))
        fresh = functools.cache(functools.partial(ThresholdSearch, records.take(held)))
        for candidate, curve in zip(candidates, curves, strict=True):
            chosen = fitted(candidate.score).falling_back(candidate.fallback)
            other = fresh(chosen.score).falling_back(candidate.fallback)
            for i, ranks in enumerate(candidate.ranks(chosen, prices)):
                cost, accuracy = other.evaluate(other.ranks(chosen.thresholds(ranks)))
                curve[:, fold, i] = cost, chosen.evaluate(ranks, chosen.correct)[1], accuracy
    return [Curve(*curve) for curve in curves]


def search(
    records: ExitRecords,
    score: str | FittedScore | None = None,
    *,
    fallbacks: Sequence[Fallback] = FALLBACKS,
    prices: int = 64,
) -> list[OperatingPoint]:
    """Operating points of one score over the whole range, from never exiting to always leaving at the first exit.

    For each of many prices per MAC, thresholds are chosen in three ways: one threshold for all exits, optimal
    stopping, and coordinate ascent on all thresholds. Samples that never exit early get the original's prediction or
    the most confident one seen. Five-fold cross-validation picks the simplest method within one standard error of the
    best, since few records support few parameters. Choosing the best of many thresholds is still optimistic: the same
    folds estimate by how much, and each point's `expected_accuracy` is corrected for it.

    Args:
        fallbacks: to try for samples that never exit early.
        prices: number of prices; time grows linearly.
    """
    instance("records", records, ExitRecords)
    score = records.task.default_score if score is None else score
    given: list[Fallback] = [choice("fallbacks", each, FALLBACKS) for each in names("fallbacks", fallbacks)]
    return best_of(records, [score], f"search({score})", given, count("prices", prices, low=2))


_TELLING = 200  # records that tell scores apart


def best_score(records: ExitRecords) -> list[OperatingPoint]:
    """Operating points of whichever score cross-validation picks; `max_prob` unless another is better by more than
    the standard error over the folds.

    The others are the margin, the entropy, the estimated probability of being correct (see `stopping`), and the
    confidence units where branches have them; of records without logits, all scores recorded and `CombinedScore`. Fewer
    than 200 records cannot tell, and of answers that are no choices the confidence units alone say something.
    """
    if len(records) < _TELLING or not records.task.chooses:
        return search(records)
    if records.logits is None:
        return best_of(records, [*combined_names(records), "chance"], "search")
    units = ["learned"] if records.confidence is not None else []
    return best_of(records, ["max_prob", "margin", "entropy", *units, "chance"], "search")


def stopping(records: ExitRecords) -> list[OperatingPoint]:
    """Like `search`, with one more score to choose from: the probability of being correct, given earlier exits too.

    That score uses earlier exits, so closed exits still run; and it takes a dozen small operations per exit.
    """
    return best_of(records, ["max_prob", "chance"], "stopping")


_FOLDS = 5


def best_of(
    records: ExitRecords,
    scores: Sequence[str | FittedScore],
    rule: str,
    fallbacks: Sequence[Fallback] = FALLBACKS,
    prices: int = 64,
) -> list[OperatingPoint]:
    """Operating points of the candidate that cross-validation picks, or of the simplest one with too few samples.

    Ascent takes longest, so it is tried only with the best score and fallback of the other two methods.
    """
    if not records.task.chooses:
        fallbacks = FALLBACKS[:1]  # no answer says how sure it is beside another
    candidates = [Candidate(*each) for each in itertools.product(scores, HOWS[:2], fallbacks)]
    curve, best = None, candidates[0]
    if len(records) >= 2 * _FOLDS:
        few = _prices(16)
        curves = cross_validate(records, candidates, few, _FOLDS)
        candidates.append(replace(_simplest(curves, candidates)[1], how="ascent"))
        curves += cross_validate(records, candidates[-1:], few, _FOLDS)
        curve, best = _simplest(curves, candidates)
    state = fit(records, best.score).falling_back(best.fallback)
    closed = (0,) * state.exits
    found = {ranks: state.evaluate(ranks) for ranks in [closed, *best.ranks(state, _prices(prices))]}
    _fill(found, state)
    points = []
    for ranks in _front(found):
        point = replay_point(records, state.policy(ranks), rule)
        optimism = curve.optimism(point.macs_fraction) if curve is not None and any(ranks) else 0.0
        points.append(replace(point, expected_accuracy=point.accuracy - optimism))
    return points


def _simplest(curves: Sequence[Curve], candidates: Sequence[Candidate]) -> tuple[Curve, Candidate]:
    """Of the candidates within one standard error of the best, the one with the fewest fitted parameters.

    Among those, the score that is named first, and of that the best.

    Source: the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984.
    """
    low = min(1.0, max(float(curve.cost.min()) for curve in curves))
    areas = np.array([curve.areas(low) for curve in curves])
    behind = areas[areas.mean(1).argmax()] - areas
    close = np.flatnonzero(behind.mean(1) <= behind.std(1, ddof=1) / np.sqrt(areas.shape[1])).tolist()
    named = list(dict.fromkeys(candidate.score for candidate in candidates))
    chosen = min(
        close,
        key=lambda i: (HOWS.index(candidates[i].how), named.index(candidates[i].score), -areas[i].mean()),
    )
    return curves[chosen], candidates[chosen]


def realised_drop(records: ExitRecords, drop: float, score: str | None = None) -> OperatingPoint:
    """The cheapest thresholds whose drop on these records is at most `drop`.

    The drop on new data will be larger, the more so with few records: `Frontier.at` uses the expected accuracy instead.

    Args:
        drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
    """
    instance("records", records, ExitRecords)
    drop = accuracy_drop("drop", drop)
    state = ThresholdSearch(records, score)
    found = state.sweep(_prices(64))
    _fill(found, state)
    ranks = next(r for r in _front(found) if records.base_accuracy - found[r][1] <= drop + 1e-12)
    return replay_point(records, state.policy(ranks), f"realised_drop({drop:g})")


def _fill(found: dict[Ranks, tuple[float, float]], state: ThresholdSearch) -> None:
    """Add points between neighbours on the front, which are not optimal at any single price."""
    for cheap, dear in itertools.pairwise(_front(found)):
        steps = min(20, int((found[dear][0] - found[cheap][0]) / 0.002))
        for t in np.linspace(0, 1, steps + 2)[1:-1]:
            between = zip(cheap, dear, strict=True)
            ranks = tuple(state.snap(k, round(a + t * (b - a))) for k, (a, b) in enumerate(between))
            found[ranks] = state.evaluate(ranks)


def _prices(count: int) -> Floats:
    return np.geomspace(1e-3, 30, count)


def _front(found: Mapping[Ranks, tuple[float, float]]) -> list[Ranks]:
    """Pareto front from cheap to expensive, and never exiting, whose accuracy is not optimistic."""
    return pareto(found, lambda ranks: found[ranks][0], lambda ranks: found[ranks][1], lambda ranks: not any(ranks))
