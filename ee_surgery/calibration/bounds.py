"""Confidence bounds and tests for a bounded mean loss.

A test clears a limit `eps` if its p-value, the probability of losses this small if the true mean were `eps` or more, is
at most `delta`. Each of P policies has its own row of losses, (P, N).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betainccinv, rel_entr

from ee_surgery.errors import ConfigError

_Floats: TypeAlias = NDArray[np.float64]
_Bools: TypeAlias = NDArray[np.bool_]

_COUNTED = ("ltt-binomial", "ltt-paired", "ltt-trinomial")


class Scale(NamedTuple):
    """The range of a loss, from `low` to `high`; `whole` if it is an integer."""

    low: float
    high: float
    whole: bool

    def methods(self) -> tuple[str, ...]:
        """Methods that are valid for such losses, the default first."""
        exact = {
            Scale(0, 1, True): ("ltt-binomial", "wsr", "ltt-hb", "crc"),
            Scale(-1, 1, True): ("ltt-paired", "wsr", "ltt-trinomial", "ltt-hb", "crc"),
        }
        return exact.get(self, ("wsr", "ltt-hb", "crc"))

    def counted(self) -> str | None:
        """The best method that needs only counts of losses and is fast, if there is one."""
        return next((name for name in self.methods() if name in ("ltt-binomial", "ltt-trinomial")), None)

    def unit(self, value: Any) -> Any:
        """A loss or a limit, mapped to [0, 1]."""
        return (value - self.low) / (self.high - self.low)


ZERO_ONE = Scale(0, 1, True)


def cleared(method: str, losses: _Floats, scale: Scale, eps: Any, delta: float) -> _Bools:
    """Whether the losses of each policy show a mean below `eps`, shape (P,).

    Args:
        method: one of `scale.methods()`. `crc` bounds the expected mean and needs losses that never shrink from one
            policy to the next.
        losses: (P, N); for `wsr` in an order that does not depend on their values.
        eps: a number, or (P, 1) for `wsr` and `ltt-hb`.
    """
    n = losses.shape[1]
    if method in _COUNTED:
        return cleared_by_counts(method, (losses > 0).sum(1), (losses < 0).sum(1), n, eps, delta)
    if method == "crc":
        return conformal_bound(losses.sum(1), n, scale.high) <= eps
    losses, eps = scale.unit(losses), scale.unit(eps)
    if method == "wsr":
        return wsr_p_value(losses, eps, delta) <= delta
    return (hoeffding_bentkus_p_value(losses.mean(1).clip(0, 1), n, eps) <= delta).ravel()


def cleared_by_counts(method: str, worse: Any, better: Any, n: int, eps: float, delta: float) -> _Bools:
    """The same from counts of losses of 1 (`worse`) and -1 (`better`); with `ltt-binomial`, losses are 0 and 1."""
    if method == "ltt-binomial":
        return bdtr(worse, n, eps) <= delta  # exact: P(at most this many errors) at a rate of eps
    if method == "ltt-trinomial":
        return trinomial_bound(worse, better, n, delta) <= eps
    return paired_cleared(worse, better, n, eps, delta)


def upper_bound(method: str, losses: _Floats, scale: Scale, delta: float) -> float:
    """Upper confidence bound on the mean from the losses of one policy, (1, N); wrong with probability at most `delta`.

    For `ltt-paired`, whose inverse is slow, the bound of `ltt-trinomial`; with `crc`, a bound on the expected mean.
    """
    n, worse, better = losses.shape[1], int((losses > 0).sum()), int((losses < 0).sum())
    if method == "crc":
        return float(conformal_bound(losses.sum(), n, scale.high))
    if method == "ltt-binomial":
        return float(clopper_pearson(worse, n, delta))
    if method in _COUNTED:
        return float(trinomial_bound(worse, better, n, delta))
    low, high = scale.low, scale.high
    for _ in range(3):  # monotone in the limit: three rounds of 64 grid steps, always rounding up
        grid = np.linspace(low, high, 65)
        ok = cleared(method, losses, scale, grid[1:-1, None], delta)
        first = int(ok.argmax()) if ok.any() else len(ok)
        low, high = float(grid[first]), float(grid[first + 1])
    return high


_MANY = 2**22


@lru_cache(maxsize=256)
def samples_needed(eps: float, delta: float = 0.05, method: str = "ltt-binomial", scale: Scale = ZERO_ONE) -> int:
    """The fewest samples that clear `eps` if all losses are 0; 4194304 means that many or more.

    With any losses above 0, more samples are needed.

    >>> samples_needed(0.01, delta=0.05)
    299
    """

    def enough(n: int) -> bool:
        return bool(cleared(method, np.zeros((1, n)), scale, eps, delta)[0])

    low, high = 0, min(_MANY, math.ceil(math.log(1 / delta) / eps))
    while not enough(high):
        low, high = high, 2 * high
        if high >= _MANY:
            return _MANY
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    while high > 2 and enough(high - 2):  # ltt-hb rounds up: if 0 is mid-scale, even n do better
        high -= 2
    return high


# --- Losses of 0 and 1


def clopper_pearson(errors: Any, n: int, delta: float) -> _Floats:
    """Exact upper bound on an error rate, too low with probability at most `delta`.

    >>> clopper_pearson([0, 10], 1000, 0.05).round(4).tolist()
    [0.003, 0.0169]
    """
    errors = np.asarray(errors)
    return np.where(errors >= n, 1.0, betainccinv(errors + 1, np.maximum(n - errors, 1), delta))


# --- Losses of -1, 0 and 1


def trinomial_bound(worse: Any, better: Any, n: int, delta: float) -> _Floats:
    """Upper bound on the mean from exact bounds on both counts, with half of `delta` each."""
    return clopper_pearson(worse, n, delta / 2) - (1 - clopper_pearson(n - np.asarray(better), n, delta / 2))


def paired_cleared(worse: Any, better: Any, n: int, eps: float, delta: float) -> _Bools:
    """Whether these counts show a mean below `eps`: an exact unconditional test.

    The statistic is the excess over `n * eps` in units of its standard deviation, as for paired proportions. The
    critical value bounds the probability of a false clearance by `delta` for any share of nonzero losses.

    Raises:
        ConfigError: `delta` is too small for this test.
    Source: Nam, Biometrics 53 (1997), with the statistic's variance from the count itself and the nuisance share
    maximised over a grid, for which 2 % of `delta` is set aside.
    """
    worse, better = np.asarray(worse, dtype=np.float64), np.asarray(better, dtype=np.float64)
    return worse - better <= _paired_cut(worse + better, n, eps, _paired_critical(n, eps, delta))


_UNSEEN = 6
"""Pseudo-count in the variance: a small count may be chance. Chosen to minimize the critical value."""


def _paired_cut(moved: _Floats, n: int, eps: float, critical: float) -> _Floats:
    """The largest `worse - better` that is cleared with `moved` nonzero losses."""
    return n * eps - critical * np.sqrt(np.maximum(moved + _UNSEEN - n * eps**2, 0))


@lru_cache(maxsize=1024)
def _paired_critical(n: int, eps: float, delta: float) -> float:
    """The smallest critical value at level `delta`, in steps of 0.004; takes 0.1 s for n = 1000, 1 s for 20,000."""
    from scipy.stats import binom  # takes longer to import than all of ee_surgery

    # Grid of shares of nonzero losses in standard errors: dense near 0 and 1, where probabilities jump.
    end = math.pi * math.sqrt(n)
    root = np.concatenate(
        [np.arange(0, 20, 0.1), np.arange(20, 40, 0.5), np.arange(40, end, 4), end - np.arange(0, 20, 0.2)]
    )
    shares = np.sin(root[(root >= 0) & (root <= end)] / (2 * math.sqrt(n))) ** 2
    shares = np.unique(np.append(shares[shares > abs(eps)], [abs(eps), 1.0]))
    # (shares, moved): all counts of nonzero losses with non-negligible probability
    low, high = binom.ppf(delta * 1e-4, n, shares), binom.isf(delta * 1e-4, n, shares)
    counts = low[:, None] + np.arange(int((high - low).max()) + 1)
    moved = np.minimum(counts, high[:, None])
    chance = binom.pmf(moved, n, shares[:, None]) * (counts <= high[:, None])
    up = ((shares + eps) / (2 * shares))[:, None]

    def keeps(critical: float) -> bool:
        most = np.floor((_paired_cut(moved, n, eps, critical) + moved) / 2 + 1e-9)  # largest cleared count of `worse`
        below = np.where(most < 0, 0.0, bdtr(np.clip(most, 0, moved), moved.astype(np.int64), up))
        return float((chance * below).sum(1).max()) + 2e-4 * delta <= 0.98 * delta

    small, large = 0.0, 8.0
    if not keeps(large):
        raise ConfigError(f"delta={delta:g} is too small for 'ltt-paired' with eps={eps:g}, n={n}. Use 'wsr'.")
    for _ in range(11):
        middle = (small + large) / 2
        small, large = (small, middle) if keeps(middle) else (middle, large)
    return large


# --- Losses in [0, 1]


def hoeffding_bentkus_p_value(mean: Any, n: int, eps: Any) -> _Floats:
    """p-value from the mean alone; loose if the losses vary little.

    Source: Bates et al., arXiv:2101.02703, as in Learn then Test (arXiv:2110.01052, proposition 2).
    """
    below = np.minimum(mean, eps)
    hoeffding = np.exp(-n * (rel_entr(below, eps) + rel_entr(1 - below, 1 - np.asarray(eps))))
    count = np.ceil(n * np.asarray(mean, dtype=np.float64) - 1e-9)  # an integer number of errors must not be rounded up
    return np.minimum(hoeffding, math.e * bdtr(np.minimum(count, n), n, eps)).clip(max=1.0)


def wsr_p_value(losses: _Floats, eps: Any, delta: float) -> _Floats:
    """Bet against "the mean is at least `eps`": the p-value is 1 / the largest wealth reached.

    Bets adapt to the variance seen so far, so small losses of small variance are cleared with few samples.

    Args:
        losses: (P, N), in an order that does not depend on their values. `eps`: a number or (P, 1), below 1.
        delta: the level that p will be compared with: bets are sized for it, but p is valid at any level.
    Source: Waudby-Smith & Ramdas, arXiv:2010.09686; one-sided, predictable plug-in bets for a fixed N, at most 3/4
    of the wealth.
    """
    n = losses.shape[1]
    t = np.arange(2, n + 2)
    mean = (0.5 + losses.cumsum(1)) / t
    spread = (0.25 + ((losses - mean) ** 2).cumsum(1)) / t
    # valid only if each bet depends on earlier losses alone
    before = np.concatenate([np.full((len(losses), 1), 0.25), spread[:, :-1]], 1)
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * before)), 0.75 / (1 - np.asarray(eps)))
    grown = np.log1p(bet * (eps - losses)).cumsum(1).max(1)
    return np.exp(-np.maximum(grown, 0.0))


def conformal_bound(total: Any, n: int, high: float) -> Any:
    """Mean of losses with this sum plus one worst-case loss. Source: conformal risk control, arXiv:2208.02814."""
    return (total + high) / (n + 1)
