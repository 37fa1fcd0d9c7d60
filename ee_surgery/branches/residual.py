"""The residual branch: a small ResNet or MobileNet, as large as a budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import BRANCHES, DEEPEST, Option, channels, require_grid
from ee_surgery.branches.conv import MapBranch, unit
from ee_surgery.checks import count, flag, positive
from ee_surgery.errors import BranchError
from ee_surgery.graph.exit_points import ExitPoint

DEPTHS = (1, 2, 3, 4)
WIDTHS = (0.5, 0.75, 1, 1.5, 2, 3, 4)
_LEAST_SIDE = 8  # smallest side after halving a map


@BRANCHES.register("residual")
class ResidualBranch(MapBranch):
    """3x3 convolution -> levels of residual blocks, each half the size and twice the width -> average -> linear.

    Args:
        budget: largest cost as a fraction of the original's MACs: selects the largest of 28 widths and depths that
            fits, or the smallest if none does.
        width: channels of the first level, instead of a budget.
        depth: blocks per level, with `width`.
        depthwise: blocks of depthwise and 1x1 convolutions instead of 3x3 ones.
    Raises:
        BranchError: the features are not a map, or there are no MACs before the exit to relate a budget to.
    Source: residual blocks of He et al. (CVPR 2016, arXiv:1512.03385), separable ones of MobileNet (Howard et al.,
        arXiv:1704.04861).
    """

    def __init__(
        self,
        point: ExitPoint,
        num_classes: int,
        confidence: bool = False,
        budget: float = 0.1,
        width: int = 0,
        depth: int = 2,
        depthwise: bool = False,
    ) -> None:
        width, depth = count("width", width, low=0), count("depth", depth, high=DEEPEST)
        budget, depthwise = positive("budget", budget), flag("depthwise", depthwise)
        c, side = channels(point), min(require_grid("residual", point))
        stride = 2 if side >= 2 * _LEAST_SIDE else 1
        sides = [-(-side // stride)]
        while sides[-1] >= 2 * _LEAST_SIDE:
            sides.append(-(-sides[-1] // 2))
        if width == 0:
            if not point.macs:
                raise BranchError(
                    f"There are no MACs before {point.name!r} to relate a budget to: give width= instead."
                )
            most = budget * point.macs / point.macs_fraction
            sizes = [(_macs(c, max(1, int(f * c)), d, sides, depthwise), d, f) for d, f in product(DEPTHS, WIDTHS)]
            _, depth, factor = max([size for size in sizes if size[0] <= most] or [min(sizes)])
            width = max(1, int(factor * c))
        self.size: dict[str, Option] = {"width": width, "depth": depth, "depthwise": depthwise}
        super().__init__(point, num_classes, confidence, width * 2 ** (len(sides) - 1))
        blocks: list[nn.Module] = [unit(c, width, stride)]
        c = width
        for level in range(len(sides)):
            for i in range(depth):
                out = width * 2**level
                blocks.append(_Block(c, out, 2 if level and i == 0 else 1, depthwise))
                c = out
        self.body = nn.Sequential(*blocks)

    def resolved_options(self) -> Mapping[str, Option]:
        """Width, depth and type of its blocks."""
        return self.size


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        self.one, self.two = _conv(c_in, c_out, stride, depthwise), _conv(c_out, c_out, 1, depthwise)
        self.extra, self.stride = c_out - c_in, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.two(F.relu(self.one(x), inplace=True))
        if self.stride > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return F.relu(out + F.pad(x, (0, 0, 0, 0, 0, self.extra)), inplace=True)


def _conv(c_in: int, c_out: int, stride: int, depthwise: bool) -> nn.Sequential:
    if not depthwise:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
    )


def _macs(c: int, width: int, depth: int, sides: list[int], depthwise: bool) -> int:
    """MACs of all convolutions for one sample with square maps of these sides."""
    total = 9 * c * width * sides[0] ** 2
    c = width
    for level, side in enumerate(sides):
        for _ in range(2 * depth):
            out = width * 2**level
            total += (9 * c + c * out if depthwise else 9 * c * out) * side**2
            c = out
    return total
