"""Branches with convolutions of their own: more capacity for early features."""

from __future__ import annotations

from torch import Tensor, nn

from ee_surgery.branches.base import BRANCHES, Branch, channels, require_grid, to_nchw
from ee_surgery.graph.points import ExitPoint


def _unit(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class _MapBranch(Branch):
    body: nn.Sequential

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, width): the body on the map, then the global average."""
        return self.body(to_nchw(features, self.layout, self.prefix_tokens)).mean((2, 3))


@BRANCHES.register("conv2")
class ConvBranch(_MapBranch):
    """(3x3 conv -> BatchNorm -> ReLU) x depth at full resolution and width -> global average -> linear.

    Args:
        depth: number of convolutions; 2 in every configuration that PTEENet ships.
    Source: `conv`, `conv2`, `conv3` of PTEENet (Lahiany & Aperstein, arXiv:2501.02508).
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, depth: int = 2) -> None:
        c = channels(point)
        super().__init__(point, num_classes, confidence, c)
        require_grid("conv2", point)
        self.body = nn.Sequential(*(_unit(c, c, 1) for _ in range(depth)))


@BRANCHES.register("strided")
class StridedBranch(_MapBranch):
    """(3x3 conv of stride 2 -> BatchNorm -> ReLU) x depth, the width doubling up to `width` -> average -> linear.

    A few percent of the cost of `conv2` on large maps for more depth. Maps that are down to 4 cells a side keep
    their resolution.

    Args:
        width: channels of the last convolution; twice the features', at least 64, when 0.
        depth: number of convolutions.
    Source: the strided heads of MSDNet (Huang et al., ICLR 2018, arXiv:1703.09844), with a depth of our own.
    """

    def __init__(
        self, point: ExitPoint, num_classes: int, confidence: bool = False, width: int = 0, depth: int = 3
    ) -> None:
        c = channels(point)
        width = width or max(64, 2 * c)
        super().__init__(point, num_classes, confidence, width)
        side = min(require_grid("strided", point))
        units = []
        for i in range(depth):
            out = width if i == depth - 1 else min(width, 2 * c)
            stride = 2 if side > 4 else 1
            units.append(_unit(c, out, stride))
            c, side = out, -(-side // stride)
        self.body = nn.Sequential(*units)
