"""A segment as an `fx.GraphModule` whose weights are inputs: what torch.compile, torch.export and exporters take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg
from torch.nn import functional as F
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ee_surgery.graph.backends.base import BACKENDS, BoundWeights, Run
from ee_surgery.graph.liveness import is_size
from ee_surgery.graph.opaque import is_opaque
from ee_surgery.graph.segments import Segment, statistics

_aten = torch.ops.aten
# After compaction a tensor may lie in memory otherwise than the sample did: a view wherever it can be, a copy else.
_RELAXED: dict[Any, Any] = dict.fromkeys((_aten.view.default, _aten._unsafe_view.default), _aten.reshape.default)


def to_graph_module(segment: Segment) -> fx.GraphModule:
    """The segment as a module `forward(*live, *weights) -> tuple of live`, in the order of `given` and `weights`.

    It holds no tensor of the original. One with `learning` takes `op_training` as a last input, False by default.
    """
    return _Builder(segment).build()


@BACKENDS.register("graph_module")
def graph_module(segment: Segment, weights: BoundWeights) -> Run:
    """Run the segment as a GraphModule in eager mode."""
    module: Callable[..., tuple[Tensor, ...]] = to_graph_module(segment)

    def run(*live: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return module(*live, *weights(), **options)

    return run


class BoundStage(nn.Module):
    """A segment over weights that it holds by reference, so that compilers take them as inputs of their graphs."""

    def __init__(self, segment: Segment, weights: BoundWeights) -> None:
        super().__init__()
        self.stage = to_graph_module(segment)
        self._weights, self._names = weights, [node.name for node in segment.weights]
        self._known: list[Tensor | None] = []
        self.bind()

    def bind(self) -> None:
        """Take the tensors that are in force now."""
        current = self._weights()
        if len(self._known) != len(current) or not all(map(is_, current, self._known)):
            self._buffers.update(zip(self._names, current, strict=True))
            self._known = current

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        """Run it on live tensors."""
        return self.stage(*live, *[getattr(self, name) for name in self._names])


class _Builder:
    """Copies the calls of a segment into a graph of their own."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.root, self.graph = nn.Module(), fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._batch: fx.Node | None = None

    def build(self) -> fx.GraphModule:
        segment, graph = self.segment, self.graph
        for i, node in enumerate(segment.given):
            self._new[node] = graph.placeholder(f"live{i}")
        for node in segment.weights:
            self._new[node] = graph.placeholder(node.name)
        training = graph.placeholder("op_training", default_value=False) if segment.learning else None
        for node in segment.calls:
            self._new[node] = self._call(node, training)
        graph.output(tuple(self._value(node) for node in segment.wanted))
        graph.lint()
        return fx.GraphModule(self.root, graph, "Segment")

    def _call(self, node: fx.Node, training: fx.Node | None) -> fx.Node:
        args, kwargs = map_arg(node.args, self._value), map_arg(node.kwargs, self._value)
        if training is not None and statistics(node):
            x, weight, bias, mean, var, _, momentum, eps, *_ = args
            return self.graph.call_function(F.batch_norm, (x, mean, var, weight, bias, training, momentum, eps))
        if is_opaque(node):
            return self.graph.call_function(self.segment.capture.opaque.function(node), args[1:])
        target: Any = node.target
        return self.graph.call_function(_RELAXED.get(target, target), args, kwargs)

    def _value(self, node: fx.Node) -> Argument:
        if is_size(node, self.segment.capture.batch):
            return self._size(node.meta["val"])
        if node not in self._new:
            self._new[node] = self._constant(node)
        return self._new[node]

    def _constant(self, node: fx.Node) -> fx.Node:
        value = self.segment.capture.constants[node]
        if isinstance(value, Tensor):
            self.root.register_buffer(node.name, value, persistent=False)
        else:
            setattr(self.root, node.name, value)
        return self.graph.get_attr(node.name)

    def _size(self, size: int | torch.SymInt) -> Argument:
        """A size that the batch decides, worked out from the batch of what goes in."""
        if isinstance(size, int):
            return size
        if self._batch is None:
            index, dim, times = self.segment.batch_source
            source = self._new[self.segment.given[index]]
            self._batch = self.graph.call_function(_aten.sym_size.int, (source, dim))
            if times > 1:
                self._batch = self.graph.call_function(operator.floordiv, (self._batch, times))
        symbols: dict[Any, Any] = {self.segment.capture.batch: fx.Proxy(self._batch)}
        formula: Any = size.node.expr
        found = sympy_interp(PythonReferenceAnalysis, symbols, formula)
        return found.node if isinstance(found, fx.Proxy) else int(found)
