"""Checks of untrusted image preprocessing settings: only numbers, flags and a few words, all within bounds.

The settings come from an adapter or the repository of a base. A string could name a file or repository that some class
then reads, and a size of billions would take all memory: both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ee_surgery.checks import shown
from ee_surgery.errors import DataError

LARGEST_SIDE = 4096
"""Largest side of a preprocessed image in pixels."""
_LARGEST_RESIZED = 8192  # before cropping
_USUAL_SIDE = 512  # largest default size of processor classes
_MOST_CHANNELS = 64
_LARGEST_NUMBER = 1e6
_MOST_NUMBERS, _DEEPEST = 1 << 14, 3
_NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_WORDS = {"data_format": ("channels_first", "channels_last"), "input_data_format": ("channels_first", "channels_last")}
# Other keys in processor files: the class, which the base decides (`pictures.build_processor`), and call arguments,
# which this package decides.
_NO_SETTINGS = (
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "device", "return_tensors",
)  # fmt: skip
_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


def check_preprocessing(settings: object) -> dict[str, Any]:
    """Validate settings of `timm.data.create_transform`: those of `resolve_data_config`.

    Raises:
        DataError: one of them is unknown, has the wrong type, or is out of bounds.
    """
    if not isinstance(settings, Mapping) or not settings:
        raise DataError(f"settings of timm's transforms must be an object, got {shown(settings)}.")
    unknown = [name for name in settings if name not in _TIMM]
    if unknown:
        raise DataError(f"{shown(unknown[0])} is not a setting of timm's transforms that an adapter may have.")
    size = settings.get("input_size", (3, 224, 224))
    if not _is_size(size):
        raise DataError(f"input_size must be channels, height and width of at most {LARGEST_SIDE}, got {shown(size)}.")
    for name, words in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if settings.get(name, words[0]) not in words:
            raise DataError(f"{name} must be one of {', '.join(words)}, got {shown(settings[name])}.")
    for name, lowest in (("mean", -_LARGEST_NUMBER), ("std", 1e-6)):
        values = settings.get(name, [0.5])
        if not isinstance(values, (list, tuple)) or len(values) not in (1, size[0]):
            raise DataError(f"{name} must be one number, or one per channel ({size[0]}), got {shown(values)}.")
        if not all(_is_number(value) and value >= lowest for value in values):
            raise DataError(f"{name} must be numbers from {lowest:g} to {_LARGEST_NUMBER:g}, got {shown(values)}.")
    _check_resized(size[1:], settings.get("crop_pct"))
    return dict(settings)


def processor_arguments(settings: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings of an image processor of transformers that can be passed to its class, and the names of those left out.

    Args:
        settings: content of its file.
        known: names of the settings of the class.
    Raises:
        DataError: one of them is a string, not finite, nested too deep, too long or out of bounds.
    """
    arguments, unknown = {}, []
    for name, value in settings.items():
        if value is None or name.startswith("_") or name in _NO_SETTINGS:
            continue
        if name not in known:
            unknown.append(shown(name))
            continue
        if value not in _WORDS.get(name, ()):
            _check_plain(name, value)
        arguments[name] = value
    sizes = [leaf for name, value in arguments.items() if name.endswith("size") for leaf in _leaves(value)]
    sides = [leaf for leaf in sizes if leaf is not None]
    if any(side > LARGEST_SIDE for side in sides):
        raise DataError(f"it asks for images of {max(sides):g} pixels per side; at most {LARGEST_SIDE} are allowed.")
    _check_resized(sides, arguments.get("crop_pct"))
    return arguments, unknown


def _check_plain(name: str, value: object) -> None:
    if sum(1 for _ in _leaves(value)) > _MOST_NUMBERS:
        raise DataError(f"{shown(name)} has more than {_MOST_NUMBERS} numbers.")
    _check_nested(name, value, _DEEPEST)


def _check_nested(name: str, value: object, depth: int) -> None:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        if not _is_number(value):
            raise DataError(f"{shown(name)} must be a number up to {_LARGEST_NUMBER:g}, got {shown(value)}.")
    elif isinstance(value, (list, Mapping)) and depth > 0:
        if isinstance(value, Mapping) and not all(isinstance(key, str) and _NAME.fullmatch(key) for key in value):
            raise DataError(f"{shown(name)} is {shown(value)}: its keys are not plain names.")
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_nested(name, item, depth - 1)
    else:
        kind = "nested too deep" if isinstance(value, (list, Mapping)) else f"{shown(value)}, not a number or flag"
        raise DataError(f"{shown(name)} is {kind}.")


def _leaves(value: object) -> Iterable[Any]:
    """All leaves of nested lists and objects, not only numbers."""
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, Mapping):
            stack.extend(found.values())
        elif isinstance(found, list):
            stack.extend(found)
        else:
            yield found


def _check_resized(sides: Sequence[float], crop_pct: Any) -> None:
    """Images are resized to size / crop_pct before cropping, so a tiny fraction gives a huge image."""
    if crop_pct is None:
        return
    side = max(sides, default=_USUAL_SIDE)
    if not _is_number(crop_pct) or not 0 < crop_pct <= 4 or side / crop_pct > _LARGEST_RESIZED:
        raise DataError(
            f"crop_pct must be a fraction up to 4 with which images are resized to at most {_LARGEST_RESIZED} pixels "
            f"per side, got {shown(crop_pct)}."
        )


def _is_size(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        return False
    return 0 < value[0] <= _MOST_CHANNELS and all(0 < side <= LARGEST_SIDE for side in value[1:])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER
