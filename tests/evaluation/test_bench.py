"""Timing: pairs, environment, and no harm done. No test looks at how long anything took."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import ee_surgery as ee
from ee_surgery.evaluation.bench import measure
from ee_surgery.evaluation.engines import served
from ee_surgery.evaluation.latency import interleave, parts
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


def test_engines_are_timed_side_by_side_and_written_as_tables(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs ee-surgery[onnx]")
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(8)
    model.operate(thresholds=0.0)
    found = ee.bench(model, x, engines=["eager", "onnx"], batch_sizes=[1, 4], rounds=2, warmup=1)
    model.operate(None)
    assert [(m.engine, m.batch_size) for m in found] == [("eager", 1), ("onnx", 1), ("eager", 4), ("onnx", 4)]
    assert len({m.macs_fraction for m in found}) == 1
    console = Console(width=120, record=True)
    console.print(found)
    assert "interleaved rounds" in console.export_text()
    rows = found.rows()
    assert [row["exits"] for row in rows] == [False, True] * 4
    assert rows[1]["infer_gmacs"] < rows[0]["infer_gmacs"]
    found.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    found.save(tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open() as file:
        assert [row["engine"] for row in csv.DictReader(file)] == [row["engine"] for row in rows]
    with pytest.raises(ee.ConfigError, match=r"\.csv or \.json"):
        found.save(tmp_path / "bench.txt")
    with pytest.raises(ee.UnknownNameError, match="'onnx'"):
        ee.bench(model, x, engines=["onx"])


@pytest.mark.parametrize("name", ["eager", "onnx", "openvino"])
def test_original_and_exits_answer_the_same_on_every_engine(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs ee-surgery[onnx]")
    if name == "openvino":
        pytest.importorskip("openvino", reason="needs ee-surgery[openvino]")
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(4)
    both: Any = served(model, name, tmp_path)
    with torch.no_grad():
        expected = model.backbone(x)
        original, exits = both.original(x), both.exits(x)
    if name != "eager":
        (original,), exits = original, exits.logits
    np.testing.assert_allclose(original, expected, atol=1e-4)
    np.testing.assert_allclose(exits, expected, atol=1e-4)


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
