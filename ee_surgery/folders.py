"""Folders of pictures as data for a model: one sub-folder per class, or pictures beside masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ee_surgery.backbone.base import Backbone
from ee_surgery.data.batches import unlabelled as without_labels
from ee_surgery.data.labels import class_numbers
from ee_surgery.errors import ConfigError, DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.share.processor import ProcessorTransform, picture_transform
from ee_surgery.task import fits

IMAGES, MASKS = "images", "masks"
_MASK_MODES = ("1", "L", "P", "I", "I;16")


def pictures(model: nn.Module, folder: Path, unlabelled: bool) -> Any:
    """Pictures of a folder, with the model's own preprocessing, and their labels.

    Args:
        folder: sub-folders named by class, WordNet id or number, or in class order; for a segmenter `images` and
            `masks`, whose pixels are class numbers, with equal names.
    Raises:
        DataError: there are no pictures, they cannot be read, or the labels do not fit the model.
    """
    backbone = model.engine.backbone if isinstance(model, EarlyExitModel) else Backbone(model)
    transform = model.transform() if isinstance(model, EarlyExitModel) else picture_transform(backbone)
    if fits(("segmentation",), backbone.task):
        masked = Masked(folder, transform)
        return without_labels(masked) if unlabelled else masked
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(folder, transform=transform, loader=_picture)
    except OSError as error:
        raise DataError(f"{folder} has no images in sub-folders: {error}") from error
    if unlabelled:
        return without_labels(found)
    found.target_transform = _class_index(found.classes, backbone, folder).__getitem__
    return found


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """Pictures of `folder/images` with the masks of the same names in `folder/masks`.

    Args:
        transform: from a picture to pixels; an image processor that takes `segmentation_maps` prepares masks too.
    Raises:
        DataError: there are no pictures, or some have no mask.
    """

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.transform = transform
        own = {path.stem: path for path in sorted((folder / IMAGES).glob("*")) if path.suffix.lower() in IMG_EXTENSIONS}
        masks = {path.stem: path for path in sorted((folder / MASKS).glob("*"))}
        if not own:
            raise DataError(
                f"{folder} has no pictures in {folder / IMAGES}: a segmenter needs the folders {IMAGES!r} and "
                f"{MASKS!r}, with a mask of class numbers for each picture, under the same name."
            )
        if missing := sorted(own.keys() - masks.keys()):
            raise DataError(f"{len(missing)} of {len(own)} pictures have no mask in {folder / MASKS}: {missing[:5]}.")
        self.pairs = [(path, masks[stem]) for stem, path in own.items()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Pixels (3, H, W) and class numbers (H, W)."""
        path, mask_path = self.pairs[i]
        picture, mask = _picture(str(path)), _mask(mask_path)
        if picture.size != mask.shape[::-1]:
            raise DataError(f"{mask_path} is of {mask.shape[::-1]} pixels, and its picture of {picture.size}.")
        processor = self.transform.processor if isinstance(self.transform, ProcessorTransform) else None
        if processor is not None and "segmentation_maps" in inspect.signature(processor.preprocess).parameters:
            both = processor(picture, segmentation_maps=Image.fromarray(mask), return_tensors="pt")
            return both["pixel_values"][0], torch.as_tensor(both["labels"][0]).long()
        if getattr(processor, "do_center_crop", False):
            raise DataError(f"{type(processor).__name__} crops pictures and takes no masks: set do_center_crop=False.")
        pixels = self.transform(picture)
        height, width = pixels.shape[-2:]
        resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(resized)).long()


def _mask(path: Path) -> np.ndarray:
    """Class numbers, (H, W)."""
    try:
        with Image.open(path) as mask:
            if mask.mode not in _MASK_MODES:
                raise DataError(
                    f"{path} is of mode {mask.mode!r}: a mask has one channel, of class numbers, as a PNG has."
                )
            return np.array(mask).astype(np.int32 if mask.mode.startswith("I") else np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"Cannot read the mask {path}: {error}. Remove or replace it.") from error


def _picture(path: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for damaged files
        raise DataError(f"Cannot read the image {path}: {error}. Remove or replace it.") from error


def _class_index(names: list[str], backbone: Backbone, folder: Path) -> list[int]:
    """The class number of each folder."""
    try:
        return class_numbers(names, backbone).tolist()
    except ConfigError as error:
        if all(name.isdigit() and int(name) < backbone.num_classes for name in names):
            return [int(name) for name in names]
        if len(names) == backbone.num_classes:
            return list(range(backbone.num_classes))
        raise DataError(
            f"The {len(names)} folders in {folder} ({', '.join(names[:5])} ...) are not the {backbone.num_classes} "
            f"classes of {backbone.model_id} ({error}). Name them by class, WordNet id or class number, or use "
            "--unlabelled."
        ) from error
