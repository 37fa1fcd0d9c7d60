from pathlib import Path

import pytest
import torch

import ee_surgery as ee
from ee_surgery.evaluation.compare import both_ways
from tests.strategies import synthetic


def test_halves_are_complements_used_both_ways() -> None:
    for first, second in both_ways(31, 3):
        assert sorted(torch.cat([first, second]).tolist()) == list(range(31))
    splits = both_ways(31, 3)
    assert len(splits) == 6
    assert torch.equal(splits[0][0], splits[1][1])


def test_results_are_those_of_samples_that_chose_no_thresholds() -> None:
    records = synthetic(300, 3)
    found = ee.compare(records, methods=["search", "shared"], max_accuracy_drops=[0.02], budgets=[0.7], splits=2)
    assert [(r.method, r.request) for r in found.results] == [
        (method, asked) for method in ("search", "shared") for asked in ("max_accuracy_drop", "budget")
    ]
    drops, costs = [], []
    for chosen, reported in both_ways(len(records), 2):
        point = ee.Frontier.trace(records.take(chosen), "shared").at(budget=0.7)
        test = records.take(reported)
        replay = test.replay(point.policy)
        drops.append(test.base_accuracy - replay.correct.double().mean().item())
        costs.append(replay.macs.mean().item() / records.base_macs)
    last = found.results[-1]
    assert last.drop[0] == pytest.approx(sum(drops) / 4)
    assert last.macs_fraction[0] == pytest.approx(sum(costs) / 4)
    assert sum(last.exit_shares) == pytest.approx(1)
    assert len(found.to_pandas()) == len(found.rows()) == 4
    assert "search" in str(found)


def test_a_budget_below_the_cheapest_exit_counts_in_no_half() -> None:
    found = ee.compare({"synthetic": synthetic(100, 2)}, max_accuracy_drops=[], budgets=[0.001], splits=1)
    assert found.results == ()


def test_what_cannot_be_compared_is_refused() -> None:
    records = synthetic(100, 2)
    with pytest.raises(ee.UnknownNameError, match="'search'"):
        ee.compare(records, methods="serch")
    with pytest.raises(ee.ConfigError, match="Nothing to compare"):
        ee.compare({})
    with pytest.raises(ee.DataError, match="too few"):
        ee.compare(records.take(torch.arange(5)))
    with pytest.raises(ee.ConfigError, match="max_accuracy_drops"):
        ee.compare(records, max_accuracy_drops=[1.0001])


def test_frontiers_of_one_measure_share_a_figure(tmp_path: Path) -> None:
    records = synthetic(200, 3)
    frontiers = {name: ee.Frontier.trace(records, name) for name in ("search", "shared")}
    figure = ee.plot(frontiers, tmp_path / "both.svg")
    drawing = (tmp_path / "both.svg").read_text()
    assert "<svg" in drawing
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["search", "shared"]
    with pytest.raises(ee.ConfigError, match="accuracy and agreement with the original"):
        ee.plot([*frontiers.values(), ee.Frontier.search(records.unlabelled())])
    with pytest.raises(ee.ConfigError, match="there is none"):
        ee.plot([])
