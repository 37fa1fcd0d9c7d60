"""Thresholds that maximize accuracy at a price per MAC, in three ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ee_surgery.calibration.budget import between, quota_thresholds
from ee_surgery.calibration.correctness import logistic
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.policies.policy import NEVER, Fallback, ThresholdPolicy
from ee_surgery.policies.scores import FittedScore, ScoreOf

Floats: TypeAlias = NDArray[np.float64]
Ranks: TypeAlias = tuple[int, ...]


class ThresholdSearch:
    """Coordinate ascent on `accuracy - price * cost` over one score's thresholds.

    A threshold is represented by a rank: the number of samples, from the highest score down, that reach it; 0 closes
    the exit. Given all other thresholds, the best rank at one exit is found exactly, by one cumulative sum over the
    samples in the order of their scores.

    Args:
        outcomes: the value of each exit's prediction for each sample, (K, N), instead of 0 or 1 for correctness: an
            estimated probability of being correct has the same mean and less noise.
    """

    def __init__(
        self, records: ExitRecords, score: str | FittedScore | None = None, outcomes: Floats | None = None
    ) -> None:
        self.score: str | FittedScore = records.task.default_score if score is None else score
        self.fallback: Fallback = "last"
        # If later exits depend on earlier ones, those run and cost MACs even when closed.
        self.always = records.chained or ScoreOf(self.score, records.task).stateful
        self.outcomes = records.outcomes.numpy() if outcomes is None else outcomes
        self.trunk = np.array(records.trunk_macs) / records.base_macs
        self.branch = np.array([*records.branch_macs, 0]) / records.base_macs
        self.scores = records.scores(self.score).double().numpy()
        self.exits, self.n = self.scores.shape  # (K - 1, N), as are order, ranked, ends and position
        self.order = np.argsort(-self.scores, axis=1, kind="stable")
        self.ranked = np.take_along_axis(self.scores, self.order, 1)
        # Equal scores cannot be separated: a rank may end only where the next score is lower. -inf never leaves.
        self.ends = np.ones_like(self.ranked, dtype=bool)
        self.ends[:, :-1] = self.ranked[:, 1:] < self.ranked[:, :-1]
        self.ends &= np.isfinite(self.ranked)
        self.correct = records.outcomes.numpy()
        self.position = np.empty_like(self.order)
        np.put_along_axis(self.position, self.order, np.broadcast_to(np.arange(self.n), self.order.shape), 1)
        # samples with non-finite branch logits rank below the original's certainty
        self.certainty = records.certainty.double().numpy().copy()
        self.certainty[-1] = np.maximum(self.certainty[-1], -1)
        self._surest: dict[tuple[bool, ...], NDArray[np.intp]] = {}

    def falling_back(self, fallback: Fallback) -> ThresholdSearch:
        """The same search with a different fallback for samples that never exit early."""
        other = copy.copy(self)
        other.fallback = fallback
        return other

    def only(self, exits: Sequence[int]) -> ThresholdSearch:
        """The search restricted to some exits, given by their numbers in program order."""
        other, rows, kept = copy.copy(self), [*exits, self.exits], list(exits)
        for name in ("trunk", "branch", "outcomes", "correct", "certainty"):
            setattr(other, name, getattr(self, name)[rows])
        for name in ("scores", "order", "ranked", "ends", "position"):
            setattr(other, name, getattr(self, name)[kept])
        other.exits, other._surest = len(kept), {}
        return other

    def policy(self, ranks: Ranks) -> ThresholdPolicy:
        """The policy with these ranks as thresholds."""
        return ThresholdPolicy(self.thresholds(ranks), self.score, self.fallback)

    def thresholds(self, ranks: Ranks) -> tuple[float, ...]:
        """Halfway between the last score that leaves and the first that stays."""
        return tuple(between(self.ranked[k], rank) if rank else NEVER for k, rank in enumerate(ranks))

    def evaluate(self, ranks: Ranks, outcomes: Floats | None = None) -> tuple[float, float]:
        """Mean cost, as a fraction of the original's, and mean outcome."""
        outcomes = self.outcomes if outcomes is None else outcomes
        here = np.ones(self.n, dtype=bool)  # samples that have not left yet
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
        """Optimize one threshold after the other until none changes."""
        moved = list(ranks)
        for _ in range(20):
            before = list(moved)
            for k in reversed(range(self.exits)):
                moved[k] = self._best(k, moved, price)
            if moved == before:
                break
        return tuple(moved)

    def quotas(self, shares: Floats) -> Ranks:
        """Ranks at which about these shares of the samples leave at each branch."""
        quotas = [round(share * self.n) for share in shares[: self.exits]]
        return self.ranks(quota_thresholds(torch.from_numpy(self.scores), quotas))

    def ranks(self, thresholds: tuple[float, ...]) -> Ranks:
        """Ranks of thresholds that were chosen on other samples."""
        return tuple(int((row >= tau).sum()) for row, tau in zip(self.scores, thresholds, strict=True))

    def sweep(self, prices: Floats) -> dict[Ranks, tuple[float, float]]:
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

    def _rest(self, ranks: Sequence[int], outcomes: Floats) -> Floats:
        """The outcome of each sample, (N,), if it never exits early."""
        if self.fallback == "last":
            return outcomes[-1]
        seen = (*self._visits(ranks), True)
        if seen not in self._surest:
            self._surest[seen] = np.flatnonzero(seen)[self.certainty[list(seen)].argmax(0)]
        return outcomes[self._surest[seen], np.arange(self.n)]

    def snap(self, k: int, rank: int) -> int:
        """The nearest rank at or below that does not separate equal scores."""
        below = np.flatnonzero(self.ends[k, : max(rank, 0)])
        return int(below[-1]) + 1 if len(below) else 0

    def _best(self, k: int, ranks: list[int], price: float) -> int:
        """The best rank at exit k, given the ranks of all other exits."""
        here = np.ones(self.n, dtype=bool)
        for j in range(k):
            here &= self.position[j] >= ranks[j]
        opened, shut = ([*ranks[:k], rank, *ranks[k + 1 :]] for rank in (1, 0))
        stay = self._onward(k + 1, opened, price)
        leave = self.outcomes[k] - price * self.trunk[k]
        # gain[r - 1]: total gain if the r samples with the highest scores leave here
        gain = np.where(here, leave - stay, 0.0)[self.order[k]].cumsum()
        gain = np.where(self.ends[k], gain, -np.inf)
        best = int(gain.argmax())
        # every sample that reaches this exit pays for the branches that run only if it is open, even if it stays
        extra = [a and not b for a, b in zip(self._visits(opened), self._visits(shut), strict=True)]
        toll = price * self.branch[:-1][extra].sum() * here.sum()
        if self.fallback != "last":  # a closed exit does not take part in the most confident fallback
            toll += (self._onward(k + 1, shut, price) - stay)[here].sum()
        return best + 1 if gain[best] > toll else 0

    def _onward(self, start: int, ranks: list[int], price: float) -> Floats:
        """Value of each sample, (N,), if it continues to exit `start`, without earlier costs."""
        value = self._rest(ranks, self.outcomes) - price * self.trunk[-1]
        visits = self._visits(ranks)
        for j in reversed(range(start, self.exits)):
            if visits[j]:
                leave = self.outcomes[j] - price * self.trunk[j]
                value = np.where(self.position[j] < ranks[j], leave, value) - price * self.branch[j]
        return value

    # --- three ways to choose ranks for a price, from the fewest fitted parameters to the most

    def shared(self, prices: Floats) -> list[Ranks]:
        """One threshold for all exits: the best of 100 at every price."""
        finite = self.scores[np.isfinite(self.scores)]
        grid = np.unique(np.quantile(finite, np.linspace(0, 1, 100))) if len(finite) else np.zeros(1)
        ranks = [(0,) * self.exits, *(self.ranks((tau,) * self.exits) for tau in grid)]
        cost, value = np.array([self.evaluate(r) for r in ranks]).T
        return [ranks[int((value - price * cost).argmax())] for price in prices]

    def induction(self, prices: Floats) -> list[Ranks]:
        """Optimal stopping: leave where the probability of being correct is worth more than continuing.

        Backward over the exits: the value of continuing is regressed on the probability of being correct here (a
        parabola), and the threshold is where the two cross. Source: the regression method of Longstaff & Schwartz
        (Review of Financial Studies, 2001) for optimal stopping.
        """
        chances = [_chance(row, right) for row, right in zip(self.scores, self.correct, strict=False)]
        bases = [np.stack([np.ones(self.n), p, p**2], 1) for p in chances]
        penalty = np.diag([1e-6, 10.0, 10.0])  # ridge; the constant is almost free
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

    def ascent(self, prices: Floats) -> list[Ranks]:
        """One threshold per exit by coordinate ascent, from several starts, including those of optimal stopping."""
        found = self.sweep(prices)
        return [_best_at(found, price) for price in prices]


def _chance(scores: Floats, right: Floats) -> Floats:
    """Probability of being correct given the score, (N,): logistic in its log-odds, non-decreasing."""
    finite = np.where(np.isfinite(scores), scores, np.nanmin(np.where(np.isfinite(scores), scores, np.nan), initial=0))
    if finite.min() >= 0 and finite.max() <= 1:
        finite = np.log(finite.clip(1e-7, 1 - 1e-7) / (1 - finite.clip(1e-7, 1 - 1e-7)))
    slope, constant = logistic(finite[:, None], right)
    if slope < 0:
        return np.full_like(finite, right.mean())
    return 1 / (1 + np.exp(-(slope * finite + constant).clip(-30, 30)))


def _best_at(found: Mapping[Ranks, tuple[float, float]], price: float) -> Ranks:
    return max(found, key=lambda ranks: found[ranks][1] - price * found[ranks][0])
