"""Write a branched model as one ONNX file: checked against the routed run, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from ee_surgery.backbone.inputs import Arguments, tensors
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import choice, flag, instance
from ee_surgery.data.batches import Data, batches
from ee_surgery.errors import CaptureError, ConfigError, DataError, SurgeryError
from ee_surgery.export.parts import Piece, Pieces, pieces
from ee_surgery.files import atomic_write
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import FORMAT_VERSION, METADATA, ROUTER, OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.runtime.router import ExitOutput

Plain: TypeAlias = dict[str, Any]
_TIE = 1e-5
"""Engines round differently: a sample whose score is this close to a threshold may leave at either exit."""
_CLOSE = 1e-3  # of logits, by the largest
_IR_VERSION = 10  # what onnxruntime 1.18 and newer read
_EMBEDDED = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB


Layout = Literal["file", "stages"]


def export(
    branched: EarlyExitModel, path: str | os.PathLike[str], *, layout: Layout = "file", check: bool = True
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
        check: compare with the model itself, at batches of 1, 2 and 7, all samples leaving, some, and none.
    Raises:
        SurgeryError: onnx, onnxscript or onnxruntime is not installed.
        CaptureError: torch.onnx cannot export a part, which is named; or the result does not answer as the model does.
        ConfigError: another layout, or a model beyond 1.9 GB.
        WriteError: it cannot be written.
    """
    instance("branched", branched, EarlyExitModel)
    flag("check", check)
    choice("layout", layout, get_args(Layout))
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SurgeryError(f"Exporting needs onnx ({error}): pip install 'ee-surgery[onnx]'.") from error
    point = branched.operating_point or OperatingPoint.by_hand(NEVER, "max_prob", len(branched.branches))
    parts = pieces(branched, point.policy)
    about = _metadata(branched, point, parts)
    path = Path(path)
    with atomic_write(path) as partial:
        (_write_file if layout == "file" else _write_stages)(partial, branched, point, parts, about)
        if check:
            _verify(OnnxModel(partial) if layout == "file" else StagedModel(partial), branched, point)
    return path


def _write_file(path: Path, branched: EarlyExitModel, point: OperatingPoint, parts: Pieces, about: Plain) -> None:
    from onnx import helper, save_model

    from ee_surgery.export.compose import OPSET, Composer

    graph = Composer(parts, branched.num_classes).graph(point.thresholds, parts.names)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="ee_surgery")
    helper.set_model_props(model, {METADATA: json.dumps(about)})
    if model.ByteSize() > _EMBEDDED:
        raise ConfigError("One ONNX file holds no more than 2 GB: export larger models with layout='stages'.")
    save_model(model, path)


def _write_stages(folder: Path, branched: EarlyExitModel, point: OperatingPoint, parts: Pieces, about: Plain) -> None:
    from onnx import save_model

    from ee_surgery.export.compose import to_onnx

    def save(piece: Piece, name: str) -> None:
        given = [f"in_{i}" for i in range(len(piece.inputs))]
        made = [f"out_{i}" for i in range(len(piece.outputs))]
        save_model(to_onnx(piece, given, made, f"{name}/"), folder / f"{name}.onnx")

    folder.mkdir()
    for k, part in enumerate(parts.exits):
        save(part.stage, f"stage_{k}")
        save(part.branch, f"branch_{k}")
    save(parts.end, f"stage_{len(parts.exits)}")
    dims = [axis.dim for axis in parts.exits[0].stage.axes if axis is not None]
    routing = {"inputs": parts.names, "batch_dim": dims[0], "wiring": _wiring(parts)}
    (folder / ROUTER).write_text(json.dumps({**about, **routing}))


def _wiring(parts: Pieces) -> list[Plain]:
    """Of each exit, where its live tensors have their batch, and what its branch is given beside them at first."""
    rows: list[Plain] = []
    for part in parts.exits:
        axes = part.branch.axes[: len(part.stage.outputs)]
        unset = [(tensor.shape[1:], str(tensor.dtype).removeprefix("torch.")) for tensor in part.carried.tensors]
        plain = [None if axis is None else (axis.dim, axis.before, axis.after) for axis in axes]
        rows.append({"axes": plain, "best": len(part.carried.best), "unset": unset})
    return rows


def _metadata(branched: EarlyExitModel, point: OperatingPoint, parts: Pieces) -> Plain:
    """What readers need beside the graph, as plain data; infinite thresholds are strings."""
    engine = branched.engine
    identity = engine.backbone.identity()
    frontier = branched.frontier
    return {
        "format_version": FORMAT_VERSION,
        "base": {"library": identity.library, "model_id": identity.model_id, "fingerprint": identity.fingerprint},
        "exits": [*branched.exits, "original"],
        "trunk_macs": list(engine.trunk_macs),
        "branch_macs": list(engine.branch_macs),
        "closes_alone": parts.closes_alone,
        "thresholds": point.to_dict()["thresholds"],
        "score": str(point.score),
        "fallback": point.fallback,
        "labels": engine.backbone.label_names,
        "preprocessing": branched.preprocessing,
        "points": [] if frontier is None else [_plain(each) for each in _reachable(frontier, point)],
        "base_accuracy": None if frontier is None else frontier.base_accuracy,
        "labelled": None if frontier is None else frontier.labelled,
    }


def _reachable(frontier: Frontier, point: OperatingPoint) -> list[OperatingPoint]:
    """The points that differ from the one in force in thresholds alone: the score is part of the graph."""
    return [each for each in frontier if (each.score, each.fallback) == (point.score, point.fallback)]


def _plain(point: OperatingPoint) -> Plain:
    known = point.to_dict()
    return {name: known[name] for name in ("thresholds", "accuracy", "expected_accuracy", "macs_fraction", "samples")}


def _verify(file: OnnxModel | StagedModel, branched: EarlyExitModel, point: OperatingPoint) -> None:
    """Compare file and model on the sample: all samples leave at each exit, about half of them, none.

    Raises:
        CaptureError: they differ.
    """
    count = len(branched.branches)
    sample = branched.engine.backbone.own_batch()
    with _operating(branched):
        middle: list[float] = []
        for k in range(count):
            branched.operate(replace(point, thresholds=(NEVER,) * k + (-NEVER,) * (count - k)))
            middle.append(float(branched.predict(sample.arguments).score.nan_to_num(0).median()))
        for thresholds in ((-NEVER,) * count, (*(NEVER,) * (count - 1), -NEVER), tuple(middle), (NEVER,) * count):
            for batch in (1, 2, 7):
                arguments = sample.select([row % 4 for row in range(batch)]).arguments
                found = _compare(file, branched, replace(point, thresholds=thresholds), arguments)
                if found.exits or found.logits > _CLOSE:
                    raise CaptureError(
                        f"The exported file does not answer as the model does: in a batch of {batch} at thresholds "
                        f"{thresholds}, {found.exits} samples leave elsewhere, and logits differ by {found.logits:.2g} "
                        "of the largest. Nothing was written."
                    )


@contextmanager
def _operating(branched: EarlyExitModel) -> Iterator[None]:
    """The operating point is what it was, afterwards."""
    before = branched.operating_point
    try:
        yield
    finally:
        branched.operate(before)


class ExportCheck(NamedTuple):
    """How far a file is from the model that it was exported from."""

    samples: int
    exits: int
    """Samples that leave at another exit, ties left out."""
    ties: int
    """Samples whose score is within 1e-5 of a threshold on their way: engines round differently."""
    logits: float
    """Largest difference of a logit where exits agree, as a fraction of the largest logit."""

    def plus(self, other: ExportCheck) -> ExportCheck:
        """Both together."""
        counts = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return ExportCheck(*counts, max(self.logits, other.logits))


def _compare(
    file: OnnxModel | StagedModel, branched: EarlyExitModel, point: OperatingPoint, arguments: Arguments
) -> ExportCheck:
    def exits(shift: float) -> ExitOutput:
        branched.operate(replace(point, thresholds=tuple(tau + shift for tau in point.thresholds)))
        return branched.predict(arguments)

    own, low, high = exits(0.0), exits(-_TIE), exits(_TIE)
    given = {name: tensor.cpu().numpy() for name, tensor in tensors(arguments).items()}
    theirs = file.run(given, thresholds=point.thresholds)
    tie = (low.exit_index != high.exit_index).cpu().numpy()
    index, logits = own.exit_index.cpu().numpy(), own.logits.float().cpu().numpy()
    same = index == theirs.exit_index
    apart = np.abs(logits - theirs.logits)[same]
    apart, largest = apart[np.isfinite(apart)], float(np.abs(logits[np.isfinite(logits)]).max(initial=1.0))
    return ExportCheck(len(index), int((~same & ~tie).sum()), int(tie.sum()), float(apart.max(initial=0.0)) / largest)


def check_export(
    path: str | os.PathLike[str], branched: EarlyExitModel, data: Data, *, batch_size: int = 64
) -> ExportCheck:
    """Run what was exported and the model that it was made of on the same data, at the operating point in force.

    Args:
        data: as for `ee.evaluate`; labels are not looked at.
    Raises:
        DataError: no samples, or the file is none of ours.
    """
    instance("branched", branched, EarlyExitModel)
    file = StagedModel(path) if Path(path).is_dir() else OnnxModel(path)
    found = ExportCheck(0, 0, 0, 0.0)
    point = branched.operating_point or OperatingPoint.by_hand(NEVER, "max_prob", len(branched.branches))
    weight = next(branched.branches.parameters())
    with _operating(branched):
        for inputs, _ in batches(data, batch_size, weight.device, weight.dtype):
            found = found.plus(_compare(file, branched, point, branched.engine.backbone.arguments(inputs)))
    if not found.samples:
        raise DataError("No samples: the data that was handed in is empty.")
    return found
