"""`squeeze()` captured with several samples but run with one."""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_BY_DIMS = {
    **dict.fromkeys((_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims), _aten.squeeze.dims),
    **dict.fromkeys((_aten.squeeze_.default, _aten.squeeze_.dim, _aten.squeeze_.dims), _aten.squeeze_.dims),
}


def name_squeezed_dims(graph: fx.Graph) -> None:
    """Fix the dimensions that every squeeze drops: with a single sample, it would drop the batch dimension too."""
    for node in graph.nodes:
        if node.target in _BY_DIMS:
            given = node.args[0]
            shape = given.meta["val"].shape
            asked = node.args[1] if len(node.args) > 1 else range(len(shape))
            dims = [asked] if isinstance(asked, int) else [*asked]
            node.target = _BY_DIMS[node.target]
            node.args = (given, [dim for dim in dims if isinstance(shape[dim], int) and shape[dim] == 1])
