"""8-bit files: thresholds and frontier are those of their own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import ee_surgery as ee
from recipes import data
from recipes.networks import CifarResNet

onnx = pytest.importorskip("onnx", reason="needs ee-surgery[onnx]")
pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")

from ee_surgery.onnx import OnnxModel, StagedModel  # noqa: E402

pytestmark = pytest.mark.skipif(not data.folder().is_dir(), reason="needs the data of the recipes (EE_SURGERY_DATA)")


@pytest.fixture(scope="module")
def known() -> tuple[ee.EarlyExitModel, list[tuple[Tensor, Tensor]]]:
    """A pretrained network with branches that have learned a little, calibrated; and its held-out data."""
    tensors, mean, std = data.weights("cifar10_resnet20")
    model = CifarResNet(20)
    model.load_state_dict(tensors)
    images, labels = data.cifar10("train")
    x = (images[:1280].float() / 255 - mean) / std
    branched = ee.augment(model.eval(), 2, branch=ee.BranchSpec("pool", confidence=True), sample=x[:4])
    train = [(x[i : i + 64], labels[i : i + 64]) for i in range(0, 768, 64)]
    ee.train(branched, train, ee.TrainConfig(epochs=2, warmup=0, validation=0, progress=False))
    held_out = [(x[i : i + 64], labels[i : i + 64]) for i in range(768, 1280, 64)]
    ee.calibrate(branched, held_out, scores=["max_prob", "learned"])
    return branched, held_out


def _said(
    path: Path, held_out: list[tuple[Tensor, Tensor]], thresholds: list[float] | None = None
) -> tuple[float, float, int]:
    """Accuracy, mean MACs, and the number of samples."""
    file = OnnxModel(path, threads=1) if path.is_file() else StagedModel(path)
    outputs = [(file.run(x.numpy(), thresholds), labels.numpy()) for x, labels in held_out]
    right = np.concatenate([output.logits.argmax(1) == labels for output, labels in outputs])
    macs = np.concatenate([output.macs for output, _ in outputs])
    return float(right.mean()), float(macs.mean() / file.about["trunk_macs"][-1]), len(right)


@pytest.mark.parametrize(
    ("score", "layout"), [("max_prob", "file"), pytest.param("learned", "stages", marks=pytest.mark.slow)]
)
def test_points_of_the_file_are_what_its_own_answers_give(
    known: tuple[ee.EarlyExitModel, list[tuple[Tensor, Tensor]]], tmp_path: Path, score: str, layout: str
) -> None:
    branched, held_out = known
    assert branched.frontier is not None
    point = next(one for one in branched.frontier if one.score == score and one.macs_fraction < 0.9)
    branched.operate(score=score, thresholds=point.thresholds)
    path = branched.export(tmp_path / "int8", layout=layout, quantize="int8", calibrate=held_out)
    file = OnnxModel(path) if layout == "file" else StagedModel(path)
    if layout == "file":
        _all_quantized(path, 19)
    quantized = file.about["quantized"]
    assert quantized["precision"] == "int8"
    assert 0.8 < quantized["agreement"] < 1  # it is not the float model
    assert quantized["float_accuracy"] == pytest.approx(branched.frontier.base_accuracy, abs=1e-6)
    assert len(file.points) > 2
    for one in file.points:
        accuracy, macs, n = _said(path, held_out, list(one.thresholds))
        assert accuracy == pytest.approx(one.accuracy, abs=1.5 / n)
        assert macs == pytest.approx(one.macs_fraction, abs=1.5 / n)
    # the default loses as much against its own original as the float model does against its own
    routed = ee.evaluate(branched, held_out)
    lost = routed.original_accuracy - routed.accuracy
    default = next(one for one in file.points if one.thresholds == pytest.approx(file.about["thresholds"]))
    assert default.expected_accuracy >= file.about["base_accuracy"] - max(lost, 0) - 1e-6
    assert default.macs_fraction < 1


@pytest.mark.slow
def test_without_an_operating_point_or_labels_no_sample_leaves(
    known: tuple[ee.EarlyExitModel, list[tuple[Tensor, Tensor]]], tmp_path: Path
) -> None:
    branched, held_out = known
    branched.operate(None)
    path = branched.export(tmp_path / "int8.onnx", quantize="int8_reduced", calibrate=ee.unlabelled(held_out))
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    assert max(abs(each.astype(int)).max() for each in weights if each.dtype == np.int8 and each.ndim == 4) <= 64
    about = OnnxModel(path).about
    assert about["thresholds"] == (np.inf, np.inf)
    assert not about["labelled"]
    assert about["points"]


def _all_quantized(path: Path, least: int) -> None:
    """Every convolution, behind an exit as well, has 8-bit inputs and weights."""
    made: list[set[str]] = []

    def walk(graph: Any) -> None:
        source = {name: node.op_type for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type == "Conv":
                made.append({source.get(name, "") for name in node.input[:2]})
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g)

    walk(onnx.load(path).graph)
    assert len(made) >= least
    assert all(sources == {"DequantizeLinear"} for sources in made)


def test_what_cannot_be_quantized_is_refused_and_nothing_written(
    known: tuple[ee.EarlyExitModel, list[tuple[Tensor, Tensor]]], tmp_path: Path
) -> None:
    branched, held_out = known
    branched.operate(None)
    path = tmp_path / "int8.onnx"
    for given in ({"quantize": "int8"}, {"calibrate": held_out}):
        with pytest.raises(ee.ConfigError, match="together"):
            branched.export(path, **given)
    with pytest.raises(ee.ConfigError, match="'int8'"):
        branched.export(path, quantize="int4", calibrate=held_out)
    with pytest.raises(ee.DataError, match="only once"):
        branched.export(path, quantize="int8", calibrate=iter(held_out))
    with pytest.raises(ee.DataError, match="Labels must be"):
        branched.export(path, quantize="int8", calibrate=[(held_out[0][0], held_out[0][1] + 20)])
    branched.operate(score="patience", thresholds=1.0)
    with pytest.raises(ee.ConfigError, match="looks back"):
        branched.export(path, quantize="int8", calibrate=held_out)
    branched.operate(None)
    assert not list(tmp_path.iterdir())
