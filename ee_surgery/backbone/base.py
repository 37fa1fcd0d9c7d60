"""A common interface to timm, transformers and plain torch models: calls, outputs, identity."""

from __future__ import annotations

import hashlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ee_surgery.backbone.answers import OutputKey, check_logits, declared_classes, locate, pick_task, task_of
from ee_surgery.backbone.inputs import Arguments, Batch, Inputs, tensors
from ee_surgery.backbone.pictures import Shape, timm_settings
from ee_surgery.backbone.refusals import check_weights, sample_refusal, takes, variants
from ee_surgery.backbone.samples import default_sample
from ee_surgery.backbone.signature import Signature, attributes, set_since
from ee_surgery.backbone.twin import twin
from ee_surgery.backbone.wrappers import library_model, peft_adapters, unwrapped
from ee_surgery.checks import count, names, refuse
from ee_surgery.errors import OUT_OF_MEMORY, ConfigError, DataError
from ee_surgery.registry import suggest
from ee_surgery.task import CLASSIFICATION, Task

Library: TypeAlias = Literal["timm", "transformers", "torch"]
Sample: TypeAlias = Inputs | tuple[Tensor, ...]
# Modules of well-known models that loop over samples by their values, each sample on its own.
_OPAQUE = frozenset({"Siglip2VisionEmbeddings"})
# What a model may answer with: logits, or a container that holds them.
Output: TypeAlias = Tensor | tuple[object, ...] | list[object] | Mapping[str, object]


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, as hex."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + data.numpy().tobytes()).hexdigest()


def digest_of(module: nn.Module) -> str:
    """SHA-256 of the names and digests of all tensors of a module's state."""
    lines = (f"{name} {digest(tensor)}" for name, tensor in module.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """The identity of a backbone, to find the same one again."""

    library: Library
    model_id: str
    """timm architecture with tag, Hub repository, or class name."""
    revision: str | None
    fingerprint: str
    """SHA-256 over the names and digests of all parameters and persistent buffers."""
    num_classes: int
    """Of the model's own head; 0 for one that has none."""
    architecture: str = ""
    """Name of the model's class."""
    hub_id: str | None = None
    """Hub repository of the weights, where there is one."""
    adapters: str = ""
    """PEFT adapters in it and their states; see `peft_adapters`."""


_SEGMENTER = "ForSemanticSegmentation"


def make_model(
    library: Library,
    model_id: str,
    *,
    revision: str | None = None,
    checkpoint: str = "",
    architecture: str = "",
    num_classes: int | None = None,
    channels: int | None = None,
    pretrained: bool = True,
    hub_id: str | None = None,
    **hub: Any,
) -> nn.Module:
    """Build a timm or transformers model with pretrained weights, in eval mode.

    Args:
        pretrained: False spares a timm model weights that will be replaced.
        architecture: transformers class to build; by default the segmenter that the checkpoint is of, else an image
            classifier.
        checkpoint: weights file for a timm model, in place of its pretrained ones.
        num_classes: of a timm model, where not the architecture's own.
        channels: of the pictures of a timm model, where not the architecture's own.
        hub_id: repository of a timm model's weights, for one whose name this timm does not know.
        hub: `token`, `cache_dir`, `local_files_only` for a transformers model.
    """
    if library == "timm":
        import timm

        sizes = {"num_classes": num_classes, "in_chans": channels}
        options: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        pretrained = pretrained and not checkpoint
        if hub_id is not None and pretrained and model_id not in timm.list_pretrained():
            model_id = f"hf-hub:{hub_id}"
        return timm.create_model(model_id, pretrained=pretrained, checkpoint_path=checkpoint or None, **options).eval()
    import transformers

    if not architecture:
        config = transformers.AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False, **hub)
        segments = any(name.endswith(_SEGMENTER) for name in config.architectures or ())
        architecture = f"AutoModel{_SEGMENTER if segments else 'ForImageClassification'}"
    cls: Any = getattr(transformers, architecture, None)
    if not architecture.startswith("AutoModel") and transformers.PreTrainedModel not in getattr(cls, "__mro__", ()):
        raise DataError(f"transformers {transformers.__version__} has no model class {architecture!r}.")
    # False, not the default, which asks at the terminal whether to run code from the repository.
    return cls.from_pretrained(model_id, revision=revision, trust_remote_code=False, **hub)


class State:
    """A model as its Python side is between two changes: what programs are captured from and kept for."""

    def __init__(self, owner: nn.Module) -> None:
        self.model = twin(owner, live=True)
        """In eval mode, whatever the owner's flags say; parameters and buffers are the owner's own."""
        self.signature = Signature(owner)
        self._unused = attributes(self.model)

    def settle(self) -> None:
        """After a first run: what a run itself sets is no change from now on."""
        self.signature = Signature(self.signature.model, set_since(self.model, self._unused))


_STATES_KEPT = 4  # a PEFT adapter that is switched on and off goes back and forth between two


class Backbone:
    """A pretrained model seen from outside. Holds it by reference and never changes it.

    Whatever runs, runs on a twin in eval mode: the owner may train the model, or change its flags, in another thread.

    Args:
        model: a timm model, a transformers classifier of images or texts, or any `nn.Module` from tensors to logits;
            taken out of wrappers such as DataParallel or torch.compile's, see `unwrapped`.
        sample: an example input with its batch, e.g. `torch.randn(2, 3, 224, 224)`; a dict (or a tuple, by position)
            for a model of several inputs. Read from the model's own configuration when left out.
        opaque: modules to keep whole, by name: they are called as they are, and nothing leaves inside them. For
            modules that torch.export cannot read but that treat each sample on its own.
        num_classes: for a model without a classification head, whose answer are features: how many classes a head
            on them shall tell apart.
        output: which part of the answer the logits are, by index or name (or several of them, from the outside in),
            where more than one could be.
        task: what the answers are, by name in `TASKS` or as a class that is registered there: `classification` (one
            right class), `multi_label`, `segmentation`. Left out: as `config.problem_type` of a transformers model
            says, or segmentation of what answers with maps (B, C, h, w), else one right class.
    Raises:
        DataError: `sample` is missing for a model that does not say what it takes, or is no batch.
        ConfigError: there is no tensor at `output`, fewer classes than the task needs, or no such task.
        CaptureError: the model's answer holds no logits of the task, several tensors that could be, or numbers that are
            none.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sample | None = None,
        opaque: Sequence[str] = (),
        num_classes: int | None = None,
        output: OutputKey | None = None,
        task: str | Task | type[Task] | None = None,
    ) -> None:
        self.model = model = unwrapped(model)
        self.named = library_model(model)
        """The model of timm or transformers that says what it is: `model`, or the one that a PEFT model holds."""
        self.library: Library = _library(self.named)
        self.model_id, self.revision = _model_id(self.named, self.library)
        self.headless = num_classes is not None
        said = pick_task(task, self.named, self.model_id, self.headless)
        self.task = said or CLASSIFICATION
        """What its answers are."""
        if num_classes is not None:
            if self.task.rank != CLASSIFICATION.rank:
                raise ConfigError(
                    f"num_classes= makes a head that answers with vectors, and answers of the task {self.task.name!r} "
                    "are maps: build the model with a head."
                )
            hint = f"The task is {self.task.name!r}."
            num_classes = count("num_classes", num_classes, low=self.task.least, hint=hint)
        check_weights(model, self.model_id)
        self._lock = threading.Lock()
        self._states = [State(model)]  # the one in force last
        self._first: State | None = self._states[0]
        self.input_names = _input_names(self.named)
        self.opaque = _outermost(
            [
                *_known(opaque, model, self.model_id),
                *(n for n, m in model.named_modules() if type(m).__name__ in _OPAQUE),
            ]
        )
        self.output = None if output is None else _steps(output)
        given = Batch.of(self._sample(sample)).sample()
        self.sample = given.arguments
        """Four samples, in their normal form."""
        self.batch_dims = given.dims
        """Where each input tensor holds the batch."""
        rows = given.size
        answered = self._first_answer(own=sample is not None)
        declared = declared_classes(self.named)
        self._place = locate(answered, self.model_id, rows, output, self.headless, declared, said)
        logits = self._place.read(answered)
        assert logits is not None
        self._rank = logits.ndim
        if not self.headless:
            self.task = (said or task_of(logits)).of(logits)
            check_logits(logits, rows, self.named, self.model_id, self.task)
        self.num_classes = self.task.width(logits) if num_classes is None else num_classes
        self._flat = not self.headless and self._one_is_flat()

    def __call__(self, inputs: Inputs) -> Output:
        """The original's own output in eval mode, through its own forward, without code of this package."""
        arguments = {self.input_names[0]: inputs} if isinstance(inputs, Tensor) else dict(inputs)
        return self.call(arguments, self.state().model)

    def call(self, arguments: Arguments, model: nn.Module | None = None) -> Output:
        """Call the model, or a twin of it, on one batch as its library does."""
        model = self.model if model is None else model
        if self.library == "transformers":
            return model(**arguments)
        names = [*arguments]
        return model(arguments[names[0]], **{name: arguments[name] for name in names[1:]})

    def state(self) -> State:
        """The model as it is now: another one after its owner changed structure, hooks or attributes."""
        states = self._states
        if states and states[-1].signature.current():
            return states[-1]
        with self._lock:
            found = next((state for state in reversed(self._states) if state.signature.current()), None)
            found = found or self._read()
            self._first = self._first or found
            self._states = [*(state for state in self._states if state is not found), found][-_STATES_KEPT:]
            return found

    @property
    def latest(self) -> State:
        """The state that it was in at the last look."""
        return self._states[-1] if self._states else self.state()

    @property
    def altered(self) -> list[str]:
        """What its owner changed since it was first read, tensors aside, that decides what it computes; in words."""
        return [] if self._first is None else self._first.signature.differences()

    def accept(self) -> None:
        """Make the current model the reference for `altered`."""
        self._first = self.state()

    def _read(self) -> State:
        state = State(self.model)
        with torch.no_grad():
            self.call(self._placed(self.sample), state.model)
        state.settle()
        return state

    def __getstate__(self) -> dict[str, object]:
        # a copy reads its own state: signatures are bound to this very model's attributes
        return {**self.__dict__, "_lock": None, "_states": [], "_first": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def arguments(self, *inputs: Any, **named: Any) -> Arguments:
        """Inputs in their normal form, from whatever the user called with: tensors, one dict, keywords.

        Raises:
            DataError: no input tensor, more of them than the model takes, or under names that it does not know.
        """
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and not named:
            return {self.input_names[0]: inputs[0]}
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            inputs, named = (), {**inputs[0], **named}
        if len(inputs) > len(self.input_names):
            raise DataError(f"{self.model_id} takes inputs {self.input_names}; got {len(inputs)} of them.")
        given = {**dict(zip(self.input_names, inputs)), **named}  # noqa: B905 (fewer inputs than names)
        found = {name: value for name, value in given.items() if value is not None}
        main = self.input_names[0]
        unknown = [name for name in tensors(found) if name not in self.input_names]
        if unknown or not tensors(found):
            seen = {name: type(value).__name__ for name, value in found.items()}
            raise DataError(f"{self.model_id} takes input tensors {self.input_names}; got {seen or 'none'}.")
        return {name: found[name] for name in sorted(found, key=lambda name: (name != main, name))}

    def batch(self, *inputs: Any, **named: Any) -> Batch:
        """Inputs in their normal form, and where each tensor holds its samples.

        Raises:
            DataError: as for `arguments`, or they hold different numbers of samples.
        """
        arguments = self.arguments(*inputs, **named)
        if len(arguments) == 1 and self.input_names[0] in arguments:
            return Batch(arguments, self.batch_dims)
        return Batch.of(arguments, self.batch_dims)

    def own_batch(self) -> Batch:
        """Its four samples, where the model is now and in its precision."""
        return self.batch(self._placed(self.sample))

    @property
    def reads_tokens(self) -> bool:
        """True for a model over token ids: texts, or images as sequences of clusters."""
        main = next(iter(tensors(self.sample).values()))
        return main.ndim == 2 and not main.is_floating_point()

    @property
    def channels(self) -> int | None:
        """Channels of the images that the model takes; None for other inputs."""
        main = next(iter(tensors(self.sample).values()))
        return main.shape[1] if main.ndim == 4 else None

    def logits(self, output: Output) -> Tensor:
        """Find the logits (B, C, ...) in what the model answered; the features, for a model without a head."""
        found = self._place.read(output)
        if found is None:  # another form than for the sample: in training mode, or for an option of the call
            found = locate(output, self.model_id, features=self.headless, task=self.task).read(output)
        assert found is not None
        return found[None] if found.ndim == self._rank - 1 else found

    def answer(self, logits: Tensor) -> Output:
        """Wrap logits in the original's output type."""
        if self.headless:
            return _head_answer(logits) if self.library == "transformers" else logits
        return self._place.wrap(logits[0] if self._flat and len(logits) == 1 else logits)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, then all buffers (non-persistent ones too), by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def digests(self) -> dict[str, str]:
        """SHA-256 of every parameter and buffer, by name."""
        return {name: digest(tensor) for name, tensor in self.tensors()}

    def identity(self, digests: Mapping[str, str] | None = None) -> Identity:
        """Library, id, revision and fingerprint; `digests` spares hashing the weights again."""
        digests = digests or self.digests()
        # Non-persistent buffers are derived (position tables, masks): another library version may compute them anew.
        stored = [(name, digests[name]) for name in sorted(self.model.state_dict()) if name in digests]
        fingerprint = hashlib.sha256("\n".join(f"{name} {value}" for name, value in stored).encode()).hexdigest()
        classes = 0 if self.headless else self.num_classes
        name = type(self.named).__name__
        adapters = peft_adapters(self.model)
        return Identity(self.library, self.model_id, self.revision, fingerprint, classes, name, self.hub_id, adapters)

    @property
    def hub_id(self) -> str | None:
        """Hub repository that the weights come from, as far as the model knows."""
        if self.library == "timm":
            return (getattr(self.named, "pretrained_cfg", None) or {}).get("hf_hub_id") or None
        return self.loaded_from[0] if self.loaded_from and not Path(self.loaded_from[0]).exists() else None

    @property
    def loaded_from(self) -> tuple[str, str | None] | None:
        """Repository or folder that a transformers model was loaded from, and its revision."""
        loaded = self.library == "transformers" and self.model_id != type(self.named).__name__
        return (self.model_id, self.revision) if loaded else None

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """What `timm.data.create_transform` takes to prepare pictures, as plain data; see `timm_settings`."""
        return timm_settings(self.named, self.library, self._takes)

    @property
    def label_names(self) -> list[str] | None:
        """Class names where the model's configuration holds them, in index order."""
        config = getattr(self.named, "config", None)
        names = getattr(config, "id2label", None) if self.library == "transformers" else None
        if names:
            return [str(names[i]) for i in sorted(names)]
        names = (getattr(self.named, "pretrained_cfg", None) or {}).get("label_names")
        return list(map(str, names)) if names else None

    @cached_property
    def prefix_tokens(self) -> int:
        """How many tokens before the patches (class token, registers) a token model carries."""
        if self.library == "timm":
            return int(getattr(self.named, "num_prefix_tokens", 0))
        names = [name.rsplit(".", 1)[-1] for name, _ in self.model.named_parameters()]
        registers = [p for n, p in self.model.named_parameters() if n.rsplit(".", 1)[-1] == "register_tokens"]
        single = sum(name in names for name in ("cls_token", "class_embedding", "distillation_token"))
        return single + sum(int(p.shape[-2]) for p in registers)

    def _first_answer(self, own: bool) -> Output:
        """What it answers to the sample; one of its own making may turn out to have too many or too few channels."""
        try:
            with torch.no_grad():
                answered = self(self.sample)
            self._states[0].settle()
            return answered
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            main = self.input_names[0]
            value = self.sample.get(main)
            shaped = [] if own or value is None else [v for _, v in variants(value, self.model) if len(v) == len(value)]
            for other in shaped:
                if takes(self, {**self.sample, main: other}):
                    self.sample[main] = other
                    return self._first_answer(own=True)
            raise DataError(sample_refusal(self.model, self.model_id, self.sample, self, error, own)) from error

    def _one_is_flat(self) -> bool:
        """Whether the answer to one sample alone lacks the batch, as behind a `squeeze()` in the forward."""
        one = Batch(self.sample, self.batch_dims).select([0])
        try:
            with torch.no_grad():
                logits = self._place.read(self(one.arguments))
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a model that takes no batch of one
            return False
        return logits is not None and logits.ndim == self._rank - 1

    def _takes(self, shape: Shape) -> bool:
        """Whether the model runs on pictures of this shape."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        pictures = torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype)
        return takes(self, {self.input_names[0]: pictures})

    def _sample(self, sample: Sample | None) -> Arguments:
        if sample is None:
            sample = default_sample(self.named, self.library, self._takes, self.loaded_from)
            if sample is None:
                raise DataError(
                    f"{self.model_id} does not say what input it takes. Pass one: sample=torch.randn(2, 3, H, W), or a "
                    "dict of tensors for a model of several inputs."
                )
        arguments = self.arguments(*sample) if isinstance(sample, tuple) else self.arguments(sample)
        for name, value in tensors(arguments).items():
            if value.ndim < 1 or (value.ndim < 2 and len(arguments) == 1) or 0 in value.shape:
                seen = tuple(value.shape)
                raise DataError(
                    f"The sample must be a tensor with a batch dimension, such as (2, 3, H, W); got {name} of {seen}."
                )
        return self._placed(arguments)

    def _placed(self, arguments: Arguments) -> Arguments:
        """Arguments where the model is, numbers in its precision."""
        weights = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if weights is None:
            return arguments
        device, dtype = weights.device, weights.dtype
        moved = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in tensors(arguments).items()}
        return {**arguments, **moved}


def _library(model: nn.Module) -> Library:
    # Looked up, not imported: a plain torch model should not pay for transformers.
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return "transformers"
    if hasattr(model, "pretrained_cfg") or type(model).__module__.startswith("timm."):
        return "timm"
    return "torch"


def _model_id(model: nn.Module, library: Library) -> tuple[str, str | None]:
    name = type(model).__name__
    if library == "timm":
        config = getattr(model, "pretrained_cfg", None) or {}
        architecture, tag = config.get("architecture"), config.get("tag")
        return (f"{architecture}.{tag}" if architecture and tag else str(architecture or name)), None
    if library == "transformers":
        config = model.config
        found = str(getattr(config, "_name_or_path", "") or name)
        return found, getattr(config, "_commit_hash", None) or _cached_revision(found, model)  # pyright: ignore[reportReturnType]
    return name, None


def _cached_revision(model_id: str, model: nn.Module) -> str | None:
    """The commit in the local cache that holds these weights. transformers 5 keeps no note of what it loaded."""
    from huggingface_hub import constants, file_download

    if Path(model_id).is_dir():
        return None
    folder = file_download.repo_folder_name(repo_id=model_id, repo_type="model")
    snapshots = Path(constants.HF_HUB_CACHE, folder, "snapshots")
    if not snapshots.is_dir():
        return None
    weights = model.state_dict()
    for snapshot in sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        files = list(snapshot.glob("*.safetensors"))
        if files and all(_agrees(file, weights) for file in files):
            return snapshot.name
    return None


def _agrees(file: Path, weights: Mapping[str, Tensor], limit: int = 1 << 16) -> bool:
    """Whether the small tensors of a file are among these weights: a guess that the fingerprint checks on loading."""
    try:
        with safe_open(file, framework="pt") as stored:
            small = [n for n in stored.keys() if n in weights and weights[n].numel() <= limit]  # noqa: SIM118
            return bool(small) and all(digest(stored.get_tensor(n)) == digest(weights[n]) for n in small)
    except (OSError, SafetensorError):
        return False


def _known(opaque: Sequence[str], model: nn.Module, model_id: str) -> list[str]:
    """Names of modules that the model has."""
    given, known = names("opaque", opaque), dict(model.named_modules())
    for name in given:
        if name not in known:
            raise ConfigError(f"opaque: {model_id} has no module {name!r}. {suggest(name, known)}")
    return given


def _steps(output: OutputKey) -> int | str | tuple[int | str, ...]:
    """Where the logits are, as it was said."""
    keys: tuple[Any, ...] = tuple(output) if isinstance(output, (list, tuple)) else (output,)
    if not keys or not all(isinstance(key, (int, str)) and not isinstance(key, bool) for key in keys):
        refuse("output", "an index, a name, or a list of them from the outside in", output)
    return keys if isinstance(output, (list, tuple)) else keys[0]


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Each path once, without those inside another one."""
    return tuple(path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths))


def _input_names(model: nn.Module) -> list[str]:
    """What the model's forward takes, the main input first."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)] or ["x"]
    main = getattr(model, "main_input_name", names[0])
    return [main, *(name for name in names if name != main)]


def _head_answer(logits: Tensor) -> Output:
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=logits)  # pyright: ignore[reportArgumentType, reportReturnType]
