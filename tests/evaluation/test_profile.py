"""Time as a cost: a profile of the engine that serves, calibration by it, and where it is stored."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.errors import SurgeryWarning
from ee_surgery.share.schema import FrontierForm
from recipes.networks import CifarResNet

SAMPLE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def base() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8).eval()


def small() -> ee.EarlyExitModel:
    return ee.augment(base(), 2, branch="pool", sample=SAMPLE)


def by_hand(trunk: tuple[float, ...], branches: tuple[float, ...], batch_size: int = 1) -> ee.Profile:
    """A profile of one size on this machine."""
    here = ee.profile(small(), seconds=0.01)
    return replace(here, batch_size=batch_size, sizes=(batch_size,), trunk_ms=(trunk,), branch_ms=(branches,))


@pytest.fixture(scope="module")
def labelled() -> tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model, and images whose labels its first exit knows better the surer it is."""
    model, x = small(), torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    answers = model.all_exits(x)
    own, sure = answers[-1].argmax(1), answers[0].softmax(1).amax(1)
    known = sure > sure.median()
    return model, [(x, torch.where(known, answers[0].argmax(1), own))]


@pytest.mark.parametrize("batch_size", [1, 6])
def test_every_stage_and_branch_has_a_time_and_times_rise(batch_size: int) -> None:
    model = small()
    profile = ee.profile(model, batch_size=batch_size, seconds=0.05)
    assert (profile.engine, profile.batch_size, profile.threads) == ("python", batch_size, torch.get_num_threads())
    assert profile.sizes == ((1,) if batch_size == 1 else (1, 3, 6))
    for trunk, branches in zip(profile.trunk_ms, profile.branch_ms, strict=True):
        assert (len(trunk), len(branches)) == (3, 2)
        assert list(trunk) == sorted(trunk)
        assert min(branches) >= 0
    assert "ms up to each exit" in str(profile)
    assert model.operating_point is None  # nothing is left behind


@given(
    st.lists(st.floats(0.1, 9), min_size=3, max_size=3),
    st.lists(st.floats(0, 2), min_size=2, max_size=2),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=2, max_size=2),
)
def test_at_batch_1_the_latency_is_the_mean_over_the_exits(
    stages: list[float], branches: list[float], weights: list[float], visits: list[bool]
) -> None:
    trunk = tuple(itertools.accumulate(stages))
    shares = [w / sum(weights) for w in weights]
    profile = ee.Profile("python", "cpu", 1, 1, (1,), (trunk,), (tuple(branches),))
    paid = list(itertools.accumulate(b * seen for b, seen in zip(branches, visits, strict=True)))
    expected = sum(s * (t + p) for s, t, p in zip(shares, trunk, (*paid, paid[-1]), strict=True))
    assert profile.latency_ms(shares, visits) == pytest.approx(expected)
    assert profile.latency_ms([0, 0, 1], [False, False]) == pytest.approx(profile.full_ms)


def test_larger_batches_are_interpolated_between_the_sizes_that_were_timed() -> None:
    profile = ee.Profile("python", "cpu", 1, 8, (4, 8), ((4.0, 8.0), (6.0, 12.0)), ((1.0,), (2.0,)))
    assert profile.latency_ms([0.5, 0.5], [True]) == pytest.approx(6 + 2 + 4)  # 8 in the first stage, 4 in the second
    assert profile.latency_ms([0.25, 0.75], [True]) == pytest.approx(6 + 2 + 5)
    assert profile.latency_ms([0.75, 0.25], [True]) == pytest.approx(6 + 2 + 2)  # a stage of 2 takes half of one of 4


def test_exits_that_do_not_pay_in_time_are_closed(
    labelled: tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    model, data = labelled
    by_macs = ee.calibrate(model, data)
    assert any(math.isfinite(tau) for point in by_macs for tau in point.thresholds)
    slow = ee.calibrate(model, data, profile=by_hand((1.0, 2.0, 3.0), (50.0, 50.0)))
    assert [point.thresholds for point in slow] == [(math.inf, math.inf)]
    fast = ee.calibrate(model, data, profile=by_hand((1.0, 2.0, 30.0), (0.1, 50.0)))
    assert len(fast) > 1
    assert all(point.thresholds[1] == math.inf for point in fast)
    assert [p.latency_ms for p in fast] == sorted(p.latency_ms for p in fast if p.latency_ms is not None)


def test_the_knob_moves_by_milliseconds_and_the_adapter_keeps_them(
    labelled: tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]], tmp_path: Path
) -> None:
    model, data = labelled
    profile = by_hand((1.0, 2.0, 30.0), (0.1, 0.1))
    frontier = ee.calibrate(model, data, profile=profile)
    point = model.operate(latency_ms=20.0)
    assert point is not None
    assert point.latency_ms is not None
    assert point.latency_ms <= 20
    assert point == frontier.at(latency_ms=20.0)
    assert point.macs_fraction == pytest.approx(model.predict(data[0][0]).macs_fraction.mean().item())
    assert f"{point.latency_ms:.2f} ms" in str(point)
    assert "ms" in str(frontier).splitlines()[0]
    loaded = ee.from_pretrained(model.save_pretrained(tmp_path / "adapter"), base(), sample=SAMPLE)
    assert loaded.frontier is not None
    assert loaded.frontier.points == frontier.points
    assert loaded.frontier.profile == profile
    assert loaded.operating_point == point
    with pytest.raises(ee.OperatingPointError, match=r"the fastest takes"):
        model.operate(latency_ms=0.01)


def test_a_profile_of_a_model_with_other_exits_is_refused(
    labelled: tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    model, data = labelled
    with pytest.raises(ee.ConfigError, match="times of 2 exits, the model has 3"):
        ee.calibrate(model, data, profile=by_hand((1.0, 3.0), (0.1,)))


def test_without_a_profile_and_on_another_device_it_says_so(
    labelled: tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    model, data = labelled
    ee.calibrate(model, data)
    with pytest.raises(ee.OperatingPointError, match=r"ee\.profile"):
        model.operate(latency_ms=2.0)
    ee.calibrate(model, data, profile=replace(by_hand((1.0, 2.0, 30.0), (0.1, 0.1)), device="Another Processor"))
    with pytest.warns(SurgeryWarning, match="Another Processor"):
        model.operate(latency_ms=31.0)
    model.operate(max_accuracy_drop=0.5)  # says nothing of time


@pytest.mark.parametrize("field", ["trunk_ms", "branch_ms", "sizes", "batch_size"])
def test_profiles_of_strangers_are_checked(field: str, tmp_path: Path) -> None:
    model = small()
    frontier = ee.calibrate(model, [torch.randn(16, 3, 16, 16)], profile=by_hand((1.0, 2.0, 3.0), (0.1, 0.1)))
    plain = ee.Frontier.to_dict(replace(frontier, risks=()))
    assert FrontierForm.model_validate(_json(plain))
    wrong = {"trunk_ms": [[3.0, 2.0, 1.0]], "branch_ms": [[0.1]], "sizes": [2, 1], "batch_size": 0}[field]
    with pytest.raises(ValueError, match=r"profile|batch_size"):
        FrontierForm.model_validate(_json({**plain, "profile": {**plain["profile"], field: wrong}}))
    with pytest.raises(ValueError, match="belong together"):
        FrontierForm.model_validate(_json({**plain, "profile": None}))


def _json(data: object) -> object:
    if isinstance(data, dict):
        return {key: _json(value) for key, value in data.items()}
    return [_json(value) for value in data] if isinstance(data, (list, tuple)) else data


def test_exported_files_are_timed_and_moved_alike(
    labelled: tuple[ee.EarlyExitModel, list[tuple[torch.Tensor, torch.Tensor]]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")
    from ee_surgery.onnx import OnnxError, OnnxModel

    model, data = labelled
    ee.calibrate(model, data)
    x = data[0][0].numpy()
    file = OnnxModel(model.export(tmp_path / "model.onnx", check=False), threads=1)
    with pytest.raises(ee.DataError, match="inputs="):
        ee.profile(file)
    profile = ee.profile(file, x[:4], seconds=0.05)
    assert (profile.engine, profile.threads) == ("onnxruntime CPUExecutionProvider", 1)
    with pytest.raises(OnnxError, match="has no times"):
        file.operate(latency_ms=1.0)
    ee.calibrate(model, data, profile=by_hand((1.0, 2.0, 30.0), (0.1, 0.1)))
    point = model.operate(latency_ms=20.0)
    assert point is not None
    file = OnnxModel(model.export(tmp_path / "model.onnx", check=False), threads=1)
    assert file.operate(latency_ms=20.0) == point.thresholds
    assert np.isclose([p.latency_ms for p in file.points], [p.latency_ms for p in model.frontier or ()]).all()
    with pytest.raises(OnnxError, match="ms per batch"):
        file.operate(latency_ms=0.01)
