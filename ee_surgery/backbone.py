"""One face for timm, transformers and plain torch models: how to call one, what it answers, who it is."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ee_surgery.errors import CaptureError, DataError

Library: TypeAlias = Literal["timm", "transformers", "torch"]
# What a model may answer with: logits, a tuple that begins with them, or a transformers ModelOutput.
Output: TypeAlias = Tensor | tuple[object, ...] | Mapping[str, object]


@contextmanager
def eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Put `modules` in eval mode; give each its own `training` flag back afterwards, also on an error."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, as hex."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + data.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Who a backbone is, so that the same one can be found again."""

    library: Library
    model_id: str
    """timm architecture with tag, Hub repository, or class name."""
    revision: str | None
    fingerprint: str
    """SHA-256 over the names and digests of all parameters and persistent buffers."""
    num_classes: int


def make_model(
    library: Library,
    model_id: str,
    *,
    revision: str | None = None,
    checkpoint: str = "",
    num_classes: int | None = None,
) -> nn.Module:
    """Build a timm or transformers image classifier with pretrained weights, in eval mode.

    Args:
        checkpoint: weights file for a timm model, in place of its pretrained ones.
        num_classes: of a timm model, where not the architecture's own.
    """
    if library == "timm":
        import timm

        options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        pretrained = not checkpoint
        return timm.create_model(model_id, pretrained=pretrained, checkpoint_path=checkpoint or None, **options).eval()
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(model_id, revision=revision)


class Backbone:
    """A pretrained model seen from outside. Holds it by reference and never changes it.

    Args:
        model: a timm model, a transformers image classifier, or any `nn.Module` that maps one image
            tensor to logits.
        sample: an example input with its batch dimension first, e.g. `torch.randn(2, 3, 224, 224)`.
            Read from the model's own configuration when left out.
    Raises:
        DataError: `sample` is missing for a model that does not say its input size, or is no batch.
        CaptureError: the model's answer holds no logits of shape (B, C).
    """

    def __init__(self, model: nn.Module, sample: Tensor | None = None) -> None:
        self.model = model
        self.library: Library = _library(model)
        self.model_id, self.revision = _model_id(model, self.library)
        self.modules = list(model.modules())
        self.sample = self._sample(sample)
        output = self(self.sample)
        logits = self.logits(output)
        if logits.ndim != 2 or logits.shape[0] != self.sample.shape[0]:
            raise CaptureError(
                f"{self.model_id} answers with a tensor of shape {tuple(logits.shape)}, not logits of shape "
                f"({self.sample.shape[0]}, classes). Build it with a classification head."
            )
        self.num_classes = int(logits.shape[1])
        self._answer: type | None = None if isinstance(output, Tensor) else type(output)

    def __call__(self, x: Tensor) -> Output:
        """The original's own answer in eval mode, through its own forward: nothing of this package runs inside."""
        if not any(module.training for module in self.modules):
            return self.call(x)
        with eval_mode(self.modules):
            return self.call(x)

    def call(self, x: Tensor) -> Output:
        """Call the model on one batch as its library does."""
        if self.library == "transformers":
            return self.model(**{self.input_name: x})
        return self.model(x)

    @property
    def input_name(self) -> str:
        """Keyword under which the model takes its input (`pixel_values` for transformers)."""
        return str(getattr(self.model, "main_input_name", "pixel_values"))

    def logits(self, output: Output) -> Tensor:
        """Find the logits in what the model answered."""
        if isinstance(output, Tensor):
            return output
        found = output.get("logits") if isinstance(output, Mapping) else output[0] if output else None
        if not isinstance(found, Tensor):
            raise CaptureError(
                f"No logits in the {type(output).__name__} that {self.model_id} answers with. "
                "Wrap the model in a module that returns its logits and pass a sample."
            )
        return found

    def answer(self, logits: Tensor) -> Output:
        """Put logits into the type that the original answers with."""
        if self._answer is None:
            return logits
        return (logits,) if issubclass(self._answer, tuple) else self._answer(logits=logits)

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
        return Identity(self.library, self.model_id, self.revision, fingerprint, self.num_classes)

    @property
    def label_names(self) -> list[str] | None:
        """Class names where the model's configuration holds them, in index order."""
        config = getattr(self.model, "config", None)
        names = getattr(config, "id2label", None) if self.library == "transformers" else None
        if names:
            return [str(names[i]) for i in sorted(names)]
        names = (getattr(self.model, "pretrained_cfg", None) or {}).get("label_names")
        return list(map(str, names)) if names else None

    @property
    def prefix_tokens(self) -> int:
        """How many tokens before the patches (class token, registers) a token model carries."""
        if self.library == "timm":
            return int(getattr(self.model, "num_prefix_tokens", 0))
        names = [name.rsplit(".", 1)[-1] for name, _ in self.model.named_parameters()]
        registers = [p for n, p in self.model.named_parameters() if n.rsplit(".", 1)[-1] == "register_tokens"]
        extra = "distillation_token" in names
        return ("cls_token" in names) + extra + sum(int(p.shape[-2]) for p in registers)

    def _sample(self, sample: Tensor | None) -> Tensor:
        if sample is None:
            shape = _input_shape(self.model, self.library)
            if shape is None:
                raise DataError(
                    f"{self.model_id} does not say what input it takes. Pass one: sample=torch.randn(2, 3, H, W)."
                )
            # Any finite picture does, but the same one each time: `augment` verifies its cuts on it.
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(3, *shape, generator=generator)
        if not isinstance(sample, Tensor) or sample.ndim < 2 or sample.shape[0] < 1:
            seen = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise DataError(f"The sample must be a tensor with a batch dimension, such as (2, 3, H, W); got {seen}.")
        if sample.shape[0] < 3:  # export specialises batches of 1, and two rows cannot show an order gone wrong
            first = sample[:1]
            sample = torch.cat([first, first.flip(-1), first.roll(1, -1)])
        weights = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if weights is not None:
            sample = sample.to(weights.device, weights.dtype if sample.is_floating_point() else sample.dtype)
        return sample


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
        return str(getattr(config, "_name_or_path", "") or name), getattr(config, "_commit_hash", None)  # pyright: ignore[reportArgumentType, reportReturnType]
    return name, None


def _input_shape(model: nn.Module, library: Library) -> tuple[int, int, int] | None:
    if library == "timm":
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        patches = getattr(model, "patch_embed", None)
        grid = getattr(patches, "img_size", None)  # of this very model; the configuration has the architecture's
        if grid is None:
            return None if size is None else tuple(size)
        channels = size[0] if size else getattr(getattr(patches, "proj", None), "in_channels", 3)
        return (channels, *grid)
    if library == "transformers":
        config = model.config
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return int(getattr(config, "num_channels", 3)), height, width  # pyright: ignore[reportArgumentType]
    return None
