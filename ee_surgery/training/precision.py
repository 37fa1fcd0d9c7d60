"""The floating-point format of training."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["no", "bf16", "fp16"]
AskedPrecision: TypeAlias = Literal[Precision, "auto"]


def resolve_precision(asked: AskedPrecision, device: torch.device) -> Precision:
    """Replace `auto` by bfloat16 if the device supports it natively, else by float32 (`no`)."""
    if asked != "auto":
        return asked
    return "bf16" if has_bf16(device) else "no"


def has_bf16(device: torch.device) -> bool:
    """Whether the device supports bfloat16 natively. Emulated, it takes several times as long as float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch's own query for oneDNN's bfloat16 is also true for processors that lack the instructions (AVX-512 alone)
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: Arm
    return False
