"""Branches with convolutions: more capacity for early features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import BRANCHES, DEEPEST, Branch, channels, require_grid, to_nchw
from ee_surgery.checks import count
from ee_surgery.graph.exit_points import ExitPoint


def unit(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class MapBranch(Branch):
    """Convolutions -> global average -> linear."""

    body: nn.Sequential

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, width): the body on the map, then the global average."""
        return self.body(to_nchw(features, self.layout, self.prefix_tokens)).mean((2, 3))


@BRANCHES.register("conv")
class ConvBranch(MapBranch):
    """(3x3 conv -> BatchNorm -> ReLU) x depth at full resolution and width -> global average -> linear.

    Args:
        depth: number of convolutions; `conv2` and `conv3` have two and three. All published PTEENet configurations
            have two.
    Source: PTEENet (Lahiany & Aperstein, arXiv:2501.02508).
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, depth: int = 1) -> None:
        c = channels(point)
        super().__init__(point, num_classes, confidence, c)
        require_grid("conv", point)
        self.body = nn.Sequential(*(unit(c, c, 1) for _ in range(count("depth", depth, high=DEEPEST))))


@BRANCHES.register("conv2")
class Conv2Branch(ConvBranch):
    """`conv` with two convolutions."""

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, depth: int = 2) -> None:
        super().__init__(point, num_classes, confidence, depth)


@BRANCHES.register("conv3")
class Conv3Branch(ConvBranch):
    """`conv` with three convolutions."""

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, depth: int = 3) -> None:
        super().__init__(point, num_classes, confidence, depth)


@BRANCHES.register("eenet")
class EENetBranch(MapBranch):
    """Three 3x3 convolutions with BatchNorm and ReLU, the first narrowing the features -> global average -> linear.

    Args:
        narrow: factor; 0 for the published rule, the expansion of the backbone's blocks: 4 after bottleneck blocks and
            dense layers, else 1. The graph does not know block types, so it is 4 from 256 channels up.
    Source: EENet (Ilhan et al., arXiv:2301.07099).
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, narrow: int = 0) -> None:
        c = channels(point)
        narrow = count("narrow", narrow, low=0)
        width = max(1, c // (narrow or (4 if c >= 256 else 1)))
        super().__init__(point, num_classes, confidence, width)
        require_grid("eenet", point)
        self.body = nn.Sequential(unit(c, width, 1), unit(width, width, 1), unit(width, width, 1))


@BRANCHES.register("msd")
class MsdBranch(MapBranch):
    """Two 3x3 convolutions of stride 2 with BatchNorm and ReLU -> average -> linear.

    Args:
        width: channels of both; 128 on CIFAR.
    Source: MSDNet (Huang et al., arXiv:1703.09844), which averages over 2 x 2 cells of its 4 x 4 maps: on other
        networks that would give large vectors, so the average is global.
    """

    def __init__(self, point: ExitPoint, num_classes: int, confidence: bool = False, width: int = 128) -> None:
        width = count("width", width)
        super().__init__(point, num_classes, confidence, width)
        require_grid("msd", point)
        self.body = nn.Sequential(unit(channels(point), width, 2), unit(width, width, 2))


@BRANCHES.register("branchy")
class BranchyBranch(Branch):
    """3x3 convolutions with BatchNorm and ReLU, more at earlier exits -> 4 x 4 cells -> linear.

    Args:
        width: channels of the convolutions.
        depth: number of convolutions; 0 for three in the first third of the network, two in the second, else one.
    Source: BranchyNet (Teerapittayanon et al., arXiv:1709.01686), whose branches differ between networks: more layers
        at earlier exits and the width of 32 are from the paper; BatchNorm replaces local response normalization.
    """

    def __init__(
        self, point: ExitPoint, num_classes: int, confidence: bool = False, width: int = 32, depth: int = 0
    ) -> None:
        width, depth = count("width", width), count("depth", depth, low=0, high=DEEPEST)
        cells = min(4, *require_grid("branchy", point))
        super().__init__(point, num_classes, confidence, width * cells**2)
        self.cells = cells
        depth = depth or 3 - min(2, int(3 * point.macs_fraction))
        self.body = nn.Sequential(*(unit(channels(point) if i == 0 else width, width, 1) for i in range(depth)))

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> (B, width * cells^2)."""
        maps = self.body(to_nchw(features, self.layout, self.prefix_tokens))
        return F.adaptive_avg_pool2d(maps, self.cells).flatten(1)


@BRANCHES.register("strided")
class StridedBranch(MapBranch):
    """(3x3 conv of stride 2 -> BatchNorm -> ReLU) x depth, the width doubling up to `width` -> average -> linear.

    More depth at a few percent of the cost of `conv2` on large maps. Maps of 4 x 4 or smaller keep their resolution.

    Args:
        width: channels of the last convolution; 0 for twice the features', at least 64.
        depth: number of convolutions.
    Source: the strided heads of MSDNet (Huang et al., ICLR 2018, arXiv:1703.09844), with a different depth.
    """

    def __init__(
        self, point: ExitPoint, num_classes: int, confidence: bool = False, width: int = 0, depth: int = 3
    ) -> None:
        c = channels(point)
        width, depth = count("width", width, low=0) or max(64, 2 * c), count("depth", depth, high=DEEPEST)
        super().__init__(point, num_classes, confidence, width)
        side = min(require_grid("strided", point))
        units = []
        for i in range(depth):
            out = width if i == depth - 1 else min(width, 2 * c)
            stride = 2 if side > 4 else 1
            units.append(unit(c, out, stride))
            c, side = out, -(-side // stride)
        self.body = nn.Sequential(*units)
