"""Any form of user data as batches of (inputs, labels)."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ee_surgery.backbone.inputs import Inputs, take, tensors
from ee_surgery.checks import count as count_of
from ee_surgery.checks import refuse
from ee_surgery.errors import DataError

Data: TypeAlias = Dataset[Any] | DataLoader[Any] | Iterable[Any]
"""A Dataset of samples, or a DataLoader or iterable of batches; each (inputs, labels), a dict, or inputs alone."""

_INPUTS = ("pixel_values", "image", "images", "x")
_LABELS = ("labels", "label", "y")


def halves(data: Data, batch_size: int) -> tuple[Half, Half]:
    """Two random disjoint halves of the data; each can be read many times.

    Raises:
        DataError: the data can be read only once, or gives other samples or another order when read again.
    """
    batches = loader(rereadable(data), batch_size)
    known: list[int] = []
    return Half(batches, 0, known), Half(batches, 1, known)


def rereadable(data: Data) -> Data:
    """The data, if it can be read more than once.

    Raises:
        DataError: it is an iterator.
    """
    if isinstance(data, Iterator):
        raise DataError("An iterator can be read only once, but several passes are needed: give a Dataset or a list.")
    return data


class Half:
    """One of two halves of the samples of every batch.

    Args:
        known: checksums of the batches read so far, shared by both halves.
    """

    def __init__(self, batches: Iterable[Any], which: int, known: list[int]) -> None:
        self.batches, self.which, self.known = batches, which, known

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor] | Inputs]:
        for number, batch in enumerate(self.batches):
            inputs, labels = unpack(batch)
            self._compare(number, inputs)
            order = torch.randperm(count(inputs), generator=torch.Generator().manual_seed(number))
            rows = order[(self.which + number) % 2 :: 2]  # of odd batches, the halves take turns to get the larger part
            if len(rows):
                yield take(inputs, rows) if labels is None else (take(inputs, rows), labels[rows])

    def _compare(self, number: int, inputs: Inputs) -> None:
        main = inputs if isinstance(inputs, Tensor) else next(iter(tensors(inputs).values()))
        found = zlib.crc32(main.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if number == len(self.known):
            self.known.append(found)
        elif self.known[number] != found:
            raise DataError(
                "The held-out data gives other samples, or another order, when read again: its halves would overlap. "
                "Give a Dataset or a DataLoader that neither shuffles nor augments."
            )


def unlabelled(data: Data) -> Data:
    """The same data without its labels: accuracy then means agreement with the original.

    Raises:
        DataError: not a data set.
    """
    _check(data)
    if isinstance(data, Iterator):
        return map(_without_labels, data)
    if isinstance(data, IterableDataset):
        return _UnlabelledStream(data)
    if is_samples(data):
        return _UnlabelledSamples(data)
    return _SizedUnlabelledBatches(data) if isinstance(data, Sized) else _UnlabelledBatches(data)


class _UnlabelledSamples(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return _without_labels(self.data[index])


class _UnlabelledStream(IterableDataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return map(_without_labels, self.data)


class _UnlabelledBatches:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return map(_without_labels, self.data)


class _SizedUnlabelledBatches(_UnlabelledBatches):
    def __len__(self) -> int:
        return len(self.data)


def _without_labels(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: value for name, value in given.items() if name not in _LABELS}
    return given[0] if isinstance(given, (tuple, list)) else given


def is_samples(data: Data) -> bool:
    """True for a dataset of single samples, False for an iterable of batches."""
    return isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, (list, tuple, DataLoader))
    )


def loader(data: Data, batch_size: int, *, shuffle: bool = False, num_workers: int = 0) -> Iterable[Any]:
    """Batches of `data`: itself if it already yields batches, else a DataLoader over it.

    Raises:
        DataError: it is neither, it is empty, or its samples cannot be collated.
        ConfigError: an invalid batch size.
    """
    batch_size = count_of("batch_size", batch_size)
    _check(data)
    if not is_samples(data):
        return data  # pyright: ignore[reportReturnType]
    stream = isinstance(data, IterableDataset)
    if not stream and len(data) == 0:  # pyright: ignore[reportArgumentType]
        raise DataError(f"No samples: the {type(data).__name__} is empty.")
    shuffle = shuffle and not stream
    return DataLoader(data, batch_size, shuffle=shuffle, num_workers=num_workers, collate_fn=_collate)  # pyright: ignore[reportArgumentType]


def _check(data: object) -> None:
    """Check that it can be data.

    Raises:
        DataError: it is a path, a model, a single number, ...
    """
    if isinstance(data, _NO_DATA) or not (isinstance(data, Iterable) or is_samples(data)):  # pyright: ignore[reportArgumentType]
        hint = "For a folder of images: torchvision.datasets.ImageFolder(folder, branched.transform())."
        text = isinstance(data, (str, bytes, os.PathLike))
        refuse("data", "a Dataset, a DataLoader or an iterable of batches", data, DataError, hint if text else "")


_NO_DATA = (str, bytes, os.PathLike, Mapping, torch.nn.Module, type)


def _collate(samples: list[Any]) -> Any:
    """Collate samples into a batch as torch does.

    Raises:
        DataError: they contain something other than numbers, or differ in shape.
    """
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"The samples cannot be collated: {reason}. Give the dataset a transform that returns tensors of one size "
            "(`branched.transform()`), or pass batches."
        ) from error


def unpack(batch: Any) -> tuple[Inputs, Tensor | None]:
    """Inputs, with B samples, and labels (B,) of one batch; labels are None if there are none.

    All tensors of a dict except the labels are inputs: a single one as a tensor, several as a dict.

    Raises:
        DataError: the batch has an unknown form.
    """
    inputs: Any = None
    labels = None
    batch = _normal(batch)
    if isinstance(batch, Tensor):
        inputs = batch
    elif isinstance(batch, Mapping):
        labels = next((batch[name] for name in _LABELS if name in batch), None)
        inputs = {name: value for name, value in batch.items() if name not in _LABELS and isinstance(value, Tensor)}
        if len(inputs) == 1 and next(iter(inputs)) in _INPUTS:
            inputs = next(iter(inputs.values()))
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping) or not tensors(named) or not (labels is None or isinstance(labels, Tensor)):
        seen = {k: type(v).__name__ for k, v in batch.items()} if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"A batch must be inputs, (inputs, labels), or a dict of input tensors (one of {_INPUTS}, or under the "
            f"names that the model takes) with one of {_LABELS}, all tensors; got {seen}. Give a PIL dataset a "
            "transform that returns tensors."
        )
    if labels is not None and (labels.ndim == 0 or len(labels) != count(inputs)):
        seen = len(labels) if labels.ndim else "a single number instead of"
        raise DataError(f"{count(inputs)} inputs but {seen} labels in one batch.")
    return inputs, labels


def _normal(batch: Any) -> Any:
    """Copy tensors created in inference mode, which autograd cannot save; leave others as they are."""
    if torch.is_inference_mode_enabled():
        return batch
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


def count(inputs: Inputs) -> int:
    """Number of samples, taken from the first tensor."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(tensors(inputs).values())))


def batches(
    data: Data, batch_size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Inputs, Tensor | None]]:
    """Batches of (inputs, labels) in order, from any form of data; labels are None if there are none.

    Args:
        batch_size: for a Dataset; existing batches stay as they are.
        device: to move them to; floating-point inputs become `dtype`.
    """
    for batch in loader(data, batch_size):
        inputs, labels = unpack(batch)
        yield place(inputs, device, dtype), None if labels is None else labels.to(device)


def place(inputs: Inputs, device: torch.device | None, dtype: torch.dtype) -> Inputs:
    """Inputs on a device; integer tensors keep their type."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    return {name: place(v, device, dtype) if isinstance(v, Tensor) else v for name, v in inputs.items()}
