"""Losses of one stream, summed so that streams of several workers can be joined; and a test of their mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ee_surgery.errors import DataError
from ee_surgery.monitoring.betting import Floats, Wealth, growth, interval, stakes, waiting

KEPT = 64
"""Epochs are told apart to 1 in so many of their age; what lies between is summed."""
_LAST = 1 << 40  # epochs a file may name
_ROUNDING = 1e-6  # by which sums of logs in a file may be out of their range, per loss


def starts(born: int, now: int) -> NDArray[np.int64]:
    """The epochs from which on bets are still told apart: the first, the latest ones, of older ones ever fewer.

    An epoch divisible by a power of two is kept while it is younger than `KEPT` times that. What is kept later was
    kept before, so sums never have to be taken apart; and it does not depend on the stream.
    """
    found, step = [np.array([born])], 1
    while True:
        first = max(born, now - KEPT * step) // step * step + step
        found.append(np.arange(first, now + 1, step))
        if now - KEPT * step <= born:
            return np.unique(np.concatenate(found))
        step *= 2


class Summary(NamedTuple):
    """How many losses, and their sum."""

    losses: int
    total: float

    @property
    def mean(self) -> float:
        """NaN of none."""
        return self.total / self.losses if self.losses else float("nan")

    def interval(self, alpha: float) -> tuple[float, float]:
        """Of the mean risk, at all times with probability 1 - alpha."""
        return interval(self.losses, self.total, alpha)


class Losses:
    """The losses of one stream, by epoch: how many, their sum, and the log-growth of each bet that they are too high.

    Beside that, the mirrored bets, that losses are *below* the limit: whenever their wealth reaches 1 / alpha, the
    promise is renewed, and they start again with 1.

    Args:
        limit: of the mean, in (0, 1).
        alpha: chance, in (0, 1), that one renewal is wrong.
        born: the first epoch.
    """

    def __init__(self, limit: float, alpha: float, born: int) -> None:
        self.limit, self.alpha, self.born = limit, alpha, born
        self.rows: dict[int, Floats] = {}
        """Of each epoch that is told apart: count, sum, and log-growth of the bets, (2 + G,)."""
        self.below, self.below_born = Wealth(1 - limit), born
        """The mirrored bets, and the epoch they started in."""
        self.renewals = 0
        self.renewed: int | None = None
        """The epoch of the last renewal."""

    @property
    def latest(self) -> int:
        """The last epoch with losses."""
        return max(self.rows, default=self.born)

    @property
    def all(self) -> Summary:
        """All losses."""
        return summary(self.rows.values())

    def add(self, losses: Any, epoch: int) -> None:
        """Take losses in, (n,) in [0, 1]; an epoch before the last one counts as that one: clocks may be set back."""
        losses = np.asarray(losses, dtype=np.float64)
        epoch = max(epoch, self.latest)
        new = np.array([len(losses), losses.sum(), *growth(losses, self.limit).sum(0)])
        if epoch in self.rows:
            self.rows[epoch] = self.rows[epoch] + new
        else:
            self.rows[epoch] = new
            kept, rows = table([self])
            self.rows = {int(each): row for each, row in zip(kept, rows, strict=True) if row[0]}
        self.below.bet(1 - losses, epoch - self.below_born)
        if self.below.log_evidence >= -np.log(self.alpha):
            self.renewals, self.renewed = self.renewals + 1, epoch
            self.below, self.below_born = Wealth(1 - self.limit), epoch

    def to_dict(self) -> dict[str, Any]:
        """Plain data; JSON keeps every bit of it."""
        return {
            "born": self.born,
            "rows": [[epoch, int(row[0]), *row[1:].tolist()] for epoch, row in sorted(self.rows.items())],
            "below": {
                "born": self.below_born,
                "epoch": self.below.epoch,
                "log_bets": self.below.log_bets.tolist() if self.below.epoch >= 0 else None,
            },
            "renewals": self.renewals,
            "renewed": self.renewed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], limit: float, alpha: float) -> Losses:
        """The inverse of `to_dict`, of data whose form was checked.

        Raises:
            DataError: numbers that no losses could have given.
        """
        found = cls(limit, alpha, data["born"])
        epochs = [row[0] for row in data["rows"]]
        below = data["below"]
        if (
            not all(type(each) is int for each in epochs)
            or epochs != sorted(set(epochs)) or not all(found.born <= each <= _LAST for each in epochs)
            or not found.born <= below["born"] <= max([found.born, *epochs])
            or not -1 <= below["epoch"] <= max([found.born, *epochs]) - below["born"]
        ):  # fmt: skip
            raise DataError("Epochs of losses must rise, and none may lie before the first.")
        bets = stakes(limit)
        for epoch, *row in data["rows"]:
            values = np.array(row, dtype=np.float64)
            if len(values) != 2 + len(bets):
                raise DataError(f"Losses of a limit of {limit:g} have {len(bets)} bets, not {len(values) - 2}.")
            count, total, grown = values[0], values[1], values[2:]
            possible = count >= 1 and 0 <= total <= count
            if possible:  # log(1 + s (x - limit)) is concave in x: at least the chord, at most its value at the mean
                low = (count - total) * np.log1p(-bets * limit) + total * np.log1p(bets * (1 - limit))
                high = count * np.log1p(bets * (total / count - limit))
                slack = _ROUNDING * count
                possible = ((low - slack <= grown) & (grown <= high + slack)).all()
            if not possible:
                raise DataError(f"No losses have the sums of epoch {epoch}.")
            found.rows[epoch] = values
        logs = below["log_bets"]
        if (logs is None) != (below["epoch"] < 0) or (logs is not None and len(logs) != len(found.below.log_bets)):
            raise DataError(f"The mirrored bets of a limit of {limit:g} are {len(found.below.log_bets)}.")
        if logs is not None:
            found.below.log_bets, found.below.epoch = np.array(logs, dtype=np.float64), below["epoch"]
            if found.below.log_evidence >= -np.log(alpha):
                raise DataError("The mirrored bets hold more than they may: the promise would have been renewed.")
        found.below_born, found.renewals, found.renewed = below["born"], data["renewals"], data["renewed"]
        return found


def summary(rows: Iterable[Floats]) -> Summary:
    """All losses of some rows."""
    both = np.array([row[:2] for row in rows]).reshape(-1, 2).sum(0)
    return Summary(int(both[0]), float(both[1]))


def table(streams: Sequence[Losses]) -> tuple[NDArray[np.int64], Floats]:
    """Epochs that are told apart, (J,), and the summed rows of several streams, (J, 2 + G)."""
    kept = starts(min(each.born for each in streams), max(each.latest for each in streams))
    rows = np.zeros((len(kept), 2 + len(stakes(streams[0].limit))))
    for each in streams:
        if each.rows:
            places = np.searchsorted(kept, list(each.rows), "right") - 1
            np.add.at(rows, places, np.array([*each.rows.values()]))
    return kept, rows


def log_evidence(streams: Sequence[Losses]) -> float:
    """Log of the evidence that the mean exceeds the limit, of all streams together.

    A bet's wealth is the product over the streams, of what it grew by in each since a start: as if one bet had seen
    all losses. That is a fair bet if the mean of each loss is at most the limit given all that was seen before, in all
    streams, in the order in which losses came; so it may be looked at at any time. Stakes and starts have fixed shares.
    """
    kept, rows = table(streams)
    since = rows[::-1, 2:].cumsum(0)[::-1]
    ages = kept - kept[0]
    shares = (waiting(ages - 1) - waiting(ages)) / since.shape[1]
    betting = np.logaddexp.reduce((since + np.log(shares)[:, None]).ravel())
    return float(np.logaddexp(betting, np.log(waiting(ages[-1]))))


def recent(streams: Sequence[Losses], enough: int) -> tuple[int, Summary]:
    """The shortest time up to now with `enough` losses, or all of it: its first epoch, and the losses since."""
    kept, rows = table(streams)
    counts = rows[::-1, 0].cumsum()[::-1]
    first = max(0, int((counts >= enough).sum()) - 1)
    return int(kept[first]), summary(rows[first:])
