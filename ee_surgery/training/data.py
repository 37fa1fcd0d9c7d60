"""Whatever the user has, as batches of (inputs, labels)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ee_surgery.errors import DataError

Data: TypeAlias = Dataset[Any] | DataLoader[Any] | Iterable[Any]
"""A Dataset of samples, or a DataLoader or iterable of batches; each (inputs, labels), a dict, or inputs alone."""

_INPUTS = ("pixel_values", "image", "images", "x")
_LABELS = ("labels", "label", "y")


def is_samples(data: Data) -> bool:
    """True for a dataset of single samples, False for an iterable of batches."""
    return isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, (list, tuple, DataLoader))
    )


def loader(data: Data, batch_size: int, *, shuffle: bool = False, num_workers: int = 0) -> Iterable[Any]:
    """Batches of `data`: itself where it gives batches already, else a DataLoader over it.

    Raises:
        DataError: it is neither.
    """
    if is_samples(data):
        shuffle = shuffle and not isinstance(data, IterableDataset)
        return DataLoader(data, batch_size, shuffle=shuffle, num_workers=num_workers)  # pyright: ignore[reportArgumentType]
    if not isinstance(data, Iterable):
        raise DataError(f"Data must be a Dataset, a DataLoader or an iterable of batches; got {type(data).__name__}.")
    return data


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Inputs (B, ...) and labels (B,) of one batch; labels are None where it has none.

    Raises:
        DataError: the batch is of no known form.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in _INPUTS if key in batch), None)
        labels = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    else:
        inputs, labels = None, None
    if not isinstance(inputs, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        seen = {k: type(v).__name__ for k, v in batch.items()} if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"A batch must be inputs, (inputs, labels), or a dict with one of {_INPUTS} and one of {_LABELS}, all "
            f"tensors; got {seen}. For a PIL dataset, give it a transform that ends in tensors."
        )
    if labels is not None and len(labels) != len(inputs):
        raise DataError(f"{len(inputs)} inputs but {len(labels)} labels in one batch.")
    return inputs, labels


def batches(
    data: Data, batch_size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of (inputs, labels) in order, from any form of data; labels are None where there are none.

    Args:
        batch_size: of a Dataset; batches that come as such stay as they are.
        device: where to put them; floating inputs become `dtype`.
    """
    for batch in loader(data, batch_size):
        inputs, labels = unpack(batch)
        yield place(inputs, device, dtype), None if labels is None else labels.to(device)


def place(inputs: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """Inputs on a device; integer inputs keep their type."""
    return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
