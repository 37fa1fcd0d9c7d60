"""Plain data <-> an adapter folder.

    config.json               who the base is, where the exits are, which branches, the operating point
    ee_adapter.safetensors    tensors of the branches alone
    frontier.json             every operating point that calibration found
    preprocessor_config.json  the image processor of a transformers base, where it was at hand
    base.safetensors          only where the base was trained along, and so exists nowhere else

`config.json` is the manifest: it lists the SHA-256 of every file and of itself, and all change with it; see `files`.
What the JSON files may hold is in `schema`.

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
from ee_surgery.backbone.inputs import Arguments, tensors
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
from ee_surgery.graph.exit_points import ExitPoint
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.share.probe import InputSpec, Probe
from ee_surgery.share.schema import FORMAT_VERSION, OLD_FORMAT, ConfigForm, FrontierForm, check_size, parse, read_json
from ee_surgery.share.weights import POLICY, TENSOR, Weights

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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterExit:
        """What `dataclasses.asdict` gave, after a passage through JSON."""
        return cls(**{**data, "shape": tuple(data["shape"]), "branch": BranchSpec(**data["branch"])})


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
            provenance=data["provenance"],
            probe=Probe.from_dict(data["probe"]) if data["probe"] else None,
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
        config = read_bytes(folder / CONFIG, JSON_LIMIT) if CONFIG in names else None
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
        data = from_json(config)  # bounded in depth: it may be a stranger's
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
        check_size(change.place(FRONTIER))
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
        name = next((name for name, tensor in found.items() if tensor is value), f"{POLICY}{len(found)}")
        found[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: without_tensors(item, found) for key, item in value.items()}
    return [without_tensors(item, found) for item in value] if isinstance(value, (list, tuple)) else value


def _with_tensors(value: Any, stored: Weights) -> Any:
    """What `without_tensors` was given."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return stored.policy(value[TENSOR])
        return {key: _with_tensors(item, stored) for key, item in value.items()}
    return [_with_tensors(item, stored) for item in value] if isinstance(value, list) else value


_READ = (WEIGHTS, FRONTIER, BASE)
_LARGEST = {WEIGHTS: 4 << 30, BASE: 64 << 30}  # bytes


def load_adapter(folder: Path) -> tuple[AdapterConfig, Weights, Frontier | None]:
    """Read an adapter folder, while others may be saving into it. Tensors of branches are left in their file.

    Raises:
        AdapterError: a file is missing, damaged, of another format, or the files do not belong together.
    """
    if not folder.is_dir():
        raise AdapterError(f"No adapter folder at {folder}. A local folder written by save_pretrained is expected.")
    config, weights, frontier = read_consistently(folder / CONFIG, lambda: _read_adapter(folder))
    if not config.files:
        warnings.warn(
            f"{folder} was saved by a version that kept no digests of its files, so that damage and a mixture of two "
            "adapters cannot be told. Save it again.",
            SurgeryWarning,
            stacklevel=3,
        )
    return config, weights, frontier


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an adapter folder as plain data of the form `ConfigForm`.

    Raises:
        AdapterError: it is missing, damaged, of another format, or of another kind of model.
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
            f"{path} is damaged or was edited by hand: it does not have the digest that it states. Save the adapter "
            "again; `ee-surgery card` changes what the card says."
        )
    return parse(ConfigForm, data, path)


def own_files(folder: Path) -> dict[str, Path]:
    """The adapter's own files by name, and where they lie: nothing else that may be in the folder.

    A file that `config.json` lists with its digest may be a link, as in the Hub's cache. One that was changed by hand
    is taken where it is a file of this folder and no link; another one is left out with a warning, and so are names
    that no adapter has.

    Raises:
        AdapterError: see `load_adapter`; a file that was replaced is named.
    """
    files = listed(read_config(folder))
    found = {CONFIG: folder / CONFIG}
    if others := sorted(files.keys() - OWN):
        seen = ", ".join(map(shown, others[:5]))
        told = f"{folder / CONFIG} lists files that no adapter has; they are left out: {seen}."
        warnings.warn(told, SurgeryWarning, stacklevel=3)
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
                raise AdapterError(f"{folder / name} cannot be taken: {error} Save the adapter again.") from error
            warnings.warn(f"{folder / name} is left out: {error}", SurgeryWarning, stacklevel=3)
            continue
        if path is not None and path.is_file():
            found[name] = path
    return found


def find_file(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Where a file of an adapter lies: the very one that `config.json` lists.

    Raises:
        AdapterError: it is another one, or missing.
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
            f"{folder / name} is not the file that {CONFIG} lists (another SHA-256): it was edited, comes from another "
            "save, or has missing or damaged parts. Save the adapter again."
        )
    return path or folder / name


def _refuse_endless(folder: Path, name: str) -> None:
    """Before a file is read from end to end for its digest.

    Raises:
        AdapterError: it is too large.
    """
    with suppress(OSError):
        if (size := (folder / name).stat().st_size) > _LARGEST.get(name, 64 << 20):
            raise AdapterError(f"{folder / name} holds {size:,} bytes, more than any adapter's.")


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
    # One that is not listed is left from an interrupted save; before there were lists, its being there was the list.
    if FRONTIER in files or (not files and (folder / FRONTIER).exists()):
        path = find_file(folder, FRONTIER, files)
        traced = parse(FrontierForm, read_json(path), folder / FRONTIER)
        if traced["exits"] != (expected := [*(exit.name for exit in config.exits), "original"]):
            raise AdapterError(f"{folder / FRONTIER} is of exits {traced['exits'][:10]}, {CONFIG} of {expected[:10]}.")
        with _damage(folder / FRONTIER):
            frontier = Frontier.from_dict(_with_tensors(traced, weights))
    _check_scores(config, frontier, folder)
    return config, weights, frontier


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What the form cannot know: fields of fitted scores, which anyone may register."""
    try:
        yield
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is damaged: {str(error)[:300]} Save the adapter again.") from error


def _check_scores(config: AdapterConfig, frontier: Frontier | None, folder: Path) -> None:
    """Ask each fitted score once for each exit.

    Raises:
        AdapterError: one is not for as many exits and classes.
    """
    points = [*([] if config.operating_point is None else [config.operating_point]), *(frontier or ())]
    asked: set[str] = set()
    asked_tensors: dict[str, Tensor] = {}  # many points share one score
    classes = config.head_classes or config.base.num_classes
    logits = torch.linspace(-1, 1, 2 * classes).view(2, classes)
    for score in (point.score for point in points):
        if isinstance(score, str) or (key := str(without_tensors(score.to_dict(), asked_tensors))) in asked:
            continue
        asked.add(key)
        state = ()
        for k in range(len(config.exits)):
            try:
                found, state = score(logits, torch.zeros(2), state, k)
            except Exception as error:  # of whatever its own code makes of the numbers
                found = error
            if not isinstance(found, Tensor) or found.shape != (2,):
                raise AdapterError(
                    f"{folder}: the score {score.kind!r} is not for {len(config.exits)} exits and {classes} classes. "
                    "Save the adapter again."
                )


def load_base(folder: Path, model: nn.Module, files: Mapping[str, str]) -> None:
    """Fill a model with the base that is stored in the folder.

    Args:
        files: what `config.json` listed when the branches were read.
    Raises:
        AdapterError: the file is missing or damaged, another one by now, or the model is of another shape.
    """
    stored_base(folder, files).fill(model, base=True)


def stored_base(folder: Path, files: Mapping[str, str]) -> Weights:
    """The tensors of the base that is stored in the folder, left in their file; errors as for `load_base`."""
    return Weights(find_file(folder, BASE, files), folder / BASE)
