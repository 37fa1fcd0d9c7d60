"""Model inputs: one tensor, or several by name, each with its own batch dimension."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one call, and where each of their tensors holds the samples.

    Made once, by `Backbone.batch`, and handed down to whatever captures, cuts or runs.
    """

    arguments: Arguments
    dims: Mapping[str, int | None]
    """Of each tensor, the dimension that holds the batch; None for one that all samples share."""

    @classmethod
    def of(cls, arguments: Arguments, dims: Mapping[str, int | None] | None = None) -> Batch:
        """Arguments with their dimensions: those given, for other tensors the first one of the main input's length.

        Raises:
            DataError: the tensors hold different numbers of samples.
        """
        given = tensors(arguments)
        rows = next(iter(given.values())).shape[0]
        found = {n: next((i for i, size in enumerate(t.shape) if size == rows), None) for n, t in given.items()}
        found |= dims or {}
        sizes = {name: t.shape[dim] for name, t in given.items() if (dim := found[name]) is not None}
        if len(set(sizes.values())) != 1:
            raise DataError(f"The input tensors hold different numbers of samples: {sizes}.")
        return cls(arguments, found)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments, the main one first."""
        return tuple([value for value in self.arguments.values() if isinstance(value, Tensor)])

    @property
    def size(self) -> int:
        """B, the same in all tensors."""
        own = ((self.arguments[name], dim) for name, dim in self.dims.items() if name in self.arguments)
        return next(tensor.shape[dim] for tensor, dim in own if dim is not None)

    @property
    def device(self) -> torch.device:
        """Where its main tensor is."""
        return self.tensors[0].device

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What a captured graph depends on: shapes without the batch, dtypes, devices, options and autocast."""
        found: list[Hashable] = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                dim = self.dims[name]
                shape = value.shape[1:] if dim == 0 else tuple(size for i, size in enumerate(value.shape) if i != dim)
                found += (name, shape, value.dtype, value.device)
            else:
                found += (name, repr(value))
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            found += (torch.get_autocast_dtype("cuda"), torch.get_autocast_dtype("cpu"))
        return tuple(found)

    def select(self, rows: Tensor | list[int]) -> Batch:
        """The samples `rows` (int64 indices, or a list of them) of every tensor, in that order."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        own = {name: dim for name in tensors(self.arguments) if (dim := self.dims[name]) is not None}
        picked = {n: v.index_select(own[n], rows) if n in own else v for n, v in self.arguments.items()}
        return Batch(picked, self.dims)

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """The samples of several batches of one `key`, one after the other; what samples share is the first's."""
        first, *others = batches
        if not others:
            return first
        joined: Arguments = dict(first.arguments)
        for name in tensors(first.arguments):
            dim = first.dims[name]
            if dim is not None:
                joined[name] = torch.cat([batch.arguments[name] for batch in batches], dim)
        return cls(joined, first.dims)

    def sample(self) -> Batch:
        """Exactly four samples: the first ones, and variations of them where there are fewer."""
        found: Arguments = dict(self.arguments)
        for name, value in tensors(self.arguments).items():
            dim = self.dims[name]
            if dim is None:
                continue
            rows = [value.narrow(dim, 0, min(_SAMPLES, value.shape[dim]))]
            for shift in range(_SAMPLES - rows[0].shape[dim]):
                first = value.narrow(dim, 0, 1)
                last = value.ndim - 1
                moved = first.flip(last) if shift == 0 else first.roll(shift, last)
                rows.append(moved if last != dim else first)
            found[name] = torch.cat(rows, dim)
        return Batch(found, self.dims)


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """The samples `rows` of a batch of inputs of either form."""
    return inputs[rows] if isinstance(inputs, Tensor) else Batch.of(dict(inputs)).select(rows).arguments
