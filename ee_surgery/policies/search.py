"""Search thresholds for the most accuracy at every price of a MAC, no finer than the records bear."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ee_surgery.errors import ConfigError
from ee_surgery.policies.operating import OperatingPoint, realise
from ee_surgery.policies.outlook import ChanceOfBeingRight, logistic
from ee_surgery.policies.policy import NEVER, Fallback, ThresholdPolicy
from ee_surgery.policies.records import ExitRecords
from ee_surgery.policies.scores import FittedScore, ScoreOf

_Floats = NDArray[np.float64]
Ranks: TypeAlias = tuple[int, ...]


class ThresholdSearch:
    """Coordinate ascent on `accuracy - price * cost` over one score's thresholds.

    A threshold is held as a rank: how many samples, from the highest score down, reach it; 0 closes the exit.
    Given all other thresholds, the best rank at one exit is found exactly, by one cumulative sum over the samples
    in the order of their scores.

    Args:
        outcomes: what an answer of each exit is worth for each sample, (K, N), in place of whether it is right: its
            estimated probability of being right has the same mean and less noise.
    """

    def __init__(
        self, records: ExitRecords, score: str | FittedScore = "max_prob", outcomes: _Floats | None = None
    ) -> None:
        self.score: str | FittedScore = score
        self.fallback: Fallback = "last"
        # Where a later exit reads the answers of earlier ones, those run and cost even when closed.
        self.always = records.chained or ScoreOf(score).stateful
        self.outcomes = records.correct.double().numpy() if outcomes is None else outcomes
        self.trunk = np.array(records.trunk_macs) / records.base_macs
        self.branch = np.array([*records.branch_macs, 0]) / records.base_macs
        self.scores = records.scores(score).double().numpy()
        self.exits, self.n = self.scores.shape
        self.order = np.argsort(-self.scores, axis=1, kind="stable")
        self.ranked = np.take_along_axis(self.scores, self.order, 1)
        # Ties stay together: a rank may stand only where the next score is lower. -inf never leaves.
        self.ends = np.ones_like(self.ranked, dtype=bool)
        self.ends[:, :-1] = self.ranked[:, 1:] < self.ranked[:, :-1]
        self.ends &= np.isfinite(self.ranked)
        self.correct = records.correct.double().numpy()
        self.position = np.empty_like(self.order)
        np.put_along_axis(self.position, self.order, np.broadcast_to(np.arange(self.n), self.order.shape), 1)
        # who has nothing finite to say is less certain than the original, whatever that says
        self.certainty = records.certainty.double().numpy().copy()
        self.certainty[-1] = np.maximum(self.certainty[-1], -1)
        self._surest: dict[tuple[bool, ...], NDArray[np.intp]] = {}

    def falling_back(self, fallback: Fallback) -> ThresholdSearch:
        """The same search with another answer for samples that never leave."""
        other = copy.copy(self)
        other.fallback = fallback
        return other

    def policy(self, ranks: Ranks) -> ThresholdPolicy:
        """What these ranks stand for."""
        return ThresholdPolicy(self.thresholds(ranks), self.score, self.fallback)

    def thresholds(self, ranks: Ranks) -> tuple[float, ...]:
        """Halfway between the last score that leaves and the first that stays."""
        values = []
        for k, rank in enumerate(ranks):
            if rank == 0:
                values.append(NEVER)
                continue
            last = self.ranked[k, rank - 1]
            after = self.ranked[k, rank] if rank < self.n and np.isfinite(self.ranked[k, rank]) else last
            middle = float(np.float32((last + after) / 2))  # scores are float32: so must a threshold between them be
            values.append(middle if after < middle <= last else float(last))
        return tuple(values)

    def evaluate(self, ranks: Ranks, outcomes: _Floats | None = None) -> tuple[float, float]:
        """Mean cost, as a fraction of the original's, and mean outcome."""
        outcomes = self.outcomes if outcomes is None else outcomes
        here = np.ones(self.n, dtype=bool)
        right = cost = 0.0
        for k, runs in enumerate(self._visits(ranks)):
            if not runs:
                continue
            cost += self.branch[k] * here.sum()
            leaves = here & (self.position[k] < ranks[k])
            right += outcomes[k][leaves].sum()
            cost += self.trunk[k] * leaves.sum()
            here &= ~leaves
        return (cost + self.trunk[-1] * here.sum()) / self.n, (right + self._rest(ranks, outcomes)[here].sum()) / self.n

    def improve(self, ranks: Ranks, price: float) -> Ranks:
        """Move one threshold after the other to its best place until none moves."""
        moved = list(ranks)
        for _ in range(20):
            before = list(moved)
            for k in reversed(range(self.exits)):
                moved[k] = self._best(k, moved, price)
            if moved == before:
                break
        return tuple(moved)

    def quotas(self, shares: _Floats) -> Ranks:
        """Ranks at which about these shares of the samples leave at each branch."""
        here, ranks = np.ones(self.n, dtype=bool), []
        for k in range(self.exits):
            reached = np.flatnonzero(here[self.order[k]])  # who is still there, by falling score
            quota = min(round(shares[k] * self.n), len(reached))
            ranks.append(self.snap(k, int(reached[quota - 1]) + 1) if quota else 0)
            here &= self.position[k] >= ranks[k]
        return tuple(ranks)

    def ranks(self, thresholds: tuple[float, ...]) -> Ranks:
        """Ranks of thresholds that were chosen on other samples."""
        return tuple(int((row >= tau).sum()) for row, tau in zip(self.scores, thresholds, strict=True))

    def sweep(self, prices: _Floats) -> dict[Ranks, tuple[float, float]]:
        """The best ranks at many prices and the starts they were found from, with mean cost and outcome."""
        closed = (0,) * self.exits
        depth = np.arange(self.exits + 1)
        ratios = [np.exp(log_g * depth) for log_g in np.linspace(-4, 4, 33)]
        starts = [closed, *(self.quotas(r / r.sum()) for r in ratios), *self.induction(prices)]
        found = {ranks: self.evaluate(ranks) for ranks in starts}
        for price in (*prices, *prices[::-1]):
            for start in (_best_at(found, price), closed):
                ranks = self.improve(start, float(price))
                found[ranks] = self.evaluate(ranks)
        return found

    def _visits(self, ranks: Sequence[int]) -> tuple[bool, ...]:
        """Which branches run."""
        return tuple(any(ranks[k:]) if self.always else bool(rank) for k, rank in enumerate(ranks))

    def _rest(self, ranks: Sequence[int], outcomes: _Floats) -> _Floats:
        """What the answer of each sample is worth, (N,), if it never leaves."""
        if self.fallback == "last":
            return outcomes[-1]
        seen = (*self._visits(ranks), True)
        if seen not in self._surest:
            self._surest[seen] = np.flatnonzero(seen)[self.certainty[list(seen)].argmax(0)]
        return outcomes[self._surest[seen], np.arange(self.n)]

    def snap(self, k: int, rank: int) -> int:
        """The nearest rank at or below that does not part a tie."""
        below = np.flatnonzero(self.ends[k, : max(rank, 0)])
        return int(below[-1]) + 1 if len(below) else 0

    def _best(self, k: int, ranks: list[int], price: float) -> int:
        here = np.ones(self.n, dtype=bool)
        for j in range(k):
            here &= self.position[j] >= ranks[j]
        opened, shut = ([*ranks[:k], rank, *ranks[k + 1 :]] for rank in (1, 0))
        stay = self._onward(k + 1, opened, price)
        leave = self.outcomes[k] - price * self.trunk[k]
        gain = np.where(here, leave - stay, 0.0)[self.order[k]].cumsum()
        gain = np.where(self.ends[k], gain, -np.inf)
        best = int(gain.argmax())
        # whoever comes here pays for the branches that run only if this exit is open, whether it leaves or not
        extra = [a and not b for a, b in zip(self._visits(opened), self._visits(shut), strict=True)]
        toll = price * self.branch[:-1][extra].sum() * here.sum()
        if self.fallback != "last":  # a closed exit has no say in who is the most confident
            toll += (self._onward(k + 1, shut, price) - stay)[here].sum()
        return best + 1 if gain[best] > toll else 0

    def _onward(self, start: int, ranks: list[int], price: float) -> _Floats:
        """What each sample is worth if it goes on to exit `start`, costs before that left out."""
        value = self._rest(ranks, self.outcomes) - price * self.trunk[-1]
        visits = self._visits(ranks)
        for j in reversed(range(start, self.exits)):
            if visits[j]:
                leave = self.outcomes[j] - price * self.trunk[j]
                value = np.where(self.position[j] < ranks[j], leave, value) - price * self.branch[j]
        return value

    # --- three ways to choose ranks for a price, from the fewest things fitted to the most

    def shared(self, prices: _Floats) -> list[Ranks]:
        """One threshold for all exits: the best of a hundred at every price."""
        finite = self.scores[np.isfinite(self.scores)]
        grid = np.unique(np.quantile(finite, np.linspace(0, 1, 100))) if len(finite) else np.zeros(1)
        ranks = [(0,) * self.exits, *(self.ranks((tau,) * self.exits) for tau in grid)]
        cost, value = np.array([self.evaluate(r) for r in ranks]).T
        return [ranks[int((value - price * cost).argmax())] for price in prices]

    def induction(self, prices: _Floats) -> list[Ranks]:
        """Optimal stopping: leave where the chance of being right is worth more than going on.

        Backward over the exits: the value of going on is regressed on the chance of being right here (a parabola), and
        the threshold stands where the two cross. Source: the regression method of Longstaff & Schwartz (Review of
        Financial Studies, 2001) for optimal stopping.
        """
        chances = [_chance(row, right) for row, right in zip(self.scores, self.correct, strict=False)]
        bases = [np.stack([np.ones(self.n), p, p**2], 1) for p in chances]
        penalty = np.diag([1e-6, 10.0, 10.0])
        solvers = [np.linalg.solve(basis.T @ basis + penalty, basis.T) for basis in bases]
        found = []
        for price in prices:
            ranks = [0] * self.exits
            value = self._rest((1,) * self.exits, self.outcomes) - price * self.trunk[-1]
            for k in reversed(range(self.exits)):
                onward = bases[k] @ (solvers[k] @ value)
                stays = (chances[k] - price * self.trunk[k] < onward)[self.order[k]]
                rank = self.snap(k, int(stays.argmax()) if stays.any() else self.n)
                left = np.where(self.position[k] < rank, self.outcomes[k] - price * self.trunk[k], value)
                toll = price * self.branch[k]
                asked_anyway = self.always and any(ranks[k + 1 :])
                if rank and left.mean() - (0 if asked_anyway else toll) > value.mean():
                    ranks[k], value = rank, left - toll
                elif asked_anyway:
                    value = value - toll
            found.append(tuple(ranks))
        return found

    def ascent(self, prices: _Floats) -> list[Ranks]:
        """A threshold an exit, moved until none moves: from several starts, the optimal stopping's among them."""
        found = self.sweep(prices)
        return [_best_at(found, price) for price in prices]


def _chance(scores: _Floats, right: _Floats) -> _Floats:
    """How likely a score means a right answer, (N,): logistic in its log-odds, never falling."""
    finite = np.where(np.isfinite(scores), scores, np.nanmin(np.where(np.isfinite(scores), scores, np.nan), initial=0))
    if finite.min() >= 0 and finite.max() <= 1:
        finite = np.log(finite.clip(1e-7, 1 - 1e-7) / (1 - finite.clip(1e-7, 1 - 1e-7)))
    slope, constant = logistic(finite[:, None], right)
    if slope < 0:
        return np.full_like(finite, right.mean())
    return 1 / (1 + np.exp(-(slope * finite + constant).clip(-30, 30)))


How = Literal["shared", "induction", "ascent"]
HOWS: tuple[How, ...] = ("shared", "induction", "ascent")
FALLBACKS: tuple[Fallback, ...] = ("last", "most_confident")


@dataclass(frozen=True)
class Candidate:
    """A way to get thresholds from records."""

    score: str
    """A registered name, or `chance`: the chance of being right, to be fitted."""
    how: How
    """How its thresholds are chosen."""
    fallback: Fallback

    def ranks(self, search: ThresholdSearch, prices: _Floats) -> list[Ranks]:
        """The best ranks at each price."""
        return getattr(search, self.how)(prices)


def fit(records: ExitRecords, score: str) -> ThresholdSearch:
    """A search over the records, estimated chances of being right standing for outcomes."""
    chance = ChanceOfBeingRight.fit(records)
    return ThresholdSearch(records, chance if score == "chance" else score, chance.probabilities(records))


@dataclass(frozen=True)
class Curve:
    """What a candidate gives on samples that did not choose its thresholds, price by price, (folds, prices)."""

    cost: _Floats
    seen: _Floats
    """Accuracy on the samples that chose."""
    new: _Floats
    """Accuracy on the others."""

    def areas(self, low: float) -> _Floats:
        """Mean new accuracy over costs from `low` to 1, a number a fold."""
        grid = np.linspace(low, 1, 100)
        return np.array([_read_off(grid, cost, new).mean() for cost, new in zip(self.cost, self.new, strict=True)])

    def luck(self, cost: float) -> float:
        """How much of the accuracy at this cost will not be there on new data."""
        lucky = np.maximum(self.seen.mean(0) - self.new.mean(0), 0)
        return float(_read_off(np.array(cost), self.cost.mean(0), lucky))


def _read_off(grid: _Floats, cost: _Floats, value: _Floats) -> _Floats:
    order = np.argsort(cost, kind="stable")
    return np.interp(grid, cost[order], value[order])


def cross_validate(
    records: ExitRecords, candidates: Sequence[Candidate], prices: _Floats, folds: int = 5
) -> list[Curve]:
    """Thresholds from all folds but one, tried on that one: a curve for each candidate."""
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    found = np.zeros((len(candidates), 3, folds, len(prices)))
    for fold, held in enumerate(rows.tensor_split(folds)):
        fitted = functools.cache(functools.partial(fit, records.take(rows[~torch.isin(rows, held)])))
        fresh = functools.cache(functools.partial(ThresholdSearch, records.take(held)))
        for candidate, curve in zip(candidates, found, strict=True):
            chosen = fitted(candidate.score).falling_back(candidate.fallback)
            other = fresh(chosen.score).falling_back(candidate.fallback)
            for i, ranks in enumerate(candidate.ranks(chosen, prices)):
                cost, accuracy = other.evaluate(other.ranks(chosen.thresholds(ranks)))
                curve[:, fold, i] = cost, chosen.evaluate(ranks, chosen.correct)[1], accuracy
    return [Curve(*curve) for curve in found]


def search(
    records: ExitRecords,
    score: str = "max_prob",
    *,
    fallbacks: Sequence[Fallback] = FALLBACKS,
    prices: int = 64,
) -> list[OperatingPoint]:
    """Operating points of one score over the whole range from never exiting to always leaving first.

    Thresholds for each of many prices of a MAC are chosen in three ways, one threshold for all exits, optimal
    stopping, and coordinate ascent on all thresholds; what never leaves gets the original's answer, or the most
    confident one on its way. Five-fold cross-validation picks what does best on samples which did not choose, the
    simplest within a standard error of it: few records bear few parameters. The best of many thresholds is partly luck
    all the same: how much, the same folds tell, and it is taken off in each point's `expected_accuracy`.

    Args:
        fallbacks: whose answer may be given where nothing left.
        prices: how many; time grows linearly.
    """
    return best_of(records, [score], f"search({score})", fallbacks, prices)


def stopping(records: ExitRecords) -> list[OperatingPoint]:
    """Like `search`, with one more score to choose: the chance of being right, given the exits before as well.

    It looks back, so exits that are closed still run; and it costs a dozen small operations an exit.
    """
    return best_of(records, ["max_prob", "chance"], "stopping")


_FOLDS = 5


def best_of(
    records: ExitRecords,
    scores: Sequence[str],
    rule: str,
    fallbacks: Sequence[Fallback] = FALLBACKS,
    prices: int = 64,
) -> list[OperatingPoint]:
    """Operating points of the candidate that cross-validation picks; of the simplest, from too few samples for it.

    The ascent takes longest, and is tried with the score and the fallback that the other two ways do best with.
    """
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
        point = realise(records, state.policy(ranks), rule)
        lucky = curve.luck(point.macs_fraction) if curve is not None and any(ranks) else 0.0
        points.append(replace(point, expected_accuracy=point.accuracy - lucky))
    return points


def _simplest(curves: Sequence[Curve], candidates: Sequence[Candidate]) -> tuple[Curve, Candidate]:
    """The best of the candidates that fit the fewest thresholds, of all within a standard error of the very best.

    Source: the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984.
    """
    low = min(1.0, max(float(curve.cost.min()) for curve in curves))
    areas = np.array([curve.areas(low) for curve in curves])
    behind = areas[areas.mean(1).argmax()] - areas
    close = np.flatnonzero(behind.mean(1) <= behind.std(1, ddof=1) / np.sqrt(areas.shape[1])).tolist()
    chosen = min(close, key=lambda i: (HOWS.index(candidates[i].how), -areas[i].mean()))
    return curves[chosen], candidates[chosen]


def realised_drop(records: ExitRecords, drop: float, score: str = "max_prob") -> OperatingPoint:
    """The cheapest thresholds found whose realised drop on these very records is at most `drop`.

    New data will be less kind, the more so the fewer records: `Frontier.at` asks the expected accuracy instead.

    Args:
        drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
    """
    if not 0 <= drop <= 1:
        raise ConfigError(f"drop must be in [0, 1], got {drop}: 0.01 is one percentage point.")
    state = ThresholdSearch(records, score)
    found = state.sweep(_prices(64))
    _fill(found, state)
    ranks = next(r for r in _front(found) if records.base_accuracy - found[r][1] <= drop + 1e-12)
    return realise(records, state.policy(ranks), f"realised_drop({drop:g})")


def _fill(found: dict[Ranks, tuple[float, float]], state: ThresholdSearch) -> None:
    """Add what lies between neighbours on the front, where no single price is best."""
    for cheap, dear in itertools.pairwise(_front(found)):
        steps = min(20, int((found[dear][0] - found[cheap][0]) / 0.002))
        for t in np.linspace(0, 1, steps + 2)[1:-1]:
            between = zip(cheap, dear, strict=True)
            ranks = tuple(state.snap(k, round(a + t * (b - a))) for k, (a, b) in enumerate(between))
            found[ranks] = state.evaluate(ranks)


def _prices(count: int) -> _Floats:
    return np.geomspace(1e-3, 30, count)


def _best_at(found: Mapping[Ranks, tuple[float, float]], price: float) -> Ranks:
    return max(found, key=lambda ranks: found[ranks][1] - price * found[ranks][0])


def _front(found: Mapping[Ranks, tuple[float, float]]) -> list[Ranks]:
    """From cheap to dear, each more accurate than all cheaper ones; and never leaving, which needs no luck."""
    kept: list[Ranks] = []
    for ranks in sorted(found, key=lambda ranks: (found[ranks][0], -found[ranks][1])):
        if not kept or found[ranks][1] > found[kept[-1]][1] or not any(ranks):
            kept.append(ranks)
    return kept
