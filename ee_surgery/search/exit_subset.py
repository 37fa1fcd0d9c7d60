"""Exit subset selection: the fewest exits with nearly the lowest expected cost at an accepted accuracy drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ee_surgery.calibration.correctness import chances
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.calibration.threshold_search import Floats, Ranks, ThresholdSearch
from ee_surgery.checks import accuracy_drop, count, instance

_WORTH = 0.002  # fraction of the cost that one more exit must save
_PRICES = np.geomspace(0.01, 20, 14)
_STEPS = 3  # of bisection between two prices


@dataclass(frozen=True)
class Subset:
    """A subset of the candidates, and its expected cost."""

    exits: tuple[int, ...]
    """Numbers of the candidates, in program order; empty if none saves anything."""
    cost: float
    """Expected mean MACs at the accepted drop, including every branch visited, as a fraction of the original's."""


def cheapest_exits(records: ExitRecords, max_accuracy_drop: float = 0.01, *, most: int = 6) -> Subset:
    """Number and positions of the exits with the lowest cost at an accepted accuracy drop.

    Starting with none, exits are added, removed and exchanged one at a time as long as that saves 1/500 of the cost.
    Outcomes are replaced by probabilities of being correct, fitted once per exit to its confidence and those of earlier
    exits: with the outcomes themselves, larger subsets would look better by chance. The result is empty if exits save
    no more than giving no prediction for some samples would.

    Args:
        records: of all candidates. Several sizes of a branch at one position have the same trunk cost; at most one of
            them is chosen.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
        most: largest number of exits.
    Raises:
        ConfigError: `max_accuracy_drop` or `most` out of range.
        DataError: the branches are chained.
    """
    instance("records", records, ExitRecords)
    max_accuracy_drop, most = accuracy_drop("max_accuracy_drop", max_accuracy_drop), count("most", most)
    costs = Costs(records, max_accuracy_drop)
    # the cost if that much accuracy were given up by not predicting at all: an exit that guesses does no better
    chosen, cost = (), 1 - min(1.0, max_accuracy_drop / max(records.base_accuracy, 1e-9))
    while True:
        found = min(_changed(chosen, costs.places, most), key=costs, default=chosen)
        # a larger subset must save enough; an equal or smaller one need only be cheaper
        needed = cost * (1 - _WORTH) if len(found) > len(chosen) else cost * (1 - 1e-6)
        if costs(found) >= needed:
            break
        chosen, cost = found, costs(found)
    fewer = min((tuple(k for k in chosen if k != out) for out in chosen), key=costs, default=chosen)
    if costs(fewer) <= cost * (1 + _WORTH):
        chosen = fewer
    return Subset(chosen, costs(chosen))


def _changed(exits: tuple[int, ...], places: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """All subsets that differ from this one by adding, removing or exchanging one exit."""
    found = []
    for left in (exits, *(tuple(k for k in exits if k != out) for out in exits)):
        if left != exits:
            found.append(left)
        taken = {places[k] for k in left}
        if len(left) < most:
            found += [tuple(sorted((*left, k))) for k in range(len(places)) if places[k] not in taken]
    return found


class Costs:
    """The expected cost of a subset of exits at the accepted drop; cached per subset.

    Thresholds maximize expected accuracy at a price per MAC; between two prices, one of which drops too much, the cost
    is interpolated linearly.
    """

    def __init__(self, records: ExitRecords, drop: float) -> None:
        records = records.keep(range(len(records.exits)))  # raises for chained branches
        outcomes = chances(records) if records.has_probabilities else records.outcomes.numpy()
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
            # the highest price that is still accurate enough, and the next one
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
