"""Write a branched model as one ONNX file: checked against the routed run, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import choice, flag
from ee_surgery.data.batches import Data
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import ConfigError, SurgeryError
from ee_surgery.export.parts import Pieces, pieces, whole
from ee_surgery.export.verify import verify
from ee_surgery.files import atomic_write
from ee_surgery.onnx import FORMAT_VERSION, METADATA, ROUTER, OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.policies.scores import FittedScore
from ee_surgery.runtime.engine import Engine, eval_mode
from ee_surgery.share.state import AdapterState

if TYPE_CHECKING:
    from ee_surgery.export.compose import Quantize
    from ee_surgery.export.int8 import Int8

Plain: TypeAlias = dict[str, Any]
_IR_VERSION = 10  # what onnxruntime 1.18 and newer read
_EMBEDDED = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB
Layout = Literal["file", "stages"]
Precision = Literal["int8"]


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

    Args:
        path: the file, or the folder.
        layout: `file`: one file, for `ee_surgery.onnx.OnnxModel`, or onnxruntime in any language. `stages`: a folder of
            one file per stage and branch, with `router.json`, for engines without `If`: `ee_surgery.onnx.StagedModel`.
        check: compare with the model itself, at batches of 1, 2 and 7, all samples leaving, some, and none. A quantized
            file is checked on the held-out data instead: its original has to agree with the model's on half of it.
        quantize: `int8`: original and branches in 8-bit integers, by onnxruntime's static quantizer. Thresholds and
            frontier are those of the quantized answers: at its operating point the file loses as much accuracy against
            its own original as the model does. The metadata's `quantized` says how often the two originals agree.
        calibrate: held-out data for `quantize`, as for `ee_surgery.calibrate`; 256 samples set the ranges of
            activations, all of them the thresholds.
        class_map: of its labels, as for `ee_surgery.calibrate`.
    Raises:
        SurgeryError: onnx, onnxscript or onnxruntime is not installed.
        CaptureError: torch.onnx cannot export a part, which is named; or the result does not answer as the model does.
        ConfigError: another layout or precision, `quantize` without data or the other way round; a score that looks
            back, or chained branches, in 8 bits; or a model beyond 1.9 GB.
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
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SurgeryError(f"Exporting needs onnx ({error}): pip install 'ee-surgery[onnx]'.") from error
    if any(tensor.dtype == torch.bfloat16 for _, tensor in engine.backbone.tensors()):
        raise ConfigError("numpy and most engines have no bfloat16: export the model in float32, after .float().")
    point = state.operating_point or OperatingPoint.by_hand(NEVER, "max_prob", len(engine.branches))
    path = Path(path)
    with eval_mode(list(engine.branches.modules())), atomic_write(path) as partial:
        parts = pieces(engine, point.policy_for(engine.backbone.task))
        about = _metadata(engine, state.preprocessing, state.frontier, point, parts)
        int8 = None if calibrate is None else _int8(engine, point, calibrate, class_map)
        made = _MADE[layout](partial, engine, parts, None if int8 is None else int8.quantize)
        made.describe(about)
        if int8 is not None:
            frontier, point, agreement = int8.calibrated(made.load())
            quantized = {"precision": quantize, "agreement": agreement, "float_accuracy": int8.float.base_accuracy}
            about = _metadata(engine, state.preprocessing, frontier, point, parts)
            made.describe({**about, "quantized": quantized})
            made.load()
        elif check:
            verify(made.load(), engine, point)
    return path


def export_original(engine: Engine, path: Path) -> None:
    """Write the original alone, without exits, over the same inputs: for comparisons.

    Raises:
        CaptureError: torch.onnx cannot export it.
    """
    from onnx import save_model

    from ee_surgery.export.compose import to_onnx

    names, piece = whole(engine)
    with atomic_write(path) as partial:
        save_model(to_onnx(piece, names, ["logits"]), partial)


def _int8(engine: Engine, point: OperatingPoint, data: Data, class_map: ClassMap | None) -> Int8:
    from ee_surgery.export.int8 import Int8  # needs onnxruntime

    return Int8(engine, point, data, class_map)


class _OneFile:
    """One file with everything."""

    def __init__(self, path: Path, engine: Engine, parts: Pieces, quantize: Quantize | None) -> None:
        from onnx import helper

        from ee_surgery.export.compose import OPSET, Composer

        self.path = path
        graph = Composer(parts, engine.backbone.num_classes, quantize).graph(parts.names)
        opsets = [helper.make_opsetid("", OPSET)]
        self.model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="ee_surgery")

    def describe(self, about: Plain) -> None:
        """Write it, with this metadata and the thresholds in it as the default."""
        from onnx import helper, save_model

        from ee_surgery.export.compose import set_default

        set_default(self.model.graph, [*map(float, about["thresholds"])])
        helper.set_model_props(self.model, {METADATA: json.dumps(about)})
        if self.model.ByteSize() > _EMBEDDED:
            raise ConfigError("One ONNX file holds no more than 2 GB: export larger models with layout='stages'.")
        save_model(self.model, self.path)

    def load(self) -> OnnxModel:
        """What was written, ready to run."""
        return OnnxModel(self.path)


class _Stages:
    """A folder of one file per piece."""

    def __init__(self, folder: Path, engine: Engine, parts: Pieces, quantize: Quantize | None) -> None:
        from onnx import save_model

        from ee_surgery.export.compose import to_onnx

        self.folder = folder
        folder.mkdir()
        for piece in parts:
            given = [f"in_{i}" for i in range(len(piece.inputs))]
            made = [f"out_{i}" for i in range(len(piece.outputs))]
            save_model(to_onnx(piece, given, made, quantize), folder / f"{piece.name}.onnx")
        self.routing = _routing(parts)

    def describe(self, about: Plain) -> None:
        """Write the metadata."""
        (self.folder / ROUTER).write_text(json.dumps({**about, **self.routing}))

    def load(self) -> StagedModel:
        """What was written, ready to run."""
        return StagedModel(self.folder)


_MADE = {"file": _OneFile, "stages": _Stages}


def _routing(parts: Pieces) -> Plain:
    """How the stages of a folder are joined."""
    dims = [axis.dim for axis in parts.exits[0].stage.axes if axis is not None]
    axes = [[None if a is None else (a.dim, a.before, a.after) for a in part.live_axes] for part in parts.exits]
    # logits that stand for no answer yet, where the fallback compares answers
    unset = [(t.shape[1], str(t.dtype).removeprefix("torch.")) for t in parts.exits[0].carried.best]
    return {"inputs": parts.names, "batch_dim": dims[0], "axes": axes, "unset": unset}


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
