"""The default backend: a segment written out as Python source over the original's own parameters.

Parameters and operators are globals of the function: no attribute walks, no module calls, no boxed operator objects. At
batch 1 that makes a stage about as cheap as the modules it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem, is_

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._sympy.printers import PythonPrinter

from ee_surgery.graph.backends.base import BACKENDS, BoundWeights, Run
from ee_surgery.graph.liveness import is_size
from ee_surgery.graph.opaque import is_opaque
from ee_surgery.graph.segments import Segment, statistics

_aten = torch.ops.aten
_nn = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]

# torch's own Python bindings of hot operators: the same kernels, about 2 us per call cheaper than the OpOverload.
_BUILTINS: dict[object, Callable[..., object]] = {
    _aten.conv2d.default: torch.conv2d,
    _aten.conv1d.default: torch.conv1d,
    _aten.batch_norm.default: torch.batch_norm,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.group_norm.default: torch.group_norm,
    _aten.linear.default: _nn.linear,
    _aten.gelu.default: _nn.gelu,
    _aten.silu.default: _nn.silu,
    _aten.silu_.default: _nn.silu_,
    _aten.hardswish.default: _nn.hardswish,
    _aten.hardswish_.default: _nn.hardswish_,
    _aten.hardtanh_.default: _nn.hardtanh_,
    _aten.hardtanh.default: _nn.hardtanh,
    _aten.relu.default: torch.relu,
    _aten.relu_.default: torch.relu_,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.add.Tensor: torch.add,
    _aten.add_.Tensor: Tensor.add_,
    _aten.mul.Tensor: torch.mul,
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.cat.default: torch.cat,
    _aten.matmul.default: torch.matmul,
    _aten.softmax.int: torch.softmax,
    _aten.scaled_dot_product_attention.default: _nn.scaled_dot_product_attention,
    _aten.adaptive_avg_pool2d.default: _nn.adaptive_avg_pool2d,
    _aten.reshape.default: Tensor.reshape,
    _aten.view.default: Tensor.reshape,  # a view wherever it can be; other memory formats than the sample's copy
    _aten._unsafe_view.default: Tensor.reshape,
    _aten.permute.default: Tensor.permute,
    _aten.transpose.int: Tensor.transpose,
    _aten.unbind.int: torch.unbind,
    _aten.select.int: torch.select,
    _aten.flatten.using_ints: torch.flatten,
    _aten.mean.dim: torch.mean,
}


@BACKENDS.register("python")
class PythonStage:
    """A segment as a Python function.

    Its parameters are bound again whenever the tables of their modules hold other objects.
    """

    def __init__(self, segment: Segment, weights: BoundWeights) -> None:
        writer = _Writer(segment)
        self.source = writer.source()
        self._scope = writer.scope
        self._names = [node.name for node in segment.weights]
        self._tables, self._keys = weights.tables, weights.keys
        self._values: list[Tensor | None] = []
        exec(compile(self.source, "<stage>", "exec"), self._scope)
        self._run: Run = self._scope["stage"]  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *live: Tensor, **options: bool) -> tuple[Tensor, ...]:
        """Run it on live tensors; `op_training=` where the segment takes it."""
        current = [*map(getitem, self._tables, self._keys)]
        if len(self._values) != len(current) or not all(map(is_, current, self._values)):
            self._scope.update(zip(self._names, current, strict=True))
            self._values = current
        return self._run(*live, **options)


class _Writer:
    """Writes one segment out; `scope` collects operators and constants by the names that they have in the source."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.scope: dict[str, object] = {"torch": torch}
        self._names = {node: f"live{i}" for i, node in enumerate(segment.given)}

    def source(self) -> str:
        """The function, `stage`."""
        segment = self.segment
        inputs = ", ".join(self._names[node] for node in segment.given)
        last = {arg: i for i, node in enumerate(segment.calls) for arg in node.all_input_nodes}
        local = set(segment.calls).difference(segment.wanted)
        lines: list[str] = []
        for i, node in enumerate(segment.calls):
            lines.append(f"{node.name} = {self._call(node)}")
            self._names[node] = node.name
            dead = [self._names[arg] for arg in node.all_input_nodes if arg in local and last[arg] == i]
            if dead:  # as early as eager code lets go of them
                lines.append(f"del {', '.join(dead)}")
        lines.append(f"return ({''.join(f'{self._name(node)}, ' for node in segment.wanted)})")
        if any("B" in line for line in lines):
            index, dim, times = segment.batch_source
            lines.insert(0, f"B = live{index}.shape[{dim}]" + (f" // {times}" if times > 1 else ""))
        options = ", *, op_training=False" if segment.learning else ""
        return f"def stage({inputs}{options}):\n" + "".join(f"    {line}\n" for line in lines)

    def _call(self, node: fx.Node) -> str:
        name = getattr(node.target, "__name__", "call")
        if name == "getitem":
            return f"{self._text(node.args[0])}[{self._text(node.args[1])}]"
        if self.segment.learning and statistics(node):
            x, weight, bias, mean, var, _, momentum, eps, *_ = map(self._text, node.args)
            self.scope["op_norm"] = F.batch_norm  # by its public name: training on many processes looks for it
            return f"op_norm({x}, {mean}, {var}, {weight}, {bias}, op_training, {momentum}, {eps})"
        operator, given = f"op_{name.replace('.', '_')}", node.args
        if is_opaque(node):
            operator, given = f"op_{node.name}", node.args[1:]
            self.scope[operator] = self.segment.capture.opaque.function(node)
        else:
            self.scope[operator] = _callable(node.target)
        arguments = [self._text(arg) for arg in given] + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        return f"{operator}({', '.join(arguments)})"

    def _text(self, value: object) -> str:
        if isinstance(value, fx.Node):
            return self._size(value) if is_size(value, self.segment.capture.batch) else self._name(value)
        if isinstance(value, (list, tuple)):
            items = "".join(self._text(item) + ", " for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(item)}" for key, item in value.items()) + "}"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        constant = f"k{len(self.scope)}"  # a dtype, device, inf, memory format: by object
        self.scope[constant] = value
        return constant

    def _name(self, node: fx.Node) -> str:
        if node not in self._names:
            self._names[node] = node.name
            if node not in self.segment.capture.tensors:  # those are bound at each call
                self.scope[node.name] = self.segment.capture.constants[node]
        return self._names[node]

    def _size(self, node: fx.Node) -> str:
        """A formula of the batch."""
        size = node.meta["val"]
        if isinstance(size, int):
            return repr(size)
        return "(" + PythonPrinter().doprint(size.node.expr).replace(str(self.segment.capture.batch), "B") + ")"


def _callable(target: object) -> object:
    if isinstance(target, torch._ops.OpOverload):
        return _BUILTINS.get(target, target._op)
    return target
