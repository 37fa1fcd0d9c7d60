"""Adapters as models of transformers: Auto classes, `pipeline`, `Trainer`.

    model = AutoModelForImageClassification.from_pretrained("user/name")      # or a folder
    model.branched.operate(budget=0.6)                                        # the EarlyExitModel inside
    pipe = pipeline("image-classification", model="user/name")
    pipe(images), pipe.model.exit_counts

The module that transformers sees contains only the branches: it never trains, saves, counts or wraps the original,
which moves between devices with them and keeps every bit and flag.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from ee_surgery.errors import ConfigError, DataError
from ee_surgery.files import atomic_write
from ee_surgery.model import EarlyExitModel
from ee_surgery.pipeline import from_pretrained
from ee_surgery.share.adapter import CONFIG, without_tensors
from ee_surgery.share.schema import ConfigForm, parse
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.loss import batch_loss, relative_costs, take_scale

_LABELS_TAKEN = (
    "The model itself computes a loss over all exits from `labels`. Trainer removes them for label_smoothing_factor "
    "and for compute_loss_func: use neither. Instead of smoothing, distill (TrainConfig(distill=...)), or let a data "
    "collator make smoothed labels of shape (B, C); instead of a loss function, register an objective in "
    "ee_surgery.OBJECTIVES. TrainConfig(teach='original') needs no labels."
)
_UNSUPPORTED = ("output_attentions", "output_hidden_states")
# Arguments of `from_pretrained` that have no effect; nothing executable is ever read.
_IGNORED = (
    "trust_remote_code",
    "adapter_kwargs",
    "code_revision",
    "use_safetensors",
    "low_cpu_mem_usage",
    "weights_only",
)
# Arguments of `save_pretrained` about weights files that an adapter does not have.
_UNSAVED = ("max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format")


class EarlyExitConfig(PreTrainedConfig):
    """An adapter's `config.json` as attributes, with the base's class names if they are known."""

    model_type = "ee_surgery"
    # Trainer gathers the others: `logits` and, when all exits are evaluated, `exit_logits`.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_index", "score", "macs"]

    def __post_init__(self, **kwargs: Any) -> None:
        """Take everything in `config.json`; class names given as arguments win."""
        base = kwargs.get("base", {})
        if self.id2label is None:
            names = kwargs.get("label_names") or _imagenet_names(base)
            if names:
                self.id2label = dict(enumerate(names))
                self.label2id = {name: i for i, name in self.id2label.items()}
            elif "num_labels" not in kwargs and base:
                kwargs["num_labels"] = kwargs.get("head_classes") or base["num_classes"]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> EarlyExitConfig:
        """The content of a `config.json`, restricted to the keys of an adapter.

        Raises:
            AdapterError: it is not an adapter's, or is damaged.
        """
        own = {key: config_dict[key] for key in ConfigForm.model_fields if key in config_dict}
        return super().from_dict(parse(ConfigForm, own, Path(CONFIG)), **kwargs)

    @classmethod
    def of(cls, branched: EarlyExitModel, name: str = "") -> EarlyExitConfig:
        """The configuration of a model; `name` is its source."""
        data = without_tensors(branched.adapter_config().to_dict(), {})
        return cls.from_dict(data, name_or_path=name)


def _imagenet_names(base: Mapping[str, Any]) -> list[str] | None:
    """timm has no class names; like transformers, use ImageNet's if the number of classes matches."""
    if base.get("library") != "timm":
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset  # pyright: ignore[reportPrivateImportUsage]

    subset = infer_imagenet_subset({"num_classes": base["num_classes"]})
    return list(ImageNetInfo(subset).label_descriptions()) if subset else None


class _EarlyExitForAnswers(PreTrainedModel):
    """Base of all of them. The only registered submodule is the list of branches."""

    config_class = EarlyExitConfig
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides by accumulation steps
    answers_with: type[ModelOutput]
    """Output class if the base has none of its own."""
    answers_in = "logits"
    """Its field for the answers."""
    rank = 2
    """Dimensions of the answers of branches."""
    of_features = False
    """Whether answers are embeddings; see `Task.of_features`."""

    def __init__(self, config: EarlyExitConfig, branched: EarlyExitModel | None = None) -> None:
        if branched is None:
            raise ConfigError(
                f"A configuration has no branches: use {type(self).__name__}.from_pretrained(folder_or_repo), or "
                f"{type(self).__name__}.of(branched) for a model from ee_surgery.augment."
            )
        super().__init__(config)
        config.architectures = [type(self).__name__]
        self.branches = branched.branches
        self.branched: EarlyExitModel
        """The model inside: `operate`, `receipt`, `backbone`, ..."""
        object.__setattr__(self, "branched", branched)  # not registered: transformers must not train its original
        self.train_config = TrainConfig()
        """Objective and distillation of the loss in training mode; `TrainingArguments` decide the rest."""
        self._counts = torch.zeros(len(branched.exits) + 1, dtype=torch.long)
        self.train(branched.branches.training)

    @classmethod
    def of(cls, branched: EarlyExitModel, train_config: TrainConfig | None = None) -> _EarlyExitForAnswers:
        """Wrap a branched model, which is shared, not copied.

        Raises:
            ConfigError: its answers are of another form.
        """
        task = branched.task
        if (task.rank, task.of_features) != (cls.rank, cls.of_features):
            fitting = [own for own in _CLASSES if (own.rank, own.of_features) == (task.rank, task.of_features)]
            names = " or ".join(own.__name__ for own in fitting)
            raise ConfigError(f"{cls.__name__} is not for the task {task.name!r}: use {names}.")
        model = cls(EarlyExitConfig.of(branched), branched)
        own = getattr(getattr(branched.backbone, "config", None), "problem_type", None)
        # what a pipeline makes of the logits
        stated = own if own in task.problem_types else task.states
        model.config.problem_type = stated  # pyright: ignore[reportAttributeAccessIssue]
        if train_config is not None:
            model.train_config = train_config
        return model

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: EarlyExitConfig | None = None,
        base_model: nn.Module | None = None,
        train_config: TrainConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        own_base: bool = False,
        **others: Any,
    ) -> _EarlyExitForAnswers:
        """Load an adapter onto its base, as `ee_surgery.from_pretrained` does, ready to exit early.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub.
            config: for example with your own class names, as many as the base has.
            base_model: the base, if it cannot be loaded by its name.
            train_config: see the attribute.
            revision, token, cache_dir, local_files_only: of the repository.
            dtype: cast base and branches to it after checking the base; `auto`: no cast.
            torch_dtype: older name of `dtype`.
            device_map: a device, or `auto` for the current accelerator.
            own_base: expect an adapter with its own base weights, as for `ee_surgery.from_pretrained`.
            others: none; `trust_remote_code` has no effect, since nothing executable is ever read.
        Raises:
            ConfigError: an unsupported argument, a base on several devices, a different number of classes, or a
                `base_model` that would have to be cast.
            HubError, AdapterError, FingerprintError: see `ee_surgery.from_pretrained`.
        """
        unknown = [n for n, v in others.items() if v and not n.startswith("_") and n not in _IGNORED]
        if unknown:
            raise ConfigError(
                f"Loading early exits does not support {unknown}: the base's own library loads it unchanged."
            )
        branched = from_pretrained(
            pretrained_model_name_or_path,
            base_model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            own_base=own_base,
        )
        model = cls.of(branched, train_config)
        if config is not None:
            if config.num_labels != model.config.num_labels:
                raise ConfigError(
                    f"{config.num_labels} class names for a base with {model.config.num_labels} classes. Early exits "
                    "keep the base's classes."
                )
            config.problem_type = config.problem_type or model.config.problem_type
            config.architectures = model.config.architectures
            model.config = config
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        wanted = torch_dtype if dtype is None else dtype
        wanted = getattr(config, "dtype", None) if wanted is None else wanted  # transformers 5.9 passes it there
        model._cast(wanted, given=base_model is not None)
        model.config.dtype = model.dtype
        if device_map is not None:
            model.to(device=_device(device_map))  # pyright: ignore[reportCallIssue]
        return model

    def _cast(self, dtype: str | torch.dtype | None, given: bool) -> None:
        if dtype is None or dtype == "auto":
            return
        wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise ConfigError(f"dtype must be a floating type of torch or `auto`, got {dtype!r}.")
        if wanted != self.dtype:
            if given:
                raise ConfigError(
                    f"base_model is in {self.dtype}, and casting it to {wanted} would change your module: leave out "
                    "dtype, and call .to(dtype) if you want that."
                )
            self.to(dtype=wanted)  # pyright: ignore[reportCallIssue]

    # --- what transformers sees: only the branches

    def _apply(self, fn: Any, recurse: bool = True) -> _EarlyExitForAnswers:
        # Devices and dtypes also apply to the original, which is not a submodule.
        super()._apply(fn, recurse)
        self.branched.backbone._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> _EarlyExitForAnswers:
        """Put the branches in train or eval mode; the original stays as it is."""
        self.branched.train(mode)
        return super().train(mode)

    # --- running

    @torch.compiler.disable  # already captured: tracing would be repeated for each new input size
    def _answer(
        self, main: tuple[Tensor, ...], named: dict[str, Any], labels: Tensor | None, return_dict: bool | None
    ) -> ModelOutput | tuple[Any, ...]:
        asked = [name for name in _UNSUPPORTED if named.pop(name, None)]
        if asked:
            raise DataError(f"Early exits give logits only: leave out {asked}, or call `.branched.backbone`.")
        if self.training and labels is None and self.train_config.teach != "original" and torch.is_grad_enabled():
            raise ConfigError(f"A training step has no labels. {_LABELS_TAKEN}")
        # Without an operating point no sample leaves early, so evaluate the exits instead of the output.
        evaluated = labels is not None and self.branched.policy is None
        if (self.training and (labels is not None or self.train_config.teach == "original")) or evaluated:
            fields = self._all_exits(main, named, labels)
        else:
            found = self.branched.predict(*main, **named)
            loss = None
            if labels is not None:
                loss = self.branched.task.mean_loss(found.logits.float(), labels.to(found.logits.device))
            fields = {"loss": loss, "logits": found.logits, "exit_index": found.exit_index, "score": found.score}
            fields["macs"] = found.macs
        if not self.training:
            index = fields["exit_index"]
            self._counts = self._counts.to(index.device)
            self._counts.index_add_(0, index, torch.ones_like(index))
        given = self.branched.engine.backbone.answer(fields["logits"])
        kind, name = self.answers_with, self.answers_in
        own = (
            [key for key, value in given.items() if value is fields["logits"]] if isinstance(given, ModelOutput) else []
        )
        if own:
            kind, name = type(given), own[0]
        fields[name] = fields.pop("logits")
        output = _with_exits(kind)(**{key: value for key, value in fields.items() if value is not None})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _all_exits(self, main: tuple[Tensor, ...], named: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        """The loss over all exits; the logits are the original's, since no samples leave early."""
        config, bank = self.train_config, self.branches
        if config.distill_from > 0 or config.exit_weights == "ramp":
            raise ConfigError("`distill_from` and `ramp` depend on the progress of training, which Trainer does not "
                              "pass to its model: use ee_surgery.train.")  # fmt: skip
        if self.training:
            self._forget_what_was_measured()
        features, original = self.branched.engine.features(*main, **named)
        if self.training and self.branched.task.scaled:
            take_scale(bank, self.branched.task, original, labels, config)
        exits, original = bank.split(bank(features), original)
        costs = relative_costs(self.branched).to(original.device)
        loss = batch_loss(
            exits, original, labels, costs, config, new_head=bank.head is not None, task=self.branched.task
        )
        last = torch.full((len(original),), len(bank), device=original.device)
        fields = {"loss": loss, "logits": original.detach(), "exit_index": last}
        if self.training:
            fields["logits"] = _NotToLearnFrom.apply(fields["logits"], loss)
        elif self.branched.task.keeps_logits:  # maps of all exits are large, and of several sizes
            fields["exit_logits"] = torch.stack(
                [*(exit.logits.float() for exit in exits), original.float()], 1
            ).detach()
        return fields

    def _forget_what_was_measured(self) -> None:
        """Remove thresholds, frontier and evaluation, which belong to the weights before this step."""
        config, branched = self.train_config, self.branched
        told = {name: getattr(config, name) for name in ("objective", "teach", "distill", "temperature")}
        branched.provenance["training"] = {"by": "a training loop of transformers", **told}
        branched.state.forget_measured()

    @property
    def exit_counts(self) -> dict[str, int]:
        """Number of samples that left at each exit, by name, since loading or `reset_exit_counts`; last `original`."""
        return dict(zip((*self.branched.exits, "original"), self._counts.tolist(), strict=True))

    def reset_exit_counts(self) -> None:
        """Reset the counts to 0."""
        self._counts.zero_()

    # --- sharing

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **about: Any,
    ) -> None:
        """Write the adapter folder, as `branched.save_pretrained` does: never the base.

        In a `checkpoint-<step>` folder of Trainer the branches are also in `model.safetensors`, where Trainer looks
        for them to resume or to load the best model.

        Args:
            is_main_process: other processes write nothing.
            state_dict: ignored: the branches are whole in each process.
            push_to_hub: also push to `repo_id`, or to a repository with the folder's name.
            about: `processor`, and fields of the card; settings of weights files are ignored.
        """
        if not is_main_process:
            return
        folder, token = Path(save_directory), about.pop("token", None)
        about = {name: value for name, value in about.items() if name not in _UNSAVED}
        self.branched.save_pretrained(folder, **about)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            with atomic_write(folder / "model.safetensors") as path:
                save_file({n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}, path)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, token=token, **about)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        self, repo_id: str, *, commit_message: str | None = None, **hub: Any
    ) -> str:
        """Upload the adapter, as `branched.push_to_hub` does, with its arguments."""
        hub = {name: value for name, value in hub.items() if name not in _UNSAVED}
        if commit_message is not None:
            hub["message"] = commit_message
        return self.branched.push_to_hub(repo_id, **hub)


class _EarlyExitForPictures(_EarlyExitForAnswers):
    """Reads pictures."""

    main_input_name = "pixel_values"
    input_modalities = "image"

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Answer; samples leave early according to the operating point.

        Args:
            pixel_values: shape (B, 3, H, W), or whatever the base's main input is.
            labels: of the task, see `Task.check_target`; class numbers (B,), say: the loss is returned. In training
                mode, and wherever no operating point is set, it is that of all exits, as `train_config` says, and no
                samples leave; else that of the answers.
            return_dict: False: a tuple.
            inputs: other inputs of the base, by name.
        Returns:
            The base's output class with `loss`, `logits` and also `exit_index`, `score` and `macs`, each (B,); see
            `ExitOutput`. In eval mode with labels and without an operating point also `exit_logits` (B, K, C) of all
            exits where answers are vectors, the original's last, for `ee_surgery.integrations.exit_metrics`.
        Raises:
            ConfigError: in training mode without labels, which Trainer removes for label smoothing, for example.
        """
        main = () if pixel_values is None else (pixel_values,)
        return self._answer(main, inputs, labels, return_dict)  # pyright: ignore[reportCallIssue]


class EarlyExitForImageClassification(_EarlyExitForPictures):
    """An image classifier with early exits, on a base from timm, transformers or plain torch."""

    answers_with = ImageClassifierOutput


class EarlyExitForSequenceClassification(_EarlyExitForAnswers):
    """A text classifier with early exits."""

    main_input_name = "input_ids"
    answers_with = SequenceClassifierOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Classify; samples leave early according to the operating point.

        Args:
            input_ids: shape (B, T). A new length is captured on first use: pad to multiples of 16, say.
            attention_mask: (B, T), as the base takes it.
            token_type_ids: (B, T), as the base takes them.
            position_ids: (B, T), as the base takes them.
            labels: as for images.
            return_dict: as for images.
            inputs: as for images.
        """
        own = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        main = () if input_ids is None else (input_ids,)
        return self._answer(main, {**own, **inputs}, labels, return_dict)  # pyright: ignore[reportCallIssue]


class EarlyExitForSemanticSegmentation(_EarlyExitForPictures):
    """A segmenter with early exits; `post_process_semantic_segmentation` of its processor works as before."""

    answers_with = SemanticSegmenterOutput
    rank = 4


class EarlyExitForDepthEstimation(_EarlyExitForPictures):
    """A model of depths, or other maps of numbers, with early exits."""

    answers_with = DepthEstimatorOutput
    answers_in = "predicted_depth"
    rank = 4


class EarlyExitForFeatures(_EarlyExitForPictures):
    """Embeddings of pictures or texts, with early exits."""

    answers_with = BaseModelOutputWithPooling
    answers_in = "pooler_output"
    of_features = True


_CLASSES: tuple[type[_EarlyExitForAnswers], ...] = (
    EarlyExitForImageClassification,
    EarlyExitForSequenceClassification,
    EarlyExitForSemanticSegmentation,
    EarlyExitForDepthEstimation,
    EarlyExitForFeatures,
)


class _NotToLearnFrom(torch.autograd.Function):
    """Marks the original's logits next to a loss: backward through them would train nothing, so it raises."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ConfigError(f"`logits` are the original's, so a loss on them trains no branch. {_LABELS_TAKEN}")


@cache
def _with_exits(answer: type[ModelOutput]) -> type[ModelOutput]:
    """The output class of a base with more fields at the end."""
    more = ("loss", "exit_index", "score", "macs", "exit_logits")
    own = {field.name for field in fields(answer)}  # pyright: ignore[reportArgumentType]
    added = [(name, "Tensor | None", None) for name in more if name not in own]
    name = f"EarlyExit{answer.__name__}"
    return make_dataclass(name, added, bases=(answer,), namespace={"__module__": __name__})


def _device(device_map: Any) -> torch.device:
    """The single device in a device map.

    Raises:
        ConfigError: it has several devices.
    """
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        device_map = places.pop() if len(places) == 1 else device_map
    if device_map == "auto":
        found = torch.accelerator.current_accelerator()
        return torch.device("cpu") if found is None else found
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device_map={device_map!r}: early exits run on one device. Use a device ('cuda:0') or `auto`."
        ) from error


def register() -> None:
    """Register with transformers' Auto classes; idempotent."""
    AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
    for auto, own in (
        (AutoModelForImageClassification, EarlyExitForImageClassification),
        (AutoModelForSequenceClassification, EarlyExitForSequenceClassification),
        (AutoModelForSemanticSegmentation, EarlyExitForSemanticSegmentation),
        (AutoModelForDepthEstimation, EarlyExitForDepthEstimation),
        (AutoModel, EarlyExitForFeatures),
    ):
        auto.register(EarlyExitConfig, own, exist_ok=True)
