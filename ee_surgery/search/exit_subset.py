"""Which exits are worth having: the fewest that reach nearly the lowest expected cost at an accepted accuracy drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ee_surgery.calibration.correctness import chances
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.calibration.threshold_search import Floats, Ranks, ThresholdSearch
from ee_surgery.checks import accuracy_drop, count, instance

_WORTH = 0.002  # share of the cost that one more exit has to save
_PRICES = np.geomspace(0.01, 20, 14)
_STEPS = 3  # of bisection between two prices


@dataclass(frozen=True)
class Subset:
    """Some of the candidates, and what they are expected to cost."""

    exits: tuple[int, ...]
    """Numbers of the candidates, in program order; empty where none saves anything."""
    cost: float
    """Expected mean MACs at the accepted drop, by the original's, every branch on the way counted."""


def cheapest_exits(records: ExitRecords, max_accuracy_drop: float = 0.01, *, most: int = 6) -> Subset:
    """Number and positions of the exits that cost least at an accepted accuracy drop.

    From none on, exits are added, left out and exchanged one by one as long as that saves a five-hundredth of the cost.
    Whether an answer is right counts as the chance that its confidence and those before it give it, fitted once an
    exit: with the outcomes themselves, whoever has more exits to choose from would seem to save more. None are taken
    where they save no more than leaving samples unanswered would.

    Args:
        records: of all candidates, which several sizes of a branch at one position may be; they have the same trunk
            cost, and at most one of them is taken.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
        most: how many exits at most.
    Raises:
        ConfigError: `max_accuracy_drop` or `most` out of range.
        DataError: the branches read each other's answers.
    """
    instance("records", records, ExitRecords)
    max_accuracy_drop, most = accuracy_drop("max_accuracy_drop", max_accuracy_drop), count("most", most)
    costs = Costs(records, max_accuracy_drop)
    # what giving that much accuracy away by not answering at all would cost: an exit that guesses does no better
    chosen, cost = (), 1 - min(1.0, max_accuracy_drop / max(records.base_accuracy, 1e-9))
    while True:
        found = min(_changed(chosen, costs.places, most), key=costs, default=chosen)
        # a longer list has to be worth it; one as long, or shorter, only cheaper
        needed = cost * (1 - _WORTH) if len(found) > len(chosen) else cost * (1 - 1e-6)
        if costs(found) >= needed:
            break
        chosen, cost = found, costs(found)
    fewer = min((tuple(k for k in chosen if k != out) for out in chosen), key=costs, default=chosen)
    if costs(fewer) <= cost * (1 + _WORTH):
        chosen = fewer
    return Subset(chosen, costs(chosen))


def _changed(exits: tuple[int, ...], places: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """All lists that one exit more, one fewer or one in exchange makes of this one."""
    found = []
    for left in (exits, *(tuple(k for k in exits if k != out) for out in exits)):
        if left != exits:
            found.append(left)
        taken = {places[k] for k in left}
        if len(left) < most:
            found += [tuple(sorted((*left, k))) for k in range(len(places)) if places[k] not in taken]
    return found


class Costs:
    """The expected cost of a list of exits at the accepted drop; each list is worked out once.

    Thresholds are those with the most expected accuracy at a price of a MAC; between two prices, one of which drops
    too much, the cost is read off the straight line.
    """

    def __init__(self, records: ExitRecords, drop: float) -> None:
        records = records.keep(range(len(records.exits)))  # refuses those that cannot be kept apart
        outcomes = chances(records)
        self.search = ThresholdSearch(records, outcomes=outcomes)
        self.floor = float(outcomes[-1].mean()) - drop
        self.places = records.trunk_macs[:-1]
        self.known: dict[tuple[int, ...], float] = {(): 1.0}

    def __call__(self, exits: tuple[int, ...]) -> float:
        if exits not in self.known:
            self.known[exits] = self._cost(self.search.only(exits))
        return self.known[exits]

    def _cost(self, search: ThresholdSearch) -> float:
        closed: Ranks = (0,) * search.exits
        points = {0.0: (closed, *search.evaluate(closed))}
        for price, ranks in zip(_PRICES, search.induction(_PRICES), strict=True):
            points[float(price)] = (ranks, *search.evaluate(ranks))
        for step in range(2 + _STEPS):
            # the highest price that is still right enough, and the next one
            good = max(price for price, (_, _, right) in points.items() if right >= self.floor - 1e-12)
            worse = [price for price in points if price > good]
            if not worse:
                break
            bad = min(worse)
            prices = (good, bad) if step == 0 else ((good * bad) ** 0.5 if good else bad / 2,)
            for price in prices:
                starts = {points[p][0] for p in (good, bad)}
                improved = {r: search.evaluate(r) for r in (search.improve(start, price) for start in starts)}
                ranks = max(improved, key=lambda r: improved[r][1] - price * improved[r][0])
                points[price] = (ranks, *improved[ranks])
        return _read_off(np.array([values for _, *values in points.values()]), self.floor)


def _read_off(points: Floats, floor: float) -> float:
    """The lowest cost with this accuracy on the straight lines between (cost, accuracy) points."""
    enough, less = points[points[:, 1] >= floor - 1e-12], points[points[:, 1] < floor - 1e-12]
    best = float(enough[:, 0].min())
    for cost, right in less:
        share = (floor - right) / (enough[:, 1] - right)
        best = min(best, float((cost + share * (enough[:, 0] - cost)).min()))
    return best
