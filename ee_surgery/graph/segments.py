"""Stages: the pieces of a program between exits, as plain functions over the original's own parameters.

Each stage is written out as Python source with its parameters and operators as globals: no attribute walks, no module
calls, no boxed operator objects. At batch 1 that makes a stage about as cheap as the modules it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem, is_

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._sympy.printers import PythonPrinter

from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.liveness import Liveness, backward_slice, is_size, live_out, writes
from ee_surgery.graph.opaque import is_opaque

_aten = torch.ops.aten
_nn = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]

# torch's own Python bindings of hot operators: the same kernels, about 2 us a call cheaper than the OpOverload.
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


@dataclass(frozen=True)
class _Reference:
    """Where a parameter or buffer of the original lives; `Module.to` replaces buffers, so it is looked up by name."""

    table: Mapping[str, Tensor | None]
    key: str


@dataclass(frozen=True, eq=False)
class Code:
    """A piece of a program written out; a `Stage` runs it."""

    source: str
    scope: dict[str, object]
    """Operators and constants by the names they have in the source."""
    tensors: dict[str, str]
    """Parameters and buffers: name in the source -> name in the model."""
    axes: list[Axis | None]
    """Where each tensor that goes in keeps its batch; None for one that all samples share."""
    mutates_input: bool
    """True when a call writes in place to a tensor that goes in."""


class Stage:
    """A piece of a program: live tensors in, live tensors out (the logits at the end).

    The parameters are found by name, in the original or wherever `find` says, and bound again whenever the tables there
    hold other objects (after `.to(device)`, `load_state_dict(assign=True)`, a replaced parameter).
    """

    def __init__(self, code: Code, find: Callable[[str], nn.Module]) -> None:
        self.source = code.source
        self.axes = code.axes
        self.mutates_input = code.mutates_input
        self._scope = dict(code.scope)
        references = [_reference(find(path), path) for path in code.tensors.values()]
        self._names = [*code.tensors]
        self._tables, self._keys = [r.table for r in references], [r.key for r in references]
        self._values: list[Tensor | None] = []
        exec(compile(code.source, "<stage>", "exec"), self._scope)
        self._run: Callable[..., tuple[Tensor, ...]] = self._scope["stage"]  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *live: Tensor, **options: bool) -> tuple[Tensor, ...]:
        """Run the stage on live tensors, each with the batch in its own dimension.

        Args:
            options: `op_training=True` for a piece written with `learning=True`.
        """
        current = [*map(getitem, self._tables, self._keys)]
        if len(self._values) != len(current) or not all(map(is_, current, self._values)):
            self._scope.update(zip(self._names, current, strict=True))
            self._values = current
        return self._run(*live, **options)


def compact(live: Sequence[Tensor], axes: Sequence[Axis | None], keep: Tensor) -> tuple[Tensor, ...]:
    """Keep the samples `keep` of every live tensor, in that order.

    Args:
        live: tensors that cross an exit point, each with its batch where `axes` says; None belongs to all samples.
        keep: indices of the samples still in flight, int64, shape (B',).
    Source: side-branch exits of BranchyNet (Teerapittayanon et al., ICPR 2016, arXiv:1709.01686).
    """
    return tuple(tensor if axis is None else axis.select(tensor, keep) for tensor, axis in zip(live, axes, strict=True))


def cut(
    capture: Capture, liveness: Liveness, model: nn.Module, positions: Sequence[int], along: Sequence[fx.Node] = ()
) -> list[Stage]:
    """Cut a program behind the given calls into `len(positions) + 1` stages.

    Args:
        positions: indices of calls in program order, strictly increasing; each a legal position.
        along: inputs that are handed from stage to stage although no stage may need them: a branch does.
    """
    live = live_out(capture, liveness)
    given = [*capture.inputs.values()]
    borders = [given, *(crossing(live[i], along) for i in positions), [capture.output]]
    starts, stops = [0, *(i + 1 for i in positions)], [*(i + 1 for i in positions), len(capture.nodes)]
    pieces = zip(borders[:-1], borders[1:], starts, stops, strict=True)
    return [
        Stage(emit_python(calls(capture, liveness, *piece), *piece[:2], capture, liveness), lambda path: model)
        for piece in pieces
    ]


def calls(
    capture: Capture,
    liveness: Liveness,
    given: Sequence[fx.Node],
    wanted: Sequence[fx.Node],
    start: int,
    stop: int,
) -> list[fx.Node]:
    """The calls from index `start` up to `stop` that `wanted` needs, and earlier ones that no data goes into."""
    done = {*given} | {n for n in capture.nodes[:start] if n in liveness.data_dependent}
    needed = backward_slice(capture, liveness.root, wanted, done, stop)
    return [node for node in capture.nodes if node in needed]


def crossing(live: Sequence[fx.Node], along: Sequence[fx.Node]) -> list[fx.Node]:
    """What is handed over at a cut: the live tensors, then whatever else goes along."""
    return [*live, *(node for node in along if node not in live)]


def emit_python(
    calls: list[fx.Node],
    given: Sequence[fx.Node],
    wanted: Sequence[fx.Node],
    capture: Capture,
    liveness: Liveness,
    learning: bool = False,
) -> Code:
    """Write calls out as a function from `given` to `wanted`.

    Args:
        learning: the function takes `op_training=`: with True its BatchNorms use the statistics of the batch and
            update those they keep.
    """
    scope: dict[str, object] = {"torch": torch}
    used: dict[str, str] = {}
    names: dict[fx.Node, str] = {node: f"live{i}" for i, node in enumerate(given)}
    axes = [axis for node in given if not isinstance(axis := liveness.axis[node], str)]
    assert len(axes) == len(given), given
    roots = {liveness.root.get(node, node) for node in given}
    mutates = any(liveness.root.get(arg, arg) in roots for node in calls for arg in writes(node))

    def name_of(node: fx.Node) -> str:
        if node not in names:
            names[node] = node.name
            if node in capture.tensors:
                used[node.name] = capture.tensors[node]
            else:
                scope[node.name] = capture.constants[node]
        return names[node]

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            if is_size(value, capture.batch):
                size = value.meta["val"]
                return repr(size) if isinstance(size, int) else _formula(size.node.expr, capture.batch)
            return name_of(value)
        if isinstance(value, (list, tuple)):
            items = "".join(text(item) + ", " for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        constant = f"k{len(scope)}"  # a dtype, device, inf, memory format: by object
        scope[constant] = value
        return constant

    lines: list[str] = []
    # Sizes are formulas of the batch, read anew in each stage.
    calls = [node for node in calls if not is_size(node, capture.batch)]
    last = {arg: i for i, node in enumerate(calls) for arg in node.all_input_nodes}
    local = set(calls).difference(wanted)
    for i, node in enumerate(calls):
        if getattr(node.target, "__name__", "") == "getitem":
            lines.append(f"{node.name} = {text(node.args[0])}[{text(node.args[1])}]")
        elif learning and statistics(node):
            x, weight, bias, mean, var, _, momentum, eps, *_ = map(text, node.args)
            scope["op_norm"] = F.batch_norm  # by its public name: training on many processes looks for it
            arguments = [x, mean, var, weight, bias, "op_training", momentum, eps]
            lines.append(f"{node.name} = op_norm({', '.join(arguments)})")
        else:
            operator, given_to = f"op_{getattr(node.target, '__name__', 'call').replace('.', '_')}", node.args
            if is_opaque(node):
                operator, given_to = f"op_{node.name}", node.args[1:]
                scope[operator] = capture.opaque.function(node)
            else:
                scope[operator] = _callable(node.target)
            arguments = [text(arg) for arg in given_to] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {operator}({', '.join(arguments)})")
        names[node] = node.name
        dead = [names[arg] for arg in node.all_input_nodes if arg in local and last[arg] == i]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    inputs = ", ".join(names[node] for node in given)
    outputs = "".join(f"{name_of(node)}, " for node in wanted)
    head = [_batch_size(axes)] if any("B" in line for line in lines) else []
    body = "\n".join(f"    {line}" for line in [*head, *lines, f"return ({outputs})"])
    options = ", *, op_training=False" if learning else ""
    return Code(f"def stage({inputs}{options}):\n{body}\n", scope, used, axes, mutates)


def statistics(node: fx.Node) -> list[fx.Node]:
    """The running mean and variance that a BatchNorm uses; nothing for other calls."""
    if node.target is not _aten.batch_norm.default or node.args[5] is not False:
        return []
    return [arg for arg in node.args[3:5] if isinstance(arg, fx.Node)]


def _batch_size(axes: Sequence[Axis | None]) -> str:
    i, axis = next((i, axis) for i, axis in enumerate(axes) if axis is not None)
    times = axis.before * axis.after
    return f"B = live{i}.shape[{axis.dim}]" + (f" // {times}" if axis.folded else "")


def _reference(model: nn.Module, name: str) -> _Reference:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return _Reference(module._parameters if key in module._parameters else module._buffers, key)


def _formula(expression: object, batch: object) -> str:
    return "(" + PythonPrinter().doprint(expression).replace(str(batch), "B") + ")"


def _callable(target: object) -> object:
    if isinstance(target, torch._ops.OpOverload):
        return _BUILTINS.get(target, target._op)
    return target
