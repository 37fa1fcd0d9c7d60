"""Model inputs: one tensor, or several by name, each with its own batch dimension."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ee_surgery.errors import DataError

Inputs: TypeAlias = Tensor | Mapping[str, Any]
"""The model's one input, or its keyword arguments: tensors, and options such as `interpolate_pos_encoding=True`."""
Arguments: TypeAlias = dict[str, Any]
"""Normalized inputs: by name, the main one first, without None."""

_SAMPLES = 4  # export specialises a batch of 1; verifying a cut takes some that stay and some that leave


def tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments; the first is the main one."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def batch_dims(arguments: Arguments) -> dict[str, int | None]:
    """The dimension of each tensor that holds the batch: the first one of the main input's length.

    None where there is no such dimension: that tensor is shared by all samples.
    """
    main = next(iter(tensors(arguments).values()))
    return {
        name: next((dim for dim, size in enumerate(tensor.shape) if size == main.shape[0]), None)
        for name, tensor in tensors(arguments).items()
    }


def batch_size(arguments: Arguments, dims: Mapping[str, int | None]) -> int:
    """B, the same in all tensors.

    Raises:
        DataError: they differ.
    """
    sizes = {name: t.shape[dim] for name, t in tensors(arguments).items() if (dim := dims.get(name)) is not None}
    if len(set(sizes.values())) != 1:
        raise DataError(f"The input tensors hold different numbers of samples: {sizes}.")
    return next(iter(sizes.values()))


def select(arguments: Arguments, dims: Mapping[str, int | None], rows: Tensor) -> Arguments:
    """The samples `rows` of every tensor, in that order."""
    own = {name: dim for name in tensors(arguments) if (dim := dims.get(name)) is not None}
    return {name: value.index_select(own[name], rows) if name in own else value for name, value in arguments.items()}


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """The samples `rows` of a batch of inputs of either form."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    arguments = dict(inputs)
    return select(arguments, batch_dims(arguments), rows)


def as_sample(arguments: Arguments, dims: Mapping[str, int | None]) -> Arguments:
    """Exactly four samples: the first ones, and variations of them where there are fewer."""
    found: Arguments = dict(arguments)
    for name, value in tensors(arguments).items():
        dim = dims[name]
        if dim is None:
            continue
        rows = [value.narrow(dim, 0, min(_SAMPLES, value.shape[dim]))]
        for shift in range(_SAMPLES - rows[0].shape[dim]):
            first = value.narrow(dim, 0, 1)
            last = value.ndim - 1
            moved = first.flip(last) if shift == 0 else first.roll(shift, last)
            rows.append(moved if last != dim else first)
        found[name] = torch.cat(rows, dim)
    return found


def key(arguments: Arguments, dims: Mapping[str, int | None]) -> tuple[Hashable, ...]:
    """What a captured graph depends on: shapes without the batch, dtypes, devices, options and autocast."""
    found: list[Hashable] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            dim = dims[name]
            shape = value.shape[1:] if dim == 0 else tuple(size for i, size in enumerate(value.shape) if i != dim)
            found += (name, shape, value.dtype, value.device)
        else:
            found += (name, repr(value))
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        found += (torch.get_autocast_dtype("cuda"), torch.get_autocast_dtype("cpu"))
    return tuple(found)
