"""The batch axis of every tensor of a program, also if it is folded with windows or tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr, Integer
from torch import Tensor, fx

from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import VIEWS, op_name


@dataclass(frozen=True)
class Axis:
    """The batch axis of a tensor: dimension `dim` has `before` x B x `after` entries.

    If the windows of an image are adjacent, (before, B, after) is (1, B, windows); if images are, (windows, B, 1).
    """

    dim: int
    before: int = 1
    after: int = 1

    @property
    def folded(self) -> bool:
        """True if the dimension holds more than the batch."""
        return self.before * self.after > 1

    def split(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The tensor with its batch in a separate dimension, and the index of that dimension."""
        if not self.folded:
            return tensor, self.dim
        return tensor.unflatten(self.dim, (self.before, -1, self.after)), self.dim + 1

    def select(self, tensor: Tensor, keep: Tensor) -> Tensor:
        """The samples `keep` (int64 indices) of a tensor, folded as before."""
        if self.dim == 0 and tensor.ndim == 4 and not tensor.is_contiguous() and not self.folded:
            # trap: index_select returns the default memory format; keep channels_last
            rows = tensor.permute(0, 2, 3, 1)
            if rows.is_contiguous():
                return rows.index_select(0, keep).permute(0, 3, 1, 2)
        if not self.folded:
            return tensor.index_select(self.dim, keep)
        parts, dim = self.split(tensor)
        return parts.index_select(dim, keep).flatten(dim - 1, dim + 1)

    def concat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The samples of several tensors that differ in their batch alone, one after the other, folded as they were."""
        if not self.folded:
            return torch.cat([*tensors], self.dim)
        parts = [self.split(tensor)[0] for tensor in tensors]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 2)


def find_axes(capture: Capture, data_dependent: Set[fx.Node]) -> dict[fx.Node, Axis | str | None]:
    """For each tensor that depends on the input: its batch axis; None if it has no batch (made only of inputs that all
    samples share); or, in words, the reason why samples are not separate in it.
    """
    shared = set(capture.shared)
    found: dict[fx.Node, Axis | str | None] = {}
    for node in (*capture.inputs.values(), *capture.nodes):
        if node not in data_dependent:
            continue
        sources = [arg for arg in node.all_input_nodes if arg in data_dependent]
        if node.op == "call_function" and all(source in shared for source in sources):
            shared.add(node)
        found[node] = None if node in shared else _axis(node, capture.batch, found)
    return found


def _axis(node: fx.Node, batch: Expr, found: dict[fx.Node, Axis | str | None]) -> Axis | str:
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{node.name} is one number read from all samples"
    if not isinstance(value, Tensor):
        return f"{node.name} is not a single tensor"
    sizes = _sizes(value)
    dims = [i for i, size in enumerate(sizes) if batch in getattr(size, "free_symbols", ())]
    shape = "(" + ", ".join(str(size).replace(str(batch), "B") for size in sizes) + ")"
    if not dims:
        return f"no dimension of {node.name} carries the batch: {shape}"
    if len(dims) > 1:
        return f"several dimensions of {node.name} carry the batch: {shape}"
    (dim,) = dims
    times = sizes[dim] / batch  # e.g. windows per image
    if times == 1:
        return Axis(dim)
    if isinstance(times, Integer):
        for source in _sources(node):
            axis = _inherited(node, source, found.get(source), dim, sizes, batch)
            if axis is not None and axis.before * axis.after == times:
                return axis
    return f"the batch is folded with windows or tokens: {shape}"


def _sizes(value: Tensor) -> list[Any]:
    """Sizes as sympy expressions of the batch symbol, or integers."""
    return [size.node.expr if isinstance(size, torch.SymInt) else Integer(size) for size in value.shape]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The input tensors of a call; for an element of a list, the inputs of the call that made the list."""
    for arg in node.all_input_nodes:
        if isinstance(arg.meta.get("val"), (list, tuple)):
            yield from arg.all_input_nodes
        else:
            yield arg


def _inherited(
    node: fx.Node, source: fx.Node, axis: Axis | str | None, dim: int, sizes: list[Any], batch: Expr
) -> Axis | None:
    """The axis of a folded dimension, from the tensor it was made from."""
    value = source.meta.get("val")
    if not isinstance(axis, Axis) or not isinstance(value, Tensor):
        return None
    given = _sizes(value)
    if op_name(node) in VIEWS:
        # A view keeps the order of elements, so the stride between samples stays the same.
        stride = axis.after * math.prod(int(size) for size in given[axis.dim + 1 :])
        inner = math.prod(int(size) for size in sizes[dim + 1 :])
        total = int(sizes[dim] / batch)
        after, rest = divmod(stride, inner)
        return Axis(dim, total // after, after) if not rest and after and total % after == 0 else None
    return Axis(dim, axis.before, axis.after) if given[axis.dim] == sizes[dim] else None
