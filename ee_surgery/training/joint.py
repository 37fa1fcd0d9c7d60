"""The original trained along with its branches: on a copy, whose own modules run in training mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ee_surgery.branches import ExitLogits
from ee_surgery.errors import ExitPointError
from ee_surgery.inputs import Arguments
from ee_surgery.model import EarlyExitModel


class JointModel(nn.Module):
    """A model and its branches as one module that learns: the model's own forward, its exits read by hooks.

    The stages of an early-exit model are captured in eval mode: BatchNorm would not update there, nothing would be
    dropped. So in training the model's own code runs.

    Args:
        branched: a copy, which will change.
    Raises:
        ExitPointError: what a branch reads at an exit is no output of the module that the exit is named after.
    """

    def __init__(self, branched: EarlyExitModel) -> None:
        super().__init__()
        self.model = branched.original
        self.bank = branched.branches
        self._branched = [branched]  # in a list: not a submodule
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_()
        self._seen: dict[str, list[Tensor]] = {}
        self._calls: dict[str, int] = {}
        for name in branched.exits:
            path = name.partition("@")[0]
            self.model.get_submodule(path).register_forward_hook(self._hook(path))
        self._taps, self._masks = self._locate(branched)

    def forward(self, arguments: Arguments) -> tuple[list[ExitLogits], Tensor]:
        """Inputs in their normal form to the answer of every branch and the model's logits."""
        branched = self._branched[0]
        logits = branched.logits_of(arguments)
        features = []
        for name, tap, mask in zip(branched.exits, self._taps, self._masks, strict=True):
            read = self._seen[name][tap]
            features.append((read,) if mask is None else (read, arguments[mask]))
        if self.bank.head is not None:
            features.append((logits,))
        self._forget()
        return branched.split(self.bank(features), logits)

    def _forget(self) -> None:
        self._seen, self._calls = {}, {}

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            call = self._calls.get(path, 0)
            self._calls[path] = call + 1
            # Cloned: the next module may write to it.
            found = [leaf.clone() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            self._seen[f"{path}@{call}" if call else path] = found

        return keep

    def _locate(self, branched: EarlyExitModel) -> tuple[list[int], list[str | None]]:
        """Which output of each module its branch reads, and which input is the mask: compared in eval mode."""
        sample = branched.sample
        features, _ = branched.features(**sample)
        with torch.no_grad():
            branched.original.eval()
            branched.logits_of(sample)
        taps: list[int] = []
        masks: list[str | None] = []
        for name, (wanted, *mask) in zip(branched.exits, features, strict=False):
            if len(mask) > 1:
                raise ExitPointError(
                    f"joint=True reads one tensor at an exit, but {1 + len(mask)} cross {name!r}, and its branch reads "
                    "them all. Choose an exit where one does (`inspect` shows how many are live)."
                )
            taps.append(_which(wanted, dict(enumerate(self._seen.get(name, []))), name))
            masks.append(_which(mask[0], sample, name) if mask else None)
        self._forget()
        return taps, masks


def _which(wanted: Tensor, among: Any, name: str) -> Any:
    for key, value in among.items():
        if isinstance(value, Tensor) and value.shape == wanted.shape and torch.allclose(value, wanted, atol=1e-4):
            return key
    raise ExitPointError(
        f"joint=True reads exits where modules end, but what the branch at {name!r} reads is no output of that module. "
        "Choose an exit at the end of a whole block (`inspect` marks them)."
    )
