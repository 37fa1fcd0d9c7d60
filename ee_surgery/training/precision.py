"""The floating-point format of training."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import nn

from ee_surgery.names import TrainPrecision

Precision: TypeAlias = Literal["no", "bf16", "fp16"]
_WORTH = 0.9  # bfloat16 must take at most this fraction of the time: its numbers are coarser
_ROUNDS = 7


def resolve_precision(asked: TrainPrecision, device: torch.device) -> Precision:
    """Replace `auto` by bfloat16 where it is faster, else by float32 (`no`).

    A GPU is asked whether it has bfloat16. Processors may have the instructions and still be slower with them, so that
    one that does runs a small training step in both formats, once per process.
    """
    if asked != "auto":
        return asked
    if not has_bf16(device):
        return "no"
    return "bf16" if device.type != "cpu" or _speed_ratio() <= _WORTH else "no"


def has_bf16(device: torch.device) -> bool:
    """Whether the device supports bfloat16 natively. Emulated, it takes several times as long as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch's own query for oneDNN's bfloat16 is also true for processors that lack the instructions (AVX-512 alone)
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: Arm
    return False


@cache
def _speed_ratio() -> float:
    """Time of a training step in bfloat16 as a fraction of that in float32, on this processor; takes under a second."""
    with torch.random.fork_rng(devices=()):
        narrow, wide = (nn.Conv2d(c, c, 3, padding=1).to(memory_format=torch.channels_last) for c in (16, 64))
        layers = {narrow: (32, 16, 32, 32), wide: (16, 64, 14, 14), nn.Linear(256, 1024): (512, 256)}
    inputs = [torch.ones(shape, requires_grad=True) for shape in layers.values()]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for i in range(-2, _ROUNDS):
        for low, found in seconds.items():
            started = time.perf_counter()
            for layer, x in zip(layers, inputs, strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    out = layer(x)
                out.sum().backward()
            if i >= 0:
                found.append(time.perf_counter() - started)
    return min(seconds[True]) / min(seconds[False])  # the machine may be busy with something else
