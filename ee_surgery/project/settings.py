"""Settings of `ee-surgery train`: a YAML file, checked against dataclasses by pydantic."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ee_surgery.branches import BranchSpec
from ee_surgery.errors import ConfigError, SurgeryError
from ee_surgery.presets import PRESETS
from ee_surgery.registry import suggest
from ee_surgery.training.config import TrainConfig

_STRICT = ConfigDict(extra="forbid", strict=True)  # holds for the dataclasses of the package inside a recipe, too
_UNKNOWN, _MISSING = "unexpected_keyword_argument", "missing"  # what pydantic calls these errors


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Model:
    """The original."""

    name: str
    """timm architecture, or transformers id or folder."""
    library: str = "timm"
    """`timm`, `transformers`, or another one that the program knows which reads the file."""
    pretrained: bool = True
    checkpoint: str = ""
    """Weights file for a timm model, instead of its pretrained ones."""
    num_classes: int | None = None
    """Of a timm model, if different from its own."""
    image_size: int | None = None
    """Side of the images for a timm model, if different from its own."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Source:
    """The data. A part of it is a split, `test`, or a range of one in a fixed random order, `test[:50%]`."""

    source: str = ""
    """Data set on the Hub, folder of images or parquet files, or `synthetic`; as `--data`."""
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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Operate:
    """How to choose the operating point that is evaluated and saved; without any, no early exit."""

    max_accuracy_drop: float | None = None
    budget: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Project:
    """All settings; those of a preset apply unless overridden."""

    model: Model
    data: Source = field(default_factory=Source)
    preset: str | None = None
    exits: int | str | list[str] | None = None
    """`auto`: by search, for the accuracy drop in `operate`, by default one point."""
    placement: str | None = None
    branch: str | BranchSpec | list[str] | None = None
    joint: bool = False
    """Also train the original, on a copy."""
    train: TrainConfig = field(default_factory=TrainConfig)
    operate: Operate = field(default_factory=Operate)
    out: str = "runs/train"
    """Folder of the adapter, the report and the metrics of each epoch, `log.jsonl`."""
    push: str | None = None
    """Repository on the Hub."""
    log_with: list[str] = field(default_factory=list)
    """Additional trackers of Accelerate, such as `tensorboard`."""


class _Loader(yaml.SafeLoader):
    """YAML as most people write it: 1e-3 is a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: Path, changes: Sequence[str] = ()) -> Project:
    """Read a YAML file.

    Args:
        changes: settings that override the file's, such as `train.epochs=2`.
    Raises:
        ConfigError: the file cannot be read, a name is unknown or missing, or a value has the wrong type.
    """
    try:
        given = yaml.load(path.read_text(), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for change in changes:
        _set(given, change)
    if isinstance(given, Mapping):
        given = {name: {} if name in ("data", "operate") and value is None else value for name, value in given.items()}
        preset, train = given.get("preset"), given.get("train") or {}
        base = PRESETS[preset].config if isinstance(preset, str) else TrainConfig()
        given["train"] = {**asdict(base), **train} if isinstance(train, Mapping) else train
    try:  # as JSON, where lists stand for tuples and objects for dataclasses, and nothing else is converted
        return TypeAdapter(Project).validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        raise _explained(error, given, path.name) from error


def _set(settings: Any, change: str) -> None:
    name, equals, text = change.partition("=")
    *sections, last = name.split(".")
    for section in sections:
        if isinstance(settings, dict):
            settings[section] = settings.get(section) or {}
            settings = settings[section]
    if not equals or not isinstance(settings, dict):
        raise ConfigError(f"A change must look like section.name=value, got {change!r}.")
    settings[last] = yaml.load(text, _Loader)


def _explained(error: ValidationError, given: Any, file: str) -> SurgeryError:
    """The first thing that is wrong, as an error of ours: where it stands, what it must be and what was seen."""
    found = error.errors(include_url=False)
    first = next((each for each in found if each["type"] in (_UNKNOWN, _MISSING)), found[0])
    if isinstance(cause := first.get("ctx", {}).get("error"), SurgeryError):
        return cause
    *parts, last = first["loc"] or [None]
    if first["type"] not in (_UNKNOWN, _MISSING):
        parts.append(last)
    where, hint, value, known = file, Project, given, get_type_hints(Project)
    for part in parts:
        if part in known:  # else the member of a union that was tried, or the place in a list
            where, hint, value = f"{where}: {part}", known[part], value[part]
            dataclasses = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
            known = get_type_hints(dataclasses[0]) if dataclasses else {}
    if first["type"] == _UNKNOWN:
        return ConfigError(f"{where} has no setting {last!r}. {suggest(str(last), known)}")
    if first["type"] == _MISSING:
        return ConfigError(f"{where} lacks the setting {last!r}.")
    if is_dataclass(hint):
        return ConfigError(f"{where} must be a mapping of settings, got {value!r}.")
    shown = re.sub(r"<class '(.*)'>", r"\1", str(hint)).replace("typing.", "").replace("NoneType", "None")
    return ConfigError(f"{where} must be {shown}, got {value!r}, a {type(value).__name__}.")
