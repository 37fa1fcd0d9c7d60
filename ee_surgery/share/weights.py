"""Tensors of an adapter in their safetensors file: names, shapes and types are checked before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ee_surgery.errors import AdapterError

TENSOR, POLICY = "tensor", "policy."
"""The key that stands for a tensor in JSON, and the prefix of the names of a policy's tensors."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_MOST_OF_POLICIES = 1 << 23  # numbers in all tensors of the policies of one adapter: 32 MB


class Weights:
    """A safetensors file of which only the header has been read.

    Args:
        path: of the file.
        name: its name in errors.
    Raises:
        AdapterError: it is missing or damaged.
    """

    def __init__(self, path: Path, name: Path) -> None:
        self.name = name
        try:
            self._file: Any = safe_open(path, framework="pt").__enter__()
            self.metadata: Mapping[str, str] = self._file.metadata() or {}
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise AdapterError(f"{name} is missing or damaged: {error}. Save the adapter again.") from error
        self.shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
        self._dtypes = {key: _DTYPES.get(found.get_dtype()) for key, found in slices.items()}
        self._policy: dict[str, Tensor] = {}

    def read(self, key: str) -> Tensor:
        """One tensor as stored."""
        return self._file.get_tensor(key)

    def policy(self, key: str) -> Tensor:
        """A tensor of a fitted score; the same object each time.

        Raises:
            AdapterError: it is missing, too large, or holds NaN.
        """
        if key not in self._policy:
            shape, dtype = self.shapes.get(key), self._dtypes.get(key)
            if shape is None or dtype is None or not dtype.is_floating_point:
                raise AdapterError(f"{self.name} has no floating-point tensor {key!r}, which a policy needs.")
            size = math.prod(shape) + sum(tensor.numel() for tensor in self._policy.values())
            if size > _MOST_OF_POLICIES:
                raise AdapterError(f"{self.name}: tensors of policies have {size:,} or more elements, too many.")
            tensor = self.read(key)
            if tensor.isnan().any():
                raise AdapterError(f"{self.name}: {key!r} holds NaN.")
            self._policy[key] = tensor
        return self._policy[key]

    def check(self, expected: Mapping[str, Tensor], prefix: str = "") -> None:
        """Compare names, shapes and kinds of dtype with the model's tensors, which may be on the `meta` device.

        Args:
            prefix: compare only names that start with this.
        Raises:
            AdapterError: they differ; the first difference is named.
        """
        own = {key for key in self.shapes if key.startswith(prefix) and not key.startswith(POLICY)}
        for key, tensor in expected.items():
            if key not in own:
                raise AdapterError(f"{self.name} has no tensor {key!r}, which the model needs.")
            if self.shapes[key] != tuple(tensor.shape):
                raise AdapterError(
                    f"{self.name}: {key!r} has shape {self.shapes[key]}, expected {tuple(tensor.shape)}."
                )
            dtype = self._dtypes[key]
            alike = dtype is not None and dtype.is_floating_point and tensor.is_floating_point()
            if not alike and dtype != tensor.dtype:
                raise AdapterError(f"{self.name}: {key!r} has dtype {dtype}, expected {tensor.dtype}.")
        if extra := sorted(own - expected.keys()):
            raise AdapterError(f"{self.name} has tensors that the model does not use: {extra[:5]}.")

    def fill(self, model: nn.Module, *, base: bool = False) -> None:
        """Copy the tensors into a model.

        Args:
            base: those of a base, which may contain `inf`, and one tensor under several names, stored once.
        Raises:
            AdapterError: see `check`; values are not finite in the model's precision.
        """
        state = self._base(model) if base else model.state_dict()
        self.check(state)
        with torch.no_grad():
            for key, tensor in state.items():
                found = self.read(key).to(tensor.dtype)
                if not base and not found.isfinite().all():
                    raise AdapterError(f"{self.name}: {key!r} has values that are not finite in {tensor.dtype}.")
                tensor.copy_(found)

    def check_base(self, model: nn.Module) -> None:
        """`check` for a base, which may be on the `meta` device."""
        self.check(self._base(model))

    def _base(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors of a base, each once, under the name it is stored by."""
        state = model.state_dict(keep_vars=True)
        stored = {_place(tensor) for key, tensor in state.items() if key in self.shapes}
        return {key: t for key, t in state.items() if key in self.shapes or _place(t) not in stored}


def _place(tensor: Tensor) -> int:
    """A key that is equal for tensors sharing memory; on `meta`, only for the same tensor."""
    return tensor.data_ptr() or id(tensor)
