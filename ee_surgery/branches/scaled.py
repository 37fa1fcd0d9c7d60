"""A last layer for answers that have a scale of their own, such as depths in millimetres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEAST = 1e-3  # of the spread of all numbers: a channel that hardly varies


class Scaled(nn.Module):
    """The linear layer of a branch, its numbers stretched and moved to those that it is to learn.

    Args:
        linear: over C classes, from vectors or from each pixel of a map.
        classes: C.
    """

    def __init__(self, linear: nn.Module, classes: int) -> None:
        super().__init__()
        self.linear = linear
        shape = (classes, 1, 1) if isinstance(linear, nn.Conv2d) else (classes,)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape))

    @property
    def weight(self) -> Tensor:
        """Of the linear layer."""
        return self.linear.weight  # pyright: ignore[reportReturnType]

    def forward(self, features: Tensor) -> Tensor:
        """As the linear layer, in the scale of the answers."""
        return self.linear(features) * self.scale + self.shift

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Take over the mean and the spread of answers (N, C), unless that was done before."""
        if not bool((self.scale == 1).all() and (self.shift == 0).all()):
            return
        values = values.double()
        spread = values.std(0, correction=0)
        spread = spread.clamp_min(_LEAST * float(spread.max()))
        if bool(torch.isfinite(spread).all()) and float(spread.max()) > 0:
            self.scale.copy_(spread.view_as(self.scale))
            self.shift.copy_(values.mean(0).view_as(self.shift))
