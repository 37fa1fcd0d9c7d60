"""Explain why a model does not accept its inputs, by trying variants or comparing with accepted ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ee_surgery.backbone.inputs import Arguments, tensors
from ee_surgery.errors import OUT_OF_MEMORY, CaptureError

_BYTES = "convert byte images with x.float() / 255 and the model's own normalization (`branched.transform()` does both)"


def check_weights(model: nn.Module, model_id: str, needed: bool = False) -> None:
    """Refuse a model whose weights are not all on one device as ordinary tensors.

    Args:
        needed: False accepts a model that is entirely on the meta device: it can be captured, but not run.
    Raises:
        CaptureError: offloaded, never loaded, on several devices, or created in inference mode.
    """
    weights = [*model.named_parameters(), *model.named_buffers()]
    absent = [name for name, tensor in weights if tensor.is_meta]
    offloaded = any("_hf_hook" in vars(module) for module in model.modules())  # accelerate's
    if absent and (needed or offloaded or len(absent) < len(weights)):
        how = "by device_map= or cpu_offload" if offloaded else "or never loaded (init_empty_weights)"
        raise CaptureError(
            f"{len(absent)} of {len(weights)} parameters and buffers of {model_id} have no data (e.g. {absent[0]!r}): "
            f"they are on the meta device, offloaded {how}. Load the whole model onto one device."
        )
    devices = {tensor.device for _, tensor in model.named_parameters() if not tensor.is_meta}
    if len(devices) > 1:
        raise CaptureError(
            f"{model_id} is on several devices, {sorted(map(str, devices))}: exits need it on one device. Load it "
            "without device_map=, or move it with .to(device)."
        )
    if any(tensor.is_inference() for _, tensor in model.named_parameters()) and not torch.is_inference_mode_enabled():
        raise CaptureError(
            f"The parameters of {model_id} were created under torch.inference_mode(), which torch.export cannot read. "
            "Create or load the model outside of it, or pass copy.deepcopy(model) made outside."
        )


def refusal(model: nn.Module, model_id: str, arguments: Arguments, known: Arguments, error: Exception) -> str:
    """Why a model that accepted `known`, on any device and in any dtype, does not accept `arguments`."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None:
        known = {name: v.to(weight.device, _type(v, weight.dtype)) for name, v in tensors(known).items()}
    found = "; ".join(_differences(arguments, known))
    cause = f"Unlike inputs that it accepts, {found}."
    if not found:
        cause = (
            "It accepts similar inputs, so the cause is their values (token ids out of range?), an option or its code."
        )
    return f"{model_id} does not accept inputs of shape {_shapes(arguments)}: {first_line(error)}. {cause}"


def sample_refusal(
    model: nn.Module,
    model_id: str,
    sample: Arguments,
    run: Callable[[Arguments], object],
    error: Exception,
    own: bool,
) -> str:
    """Why a model does not accept its sample, found by trying variants that differ in one way.

    Args:
        run: calls the model.
        own: whether the user passed the sample.
    """
    reason = f"{type(error).__name__}: {first_line(error)}"
    said = f"{model_id} does not accept a sample of shape {_shapes(sample)}: {reason}."
    main = next(iter(tensors(sample)))
    for why, value in variants(sample[main], model):
        if takes(run, {**sample, main: value}):
            return f"{said} It accepts {tuple(value.shape)} of {value.dtype}: {why}. Pass such a sample: sample=."
    possible = "a wrong size, number of channels or dtype, token ids out of range, or a missing input"
    if not own:
        possible = (
            f"the sample comes from the model's configuration and may have the wrong size or channels; {possible}"
        )
    return f"{said} Possible causes: {possible}. Pass a batch that the model accepts: sample=."


def variants(value: Tensor, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Variants of a tensor with another dtype, layout or number of channels, with the explanation of each."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    shapes = [("", value)]
    if value.ndim >= 5:
        shapes.append((f"flatten streams of images into a batch: x.flatten(0, {value.ndim - 4})", value.flatten(0, -4)))
    if value.ndim == 3:
        shapes.append(("make a batch of a single image with x.unsqueeze(0)", value.unsqueeze(0)))
    if value.ndim == 4:
        shapes.append(("channels must come before height and width, x.permute(0, 3, 1, 2)", value.permute(0, 3, 1, 2)))
        wanted = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), value.shape[1])
        for channels in (wanted, wanted // 4, wanted // 16):  # some models fold images before the first convolution
            if channels not in (0, value.shape[1]):
                pictures = value[:, :1].expand(-1, channels, -1, -1)
                shapes.append((f"its images have {channels} channels, not {value.shape[1]}", pictures))
    for why, shaped in shapes:
        if why:
            yield why, shaped
        if weight is not None and not value.is_floating_point():
            yield "; ".join(filter(None, (why, _BYTES))), shaped.to(weight.dtype)


def takes(run: Callable[[Arguments], object], arguments: Arguments) -> bool:
    """Whether a call succeeds."""
    try:
        with torch.no_grad():
            run(arguments)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        return False
    return True


def first_line(error: Exception) -> str:
    """The first line of an error."""
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
                f"{name} has {value.ndim} dimensions, not {like.ndim}: flatten sequences or streams into a batch: "
                f"x.flatten(0, {more})"
            )
        elif value.ndim < like.ndim:
            how = "make a batch of a single sample with x.unsqueeze(0)"
            yield f"{name} has {value.ndim} dimensions, not {like.ndim}: {how}"
        elif value.ndim == 4 and value.shape[1] != like.shape[1]:
            last = value.shape[-1] == like.shape[1]
            how = ": channels must come before height and width, x.permute(0, 3, 1, 2)" if last else ""
            yield f"{name} has {value.shape[1]} channels, not {like.shape[1]}{how}"
        elif value.shape[1:] != like.shape[1:]:
            yield (
                f"{name} has size {tuple(value.shape[1:])}, not {tuple(like.shape[1:])}: resize it, or see whether the "
                "model has an option for other sizes (dynamic_img_size, interpolate_pos_encoding)"
            )


def _type(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def _shapes(arguments: Arguments) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors(arguments).items()}
