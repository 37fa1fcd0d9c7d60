"""Go or no-go: exits against smaller models, at no less accuracy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.evaluation.verdict import Alternative
from recipes import cifar10_resnet56 as recipe
from tests.search.test_exit_search import CONFIG, learnt
from tests.training.test_training import blobs


class Constant(nn.Module):
    """Always the same class, for next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4)."""
        return self.head(x.mean((2, 3)))


def test_the_verdict_compares_with_smaller_models() -> None:
    model, data = learnt()
    branched = ee.augment(model, ["1"], branch="pool", sample=torch.randn(2, 3, 8, 8))
    with pytest.raises(ee.OperatingPointError, match="calibrate"):
        ee.verdict(branched, data, {})
    ee.train(branched, data, CONFIG)
    ee.calibrate(branched, blobs(512))
    test = blobs(512)
    found = ee.verdict(branched, test, {"constant": Constant(), "twin": model, "elsewhere": (0.9, 0.01)})
    constant, twin, elsewhere = found.alternatives
    assert constant.accuracy == 0.25
    assert constant.macs_fraction == pytest.approx(12 / branched.trunk_macs[-1])
    assert twin.accuracy == found.accuracy
    assert twin.macs_fraction == 1
    assert not elsewhere.go
    assert not found.go
    assert "take elsewhere instead" in str(found)
    assert found.samples == 512
    for each in found.alternatives:
        assert each.exits_accuracy >= each.accuracy or each.exits_macs_fraction == 1  # equal accuracy, or never leaving
    with pytest.raises(ee.DataError, match="labels"):
        ee.verdict(branched, [test.tensors[0]], {})


def test_the_verdict_by_time_measures_models_and_takes_the_numbers_of_others() -> None:
    model, data = learnt()
    branched = ee.augment(model, ["1"], branch="pool", sample=torch.randn(2, 3, 8, 8), train=data, config=CONFIG)
    ee.calibrate(branched, blobs(512))
    others: dict[str, Any] = {"twin": model, "slow": (0.25, 0.01, 9.0), "fast": (0.25, 9.0, 0.0)}
    found = ee.verdict(branched, blobs(64), others, engine="eager", time_batch=32)
    twin, slow, fast = found.alternatives
    assert twin.time_fraction is not None
    assert twin.time_fraction > 0
    assert (slow.time_fraction, fast.time_fraction) == (9.0, 0.0)
    assert slow.go  # though not in MACs
    assert not fast.go  # though in MACs
    assert "of the time" in str(found)
    with pytest.raises(ee.ConfigError, match="latency"):
        ee.verdict(branched, data, {"untimed": (0.9, 0.5)}, engine="eager")


def test_cheaper_is_no_go_where_it_is_less_accurate() -> None:
    better = Alternative("better", 0.9, 0.5, exits_accuracy=0.89, exits_macs_fraction=0.3)
    assert not better.go
    assert replace(better, exits_accuracy=0.9).go


@pytest.mark.slow
@pytest.mark.usefixtures("cifar_weights")
def test_two_weak_exits_are_no_go_against_the_real_smaller_networks() -> None:
    (images, labels), mean, std = recipe.pictures("test", 2_000)
    images = (images.float() / 255 - mean) / std
    batches = [*zip(images.split(100), labels.split(100), strict=True)]
    branched = ee.augment(recipe.network(56), ["layer1", "layer2"], branch="pool", sample=images[:2])
    ee.train(branched, batches[:5], ee.TrainConfig(epochs=3, lr=1e-2, validation=0, progress=False))
    ee.calibrate(branched, batches[5:10])
    smaller = {f"ResNet-{depth}": recipe.network(depth) for depth in (20, 32)}
    found = ee.verdict(branched, batches[10:], {**smaller, "guessing": (0.1, 0.9)})
    assert [each.go for each in found.alternatives] == [False, False, True]
    for each, depth in zip(found.alternatives, (20, 32), strict=False):
        right = recipe.right(smaller[f"ResNet-{depth}"], images[1000:], labels[1000:])
        assert each.accuracy == pytest.approx(right.double().mean().item())
        assert each.exits_accuracy >= each.accuracy
