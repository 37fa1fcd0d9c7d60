"""Plain data <-> an adapter folder.

    config.json               who the base is, where the exits are, which branches, the operating point
    ee_adapter.safetensors    tensors of the branches alone
    frontier.json             every operating point that calibration found

Not `adapter_config.json`: a repository with a file of that name which PEFT cannot read breaks
`AutoModel.from_pretrained`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_surgery.backbone import Identity
from ee_surgery.branches.base import BranchSpec
from ee_surgery.errors import AdapterError, DataError
from ee_surgery.graph.points import ExitPoint
from ee_surgery.inputs import Arguments, tensors
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint

FORMAT_VERSION = 2
CONFIG, WEIGHTS, FRONTIER = "config.json", "ee_adapter.safetensors", "frontier.json"


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
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        data = asdict(self)
        data["operating_point"] = self.operating_point.to_dict() if self.operating_point else None
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
        )


def save_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], frontier: Frontier | None) -> Path:
    """Write an adapter folder. Each file is written beside its place and then renamed, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format_version": str(FORMAT_VERSION), "fingerprint": config.base.fingerprint}
    partial = folder / f"{WEIGHTS}.partial"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata=meta)
    os.replace(partial, folder / WEIGHTS)
    if frontier is not None:
        frontier.save(folder / FRONTIER)
    else:
        (folder / FRONTIER).unlink(missing_ok=True)
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(config.to_dict(), indent=2, default=_plain) + "\n")
    os.replace(partial, folder / CONFIG)
    return folder


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Cannot store a {type(value).__name__} as JSON")


def load_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], Frontier | None]:
    """Read an adapter folder.

    Raises:
        AdapterError: a file is missing, damaged, of another format, or the files do not belong together.
    """
    if not folder.is_dir():
        raise AdapterError(f"No adapter folder at {folder}. A local folder written by save_pretrained is expected.")
    data = _read_json(folder / CONFIG)
    if data.get("model_type") != "ee_surgery" or data.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{folder / CONFIG} is of type {data.get('model_type')!r}, format {data.get('format_version')!r}; this "
            f"version reads type 'ee_surgery', format {FORMAT_VERSION}."
        )
    try:
        config = AdapterConfig.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is damaged: {error!r}. Save the adapter again.") from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is missing or damaged: {error}. Save the adapter again.") from error
    if meta.get("fingerprint") != config.base.fingerprint or meta.get("format_version") != str(FORMAT_VERSION):
        raise AdapterError(
            f"{WEIGHTS} and {CONFIG} in {folder} do not belong together: fingerprints {meta.get('fingerprint')} and "
            f"{config.base.fingerprint}. One of them was replaced or edited; save the adapter again."
        )
    frontier = None
    if (folder / FRONTIER).exists():
        try:
            frontier = Frontier.from_dict(_read_json(folder / FRONTIER))
        except DataError as error:
            raise AdapterError(f"{folder / FRONTIER} is damaged: {error}") from error
    return config, tensors, frontier


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
