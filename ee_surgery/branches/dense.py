"""Branches that answer with a map: one class per pixel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import BRANCHES, DEEPEST, Branch, ExitLogits, Option, PreparedBranch, Reads
from ee_surgery.checks import count
from ee_surgery.errors import BranchError
from ee_surgery.graph.cost import module_macs
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.maps import feature_maps, picture_size

BUDGET = 0.05
"""Largest cost of a `dense` branch that chooses its width, as a fraction of the original's MACs."""
_WIDTHS = (128, 96, 64, 48, 32, 24, 16)


@BRANCHES.register("dense")
class DenseBranch(Branch):
    """Projections of the live maps to one grid, summed -> global context -> depthwise blocks -> linear per pixel.

    It stands for the rest of the backbone and for the decoder. Maps finer than its grid are averaged down before they
    are projected, coarser ones resized after it. It answers on that grid; what leaves is resized to the original's.

    Args:
        width: channels; 0 for the largest that costs at most 5 % of the original.
        depth: depthwise blocks (3x3, dilation 1, 2, 4, ...).
        stride: pixels of the picture per cell of the grid, at least: the finest live map of that stride sets the grid.
        graph: of the original.
    Raises:
        BranchError: no map crosses the exit.
    Source: the gated head of LR-ASPP in MobileNetV3 (Howard et al., ICCV 2019, arXiv:1905.02244), with dilated
        depthwise blocks behind it.
    """

    reads: ClassVar[Reads] = "maps"
    rank: ClassVar[int | None] = 4

    def __init__(
        self,
        point: ExitPoint,
        num_classes: int,
        confidence: bool = False,
        width: int = 0,
        depth: int = 2,
        stride: int = 8,
        *,
        graph: ModelGraph,
    ) -> None:
        width, depth = count("width", width, low=0), count("depth", depth, low=0, high=DEEPEST)
        stride = count("stride", stride)
        maps = [map.shape for map in feature_maps(graph, point)]
        if not maps:
            raise BranchError(
                f"Branch 'dense' needs a feature map, and none crosses exit {point.name!r}: choose another exit."
            )
        self._grid, self._pool = _grid(maps, picture_size(graph), stride)
        super().__init__(point, num_classes, confidence, max(1, width))
        self.options: dict[str, Option] = {}
        for own in (width,) if width else _WIDTHS:
            self._make([c for c, _, _ in maps], num_classes, confidence, own, depth)
            self.options = {"width": own, "depth": depth, "stride": stride}
            if width or module_macs(self, *maps) <= BUDGET * graph.macs:
                break

    def _make(self, channels: list[int], classes: int, confidence: bool, width: int, depth: int) -> None:
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width)) for c in channels
        )
        self.context = nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(_block(width, 2**i) for i in range(depth))
        self.classifier = nn.Conv2d(width, classes, 1)
        self.confidence = nn.Linear(width, 1) if confidence else None

    def forward(self, *maps: Tensor) -> ExitLogits:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All maps that cross the exit, each (B, C, h, w) -> logits (B, C, h', w') on the grid of the branch."""
        return self.answer(self.vector(*maps))

    def vector(self, *maps: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, width, h', w')."""
        height, width = (max(1, int(size) // self._pool) for size in maps[self._grid].shape[-2:])
        summed: Tensor | None = None
        for map, project in zip(maps, self.projections, strict=True):
            features = self.in_own_type(map)
            if features.shape[-2] > height or features.shape[-1] > width:
                features = F.adaptive_avg_pool2d(features, (height, width))
            features = project(features)
            if features.shape[-2:] != (height, width):
                features = F.interpolate(features, (height, width), mode="bilinear", align_corners=False)
            summed = features if summed is None else summed + features
        assert summed is not None
        here = F.relu(summed)
        here = here * torch.sigmoid(self.context(here.mean((2, 3), keepdim=True)))
        for block in self.blocks:
            here = here + block(here)
        return here

    def prepare(self, graph: ModelGraph, point: ExitPoint) -> PreparedBranch:
        """Count it for maps of this size."""
        return PreparedBranch(module_macs(self, *(map.shape for map in feature_maps(graph, point))))

    def resolved_options(self) -> dict[str, Option]:
        """Its width among them."""
        return self.options


def _block(width: int, dilation: int) -> nn.Sequential:
    """Depthwise and pointwise convolution, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _grid(maps: list[tuple[int, int, int]], picture: tuple[int, int], stride: int) -> tuple[int, int]:
    """Which map sets the grid, the finest of at least this stride, else the coarsest, and by how much it is pooled."""
    strides = [max(1, round(picture[0] / height)) for _, height, _ in maps]
    coarse = [i for i, own in enumerate(strides) if own >= stride]
    if coarse:
        return min(coarse, key=lambda i: strides[i]), 1
    last = max(range(len(maps)), key=lambda i: strides[i])
    return last, max(1, stride // strides[last])
