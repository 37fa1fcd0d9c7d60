"""Policies with something to fit: EENet's scheduler, thresholds of classes, temperatures."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ee_surgery as ee
from ee_surgery.calibration.budget import quota_thresholds
from ee_surgery.calibration.classwise import ClassThresholds, class_thresholds
from ee_surgery.calibration.eenet import EENetScore, _Scheduler, eenet_scheduler
from ee_surgery.calibration.temperature import expected_calibration_error, scale_temperatures
from tests.calibration.test_policies import auc
from tests.strategies import records as drawn
from tests.strategies import synthetic

# --- EENet's scheduler


@cache
def _six_hundred() -> ee.ExitRecords:
    return synthetic(600, 4)


def test_the_scheduler_meets_budgets_by_realised_exits() -> None:
    records = _six_hundred()
    for budget in np.linspace(0.2801, 1.09, 20).tolist():
        point = eenet_scheduler(records, budget, steps=40)
        replay = records.replay(point.policy)
        realised = replay.macs.mean().item() / records.base_macs
        assert realised <= budget + 1e-12
        assert point.macs_fraction == pytest.approx(realised)
        assert min(budget, 1.0) - realised <= 0.02  # and does not leave it lying about
        assert len(point.thresholds) == 3
        assert torch.bincount(replay.exit_index, minlength=4).sum() == 600  # the last exit takes what is left
        assert point.exit_shares[-1] == pytest.approx((replay.exit_index == 3).double().mean().item())


def test_an_exit_may_take_more_than_the_published_cap() -> None:
    records = synthetic(600, 3)
    cheap, dear = (eenet_scheduler(records, budget, steps=40) for budget in (0.45, 0.97))
    assert cheap.exit_shares[0] > 0.7 > 0.576
    assert dear.exit_shares[-1] > 0.7
    scheduler = _Scheduler(records, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for k in range(3):
            scheduler.w1.zero_()
            scheduler.w2.zero_()[k] = 10.0
            shares = scheduler.shares(torch.arange(600)).exp()
            torch.testing.assert_close(shares.sum(0), torch.ones(600))
            assert (shares[k] > 0.99).all()  # a sigmoid before the softmax would have kept it below 0.576


def test_an_exit_without_a_quota_is_closed() -> None:
    records = _six_hundred()
    scores = records.scores("max_prob")
    assert quota_thresholds(scores, [0, 10, -3])[::2] == (math.inf, math.inf)
    cheapest = eenet_scheduler(records, 0.28 + 1e-6, steps=20)
    assert cheapest.exit_shares[0] == 1
    assert cheapest.thresholds[1:] == (math.inf, math.inf)
    whole = eenet_scheduler(records, 1.0, steps=20)
    assert whole.thresholds == (math.inf,) * 3
    assert whole.macs_fraction == 1


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_schedulers_score_is_one_number_a_sample_by_its_formula(batch: int) -> None:
    g = torch.Generator().manual_seed(0)
    score = EENetScore(tuple(torch.randn(5 + 2 + k, generator=g) for k in range(3)))
    state: tuple[Tensor, ...] = ()
    before = torch.zeros(batch, 0)
    for k in range(3):
        logits = 2 * torch.randn(batch, 5, generator=g)
        q, state = score(logits, None, state, k)
        p = torch.softmax(logits, -1)
        sure = 1 + (p * p.log()).sum(-1) / math.log(5)
        known = torch.cat([p, p.amax(-1)[:, None], sure[:, None], before], 1)
        assert q.shape == (batch,)
        torch.testing.assert_close(q, known @ score.weights[k])
        before = torch.cat([before, q.clamp(0, 1)[:, None]], 1)
        torch.testing.assert_close(state[0], before)


def test_a_budget_in_milliseconds_is_met_by_realised_exits() -> None:
    records, latency = _six_hundred(), [2.31, 4.15, 4.93, 6.5]
    for budget in (2.4, 3.3, 4.0, 5.0, 6.4, 7.0):
        point = eenet_scheduler(records, budget, latency_ms=latency, steps=40)
        spent = torch.tensor(latency, dtype=torch.float64)[records.replay(point.policy).exit_index].mean().item()
        assert spent <= budget + 1e-12
        assert min(budget, 6.5) - spent < 0.1
        assert point.rule == f"eenet({budget:g}ms)"
    with pytest.raises(ee.OperatingPointError, match=r"cheapest possible mean is 2\.310 ms"):
        eenet_scheduler(records, 2.0, latency_ms=latency, steps=2)
    for bad in ([1.0, 2.0], [0.0, 1.0, 2.0, 3.0]):
        with pytest.raises(ee.ConfigError, match="latency_ms"):
            eenet_scheduler(records, 2.0, latency_ms=bad, steps=2)


def test_a_budget_the_scheduler_cannot_meet_names_the_cheapest() -> None:
    with pytest.raises(ee.OperatingPointError, match=r"cheapest possible mean is 0\.280 of the MACs"):
        eenet_scheduler(_six_hundred(), 0.27, steps=2)
    with pytest.raises(ee.ConfigError, match="budget must be a positive number"):
        eenet_scheduler(_six_hundred(), 0.0)


def test_the_scheduler_is_deterministic_for_a_seed_and_leaves_the_global_one_alone() -> None:
    records = synthetic(1500)  # more than a batch: rows are drawn
    before = torch.random.get_rng_state()
    first, again, other = (eenet_scheduler(records, 0.6, seed=seed, steps=20) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.thresholds == again.thresholds
    assert all(torch.equal(a, b) for a, b in zip(first.score.weights, again.score.weights, strict=True))
    assert first.thresholds != other.thresholds


def test_the_score_learns_which_answers_not_to_trust() -> None:
    records = synthetic(1000)
    logits = records.logits.clone()
    logits[0, records.labels != 0, 0] += 2.5  # the first exit says 0, surely, when it is not
    records = replace(records, logits=logits)
    point = eenet_scheduler(records, 0.6, steps=1200)
    plain = auc(records.scores("max_prob")[0], records.correct[0])
    assert auc(records.scores(point.score)[0], records.correct[0]) > plain + 0.1
    assert point.accuracy > ee.geometric_budget(records, 0.6).accuracy


# --- thresholds of classes, temperatures


@settings(max_examples=10)
@given(records=drawn(150, 3), drop=st.sampled_from([0.0, 0.02, 0.1, 1.0]), tail=st.integers(1, 30))
def test_class_thresholds_equal_their_definition(records: ee.ExitRecords, drop: float, tail: int) -> None:
    point = class_thresholds(records, drop, min_tail=tail)
    p = torch.softmax(records.logits, -1).amax(-1)
    answers = records.logits.argmax(-1)
    expected = torch.full((2, 5), math.inf)
    for k in range(2):
        right = records.correct[k].double()
        tails = [p[k] >= d for d in p[k].unique()]
        standard = max(right[rows].mean().item() for rows in tails if rows.sum() >= 1.5)
        for c in range(5):
            for d in p[k][answers[k] == c].unique().flip(0):
                rows = (answers[k] == c) & (p[k] >= d)
                if rows.sum() >= tail and right[rows].mean().item() >= standard - drop - 1e-12:
                    expected[k, c] = d
    assert isinstance(point.score, ClassThresholds)
    torch.testing.assert_close(point.score.thresholds, expected)
    leaves = p[:2] >= expected.gather(1, answers[:2])
    where = [next((k for k in range(2) if leaves[k, i]), 2) for i in range(150)]
    replay = records.replay(point.policy)
    assert replay.exit_index.tolist() == where
    opened = expected.isfinite().any(1).tolist()
    assert [tau < math.inf for tau in point.thresholds] == opened


def test_a_class_that_is_named_too_rarely_never_leaves() -> None:
    records = synthetic(300, 3)
    logits = records.logits.clone()
    logits[0, :, 4] = -9.0
    point = class_thresholds(replace(records, logits=logits), 0.3)
    assert point.score.thresholds[0, 4] == math.inf
    assert point.score.thresholds[0, :4].isfinite().any()
    replay = replace(records, logits=logits).replay(point.policy)
    assert not (replay.exit_index[logits[0].argmax(-1) == 4] == 0).any()


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 10.0])
def test_temperature_scaling_finds_the_temperature(factor: float) -> None:
    g = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(4000, 5, generator=g)
    labels = torch.multinomial(torch.softmax(honest, -1), 1, generator=g)[:, 0]
    records = ee.ExitRecords(("exit",), torch.stack([factor * honest, honest]), (50, 100), (1,), labels)
    score = scale_temperatures(records)
    assert score.temperatures[0] == pytest.approx(factor, rel=0.05)
    assert score.temperatures[0] == pytest.approx(factor * score.temperatures[1], rel=1e-2)
    scaled = records.logits[0] / score.temperatures[0]
    loss = [torch.nn.functional.cross_entropy(z, labels).item() for z in (records.logits[0], scaled)]
    gap = [
        expected_calibration_error(torch.softmax(z, -1).amax(-1), z.argmax(-1) == labels)
        for z in (records.logits[0], scaled)
    ]
    assert loss[1] <= loss[0] + 1e-9
    assert gap[1] < 0.03
    if factor != 1:
        assert loss[1] < loss[0] - 0.01
        assert gap[1] < gap[0]
    torch.testing.assert_close(records.scores(score)[0], torch.softmax(scaled, -1).amax(-1))


def test_temperatures_stay_finite_on_answers_that_are_all_right_all_wrong_or_not_numbers() -> None:
    right = 5 * torch.eye(4)[torch.arange(40) % 4]
    for labels in (torch.arange(40) % 4, (torch.arange(40) + 1) % 4):
        logits = torch.stack([right, right])
        logits[0, 0] = torch.nan
        score = scale_temperatures(ee.ExitRecords(("exit",), logits, (50, 100), (1,), labels))
        assert all(0.05 <= t <= 20 for t in score.temperatures)


@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=50),
    bins=st.sampled_from([1, 4, 15]),
)
def test_calibration_error_equals_its_definition(rows: list[tuple[int, bool]], bins: int) -> None:
    confidence = torch.tensor([c / 100 for c, _ in rows], dtype=torch.float64)
    right = torch.tensor([r for _, r in rows])
    place = torch.tensor([min(bins - 1, int(c * bins)) for c in confidence.tolist()])
    expected = 0.0
    for b in place.unique():
        here = place == b
        gap = abs(confidence[here].mean().item() - right[here].double().mean().item())
        expected += here.double().mean().item() * gap
    assert expected_calibration_error(confidence, right, bins) == pytest.approx(expected, abs=1e-9)
