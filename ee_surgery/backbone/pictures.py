"""Image preprocessing settings of a model: the single source for transforms and samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from ee_surgery.backbone.picture_settings import processor_arguments
from ee_surgery.checks import shown
from ee_surgery.errors import DataError, SurgeryWarning
from ee_surgery.files import read_object

_FEW = 16  # most channels of an image; some models fold images into more before the first convolution
_PROBE = (512, 512)  # a square image: processors that keep proportions return a square

Shape: TypeAlias = tuple[int, ...]
Takes: TypeAlias = Callable[[Shape], bool]
"""Whether a model runs on images of a shape (C, H, W)."""


def timm_model(model: nn.Module, library: str) -> nn.Module | None:
    """The timm model that this one is, or that it wraps (transformers' TimmWrapper); None for others."""
    found = model if library == "timm" else getattr(model, "timm_model", None)
    return found if isinstance(found, nn.Module) else None


def timm_settings(model: nn.Module, library: str, takes: Takes) -> dict[str, Any] | None:
    """Arguments of `timm.data.create_transform` for a timm model, wrapped or not, as plain data.

    They come from a timm model's `pretrained_cfg` and the size and channels it was built for. For a TimmWrapper, they
    come from `pretrained_cfg` in its configuration, read as transformers' TimmWrapperImageProcessor reads it.

    Returns:
        None if unknown, for example if the mean and standard deviation are for another number of channels.
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
    """timm settings as JSON represents them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def processor_settings(processor: Any) -> dict[str, Any] | None:
    """What a TimmWrapperImageProcessor says, which writes no file of its own; None for others."""
    found = getattr(getattr(processor, "image_processor", processor), "data_config", None)
    return None if found is None else plain_settings(found)


def timm_shape(model: nn.Module, library: str, takes: Takes) -> Shape | None:
    """(C, H, W) of the images that a timm model takes, wrapped or not; None if unknown."""
    inner = timm_model(model, library)
    if inner is None:
        return None
    stated = _stated(model, inner)
    return _size(inner, tuple(stated["input_size"]) if stated else None, library, takes)


def _stated(model: nn.Module, inner: nn.Module) -> dict[str, Any] | None:
    from timm.data import resolve_data_config  # pyright: ignore[reportPrivateImportUsage]

    if inner is not model and (wrapped := getattr(model.config, "pretrained_cfg", None)):
        try:
            return resolve_data_config(wrapped, model=None)  # as arguments, which override timm's defaults one by one
        except AssertionError:  # mean with another number of channels: the processor refuses it too
            return None
    own = getattr(inner, "pretrained_cfg", None)
    return resolve_data_config(pretrained_cfg=own) if own else None


def _size(inner: nn.Module, stated: Shape | None, library: str, takes: Takes) -> Shape | None:
    """The stated size, unless the model was built for another size or number of channels."""
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
    # timm builds for the size in `pretrained_cfg`, unless img_size= is given or it is set later.
    meant = library == "timm" and getattr(inner, "pretrained_cfg", {}).get("fixed_input_size", False)
    return (channels, *built) if meant or not takes(shape) else shape


def _is_grid(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)


def named_processor(model: nn.Module, model_id: str, revision: str | None, *, cached: bool) -> Any:
    """The image processor published with a transformers model; `cached`: without accessing the Hub.

    The repository of a base is untrusted too: its settings are read like those of an adapter.

    Args:
        model: the model of that name, whose type decides the class.
    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    from transformers.utils.hub import cached_file

    # Not `get_image_processor_config`, which finds nothing in transformers 5.9.
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        try:
            path = cached_file(model_id, name, revision=revision, local_files_only=cached)
        except OSError:
            if part is None:
                raise
            continue
        settings = read_object(str(path))
        settings = settings if part is None else settings.get(part)
        if isinstance(settings, Mapping) and settings:
            return build_processor(settings, model, related=True)
    raise OSError(f"{model_id} has a preprocessor_config.json without settings.")


def build_processor(settings: Mapping[str, Any], model: nn.Module, *, related: bool = False) -> Any:
    """An image processor of transformers from the settings in an untrusted file.

    Built from plain settings, never from a folder: some classes read a file, or download one, named in a setting.

    Args:
        model: the model that images are preprocessed for; its type decides the class.
        related: also accept the class of another type of image classifier, as in converted checkpoints. Always the
            case for models without a class of their own.
    Raises:
        DataError: the file names another class, or settings that are not plain.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    own = _own_classes(model)
    chosen: Any = own[0] if own and named is None else _find_class(own, named)
    if chosen is None and (related or not own):
        chosen = _find_class(_classes_of_classifiers(), named)
    if chosen is None:
        wanted = " or ".join(dict.fromkeys(_kind(found.__name__) for found in own)) or "an image classifier's"
        raise DataError(f"its class is {shown(named)}; this base needs {wanted}.")
    arguments, unknown = processor_arguments(settings, chosen.valid_kwargs.__annotations__)
    if unknown:
        message = f"{chosen.__name__} has no such settings; they are left out: {', '.join(unknown[:5])}."
        warnings.warn(message, SurgeryWarning, stacklevel=3)
    return chosen(**arguments)


def _find_class(classes: list[type], name: object) -> type | None:
    """The class of this name, or its replacement for another backend."""
    if not isinstance(name, str):
        return None
    exact = (found for found in classes if found.__name__ == name)
    return next(exact, next((found for found in classes if _kind(found.__name__) == _kind(name)), None))


def _kind(name: str) -> str:
    """Name of a processor class without its backend suffix, also for older names."""
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _own_classes(model: nn.Module) -> list[type]:
    """Image processors registered with transformers for this type of model; the preferred one first."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    found: Any = IMAGE_PROCESSOR_MAPPING.get(type(getattr(model, "config", None)), None)  # pyright: ignore[reportArgumentType]
    return _usable(found)


def _classes_of_classifiers() -> list[type]:
    """Image processors of all image classifiers in transformers, none of which reads files."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    kinds = [CONFIG_MAPPING[name] for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    return [found for kind in kinds for found in _usable(IMAGE_PROCESSOR_MAPPING.get(kind, None))]


def _usable(registered: Any) -> list[type]:
    """Classes by backend, torchvision first. timm's wrapper is excluded: it takes only timm's settings."""
    if isinstance(registered, Mapping):
        registered = [registered.get("torchvision"), *registered.values()]
    elif not isinstance(registered, (list, tuple)):
        registered = [registered]
    known = [found for found in registered if isinstance(found, type) and not getattr(found, "is_dummy", False)]
    return [found for found in dict.fromkeys(known) if found.__name__ != "TimmWrapperImageProcessor"]


def processor_shape(model: nn.Module, model_id: str, revision: str | None) -> Shape | None:
    """(C, H, W) of the published image processor's output; None if it is not in the local cache."""
    from PIL import Image

    try:
        processor = named_processor(model, model_id, revision, cached=True)
        found = processor(Image.new("RGB", _PROBE), return_tensors="pt")["pixel_values"][0]
    except Exception:  # any failure: the configuration has a size too
        return None
    return tuple(found.shape) if isinstance(found, Tensor) and found.ndim == 3 else None
