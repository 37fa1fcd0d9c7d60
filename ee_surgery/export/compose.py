"""One ONNX graph out of the pieces: every exit decides per sample, and only the survivors run on.

With standard operators alone: the score is compared with a threshold that is an input of the file, `NonZero` finds who
stays, `Gather` compacts every live tensor, the next stage is inside an `If` (does any sample remain?), and `ScatterND`
writes its answers over those of the exit before. Closed exits skip their branch by an `If` of their own.
"""

from __future__ import annotations

import inspect as inspecting
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxscript import opset20
from torch import Tensor

from ee_surgery.errors import CaptureError
from ee_surgery.export.parts import Piece, Pieces
from ee_surgery.graph.batch_axes import Axis

THRESHOLDS = "thresholds"
OUTPUTS = ("logits", "exit_index", "score")
OPSET = 20
_INDEX, _SCORE = torch.zeros(1, dtype=torch.int64), torch.zeros(1)  # what results are like


@dataclass
class Block:
    """Nodes under construction: the main graph, or the body of an `If`."""

    name: str
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def op(self, kind: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> str:
        """Add an operator; its first output."""
        outputs = [output] if isinstance(output, str) else [*output]
        self.nodes.append(helper.make_node(kind, [*inputs], outputs, name=f"{self.name}/{outputs[0]}", **attributes))
        return outputs[0]

    def constant(self, value: np.ndarray, name: str) -> str:
        """Add a constant."""
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def graph(self, outputs: Sequence[tuple[str, int]]) -> GraphProto:
        """As the body of an `If`: no inputs, these outputs by name and element type."""
        infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        return helper.make_graph(self.nodes, self.name, [], infos, self.weights)


Quantize: TypeAlias = Callable[[ModelProto, Piece], ModelProto]
"""A piece in another precision, or with its weights elsewhere."""


def to_onnx(
    piece: Piece, inputs: Sequence[str], outputs: Sequence[str], quantize: Quantize | None = None
) -> ModelProto:
    """A piece as an ONNX model over these names; everything inside is prefixed with the piece's.

    Raises:
        CaptureError: torch.onnx cannot export it.
    """
    batch = torch.export.Dim("batch")
    shapes = tuple(_dynamic(axis, batch) for axis in piece.axes)
    name = next(p.name for p in inspecting.signature(piece.module.forward).parameters.values())
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of axis names and of its own deprecations; what is wrong, it raises
            program = torch.onnx.export(
                piece.module, piece.inputs, dynamo=True, dynamic_shapes={name: shapes}, opset_version=OPSET,
                input_names=[*inputs], output_names=[*outputs], verbose=False, optimize=True,
                custom_translation_table={torch.ops.aten._is_all_true.default: _all_true},
            )  # fmt: skip
    except Exception as error:
        raise CaptureError(f"torch.onnx cannot export {piece.name}: {type(error).__name__}: {error}") from error
    assert program is not None
    model, prefix = program.model_proto, f"{piece.name}/"
    if quantize is not None:
        model = quantize(model, piece)
    model = onnx.compose.add_prefix(model, prefix, rename_inputs=False, rename_outputs=False)
    model.graph.name = piece.name
    for info, wanted in zip(model.graph.output, outputs, strict=True):
        if info.name != wanted:  # one value is given twice, and has a single name
            model.graph.node.append(helper.make_node("Identity", [info.name], [wanted], name=f"{prefix}{wanted}"))
            info.name = wanted
    return model


def _all_true(self: Any) -> Any:
    """What torch.onnx lacks: whether all of a tensor is true; masks are checked with it."""
    ops: Any = opset20
    return ops.Cast(ops.ReduceMin(ops.Cast(self, to=TensorProto.INT32), keepdims=0), to=TensorProto.BOOL)


def _dynamic(axis: Axis | None, batch: Any) -> dict[int, Any] | None:
    if axis is None:
        return None
    times = axis.before * axis.after
    return {axis.dim: times * batch if times > 1 else batch}


def set_default(graph: GraphProto, thresholds: Sequence[float]) -> None:
    """Give the input `thresholds` a default, in place of the one it has."""
    default = numpy_helper.from_array(np.array(thresholds, np.float32), THRESHOLDS)
    for weight in graph.initializer:
        if weight.name == THRESHOLDS:
            weight.CopyFrom(default)
            return
    graph.initializer.append(default)


def element_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    return helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)


class Composer:
    """Builds the graph from the last exit inwards: the body of each `If` holds all that comes after."""

    def __init__(self, pieces: Pieces, quantize: Quantize | None = None) -> None:
        self.pieces, self.quantize = pieces, quantize
        self.logits_type = pieces.end.outputs[0].dtype

    def graph(self, names: Sequence[str]) -> GraphProto:
        """The main graph; `set_default` gives its input `thresholds` a default.

        Args:
            names: of the original's inputs.
        """
        main = Block("main")
        first = self.pieces.exits[0].stage
        dim = next(axis.dim for axis in first.axes if axis is not None)
        lead = next(name for name, axis in zip(names, first.axes, strict=True) if axis is not None)
        shape = main.op("Shape", [lead], "batch", start=dim, end=dim + 1)
        size = main.op("Squeeze", [shape], "batch_size")
        zero, one = main.constant(np.array(0), "zero"), main.constant(np.array(1), "one")
        rows = main.op("Range", [zero, size, one], "rows0")
        results = self._level(main, 0, [*names], rows, [], ())
        for result, name in zip(results, OUTPUTS, strict=True):
            main.op("Identity", [result], name)
        inputs = [_info(name, tensor, axis) for name, tensor, axis in zip(names, first.inputs, first.axes, strict=True)]
        inputs.append(helper.make_tensor_value_info(THRESHOLDS, TensorProto.FLOAT, [len(self.pieces.exits)]))
        kind = element_type(self.logits_type)
        outputs = [
            helper.make_tensor_value_info("logits", kind, ["batch", *self.pieces.end.outputs[0].shape[1:]]),
            helper.make_tensor_value_info("exit_index", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
        ]
        return helper.make_graph(main.nodes, "early_exit", inputs, outputs, main.weights)

    @property
    def result_types(self) -> tuple[int, int, int]:
        """Element types of the outputs."""
        return element_type(self.logits_type), TensorProto.INT64, TensorProto.FLOAT

    def _level(
        self, block: Block, k: int, live: list[str], rows: str, carried: list[str], before: Sequence[str]
    ) -> list[str]:
        """Everything from exit k on, into `block`: names of logits, exit and score of all samples of the batch.

        Args:
            live: tensors that stage k takes; `rows`: which samples of the batch are still in flight.
            before: names of the results so far; none at the first exit.
        """
        if k == len(self.pieces.exits):
            return self._end(block, live, rows, carried, before)
        part = self.pieces.exits[k]
        made = [f"stage{k}_{i}" for i in range(len(part.stage.outputs))]
        self._add(block, part.stage, live, made)
        answer = self._ask(block, k, made, carried, rows)
        index = self._filled(block, rows, _INDEX, k, f"exit{k}")
        results = self._write(block, before, rows, [answer[0], index, answer[1]], k)
        leaves, onward = answer[2], answer[3:]
        stays = block.op("NonZero", [block.op("Not", [leaves], f"not_leaves{k}")], f"stays2d{k}")
        stays = block.op("Squeeze", [stays, block.constant(np.array([0]), f"axis{k}")], f"stays{k}")
        left = block.op("Size", [stays], f"left{k}")
        remain = block.op("Greater", [left, block.constant(np.array(0), f"none{k}")], f"remain{k}")
        body = Block(f"after{k}")
        next_rows = body.op("Gather", [rows, stays], f"rows{k + 1}", axis=0)
        kept = [
            name if axis is None else self._select(body, name, stays, axis, tensor, f"live{k + 1}_{i}")
            for i, (name, axis, tensor) in enumerate(zip(made, part.live_axes, part.stage.outputs, strict=True))
        ]
        taken = [body.op("Gather", [name, stays], f"carried{k + 1}_{i}", axis=0) for i, name in enumerate(onward)]
        deeper = self._level(body, k + 1, kept, next_rows, taken, results)
        done = Block(f"done{k}")
        ended = [done.op("Identity", [name], f"done{k}_{i}") for i, name in enumerate(results)]
        types = self.result_types
        names = [f"result{k}_{i}" for i in range(3)]
        block.op(
            "If", [remain], names,
            then_branch=body.graph([*zip(deeper, types, strict=True)]),
            else_branch=done.graph([*zip(ended, types, strict=True)]),
        )  # fmt: skip
        return names

    def _add(self, block: Block, piece: Piece, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        graph = to_onnx(piece, inputs, outputs, self.quantize).graph
        block.nodes.extend(graph.node)
        block.weights.extend(graph.initializer)

    def _ask(self, block: Block, k: int, live: list[str], carried: list[str], rows: str) -> list[str]:
        """Branch k and its decision, skipped where it cannot matter: logits, score, leaves, what is carried on."""
        piece = self.pieces.exits[k].branch
        first = self.pieces.exits[k].carried.tensors
        taken = carried or [self._filled(block, rows, t, torch.nan, f"unset{k}_{i}") for i, t in enumerate(first)]
        outputs = [f"branch{k}_{i}" for i in range(len(piece.outputs))]
        asks = Block(f"branch{k}")
        self._add(asks, piece, [*live, *taken], outputs)
        tau = asks.op("Gather", [THRESHOLDS, asks.constant(np.array(k), f"index{k}")], f"tau{k}", axis=0)
        leaves = asks.op("GreaterOrEqual", [outputs[2], tau], f"leaves{k}")
        given = [outputs[0], outputs[1], leaves, *outputs[3:]]
        tensors = [piece.outputs[0], piece.outputs[1], torch.zeros(1, dtype=torch.bool), *piece.outputs[3:]]
        types = [element_type(tensor.dtype) for tensor in tensors]
        skips = Block(f"closed{k}")
        fixed = len(self.pieces.exits[k].carried.best)  # a skipped exit leaves the best answer so far as it is
        blanks = [self._filled(skips, rows, tensor, 0, f"blank{k}_{i}") for i, tensor in enumerate(tensors)]
        for i in range(1, fixed + 1):
            blanks[-i] = skips.op("Identity", [taken[-i]], f"same{k}_{i}")
        names = [f"asked{k}_{i}" for i in range(len(tensors))]
        block.op(
            "If", [self._open(block, k)], names,
            then_branch=asks.graph([*zip(given, types, strict=True)]),
            else_branch=skips.graph([*zip(blanks, types, strict=True)]),
        )  # fmt: skip
        return names

    def _open(self, block: Block, k: int) -> str:
        """Whether the branch has to run: its exit is open, or a later one that reads what it hands on."""
        last = k + 1 if self.pieces.closes_alone else len(self.pieces.exits)
        span = [block.constant(np.array([value]), f"span{k}_{i}") for i, value in enumerate((k, last))]
        some = block.op("Slice", [THRESHOLDS, *span], f"taus{k}")
        low = block.op("ReduceMin", [some], f"lowest{k}", keepdims=0)
        return block.op("Less", [low, block.constant(np.array(np.inf, np.float32), f"never{k}")], f"open{k}")

    def _end(self, block: Block, live: list[str], rows: str, carried: list[str], before: Sequence[str]) -> list[str]:
        k = len(self.pieces.exits)
        piece = self.pieces.end
        best = carried[len(carried) - (len(piece.inputs) - len(live)) :] if len(piece.inputs) > len(live) else []
        self._add(block, piece, [*live, *best], ["last"])
        index = self._filled(block, rows, _INDEX, k, f"exit{k}")
        score = self._filled(block, rows, _SCORE, torch.nan, "unasked")
        return self._write(block, before, rows, ["last", index, score], k)

    def _write(self, block: Block, before: Sequence[str], rows: str, values: Sequence[str], k: int) -> list[str]:
        """Answers of the samples in flight over those of all samples; those that stay are written over again later."""
        if not before:
            return [*values]
        at = block.op("Unsqueeze", [rows, block.constant(np.array([1]), f"column{k}")], f"at{k}")
        return [
            block.op("ScatterND", [old, at, new], f"so_far{k}_{i}")
            for i, (old, new) in enumerate(zip(before, values, strict=True))
        ]

    def _filled(self, block: Block, rows: str, like: Tensor, value: float, name: str) -> str:
        """One value for the samples in flight, in the form of `like` (B, ...)."""
        shape = block.op("Shape", [rows], f"{name}_rows")
        if like.ndim > 1:
            tail = block.constant(np.array(like.shape[1:], np.int64), f"{name}_tail")
            shape = block.op("Concat", [shape, tail], f"{name}_shape", axis=0)
        fill = numpy_helper.from_array(torch.full((1,), value, dtype=like.dtype).numpy())
        return block.op("ConstantOfShape", [shape], name, value=fill)

    def _select(self, block: Block, name: str, keep: str, axis: Axis, like: Tensor, out: str) -> str:
        """The samples `keep` of a live tensor, folded as it was."""
        if not axis.folded:
            return block.op("Gather", [name, keep], out, axis=axis.dim)
        split = [*like.shape[: axis.dim], axis.before, -1, axis.after, *like.shape[axis.dim + 1 :]]
        whole = [*like.shape[: axis.dim], -1, *like.shape[axis.dim + 1 :]]
        apart = block.op("Reshape", [name, block.constant(np.array(split), f"{out}_split")], f"{out}_apart")
        some = block.op("Gather", [apart, keep], f"{out}_some", axis=axis.dim + 1)
        return block.op("Reshape", [some, block.constant(np.array(whole), f"{out}_whole")], out)


def _info(name: str, tensor: Tensor, axis: Axis | None) -> Any:
    shape: list[Any] = [*tensor.shape]
    if axis is not None:
        shape[axis.dim] = "batch"
    return helper.make_tensor_value_info(name, element_type(tensor.dtype), shape)
