"""Image preprocessing for a base: timm's transforms, or the base's own image processor in transformers."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.picture_settings import check_preprocessing
from ee_surgery.backbone.pictures import build_processor, named_processor, timm_model
from ee_surgery.errors import DataError, SurgeryWarning
from ee_surgery.files import FolderChange, read_object
from ee_surgery.share.adapter import CONFIG, PROCESSOR, PROCESSOR_FILES, find_file
from ee_surgery.text import visible

_LIMIT = 1 << 20  # bytes of a processor's file


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a transform: one PIL image to the model's input, without a batch."""

    processor: Any
    mode: str = "RGB"

    def __call__(self, picture: Image.Image) -> Tensor:
        """An image of any mode -> pixels, usually (3, H, W).

        Raises:
            DataError: the processor cannot process it.
        """
        converted = picture.convert(self.mode)
        try:
            return self.processor(converted, return_tensors="pt")["pixel_values"][0]
        except Exception as error:  # transformers checks only now whether its settings are consistent
            raise DataError(
                f"{type(self.processor).__name__} cannot process an image of {picture.size} pixels: {error!r} Use "
                "another processor, save_pretrained(folder, processor=...), or your own transform."
            ) from error


@dataclass(frozen=True)
class _Converted:
    """Convert an image of any mode (palette, with transparency) to the model's."""

    mode: str

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.convert(self.mode)


def picture_transform(
    backbone: Backbone,
    *,
    preprocessing: dict[str, Any] | None = None,
    processor: Any = None,
    is_training: bool = False,
) -> Callable[[Image.Image], Tensor]:
    """A transform from a PIL image to the base's input: timm's, or the base's image processor.

    Args:
        preprocessing: arguments of `timm.data.create_transform`; by default the timm base's own.
        processor: an image processor; by default the one published with the base.
        is_training: with timm's random crops and flips.
    Raises:
        DataError: the base has no preprocessing settings, or no transform for training.
    """
    preprocessing = preprocessing or backbone.preprocessing
    if preprocessing is not None and processor is None:
        return _timm_transform(preprocessing, is_training)
    if is_training:
        raise DataError(f"{backbone.model_id} has no training augmentation: use your own transforms.")
    by_timm = timm_model(backbone.model, backbone.library) is not None
    named = backbone.loaded_from
    if processor is None and named is not None and not backbone.reads_tokens and not by_timm:
        try:
            processor = named_processor(backbone.named, *named, cached=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"The image processor of {backbone.model_id} cannot be loaded: {error} Pass it when saving, "
                "save_pretrained(folder, processor=...), or use your own transform."
            ) from error
    if processor is None or not hasattr(processor, "preprocess"):
        raise DataError(f"{backbone.model_id} has no preprocessing settings: use your own transform.")
    return ProcessorTransform(processor, "L" if backbone.channels == 1 else "RGB")


def _timm_transform(settings: Mapping[str, Any], is_training: bool) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]

    transform: Any = create_transform(**settings, is_training=is_training)
    size = settings.get("input_size")
    mode = {1: "L", 3: "RGB"}.get(size[0]) if isinstance(size, (list, tuple)) else None
    if mode is not None:
        transform.transforms.insert(0, _Converted(mode))
    return transform


def find_processor(backbone: Backbone, *, cached: bool) -> Any:
    """The image processor published with a transformers base; None if there is none."""
    named = backbone.loaded_from
    if named is None or backbone.reads_tokens or timm_model(backbone.model, backbone.library) is not None:
        return None
    try:
        return named_processor(backbone.named, *named, cached=cached)
    except Exception:  # optional: ignore any failure
        return None


def save_processor(change: FolderChange, processor: Any, backbone: Backbone) -> None:
    """Write the files of an image processor or a tokenizer into an adapter folder; nothing for None.

    Warns if `load_processor` will not accept the image processor for this base.
    """
    if processor is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        getattr(processor, "image_processor", processor).save_pretrained(folder)
        for path in Path(folder).iterdir():
            if path.name in PROCESSOR_FILES:  # files of processors with custom Hub code are left out
                change.place(path.name).write_bytes(path.read_bytes())
    if change.wrote(PROCESSOR):
        try:
            build_processor(read_object(change.place(PROCESSOR), _LIMIT), backbone.named)
        except Exception as error:  # saved anyway: transformers' own classes can use it
            warnings.warn(
                f"The image processor is saved, but loading will leave it out: {visible(error)}",
                SurgeryWarning,
                stacklevel=3,
            )


def load_processor(folder: Path, files: Mapping[str, str], backbone: Backbone) -> Any:
    """The image processor of an adapter folder; None if there is none or, with a warning, no usable one.

    Only `preprocessor_config.json` is read, and only its plain settings; see `build_processor`. No code is run, no
    other file is read and the Hub is not accessed, whatever it contains.

    Args:
        files: digests listed in the folder's `config.json`.
        backbone: the base that images are preprocessed for.
    Raises:
        AdapterError: the file does not match the list.
    """
    path = find_file(folder, PROCESSOR, files) if PROCESSOR in files else folder / PROCESSOR
    if not os.path.lexists(path):
        return None
    try:
        return build_processor(read_object(path, _LIMIT), backbone.named)
    except Exception as error:  # the branches work without it
        warnings.warn(
            f"{folder / PROCESSOR} cannot be read and is left out: {visible(error)}", SurgeryWarning, stacklevel=4
        )
        return None


def load_preprocessing(folder: Path, settings: object) -> dict[str, Any] | None:
    """An adapter's settings for timm's transforms; None if there are none or, with a warning, no usable ones."""
    if settings is None:
        return None
    try:
        return check_preprocessing(settings)
    except DataError as error:
        warnings.warn(
            f"{folder / CONFIG}: `preprocessing` cannot be used and is left out; the base's own preprocessing is used: "
            f"{visible(error)}",
            SurgeryWarning,
            stacklevel=4,
        )
        return None
