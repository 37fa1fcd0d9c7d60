"""Do the stages of a program give the original's own logits, whoever leaves? And if not, which module is to blame?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ee_surgery.backbone import Backbone
from ee_surgery.errors import ExitPointError
from ee_surgery.graph.stages import compact
from ee_surgery.inputs import Arguments, batch_size, select, tensors
from ee_surgery.runtime.program import Program
from ee_surgery.twin import twin


def verify(program: Program, backbone: Backbone, arguments: Arguments) -> None:
    """Run the stages with samples leaving and changing places at every cut, and compare with the whole model.

    Args:
        arguments: four samples.
    Raises:
        ExitPointError: the stages do not give the original's logits, or the model mixes its samples.
    """
    dims = backbone.dims(arguments)
    device = next(iter(tensors(arguments).values())).device
    with torch.no_grad():
        whole = backbone.logits(backbone(arguments))
        # Each half alone: whatever one half tells the other is missed there.
        for half in ([3, 1], [0, 2]):
            rows = torch.tensor(half, device=device)
            live = program.stages[0](*tensors(select(arguments, dims, rows)).values())
            for k, stage in enumerate(program.stages[1:]):
                leaving = half == [3, 1] or k > 0
                order = torch.arange(len(rows), device=device).flip(0)[: 1 if leaving else 2]
                rows = rows[order]
                live = stage(*compact(live, stage.axes, order))
            if not _close(whole[rows], live[0]):
                names = [point.name for point in program.points]
                raise ExitPointError(
                    f"Cut at {names}, {backbone.model_id} does not give its own logits any more "
                    f"(relative error {_error(whole[rows], live[0]):.2g}). " + _suspect(backbone, arguments)
                )


def _error(expected: Tensor, seen: Tensor) -> float:
    scale = expected.double().abs().max().clamp_min(1e-6)
    return ((expected.double() - seen.double()).abs().max() / scale).item()


def _close(expected: Tensor, seen: Tensor) -> bool:
    return _error(expected, seen) <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2)


def _suspect(backbone: Backbone, arguments: Arguments) -> str:
    """Which module makes a sample depend on its neighbours, found by running it with them and without."""
    dims = backbone.dims(arguments)
    device = next(iter(tensors(arguments).values())).device
    together = _outputs(backbone, arguments)
    size = batch_size(arguments, dims)
    alone = [_outputs(backbone, select(arguments, dims, torch.tensor([i], device=device))) for i in range(size)]
    for name, many in together.items():
        ones = [outputs[name] for outputs in alone if name in outputs]
        if len(ones) < size or any(one.shape != many[:1].shape for one in ones):
            continue
        if not all(_close(many[i : i + 1], one) for i, one in enumerate(ones)):
            where = f"module {name!r}" if name else "the model's own forward"
            return (
                f"Its samples are not independent of each other: {where} answers differently for a sample alone and "
                "among others (a mean or a norm over the batch?). Samples cannot leave such a batch; make that code "
                "look at one sample at a time."
            )
    return (
        "Its samples are not independent of each other there, or a tensor is shared across the cut in a way that the "
        "graph does not show. Choose other exit points."
    )


def _outputs(backbone: Backbone, arguments: Arguments) -> dict[str, Tensor]:
    """The first tensor that each module answers with, in the order they finish."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if leaves and leaves[0].ndim:
                seen.setdefault(name, leaves[0].clone())

        return hook

    model = twin(backbone.state().model)
    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        backbone.call(arguments, model)
    return seen
