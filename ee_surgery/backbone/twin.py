"""Twins: copies of a module's structure over the same tensors, for changes that must not affect the module itself."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ee_surgery.errors import OUT_OF_MEMORY


def twin(model: nn.Module, *, live: bool = False) -> nn.Module:
    """A copy of a module in eval mode that shares its parameters and buffers instead of copying them.

    Flags, hooks, attributes and fake tensors set on the twin do not affect the module, which another thread may be
    running or training meanwhile.

    Args:
        live: share the tables of parameters and buffers as well, so that the twin follows `Module.to`,
            `load_state_dict(assign=True)` and replaced parameters. Otherwise tensors of the twin may be swapped freely.
    """
    shared: dict[int, Any] = {id(value): value for value in (*_tensors(model), *_listeners(model))}
    try:
        copied = deepcopy(model, dict(shared))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # an attribute that cannot be copied: a lock, an open file, a generator
        copied = deepcopy(model, {**shared, **_uncopied(model, shared)})
    for path, module in copied.named_modules():
        module.training = False
        if live:
            origin = model.get_submodule(path)
            vars(module).update(_parameters=origin._parameters, _buffers=origin._buffers)
    return copied


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors in plain attributes or containers of modules."""
    for module in model.modules():
        yield from (leaf for leaf in tree_leaves([*vars(module).values()]) if isinstance(leaf, Tensor))


def _listeners(model: nn.Module) -> Iterator[object]:
    """Owners of forward hooks, such as a recorder: they are shared, since a copy would record in their place."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook, "__self__", hook)
            bound = (owner, *getattr(hook, "args", ()), *getattr(hook, "keywords", {}).values())
            if not any(isinstance(value, nn.Module) for value in bound):  # a module's own hook must belong to its twin
                yield owner


def _uncopied(model: nn.Module, shared: dict[int, Any]) -> dict[int, Any]:
    """Attributes that cannot be copied, by id."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                try:
                    deepcopy(value, dict(shared))
                except OUT_OF_MEMORY:
                    raise
                except Exception:
                    found[id(value)] = value
    return found
