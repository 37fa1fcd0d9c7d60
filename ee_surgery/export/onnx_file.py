"""Write a branched model as one ONNX file: checked against the routed run, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import choice, flag
from ee_surgery.data.batches import Data
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import ConfigError, SurgeryError
from ee_surgery.export.parts import Pieces, pieces
from ee_surgery.export.verify import verify
from ee_surgery.files import atomic_write
from ee_surgery.names import Precision
from ee_surgery.onnx import FORMAT_VERSION
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.policies.scores import FittedScore
from ee_surgery.runtime.engine import Engine, eval_mode
from ee_surgery.share.state import AdapterState

Plain: TypeAlias = dict[str, Any]
Layout = Literal["file", "stages"]


def export(
    engine: Engine,
    state: AdapterState,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "file",
    check: bool = True,
    quantize: Precision | None = None,
    calibrate: Data | None = None,
    class_map: ClassMap | None = None,
) -> Path:
    """Write a branched model as ONNX in which samples leave early, each on its own, at any batch size.

    Inputs: the original's tensors by name, the batch dynamic, other sizes as the model was augmented with; and
    `thresholds` (K-1,), float32, whose default is the operating point in force: it may be left out; inf closes an exit.
    Outputs: `logits` (B, C), `exit_index` (B,) int64, `score` (B,) float32, NaN at the original's head. The metadata
    `ee_surgery` is JSON for readers in any language, see `ee_surgery.onnx`.

    Beyond 1.9 GB the weights are in a second file beside it, `NAME.onnx.XXXXXXXX.weights`; the next export to the same
    path removes it.

    Args:
        path: the file, or the folder.
        layout: `file`: one file, for `ee_surgery.onnx.OnnxModel`, or onnxruntime in any language. `stages`: a folder of
            one file per stage and branch, with `router.json`, for engines without `If`: `ee_surgery.onnx.StagedModel`.
        check: compare with the model itself, at batches of 1, 2 and 7, all samples leaving, some, and none. A quantized
            file is checked on the held-out data instead: its original has to agree with the model's on half of it.
        quantize: `int8`: original and branches in 8-bit integers, by onnxruntime's static quantizer. Thresholds and
            frontier are those of the quantized answers: at its operating point the file loses as much accuracy against
            its own original as the model does. The metadata's `quantized` says how often the two originals agree.
            `int8_reduced`: weights in 7 bits, for x86 processors without VNNI, where sums of 8-bit products overflow.
        calibrate: held-out data for `quantize`, as for `ee_surgery.calibrate`; 256 samples set the ranges of
            activations, all of them the thresholds.
        class_map: of its labels, as for `ee_surgery.calibrate`.
    Raises:
        SurgeryError: onnx, onnxscript or onnxruntime is not installed.
        CaptureError: torch.onnx cannot export a part, which is named; or the result does not answer as the model does.
        ConfigError: another layout or precision, `quantize` without data or the other way round; a score that looks
            back, or chained branches, in 8 bits.
        DataError: the held-out data cannot be used, as for `ee_surgery.calibrate`.
        WriteError: it cannot be written.
    """
    flag("check", check)
    choice("layout", layout, get_args(Layout))
    if quantize is not None:
        choice("quantize", quantize, get_args(Precision))
    if (quantize is None) != (calibrate is None):
        raise ConfigError("Give quantize='int8' and calibrate=, held-out data, together.")
    try:
        import onnxscript  # noqa: F401

        from ee_surgery.export.int8 import Int8
        from ee_surgery.export.writers import WRITERS, weights_beside
    except ImportError as error:
        raise SurgeryError(f"Exporting needs onnx ({error}): pip install 'ee-surgery[onnx]'.") from error
    if any(tensor.dtype == torch.bfloat16 for _, tensor in engine.backbone.tensors()):
        raise ConfigError("numpy and most engines have no bfloat16: export the model in float32, after .float().")
    point = state.operating_point or OperatingPoint.by_hand(
        NEVER, engine.backbone.task.default_score, len(engine.branches)
    )
    path = Path(path)
    with eval_mode(list(engine.branches.modules())), weights_beside(path) as publish, atomic_write(path) as partial:
        parts = pieces(engine, point.policy_for(engine.backbone.task))
        about = _metadata(engine, state.preprocessing, state.frontier, point, parts)
        int8 = None if calibrate is None else Int8(engine, point, calibrate, class_map, quantize == "int8_reduced")
        made = WRITERS[layout](partial, engine, parts, None if int8 is None else int8.quantize)
        made.describe(about)
        if int8 is not None:
            frontier, point, agreement = int8.calibrated(made.load())
            quantized = {"precision": quantize, "agreement": agreement, "float_accuracy": int8.float.base_accuracy}
            about = _metadata(engine, state.preprocessing, frontier, point, parts)
            made.describe({**about, "quantized": quantized})
            made.load()
        elif check:
            verify(made.load(), engine, point)
        publish(made.weights)
    return path


def _metadata(
    engine: Engine, preprocessing: Plain | None, frontier: Frontier | None, point: OperatingPoint, parts: Pieces
) -> Plain:
    """What readers need beside the graph, as plain data; infinite thresholds are strings."""
    identity = engine.backbone.identity()
    return {
        "format_version": FORMAT_VERSION,
        "base": {"library": identity.library, "model_id": identity.model_id, "fingerprint": identity.fingerprint},
        "exits": [*engine.plan.names, "original"],
        "trunk_macs": list(engine.trunk_macs),
        "branch_macs": list(engine.branch_macs),
        "closes_alone": parts.closes_alone,
        "thresholds": point.to_dict()["thresholds"],
        "score": str(point.score),
        "fallback": point.fallback,
        "labels": engine.backbone.label_names,
        "preprocessing": preprocessing,
        "points": [] if frontier is None else [_plain(each) for each in _reachable(frontier, point)],
        "base_accuracy": None if frontier is None else frontier.base_accuracy,
        "labelled": None if frontier is None else frontier.labelled,
    }


def _reachable(frontier: Frontier, point: OperatingPoint) -> list[OperatingPoint]:
    """The points that differ from the one in force in thresholds alone: the score is part of the graph."""
    return [each for each in frontier if each.fallback == point.fallback and _same(each.score, point.score)]


def _same(a: object, b: object) -> bool:
    """Whether two scores are the same; fitted ones that were loaded are other objects with equal tensors."""
    if isinstance(a, FittedScore) and isinstance(b, FittedScore):
        return a is b or _same(tuple(a.to_dict().items()), tuple(b.to_dict().items()))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def _plain(point: OperatingPoint) -> Plain:
    names = ("thresholds", "accuracy", "expected_accuracy", "macs_fraction", "samples", "latency_ms")
    return {name: value for name, value in point.to_dict().items() if name in names}
