"""Plain data <-> an adapter folder.

    config.json               identity of the base, exits, branches, operating point
    ee_adapter.safetensors    tensors of the branches only
    frontier.json             every operating point that calibration found
    preprocessor_config.json  the image processor of a transformers base, if available
    base.safetensors          only if the base was trained too: its weights exist nowhere else

`config.json` is the manifest: it lists the SHA-256 of every file and of itself, and replacing it commits a save; see
`files`. `schema` defines what the JSON files may contain.

Not `adapter_config.json`: a repository with a file of that name which PEFT cannot read breaks
`AutoModel.from_pretrained`.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from ee_surgery.backbone.base import Identity
from ee_surgery.backbone.inputs import tensors
from ee_surgery.backbone.pictures import processor_settings
from ee_surgery.branches.base import BranchSpec
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import shown
from ee_surgery.errors import AdapterError, SurgeryWarning
from ee_surgery.files import (
    DIGEST,
    JSON_LIMIT,
    LISTED,
    FolderChange,
    by_hand,
    change_folder,
    explained,
    listed,
    locate,
    read_bytes,
    read_consistently,
    sealed,
    sha256,
)
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.scores import for_task
from ee_surgery.runtime.engine import Engine
from ee_surgery.share.json_files import FORMAT_VERSION, OLD_FORMAT, check_size, read_json
from ee_surgery.share.probe import InputSpec, Probe
from ee_surgery.share.state import AdapterState
from ee_surgery.share.weights import POLICY, TENSOR, Weights
from ee_surgery.task import CLASSIFICATION, TASKS

CONFIG, WEIGHTS, FRONTIER, BASE = "config.json", "ee_adapter.safetensors", "frontier.json", "base.safetensors"
CARD, PLOT, RESULTS = "README.md", "assets/frontier.png", ".eval_results/ee_surgery.yaml"
PROCESSOR = "preprocessor_config.json"
"""Where transformers looks for an image processor. timm's settings are in the adapter's own `config.json`."""
PROCESSOR_FILES = frozenset({
    PROCESSOR, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model", "spm_char.model", "dict.txt", "tiktoken.model", "normalizer.json",
    "entity_vocab.json", "word_shape.json", "word_pronunciation.json", "emoji.json", "byte_maps.json",
    "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
})  # fmt: skip
"""Files that an image processor or a tokenizer of transformers writes."""
OWN = frozenset({CONFIG, WEIGHTS, FRONTIER, BASE, CARD, PLOT, RESULTS}) | PROCESSOR_FILES
"""All files that an adapter can have."""
# Weights that other libraries load by name: with our `config.json` next to them, they would no longer load.
_WEIGHTS_OF_OTHERS = ("model*.safetensors*", "pytorch_model*.bin*", "tf_model.h5", "flax_model.msgpack", "open_clip*")
# Files that those libraries read first, whatever is in `config.json`.
_ADAPTERS_OF_OTHERS = ("adapter_config.json", "adapter_model.*")


@dataclass(frozen=True)
class AdapterExit:
    """One exit as stored."""

    name: str
    node: str
    shape: tuple[int, ...]
    layout: str
    branch: BranchSpec
    trunk_macs: int
    branch_macs: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterExit:
        """What `dataclasses.asdict` gave, after a passage through JSON."""
        return cls(**{**data, "shape": tuple(data["shape"]), "branch": BranchSpec(**data["branch"])})


@dataclass(frozen=True)
class AdapterConfig:
    """Everything about the branches except tensors."""

    base: Identity
    inputs: dict[str, InputSpec]
    """The sample inputs, by name."""
    options: dict[str, Any]
    """Other arguments of the call: flags, numbers, strings."""
    opaque: tuple[str, ...]
    """Modules of the base that are kept whole."""
    head_classes: int | None
    """Classes of the stored head, for a base without a head."""
    placement: str
    base_macs: int
    exits: tuple[AdapterExit, ...]
    operating_point: OperatingPoint | None
    label_names: list[str] | None
    versions: dict[str, str]
    own_base: bool = False
    """Whether the base was trained together with the branches, and its weights are stored too."""
    preprocessing: dict[str, Any] | None = None
    """Arguments of timm's `create_transform`, for a timm base."""
    output: int | str | tuple[int | str, ...] | None = None
    """Which part of the base's output the logits are, if the user had to specify it."""
    task: str = "classification"
    """What the base answers, by its name in `TASKS`."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of that task; see `Task.options`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the branches were made; see `EarlyExitModel.provenance`."""
    probe: Probe | None = None
    """Logits of the base on stored inputs; None if it cannot be run on them, and in older adapters."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each file of its folder, by name."""

    @classmethod
    def of(
        cls, engine: Engine, specs: Sequence[BranchSpec], state: AdapterState, digests: Mapping[str, str]
    ) -> AdapterConfig:
        """Gather what describes a branched model.

        Args:
            digests: of the original's tensors, when it got its branches.
        """
        backbone, plan = engine.backbone, engine.plan
        exits = zip(plan.points, specs, engine.trunk_macs[:-1], engine.branch_macs, strict=True)
        packages = ("ee-surgery", "torch", "timm", "transformers")
        inputs = {name: InputSpec.of(tensor) for name, tensor in tensors(backbone.sample).items()}
        return cls(
            base=backbone.identity(digests),
            inputs=inputs,
            options={name: value for name, value in backbone.sample.items() if name not in inputs},
            opaque=backbone.opaque,
            head_classes=backbone.num_classes if backbone.headless else None,
            placement=plan.rule,
            base_macs=engine.trunk_macs[-1],
            exits=tuple(AdapterExit(p.name, p.node, p.shape, p.layout, spec, *macs) for p, spec, *macs in exits),
            operating_point=state.operating_point,
            label_names=backbone.label_names,
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            own_base=state.own_base,
            preprocessing=processor_settings(state.processor) or state.preprocessing,
            output=backbone.output,
            task=backbone.task.name,
            task_options=backbone.task.options(),
            provenance=state.provenance,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        point, self_without = self.operating_point, replace(self, operating_point=None, files={})
        data = {**asdict(self_without), "operating_point": point.to_dict() if point else None}
        if self.task == CLASSIFICATION.name:  # left out: versions that know no other task read it as before
            del data["task"]
        if not self.base.adapters:
            del data["base"]["adapters"]
        if not self.task_options:
            del data["task_options"]
        if self.preprocessing is not None:  # for AutoImageProcessor, which looks here and so for timm's own models
            data |= {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": self.preprocessing}
        return {"model_type": "ee_surgery", "format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterConfig:
        """What `to_dict` gave, after a passage through JSON and `ConfigForm`."""
        point, output, classes = data["operating_point"], data["output"], data["head_classes"]
        names = data["label_names"]
        return cls(
            base=Identity(**data["base"]),
            inputs={name: InputSpec.from_dict(spec) for name, spec in data["inputs"].items()},
            options=data["options"],
            opaque=tuple(data["opaque"]),
            head_classes=classes,
            placement=data["placement"],
            base_macs=data["base_macs"],
            exits=tuple(AdapterExit.from_dict(exit) for exit in data["exits"]),
            operating_point=OperatingPoint.from_dict(point) if point else None,
            label_names=names if names and len(names) == (classes or data["base"]["num_classes"]) else None,
            versions=data["versions"],
            own_base=data["own_base"],
            preprocessing=data["preprocessing"],
            output=tuple(output) if isinstance(output, list) else output,
            task=data["task"],
            task_options=data["task_options"],
            provenance=data["provenance"],
            probe=Probe.from_dict(data["probe"]) if data["probe"] else None,
            files=listed(data),
        )


@contextmanager
def change_adapter(folder: Path) -> Iterator[FolderChange]:
    """Change the files of an adapter folder, all at once or not at all; see `change_folder`.

    Raises:
        AdapterError: the folder holds a model other than an adapter, or cannot be written.
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
                f"{folder} is saved, but not all of its files have been moved into place: {explained(error)} Then save "
                "it again."
            ) from error
        raise AdapterError(f"{folder} could not be written and is unchanged: {explained(error)}") from error


def _refuse_others(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    try:
        config = read_bytes(folder / CONFIG, JSON_LIMIT) if CONFIG in names else None
    except OSError:
        config = b""
    if (found := of_others(names, config)) is not None:
        raise AdapterError(
            f"{folder} holds {found}, which does not belong to an ee_surgery adapter: saving here would make that "
            "model unreadable. Save into a separate folder."
        )


def of_others(names: Iterable[str], config: bytes | None) -> str | None:
    """A file that shows that a folder or repository belongs to another model; None if there is none.

    Args:
        names: of all files there.
        config: its `config.json`, if it has one.
    """
    names = sorted(name for name in names if "/" not in name)
    if (found := _first(names, _ADAPTERS_OF_OTHERS)) is not None:
        return found
    if config is None:
        return None if WEIGHTS in names else _first(names, _WEIGHTS_OF_OTHERS)
    try:
        data = from_json(config)  # bounded in depth: the file is untrusted
    except ValueError:
        data = None
    if isinstance(data, dict):
        return None if data.get("model_type") == "ee_surgery" else CONFIG
    return None if WEIGHTS in names else CONFIG  # a damaged adapter may be saved again


def _first(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    return next((name for name in names if any(fnmatch(name, pattern) for pattern in patterns)), None)


def save_adapter(
    change: FolderChange,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    frontier: Frontier | None,
    base: nn.Module | None = None,
) -> None:
    """Write an adapter, replacing the one in its folder.

    Args:
        base: a base to store too, because its weights exist nowhere else.
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
        check_size(change.place(FRONTIER))
    change.data = described
    change.kept.clear()
    change.stray |= {FRONTIER, BASE, PLOT, RESULTS}


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by key."""
    # The order differs at each write; equal adapters should be equal files, which the Hub then stores only once.
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def without_tensors(value: Any, found: dict[str, Tensor]) -> Any:
    """Plain data with each tensor replaced by a name; tensors are collected in `found`, each once."""
    if isinstance(value, Tensor):
        name = next((name for name, tensor in found.items() if tensor is value), f"{POLICY}{len(found)}")
        found[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: without_tensors(item, found) for key, item in value.items()}
    return [without_tensors(item, found) for item in value] if isinstance(value, (list, tuple)) else value


def _with_tensors(value: Any, stored: Weights) -> Any:
    """The inverse of `without_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return stored.policy(value[TENSOR])
        return {key: _with_tensors(item, stored) for key, item in value.items()}
    return [_with_tensors(item, stored) for item in value] if isinstance(value, list) else value


_READ = (WEIGHTS, FRONTIER, BASE)
_LARGEST = {WEIGHTS: 4 << 30, BASE: 64 << 30}  # bytes


def load_adapter(folder: Path) -> tuple[AdapterConfig, Weights, Frontier | None]:
    """Read an adapter folder, even during a concurrent save. Tensors of branches stay in their file.

    Raises:
        AdapterError: a file is missing, damaged or of a different format, or the files do not belong together.
    """
    if not folder.is_dir():
        raise AdapterError(f"No adapter folder at {folder}. A local folder written by save_pretrained is expected.")
    config, weights, frontier = read_consistently(folder / CONFIG, lambda: _read_adapter(folder))
    if not config.files:
        warnings.warn(
            f"{folder} was saved by a version without digests of its files, so damage or a mixture of two adapters "
            "cannot be detected. Save it again.",
            SurgeryWarning,
            stacklevel=4,
        )
    return config, weights, frontier


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an adapter folder as plain data of the form `ConfigForm`.

    Raises:
        AdapterError: it is missing, damaged, of a different format, or of another kind of model.
    """
    path = folder / CONFIG
    data = read_json(path)
    kind, written = data.get("model_type"), data.get("format_version")
    if kind != "ee_surgery" or written not in (FORMAT_VERSION, OLD_FORMAT):
        newer = isinstance(written, int) and written > FORMAT_VERSION
        raise AdapterError(
            f"{path} is of type {str(kind)[:100]!r}, format {str(written)[:100]!r}; this version reads type "
            f"'ee_surgery', formats {OLD_FORMAT} and {FORMAT_VERSION}."
            f"{' A newer ee-surgery wrote it: upgrade with pip.' if newer else ''}"
        )
    vouched = sealed(data) == data and data.get(LISTED)
    if not vouched and (written == FORMAT_VERSION or DIGEST in data):
        raise AdapterError(
            f"{path} is damaged or was edited by hand: it does not match its own digest. Save the adapter again; "
            "`ee-surgery card` changes the card."
        )
    from ee_surgery.share.schema import ConfigForm, parse  # pydantic builds its validators at import

    return parse(ConfigForm, data, path)


def own_files(folder: Path) -> dict[str, Path]:
    """Paths of the adapter's own files by name, without anything else in the folder.

    A file that `config.json` lists with its digest may be a link, as in the Hub's cache. One that was edited by hand
    is included if it is a plain file of this folder, not a link; others are left out with a warning, and so are names
    that no adapter can have.

    Raises:
        AdapterError: see `load_adapter`; names a file that was replaced.
    """
    files = listed(read_config(folder))
    found = {CONFIG: folder / CONFIG}
    if others := sorted(files.keys() - OWN):
        seen = ", ".join(map(shown, others[:5]))
        message = f"{folder / CONFIG} lists files that no adapter can have; they are left out: {seen}."
        warnings.warn(message, SurgeryWarning, stacklevel=3)
    names = (files.keys() & OWN) | {CARD, PROCESSOR} if files else {*_READ, PROCESSOR, CARD, PLOT, RESULTS}
    for name in sorted(names):
        vouched = name in _READ or (name in files and name in PROCESSOR_FILES)
        try:
            _refuse_endless(folder, name)
            path = find_file(folder, name, files) if vouched else locate(folder / CONFIG, name, files)
            if path is None or (name not in files and path.exists()):
                path = by_hand(folder, name)
        except OSError as error:
            if name in _READ:
                raise AdapterError(f"{folder / name} cannot be used: {error} Save the adapter again.") from error
            warnings.warn(f"{folder / name} is left out: {error}", SurgeryWarning, stacklevel=3)
            continue
        if path is not None and path.is_file():
            found[name] = path
    return found


def find_file(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """The path of an adapter file that matches the digest listed in `config.json`.

    Raises:
        AdapterError: it does not match, or is missing.
    """
    _refuse_endless(folder, name)
    try:
        path = locate(folder / CONFIG, name, files)
    except OSError as error:
        raise AdapterError(f"{folder / name} cannot be read: {error}") from error
    if path is None and name in files:
        if not (folder / name).exists():
            raise AdapterError(f"{folder / name} is missing or damaged: {CONFIG} lists it. Save the adapter again.")
        raise AdapterError(
            f"{folder / name} is not the file that {CONFIG} lists (different SHA-256): it was edited, comes from "
            "another save, or has missing or damaged parts. Save the adapter again."
        )
    return path or folder / name


def _refuse_endless(folder: Path, name: str) -> None:
    """Check the size of a file before hashing it.

    Raises:
        AdapterError: it is too large.
    """
    with suppress(OSError):
        if (size := (folder / name).stat().st_size) > _LARGEST.get(name, 64 << 20):
            raise AdapterError(f"{folder / name} has {size:,} bytes, too many for an adapter.")


def _read_adapter(folder: Path) -> tuple[AdapterConfig, Weights, Frontier | None]:
    data = read_config(folder)
    files = listed(data)
    weights = Weights(find_file(folder, WEIGHTS, files), folder / WEIGHTS)
    with _damage(folder / CONFIG):
        config = AdapterConfig.from_dict(_with_tensors(data, weights))
    expected = {"fingerprint": config.base.fingerprint, "format_version": str(data["format_version"])}
    if {name: weights.metadata.get(name) for name in expected} != expected:
        raise AdapterError(
            f"{WEIGHTS} and {CONFIG} in {folder} do not belong together: one of them was replaced or edited. Save the "
            "adapter again."
        )
    frontier = None
    # An unlisted file is left over from an interrupted save; adapters without digests have no list.
    if FRONTIER in files or (not files and (folder / FRONTIER).exists()):
        path = find_file(folder, FRONTIER, files)
        from ee_surgery.share.schema import FrontierForm, parse

        traced = parse(FrontierForm, read_json(path), folder / FRONTIER)
        if traced["exits"] != (expected := [*(exit.name for exit in config.exits), "original"]):
            raise AdapterError(f"{folder / FRONTIER} is of exits {traced['exits'][:10]}, {CONFIG} of {expected[:10]}.")
        with _damage(folder / FRONTIER):
            frontier = Frontier.from_dict(_with_tensors(traced, weights))
    _check_scores(config, frontier, folder)
    return config, weights, frontier


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Errors that the schema cannot catch: fields of fitted scores, which users may register."""
    try:
        yield
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is damaged: {str(error)[:300]} Save the adapter again.") from error


def _check_scores(config: AdapterConfig, frontier: Frontier | None, folder: Path) -> None:
    """Call each fitted score once per exit.

    Raises:
        AdapterError: one does not fit the number of exits and classes.
    """
    points = [*([] if config.operating_point is None else [config.operating_point]), *(frontier or ())]
    asked: set[str] = set()
    asked_tensors: dict[str, Tensor] = {}  # many points share one score
    classes, task = config.head_classes or config.base.num_classes, TASKS.get(config.task, CLASSIFICATION)
    logits = task.blank(2, classes)
    for score in (point.score for point in points):
        if isinstance(score, str) or (key := str(without_tensors(score.to_dict(), asked_tensors))) in asked:
            continue
        asked.add(key)
        state = ()
        for k in range(len(config.exits)):
            try:
                found, state = for_task(score, task)(logits, torch.zeros(2), state, k)
            except Exception as error:  # anything that a user-registered score may raise
                found = error
            if not isinstance(found, Tensor) or found.shape != (2,):
                raise AdapterError(
                    f"{folder}: the score {score.kind!r} does not fit {len(config.exits)} exits and {classes} classes. "
                    "Save the adapter again."
                )


def load_base(folder: Path, model: nn.Module, files: Mapping[str, str]) -> None:
    """Copy the base stored in the folder into a model.

    Args:
        files: digests listed in `config.json` when the branches were read.
    Raises:
        AdapterError: the file is missing, damaged or was replaced, or the model has other shapes.
    """
    stored_base(folder, files).fill(model, base=True)


def stored_base(folder: Path, files: Mapping[str, str]) -> Weights:
    """The tensors of the stored base, left in their file; errors as for `load_base`."""
    return Weights(find_file(folder, BASE, files), folder / BASE)
