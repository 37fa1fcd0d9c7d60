"""Joint training of the original and its branches, on a copy whose own modules run in training mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ee_surgery.backbone.inputs import Arguments, tensors
from ee_surgery.branches import ExitLogits
from ee_surgery.data.batches import place
from ee_surgery.errors import ConfigError, ExitPointError
from ee_surgery.model import EarlyExitModel

Outputs = dict[str, list[Tensor]]
"""Output tensors of each module call, by the name of the exit there."""


class JointModel(nn.Module):
    """A model and its branches as one trainable module: the model's own forward, with features read by hooks.

    The stages of an early-exit model are captured in eval mode, without BatchNorm updates or dropout. So the model's
    own code runs in training; hooks are attached only during the call.

    Parameters with `requires_grad=False` stay as they are, and so do the running statistics of norms whose parameters
    are all frozen. Modules that were in eval mode inside a model in training mode stay in eval mode.

    Args:
        branched: a copy, which will change.
    Raises:
        ConfigError: all parameters of the original are frozen.
        ExitPointError: a branch's features are not an output of the module that its exit is named after.
    """

    def __init__(self, branched: EarlyExitModel) -> None:
        super().__init__()
        self.model = branched.backbone
        self.bank = branched.branches
        self._branched = [branched]  # in a list: not a submodule
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError(
                "joint=True also trains the original, but all of its parameters have requires_grad=False. Set it to "
                "True for those to train, or leave out joint=True."
            )
        self._still = list(_still(self.model))
        self._taps, self._masks = self._locate(branched)

    def forward(self, arguments: Arguments) -> tuple[list[ExitLogits], Tensor]:
        """Normalized inputs -> logits of every branch, and the model's logits."""
        branched = self._branched[0]
        logits, seen = self._watch(arguments)
        features = []
        for name, tap, mask in zip(branched.exits, self._taps, self._masks, strict=True):
            read = seen[name][tap]
            features.append((read,) if mask is None else (read, arguments[mask]))
        if self.bank.head is not None:
            features.append((logits,))
        return self.bank.split(self.bank(features), logits)

    def train(self, mode: bool = True) -> JointModel:
        """Training mode for trained modules; frozen ones stay in eval mode."""
        super().train(mode)
        for module in self._still:
            module.training = False
        return self

    def _watch(self, arguments: Arguments) -> tuple[Tensor, Outputs]:
        """The model's logits, and the outputs of the modules that end at exits."""
        seen: Outputs = {}
        calls: Counter[str] = Counter()

        def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                call = calls[path]
                calls[path] += 1
                # Cloned: the next module may write to it.
                found = [leaf.clone() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
                seen[f"{path}@{call}" if call else path] = found

            return keep

        branched = self._branched[0]
        with ExitStack() as hooks:
            for path in dict.fromkeys(name.partition("@")[0] for name in branched.exits):
                hooks.callback(self.model.get_submodule(path).register_forward_hook(hook(path)).remove)
            backbone = branched.engine.backbone  # called in the mode that its modules are in, with gradients
            return backbone.logits(backbone.call(arguments)), seen

    def _locate(self, branched: EarlyExitModel) -> tuple[list[int], list[str | None]]:
        """Which output of each module its branch reads, and which input is the mask; compared in eval mode."""
        weight = next(branched.branches.parameters())
        backbone = branched.engine.backbone
        sample = backbone.arguments(place(backbone.sample, weight.device, weight.dtype))
        features, _ = branched.engine.features(sample)
        with torch.no_grad():
            self.model.eval()
            _, seen = self._watch(sample)
        taps: list[int] = []
        masks: list[str | None] = []
        for name, (wanted, *mask) in zip(branched.exits, features, strict=False):
            if len(mask) > 1:
                raise ExitPointError(
                    f"joint=True reads one tensor at an exit, but {1 + len(mask)} are live at {name!r}, and its branch "
                    "reads all of them. Choose an exit with one live tensor (see `inspect`)."
                )
            taps.append(_which(wanted, dict(enumerate(seen.get(name, []))), name))
            masks.append(_which(mask[0], tensors(sample), name) if mask else None)
        return taps, masks


def _still(model: nn.Module, frozen: bool = False) -> Iterator[nn.Module]:
    """Modules that stay in eval mode: norms whose parameters are frozen, and modules that the user put in eval mode.

    Args:
        frozen: whether the parent's parameters are, which decides for modules without parameters.
    """
    own = list(model.parameters())
    frozen = not any(parameter.requires_grad for parameter in own) if own else frozen
    for child in model.children():
        # if the whole model is in eval mode, that says nothing about single modules
        if model.training and not child.training:
            yield from child.modules()
        else:
            yield from _still(child, frozen)
    if frozen and getattr(model, "running_mean", None) is not None:
        yield model


def _which(wanted: Tensor, among: Any, name: str) -> Any:
    for key, value in among.items():
        if isinstance(value, Tensor) and value.shape == wanted.shape and torch.allclose(value, wanted, atol=1e-4):
            return key
    raise ExitPointError(
        f"joint=True reads features at the end of modules, but those at {name!r} are not an output of that module. "
        "Choose an exit at the end of a whole block (`inspect` marks them)."
    )
