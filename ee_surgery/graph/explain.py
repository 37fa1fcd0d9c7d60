"""Why a model could not be read as a graph: what happened, in which module, and the way out."""

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

from ee_surgery.backbone import Backbone
from ee_surgery.errors import CaptureError
from ee_surgery.inputs import Arguments, tensors


@contextmanager
def explained(backbone: Backbone, model: nn.Module, arguments: Arguments) -> Iterator[None]:
    """Turn whatever torch.export raises inside, reading `model`, into a `CaptureError` that helps."""
    names = {id(module): name for name, module in model.named_modules() if name}
    fixed: list[str] = []  # where a size became a constant, that of the batch last

    try:
        with _watched(lambda: fixed.append(_innermost(_outward(sys._getframe(2)), names))):
            yield
    except CaptureError:
        raise
    except Exception as error:
        where = _innermost(_inward(error), names)
        message = _refused(backbone, arguments) or _cannot(backbone, error, where, fixed)
        raise CaptureError(message) from error


def _watched(note: Callable[[], None]) -> AbstractContextManager[object]:
    """While this lasts, `note` is called whenever a symbolic size turns out to be one number."""
    original = getattr(ShapeEnv, "_set_replacement", None)  # torch's own business: only the message depends on it
    if original is None:
        return nullcontext()

    def replacing(self: ShapeEnv, symbol: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(value, "is_number", False):
            note()
        original(self, symbol, value, *args, **kwargs)

    return patch.object(ShapeEnv, "_set_replacement", replacing)


def _refused(backbone: Backbone, arguments: Arguments) -> str:
    """What the model itself says to these inputs, if it does not take them."""
    try:
        with torch.no_grad():
            backbone(arguments)
    except Exception as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors(arguments).items()}
        return (
            f"{backbone.model_id} does not take inputs of shape {shapes}: {_first(error)}. Resize them, or see whether "
            "the model has an option for other sizes (dynamic_img_size, interpolate_pos_encoding)."
        )
    return ""


def _cannot(backbone: Backbone, error: Exception, where: str, fixed: list[str]) -> str:
    said, kind = str(error), type(error).__name__
    if "Constraints violated" in said:
        where = fixed[-1] if fixed else where
        problem = "its code fixes the batch size, as a Python loop over the samples does"
        hint = "Compute on the batch as a whole there"
    elif kind == "UnsupportedOperatorException" or "fake" in said.partition("\n")[0].lower():
        problem = f"an operator has no fake kernel ({_first(error)})"
        hint = "Register one with torch.library.register_fake"
    elif kind.startswith("GuardOnDataDependent") or "data-dependent" in said or "Data-dependent" in said:
        problem = f"its Python control flow depends on the data ({_first(error)})"
        hint = "Replace it by tensor operations (torch.where)"
    else:
        problem = f"{kind}: {_first(error)}"
        hint = "Replace that code"
    place = f" in module {where!r}" if where else ""
    keep = f", or, if it treats each sample on its own, keep it whole: opaque=[{where!r}]" if where else ""
    return f"{backbone.model_id} cannot be captured by torch.export{place}: {problem}. {hint}{keep}."


def _first(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line[:300].rstrip(".")


def _innermost(frames: Iterator[FrameType], names: dict[int, str]) -> str:
    """The module of the model whose code ran deepest."""
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
