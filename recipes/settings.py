"""Settings of `recipes.train`: a YAML file, validated against dataclasses."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

import ee_surgery as ee
from ee_surgery.presets import PRESETS
from ee_surgery.registry import suggest


@dataclass(frozen=True, kw_only=True)
class Model:
    """The original."""

    name: str
    """timm architecture, transformers id, or with `cifar10` a network of recipes/data.py such as `cifar10_resnet56`."""
    library: Literal["timm", "transformers", "cifar10"] = "timm"
    pretrained: bool = True
    checkpoint: str = ""
    """Weights file for a timm model, instead of its pretrained ones."""
    num_classes: int | None = None
    """Of a timm model, if different from its own."""
    image_size: int | None = None
    """Side of the images for a timm model, if different from its own."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data. A part of it is a split, `test`, or a range of one in a fixed random order, `test[:50%]`."""

    source: str = ""
    """Data set on the Hub, folder of images or parquet files, folder of npz files, or `synthetic`; as `--data`."""
    train: str = "train"
    calibrate: str = "test[:50%]"
    """Neither trained on nor reported."""
    test: str = "test[50%:]"
    image: str = ""
    """Column of the images; by default the first of that type."""
    label: str = ""
    """Column of the classes; by default the first of that type."""
    augment: bool = False
    """Augment the training images."""


@dataclass(frozen=True, kw_only=True)
class Operate:
    """How to choose the operating point that is evaluated and saved; without any, no early exit."""

    max_accuracy_drop: float | None = None
    budget: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings; those of a preset apply unless overridden."""

    model: Model
    data: Source = field(default_factory=Source)
    preset: str | None = None
    exits: int | str | list[str] | None = None
    """`auto`: by search, for the accuracy drop in `operate`, by default one point."""
    placement: str | None = None
    branch: str | ee.BranchSpec | list[str] | None = None
    joint: bool = False
    """Also train the original, on a copy."""
    train: ee.TrainConfig = field(default_factory=ee.TrainConfig)
    operate: Operate = field(default_factory=Operate)
    out: str = "runs/train"
    """Folder of the adapter, the report and the metrics of each epoch, `log.jsonl`."""
    push: str | None = None
    """Repository on the Hub."""
    log_with: list[str] = field(default_factory=list)
    """Additional trackers of Accelerate, such as `tensorboard`."""


def load(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML file.

    Args:
        changes: settings that override the file's, such as `train.epochs=2`.
    Raises:
        ConfigError: the file cannot be read, a name is unknown or missing, or a value has the wrong type.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ee.ConfigError(f"{path} cannot be read: {error}") from error
    for change in changes:
        _set(given, change)
    if isinstance(given, Mapping):
        preset = given.get("preset")
        base = PRESETS[preset].config if isinstance(preset, str) else ee.TrainConfig()
        given = {**given, "train": replace(base, **_checked(ee.TrainConfig, given.get("train") or {}, "train"))}
    return Recipe(**_checked(Recipe, given, path.name))


def _set(settings: Any, change: str) -> None:
    name, equals, text = change.partition("=")
    *sections, last = name.split(".")
    for section in sections:
        if isinstance(settings, dict):
            settings[section] = settings.get(section) or {}
            settings = settings[section]
    if not equals or not isinstance(settings, dict):
        raise ee.ConfigError(f"A change must look like section.name=value, got {change!r}.")
    settings[last] = yaml.safe_load(text)


def _checked(cls: type, given: Any, where: str) -> dict[str, Any]:
    """Settings of a dataclass, converted to the types of its fields."""
    if not isinstance(given, Mapping):
        raise ee.ConfigError(f"{where} must be a mapping of settings, got {given!r}.")
    hints = get_type_hints(cls)
    for name in given:
        if name not in hints:
            raise ee.ConfigError(f"{where} has no setting {name!r}. {suggest(str(name), hints)}")
    for one in fields(cls):
        if one.name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise ee.ConfigError(f"{where} lacks the setting {one.name!r}.")
    return {name: _typed(value, hints[name], f"{where}: {name}") for name, value in given.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value converted to a type hint; YAML has lists instead of tuples, and reads 1e-3 as text."""
    kind, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return value if isinstance(value, hint) else hint(**_checked(hint, value or {}, where))
    if kind in (Union, types.UnionType):
        named = [option for option in inner if is_dataclass(option)]
        if isinstance(value, Mapping) and named:
            return _typed(value, named[0], where)
        for option in inner:
            if not is_dataclass(option):
                with suppress(ee.ConfigError):
                    return _typed(value, option, where)
    elif kind is Literal and value in inner:
        return value
    elif kind in (tuple, list) and isinstance(value, list):
        return kind(_typed(item, inner[0], where) for item in value)
    elif kind is Mapping and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    shown = re.sub(r"<class '(.*)'>", r"\1", str(hint)).replace("typing.", "").replace("NoneType", "None")
    raise ee.ConfigError(f"{where} must be {shown}, got {value!r}, a {type(value).__name__}.")
