"""Plain data <-> an adapter folder.

    config.json               who the base is, where the exits are, which branches, the operating point
    ee_adapter.safetensors    tensors of the branches alone
    frontier.json             every operating point that calibration found
    preprocessor_config.json  the image processor of a transformers base, where it was at hand
    base.safetensors          only where the base was trained along, and so exists nowhere else

Not `adapter_config.json`: a repository with a file of that name which PEFT cannot read breaks
`AutoModel.from_pretrained`.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from ee_surgery.backbone import Identity
from ee_surgery.branches.base import BranchSpec
from ee_surgery.errors import AdapterError, DataError
from ee_surgery.graph.points import ExitPoint
from ee_surgery.inputs import Arguments, tensors
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint

FORMAT_VERSION = 2
CONFIG, WEIGHTS, FRONTIER, BASE = "config.json", "ee_adapter.safetensors", "frontier.json", "base.safetensors"


@dataclass(frozen=True)
class InputSpec:
    """One input tensor as it is stored: enough to make one like it."""

    shape: tuple[int, ...]
    """Of four samples."""
    dtype: str
    highest: int
    """Largest value of integers; 0 for other types."""

    @classmethod
    def of(cls, tensor: Tensor) -> InputSpec:
        """Describe a tensor."""
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        highest = int(tensor.max()) if whole and not tensor.is_meta else 0
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), highest)

    def make(self, generator: torch.Generator) -> Tensor:
        """A tensor of that kind: normal numbers, or integers from 1 to the highest."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(dtype)
        lowest = min(1, self.highest)
        return torch.randint(lowest, self.highest + 1, self.shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class AdapterExit:
    """One exit as it is stored."""

    name: str
    node: str
    shape: tuple[int, ...]
    layout: str
    branch: BranchSpec
    trunk_macs: int
    branch_macs: int


@dataclass(frozen=True)
class AdapterConfig:
    """Everything about the branches that is not a tensor."""

    base: Identity
    inputs: dict[str, InputSpec]
    """What it was augmented with, by name."""
    options: dict[str, Any]
    """What else it was called with: flags, numbers, words."""
    opaque: tuple[str, ...]
    """Modules of the base that are kept whole."""
    head_classes: int | None
    """Classes of the head that is stored along, for a base that has none of its own."""
    placement: str
    base_macs: int
    exits: tuple[AdapterExit, ...]
    operating_point: OperatingPoint | None
    label_names: list[str] | None
    versions: dict[str, str]
    own_base: bool = False
    """Whether the base was trained along with the branches, and its weights are stored with them."""
    preprocessing: dict[str, Any] | None = None
    """What timm's `create_transform` takes, for a timm base."""
    output: int | str | tuple[int | str, ...] | None = None
    """Which part of the base's answer the logits are, where the user had to say."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the branches come from; see `EarlyExitModel.provenance`."""

    @classmethod
    def of(
        cls,
        *,
        identity: Identity,
        inputs: Arguments,
        opaque: Sequence[str],
        head_classes: int | None,
        points: Sequence[ExitPoint],
        specs: Sequence[BranchSpec],
        rule: str,
        trunk_macs: Sequence[int],
        branch_macs: Sequence[int],
        operating_point: OperatingPoint | None,
        label_names: list[str] | None,
        own_base: bool,
        preprocessing: dict[str, Any] | None,
        output: int | str | tuple[int | str, ...] | None,
        provenance: dict[str, Any],
    ) -> AdapterConfig:
        """Gather the parts of a branched model."""
        exits = tuple(
            AdapterExit(point.name, point.node, point.shape, point.layout, spec, trunk, own)
            for point, spec, trunk, own in zip(points, specs, trunk_macs[:-1], branch_macs, strict=True)
        )
        packages = ("ee-surgery", "torch", "timm", "transformers")
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        given = {name: InputSpec.of(tensor) for name, tensor in tensors(inputs).items()}
        return cls(
            base=identity,
            inputs=given,
            options={name: value for name, value in inputs.items() if name not in given},
            opaque=tuple(opaque),
            head_classes=head_classes,
            placement=rule,
            base_macs=trunk_macs[-1],
            exits=exits,
            operating_point=operating_point,
            label_names=label_names,
            versions=versions,
            own_base=own_base,
            preprocessing=preprocessing,
            output=output,
            provenance=provenance,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        point, self_without = self.operating_point, replace(self, operating_point=None)
        data = {**asdict(self_without), "operating_point": point.to_dict() if point else None}
        if self.preprocessing is not None:  # for AutoImageProcessor, which looks here and so for timm's own models
            data |= {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": self.preprocessing}
        return {"model_type": "ee_surgery", "format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterConfig:
        """What `to_dict` gave, after a passage through JSON."""
        point = data["operating_point"]
        exits = tuple(
            AdapterExit(**{**e, "shape": tuple(e["shape"]), "branch": BranchSpec(**e["branch"])}) for e in data["exits"]
        )
        return cls(
            base=Identity(**data["base"]),
            inputs={
                name: InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for name, spec in data["inputs"].items()
            },
            options=data["options"],
            opaque=tuple(data["opaque"]),
            head_classes=data["head_classes"],
            placement=data["placement"],
            base_macs=data["base_macs"],
            exits=exits,
            operating_point=OperatingPoint.from_dict(point) if point else None,
            label_names=data["label_names"],
            versions=data["versions"],
            own_base=data.get("own_base", False),
            preprocessing=data.get("preprocessing"),
            output=tuple(output) if isinstance(output := data.get("output"), list) else output,
            provenance=data.get("provenance", {}),
        )


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    frontier: Frontier | None,
    base: nn.Module | None = None,
) -> Path:
    """Write an adapter folder; all of it or, on an error, nothing.

    Args:
        base: a base that is to be stored along, because it exists nowhere else.
    Raises:
        AdapterError: see `whole_files`.
    """
    policies: dict[str, Tensor] = {}
    described = without_tensors(config.to_dict(), policies)
    traced = None if frontier is None else without_tensors(frontier.to_dict(), policies)
    stored = {name: t.detach().cpu().contiguous() for name, t in {**tensors, **policies}.items()}
    meta = {"format_version": str(FORMAT_VERSION), "fingerprint": config.base.fingerprint}
    with whole_files(folder) as place:
        save_file(stored, place(WEIGHTS), metadata=meta)
        _sort_metadata(place(WEIGHTS))
        if base is not None:
            save_model(base, str(place(BASE)))
        if traced is not None:
            place(FRONTIER).write_text(json.dumps(traced, indent=1) + "\n")
        place(CONFIG).write_text(json.dumps(described, indent=1) + "\n")
    if traced is None:
        (folder / FRONTIER).unlink(missing_ok=True)
    return folder


@contextmanager
def whole_files(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Where to write files of these names: beside their places, which all of them take at the end, or none.

    Raises:
        AdapterError: the folder cannot be written, or is on a full disk; it is as it was then.
    """
    partial: dict[str, Path] = {}

    def place(name: str) -> Path:
        partial[name] = folder / f"{name}.partial"
        return partial[name]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield place
        for name, path in partial.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder} could not be written, and is as it was: {error}") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of the keys."""
    # It is written in another order each time; equal adapters shall be equal files, which the Hub need not store again.
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def without_tensors(value: Any, found: dict[str, Tensor]) -> Any:
    """Plain data with a name in place of each tensor, which goes to `found`; the same tensor once."""
    if isinstance(value, Tensor):
        name = next((name for name, tensor in found.items() if tensor is value), f"{_POLICY}{len(found)}")
        found[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: without_tensors(item, found) for key, item in value.items()}
    return [without_tensors(item, found) for item in value] if isinstance(value, (list, tuple)) else value


def _with_tensors(value: Any, stored: Mapping[str, Tensor]) -> Any:
    """What `without_tensors` was given."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return stored[value[_TENSOR]]
        return {key: _with_tensors(item, stored) for key, item in value.items()}
    return [_with_tensors(item, stored) for item in value] if isinstance(value, list) else value


_TENSOR, _POLICY = "tensor", "policy."
_FOR_OTHERS = ("model_type", "format_version", "image_processor_type", "pretrained_cfg")


def _known(kind: type, data: Mapping[str, Any], where: str, unknown: list[str]) -> dict[str, Any]:
    """The fields of a dataclass in plain data that a newer version may have written; names of others to `unknown`."""
    names = {field.name for field in fields(kind)}
    unknown.extend(f"{where}.{key}".removeprefix(".") for key in data if key not in names)
    return {key: value for key, value in data.items() if key in names}


def _known_config(data: Mapping[str, Any], unknown: list[str]) -> dict[str, Any]:
    own = {key: value for key, value in data.items() if key not in _FOR_OTHERS}
    config = _known(AdapterConfig, own, "", unknown)
    config["base"] = _known(Identity, data["base"], "base", unknown)
    config["inputs"] = {name: _known(InputSpec, spec, "inputs", unknown) for name, spec in data["inputs"].items()}
    exits = [_known(AdapterExit, exit, "exits", unknown) for exit in data["exits"]]
    config["exits"] = [
        {**exit, "branch": _known(BranchSpec, exit["branch"], "exits.branch", unknown)} for exit in exits
    ]
    if data["operating_point"]:
        config["operating_point"] = _known(OperatingPoint, data["operating_point"], "operating_point", unknown)
    return config


def load_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], Frontier | None]:
    """Read an adapter folder.

    Raises:
        AdapterError: a file is missing, damaged, of another format, or the files do not belong together.
    """
    if not folder.is_dir():
        raise AdapterError(f"No adapter folder at {folder}. A local folder written by save_pretrained is expected.")
    data = _read_json(folder / CONFIG)
    kind, written = data.get("model_type"), data.get("format_version")
    if kind != "ee_surgery" or written != FORMAT_VERSION:
        newer = isinstance(written, int) and written > FORMAT_VERSION
        raise AdapterError(
            f"{folder / CONFIG} is of type {kind!r}, format {written!r}; this version reads type 'ee_surgery', format "
            f"{FORMAT_VERSION}.{' A newer ee-surgery wrote it: upgrade with pip.' if newer else ''}"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            meta = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is missing or damaged: {error}. Save the adapter again.") from error
    unknown: list[str] = []
    try:
        config = AdapterConfig.from_dict(_with_tensors(_known_config(data, unknown), stored))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is damaged: {error!r}. Save the adapter again.") from error
    if meta.get("fingerprint") != config.base.fingerprint or meta.get("format_version") != str(FORMAT_VERSION):
        raise AdapterError(
            f"{WEIGHTS} and {CONFIG} in {folder} do not belong together: fingerprints {meta.get('fingerprint')} and "
            f"{config.base.fingerprint}. One of them was replaced or edited; save the adapter again."
        )
    frontier = None
    if (folder / FRONTIER).exists():
        try:
            traced = _read_json(folder / FRONTIER)
            traced["points"] = [_known(OperatingPoint, point, "points", unknown) for point in traced["points"]]
            frontier = Frontier.from_dict(_with_tensors(traced, stored))
        except (DataError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{folder / FRONTIER} is damaged: {error}") from error
    if unknown:
        newer = sorted(set(unknown))
        warnings.warn(f"{folder} holds what this version does not know, and leaves out: {newer}.", stacklevel=3)
    return config, {name: t for name, t in stored.items() if not name.startswith(_POLICY)}, frontier


def load_base(folder: Path, model: nn.Module) -> None:
    """Fill a model with the base that is stored in the folder.

    Raises:
        AdapterError: the file is missing or damaged, or the model is of another shape.
    """
    try:
        load_model(model, folder / BASE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"{folder / BASE} does not fit a {type(model).__name__}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is missing or damaged: {error}. Save the adapter again.") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, not an object. Save the adapter again.")
    return data


def check_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    """Compare names and shapes of stored tensors with those of the branches they are for.

    Raises:
        AdapterError: they differ; the damage is named.
    """
    for name, tensor in expected.items():
        if name not in stored:
            raise AdapterError(f"{folder / WEIGHTS} holds no tensor {name!r} that the branches need.")
        if stored[name].shape != tensor.shape:
            raise AdapterError(
                f"{folder / WEIGHTS}: {name!r} has shape {tuple(stored[name].shape)}, the branch {tuple(tensor.shape)}."
            )
        if not torch.isfinite(stored[name].double()).all():
            raise AdapterError(f"{folder / WEIGHTS}: {name!r} holds values that are not finite.")
    extra = sorted(stored.keys() - expected.keys())
    if extra:
        raise AdapterError(f"{folder / WEIGHTS} holds tensors that no branch takes: {extra[:5]}.")
