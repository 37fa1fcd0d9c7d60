"""Modules kept whole: one call in the graph, whatever their code does.

This is for code that torch.export cannot read (a loop over samples, a branch on their values) but that treats each
sample independently: the module is run once to observe its outputs, and its call becomes one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.inputs import Arguments, Batch
from ee_surgery.backbone.twin import twin
from ee_surgery.errors import CaptureError
from ee_surgery.registry import suggest

_running: list[OpaqueCalls] = []  # source of the operator's output shapes during a capture
# Module, tensors in, values out, their structure, MACs.
_Observed: TypeAlias = tuple[str, list[Tensor], list[Any], pytree.TreeSpec, int]


@dataclass(eq=False)
class _Call:
    """One call of one module, as observed in a real run."""

    module: str
    spec: pytree.TreeSpec
    """Structure of its output."""
    like: list[tuple[tuple[tuple[int, int], ...], torch.dtype]]
    """Per output tensor: (constant, multiple of the batch) for each dimension, and the dtype."""
    batch: tuple[int, int]
    """Index of an input tensor that has the batch, and its batch dimension."""
    macs: int


@dataclass(eq=False)
class OpaqueCalls:
    """The calls of all opaque modules of a model, in the order they happen."""

    model: nn.Module
    """Runs them: in eval mode, with the original's tensors."""
    calls: list[_Call] = field(default_factory=list)
    _inputs: dict[int, tuple[list[int], list[Any], pytree.TreeSpec]] = field(default_factory=dict)
    """Per call: which of its flat arguments are tensors, the other arguments, and the structure of all."""

    @classmethod
    def record(cls, backbone: Backbone, model: nn.Module, batch: Batch) -> OpaqueCalls:
        """Run a twin of the model with all samples and with one fewer, and record the outputs of its opaque modules.

        Raises:
            CaptureError: there is no module of that name.
        """
        if not backbone.opaque:
            return cls(model)
        known = dict(model.named_modules())
        for name in backbone.opaque:
            if name not in known:
                raise CaptureError(f"{backbone.model_id} has no module {name!r} to keep whole. {suggest(name, known)}")
        size = batch.size
        fewer = batch.select([*range(size - 1)])
        many, few = (_observe(backbone, twin(model), given.arguments) for given in (batch, fewer))
        return cls(model, [_compare(name, a, b, size) for (name, *a), (_, *b) in zip(many, few, strict=True)])

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Replace calls of opaque modules by one operator each."""
        if not self.calls:
            yield
            return
        order = iter(range(len(self.calls)))

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            index = next(order)
            flat, spec = pytree.tree_flatten((args, kwargs))
            places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
            rest = [None if i in places else value for i, value in enumerate(flat)]
            if any(isinstance(value, torch.SymInt) for value in rest):
                name = self.calls[index].module
                raise CaptureError(
                    f"Module {name!r} takes a size as argument: a module kept whole may only take tensors."
                )
            self._inputs[index] = (places, rest, spec)
            return pytree.tree_unflatten(_operator(index, [flat[i] for i in places]), self.calls[index].spec)

        try:
            _running.append(self)
            with ExitStack() as stack:
                for name in {call.module for call in self.calls}:
                    stack.enter_context(_replaced_forward(model.get_submodule(name), stand_in))
                yield
        finally:
            _running[:] = [other for other in _running if other is not self]

    def macs(self, node: fx.Node) -> int:
        """MACs of the module's call for one sample, counted by torch."""
        return self.calls[_index(node)].macs

    def function(self, node: fx.Node) -> Callable[[list[Tensor]], list[Tensor]]:
        """The call of the module, from input tensors to output tensors."""
        index = _index(node)
        module = self.model.get_submodule(self.calls[index].module)
        places, rest, spec = self._inputs[index]

        def call(given: list[Tensor]) -> list[Tensor]:
            flat = list(rest)
            for place, tensor in zip(places, given, strict=True):
                flat[place] = tensor
            args, kwargs = pytree.tree_unflatten(flat, spec)
            return pytree.tree_leaves(module(*args, **kwargs))

        return call


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")  # the user may have replaced the class's forward
    try:
        module.forward = forward
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


def _observe(backbone: Backbone, model: nn.Module, arguments: Arguments) -> list[_Observed]:
    seen: list[_Observed] = []

    def watch(name: str, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                answer = original(*args, **kwargs)
            leaves, spec = pytree.tree_flatten(answer)
            given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            seen.append((name, given, leaves, spec, counter.get_total_flops() // 2))
            return answer

        return forward

    with ExitStack() as stack:
        for name in dict.fromkeys(backbone.opaque):
            module = model.get_submodule(name)
            stack.enter_context(_replaced_forward(module, watch(name, module)))
        backbone.call(arguments, model)
    return seen


def _compare(name: str, many: list[Any], few: list[Any], size: int) -> _Call:
    (given, leaves, spec, macs), (fewer_given, fewer_leaves, _, _) = many, few
    like = []
    for a, b in zip(leaves, fewer_leaves, strict=True):
        if not isinstance(a, Tensor):
            raise CaptureError(
                f"Module {name!r} returns a {type(a).__name__}: a module kept whole must return tensors."
            )
        steps = [x - y for x, y in zip(a.shape, b.shape, strict=True)]
        like.append((tuple((x - size * step, step) for x, step in zip(a.shape, steps, strict=True)), a.dtype))
    places = [
        (i, dim)
        for i, (a, b) in enumerate(zip(given, fewer_given, strict=True))
        for dim, (x, y) in enumerate(zip(a.shape, b.shape, strict=True))
        if x == size and y == size - 1
    ]
    if not places:
        raise CaptureError(f"No input of module {name!r} has the batch: it cannot be kept whole.")
    return _Call(name, spec, like, places[0], macs // size)


@torch.library.custom_op("ee_surgery::opaque", mutates_args=())
def _operator(index: int, given: list[Tensor]) -> list[Tensor]:
    raise NotImplementedError("An opaque call is a placeholder for its module; stages call the module itself.")


@_operator.register_fake
def _(index: int, given: list[Tensor]) -> list[Tensor]:
    call = _running[-1].calls[index]
    place, dim = call.batch
    size = given[place].shape[dim]
    return [
        given[place].new_empty([constant + step * size if step else constant for constant, step in dims], dtype=dtype)
        for dims, dtype in call.like
    ]


def _index(node: fx.Node) -> int:
    index = node.args[0]
    assert isinstance(index, int)
    return index


def is_opaque(node: fx.Node) -> bool:
    """True for a call that represents a module kept whole."""
    return node.target is torch.ops.ee_surgery.opaque.default
