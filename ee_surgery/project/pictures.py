"""Labelled images as a Dataset: from the Hub, or a local folder."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ee_surgery.errors import ConfigError, DataError
from ee_surgery.project.settings import Source

Transform: TypeAlias = Callable[[Image.Image], Tensor]


class Rows(Protocol):
    """A whole split: (image, class number) by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Image.Image, int]: ...


class Arrays:
    """Rows in memory: uint8 (N, H, W, 3), RGB, and labels (N,)."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels.numpy(), labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.labels[i])


class Columns:
    """Two columns of a data set, decoded as they are read.

    Args:
        numbers: the model's number for each class; None if they are the same.
    """

    def __init__(self, found: Any, image: str, label: str, numbers: list[int] | None) -> None:
        self.found, self.image, self.label, self.numbers = found, image, label, numbers

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        row = self.found[i]
        label = row[self.label]
        return row[self.image], label if self.numbers is None else self.numbers[label]


Rowed: TypeAlias = Callable[[Source, str], "Rows | None"]
"""Rows of a split of other kinds of data; None where the data is none of them."""


class Pictures(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Some rows of a split, preprocessed for the model."""

    def __init__(self, rows: Rows, index: Sequence[int], transform: Transform) -> None:
        self.rows, self.index, self.transform = rows, index, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, label = self.rows[self.index[i]]
        return self.transform(picture.convert("RGB")), label


def part(
    settings: Source,
    name: str,
    transform: Transform,
    classes: Sequence[str] | None = None,
    rowed: Rowed | None = None,
) -> Pictures:
    """A part of the data.

    Args:
        name: a split, or a range of one in a fixed random order, in rows or percent: `test[:50%]`, `train[1000:]`.
        classes: names of the model's classes; a data set whose classes have the same names gets the model's numbers.
        rowed: reads other kinds of data.
    Raises:
        ConfigError: the name is invalid, or the part is empty.
        DataError: the data does not exist.
    """
    found = re.fullmatch(r"([\w.-]+)(?:\[(\d*%?):(\d*%?)\])?", name)
    if found is None:
        raise ConfigError(f"A part of the data must look like test, test[:50%] or test[1000:2000]; got {name!r}.")
    split, *ends = found.groups()
    rows = (rowed and rowed(settings, split)) or _rows(settings, split, classes)
    index: Sequence[int] = range(len(rows))
    if "[" in name:
        start, stop = (len(rows) * int(end[:-1]) // 100 if end.endswith("%") else int(end or 0) for end in ends)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        index = order[start : stop if ends[1] else None]
    if not index:
        raise ConfigError(f"{name} is empty: {split} of {settings.source} has {len(rows)} images.")
    return Pictures(rows, index, transform)


def _rows(settings: Source, split: str, classes: Sequence[str] | None) -> Rows:
    if settings.source == "synthetic":
        return _synthetic(split)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{settings.source!r}: data sets of the Hub, and folders of images or parquet files, need the package "
            "datasets: pip install 'ee-surgery[data]'."
        ) from None
    try:
        found = datasets.load_dataset(settings.source, split=split)
    except Exception as error:
        raise DataError(f"No split {split!r} of {settings.source!r}: {type(error).__name__}: {error}") from error
    image = settings.image or _first(found.features, datasets.Image)
    label = settings.label or _first(found.features, datasets.ClassLabel)
    if image not in found.features or label not in found.features:
        raise DataError(
            f"{settings.source} has the columns {list(found.features)}. Name those of images and class "
            "numbers in data: image and label."
        )
    return Columns(found, image, label, _numbers(getattr(found.features[label], "names", None), classes))


def _first(features: Any, kind: type) -> str:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), "")


def _numbers(names: Sequence[str] | None, classes: Sequence[str] | None) -> list[int] | None:
    """The model's number for each class of the data, if names match."""
    if names and classes and set(names) <= set(classes):
        return [classes.index(name) for name in names]
    if names and all(name.isdigit() for name in names):  # folders, sorted as text: 0, 1, 10, 2
        return [int(name) for name in names]
    return None


def _synthetic(split: str) -> Rows:
    """64 images of 32 x 32 pixels: ten colours with noise."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.randint(10, (64,), generator=generator)
    colours = torch.randint(256, (10, 1, 1, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-64, 65, (64, 32, 32, 3), generator=generator)
    return Arrays((colours[labels] + noise).clamp(0, 255).to(torch.uint8), labels)
