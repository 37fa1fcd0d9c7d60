"""The model inside its wrappers: data parallelism, torch.compile, accelerate, moving averages."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ee_surgery.checks import refuse
from ee_surgery.errors import CaptureError

# Their output is the inner module's own.
_HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_MAKE_ONE = (
    "Create it first: timm.create_model('resnet50', pretrained=True), or "
    "AutoModelForImageClassification.from_pretrained('google/vit-base-patch16-224')."
)
# By name: importing FSDP or DeepSpeed takes longer than everything else here.
_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "DTensor"})


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside any number of wrappers, at the top or around its parts; `model` itself if there are none.

    So parameters and exits have the same names regardless of wrappers. The wrapper is not changed: if a part is
    wrapped, or `forward` was replaced, the result is a sibling module that shares parameters, buffers, hooks and all
    parts that are not wrapped.

    Raises:
        ConfigError: it is not a module, but the name of one, for example.
        CaptureError: parameters are sharded over processes, or it is TorchScript.
    """
    if not isinstance(model, nn.Module):
        how = "Create an instance first." if isinstance(model, type) else _MAKE_ONE
        refuse("model", "a torch.nn.Module", model, hint=how)
    for kind in (type(model), *{type(parameter) for parameter in model.parameters()}):
        if sharded := _SHARDED.intersection(cls.__name__ for cls in kind.__mro__):
            raise CaptureError(
                f"{type(model).__name__}: {sorted(sharded)[0]} shards parameters over processes, but exits need them "
                "whole. Pass the inner module as it was before wrapping (for many wrappers a whole copy of "
                "`model.module`), and train the branches with plain data parallelism."
            )
    return _unwrapped(model, {})


def library_model(model: nn.Module) -> nn.Module:
    """The timm or transformers model inside a PEFT model, with its configuration; any other model itself.

    PEFT models are not unwrapped: their forward may do more than that of the inner model.
    """
    held = getattr(model, "get_base_model", None)  # peft need not be installed
    found = held() if callable(held) else model
    return found if isinstance(found, nn.Module) else model


def peft_adapters(model: nn.Module) -> str:
    """The adapters that PEFT put into a model, their kinds and states, in words; empty if there are none.

    For example `default (lora)`, `default (lora, merged)` or `default (lora, off)`; only those active or merged.
    """
    found: set[str] = set()
    for layer in model.modules():
        if not isinstance(getattr(type(layer), "disable_adapters", None), property):
            continue
        held: Any = layer
        package = type(layer).__module__.split(".")
        kind = [package[2]] if package[1:2] == ["tuners"] else []
        merged = getattr(held, "merged_adapters", ())
        state = ["off"] if held.disable_adapters else ["merged"] if merged else []
        found.update(f"{name} ({', '.join([*kind, *state])})" for name in merged or held.active_adapters if kind)
    return ", ".join(sorted(found))


def _unwrapped(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:  # used in several places, but one module
        return known[module]
    inner = module
    while (held := _held(inner)) is not None:
        inner = held
    parts = {name: None if part is None else _unwrapped(part, known) for name, part in inner._modules.items()}
    own: dict[str, Any] = {}
    if any(parts[name] is not part for name, part in inner._modules.items()):
        own["_modules"] = parts
    if (forward := _plain_forward(inner)) is not None:
        own["forward"] = forward
    known[module] = _sibling(inner, own) if own else inner
    return known[module]


def _held(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None if it is not a wrapper."""
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(module).__name__} is TorchScript, which torch.export cannot read: pass the nn.Module that it was "
            "made from."
        )
    if isinstance(module, _HOLDERS):
        return module.module
    return module._modules.get("_orig_mod")  # torch.compile's; importing its class would import all of dynamo


def _plain_forward(module: nn.Module) -> Any:
    """The original forward if accelerate (mixed precision) or `torch.compile(model.forward)` replaced it."""
    given = vars(module).get("forward")
    if given is None:
        return None
    found = vars(module).get("_original_forward", given)
    while not isinstance(found, MethodType) and hasattr(found, "_torchdynamo_orig_callable"):
        found = found._torchdynamo_orig_callable
        if getattr(found, "__globals__", {}).get("__name__", "").startswith("torch._dynamo."):
            found = getattr(found, "__wrapped__", found)  # dynamo wraps bound methods once more
    return None if found is given else found


def _sibling(module: nn.Module, own: dict[str, Any]) -> nn.Module:
    """A module that shares everything with another one except the given attributes."""
    sibling = object.__new__(type(module))
    sibling.__dict__.update(module.__dict__)
    sibling.__dict__.update(own)
    if "forward" in own:
        sibling.__dict__.pop("_original_forward", None)
        function = getattr(own["forward"], "__func__", own["forward"])
        if function is type(module).forward:
            del sibling.__dict__["forward"]
        elif getattr(own["forward"], "__self__", None) is module:
            sibling.__dict__["forward"] = MethodType(function, sibling)
    return sibling
