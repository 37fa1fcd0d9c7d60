"""An export on the disk: one file, its weights inside or beside it, or a folder of stages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf.message import EncodeError
from onnx import ModelProto, helper, save_model
from onnx.external_data_helper import set_external_data

from ee_surgery.export.compose import OPSET, Composer, Quantize, set_default, to_onnx
from ee_surgery.export.parts import Piece, Pieces, whole
from ee_surgery.onnx import METADATA, ROUTER, OnnxModel, StagedModel
from ee_surgery.runtime.engine import Engine

Plain: TypeAlias = dict[str, Any]
_IR_VERSION = 10  # what onnxruntime 1.18 and newer read
_EMBEDDED = 1_900_000_000
"""Bytes of a file that has its weights inside; a protobuf message ends at 2 GiB."""
_SMALL, _PAGE = 1024, 4096  # bytes of a weight that stays inside; engines map whole pages


class OneFile:
    """One file with everything."""

    def __init__(self, path: Path, engine: Engine, parts: Pieces, quantize: Quantize | None) -> None:
        self.path, self.weights = path, None
        finish = quantize
        if _bytes(engine) > _EMBEDDED:
            self.weights = path.with_name(f"{path.name}.{secrets.token_hex(4)}.weights")
            finish = partial(_outside, self.weights, {}, quantize)
        graph = Composer(parts, finish).graph(parts.names)
        opsets = [helper.make_opsetid("", OPSET)]
        self.model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="ee_surgery")

    def describe(self, about: Plain) -> None:
        """Write it, with this metadata, and the thresholds in it as the default."""
        set_default(self.model.graph, [*map(float, about["thresholds"])])
        helper.set_model_props(self.model, {METADATA: json.dumps(about)})
        save_model(self.model, self.path)

    def load(self) -> OnnxModel:
        """What was written, ready to run."""
        return OnnxModel(self.path)


class Stages:
    """A folder of one file per piece."""

    weights = None

    def __init__(self, folder: Path, engine: Engine, parts: Pieces, quantize: Quantize | None) -> None:
        self.folder = folder
        folder.mkdir()
        for piece in parts:
            given = [f"in_{i}" for i in range(len(piece.inputs))]
            made = [f"out_{i}" for i in range(len(piece.outputs))]
            _save(to_onnx(piece, given, made, quantize), folder / f"{piece.name}.onnx")
        self.routing = _routing(parts)

    def describe(self, about: Plain) -> None:
        """Write the metadata."""
        (self.folder / ROUTER).write_text(json.dumps({**about, **self.routing}))

    def load(self) -> StagedModel:
        """What was written, ready to run."""
        return StagedModel(self.folder)


WRITERS: dict[str, type[OneFile] | type[Stages]] = {"file": OneFile, "stages": Stages}


def _routing(parts: Pieces) -> Plain:
    """How the stages of a folder are joined."""
    dims = [None if axis is None else axis.dim for axis in parts.exits[0].stage.axes]
    axes = [[None if a is None else (a.dim, a.before, a.after) for a in part.live_axes] for part in parts.exits]
    # logits that stand for no answer yet, where the fallback compares answers
    unset = [([*t.shape[1:]], str(t.dtype).removeprefix("torch.")) for t in parts.exits[0].carried.best]
    own = next(dim for dim in dims if dim is not None)
    return {"inputs": parts.names, "batch_dim": own, "input_dims": dims, "axes": axes, "unset": unset}


def write_original(engine: Engine, path: Path) -> None:
    """Write the original alone, without exits, over the same inputs: for comparisons.

    Raises:
        CaptureError: torch.onnx cannot export it.
    """
    names, piece = whole(engine)
    _save(to_onnx(piece, names, ["logits"]), path)


def _bytes(engine: Engine) -> int:
    """Of the weights of all pieces; layers that share theirs have them in every piece."""
    known = {name: tensor.nbytes for name, tensor in engine.backbone.tensors()}
    segments = engine.entry(engine.backbone.own_batch()).program.segments
    trunk = sum(known.get(name, 0) for segment in segments for name in segment.weights.values())
    return trunk + sum(parameter.nbytes for parameter in engine.branches.parameters())


def _outside(
    path: Path, places: dict[bytes, int], quantize: Quantize | None, model: ModelProto, piece: Piece
) -> ModelProto:
    """A piece whose weights are in a file, equal ones once: protobuf cannot even nest graphs of more than 2 GiB."""
    model = model if quantize is None else quantize(model, piece)
    with path.open("ab") as file:
        for weight in model.graph.initializer:
            if len(weight.raw_data) >= _SMALL:
                digest = hashlib.sha256(weight.raw_data).digest()
                if digest not in places:
                    places[digest] = file.tell() + -file.tell() % _PAGE
                    file.write(bytes(-file.tell() % _PAGE) + weight.raw_data)
                set_external_data(weight, path.name, places[digest], len(weight.raw_data))
                weight.ClearField("raw_data")
    return model


def _save(model: ModelProto, path: Path) -> None:
    """Write a model; where it is too large for one file, its weights into a second one beside it."""
    try:
        inside = model.ByteSize() <= _EMBEDDED
    except EncodeError:  # beyond what protobuf counts
        inside = False
    save_model(model, path, save_as_external_data=not inside, location=f"{path.stem}.weights")


@contextmanager
def weights_beside(path: Path) -> Iterator[Callable[[Path | None], None]]:
    """A function that moves a second file beside `path`, just before the file that names it; removed again on an error.

    Its name is new, so that until the first file is renamed the old pair is whole; old second files go afterwards.
    """
    moved: list[Path] = []

    def publish(weights: Path | None) -> None:
        if weights is None:
            return
        with weights.open("rb") as file:
            os.fsync(file.fileno())
        moved.append(path.with_name(weights.name))
        os.replace(weights, moved[-1])

    try:
        yield publish
    except BaseException:
        for own in moved:
            own.unlink(missing_ok=True)
        raise
    known = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.weights")
    for old in path.parent.iterdir():
        if known.fullmatch(old.name) and old not in moved and old.is_file():
            old.unlink(missing_ok=True)
