"""Bets: fair whatever the losses do below the limit, as a brute-force sum and as confseq has them; bounds that hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_surgery.monitoring.betting import Wealth, growth, interval, lower_bound, stakes, waiting

LIMITS = st.sampled_from([0.005, 0.02, 0.05, 0.3, 0.5, 0.9])


@given(LIMITS, st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_no_bet_grows_on_average_while_the_mean_is_at_most_the_limit(
    limit: float, losses: list[float], part: float
) -> None:
    mean = float(np.mean(losses))
    scaled = np.array(losses) * (min(1.0, limit / mean) if mean else 1) * part
    assert scaled.mean() <= limit + 1e-12
    assert (np.exp(growth(scaled, limit)).mean(0) <= 1 + 1e-12).all()
    assert (np.exp(growth([0.0, 1.0], limit)) > 0.2).all()


@given(LIMITS)
def test_stakes_halve_down_to_a_small_one_and_shares_sum_to_the_whole(limit: float) -> None:
    bets = stakes(limit)
    assert (bets[:-1] == 2 * bets[1:]).all()
    assert 1 / 16 <= bets[-1] <= bets[0] <= 0.75 / limit
    parts = waiting(np.arange(-1, 50)) - waiting(np.arange(0, 51))
    assert (parts > 0).all()
    assert math.isclose(parts.sum() + waiting(50), 1)


@pytest.mark.parametrize("length", [1, 3])
def test_the_mean_wealth_over_all_sequences_is_one_at_the_limit_and_less_below_it(length: int) -> None:
    for limit, p in ((0.3, 0.3), (0.3, 0.1), (0.5, 0.5)):
        total = 0.0
        for losses in itertools.product([0.0, 1.0], repeat=8):
            wealth = Wealth(limit)
            for i, loss in enumerate(losses):
                wealth.bet([loss], i // length)
            total += np.exp(wealth.log_evidence) * p ** sum(losses) * (1 - p) ** (8 - sum(losses))
        assert math.isclose(total, 1) if p == limit else total < 1


@given(st.lists(st.lists(st.floats(0, 1), max_size=3), min_size=1, max_size=6), LIMITS)
def test_wealth_is_the_sum_over_all_starts_and_stakes(epochs: list[list[float]], limit: float) -> None:
    wealth = Wealth(limit)
    for epoch, losses in enumerate(epochs):
        wealth.bet(losses, epoch)
    bets = stakes(limit)
    expected = float(waiting(len(epochs) - 1))
    for start in range(len(epochs)):
        share = float(waiting(start - 1) - waiting(start)) / len(bets)
        for stake in bets:
            expected += share * math.prod(1 + stake * (loss - limit) for own in epochs[start:] for loss in own)
    assert math.isclose(float(wealth.log_evidence), math.log(expected), abs_tol=1e-9)


@pytest.mark.parametrize("m", [0.02, 0.1, 0.5])
def test_fixed_bets_are_those_of_confseq(m: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # which numpy 2 lacks, and confseq 0.0.11 names
    betting = pytest.importorskip("confseq.betting")
    losses = np.random.default_rng(0).beta(1, 8, 300)
    for theta, ours, bets in (
        (1, np.exp(growth(losses, m).cumsum(0)), stakes(m)),
        (0, np.exp(growth(1 - losses, 1 - m).cumsum(0)), stakes(1 - m)),  # the mirrored bets
    ):
        for stake, wealth in zip(bets, ours.T, strict=True):
            bet = lambda x, m, stake=stake: np.full(len(x), stake)  # noqa: E731
            theirs = betting.betting_mart(losses, m, 0.05, bet, bet, theta=theta, trunc_scale=1)
            np.testing.assert_allclose(wealth, theirs, rtol=1e-6)


def _alarms(losses: np.ndarray, limit: float, alpha: float, length: int = 50) -> np.ndarray:
    """First step at which each stream (N, T) raises an alarm; T where it does not."""
    wealth, first = Wealth(limit, losses.shape[:1]), np.full(len(losses), losses.shape[1])
    for step, loss in enumerate(losses.T):
        wealth.bet(loss[:, None], step // length)
        first = np.where((first == losses.shape[1]) & (wealth.log_evidence >= -np.log(alpha)), step, first)
    return first


def test_false_alarms_of_streams_at_the_limit_stay_within_alpha() -> None:
    rng, alpha, n = np.random.default_rng(0), 0.1, 500
    dependent = rng.random((n, 2000)) < np.where(np.arange(2000) // 100 % 2, 0.05, 0.01)  # below, and not constant
    for losses in (rng.random((n, 2000)) < 0.05, rng.beta(0.5, 9.5, (n, 2000)), dependent):
        alarms = (_alarms(losses.astype(float), 0.05, alpha) < 2000).mean()
        assert alarms <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / n)


def test_a_change_is_found_as_soon_after_a_long_time_as_promises_allow() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random((100, 2000)) < 0.05, rng.random((100, 1500)) < 0.2
    found = _alarms(np.concatenate([before, after], 1).astype(float), 0.1, 0.05) - 2000
    assert (found >= 0).mean() > 0.97
    assert np.median(found) < 400


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3000), st.floats(0, 1), st.sampled_from([0.01, 0.05, 0.2]))
def test_bounds_hold_the_mean_and_are_where_the_mixture_says(count: int, share: float, alpha: float) -> None:
    total = float(round(count * share))
    low, high = interval(count, total, alpha)
    assert 0 <= low <= high <= 1
    if count:
        assert low <= total / count <= high
    tilts = [2.0**k for k in range(-7, 3)]

    def mixture(mean: float) -> float:
        logs = [t * total - count * math.log(1 - mean + mean * math.exp(t)) for t in tilts]
        top = max(logs)
        return top + math.log(sum(math.exp(each - top) for each in logs) / len(logs))

    bound = lower_bound(count, total, alpha)
    assert mixture(min(bound + 1e-9, 1)) <= math.log(1 / alpha) + 1e-6
    if bound > 1e-9:
        assert mixture(bound - 1e-9) >= math.log(1 / alpha) - 1e-6


def test_bounds_hold_at_all_times_for_risks_that_move() -> None:
    rng, alpha, n, steps = np.random.default_rng(0), 0.1, 150, 600
    risks = 0.1 + 0.08 * np.sin(np.arange(steps) / 40)
    totals = (rng.random((n, steps)) < risks).cumsum(1)
    means = risks.cumsum() / np.arange(1, steps + 1)
    checked = range(9, steps, 25)
    missed = [
        any(not low <= means[t] <= high for t in checked for low, high in [interval(t + 1, float(row[t]), alpha)])
        for row in totals
    ]
    assert np.mean(missed) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / n)
