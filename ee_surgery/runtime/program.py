"""A captured model cut at its exits, for one input shape, dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ee_surgery.backbone.signature import Part
from ee_surgery.branches.base import Reads
from ee_surgery.graph.backends.base import Run, bind
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.features import Read, ReadAllLive, ReadFeatures
from ee_surgery.graph.maps import read_maps
from ee_surgery.graph.segments import Segment, crossing, cut


@dataclass(frozen=True, eq=False)
class Program:
    """K stages: one up to each of the K - 1 exits, and the rest."""

    segments: list[Segment]
    """Each stage as data."""
    stages: list[Run]
    """Each stage made to run, by the backend."""
    points: tuple[ExitPoint, ...]
    readers: tuple[Read, ...]
    """What the branch of each exit reads of the live tensors there."""
    head: ReadFeatures | None
    """What a head reads of the last stage's answer, where the original has none of its own."""
    trunk_macs: tuple[int, ...]
    """MACs of the original up to each exit, the whole last (with such a head); K numbers."""
    answer: tuple[int, ...]
    """Shape of what the last stage answers to one sample."""
    unchanged: list[Callable[[], bool]]
    """Of each stage, whether the modules that it was captured from are as they were."""

    def run(self, inputs: Sequence[Tensor], whole: bool = True) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
        """Features of every branch, a new head last, and the original's output, without early exit or gradients.

        Args:
            whole: run the last stage, too; else there is no answer.
        """
        found: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            live = self.stages[0](*inputs)
            for k, stage in enumerate(self.stages[1:]):
                features = self.readers[k](live)
                if any(segment.mutates for segment in self.segments[k + 1 :]):
                    # a branch may look at them only after later stages ran: keep them from being written to
                    features = tuple(tensor.clone() for tensor in features)
                found.append(features)
                if not whole and k == len(self.readers) - 1:
                    return found, None
                live = stage(*live)
            if self.head is not None:
                found.append(self.head(live))
        return found, live[0]


def build_program(
    graph: ModelGraph, names: Sequence[str], reads: Sequence[Reads] = (), head_macs: int = 0, backend: str = "python"
) -> Program:
    """Cut a graph at the named exit points, in program order.

    Args:
        reads: of each exit, what its branch reads there; the features when left out.
        head_macs: of a head put on a model that has none, one sample.
        backend: what makes the stages run, by its name in `BACKENDS`.
    """
    points = tuple(graph[name] for name in names)
    found = [graph.features(point) for point in points]
    masks = list(dict.fromkeys(features.mask for features in found if features.mask is not None))
    segments = cut(graph.capture, graph.liveness, [point.index for point in points], masks)
    stages = [bind(backend, segment, lambda name: graph.backbone.model) for segment in segments]
    readers = tuple(
        _reader(graph, point, reads[k] if reads else "features", crossing(graph.live[point.index], masks))
        for k, point in enumerate(points)
    )
    head = None if graph.head is None else graph.features(graph.head).reader([graph.capture.output])
    macs = (*(point.macs for point in points), graph.macs + head_macs)
    checks = _checks(graph.capture, [point.index + 1 for point in points])
    answer = tuple(int(size) for size in graph.capture.output.meta["val"].shape[1:])
    return Program(segments, stages, points, readers, head, macs, answer, checks)


def _reader(graph: ModelGraph, point: ExitPoint, reads: Reads, live: Sequence[fx.Node]) -> Read:
    """What a branch reads of the live tensors at its exit."""
    if reads == "live":
        return ReadAllLive(len(graph.live[point.index]))
    return read_maps(graph, point, live) if reads == "maps" else graph.features(point).reader(live)


def _checks(capture: Capture, cuts: Sequence[int]) -> list[Callable[[], bool]]:
    """For each stage, a check of the modules whose calls are in it: what runs is looked at, and no more."""
    pieces = zip([0, *cuts], [*cuts, len(capture.nodes)], strict=True)
    groups = [
        {path.partition("@")[0] for node in capture.nodes[start:stop] for path in capture.owners[node]}
        for start, stop in pieces
    ]
    signature = capture.state.signature

    def check(part: Part) -> Callable[[], bool]:
        return lambda: part.equal() or signature.current()

    return [check(part) for part in signature.parts(groups)]
