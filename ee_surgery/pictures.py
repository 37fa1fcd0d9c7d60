"""How the pictures of a model are prepared, by the model's own word: the one source of transforms and of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

_FEW = 16  # channels of a picture; the first convolution of some models reads pictures folded into more
_PROBE = (512, 512)  # a square picture: processors that keep its proportions answer with a square

Shape: TypeAlias = tuple[int, ...]
Takes: TypeAlias = Callable[[Shape], bool]
"""Whether a model runs on pictures of a shape (C, H, W)."""


def timm_model(model: nn.Module, library: str) -> nn.Module | None:
    """The timm model that this one is, or that it wraps (transformers' TimmWrapper); None for others."""
    found = model if library == "timm" else getattr(model, "timm_model", None)
    return found if isinstance(found, nn.Module) else None


def timm_settings(model: nn.Module, library: str, takes: Takes) -> dict[str, Any] | None:
    """What `timm.data.create_transform` takes to prepare pictures for a timm model, wrapped or not, as plain data.

    A timm model's word is its `pretrained_cfg`, and the size and channels that it was built for. A TimmWrapper's is the
    `pretrained_cfg` of its configuration, read as transformers' TimmWrapperImageProcessor reads it.

    Returns:
        None where nothing says, as for pictures of other channels than the known mean and deviation are of.
    """
    inner = timm_model(model, library)
    stated = None if inner is None else _stated(model, inner)
    size = timm_shape(model, library, takes)
    if stated is None or size is None:
        return None
    if not {len(stated["mean"]), len(stated["std"])} <= {1, size[0]}:
        return None
    return plain_settings({**stated, "input_size": size})


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of timm as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def timm_shape(model: nn.Module, library: str, takes: Takes) -> Shape | None:
    """(C, H, W) of the pictures that a timm model takes, wrapped or not; None where it does not say."""
    inner = timm_model(model, library)
    if inner is None:
        return None
    stated = _stated(model, inner)
    return _size(inner, tuple(stated["input_size"]) if stated else None, library, takes)


def _stated(model: nn.Module, inner: nn.Module) -> dict[str, Any] | None:
    from timm.data import resolve_data_config  # pyright: ignore[reportPrivateImportUsage]

    if inner is not model and (wrapped := getattr(model.config, "pretrained_cfg", None)):
        try:
            return resolve_data_config(wrapped, model=None)  # as arguments: they win over timm's defaults one by one
        except AssertionError:  # means of other channels than its pictures: the processor too refuses them
            return None
    own = getattr(inner, "pretrained_cfg", None)
    return resolve_data_config(pretrained_cfg=own) if own else None


def _size(inner: nn.Module, stated: Shape | None, library: str, takes: Takes) -> Shape | None:
    """The stated size, but the size and channels that the model was built for where they are others."""
    known = stated[0] if stated else 3
    first = next((m.in_channels for m in inner.modules() if isinstance(m, nn.Conv2d)), 0)
    channels = first if 0 < first < _FEW and first % known else known
    sizes = (getattr(module, "img_size", None) for module in inner.modules())
    built: Any = next((found for found in sizes if _is_grid(found)), None)
    if stated is None:
        return None if built is None else (channels, *built)
    shape = (channels, *stated[1:])
    if built is None or built == stated[1:]:
        return shape
    # timm builds for the size that `pretrained_cfg` states: another one was asked for, img_size=, or set later.
    meant = library == "timm" and getattr(inner, "pretrained_cfg", {}).get("fixed_input_size", False)
    return (channels, *built) if meant or not takes(shape) else shape


def _is_grid(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)


def named_processor(model_id: str, revision: str | None, *, cached: bool) -> Any:
    """The image processor under the name of a transformers model; `cached`: without asking the Hub.

    Raises:
        OSError, ValueError: it cannot be had.
    """
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        model_id, revision=revision, local_files_only=cached, trust_remote_code=False
    )


def processor_shape(model_id: str, revision: str | None) -> Shape | None:
    """(C, H, W) that the image processor under this name makes; None without one in the local cache."""
    from PIL import Image

    try:
        processor = named_processor(model_id, revision, cached=True)
        found = processor(Image.new("RGB", _PROBE), return_tensors="pt")["pixel_values"][0]
    except Exception:  # whatever is wrong with it: the configuration says a size too
        return None
    return tuple(found.shape) if isinstance(found, Tensor) and found.ndim == 3 else None
