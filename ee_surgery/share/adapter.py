"""Plain data <-> an adapter folder.

    config.json               who the base is, where the exits are, which branches, the operating point
    ee_adapter.safetensors    tensors of the branches alone
    frontier.json             every operating point that calibration found
    preprocessor_config.json  the image processor of a transformers base, where it was at hand
    base.safetensors          only where the base was trained along, and so exists nowhere else

`config.json` is the manifest: it lists the SHA-256 of every file, and all of them change with it; see `files`.

Not `adapter_config.json`: a repository with a file of that name which PEFT cannot read breaks
`AutoModel.from_pretrained`.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
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
from ee_surgery.files import FolderChange, change_folder, explained, listed, locate, read_consistently, sha256
from ee_surgery.graph.points import ExitPoint
from ee_surgery.inputs import Arguments, tensors
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint
from ee_surgery.share.probe import InputSpec, Probe

FORMAT_VERSION = 2
CONFIG, WEIGHTS, FRONTIER, BASE = "config.json", "ee_adapter.safetensors", "frontier.json", "base.safetensors"
CARD, PLOT, RESULTS = "README.md", "assets/frontier.png", ".eval_results/ee_surgery.yaml"
PROCESSOR = "preprocessor_config.json"
"""Where transformers looks for an image processor. timm's settings are in the adapter's own `config.json`."""
# What other libraries load from a folder, by name: beside our `config.json` they would find these no longer.
_WEIGHTS_OF_OTHERS = ("model*.safetensors*", "pytorch_model*.bin*", "tf_model.h5", "flax_model.msgpack", "open_clip*")
# And what they would find first, whatever `config.json` says.
_ADAPTERS_OF_OTHERS = ("adapter_config.json", "adapter_model.*")


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
    probe: Probe | None = None
    """What the base computes; None for one that cannot be asked, and in adapters from before there were probes."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the folder that it was read from, by name."""

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
        point, self_without = self.operating_point, replace(self, operating_point=None, files={})
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
            probe=Probe.from_dict(data["probe"]) if data.get("probe") else None,
            files=listed(data),
        )


@contextmanager
def change_adapter(folder: Path) -> Iterator[FolderChange]:
    """Change the files of an adapter folder, all at once or not at all; see `change_folder`.

    Raises:
        AdapterError: the folder holds a model that is not an adapter of ours, or cannot be written.
    """
    change = None
    try:
        _refuse_others(folder)
        with change_folder(folder, CONFIG) as change:
            if change.data and not change.before:  # of a version without digests
                change.before = {name: sha256(folder / name) for name in _READ if (folder / name).exists()}
                change.kept = dict(change.before)
            yield change
    except (OSError, SafetensorError) as error:
        if change is not None and change.committed:
            raise AdapterError(
                f"{folder} is saved, but not all of its files are in their places yet: {explained(error)} Then save it "
                "again."
            ) from error
        raise AdapterError(f"{folder} could not be written, and is as it was: {explained(error)}") from error


def _refuse_others(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    try:
        config = (folder / CONFIG).read_bytes() if CONFIG in names else None
    except OSError:
        config = b""
    if (found := of_others(names, config)) is not None:
        raise AdapterError(
            f"{folder} holds {found}, which is not of an ee_surgery adapter: saved beside it, the adapter would make "
            "that model unreadable. Save into a folder of its own."
        )


def of_others(names: Iterable[str], config: bytes | None) -> str | None:
    """The file that makes a folder or repository another model's than an adapter of ours; None where there is none.

    Args:
        names: of all files there.
        config: its `config.json`, where it has one.
    """
    names = sorted(name for name in names if "/" not in name)
    if (found := _first(names, _ADAPTERS_OF_OTHERS)) is not None:
        return found
    if config is None:
        return None if WEIGHTS in names else _first(names, _WEIGHTS_OF_OTHERS)
    try:
        data = json.loads(config)
    except ValueError:
        data = None
    if isinstance(data, dict):
        return None if data.get("model_type") == "ee_surgery" else CONFIG
    return None if WEIGHTS in names else CONFIG  # one of ours that was damaged may be saved again


def _first(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    return next((name for name in names if any(fnmatch(name, pattern) for pattern in patterns)), None)


def save_adapter(
    change: FolderChange,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    frontier: Frontier | None,
    base: nn.Module | None = None,
) -> None:
    """Write an adapter, in place of whatever was saved in its folder before.

    Args:
        base: a base that is to be stored along, because it exists nowhere else.
    """
    policies: dict[str, Tensor] = {}
    described = without_tensors(config.to_dict(), policies)
    traced = None if frontier is None else without_tensors(frontier.to_dict(), policies)
    stored = {name: t.detach().cpu().contiguous() for name, t in {**tensors, **policies}.items()}
    meta = {"format_version": str(FORMAT_VERSION), "fingerprint": config.base.fingerprint}
    save_file(stored, change.place(WEIGHTS), metadata=meta)
    _sort_metadata(change.place(WEIGHTS))
    if base is not None:
        save_model(base, str(change.place(BASE)))
    if traced is not None:
        change.place(FRONTIER).write_text(json.dumps(traced, indent=1) + "\n", encoding="utf-8")
    change.data = described
    change.kept.clear()
    change.stray |= {FRONTIER, BASE, PLOT, RESULTS}


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
_READ = (WEIGHTS, FRONTIER, BASE)
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
    if data.get("probe"):
        config["probe"] = _known(Probe, data["probe"], "probe", unknown)
    config["inputs"] = {name: _known(InputSpec, spec, "inputs", unknown) for name, spec in data["inputs"].items()}
    exits = [_known(AdapterExit, exit, "exits", unknown) for exit in data["exits"]]
    config["exits"] = [
        {**exit, "branch": _known(BranchSpec, exit["branch"], "exits.branch", unknown)} for exit in exits
    ]
    if data["operating_point"]:
        config["operating_point"] = _known(OperatingPoint, data["operating_point"], "operating_point", unknown)
    return config


def load_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], Frontier | None]:
    """Read an adapter folder, while others may be saving into it.

    Raises:
        AdapterError: a file is missing, damaged, of another format, or the files do not belong together.
    """
    if not folder.is_dir():
        raise AdapterError(f"No adapter folder at {folder}. A local folder written by save_pretrained is expected.")
    config, stored, frontier, unknown = read_consistently(folder / CONFIG, lambda: _read_adapter(folder))
    if not config.files:
        warnings.warn(
            f"{folder} was saved by a version that kept no digests of its files, so that a mixture of two adapters "
            "cannot be told. Save it again.",
            stacklevel=3,
        )
    if unknown:
        newer = sorted(set(unknown))
        warnings.warn(f"{folder} holds what this version does not know, and leaves out: {newer}.", stacklevel=3)
    return config, stored, frontier


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an adapter folder as it is.

    Raises:
        AdapterError: it is missing, damaged, of another format, or of another kind of model.
    """
    data = _read_json(folder / CONFIG)
    kind, written = data.get("model_type"), data.get("format_version")
    if kind != "ee_surgery" or written != FORMAT_VERSION:
        newer = isinstance(written, int) and written > FORMAT_VERSION
        raise AdapterError(
            f"{folder / CONFIG} is of type {kind!r}, format {written!r}; this version reads type 'ee_surgery', format "
            f"{FORMAT_VERSION}.{' A newer ee-surgery wrote it: upgrade with pip.' if newer else ''}"
        )
    return data


def own_files(folder: Path) -> dict[str, Path]:
    """The adapter's own files by name, and where they lie: nothing else that may be in the folder.

    Raises:
        AdapterError: see `load_adapter`; a file that was replaced is named.
    """
    files = listed(read_config(folder))
    found = {CONFIG: folder / CONFIG}
    names = {*files, CARD, PROCESSOR} if files else {WEIGHTS, FRONTIER, BASE, PROCESSOR, CARD, PLOT, RESULTS}
    for name in sorted(names):
        path = find_file(folder, name, files) if name in _READ else locate(folder / CONFIG, name, files)
        path = path or folder / name  # a card, or a processor, that was changed by hand
        if path.is_file():
            found[name] = path
    return found


def find_file(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Where a file of an adapter lies: the very one that `config.json` lists.

    Raises:
        AdapterError: it is another one, or missing.
    """
    path = locate(folder / CONFIG, name, files)
    if path is None and name in files and (folder / name).exists():
        raise AdapterError(
            f"{folder / name} is not the file that {CONFIG} lists (another SHA-256): it was edited, comes from another "
            "save, or has missing or damaged parts. Save the adapter again."
        )
    return path or folder / name


def _read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], Frontier | None, list[str]]:
    data = read_config(folder)
    files = listed(data)
    try:
        with safe_open(find_file(folder, WEIGHTS, files), framework="pt") as file:
            meta = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, RuntimeError) as error:
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
    # One that is not listed is left from an interrupted save; before there were lists, its being there was the list.
    if FRONTIER in files or (not files and (folder / FRONTIER).exists()):
        try:
            traced = _read_json(find_file(folder, FRONTIER, files))
            traced["points"] = [_known(OperatingPoint, point, "points", unknown) for point in traced["points"]]
            frontier = Frontier.from_dict(_with_tensors(traced, stored))
        except (DataError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{folder / FRONTIER} is damaged: {error}") from error
    return config, {name: t for name, t in stored.items() if not name.startswith(_POLICY)}, frontier, unknown


def load_base(folder: Path, model: nn.Module, files: Mapping[str, str]) -> None:
    """Fill a model with the base that is stored in the folder.

    Args:
        files: what `config.json` listed when the branches were read.
    Raises:
        AdapterError: the file is missing or damaged, another one by now, or the model is of another shape.
    """
    try:
        load_model(model, find_file(folder, BASE, files))
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
