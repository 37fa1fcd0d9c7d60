"""The default branch of an exit."""

from __future__ import annotations

from dataclasses import replace

from ee_surgery.branches.base import Branch, BranchSpec, build, channels, grid
from ee_surgery.branches.dense import DenseBranch
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph

BUDGET = 0.025
"""Largest cost of an `auto` branch as a fraction of the original's MACs."""
_WEIGHTS = 10**8  # of one convolution: larger ones are not even built to count their MACs


def resolve(
    spec: BranchSpec, point: ExitPoint, num_classes: int, macs: int, depth: int = 0, graph: ModelGraph | None = None
) -> tuple[BranchSpec, Branch]:
    """Build the branch for an exit, choosing one for `auto`.

    Maps get strided convolutions, as wide as `BUDGET` allows, or only pooling if even narrow ones cost more;
    tokens and channels-last maps get a norm-and-linear head, as transformers have; vectors get a linear layer. Models
    that answer with maps get `dense` branches.

    Args:
        macs: of the whole original, one sample.
        depth: number of branches before it.
        graph: of the original, for branches that are cut from it.
    Returns:
        The spec with a registered name and resolved options, and the branch.
    """
    if spec.name != "auto":
        branch = build(spec, point, num_classes, depth, graph)
        return replace(spec, options=branch.resolved_options() or spec.options), branch
    if graph is not None and graph.backbone.task.rank == DenseBranch.rank:
        dense = build(replace(spec, name="dense"), point, num_classes, graph=graph)
        return replace(spec, name="dense", options=dense.resolved_options()), dense
    if point.layout in ("tokens", "sequence", "nhwc"):
        chosen = replace(spec, name="token")
        return chosen, build(chosen, point, num_classes, graph=graph)
    size = grid(point)
    if size is not None and min(size) >= 4:
        c = channels(point)
        for width in (4 * c, 3 * c, 2 * c, c, c // 2):
            if width < 32:
                break
            if 9 * min(width, 2 * c) * width > _WEIGHTS:
                continue
            chosen = replace(spec, name="strided", options={**spec.options, "width": width})
            branch = build(chosen, point, num_classes, graph=graph)
            if branch.macs(point.shape) <= BUDGET * macs:
                return chosen, branch
    chosen = replace(spec, name="pool")
    return chosen, build(chosen, point, num_classes, graph=graph)
