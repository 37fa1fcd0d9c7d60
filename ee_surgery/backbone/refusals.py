"""Why a model does not take its inputs: the cause where trying or comparing finds it, else what is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ee_surgery.backbone.inputs import Arguments, tensors
from ee_surgery.errors import OUT_OF_MEMORY, CaptureError

_BYTES = (
    "pictures as bytes become floating point numbers by x.float() / 255 and the model's own normalisation "
    "(`branched.transform()` prepares pictures)"
)


def check_weights(model: nn.Module, model_id: str, needed: bool = False) -> None:
    """Refuse a model whose weights are not all there, on one device, as ordinary tensors.

    Args:
        needed: False lets a model pass that was made on the meta device as a whole: it can be read, but not run.
    Raises:
        CaptureError: offloaded, never loaded, spread over devices, or made in inference mode.
    """
    weights = [*model.named_parameters(), *model.named_buffers()]
    absent = [name for name, tensor in weights if tensor.is_meta]
    offloaded = any("_hf_hook" in vars(module) for module in model.modules())  # accelerate's
    if absent and (needed or offloaded or len(absent) < len(weights)):
        how = "by device_map= or cpu_offload" if offloaded else "or never loaded (init_empty_weights)"
        raise CaptureError(
            f"{len(absent)} of {len(weights)} parameters and buffers of {model_id} have no data, as {absent[0]!r}: "
            f"they are on the meta device, offloaded {how}. Load the whole model onto one device."
        )
    devices = {tensor.device for _, tensor in model.named_parameters() if not tensor.is_meta}
    if len(devices) > 1:
        raise CaptureError(
            f"{model_id} is spread over {sorted(map(str, devices))}: exits need all of it on one device. Load it "
            "without device_map=, or move it with .to(device)."
        )
    if any(tensor.is_inference() for _, tensor in model.named_parameters()) and not torch.is_inference_mode_enabled():
        raise CaptureError(
            f"The parameters of {model_id} were made under torch.inference_mode(), and torch.export cannot read "
            "such. Make or load the model outside of it, or take copy.deepcopy(model) there."
        )


def refusal(model: nn.Module, model_id: str, arguments: Arguments, known: Arguments, error: Exception) -> str:
    """Why a model that took `known`, wherever and in whatever type it was then, does not take `arguments`."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None:
        known = {name: v.to(weight.device, _type(v, weight.dtype)) for name, v in tensors(known).items()}
    found = "; ".join(_differences(arguments, known))
    cause = f"Unlike the inputs that it takes, {found}."
    if not found:
        cause = (
            "It takes others of that kind: their values (token ids out of range?), an option or its code are to blame."
        )
    return f"{model_id} does not take inputs of shape {_shapes(arguments)}: {first_line(error)}. {cause}"


def sample_refusal(
    model: nn.Module,
    model_id: str,
    sample: Arguments,
    run: Callable[[Arguments], object],
    error: Exception,
    own: bool,
) -> str:
    """Why a model does not take its first sample: found by trying what differs from it in one way.

    Args:
        run: calls the model.
        own: whether the user passed the sample.
    """
    said = f"{model_id} does not take a sample of shape {_shapes(sample)}: {type(error).__name__}: {first_line(error)}."
    main = next(iter(tensors(sample)))
    for why, value in variants(sample[main], model):
        if takes(run, {**sample, main: value}):
            return f"{said} It takes {tuple(value.shape)} of {value.dtype}: {why}. Pass one like that: sample=."
    possible = "another size, number of channels or type, token ids out of range, or an input that is missing"
    if not own:
        possible = (
            f"the sample was made from the model's configuration, and may have the wrong size or channels; {possible}"
        )
    return f"{said} Possible causes: {possible}. Pass a batch that the model takes: sample=."


def variants(value: Tensor, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that differ from one in type, layout or channels, with what that would mean."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    shapes = [("", value)]
    if value.ndim >= 5:
        shapes.append((f"streams of pictures become one batch by x.flatten(0, {value.ndim - 4})", value.flatten(0, -4)))
    if value.ndim == 3:
        shapes.append(("a picture alone becomes a batch by x.unsqueeze(0)", value.unsqueeze(0)))
    if value.ndim == 4:
        shapes.append(("channels come before height and width, x.permute(0, 3, 1, 2)", value.permute(0, 3, 1, 2)))
        wanted = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), value.shape[1])
        for channels in (wanted, wanted // 4, wanted // 16):  # some fold pictures before the first convolution
            if channels not in (0, value.shape[1]):
                pictures = value[:, :1].expand(-1, channels, -1, -1)
                shapes.append((f"its pictures have {channels} channels, not {value.shape[1]}", pictures))
    for why, shaped in shapes:
        if why:
            yield why, shaped
        if weight is not None and not value.is_floating_point():
            yield "; ".join(filter(None, (why, _BYTES))), shaped.to(weight.dtype)


def takes(run: Callable[[Arguments], object], arguments: Arguments) -> bool:
    """Whether a call goes through."""
    try:
        with torch.no_grad():
            run(arguments)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        return False
    return True


def first_line(error: Exception) -> str:
    """What an error says first."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line[:300].rstrip(".")


def _differences(arguments: Arguments, known: Mapping[str, object]) -> Iterator[str]:
    for name, like in tensors(known).items():
        value = arguments.get(name)
        if not isinstance(value, Tensor):
            yield f"{name} is missing"
            continue
        if value.device != like.device:
            yield f"{name} is on {value.device}, not {like.device}"
        if value.dtype != like.dtype:
            how = f": {_BYTES}" if not value.is_floating_point() and like.is_floating_point() else ""
            yield f"{name} is {value.dtype}, not {like.dtype}{how}"
        if value.ndim > like.ndim:
            more = value.ndim - like.ndim
            yield (
                f"{name} has {value.ndim} dimensions, not {like.ndim}: sequences or streams become one batch by "
                f"x.flatten(0, {more})"
            )
        elif value.ndim < like.ndim:
            how = "a sample alone becomes a batch by x.unsqueeze(0)"
            yield f"{name} has {value.ndim} dimensions, not {like.ndim}: {how}"
        elif value.ndim == 4 and value.shape[1] != like.shape[1]:
            last = value.shape[-1] == like.shape[1]
            how = ": channels come before height and width, x.permute(0, 3, 1, 2)" if last else ""
            yield f"{name} has {value.shape[1]} channels, not {like.shape[1]}{how}"
        elif value.shape[1:] != like.shape[1:]:
            yield (
                f"{name} is of size {tuple(value.shape[1:])}, not {tuple(like.shape[1:])}: resize them, or see whether "
                "the model has an option for other sizes (dynamic_img_size, interpolate_pos_encoding)"
            )


def _type(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def _shapes(arguments: Arguments) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(arguments).items()}
