"""Write a branched model as one ONNX file: checked against the routed run, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ee_surgery.backbone.inputs import Arguments, select, tensors
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import flag, instance
from ee_surgery.data.batches import Data, batches, loader, place
from ee_surgery.errors import CaptureError, ConfigError, DataError, SurgeryError
from ee_surgery.files import atomic_write
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import FORMAT_VERSION, METADATA, OnnxModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.runtime.router import ExitOutput

_TIE = 1e-5
"""Engines round differently: a sample whose score is this close to a threshold may leave at either exit."""
_CLOSE = 1e-3  # of logits, by the largest
_EMBEDDED = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB


def export(branched: EarlyExitModel, path: str | os.PathLike[str], *, check: bool = True) -> Path:
    """Write a branched model as one ONNX file in which samples leave early, each on its own, at any batch size.

    Inputs: the original's tensors by name, the batch dynamic, other sizes as the model was augmented with; and
    `thresholds` (K-1,), float32, which may be left out: its default is the operating point in force; inf closes an exit.
    Outputs: `logits` (B, C), `exit_index` (B,) int64, `score` (B,) float32, NaN at the original's head. The metadata
    `ee_surgery` is JSON for readers in any language, see `ee_surgery.onnx`.

    Args:
        path: the file; weights beyond 1.9 GB go into `<path>.data` beside it.
        check: run it at batches of 1, 2 and 7, all samples leaving, some, and none, against the model itself.
    Raises:
        SurgeryError: onnx, onnxscript or onnxruntime is not installed.
        CaptureError: torch.onnx cannot export a part; names it. Or the file does not answer as the model does.
        WriteError: the file cannot be written.
    """
    instance("branched", branched, EarlyExitModel)
    flag("check", check)
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SurgeryError(f"Exporting needs onnx ({error}): pip install 'ee-surgery[onnx]'.") from error
    from ee_surgery.export.compose import OPSET, Composer
    from ee_surgery.export.parts import pieces

    point = branched.operating_point or OperatingPoint.by_hand(NEVER, "max_prob", len(branched.branches))
    parts = pieces(branched, point.policy)
    graph = Composer(parts, branched.num_classes).graph(point.thresholds, parts.names)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="ee_surgery")
    onnx.helper.set_model_props(model, {METADATA: json.dumps(_metadata(branched, point, parts.closes_alone))})
    path = Path(path)
    with atomic_write(path) as partial:
        if model.ByteSize() > _EMBEDDED:
            raise ConfigError("Models beyond 1.9 GB are not exported yet: one file holds no more than 2 GiB.")
        onnx.save_model(model, partial)
        if check:
            _verify(partial, branched, point)
    return path


def _metadata(branched: EarlyExitModel, point: OperatingPoint, closes_alone: bool) -> dict[str, Any]:
    """What readers need beside the graph, as plain data; infinite thresholds are strings."""
    engine, identity = branched._engine, branched._backbone.identity()
    frontier = branched.frontier
    return {
        "format_version": FORMAT_VERSION,
        "base": {"library": identity.library, "model_id": identity.model_id, "fingerprint": identity.fingerprint},
        "exits": [*branched.exits, "original"],
        "trunk_macs": list(engine.trunk_macs),
        "branch_macs": list(engine.branch_macs),
        "closes_alone": closes_alone,
        "thresholds": point.to_dict()["thresholds"],
        "score": str(point.score),
        "fallback": point.fallback,
        "labels": branched._backbone.label_names,
        "preprocessing": branched.preprocessing,
        "points": [] if frontier is None else [_plain(each) for each in _reachable(frontier, point)],
        "base_accuracy": None if frontier is None else frontier.base_accuracy,
        "labelled": None if frontier is None else frontier.labelled,
    }


def _reachable(frontier: Frontier, point: OperatingPoint) -> list[OperatingPoint]:
    """The points that differ from the one in force in thresholds alone: the score is part of the graph."""
    return [each for each in frontier if (each.score, each.fallback) == (point.score, point.fallback)]


def _plain(point: OperatingPoint) -> dict[str, Any]:
    known = point.to_dict()
    return {name: known[name] for name in ("thresholds", "accuracy", "expected_accuracy", "macs_fraction", "samples")}


def _verify(path: Path, branched: EarlyExitModel, point: OperatingPoint) -> None:
    """Compare file and model on the sample: all samples leave at each exit, about half of them, none.

    Raises:
        CaptureError: they differ.
    """
    count, file = len(branched.branches), OnnxModel(path)
    sample, dims = branched._backbone.sample, branched._backbone.batch_dims
    device = next(iter(tensors(sample).values())).device
    with _operating(branched):
        middle: list[float] = []
        for k in range(count):
            branched.operate(replace(point, thresholds=(NEVER,) * k + (-NEVER,) * (count - k)))
            middle.append(float(branched.predict(sample).score.nan_to_num(0).median()))
        for thresholds in ((-NEVER,) * count, (*(NEVER,) * (count - 1), -NEVER), tuple(middle), (NEVER,) * count):
            for batch in (1, 2, 7):
                arguments = select(sample, dims, torch.arange(batch, device=device) % 4)
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


def _compare(file: OnnxModel, branched: EarlyExitModel, point: OperatingPoint, arguments: Arguments) -> ExportCheck:
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
    """Run an exported file and the model that it was made of on the same data, at the operating point in force.

    Args:
        data: as for `ee.evaluate`; labels are not looked at.
    Raises:
        DataError: no samples, or the file is none of ours.
    """
    instance("branched", branched, EarlyExitModel)
    file, found = OnnxModel(path), ExportCheck(0, 0, 0, 0.0)
    point = branched.operating_point or OperatingPoint.by_hand(NEVER, "max_prob", len(branched.branches))
    weight = next(branched.branches.parameters())
    with _operating(branched):
        for inputs, _ in batches(loader(data, batch_size)):
            arguments = branched._backbone.arguments(place(inputs, weight.device, weight.dtype))
            found = found.plus(_compare(file, branched, point, arguments))
    if not found.samples:
        raise DataError("No samples: the data that was handed in is empty.")
    return found
