"""Check that the stages of a program give the original's logits whichever samples leave; else name the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.inputs import Batch
from ee_surgery.backbone.twin import twin
from ee_surgery.errors import OUT_OF_MEMORY, ExitPointError
from ee_surgery.graph.segments import compact
from ee_surgery.runtime.program import Program


def verify(program: Program, backbone: Backbone, batch: Batch) -> None:
    """Run the stages with samples leaving and changing places at every cut, and compare with the whole model.

    Args:
        batch: four samples.
    Raises:
        ExitPointError: the stages do not give the original's logits, or the model mixes its samples.
    """
    try:
        _verify(program, backbone, batch)
    except (ExitPointError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        names = [point.name for point in program.points]
        raise ExitPointError(
            f"Cut at {names}, {backbone.model_id} does not run any more when samples leave "
            f"({type(error).__name__}: {error}). " + _suspect(backbone, batch)
        ) from error


def _verify(program: Program, backbone: Backbone, batch: Batch) -> None:
    with torch.no_grad():
        whole = backbone.logits(backbone(batch.arguments))
        # Run each half separately, so any leakage between samples shows up as a difference.
        for half in ([3, 1], [0, 2]):
            rows = torch.tensor(half, device=batch.device)
            live = program.stages[0](*batch.select(rows).tensors)
            for k, stage in enumerate(program.stages[1:]):
                leaving = half == [3, 1] or k > 0
                order = torch.arange(len(rows), device=batch.device).flip(0)[: 1 if leaving else 2]
                rows = rows[order]
                live = stage(*compact(live, program.segments[k + 1].axes, order))
            _compare(program, backbone, batch, whole[rows], live[0])
        _verify_one(program, backbone, batch, whole)


def _verify_one(program: Program, backbone: Backbone, batch: Batch, whole: Tensor) -> None:
    """The same for a batch of one, which a model may treat in its own way, and torch.export never sees."""
    one = batch.select([0])
    live = one.tensors
    try:
        alone = backbone.logits(backbone(one.arguments))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # the model itself takes no batch of one: there is nothing to agree with
        return
    if not close(whole[:1], alone):
        raise ExitPointError(
            f"{backbone.model_id} answers a batch of one otherwise than the same sample among others (relative error "
            f"{_error(whole[:1], alone):.2g}), but samples that leave change the batch size. "
            + _suspect(backbone, batch)
        )
    for stage in program.stages:
        live = stage(*live)
    _compare(program, backbone, batch, alone, live[0])


def _compare(program: Program, backbone: Backbone, batch: Batch, expected: Tensor, seen: Tensor) -> None:
    if not close(expected, seen):
        names = [point.name for point in program.points]
        raise ExitPointError(
            f"Cut at {names}, {backbone.model_id} does not give its own logits any more for {len(expected)} of its "
            f"samples (shape {tuple(seen.shape)} for {tuple(expected.shape)}, relative error "
            f"{_error(expected, seen):.2g}). " + _suspect(backbone, batch)
        )


def _error(expected: Tensor, seen: Tensor) -> float:
    if expected.shape != seen.shape:
        return torch.inf
    scale = expected.double().abs().max().clamp_min(1e-6)
    return ((expected.double() - seen.double()).abs().max() / scale).item()


def close(expected: Tensor, seen: Tensor) -> bool:
    """Whether two tensors agree within what their precision leaves."""
    return _error(expected, seen) <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2)


def _suspect(backbone: Backbone, batch: Batch) -> str:
    """Find the module responsible by running the original again: twice the same, and each sample alone."""
    model = twin(backbone.state().model)  # one for all calls: what it keeps between them would show
    together, again = _calls(backbone, model, batch), _calls(backbone, model, batch)
    for name, call in together.items():
        other = again.get(name)
        if other is not None and call.takes_as(other) and not call.answers_as(other):
            return (
                f"It answers the same input differently from call to call: {_module(name)} draws random numbers in "
                "eval mode, or keeps state between calls. Dropout by F.dropout needs training=self.training; other "
                "noise has to go, or be drawn once and kept in a buffer."
            )
    for i in range(batch.size):
        alone = _calls(backbone, model, batch.select([i]))
        for name, call in together.items():
            one, row = alone.get(name), call.row(i)
            if one is None or row.answer.shape != one.answer.shape:
                continue
            if row.takes_as(one) and not row.answers_as(one):
                return (
                    f"Its samples are not independent of each other: {_module(name)} answers differently for a sample "
                    "alone and among others (a mean or a norm over the batch, or code for a batch of one?). Samples "
                    "cannot leave such a batch; make that code look at one sample at a time."
                )
    return (
        "Running it again and sample by sample shows no module responsible. Possible causes: samples that are not "
        "independent of each other, a tensor shared across the cut in a way that the graph does not show, or code that "
        "torch.export reads otherwise than eager mode runs it. Choose other exit points."
    )


def _module(name: str) -> str:
    return f"module {name!r}" if name else "the model's own forward"


@dataclass(frozen=True)
class _Call:
    """The first call of a module: the floating tensors that went in, and the first that came out."""

    given: tuple[Tensor, ...]
    answer: Tensor

    def row(self, i: int) -> _Call:
        return _Call(tuple(tensor[i : i + 1] for tensor in self.given), self.answer[i : i + 1])

    def takes_as(self, other: _Call) -> bool:
        """Whether nothing tells apart what went into two calls; tensors of different shapes tell nothing."""
        pairs = zip(self.given, other.given, strict=False)
        return all(mine.shape != its.shape or close(mine, its) for mine, its in pairs)

    def answers_as(self, other: _Call) -> bool:
        return close(self.answer, other.answer)


def _calls(backbone: Backbone, model: nn.Module, batch: Batch) -> dict[str, _Call]:
    """The first call of each module of a twin, in the order they finish."""
    given: dict[str, tuple[Tensor, ...]] = {}
    seen: dict[str, _Call] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            given.setdefault(name, _floats((args, kwargs)))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if name not in seen and (answers := _floats(output)):
                seen[name] = _Call(given[name], answers[0])

        return hook

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    with torch.no_grad():
        backbone.call(batch.arguments, model)
    for handle in handles:
        handle.remove()
    return seen


def _floats(value: object) -> tuple[Tensor, ...]:
    """Copies: the next module may write to them."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return tuple(leaf.clone() for leaf in leaves if leaf.is_floating_point() and leaf.ndim)
