"""Branches that pool first: almost free, and as accurate as the features are linearly separable."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import (
    BRANCHES,
    Branch,
    channels,
    grid,
    mixed_pool,
    pooled,
    require_grid,
    summary,
    to_nchw,
)
from ee_surgery.checks import count, flag
from ee_surgery.errors import BranchError
from ee_surgery.graph.exit_points import ExitPoint


@BRANCHES.register("pool")
class PoolBranch(Branch):
    """Global average -> linear. Source: EENets (arXiv:2409.05336)."""

    any_layout: ClassVar[bool] = True

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False) -> None:
        super().__init__(point, num_classes, confidence, channels(point))

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C)."""
        return pooled(features, self.layout, mask)


@BRANCHES.register("bnpool")
class BnPoolBranch(Branch):
    """BatchNorm -> ReLU -> global average -> linear.

    Args:
        relu: present in PTEENet, absent in EENets.
    Source: EENets (arXiv:2409.05336) and PTEENet (arXiv:2501.02508). In both codes the BatchNorm is in a plain list, so
        torch neither trains nor saves it; here it is a registered module.
    """

    any_layout: ClassVar[bool] = True

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, relu: bool = True) -> None:
        super().__init__(point, num_classes, confidence, channels(point))
        self.norm = nn.BatchNorm1d(channels(point))
        self.relu = flag("relu", relu)

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C)."""
        if self.layout == "vector":
            places = features
        else:
            places = features.flatten(2) if self.layout == "nchw" else features.flatten(1, -2).mT
        normed = self.norm(places)  # (B, C) or (B, C, places)
        normed = F.relu(normed) if self.relu else normed
        return normed if self.layout == "vector" else pooled(normed.mT, "sequence", mask)


@BRANCHES.register("plain")
class PlainBranch(Branch):
    """Flatten -> linear, on features of a fixed shape.

    Source: EENets (arXiv:2409.05336), where it assumed the resolution of the input and so failed after any stride.
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False) -> None:
        if point.layout == "sequence":
            raise BranchError(
                f"Branch 'plain' needs features of a fixed size, but exit {point.name!r} has sequences of any length. "
                "Use 'pool' or 'token' there."
            )
        super().__init__(point, num_classes, confidence, math.prod(point.shape))

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, prod(shape))."""
        return features.flatten(1)


@BRANCHES.register("sdn")
class SdnBranch(Branch):
    """A learned mix of max and average pooling to 4 x 4 cells -> linear.

    Source: Shallow-Deep Networks (Kaya et al., ICML 2019, arXiv:1810.07052).
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False) -> None:
        cells = min(4, *require_grid("sdn", point))
        super().__init__(point, num_classes, confidence, channels(point) * cells**2)
        self.cells = cells
        self.share = nn.Parameter(torch.rand(()))

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C * cells^2)."""
        return mixed_pool(to_nchw(features, self.layout, self.prefix_tokens), self.cells, self.share)


@BRANCHES.register("mlp")
class MlpBranch(Branch):
    """Average-pool to a few cells -> flatten -> linear -> ReLU -> linear.

    Args:
        cells: side of the pooled grid; by default so that the vector has about 256 entries, at most 4.
        hidden: width of the hidden layer.
        norm: BatchNorm after the hidden layer (in the paper's ImageNet heads, not in its CIFAR heads).
        preact: BatchNorm and ReLU before the pooling, for networks with pre-activation blocks.
    Source: "enhanced" heads of the softmax cascade (Berestizshevsky & Even, arXiv:1805.10982).
    """

    any_layout: ClassVar[bool] = True

    def __init__(
        self,
        point: ExitPoint,
        num_classes: int,
        confidence: bool = False,
        cells: int = 0,
        hidden: int = 64,
        norm: bool = False,
        preact: bool = False,
    ) -> None:
        cells, hidden = count("cells", cells, low=0), count("hidden", hidden)
        norm, preact = flag("norm", norm), flag("preact", preact)
        super().__init__(point, num_classes, confidence, hidden)
        size, c = grid(point), channels(point)
        if size is None:
            cells = 1
        elif not cells:
            cells = max(1, min(4, *size, round((256 / c) ** 0.5)))
        self.cells = cells if size is not None else 0
        self.hidden = nn.Linear(c * cells * cells, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        if preact and size is None:
            raise BranchError(f"preact=True needs a feature map, but exit {point.name!r} has {point.layout}.")
        self.first = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()) if preact else nn.Identity()

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, hidden)."""
        if self.cells:
            maps = self.first(to_nchw(features, self.layout, self.prefix_tokens))
            cells = F.adaptive_avg_pool2d(maps, self.cells).flatten(1)
        else:
            cells = pooled(features, self.layout, mask)
        return F.relu(self.norm(self.hidden(cells)))


@BRANCHES.register("token")
class TokenBranch(Branch):
    """LayerNorm -> linear on the class token and the mean of the patches, or on the mean of a map.

    Args:
        hidden: width of a GELU layer between norm and classifier; 0 for none.
    Source: transformer heads of Zero Time Waste (NeurIPS 2021), which read only the class token; the mean is
    added because early class tokens have attended to little so far.
    """

    any_layout: ClassVar[bool] = True

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, hidden: int = 0) -> None:
        c = channels(point) * (2 if point.prefix_tokens else 1)
        hidden = count("hidden", hidden, low=0)
        super().__init__(point, num_classes, confidence, hidden or c)
        self.norm = nn.LayerNorm(c)
        self.hidden = nn.Linear(c, hidden) if hidden else None

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, C), (B, 2 C) with a class token, or (B, hidden)."""
        vector = self.norm(summary(features, self.layout, self.prefix_tokens, mask))
        return F.gelu(self.hidden(vector)) if self.hidden is not None else vector
