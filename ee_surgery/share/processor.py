"""How pictures are prepared for a base: by timm's transforms, or by the base's own image processor in transformers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ee_surgery.backbone import Backbone
from ee_surgery.errors import DataError, SurgeryWarning
from ee_surgery.files import FolderChange, locate
from ee_surgery.pictures import named_processor, plain_settings, timm_model
from ee_surgery.share.adapter import CONFIG, PROCESSOR


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a transform: one PIL picture to what the model takes of it, no batch."""

    processor: Any
    mode: str = "RGB"

    def __call__(self, picture: Image.Image) -> Tensor:
        """Any mode of picture; its pixels, usually (3, H, W)."""
        return self.processor(picture.convert(self.mode), return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True)
class _Converted:
    """A picture of any mode (palette, with transparency) in the one that the model takes."""

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
    """A transform from a PIL picture to the base's input: timm's, or the base's image processor.

    Args:
        preprocessing: what `timm.data.create_transform` takes; the base's own for a timm model when left out.
        processor: an image processor; the one that belongs to the base's name when left out.
        is_training: with timm's random crops and flips.
    Raises:
        DataError: the base does not say how its pictures are prepared, or has no transform for training.
    """
    preprocessing = preprocessing or backbone.preprocessing
    if preprocessing is not None and processor is None:
        return _timm_transform(preprocessing, is_training)
    if is_training:
        raise DataError(f"Nothing says how to augment pictures for {backbone.model_id}: use transforms of your own.")
    by_timm = timm_model(backbone.model, backbone.library) is not None
    if processor is None and backbone.library == "transformers" and not backbone.reads_tokens and not by_timm:
        try:
            processor = named_processor(backbone.model_id, backbone.revision, cached=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"The image processor of {backbone.model_id} cannot be had: {error} Give it when the adapter is saved, "
                "save_pretrained(folder, processor=...), or use a transform of your own."
            ) from error
    if processor is None or not hasattr(processor, "preprocess"):
        raise DataError(
            f"{backbone.model_id} does not say how pictures are prepared for it: use a transform of your own."
        )
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
    """The image processor of a transformers base by its name; None where there is none to be had."""
    named = backbone.loaded_from
    if named is None or backbone.reads_tokens or timm_model(backbone.model, backbone.library) is not None:
        return None
    try:
        return named_processor(*named, cached=cached)
    except Exception:  # whatever is wrong with it: it is an extra
        return None


def processor_settings(processor: Any) -> dict[str, Any] | None:
    """What a TimmWrapperImageProcessor says, which writes no file of its own; None for others."""
    found = getattr(getattr(processor, "image_processor", processor), "data_config", None)
    return None if found is None else plain_settings(found)


def save_processor(change: FolderChange, processor: Any) -> None:
    """Write the files of an image processor or a tokenizer into an adapter folder; nothing for None."""
    if processor is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        getattr(processor, "image_processor", processor).save_pretrained(folder)
        for path in Path(folder).iterdir():
            if path.suffix in (".json", ".txt", ".model"):  # what a processor of the Hub's own code brings stays out
                change.place(path.name).write_bytes(path.read_bytes())


def load_processor(folder: Path, files: Mapping[str, str]) -> Any:
    """The image processor of an adapter folder; None where there is none, or with a warning none that can be read.

    Args:
        files: what the folder's `config.json` lists. Another processor was put there by hand: taken, with a warning.
    """
    path = locate(folder / CONFIG, PROCESSOR, files)
    if path is None and (folder / PROCESSOR).exists():
        path = folder / PROCESSOR
        warnings.warn(
            f"{path} is not the one that was saved with the adapter; it is used all the same: see that it prepares "
            "pictures for this base.",
            SurgeryWarning,
            stacklevel=3,
        )
    if path is None:
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # the branches are fine without
        warnings.warn(f"{folder / PROCESSOR} cannot be read and is left out: {error}", SurgeryWarning, stacklevel=3)
        return None
