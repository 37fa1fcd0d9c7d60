"""Search thresholds directly for what they realise: the most accuracy at every price of a MAC."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ee_surgery.errors import ConfigError
from ee_surgery.policies.operating import OperatingPoint, realise
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.records import ExitRecords

_Floats = NDArray[np.float64]
Ranks: TypeAlias = tuple[int, ...]


class _Search:
    """Coordinate ascent on `accuracy - price * cost` over one score's thresholds.

    A threshold is held as a rank: how many samples, from the highest score down, reach it; 0 closes the exit.
    Given all other thresholds, the best rank at one exit is found exactly, by one cumulative sum over the samples
    in the order of their scores.
    """

    def __init__(self, records: ExitRecords, score: str) -> None:
        self.correct = records.correct.double().numpy()
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
        self.position = np.empty_like(self.order)
        np.put_along_axis(self.position, self.order, np.broadcast_to(np.arange(self.n), self.order.shape), 1)

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

    def evaluate(self, ranks: Ranks) -> tuple[float, float]:
        """Realised mean cost, as a fraction of the original's, and accuracy."""
        here = np.ones(self.n, dtype=bool)
        right = cost = 0.0
        for k, rank in enumerate(ranks):
            if rank == 0:
                continue
            cost += self.branch[k] * here.sum()
            leaves = here & (self.position[k] < rank)
            right += self.correct[k][leaves].sum()
            cost += self.trunk[k] * leaves.sum()
            here &= ~leaves
        return (cost + self.trunk[-1] * here.sum()) / self.n, (right + self.correct[-1][here].sum()) / self.n

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

    def sweep(self, prices: int) -> dict[Ranks, tuple[float, float]]:
        """The best ranks at many prices and the starts they were found from, with mean cost and accuracy."""
        closed = (0,) * self.exits
        depth = np.arange(self.exits + 1)
        ratios = [np.exp(log_g * depth) for log_g in np.linspace(-4, 4, 33)]
        found = {ranks: self.evaluate(ranks) for ranks in [closed, *(self.quotas(r / r.sum()) for r in ratios)]}
        for price in (*_prices(prices), *_prices(prices)[::-1]):
            for start in (_best_at(found, price), closed):
                ranks = self.improve(start, float(price))
                found[ranks] = self.evaluate(ranks)
        return found

    def snap(self, k: int, rank: int) -> int:
        """The nearest rank at or below that does not part a tie."""
        below = np.flatnonzero(self.ends[k, : max(rank, 0)])
        return int(below[-1]) + 1 if len(below) else 0

    def _best(self, k: int, ranks: list[int], price: float) -> int:
        here = np.ones(self.n, dtype=bool)
        for j in range(k):
            here &= self.position[j] >= ranks[j]
        stay = self._onward(k + 1, ranks, price)
        leave = self.correct[k] - price * self.trunk[k]
        gain = np.where(here, leave - stay, 0.0)[self.order[k]].cumsum()
        gain = np.where(self.ends[k], gain, -np.inf)
        best = int(gain.argmax())
        # whoever comes here pays for the branch, whether it leaves or not
        return best + 1 if gain[best] > price * self.branch[k] * here.sum() else 0

    def _onward(self, start: int, ranks: list[int], price: float) -> _Floats:
        """What each sample is worth if it goes on to exit `start`, costs before that left out."""
        value = self.correct[-1] - price * self.trunk[-1]
        for j in reversed(range(start, self.exits)):
            if ranks[j]:
                leave = self.correct[j] - price * self.trunk[j]
                value = np.where(self.position[j] < ranks[j], leave, value) - price * self.branch[j]
        return value


def search(records: ExitRecords, score: str, prices: int = 64) -> list[OperatingPoint]:
    """Operating points of one score over the whole range from never exiting to always leaving first.

    For each of many prices of a MAC, thresholds that maximise accuracy less price times mean cost on the records:
    coordinate ascent from the best known so far, from the geometric distributions of MSDNet and from all exits
    closed. Then the points between neighbours, where no single price is best.

    The best of many thresholds is partly luck. How much is measured by cross-validation, and taken off in each
    point's `expected_accuracy`.

    Args:
        prices: how many; time grows linearly.
    """
    state = _Search(records, score)
    found = state.sweep(prices)
    for low, high in itertools.pairwise(_front(found)):
        steps = min(20, int((found[high][0] - found[low][0]) / 0.002))
        for t in np.linspace(0, 1, steps + 2)[1:-1]:
            ranks = tuple(state.snap(k, round(a + t * (b - a))) for k, (a, b) in enumerate(zip(low, high, strict=True)))
            found[ranks] = state.evaluate(ranks)
    costs, luck = _luck(records, score)
    points = []
    for ranks in _front(found):
        point = realise(records, ThresholdPolicy(state.thresholds(ranks), score), f"search({score})")
        lucky = float(np.interp(point.macs_fraction, costs, luck)) if any(ranks) else 0.0
        points.append(replace(point, expected_accuracy=point.accuracy - lucky))
    return points


def realised_drop(records: ExitRecords, drop: float, score: str = "max_prob") -> OperatingPoint:
    """The cheapest thresholds found whose realised drop on these very records is at most `drop`.

    New data will be less kind, the more so the fewer records: `Frontier.at` asks the expected accuracy instead.

    Args:
        drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
    """
    if not 0 <= drop <= 1:
        raise ConfigError(f"drop must be in [0, 1], got {drop}: 0.01 is one percentage point.")
    return next(point for point in search(records, score) if point.accuracy_drop <= drop + 1e-12)


def _luck(records: ExitRecords, score: str, folds: int = 5, prices: int = 24) -> tuple[_Floats, _Floats]:
    """How much less accurate thresholds are on samples that did not choose them, by mean cost (rising).

    Cross-validation: thresholds for each price from all folds but one, tried on that one.
    """
    if len(records) < 2 * folds:
        return np.ones(1), np.zeros(1)
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    totals = np.zeros((prices, 3))
    for held in rows.chunk(folds):
        rest = rows[~torch.isin(rows, held)]
        chosen, fresh = _Search(records.take(rest), score), _Search(records.take(held), score)
        found = chosen.sweep(prices)
        for i, price in enumerate(_prices(prices)):
            ranks = _best_at(found, price)
            cost, accuracy = fresh.evaluate(fresh.ranks(chosen.thresholds(ranks)))
            totals[i] += cost, found[ranks][1], accuracy
    cost, seen, new = totals[::-1].T / folds  # the dearest MAC comes last, and with it the cheapest point
    order = np.argsort(cost, kind="stable")
    return cost[order], np.maximum(seen - new, 0)[order]


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
