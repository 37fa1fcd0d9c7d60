"""Losses by epoch: joined over workers as if one had seen all, folded with age, exact in JSON, refused when made up."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.monitoring.betting import Wealth
from ee_surgery.monitoring.losses import KEPT, Losses, log_evidence, recent, starts

EPOCHS = st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), max_size=4), min_size=1, max_size=30)


def _filled(epochs: list[list[tuple[int, float]]], worker: int | None, born: int = 7) -> Losses:
    found = Losses(0.1, 0.05, born)
    for epoch, losses in enumerate(epochs):
        own = [loss for by, loss in losses if worker is None or by == worker]
        if own:
            found.add(own, born + epoch)
    return found


@settings(deadline=None)
@given(EPOCHS)
def test_evidence_of_workers_together_is_that_of_one_who_saw_all(epochs: list[list[tuple[int, float]]]) -> None:
    wealth = Wealth(0.1)
    for epoch, losses in enumerate(epochs):
        wealth.bet([loss for _, loss in losses], epoch)
    together = log_evidence([_filled(epochs, worker) for worker in range(3)])
    assert math.isclose(together, log_evidence([_filled(epochs, None)]), abs_tol=1e-9)
    assert math.isclose(together, float(wealth.log_evidence), abs_tol=1e-9)


@given(st.integers(0, 500), st.integers(0, 1000), st.integers(1, 300))
def test_starts_are_those_of_the_rule_and_once_gone_never_come_back(born: int, age: int, later: int) -> None:
    now = born + age
    kept = starts(born, now).tolist()
    assert kept == [e for e in range(born, now + 1) if e == born or now - e < KEPT * (e & -e)]
    assert set(starts(born, now + later).tolist()) <= {*kept, *range(now + 1, now + later + 1)}


def test_old_epochs_are_summed_and_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    found, total = Losses(0.05, 0.05, 0), 0.0
    wealth = Wealth(0.05)
    for epoch in range(1000):
        losses = rng.random(3) < 0.04
        total += losses.sum()
        found.add(losses, epoch)
        wealth.bet(losses.astype(float), epoch)
    assert len(found.rows) <= KEPT * 6
    assert found.all == (3000, total)
    assert log_evidence([found]) <= wealth.log_evidence + 1e-9  # starts that are told apart no more bet no more


def test_the_current_risk_is_that_of_the_latest_losses() -> None:
    found = Losses(0.05, 0.05, 0)
    for epoch in range(40):
        found.add(np.full(50, float(epoch >= 20)), epoch)
    first, late = recent([found], 500)
    assert (first, late.losses, late.mean) == (30, 500, 1.0)
    assert recent([found], 10**6)[1] == found.all
    assert recent([Losses(0.05, 0.05, 3)], 10) == (3, (0, 0.0))


def test_the_promise_is_renewed_again_and_again_while_it_is_kept_and_hardly_ever_at_the_limit() -> None:
    rng = np.random.default_rng(0)
    kept = Losses(0.05, 0.05, 0)
    for epoch in range(100):
        kept.add(rng.random(50) < 0.02, epoch)
    assert kept.renewals >= 3
    assert kept.renewed is not None
    false = 0
    for _ in range(200):
        at_limit = Losses(0.05, 0.05, 0)
        for epoch in range(10):
            at_limit.add(rng.random(50) < 0.05, epoch)
        false += at_limit.renewals > 0
    assert false / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_clock_that_is_set_back_changes_no_earlier_epoch() -> None:
    found = Losses(0.05, 0.05, 10)
    found.add([0.0], 20)
    found.add([1.0], 3)
    assert sorted(found.rows) == [20]


@given(EPOCHS)
def test_json_keeps_every_bit(epochs: list[list[tuple[int, float]]]) -> None:
    found = _filled(epochs, None)
    again = Losses.from_dict(json.loads(json.dumps(found.to_dict())), 0.1, 0.05)
    assert again.to_dict() == found.to_dict()
    assert log_evidence([again]) == log_evidence([found])
    found.add([0.5, 1.0], 60)
    again.add([0.5, 1.0], 60)
    assert again.to_dict() == found.to_dict()


def _set(*place: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = to(data[place[-1]]) if callable(to) else to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("rows", 0, 0, to=-1),
        _set("rows", 0, 0, to=7.5),
        _set("rows", 1, 0, to=7),
        _set("rows", 0, 1, to=0),
        _set("rows", 0, 2, to=-0.5),
        _set("rows", 0, 2, to=5.0),
        _set("rows", 0, 3, to=9.0),
        _set("rows", 0, to=lambda row: row[:-1]),
        _set("below", "log_bets", to=lambda bets: bets[:-1]),
        _set("below", "log_bets", to=lambda bets: [each + 20 for each in bets]),
        _set("below", "log_bets", to=None),
        _set("below", "epoch", to=50),
        _set("below", "born", to=6),
    ],
)
def test_sums_that_no_losses_have_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    data = copy.deepcopy(_filled([[(0, 0.5), (0, 0.0)], [(0, 1.0)], [(0, 0.2)]], None).to_dict())
    change(data)
    with pytest.raises(ee.DataError):
        Losses.from_dict(data, 0.1, 0.05)
