"""A captured model cut at its exits, for one input shape, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_surgery.backbone import Backbone
from ee_surgery.errors import ExitPointError
from ee_surgery.graph.liveness import live_after
from ee_surgery.graph.points import ExitPoint, ModelGraph
from ee_surgery.graph.stages import Stage, compact, cut


@dataclass(frozen=True, eq=False)
class Program:
    """K stages: one up to each of the K - 1 exits, and the rest."""

    stages: list[Stage]
    points: tuple[ExitPoint, ...]
    reads: tuple[int, ...]
    """Which of the live tensors at each exit its branch reads."""
    trunk_macs: tuple[int, ...]
    """MACs of the original up to each exit, the whole last; K numbers."""

    def features(self, exit_index: int, live: Sequence[Tensor]) -> Tensor:
        """What the branch of an exit reads, the batch first: (B, *point.shape)."""
        read = self.reads[exit_index]
        tensor, dim = live[read], self.stages[exit_index + 1].batch_dims[read]
        return tensor if dim == 0 else tensor.movedim(dim, 0)

    def run(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features (B, *shape) at every exit and the original's logits (B, C), nobody leaving; without gradients."""
        found: list[Tensor] = []
        with torch.no_grad():
            live = self.stages[0](x)
            for k, stage in enumerate(self.stages[1:]):
                features = self.features(k, live)
                # a branch may look at them only after later stages ran: keep them from being written to
                found.append(features.clone() if any(s.mutates_input for s in self.stages[k + 1 :]) else features)
                live = stage(*live)
        return found, live[0]


def build_program(graph: ModelGraph, names: Sequence[str]) -> Program:
    """Cut a graph at the named exit points, in program order."""
    points = tuple(graph[name] for name in names)
    stages = cut(graph.capture, graph.liveness, graph.backbone.model, [point.index for point in points])
    live = live_after(graph.capture, graph.liveness)
    reads = tuple([node.name for node in live[point.index]].index(point.node) for point in points)
    return Program(stages, points, reads, (*(point.macs for point in points), graph.macs))


def verify(program: Program, backbone: Backbone, sample: Tensor) -> None:
    """Run the stages with samples leaving and changing places at every cut, and compare with the whole model.

    Args:
        sample: at least two different samples, shape (B, ...).
    Raises:
        ExitPointError: the stages do not give the original's logits.
    """
    with torch.no_grad():
        whole = backbone.logits(backbone(sample))
        rows = torch.arange(len(sample), device=sample.device)
        live = program.stages[0](sample)
        for stage in program.stages[1:]:
            order = torch.arange(len(rows), device=sample.device).flip(0)
            if len(rows) > 2:
                order = order[:-1]
            rows = rows[order]
            live = stage(*compact(live, stage.batch_dims, order))
    expected, seen = whole[rows].double(), live[0].double()
    scale = expected.abs().max().clamp_min(1e-6)
    precise = sample.dtype in (torch.float32, torch.float64) or not sample.is_floating_point()
    error = ((expected - seen).abs().max() / scale).item()
    if not error <= (1e-3 if precise else 5e-2):
        names = [point.name for point in program.points]
        raise ExitPointError(
            f"Cut at {names}, {backbone.model_id} does not give its own logits any more (relative error {error:.2g}): "
            "its samples are not independent of each other there, or a tensor is shared across the cut in a way that "
            "the graph does not show. Choose other exit points."
        )
