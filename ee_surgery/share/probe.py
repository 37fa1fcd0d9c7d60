"""A probe of a base: its logits on a few reproducible inputs.

A fingerprint covers only tensors. Two networks may share all of them and differ in an activation, a stride, an epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.inputs import tensors
from ee_surgery.errors import OUT_OF_MEMORY

_SAMPLES, _NUMBERS = 2, 32  # logits per sample; a change of the network changes most of them
_FAINT = 0.01  # scale of the second sample: its small variances reveal a different epsilon
# Tolerated difference, as a fraction of the sample's largest logit: other kernels, devices, numbers of threads.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_TENSOR_FLOAT = 5e-3  # float32 on a GPU, whose convolutions round inputs to 10 bits
_MARGIN = 8.0  # multiple of the measured noise


@dataclass(frozen=True)
class InputSpec:
    """Description of one input tensor, enough to create a similar one."""

    shape: tuple[int, ...]
    """Shape of four samples."""
    dtype: str
    highest: int
    """Largest value of integers; 0 for other types."""

    @classmethod
    def of(cls, tensor: Tensor) -> InputSpec:
        """Describe a tensor."""
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        highest = int(tensor.max()) if whole and not tensor.is_meta else 0
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), highest)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSpec:
        """The inverse of `dataclasses.asdict`, after JSON."""
        return cls(**{**data, "shape": tuple(data["shape"])})

    def make(self, generator: torch.Generator) -> Tensor:
        """A random tensor of this kind: normally distributed, or integers from 1 to the highest."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:  # in float32, whatever the default dtype: the same numbers everywhere
            return torch.randn(self.shape, generator=generator, dtype=torch.float32).to(dtype)
        lowest = min(1, self.highest)
        return torch.randint(lowest, self.highest + 1, self.shape, generator=generator).to(dtype)


def make_inputs(specs: Mapping[str, InputSpec], options: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Random inputs of the stored kinds, four samples, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {**options, **{name: spec.make(generator) for name, spec in specs.items()}}


@dataclass(frozen=True)
class Probe:
    """Logits of a base on two samples generated from a seed; computed again when an adapter is loaded."""

    seed: int
    logits: tuple[tuple[float, ...], ...]
    """Up to 32 per sample, evenly spaced over the classes (or over the features of a base without a head)."""
    noise: float
    """How much a change in the last bit of the inputs changes them, as a fraction of the sample's largest."""
    rounding: float
    """How much other kernels, devices and numbers of threads may change them, in the precision of its creation."""

    @classmethod
    def of(cls, backbone: Backbone, specs: Mapping[str, InputSpec], options: Mapping[str, Any]) -> Probe | None:
        """Run a base; None if it takes no random inputs, or its outputs are not finite."""
        seed = 0
        try:
            inputs = _probe_inputs(backbone, specs, options, seed)
            found, shaken = _ask(backbone, inputs), _ask(backbone, _shaken(inputs))
        except OUT_OF_MEMORY:
            raise
        except Exception:  # anything: ids that must fit each other, boxes, grids
            return None
        if not torch.isfinite(found).all():
            return None
        noise = _distance(found, shaken)
        logits = tuple(tuple(row) for row in found.tolist())
        return cls(seed, logits, float(f"{noise:.3g}") if noise < 1 else 1.0, _rounding(backbone))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Probe:
        """The inverse of `dataclasses.asdict`, after JSON."""
        return cls(**{**data, "logits": tuple(tuple(map(float, row)) for row in data["logits"])})

    def difference(self, backbone: Backbone, specs: Mapping[str, InputSpec], options: Mapping[str, Any]) -> str:
        """How the logits of a base differ from the stored ones, in words; empty if they agree."""
        try:
            found = _ask(backbone, _probe_inputs(backbone, specs, options, self.seed))
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            return f"it does not accept the inputs of the probe ({type(error).__name__}: {str(error)[:200]})"
        expected = torch.tensor(self.logits, dtype=torch.float64)
        if found.shape != expected.shape:
            return f"it returns {found.shape[1]} numbers where {expected.shape[1]} are stored"
        distance = _distance(expected, found)
        limit = max(self.rounding, _rounding(backbone), _MARGIN * self.noise)
        if distance <= limit:
            return ""
        return f"logits of the stored probe differ by up to {distance:.2g} of the largest one; {limit:.2g} is tolerated"


def _probe_inputs(
    backbone: Backbone, specs: Mapping[str, InputSpec], options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    batch = backbone.batch(make_inputs(specs, options, seed)).select([*range(_SAMPLES)])
    arguments, dims = batch.arguments, batch.dims
    weights = next((p for p in backbone.model.parameters() if p.is_floating_point()), None)
    for name, value in tensors(arguments).items():
        if value.is_floating_point():
            if dims.get(name) is not None:
                value.select(dims[name] or 0, 1).mul_(_FAINT)
            value = value.to(value.dtype if weights is None else weights.dtype)
        arguments[name] = value.to(_device(backbone))
    return arguments


def _shaken(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Increase every other number by one unit in the last place: the effect of rounding."""
    changed = dict(arguments)
    for name, value in tensors(arguments).items():
        if value.is_floating_point():
            steps = torch.arange(value.numel(), device=value.device).view(value.shape) % 2
            changed[name] = value * (1 + steps * torch.finfo(value.dtype).eps).to(value.dtype)
    return changed


def _ask(backbone: Backbone, arguments: Mapping[str, Any]) -> Tensor:
    """Logits on the probe, (2, at most 32), in float64 on the CPU."""
    with torch.no_grad(), torch.autocast(_device(backbone).type, enabled=False):
        logits = backbone.logits(backbone(arguments))
    rows = logits.detach().flatten(1).to("cpu", torch.float64)
    return rows[:, torch.linspace(0, rows.shape[1] - 1, min(_NUMBERS, rows.shape[1])).long()]


def _distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference, as a fraction of the sample's largest number; infinite for NaN."""
    scale = expected.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((found - expected).abs() / scale).nan_to_num(torch.inf).max().item()


def _rounding(backbone: Backbone) -> float:
    dtype = next((p.dtype for p in backbone.model.parameters() if p.is_floating_point()), torch.float32)
    precision = torch.get_float32_matmul_precision()
    if dtype == torch.float32 and precision == "medium":  # may be multiplied in bfloat16
        return _ROUNDING[torch.bfloat16]
    if dtype == torch.float32 and (precision == "high" or _device(backbone).type != "cpu"):
        return _TENSOR_FLOAT
    return _ROUNDING.get(dtype, max(_ROUNDING.values()))


def _device(backbone: Backbone) -> torch.device:
    tensor = next((tensor for _, tensor in backbone.tensors()), None)
    return torch.device("cpu") if tensor is None else tensor.device
