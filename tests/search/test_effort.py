"""The one-liner: exits, branches and training follow from model and data, and it says what it found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import ee_surgery as ee
from ee_surgery.search import effort as efforts
from ee_surgery.search.effort import EFFORTS, affordable
from ee_surgery.search.exit_search import shortlist
from ee_surgery.search.exit_subset import Subset
from ee_surgery.search.outlook import as_trained
from ee_surgery.training.features import FeatureSource
from tests.search.test_exit_search import answers, learnt
from tests.training.test_training import blobs

SHORT = replace(EFFORTS["quick"], probe_steps=30, epochs=1, steps=(150, 150), patience=1)
SAMPLE = torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(efforts.EFFORTS, "standard", SHORT)
    monkeypatch.setattr(efforts, "_TIMED", 2)


def test_one_line_finds_trains_calibrates_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = learnt()
    held = blobs(512)
    branched = ee.augment(model, sample=SAMPLE, train=data, calibrate=held, max_accuracy_drop=0.05)
    assert branched.receipt().unchanged
    assert branched.plan.rule == "search"
    point = branched.operate(max_accuracy_drop=0.05)
    assert point is not None
    assert point.samples == 256  # the other half chose exits and length
    assert point.macs_fraction < 0.9
    found = branched.provenance["effort"]
    assert found["effort"] == "standard"
    assert 0 < found["original_on_training_data"] <= 1
    assert found["cost_after_each_look"][-1] < 1
    training = branched.provenance["training"]
    assert training["samples"] <= 150 * training["batch_size"]
    assert training["schedule"] == "wsd"
    shown = capsys.readouterr().out
    for part in ("trying auto", "held out; ", "training up to 150 steps of", "of the MACs at a drop of 5 points"):
        assert part in shown
    branched.save_pretrained(tmp_path)
    assert ee.from_pretrained(tmp_path, model).provenance["effort"] == found
    card = (tmp_path / "README.md").read_text()
    assert "| effort | standard |" in card
    chosen = [each["chosen"] for each in branched.provenance["placement"]["candidates"]]
    assert card.count("| not chosen |") == chosen.count(False)
    assert card.count("| trained |") + card.count("costs more than it saves") == chosen.count(True)


def test_exits_and_branches_that_were_asked_for_stay() -> None:
    model, data = learnt()
    branched = ee.augment(
        model, ["1", "3"], branch="pool", sample=SAMPLE, train=data, calibrate=blobs(128), effort="standard",
        max_accuracy_drop=0.3,
    )  # fmt: skip
    assert set(branched.exits) <= {"1", "3"}
    assert {spec.name for spec in branched.specs} == {"pool"}
    assert "placement" not in branched.provenance


def test_where_nothing_saves_it_trains_the_default_exits_and_says_no_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise ee.ExitPointError("No exit saves anything.")

    monkeypatch.setattr(efforts, "search_exits", nothing)
    monkeypatch.setattr(efforts, "prune_exits", nothing)
    model, data = learnt()
    branched = ee.augment(model, sample=SAMPLE, train=data, calibrate=blobs(128))
    assert branched.plan.rule == "linear"
    assert branched.frontier is not None
    shown = capsys.readouterr().out
    assert "No exit saves anything. Exits at the default places are trained all the same." in shown
    assert "no-go: No exit saves anything." in shown


@pytest.mark.parametrize("noisy", [True, False])
def test_what_the_original_has_memorised_is_not_distilled(noisy: bool) -> None:
    model, data = learnt()
    held = blobs(256)
    if noisy:  # the original is wrong on what it has not seen
        held = TensorDataset(held.tensors[0], torch.where(torch.arange(256) % 5 > 0, held.tensors[1], 0))
    branched = ee.augment(model, sample=SAMPLE, train=data, calibrate=held, max_accuracy_drop=0.1)
    assert branched.provenance["effort"]["memorised"] is noisy
    assert branched.provenance["training"]["distill"] == (0.0 if noisy else 0.5)


def test_data_without_labels_is_answered_by_the_original() -> None:
    model, data = learnt()
    images = [*data.tensors[0].split(32)]
    branched = ee.augment(model, sample=SAMPLE, train=images, calibrate=images, max_accuracy_drop=0.1)
    assert branched.provenance["training"]["teach"] == "original"
    assert branched.provenance["effort"]["memorised"] is None
    assert branched.frontier is not None
    assert not branched.frontier.labelled


def test_a_time_budget_ends_the_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = learnt()
    monkeypatch.setitem(efforts.EFFORTS, "quick", replace(SHORT, steps=(10**6, 10**6)))
    monkeypatch.setattr(efforts, "affordable", lambda *_: "quick")
    branched = ee.augment(model, sample=SAMPLE, train=data, calibrate=blobs(64), time_budget=0.05, effort="quick")
    assert branched.provenance["training"]["samples"] < 10**6
    minutes = branched.provenance["effort"]["search_minutes"] + branched.provenance["effort"]["training_minutes"]
    assert minutes < 0.5  # a limit of 3 seconds, on a machine that may be busy


@pytest.mark.parametrize("faster", [True, False])
def test_passes_repeat_only_where_their_features_are_worth_keeping(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = learnt()
    monkeypatch.setattr(FeatureSource, "_worth", lambda *_: faster)
    branched = ee.augment(model, sample=SAMPLE, train=data, calibrate=blobs(128), max_accuracy_drop=0.1)
    assert branched.provenance["training"]["views"] == (2 if faster else None)
    config = ee.TrainConfig(batch_size=64, validation=0.0)
    asked = ee.augment(model, ["1"], sample=SAMPLE, train=data, calibrate=blobs(128), effort="quick", config=config)
    assert asked.provenance["training"]["views"] is None


def test_single_settings_change_those_that_follow_from_the_effort() -> None:
    model, data = learnt()
    given = {"sample": SAMPLE, "train": data, "calibrate": blobs(512)}
    branched = ee.augment(model, **given, config={"lr": 5e-3, "views": 3, "batch_size": 32, "progress": False})
    training = branched.provenance["training"]
    assert (training["lr"], training["views"], training["batch_size"]) == (5e-3, 3, 32)
    assert training["schedule"] == "wsd"
    assert branched.provenance["effort"]["effort"] == "standard"
    with pytest.raises(ee.ConfigError, match=r"leave out \['epochs'\]"):
        ee.augment(model, **given, effort="quick", config={"epochs": 3})
    with pytest.raises(ee.UnknownNameError, match=r"no setting 'epoch'. Did you mean 'epochs'"):
        ee.augment(model, **given, config={"epoch": 3})
    with pytest.raises(ee.ConfigError, match="lr must be"):
        ee.augment(model, **given, config={"lr": -1})
    simple = ee.augment(model, ["0"], sample=SAMPLE, train=data, config={"epochs": 1, "progress": False})
    assert simple.provenance["training"]["epochs"] == 1


def test_more_time_buys_a_wider_search() -> None:
    graph = ee.inspect(learnt()[0], SAMPLE)
    assert affordable(graph, 1e-9) == "quick"
    assert affordable(graph, 1e9) == "best"
    assert list(EFFORTS) == ["quick", "standard", "best"]


def test_training_ends_when_nothing_is_gained_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = iter([1.0, 1.0, 1.0, 0.5, 0.4, 0.398, 0.399, 0.1])
    monkeypatch.setattr(efforts, "cheapest_exits", lambda *_, **__: Subset((), next(costs)))
    monkeypatch.setattr(efforts.Setting, "record", lambda *_: None)
    setting = efforts.Setting(
        None, blobs(64 * 32), None, 0.01, "macs", 0, 32, None, None, {}, lambda _: None  # pyright: ignore
    )  # fmt: skip
    found = efforts.Findings("quick")
    patience = efforts.Patience(setting, 2, 64, found)
    model: Any = type("Model", (), {"exits": []})()
    assert [patience(model) for _ in range(7)] == [False] * 6 + [True]
    assert found.cost_after_each_look[-1] == 0.399


def test_a_load_bounds_what_is_trained_and_the_asked_drop_comes_first() -> None:
    records = answers(0, [0.4, 0.6, 0.8, 1.0, 1.3], [20, 40, 60, 80], branch=15)
    free, _ = shortlist(records, 0.01, 6)
    for load in (0.3, 0.45, 0.6):
        chosen, cost = shortlist(records, 0.01, 6, load)
        needed = sum(records.branch_macs[k] for k in chosen) + max(records.trunk_macs[k] for k in chosen) / 3
        assert needed <= 100 * load or len(chosen) <= 2
        assert {*chosen} <= {*free}
        assert cost == shortlist(records, 0.01, 6)[1]


@pytest.mark.parametrize("horizon", [10, 100, 3200, 10**9])
@pytest.mark.parametrize("macs", [1, 10])
def test_what_a_branch_lacks_shrinks_by_a_power_of_the_steps(horizon: int, macs: int) -> None:
    records, blocks = answers(0, [0.3, 0.6, 1.2, 1.0], [20, 40, 60], branch=macs), 0.4 if macs > 2 else 0.2
    powers = blocks, 0.2, blocks, 0.0
    found = as_trained(records, 100, horizon, (True, False, True))
    for before, after, power in zip(records.accuracies, found.accuracies, powers, strict=True):
        factor = min(10.0, max(1.0, horizon / 100) ** power)
        lack = max(0.0, records.base_accuracy - before)
        assert records.base_accuracy - after == pytest.approx(lack / factor, abs=0.01) or before >= after
    assert torch.equal(found.logits[-1], records.logits[-1])
    right, now = records.correct[0] & records.correct[-1], found.correct[0]
    assert now[right].all()  # what was right stays so, where the original is right as well


def test_effort_needs_data_and_has_its_own_training() -> None:
    model, data = learnt()
    whole: dict[str, Any] = {"sample": SAMPLE, "train": data, "calibrate": blobs(64)}
    for wrong, message in (
        ({"effort": "hard", **whole}, "one of"),
        ({"time_budget": 0, **whole}, "time_budget"),
        ({"effort": "quick", "sample": SAMPLE, "train": data}, "give train= and calibrate="),
        ({"time_budget": 1, "sample": SAMPLE}, "give train= and calibrate="),
        ({"effort": "quick", "preset": "sdn", **whole}, "preset"),
    ):
        with pytest.raises(ee.ConfigError, match=message):
            ee.augment(model, **wrong)
