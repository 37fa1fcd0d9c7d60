"""Scores, calibrators and the frontier on synthetic records, against brute force."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ee_surgery as ee
from ee_surgery.calibration.budget import quota_thresholds
from ee_surgery.calibration.cascade import tail_accuracy
from ee_surgery.calibration.classwise import class_thresholds
from ee_surgery.calibration.combined import CombinedScore
from ee_surgery.calibration.correctness import ChanceOfBeingRight, exit_features
from ee_surgery.calibration.eenet import eenet_scheduler
from ee_surgery.calibration.methods import CALIBRATORS, one_threshold
from ee_surgery.calibration.records import replay_point
from ee_surgery.calibration.search import search
from ee_surgery.calibration.temperature import expected_calibration_error, scale_temperatures
from ee_surgery.calibration.threshold_search import ThresholdSearch
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.policy import Fallback
from ee_surgery.policies.scores import FITTED_SCORES, FittedScore, scores_of
from ee_surgery.task import CLASSIFICATION
from tests.strategies import records as drawn
from tests.strategies import synthetic

PRICES = np.geomspace(1e-3, 30, 64)


@pytest.mark.parametrize("name", ["max_prob", "margin", "entropy"])
@given(gap=st.floats(0, 10), more=st.floats(0.1, 5), classes=st.integers(2, 20))
def test_scores_grow_with_confidence_and_stay_in_the_unit_interval(
    name: str, gap: float, more: float, classes: int
) -> None:
    logits = torch.zeros(2, classes, dtype=torch.float64)
    logits[0, 0], logits[1, 0] = gap, gap + more
    (low, high), _ = ee.SCORES[name](logits, None, ())
    assert -1e-9 <= low < high + 1e-12 <= 1 + 2e-9


def test_scores_on_known_values() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert ee.SCORES["max_prob"](logits, None, ())[0].item() == pytest.approx(0.7)
    assert ee.SCORES["margin"](logits, None, ())[0].item() == pytest.approx(0.5)
    h = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert ee.SCORES["entropy"](logits, None, ())[0].item() == pytest.approx(1 - h / math.log(3), abs=1e-6)
    assert ee.SCORES["entropy"](torch.tensor([[0.0, -torch.inf]]), None, ())[0].item() == 1
    assert ee.SCORES["learned"](logits, torch.tensor([0.0]), ())[0].item() == 0.5
    with pytest.raises(ee.ConfigError, match="confidence unit"):
        ee.SCORES["learned"](logits, None, ())


def test_patience_counts_equal_answers_in_a_row() -> None:
    answers = torch.tensor([[1, 2, 0], [1, 2, 1], [1, 0, 1]])  # exits x samples
    state: tuple[torch.Tensor, ...] = ()
    for row, expected in zip(answers, ([0, 0, 0], [1, 1, 0], [2, 0, 1]), strict=True):
        score, state = ee.SCORES["patience"](torch.nn.functional.one_hot(row, 3).float(), None, state)
        assert score.tolist() == expected


def test_costs_count_every_branch_visited() -> None:
    assert exit_costs([10, 20, 30], [1, 2], [True, True]) == [11, 23, 33]
    assert exit_costs([10, 20, 30], [1, 2], [False, True]) == [10, 22, 32]
    assert exit_costs([10, 20, 30], [1, 2], [False, False]) == [10, 20, 30]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_tail_accuracy_equals_brute_force(rows: list[tuple[int, bool]]) -> None:
    score = torch.tensor([float(s) for s, _ in rows])
    correct = torch.tensor([c for _, c in rows])
    candidates, accuracy, count = tail_accuracy(score, correct)
    assert candidates.tolist() == sorted(set(score.tolist()), reverse=True)
    for d, a, n in zip(candidates, accuracy, count, strict=True):
        assert n == (score >= d).sum()
        assert a.item() == pytest.approx(correct[score >= d].double().mean().item())


@given(records=drawn(60, 3), drop=st.sampled_from([0.0, 0.01, 0.05, 0.2]))
def test_cascade_rule_equals_its_definition(records: ee.ExitRecords, drop: float) -> None:
    point = ee.accuracy_drop_rule(records, drop, min_tail=0.1)
    scores = records.scores("max_prob")
    for k, tau in enumerate(point.thresholds):
        tails = {
            d: records.correct[k][scores[k] >= d].double().mean().item()
            for d in set(scores[k].tolist())
            if (scores[k] >= d).sum() >= 6
        }
        best = max(tails.values())
        assert tau == pytest.approx(min(d for d, a in tails.items() if a >= best - drop - 1e-12))
    assert point.accuracy_drop == pytest.approx(records.base_accuracy - point.accuracy)


def test_cascade_rule_ignores_a_lucky_few() -> None:
    records = synthetic(400)
    strict, loose = (
        ee.accuracy_drop_rule(records, 0.0, min_tail=0.0),
        ee.accuracy_drop_rule(records, 0.0, min_tail=0.25),
    )
    assert loose.macs_fraction <= strict.macs_fraction


@given(records=drawn(50, 4), quotas=st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_quotas_are_met_but_for_ties(records: ee.ExitRecords, quotas: list[int]) -> None:
    scores = records.scores("max_prob")
    ties = any(len(row.unique()) < len(row) for row in scores)
    policy = ee.ThresholdPolicy(quota_thresholds(scores, quotas))
    left = torch.bincount(records.replay(policy).exit_index, minlength=4)
    here = 50
    for k, quota in enumerate(quotas):
        want = min(quota, here)
        assert left[k] >= want
        if not ties:
            assert left[k] == want
        here -= int(left[k])


@given(records=drawn(100), budget=st.floats(0.3, 1.1))
def test_geometric_budget_is_met_by_realised_exits(records: ee.ExitRecords, budget: float) -> None:
    point = ee.geometric_budget(records, budget)
    replay = records.replay(point.policy)
    assert replay.macs.mean().item() / records.base_macs <= budget + 1e-12
    assert point.macs_fraction == pytest.approx(replay.macs.mean().item() / records.base_macs)


def test_an_impossible_budget_names_the_cheapest() -> None:
    records = synthetic()
    with pytest.raises(ee.OperatingPointError, match=r"cheapest possible mean is 0\.280"):
        ee.geometric_budget(records, 0.1)
    with pytest.raises(ee.OperatingPointError, match="the cheapest costs"):
        ee.Frontier.search(records).at(budget=0.1)


@settings(max_examples=8)
@given(records=drawn(80), drop=st.floats(0, 0.3))
def test_frontier_keeps_its_promises_by_realised_exits(records: ee.ExitRecords, drop: float) -> None:
    frontier = ee.Frontier.search(records, ["max_prob"])
    for point in frontier:
        again = replay_point(records, point.policy, point.rule)
        assert replace(again, expected_accuracy=point.expected_accuracy) == point
        assert point.expected_accuracy <= point.accuracy
    assert [p.macs_fraction for p in frontier] == sorted(p.macs_fraction for p in frontier)
    expected = [p.expected_accuracy for p in frontier]
    assert expected == sorted(expected)
    assert frontier.at(max_accuracy_drop=drop).accuracy_drop <= drop + 1e-12
    assert frontier.at(max_accuracy_drop=drop).expected_accuracy >= records.base_accuracy - drop - 1e-12
    assert frontier.at(budget=0.6).macs_fraction <= 0.6
    assert frontier.at(max_accuracy_drop=0.0).macs_fraction <= 1.0 + 1e-12


def _grid(records: ee.ExitRecords) -> list[ee.OperatingPoint]:
    """Every policy that differs on these records."""
    axes = [[*row.tolist(), math.inf] for row in records.scores("max_prob")]
    return [replay_point(records, ee.ThresholdPolicy(taus), "grid") for taus in itertools.product(*axes)]


@settings(max_examples=10)
@given(records=drawn(16, 3))
def test_the_sweep_comes_close_to_exhaustive_search(records: ee.ExitRecords) -> None:
    every = _grid(records)
    found = ThresholdSearch(records).sweep(PRICES).values()
    for price in (0.1, 0.5, 1.0, 2.0):
        best = max(p.accuracy - price * p.macs_fraction for p in every)
        assert max(accuracy - price * cost for cost, accuracy in found) >= best - 0.01


def test_the_sweep_beats_one_threshold_for_all_and_the_geometric_rule_at_every_price() -> None:
    records = synthetic(2000)
    found = ThresholdSearch(records).sweep(PRICES).values()
    others = [ee.geometric_budget(records, budget) for budget in (0.4, 0.5, 0.6, 0.7, 0.8)]
    others += [
        replay_point(records, ee.ThresholdPolicy((tau,) * 3), "one") for tau in torch.linspace(0, 1, 200).tolist()
    ]
    for price in (0.05, 0.2, 0.5, 1.0, 2.0):
        best = max(p.accuracy - price * p.macs_fraction for p in others)
        assert max(accuracy - price * cost for cost, accuracy in found) >= best - 1e-9


@given(
    seed=st.integers(0, 1000),
    chained=st.booleans(),
    fallback=st.sampled_from(["last", "most_confident"]),
    data=st.data(),
)
def test_the_search_counts_costs_and_answers_like_a_replay(
    seed: int, chained: bool, fallback: Fallback, data: st.DataObject
) -> None:
    records = replace(synthetic(40, 4, seed=seed, ties=True), chained=chained)
    records.logits[:, :4] = torch.nan
    records.logits[0, 4:8] = torch.inf
    state = ThresholdSearch(records).falling_back(fallback)
    ranks = tuple(state.snap(k, data.draw(st.integers(0, 40))) for k in range(3))
    point = replay_point(records, state.policy(ranks), "ranks")
    cost, accuracy = state.evaluate(ranks)
    assert cost == pytest.approx(point.macs_fraction)
    assert accuracy == pytest.approx(point.accuracy)
    assert state.ranks(state.thresholds(ranks)) == ranks
    assert point.fallback == fallback
    less, more = state.evaluate(state.improve(ranks, 0.5))
    assert more - 0.5 * less >= accuracy - 0.5 * cost - 1e-9


def test_search_on_few_samples_does_no_worse_on_new_ones_than_one_threshold() -> None:
    gains = []
    for seed in range(6):
        both = synthetic(2100, seed=seed)
        few, new = both.take(torch.arange(100)), both.take(torch.arange(100, 2100))
        ways = search(few), one_threshold(few, "max_prob")
        for price in (0.1, 0.3, 0.6, 1.0):
            best = (max(way, key=lambda p: p.accuracy - price * p.macs_fraction) for way in ways)
            given_new = [replay_point(new, point.policy, "new") for point in best]
            mine, shared = (point.accuracy - price * point.macs_fraction for point in given_new)
            gains.append(mine - shared)
    assert sum(gains) / len(gains) >= -0.005


def test_search_and_stopping_are_deterministic() -> None:
    for name in ("search", "stopping"):
        first, again = CALIBRATORS[name](synthetic(100)), CALIBRATORS[name](synthetic(100))
        assert [p.thresholds for p in first] == [p.thresholds for p in again]
        assert [p.expected_accuracy for p in first] == [p.expected_accuracy for p in again]


def test_expected_accuracy_is_nearer_to_new_data_than_realised_accuracy() -> None:
    realised, expected = [], []
    for seed in range(6):
        both = synthetic(1200, 6, seed=seed)
        frontier = ee.Frontier.search(both.take(torch.arange(300)))
        new = both.take(torch.arange(300, 1200))
        for budget in (0.5, 0.7):
            point = frontier.at(budget=budget)
            accuracy = new.replay(point.policy).correct.double().mean().item()
            realised.append(point.accuracy - accuracy)
            expected.append(point.expected_accuracy - accuracy)
    assert sum(realised) > 0  # choosing is optimistic
    assert abs(sum(expected)) < abs(sum(realised))


@settings(max_examples=10)
@given(records=drawn(24, 3), drop=st.sampled_from([0.0, 0.05, 0.1]))
def test_realised_drop_is_met_at_about_the_lowest_cost_there_is(records: ee.ExitRecords, drop: float) -> None:
    point = ee.realised_drop(records, drop)
    replay = records.replay(point.policy)
    assert records.base_accuracy - replay.correct.double().mean().item() <= drop + 1e-12
    assert point.macs_fraction <= 1 + 1e-12
    cheapest = min(p.macs_fraction for p in _grid(records) if p.accuracy_drop <= drop + 1e-12)
    assert cheapest - 1e-12 <= point.macs_fraction <= cheapest + 0.12
    found = ThresholdSearch(records).sweep(PRICES).values()
    cheaper = [accuracy for cost, accuracy in found if cost < point.macs_fraction - 1e-12]
    assert all(records.base_accuracy - accuracy > drop for accuracy in cheaper)


@given(seed=st.integers(0, 1000), n=st.integers(2, 40))
def test_a_frontier_always_has_an_answer_to_no_drop_at_all(seed: int, n: int) -> None:
    records = synthetic(n, 3, seed=seed)
    only = ee.Frontier.of(records, [])
    assert [point.thresholds for point in only] == [(math.inf, math.inf)]
    assert only[0].macs_fraction == 1
    assert only[0].expected_accuracy == only[0].accuracy == records.base_accuracy
    bad = replay_point(records, ee.ThresholdPolicy((0.0, 0.0)), "all first")
    frontier = ee.Frontier.of(records, [bad])
    assert frontier.at(max_accuracy_drop=0.0).expected_accuracy >= records.base_accuracy
    assert any(p.thresholds == (math.inf, math.inf) for p in frontier) or bad.accuracy >= records.base_accuracy


def test_a_useless_exit_is_closed_and_not_paid_for() -> None:
    records = synthetic(300, 3)
    noise = ee.ExitRecords(
        records.exits, records.logits.clone(), records.trunk_macs, (40, 3), records.labels
    )  # the first branch costs more than it can save
    point = ee.Frontier.search(noise).at(max_accuracy_drop=0.02)
    assert point.thresholds[0] == math.inf
    assert point.macs_fraction <= 1


def test_samples_that_are_not_finite_never_leave_in_a_replay() -> None:
    records = synthetic(50)
    records.logits[:3, 7] = torch.nan
    replay = records.replay(ee.ThresholdPolicy((0.0,) * 3))
    assert replay.exit_index[7] == 3
    assert (replay.exit_index != 0).sum() == 1
    assert all(p.policy for p in ee.Frontier.search(records))


def test_without_labels_accuracy_is_agreement() -> None:
    records = synthetic()
    bare = ee.ExitRecords(records.exits, records.logits, records.trunk_macs, records.branch_macs)
    assert bare.base_accuracy == 1
    assert not ee.Frontier.search(bare).labelled


def test_records_and_frontier_survive_the_disk(tmp_path: Path) -> None:
    records = synthetic()
    again = ee.ExitRecords.load(records.save(tmp_path / "records.safetensors"))
    assert torch.equal(again.logits, records.logits)
    assert again.exits == records.exits
    assert again.branch_macs == records.branch_macs
    frontier = ee.Frontier.search(records)
    assert ee.Frontier.from_dict(json.loads(json.dumps(frontier.to_dict()))) == frontier
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(ee.DataError, match="Cannot read exit records"):
        ee.ExitRecords.load(tmp_path / "bad")


def test_a_higher_threshold_never_lowers_the_cost() -> None:
    records = synthetic()
    costs = [
        records.replay(ee.ThresholdPolicy((tau, 0.6, 0.6))).macs.mean().item() for tau in (0.0, 0.3, 0.6, 0.9, 1.1)
    ]
    assert costs == sorted(costs)


@pytest.mark.parametrize("request_", [{}, {"budget": 0.5, "max_accuracy_drop": 0.1}, {"max_accuracy_drop": 2.0}])
def test_bad_requests_to_a_frontier_are_refused(request_: dict[str, float]) -> None:
    with pytest.raises(ee.OperatingPointError):
        ee.Frontier.search(synthetic()).at(**request_)


def test_thresholds_must_be_numbers() -> None:
    with pytest.raises(ee.ConfigError, match="must be a number"):
        ee.ThresholdPolicy((math.nan,))
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'max_prob'"):
        ee.ThresholdPolicy((0.5,), "maxprob")


# --- scores, named and fitted


@cache
def with_units(n: int = 300, k: int = 3) -> ee.ExitRecords:
    """Records whose branches have confidence units that know something."""
    records = synthetic(n, k)
    g = torch.Generator().manual_seed(1)
    return replace(records, confidence=torch.randn(k - 1, n, generator=g) + 2 * records.correct[:-1].float())


FITS: dict[str, Callable[[ee.ExitRecords], FittedScore | str]] = {
    "chance": ChanceOfBeingRight.fit,
    "eenet": lambda records: eenet_scheduler(records, 0.6, steps=20).score,
    "classwise": lambda records: class_thresholds(records, 0.05, min_tail=5).score,
    "combined": lambda records: CombinedScore.fit(records.without_logits(["max_prob", "margin", "entropy"])),
    "temperature": scale_temperatures,
    "temperature and entropy": lambda records: scale_temperatures(records, "entropy"),
}


@cache
def fitted_score(name: str) -> FittedScore:
    score = FITS[name](with_units())
    assert isinstance(score, FittedScore)
    return score


def test_every_fitted_score_is_known_to_these_tests() -> None:
    assert {fitted_score(name).kind for name in FITS} == set(FITTED_SCORES)


def _score_of(name: str) -> str | FittedScore:
    return fitted_score(name) if name in FITS else name


def _one_exit_after_the_other(records: ee.ExitRecords, policy: ee.ThresholdPolicy) -> Tensor:
    """Where each sample leaves, deciding as a routed run does: samples that are gone are gone from the state, too."""
    rows = torch.arange(len(records))
    left = torch.full((len(records),), len(records.exits))
    state: tuple[Tensor, ...] = ()
    for k, asked in enumerate(policy.visits()):
        if asked:
            confidence = None if records.confidence is None else records.confidence[k, rows]
            decision = policy.decide(k, records.logits[k, rows], confidence, state)
            assert decision.score.shape == decision.leaves.shape == rows.shape
            left[rows[decision.leaves]] = k
            rows, state = rows[~decision.leaves], tuple(tensor[~decision.leaves] for tensor in decision.state)
    return left


@pytest.mark.parametrize("name", [*scores_of(CLASSIFICATION, units=True), *FITS])
@settings(max_examples=12)
@given(data=st.data())
def test_a_replay_equals_deciding_one_exit_after_the_other(name: str, data: st.DataObject) -> None:
    score, records = _score_of(name), with_units()
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))[:40]
    records = records.take(rows)
    records.logits[data.draw(st.integers(0, 2)), 3] = torch.nan
    values = records.scores(score)
    at = [data.draw(st.sampled_from([0.1, 0.5, 0.9, None])) for _ in records.exits]
    taus = tuple(math.inf if q is None else row.quantile(q).item() for q, row in zip(at, values, strict=True))
    taus = tuple(tau if math.isfinite(tau) else math.inf for tau in taus)
    policy = ee.ThresholdPolicy(taus, score)
    replay = records.replay(policy)
    assert _one_exit_after_the_other(records, policy).tolist() == replay.exit_index.tolist()
    for row in range(3):  # and so does a batch of one
        state: tuple[Tensor, ...] = ()
        for k, asked in enumerate(policy.visits()):
            if asked:
                one = records.confidence[k, row : row + 1] if records.confidence is not None else None
                leaves, _, state = policy.decide_one(k, records.logits[k, row : row + 1], one, state)
                if leaves:
                    assert replay.exit_index[row] == k
                    break
        else:
            assert replay.exit_index[row] == len(records.exits)


def _as_json_would(value: Any) -> Any:
    """Lists for tuples; tensors as they are."""
    if isinstance(value, dict):
        return {key: _as_json_would(item) for key, item in value.items()}
    return [_as_json_would(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", FITS)
def test_fitted_scores_survive_to_dict_and_from_dict(name: str) -> None:
    score, records = fitted_score(name), with_units()
    data = _as_json_would(score.to_dict())
    assert data["kind"] == score.kind == str(score)
    again = FittedScore.from_dict(data)
    assert type(again) is type(score)
    assert not any(isinstance(value, list) for value in again.to_dict().values())
    assert _as_json_would(again.to_dict()).keys() == data.keys()
    for key, value in data.items():
        seen = _as_json_would(again.to_dict())[key]
        pairs = zip(value, seen, strict=True) if isinstance(value, list) else [(value, seen)]
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
    assert torch.equal(records.scores(again), records.scores(score))
    assert torch.equal(records.scores(score.to(torch.device("cpu"))), records.scores(score))
    policy = ee.ThresholdPolicy((0.5, math.inf), score, "most_confident")
    point = replace(replay_point(records, policy, "test"), expected_accuracy=0.5)
    back = ee.OperatingPoint.from_dict(_as_json_would(point.to_dict()))
    assert replace(back, score="") == replace(point, score="")
    assert replay_point(records, back.policy, "test").exit_shares == point.exit_shares


@pytest.mark.parametrize("name", [*scores_of(CLASSIFICATION, units=True), *FITS])
def test_scores_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    score, records = _score_of(name), with_units()
    rows = torch.tensor([5, 2, 100])
    torch.testing.assert_close(records.take(rows).scores(score), records.scores(score)[:, rows], atol=1e-5, rtol=1e-4)


def test_half_precision_logits_are_scored_in_single_precision() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    for dtype in (torch.float16, torch.bfloat16):
        decision = ee.ThresholdPolicy((0.9,)).decide(0, logits.to(dtype), None, ())
        assert decision.score.dtype == torch.float32
        assert decision.score.item() == pytest.approx(torch.softmax(logits, -1).max().item(), rel=1e-6)


def test_what_is_known_at_an_exit_by_hand() -> None:
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]])
    before, p_before, streak = None, None, 0
    state: tuple[Tensor, ...] = ()
    for k, p in enumerate(rows):
        features, state = exit_features(p.log()[None], state)
        first, second = p.sort(descending=True).values[:2].tolist()
        odds = math.log(first / (1 - first))
        h = -(p * p.log()).sum().item()
        expected = [odds, odds**2, math.log(first / second), h]
        if before is not None and p_before is not None:
            then, highest = p_before[p.argmax()].item(), p_before.max().item()
            streak = streak + 1 if before == p.argmax() else 0
            agrees = float(before == p.argmax())
            expected += [math.log(then / (1 - then)), agrees, math.log(highest / (1 - highest)), min(streak, 3)]
        assert features.shape == (1, 4 if k == 0 else 8)
        assert features[0].tolist() == pytest.approx(expected, abs=1e-4)
        before, p_before = p.argmax(), p
    wild = exit_features(torch.tensor([[1e4, 0.0], [-torch.inf, 0.0]]), ())[0]
    assert wild.isfinite().all()


def test_the_chance_of_being_right_is_honest_and_sees_more_than_the_exit_alone() -> None:
    both = synthetic(4000, 4)
    records, new = both.take(torch.arange(2000)), both.take(torch.arange(2000, 4000))
    chance = ChanceOfBeingRight.fit(records)
    assert chance.stateful
    p = torch.tensor(chance.probabilities(new))
    assert p.shape == (4, 2000)
    for k in range(4):
        assert p[k].mean().item() == pytest.approx(new.correct[k].double().mean().item(), abs=0.03)
        assert expected_calibration_error(p[k], new.correct[k]) < 0.05
    torch.testing.assert_close(p[:-1].float(), torch.sigmoid(new.scores(chance)), atol=1e-5, rtol=1e-4)
    alone = new.scores("max_prob")
    assert all(auc(new.scores(chance)[k], new.correct[k]) > auc(alone[k], new.correct[k]) for k in (1, 2))


def auc(score: Tensor, right: Tensor) -> float:
    """Chance that a right answer scores above a wrong one."""
    ranks = score.argsort().argsort().double() + 1
    yes, no = int(right.sum()), int((~right).sum())
    return (ranks[right].sum().item() - yes * (yes + 1) / 2) / (yes * no)


# --- every policy


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("broken", [False, True])
def test_every_policy_traces_points_that_a_replay_confirms(name: str, broken: bool) -> None:
    records = with_units()
    if broken:  # logits that are not finite
        logits = records.logits.clone()
        logits[:, 7], logits[0, 11] = torch.nan, torch.inf
        records = replace(records, logits=logits)
    points = CALIBRATORS[name](records)
    assert len({(p.macs_fraction, p.accuracy) for p in points}) >= 2
    for point in points[:: max(1, len(points) // 20)]:
        replay = records.replay(point.policy)
        assert len(point.thresholds) == 2
        assert point.accuracy == pytest.approx(replay.correct.double().mean().item())
        assert point.accuracy_drop == pytest.approx(records.base_accuracy - point.accuracy)
        assert point.macs_fraction == pytest.approx(replay.macs.mean().item() / records.base_macs)
        assert point.exit_shares == pytest.approx([(replay.exit_index == k).double().mean().item() for k in range(3)])
        assert sum(point.exit_shares) == pytest.approx(1)
        assert point.samples == 300
        assert not broken or replay.exit_index[7] == 2
    frontier = ee.Frontier.of(records, points)
    assert len(frontier) >= 2
    costs, expected = zip(*((p.macs_fraction, p.expected_accuracy) for p in frontier), strict=True)
    assert list(costs) == sorted(set(costs))
    assert list(expected) == sorted(set(expected))
    assert frontier.at(max_accuracy_drop=0.0).macs_fraction <= 1 + 1e-12
    if name not in ("search", "stopping"):  # which choose
        assert all((point.fallback == "most_confident") == (name == "most_confident") for point in points)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_policy_stays_with_the_original_where_branches_cost_more_than_all_of_it(name: str) -> None:
    records = replace(with_units(), branch_macs=(150, 150))
    assert ee.Frontier.trace(records, name).at(max_accuracy_drop=0.0).macs_fraction == 1


def test_an_operating_point_prints_as_a_line_without_tensors() -> None:
    point = ee.Frontier.trace(with_units(), "eenet")[0]
    assert str(point).startswith(f"accuracy {point.accuracy:.2%} ({point.expected_accuracy:.2%} expected) at ")
    assert "score eenet" in str(point)
    assert "tensor" not in repr(point)
    assert str(ee.OperatingPoint.by_hand((0.5,), "max_prob")) == "thresholds (0.5,) of max_prob, by hand"


def test_a_policy_by_name_traces_the_frontier_of_its_points() -> None:
    records = with_units()
    assert ee.Frontier.trace(records, "shared") == ee.Frontier.of(records, CALIBRATORS["shared"](records))
    assert ee.Frontier.trace(records) == ee.Frontier.search(records)
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'patience'"):
        ee.Frontier.trace(records, "patienc")
    with pytest.raises(ee.ConfigError, match="confidence unit"):
        ee.Frontier.trace(synthetic(), "learned")


def test_the_old_names_of_calibrators_still_work_and_say_the_new_ones() -> None:
    with pytest.warns(ee.SurgeryWarning, match=r"ee\.POLICIES is now ee\.CALIBRATORS"):
        assert ee.POLICIES is CALIBRATORS
    with pytest.warns(ee.SurgeryWarning, match="policy= is now method="):
        assert ee.Frontier.trace(with_units(), policy="shared") == ee.Frontier.trace(with_units(), "shared")
    with pytest.warns(ee.SurgeryWarning, match="method"):
        assert ee.PRESETS["sdn"].policy == "most_confident"


def test_one_half_is_among_the_thresholds_of_learned() -> None:
    assert any(p.thresholds == (0.5, 0.5) and p.score == "learned" for p in CALIBRATORS["learned"](with_units()))


def test_branchynets_grid_is_as_good_as_any_one_threshold_on_the_entropy() -> None:
    records = with_units()
    grid, line = CALIBRATORS["entropy"](records), one_threshold(records, "entropy")
    for price in (0.1, 0.3, 1.0):
        best = [max(p.accuracy - price * p.macs_fraction for p in points) for points in (grid, line)]
        assert best[0] >= best[1] - 0.01
    assert all(len(set(p.thresholds)) <= 1 for p in CALIBRATORS["entropy"](synthetic(60, 5)))  # no grid


def test_most_confident_only_changes_the_answers_of_who_never_left() -> None:
    records = with_units()
    for tau in (0.4, 0.7, 0.95, 2.0):
        last = records.replay(ee.ThresholdPolicy((tau, tau)))
        best = records.replay(ee.ThresholdPolicy((tau, tau), "max_prob", "most_confident"))
        assert torch.equal(best.exit_index, last.exit_index)
        assert torch.equal(best.macs, last.macs)
        stayed = last.exit_index == 2
        assert torch.equal(best.answer_index[~stayed], last.exit_index[~stayed])
        asked = [0, 1, 2] if tau < math.inf else [2]
        sure = torch.softmax(records.logits, -1).amax(-1)[asked].argmax(0)
        assert torch.equal(best.answer_index[stayed], sure[stayed])
    with pytest.raises(ee.ConfigError, match="fallback must be"):
        ee.ThresholdPolicy((0.5,), "max_prob", "first")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("original_is_best", [False, True])
def test_search_falls_back_on_the_most_confident_where_exits_err_differently_and_only_there(
    original_is_best: bool,
) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (1000,), generator=g)
    rows = []
    for last in (False, False, True):
        sure = 0.2 + 0.8 * torch.rand(1000, generator=g)  # the largest probability, and as often right
        right = torch.rand(1000, generator=g) < sure
        if original_is_best:  # branches are too sure of themselves
            right, sure = (right | last), (0.2 + 0.1 * sure if last else sure)
        said = torch.where(right, labels, (labels + 1) % 5)
        odds = (4 * sure / (1 - sure)).log()
        rows.append(odds[:, None] * torch.nn.functional.one_hot(said, 5))
    records = ee.ExitRecords(("a", "b"), torch.stack(rows), (30, 60, 100), (1, 1), labels)
    frontier = ee.Frontier.trace(records, "search")
    fallbacks = {point.fallback for point in frontier if math.isfinite(min(point.thresholds))}
    assert fallbacks == {"last" if original_is_best else "most_confident"}
    assert frontier[-1].accuracy >= (1.0 if original_is_best else records.base_accuracy + 0.1)


# --- optimal stopping


def _knowing(n: int = 400, exits: int = 1, seed: int = 0) -> ee.ExitRecords:
    """Branches that are sure exactly when they are right, in front of an original that is always right."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=g)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    logits = [8 * one_hot]
    for _ in range(exits):
        right = torch.rand(n, generator=g) < 0.5
        sure = torch.where(right, 4 + torch.rand(n, generator=g), 0.1 + 0.4 * torch.rand(n, generator=g))
        said = torch.where(right, labels, (labels + 1) % 5)
        logits.insert(0, sure[:, None] * torch.nn.functional.one_hot(said, 5))
    trunk = tuple(int(100 * (i + 1) / (exits + 1)) for i in range(exits + 1))
    return ee.ExitRecords(tuple(f"exit{i}" for i in range(exits)), torch.stack(logits), trunk, (1,) * exits, labels)


@pytest.mark.parametrize("exits", [1, 2, 3])
@pytest.mark.parametrize("price", [0.2, 0.3, 0.6])
def test_who_is_known_to_be_right_leaves_and_nobody_else(exits: int, price: float) -> None:
    records = _knowing(exits=exits)
    first_right = records.correct.int().argmax(0)
    state = ThresholdSearch(records)
    for found in (state.induction(np.array([price])), state.ascent(np.array([price]))):
        replay = records.replay(ee.ThresholdPolicy(state.thresholds(found[0])))
        assert torch.equal(replay.exit_index, first_right)
        assert replay.correct.all()


def test_everybody_leaves_at_a_price_that_no_answer_is_worth_and_nobody_for_a_branch_that_is_too_dear() -> None:
    records = _knowing()
    state = ThresholdSearch(records)
    assert state.induction(np.array([30.0])) == [(400,)]
    dear = replace(records, branch_macs=(60,))  # costs more than leaving half of the time saves
    assert ThresholdSearch(dear).induction(np.array([0.3])) == [(0,)]
    assert ThresholdSearch(dear).ascent(np.array([0.3])) == [(0,)]


def test_stopping_keeps_every_answer_of_a_knowing_exit_at_about_the_least_cost() -> None:
    records = _knowing()
    for name in ("search", "stopping"):
        point = ee.Frontier.trace(records, name).at(max_accuracy_drop=0.0)
        share = records.correct[0].double().mean().item()
        assert point.accuracy == 1
        assert point.macs_fraction == pytest.approx(0.01 + 0.5 * share + (1 - share), abs=0.005)


def test_a_frontier_of_one_point_says_why() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (400,), generator=generator)
    right = 9.0 * torch.nn.functional.one_hot(labels, 10)
    noise = torch.randn(400, 10, generator=generator)
    useless = ee.ExitRecords(("a",), torch.stack([noise, right]), (50, 100), (10,), labels)
    said = str(ee.Frontier.search(useless))
    assert "One point: no exit saves anything" in said
    assert f"alone they reach {useless.accuracies[0]:.1%}" in said
    perfect = ee.ExitRecords(("a",), torch.stack([right, right]), (50, 100), (10,), labels)
    assert "One point: nothing cheaper stays within" in str(ee.Frontier.search(perfect))
    half = ee.ExitRecords(("a",), torch.stack([right + 5 * noise, right]), (50, 100), (10,), labels)
    assert "One point" not in str(ee.Frontier.search(half))
