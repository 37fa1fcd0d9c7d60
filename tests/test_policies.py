"""Scores, calibrators and the frontier on synthetic records, against brute force."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.policies.budget import quota_thresholds
from ee_surgery.policies.cascade import tail_accuracy
from ee_surgery.policies.operating import realise
from ee_surgery.policies.records import exit_costs
from ee_surgery.policies.search import search


def synthetic(n: int = 400, k: int = 4, classes: int = 5, seed: int = 0, ties: bool = False) -> ee.ExitRecords:
    """Exits that get better with depth, their confidence informative."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    hardness = torch.rand(n, generator=g)
    logits = torch.randn(k, n, classes, generator=g)
    for i in range(k):
        logits[i, torch.arange(n), labels] += 4 * (0.4 + 0.6 * (i + 1) / k) * (1.2 - hardness)
    if ties:
        logits = logits.round()
    trunk = tuple(int(100 * (i + 1) / k) for i in range(k))
    return ee.ExitRecords(tuple(f"exit{i}" for i in range(k - 1)), logits, trunk, (3,) * (k - 1), labels)


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


@given(seed=st.integers(0, 1000), drop=st.sampled_from([0.0, 0.01, 0.05, 0.2]), ties=st.booleans())
def test_cascade_rule_equals_its_definition(seed: int, drop: float, ties: bool) -> None:
    records = synthetic(60, 3, seed=seed, ties=ties)
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


@given(seed=st.integers(0, 1000), ties=st.booleans(), quotas=st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_quotas_are_met_but_for_ties(seed: int, ties: bool, quotas: list[int]) -> None:
    records = synthetic(50, 4, seed=seed, ties=ties)
    policy = ee.ThresholdPolicy(quota_thresholds(records.scores("max_prob"), quotas))
    left = torch.bincount(records.replay(policy).exit_index, minlength=4)
    here = 50
    for k, quota in enumerate(quotas):
        want = min(quota, here)
        assert left[k] >= want
        if not ties:
            assert left[k] == want
        here -= int(left[k])


@given(seed=st.integers(0, 1000), budget=st.floats(0.3, 1.1), ties=st.booleans())
def test_geometric_budget_is_met_by_realised_exits(seed: int, budget: float, ties: bool) -> None:
    records = synthetic(100, seed=seed, ties=ties)
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


@given(seed=st.integers(0, 1000), drop=st.floats(0, 0.3), ties=st.booleans())
def test_frontier_keeps_its_promises_by_realised_exits(seed: int, drop: float, ties: bool) -> None:
    records = synthetic(80, seed=seed, ties=ties)
    frontier = ee.Frontier.search(records, ["max_prob"])
    for point in frontier:
        again = realise(records, point.policy, point.rule)
        assert replace(again, expected_accuracy=point.expected_accuracy) == point
        assert point.expected_accuracy <= point.accuracy
    assert [p.macs_fraction for p in frontier] == sorted(p.macs_fraction for p in frontier)
    expected = [p.expected_accuracy for p in frontier]
    assert expected == sorted(expected)
    assert frontier.at(max_accuracy_drop=drop).accuracy_drop <= drop + 1e-12
    assert frontier.at(max_accuracy_drop=drop).expected_accuracy >= records.base_accuracy - drop - 1e-12
    assert frontier.at(budget=0.6).macs_fraction <= 0.6
    assert frontier.at(max_accuracy_drop=0.0).macs_fraction <= 1.0 + 1e-12


@given(seed=st.integers(0, 200))
def test_search_comes_close_to_exhaustive_search(seed: int) -> None:
    records = synthetic(16, 3, seed=seed)
    scores = records.scores("max_prob")
    every = [
        realise(records, ee.ThresholdPolicy((a, b)), "grid")
        for a, b in itertools.product([*scores[0].tolist(), math.inf], [*scores[1].tolist(), math.inf])
    ]
    frontier = search(records, "max_prob")
    for price in (0.1, 0.5, 1.0, 2.0):
        best = max(p.accuracy - price * p.macs_fraction for p in every)
        found = max(p.accuracy - price * p.macs_fraction for p in frontier)
        assert found >= best - 0.02


def test_search_beats_one_threshold_for_all_and_the_geometric_rule() -> None:
    records = synthetic(2000)
    points = search(records, "max_prob")
    for budget in (0.5, 0.7):
        found = max(p.accuracy for p in points if p.macs_fraction <= budget)
        assert found >= ee.geometric_budget(records, budget).accuracy
        single = max(
            (realise(records, ee.ThresholdPolicy((tau,) * 3), "one") for tau in torch.linspace(0, 1, 200).tolist()),
            key=lambda p: (p.macs_fraction <= budget, p.accuracy),
        )
        assert found >= single.accuracy


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


@given(seed=st.integers(0, 200), drop=st.sampled_from([0.0, 0.02, 0.1]), ties=st.booleans())
def test_realised_drop_is_met_at_the_lowest_cost_found(seed: int, drop: float, ties: bool) -> None:
    records = synthetic(100, seed=seed, ties=ties)
    point = ee.realised_drop(records, drop)
    replay = records.replay(point.policy)
    assert records.base_accuracy - replay.correct.double().mean().item() <= drop + 1e-12
    cheaper = [p for p in search(records, "max_prob") if p.macs_fraction < point.macs_fraction]
    assert all(p.accuracy_drop > drop for p in cheaper)
    assert point.macs_fraction <= ee.Frontier.search(records).at(max_accuracy_drop=drop).macs_fraction


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
    assert ee.Frontier.from_dict(json.loads(frontier.save(tmp_path / "f.json").read_text())) == frontier
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
    with pytest.raises(ee.ConfigError, match="must be numbers"):
        ee.ThresholdPolicy((math.nan,))
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'max_prob'"):
        ee.ThresholdPolicy((0.5,), "maxprob")
