"""Search thresholds directly for what they realise: the most accuracy at every price of a MAC."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from ee_surgery.policies.operating import OperatingPoint, realise
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.records import ExitRecords

_Floats = NDArray[np.float64]


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

    def thresholds(self, ranks: list[int]) -> tuple[float, ...]:
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

    def improve(self, ranks: list[int], price: float) -> list[int]:
        """Move one threshold after the other to its best place until none moves."""
        ranks = list(ranks)
        for _ in range(20):
            before = list(ranks)
            for k in reversed(range(self.exits)):
                ranks[k] = self._best(k, ranks, price)
            if ranks == before:
                break
        return ranks

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


def search(records: ExitRecords, score: str, prices: int = 48) -> list[OperatingPoint]:
    """Operating points of one score over the whole range from never exiting to always leaving first.

    For each of many prices of a MAC, thresholds that maximise accuracy less price times mean cost on the records,
    from both ends and from all exits closed; then the points between neighbours, where no single price is best.

    Args:
        prices: how many; cost grows linearly.
    """
    state = _Search(records, score)
    closed = [0] * state.exits
    grid = np.geomspace(1e-3, 30, prices)
    found: dict[tuple[int, ...], None] = {tuple(closed): None}
    for ladder in (grid, grid[::-1]):
        ranks = closed
        for price in ladder:
            for start in (ranks, closed):
                candidate = state.improve(start, float(price))
                found[tuple(candidate)] = None
                ranks = candidate if start is ranks else ranks
    points = sorted((_point(records, state, ranks, score), ranks) for ranks in found)
    between: dict[tuple[int, ...], None] = {}
    for (_, low), (_, high) in itertools.pairwise(points):
        for t in (0.2, 0.4, 0.6, 0.8):
            mixed = [_snap(state, k, round(a + t * (b - a))) for k, (a, b) in enumerate(zip(low, high, strict=True))]
            between[tuple(mixed)] = None
    everything = [ranks for _, ranks in points] + [ranks for ranks in between if ranks not in found]
    rule = f"search({score})"
    return [realise(records, ThresholdPolicy(state.thresholds(list(ranks)), score), rule) for ranks in everything]


def _point(records: ExitRecords, state: _Search, ranks: tuple[int, ...], score: str) -> float:
    policy = ThresholdPolicy(state.thresholds(list(ranks)), score)
    return records.replay(policy).macs.mean().item()


def _snap(state: _Search, k: int, rank: int) -> int:
    """The nearest rank at or below that does not part a tie."""
    below = np.flatnonzero(state.ends[k, : max(rank, 0)])
    return int(below[-1]) + 1 if len(below) else 0
