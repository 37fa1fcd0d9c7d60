"""Bets against "the mean of these losses is at most a limit": evidence that may be looked at at any time.

Losses are in [0, 1] and come one after the other. A bet of stake s multiplies its wealth by 1 + s (loss - limit), which
on average does not grow as long as each loss has a mean of at most `limit`, given all that came before. So the chance
that wealth 1 ever grows to 1 / alpha is at most alpha, whenever it is looked at, and whatever the losses do below the
limit (Ville's inequality). Several stakes share the wealth, so that none has to be chosen; their sum is a bet again.

Losses far in the past would have to be won back after a change. So half of the wealth waits, and starts to bet epoch by
epoch: a sum over starts, each with a share fixed beforehand, is still one wealth of 1 in the beginning.

Sources: betting on bounded means (Waudby-Smith & Ramdas, arXiv:2010.09686, section 4: diversified bets); monitoring a
risk with it (Timans et al., UAI 2025, arXiv:2506.16416). They bet all from the first loss on, by estimated stakes.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

RISKED = 0.75
"""Largest part of its wealth that a bet may lose at once."""
_SMALLEST = 1 / 8  # stake: finds a mean of about 1.1 times the limit
_FIRST = 0.5  # of the wealth bets from the first loss on
_HALVED = 300  # epochs in which half of the rest starts to bet
_TILTS = 2.0 ** np.arange(-7, 3)  # of the confidence bounds: from a million losses down to a few


def stakes(limit: float) -> Floats:
    """Stakes of the bets against a mean of at most `limit`, each half of the one before, (G,)."""
    largest = RISKED / limit
    count = max(1, math.ceil(math.log2(largest / _SMALLEST)))
    return largest / 2.0 ** np.arange(count, dtype=np.float64)


def growth(losses: Any, limit: float, of: Any = None) -> Floats:
    """Log of what each bet is multiplied by, (..., G).

    Args:
        losses: in [0, 1], shape (...).
        limit: in (0, 1).
        of: the stakes, (G,); those of `stakes` when left out.
    """
    losses = np.asarray(losses, dtype=np.float64)[..., None]
    return np.log1p((stakes(limit) if of is None else np.asarray(of)) * (losses - limit))


def waiting(epoch: Any) -> Floats:
    """The part of the wealth that does not bet before the end of an epoch, counted from 0; 1 before it."""
    epoch = np.asarray(epoch, dtype=np.float64)
    return np.where(epoch < 0, 1.0, (1 - _FIRST) * _HALVED / (_HALVED + np.maximum(epoch, 0)))


class Wealth:
    """The wealth of one stream of losses, or of many at once.

    Args:
        limit: of the mean, in (0, 1).
        streams: shape of the streams, () for one.
    """

    def __init__(self, limit: float, streams: tuple[int, ...] = ()) -> None:
        self.limit, self._stakes = limit, stakes(limit)
        self.log_bets = np.full((*streams, len(self._stakes)), -np.inf)
        """Log of what each bet has, (..., G)."""
        self.epoch = -1

    def bet(self, losses: Any, epoch: int) -> None:
        """Bet on losses, (..., n), that come in an epoch, counted from 0; it never falls."""
        if epoch > self.epoch:
            share = (waiting(self.epoch) - waiting(epoch)) / len(self._stakes)
            self.log_bets = np.logaddexp(self.log_bets, np.log(share))
            self.epoch = epoch
        self.log_bets = self.log_bets + growth(losses, self.limit, self._stakes).sum(-2)

    @property
    def log_evidence(self) -> Floats:
        """Log of all of the wealth, (...): log(1 / alpha) or more refutes the limit at level alpha."""
        return np.logaddexp(np.logaddexp.reduce(self.log_bets, -1), np.log(waiting(self.epoch)))


def lower_bound(count: int, total: float, alpha: float) -> float:
    """Lower confidence bound on the mean of losses: below it at all times with probability 1 - alpha.

    It is about the average of the means of all losses so far, each given what came before; they may change at will.

    Args:
        count: number of losses.
        total: their sum.
        alpha: in (0, 1).
    Source: a mixture over sub-Bernoulli supermartingales (Howard et al., arXiv:1810.08240). Their logarithm is concave
    in the mean, so what holds for the means one by one holds for their average.
    """

    def refuted(mean: float) -> bool:
        grown = _TILTS * total - count * np.log1p(mean * np.expm1(_TILTS))
        return bool(np.logaddexp.reduce(grown) - np.log(len(_TILTS)) >= -np.log(alpha))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def interval(count: int, total: float, alpha: float) -> tuple[float, float]:
    """Confidence bounds on the mean of losses, both hold at all times with probability 1 - alpha; see `lower_bound`."""
    return lower_bound(count, total, alpha / 2), 1 - lower_bound(count, count - total, alpha / 2)
