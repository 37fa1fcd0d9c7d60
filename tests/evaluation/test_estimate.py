"""What exits would save, before any training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.evaluation.estimate import _cross_fitted
from tests.test_segmentation import Decoding


@cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


def _pictures(n: int = 48) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@cache
def _estimate() -> ee.Estimate:
    return ee.estimate(_model(), [_pictures()], exits=2, batch_sizes=(1, 4), seconds=0.2, sample=_pictures(2))


def test_times_and_a_linear_probe_are_told_for_every_exit() -> None:
    found = _estimate()
    assert len(found.exits) == len(found.macs) == 2
    assert list(found.macs) == sorted(found.macs)
    assert [profile.batch_size for profile in found.profiles] == [1, 4]
    assert all(ms > 0 for ms in found.original_ms)
    assert len(found.accuracies) == 3
    assert found.accuracies[-1] == 1  # agreement with itself
    assert not found.labelled
    assert found.probed == 48
    assert 0 < (found.probe_cost or 0) <= 1
    text = str(found)
    assert all(name in text for name in (*found.exits, "probe %", "ms, batch", found.reason))


def test_the_time_of_shares_lies_between_that_of_none_and_of_all() -> None:
    found = _estimate()
    none, all_first = found.time([0, 0]), found.time([1, 0])
    assert all_first < found.time([0.5, 0]) < none
    assert found.time([0.5, 0], 4) != found.time([0.5, 0], 1)
    share = found.break_even(0)
    assert found.time([share, 0]) == pytest.approx(1, abs=0.02) or share == pytest.approx(0, abs=1e-3)
    with pytest.raises(ee.ConfigError, match="one share for each"):
        found.time([0.5])
    with pytest.raises(ee.ConfigError, match=r"batch size of \[1, 4\]"):
        found.time([0.5, 0], 7)
    with pytest.raises(ee.ConfigError, match="at most 1 together"):
        found.time([0.7, 0.7])


def test_the_answer_follows_from_the_times_and_the_probe() -> None:
    found = _estimate()
    fast = tuple(replace(p, branch_ms=tuple((0.0, 0.0) for _ in p.sizes)) for p in found.profiles)
    assert replace(found, profiles=fast, probe_cost=0.5, best_cost=0.4).answer == "go"
    assert replace(found, profiles=fast, probe_cost=0.99, best_cost=0.6).answer == "perhaps"
    assert replace(found, profiles=fast, probe_cost=0.99, best_cost=0.99).answer == "no-go"
    unknown = replace(found, profiles=fast, probe_cost=None, best_cost=None)
    assert unknown.answer == "perhaps"
    assert "labels are not needed" in unknown.reason
    slow = tuple(replace(p, branch_ms=tuple((1e3, 1e3) for _ in p.sizes)) for p in found.profiles)
    hopeless = replace(found, profiles=slow, probe_cost=None, best_cost=None)
    assert hopeless.answer == "no-go"
    assert "even if all samples leave" in hopeless.reason
    assert hopeless.break_even(0) == float("inf")


def test_a_probe_answers_samples_that_it_was_not_fitted_on() -> None:
    made = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=made)
    wanted = features @ torch.randn(6, 3, generator=made) + 2
    found = _cross_fitted(features, wanted)
    assert (found - wanted).norm() < 0.2 * (wanted - wanted.mean(0)).norm()
    noise = torch.randn(200, 3, generator=made)
    assert (_cross_fitted(features, noise) - noise).norm() > 0.8 * noise.norm()  # nothing is learned by heart


def test_labels_are_read_where_there_are_some_and_maps_are_timed_alone() -> None:
    labels = torch.arange(48) % 5
    found = ee.estimate(
        _model(), [(_pictures(), labels)], exits=1, batch_sizes=[1], seconds=0.1, sample=_pictures(2), samples=16
    )
    assert found.labelled
    assert found.probed == 16
    maps = ee.estimate(Decoding().eval(), [_pictures(4)], exits=1, batch_sizes=[1], seconds=0.1, sample=_pictures(2))
    assert maps.accuracies == ()
    assert maps.answer in ("perhaps", "no-go")
