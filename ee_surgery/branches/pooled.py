"""Branches that pool first: almost free, as strong as the features are linearly separable."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import BRANCHES, Branch, channels, grid, pooled, to_nchw
from ee_surgery.graph.points import ExitPoint


@BRANCHES.register("pool")
class PoolBranch(Branch):
    """Global average -> linear. Source: EENets (arXiv:2409.05336)."""

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False) -> None:
        super().__init__(point, num_classes, confidence, channels(point))

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C)."""
        return pooled(features, self.layout, mask)


@BRANCHES.register("mlp")
class MlpBranch(Branch):
    """Average-pool to a few cells -> flatten -> linear -> ReLU -> linear.

    Args:
        cells: side of the pooled grid; chosen so that the flat vector has about 256 numbers, at most 4.
        hidden: width of the hidden layer.
        norm: BatchNorm behind the hidden layer (the paper's ImageNet heads have it, its CIFAR heads do not).
    Source: "enhanced" heads of the softmax cascade (Berestizshevsky & Even, arXiv:1805.10982).
    """

    def __init__(
        self,
        point: ExitPoint,
        num_classes: int,
        confidence: bool = False,
        cells: int = 0,
        hidden: int = 64,
        norm: bool = False,
    ) -> None:
        super().__init__(point, num_classes, confidence, hidden)
        size, c = grid(point), channels(point)
        if size is None:
            cells = 1
        elif not cells:
            cells = max(1, min(4, *size, round((256 / c) ** 0.5)))
        self.cells = cells if size is not None else 0
        self.hidden = nn.Linear(c * cells * cells, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, hidden)."""
        if self.cells:
            cells = F.adaptive_avg_pool2d(to_nchw(features, self.layout, self.prefix_tokens), self.cells).flatten(1)
        else:
            cells = pooled(features, self.layout, mask)
        return F.relu(self.norm(self.hidden(cells)))


@BRANCHES.register("token")
class TokenBranch(Branch):
    """LayerNorm -> linear on the class token and the mean of the patches, or on the mean of a map.

    Args:
        hidden: width of a GELU layer between norm and classifier; 0 for none.
    Source: transformer heads of Zero Time Waste (NeurIPS 2021), which read the class token alone; the mean is
    added here because early class tokens have attended to little yet.
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, hidden: int = 0) -> None:
        c = channels(point) * (2 if point.prefix_tokens else 1)
        super().__init__(point, num_classes, confidence, hidden or c)
        self.norm = nn.LayerNorm(c)
        self.hidden = nn.Linear(c, hidden) if hidden else None

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C), (B, 2 C) with a class token, or (B, hidden)."""
        n = self.prefix_tokens
        if n:
            rest = pooled(features[:, n:], self.layout, None if mask is None else mask[:, n:])
            summary = torch.cat([features[:, 0], rest], dim=1)
        else:
            summary = pooled(features, self.layout, mask)
        vector = self.norm(summary)
        return F.gelu(self.hidden(vector)) if self.hidden is not None else vector
