"""Timing: pairs, environment, and no harm done. No test looks at how long anything took."""

from __future__ import annotations

import pytest
import torch

import ee_surgery as ee
from ee_surgery.evaluation.latency import interleave, measure, parts
from tests.zoo import BY_NAME, branched


def test_everything_is_timed_in_every_round() -> None:
    calls: list[str] = []
    times = interleave(
        {name: lambda name=name: calls.append(name) for name in "ab"}, torch.device("cpu"), rounds=4, warmup=2
    )
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    assert all(sorted(calls[i : i + 2]) == ["a", "b"] for i in range(0, 12, 2))


def test_measuring_counts_macs_states_the_environment_and_leaves_a_training_original_alone() -> None:
    model = BY_NAME["cifar-resnet20"].make().train()
    model_with_exits = ee.augment(model, 2, sample=torch.randn(3, 3, 32, 32))
    model_with_exits.operate(thresholds=0.0)
    result = measure(model_with_exits, torch.randn(10, 3, 32, 32), batch_size=4, rounds=2)
    assert result.samples == 8
    assert 0 < result.macs_fraction < 0.5
    assert "thread(s)" in str(result)
    assert "MALLOC_TRIM_THRESHOLD_=" in str(result)
    assert model_with_exits.receipt().unchanged
    assert all(module.training for module in model.modules())
    with pytest.raises(ee.DataError, match="a batch of 4"):
        measure(model_with_exits, torch.randn(3, 3, 32, 32), batch_size=4)


def test_parts_are_the_stages_and_branches_that_run() -> None:
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(4)
    model.operate(thresholds=[2.0, float("inf"), 2.0])
    pieces = parts(model, x)
    assert list(pieces) == ["stage 0", "branch 0", "stage 1", "stage 2", "branch 2", "stage 3"]
    model.operate(thresholds=0.0)
    assert list(parts(model, x)) == ["stage 0", "branch 0"]
    for piece in pieces.values():
        piece()
    model.operate(None)
