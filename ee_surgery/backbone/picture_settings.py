"""What a file may say about how pictures are prepared: numbers, flags and a few words, all within bounds.

Whoever wrote an adapter, or the repository of a base, chooses these settings. A setting that is a text could name a
file or a repository that some class then reads, and a size of billions would take all memory: both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ee_surgery.checks import shown
from ee_surgery.errors import DataError

LARGEST_SIDE = 4096
"""Pixels of a prepared picture along a side."""
_LARGEST_RESIZED = 8192  # and of what it is cropped from
_USUAL_SIDE = 512  # at most, of what classes take when no size is given
_MOST_CHANNELS = 64
_LARGEST_NUMBER = 1e6
_MOST_NUMBERS, _DEEPEST = 1 << 14, 3
_NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_WORDS = {"data_format": ("channels_first", "channels_last"), "input_data_format": ("channels_first", "channels_last")}
# What files of processors hold besides: which class, which the base decides (`pictures.build_processor`), and how it
# is called, which we decide.
_NO_SETTINGS = (
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "device", "return_tensors",
)  # fmt: skip
_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


def check_preprocessing(settings: object) -> dict[str, Any]:
    """Settings of `timm.data.create_transform` that can be passed on as they are: those of `resolve_data_config`.

    Raises:
        DataError: one of them is unknown, of another type, or out of bounds.
    """
    if not isinstance(settings, Mapping) or not settings:
        raise DataError(f"settings of timm's transforms are an object, not {shown(settings)}.")
    unknown = [name for name in settings if name not in _TIMM]
    if unknown:
        raise DataError(f"timm's transforms have no setting {shown(unknown[0])} that an adapter may give.")
    size = settings.get("input_size", (3, 224, 224))
    if not _is_size(size):
        raise DataError(f"input_size is {shown(size)}, not channels, height and width of at most {LARGEST_SIDE}.")
    for name, words in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if settings.get(name, words[0]) not in words:
            raise DataError(f"{name} is {shown(settings[name])}, not one of {', '.join(words)}.")
    for name, lowest in (("mean", -_LARGEST_NUMBER), ("std", 1e-6)):
        values = settings.get(name, [0.5])
        if not isinstance(values, (list, tuple)) or len(values) not in (1, size[0]):
            raise DataError(f"{name} is {shown(values)}, not one number, or one per channel ({size[0]}).")
        if not all(_is_number(value) and value >= lowest for value in values):
            raise DataError(f"{name} is {shown(values)}: numbers from {lowest:g} to {_LARGEST_NUMBER:g} are meant.")
    _check_resized(size[1:], settings.get("crop_pct"))
    return dict(settings)


def processor_arguments(settings: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings of an image processor of transformers that can be passed to its class, and the names of those left out.

    Args:
        settings: what its file holds.
        known: names of the settings that the class has.
    Raises:
        DataError: one of those that it has is a text, not finite, nested too deep, too long or out of bounds.
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
        raise DataError(f"it asks for pictures of {max(sides):g} pixels along a side; {LARGEST_SIDE} are the most.")
    _check_resized(sides, arguments.get("crop_pct"))
    return arguments, unknown


def _check_plain(name: str, value: object) -> None:
    if sum(1 for _ in _leaves(value)) > _MOST_NUMBERS:
        raise DataError(f"{shown(name)} holds more than {_MOST_NUMBERS} numbers.")
    _check_nested(name, value, _DEEPEST)


def _check_nested(name: str, value: object, depth: int) -> None:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        if not _is_number(value):
            raise DataError(f"{shown(name)} is {shown(value)}: numbers up to {_LARGEST_NUMBER:g} are meant.")
    elif isinstance(value, (list, Mapping)) and depth > 0:
        if isinstance(value, Mapping) and not all(isinstance(key, str) and _NAME.fullmatch(key) for key in value):
            raise DataError(f"{shown(name)} is {shown(value)}: its keys are no plain names.")
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_nested(name, item, depth - 1)
    else:
        kind = "nested too deep" if isinstance(value, (list, Mapping)) else f"{shown(value)}, no number or flag"
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
    """Pictures are resized to the size over the fraction that is cropped out, so a tiny fraction is a huge picture."""
    if crop_pct is None:
        return
    side = max(sides, default=_USUAL_SIDE)
    if not _is_number(crop_pct) or not 0 < crop_pct <= 4 or side / crop_pct > _LARGEST_RESIZED:
        raise DataError(
            f"crop_pct is {shown(crop_pct)}: a fraction up to 4 is meant, with which pictures are resized to at most "
            f"{_LARGEST_RESIZED} pixels along a side."
        )


def _is_size(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        return False
    return 0 < value[0] <= _MOST_CHANNELS and all(0 < side <= LARGEST_SIDE for side in value[1:])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER
