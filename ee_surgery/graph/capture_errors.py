"""Explain why a model could not be captured: the problem, the module, and a way out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.inputs import Arguments
from ee_surgery.backbone.refusals import first_line, refusal
from ee_surgery.errors import OUT_OF_MEMORY, CaptureError


@contextmanager
def explained(backbone: Backbone, model: nn.Module, arguments: Arguments) -> Iterator[None]:
    """Turn any error of torch.export on `model` into a `CaptureError` with an explanation."""
    names = {id(module): name for name, module in model.named_modules() if name}
    fixed: list[str] = []  # modules where a size became constant; the last is that of the batch

    try:
        with _watched(lambda: fixed.append(_innermost(_outward(sys._getframe(2)), names))):
            yield
    except (CaptureError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        where = _innermost(_inward(error), names)
        message = _refused(backbone, arguments) or _cannot(backbone, error, where, fixed)
        raise CaptureError(message) from error


def _watched(note: Callable[[], None]) -> AbstractContextManager[object]:
    """Call `note` whenever a symbolic size becomes a constant."""
    original = getattr(ShapeEnv, "_set_replacement", None)  # private to torch; only the message depends on it
    if original is None:
        return nullcontext()

    def replacing(self: ShapeEnv, symbol: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(value, "is_number", False):
            note()
        original(self, symbol, value, *args, **kwargs)

    return patch.object(ShapeEnv, "_set_replacement", replacing)


def _refused(backbone: Backbone, arguments: Arguments) -> str:
    """Why the model itself does not accept these inputs, if so."""
    try:
        with torch.no_grad():
            backbone(arguments)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        return refusal(backbone.model, backbone.model_id, arguments, backbone.sample, error)
    return ""


def _cannot(backbone: Backbone, error: Exception, where: str, fixed: list[str]) -> str:
    said, kind = str(error), type(error).__name__
    if "Constraints violated" in said:
        where = fixed[-1] if fixed else where
        problem = "its code fixes the batch size, for example by a Python loop over the samples"
        hint = "Compute on the whole batch there"
    elif kind == "UnsupportedOperatorException" or "fake" in said.partition("\n")[0].lower():
        problem = f"an operator has no fake kernel ({first_line(error)})"
        hint = "Register one with torch.library.register_fake"
    elif kind.startswith("GuardOnDataDependent") or "data-dependent" in said or "Data-dependent" in said:
        problem = f"its Python control flow depends on the data ({first_line(error)})"
        hint = "Replace it with tensor operations (torch.where)"
    elif quantised := _quantised(backbone.model):
        problem = f"its modules {quantised[:5]} are quantised, which torch.export cannot read ({first_line(error)})"
        hint = "Put exits on the model before it was quantised, in float32, float16 or bfloat16"
    else:
        problem = f"{kind}: {first_line(error)}"
        hint = "See the cause above; code that only works in eager mode has to be written as tensor operations"
    place = f" in module {where!r}" if where else ""
    keep = f", or, if it treats each sample independently, keep it whole: opaque=[{where!r}]" if where else ""
    return f"{backbone.model_id} cannot be captured by torch.export{place}: {problem}. {hint}{keep}."


def _quantised(model: nn.Module) -> list[str]:
    """Modules of quantisation libraries, which store weights packed or in their own tensor types."""
    libraries = ("quantized", "bitsandbytes", "torchao", "quanto", "awq", "gptq")
    return [
        name
        for name, module in model.named_modules()
        for kind in (type(module), *(type(weight.data) for weight in module.parameters(recurse=False)))
        if any(library in kind.__module__ for library in libraries)
    ]


def _innermost(frames: Iterator[FrameType], names: dict[int, str]) -> str:
    """The module of the model in the innermost frame."""
    found = ""
    for frame in frames:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = names[id(owner)]
    return found


def _inward(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of a stack, outermost first."""
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return reversed(stack)
