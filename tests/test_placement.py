"""Placement: the oracle of the papers' builders on the CIFAR ResNet-56, and what users do wrong."""

from __future__ import annotations

import pytest
import torch
import transformers

import ee_surgery as ee
from tests.zoo import EVERY, Entry, branched, graph

# Block j of stage s as "s.j", by the builders of EENets and PTEENet; cost counts convolutions and linear layers.
ORACLE = {
    (2, "gold_ratio"): "2.1 2.7",
    (2, "pareto"): "1.5 2.0",
    (2, "fine"): "1.1 1.2",
    (2, "linear"): "1.8 2.8",
    (3, "gold_ratio"): "1.6 2.1 2.7",
    (3, "pareto"): "1.5 2.0 2.4",
    (3, "fine"): "1.1 1.2 1.3",
    (3, "linear"): "1.6 2.4 3.2",
    (4, "gold_ratio"): "1.3 1.6 2.1 2.7",
    (4, "pareto"): "1.5 2.0 2.4 2.6",
    (4, "fine"): "1.1 1.2 1.3 1.4",
    (4, "linear"): "1.5 2.1 2.7 3.3",
    (6, "gold_ratio"): "1.1 1.2 1.3 1.6 2.1 2.7",
    (6, "pareto"): "1.5 2.0 2.4 2.6 3.0 3.2",
    (6, "fine"): "1.1 1.2 1.3 1.4 1.5 1.6",
    (6, "linear"): "1.3 1.7 2.2 2.6 3.1 3.5",
}


@pytest.mark.parametrize(("n", "rule"), ORACLE, ids=str)
def test_placement_equals_the_papers_builders(n: int, rule: str) -> None:
    points = ee.place(graph("cifar-resnet56"), n, rule).points
    expected = [f"layer{block}" for block in ORACLE[n, rule].split()]
    assert all(name in (p.name, *p.aliases) for name, p in zip(expected, points, strict=True)), [p.name for p in points]


def test_block_fractions_of_resnet56() -> None:
    found = graph("cifar-resnet56")
    for stage, first in ((1, 0.0411), (2, 0.3702), (3, 0.6992)):
        for j in range(8):
            assert found[f"layer{stage}.{j}"].macs_fraction == pytest.approx(first + 0.0376 * j, abs=6e-4)
    assert found.macs == pytest.approx(125.49e6, rel=1e-3)


@pytest.mark.parametrize("entry", EVERY)
def test_default_exits_are_in_order_and_early(entry: Entry) -> None:
    points = branched(entry.name).plan.points
    assert [p.index for p in points] == sorted(p.index for p in points)
    assert all(0 < p.macs_fraction < 1 for p in points)


def test_names_aliases_and_order() -> None:
    plan = ee.place(graph("cifar-resnet56"), ["layer2.8", "layer1.3"])
    assert plan.names == ["layer1.3", "layer2"]
    assert plan.rule == "explicit"


@pytest.mark.parametrize(
    ("exits", "rule", "message"),
    [
        (0, "linear", "at least 1"),
        (40, "linear", "has no room for 40 exits"),
        ([], "linear", "is empty"),
        (["layer1", "layer1.8"], "linear", "twice"),
        (["layer9"], "linear", "No exit point 'layer9'"),
    ],
)
def test_bad_requests_say_what_to_do(exits: int | list[str], rule: str, message: str) -> None:
    with pytest.raises(ee.ExitPointError, match=message):
        ee.place(graph("cifar-resnet56"), exits, rule)


def test_unknown_rules_suggest_near_ones() -> None:
    with pytest.raises(ee.UnknownNameError, match="Did you mean 'linear'"):
        ee.place(graph("cifar-resnet56"), 2, "lineer")


def test_a_small_head_does_not_move_the_exits_of_a_transformer() -> None:
    config = transformers.DistilBertConfig(vocab_size=99, dim=96, n_layers=4, n_heads=4, hidden_dim=192)
    model = transformers.DistilBertForSequenceClassification(config)
    graph = ee.inspect(model, {"input_ids": torch.ones(2, 48, dtype=torch.long)})
    plan = ee.place(graph, 3)
    assert plan.names == [f"distilbert.transformer.layer.{i}" for i in range(3)]
    assert plan.points[0].macs_fraction < 1 / 4
