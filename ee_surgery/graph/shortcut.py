"""Shortcuts: paths from an exit to the logits that skip blocks of the rest of the program.

A jump leads from one position to another whose live tensors have the same shapes, types and batch axes: what runs there
cannot tell the difference, but for the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor, fx

from ee_surgery.errors import BranchError
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.opaque import is_opaque
from ee_surgery.graph.segments import Segment, statistics
from ee_surgery.registry import suggest


@dataclass(frozen=True)
class Piece:
    """A part of the program behind an exit: one block, or several that only as a whole end as they begin."""

    name: str
    """Of the block that it ends with; `TAIL` for what comes behind the last block."""
    start: int
    stop: int
    """Its calls are those from `start` up to `stop` in program order."""
    macs: int
    optional: bool
    """Ends with the live tensors it begins with, so that a shortcut may skip it."""


TAIL = "tail"


def pieces(graph: ModelGraph, point: ExitPoint) -> list[Piece]:
    """The pieces after an exit, in order, the tail last."""
    ends = [point, *(p for p in graph.blocks if p.index > point.index and p.macs_fraction < 1)]
    found: list[Piece] = []
    i = 0
    while i + 1 < len(ends):
        back = _back(ends, i, graph)
        j = i + 1 if back is None else back
        start, stop = ends[i].index + 1, ends[j].index + 1
        macs = sum(graph.call_macs[start:stop])
        found.append(Piece(ends[j].name, start, stop, macs, back is not None and macs > 0))  # norms alone stay
        i = j
    start, stop = ends[-1].index + 1, len(graph.capture.nodes)
    return [*found, Piece(TAIL, start, stop, sum(graph.call_macs[start:stop]), False)]


def shortest(graph: ModelGraph) -> dict[str, float]:
    """Of each block, the share of the MACs that the shortest way from its end to the logits costs."""
    ends = [point for point in graph.blocks if point.macs_fraction < 1]
    least: dict[int, int] = {len(ends): 0}
    for i in range(len(ends) - 1, -1, -1):
        back = _back(ends, i, graph)
        stop = ends[i + 1].index + 1 if i + 1 < len(ends) else len(graph.call_macs)
        least[i] = least[back] if back is not None else least[i + 1] + sum(graph.call_macs[ends[i].index + 1 : stop])
    return {end.name: least[i] / graph.macs for i, end in enumerate(ends)}


def _back(ends: Sequence[ExitPoint], i: int, graph: ModelGraph) -> int | None:
    """The nearest later position to which one can jump; None where there is none."""
    here = graph.live[ends[i].index]
    return next((j for j in range(i + 1, len(ends)) if _alike(here, graph.live[ends[j].index], graph)), None)


def within(given: Sequence[Piece], macs: float) -> list[Piece] | None:
    """The pieces of the longest shortcut of at most so many MACs; None where the shortest costs more.

    What cannot be jumped over stays. Of each run of pieces that end as they begin the same share is kept, spread evenly
    with the last one among them; of the run that the exit itself lies in nothing, unless there is no other.
    """
    runs = [list(run) for optional, run in groupby(given, lambda piece: piece.optional) if optional]
    if given[0].optional and len(runs) > 1:
        del runs[0]
    best = None
    for share in sorted({k / len(run) for run in runs for k in range(len(run) + 1)} | {0.0}):
        kept = {piece.name for run in runs for piece in _spread(run, share)}
        chosen = [piece for piece in given if piece.name in kept or not piece.optional]
        if sum(piece.macs for piece in chosen) <= macs:
            best = chosen
    return best


def named(given: Sequence[Piece], names: Sequence[str]) -> list[Piece]:
    """The pieces of these names, and those that cannot be jumped over.

    Raises:
        BranchError: there is no piece of that name behind the exit.
    """
    known = [piece.name for piece in given]
    for name in names:
        if name not in known:
            raise BranchError(f"No block {name!r} to keep behind this exit. {suggest(name, known)}")
    return [piece for piece in given if piece.name in names or not piece.optional]


def _spread(run: Sequence[Piece], share: float) -> list[Piece]:
    n, m = int(share * len(run) + 1e-9), len(run)
    return [run[-(-(i + 1) * m // n) - 1] for i in range(n)]


def _alike(left: Sequence[fx.Node], right: Sequence[fx.Node], graph: ModelGraph) -> bool:
    return len(left) == len(right) and all(a is b or _same(a, b, graph) for a, b in zip(left, right, strict=True))


def _same(a: fx.Node, b: fx.Node, graph: ModelGraph) -> bool:
    axis, x, y = graph.liveness.axis[a], a.meta["val"], b.meta["val"]
    # a tensor without an axis belongs to all samples, and need not mean the same at another position
    return axis is not None and axis == graph.liveness.axis[b] and x.dtype == y.dtype and x.shape == y.shape


Key: TypeAlias = tuple[tuple[torch.dtype, torch.device, tuple[int, ...]], ...]


def key(tensors: Sequence[Tensor], axes: Sequence[Axis | None]) -> Key:
    """What tells inputs of one size, dtype and device from others, whatever the batch."""
    return tuple(
        (
            tensor.dtype,
            tensor.device,
            tuple(size for i, size in enumerate(tensor.shape) if axis is None or i != axis.dim),
        )
        for tensor, axis in zip(tensors, axes, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A way from an exit to the logits, for inputs of one size, dtype and device."""

    segments: tuple[Segment, ...]
    """What runs without a jump between."""
    macs: int
    key: Key
    """Of the tensors that cross the exit."""
    learned: tuple[str, ...]
    """Names in the model of what it has copies of: parameters, and the running statistics of BatchNorms."""


def find_shortcut(graph: ModelGraph, point: ExitPoint, kept: Sequence[Piece]) -> Shortcut:
    """The way from an exit through these pieces.

    Raises:
        BranchError: a piece calls a module that is kept whole: it has no graph to copy.
    """
    live, position = graph.live, graph.capture.position
    segments: list[Segment] = []
    for start, stop in _joined(kept):
        given = live[start - 1]
        wanted = live[stop - 1] if stop < len(graph.capture.nodes) else [graph.capture.output]
        segments.append(Segment.of(graph.capture, graph.liveness, given, wanted, start, stop, learning=True))
    found = [node for segment in segments for node in segment.calls]
    if any(is_opaque(node) for node in found):
        raise BranchError(f"No shortcut from {point.name!r}: it would need a copy of a module that is kept whole.")
    macs = sum(graph.call_macs[position[node]] for node in dict.fromkeys(found))
    crossing = [node.meta["val"] for node in live[point.index]]
    return Shortcut(tuple(segments), macs, key(crossing, segments[0].axes), _learned(found, graph))


def _joined(kept: Sequence[Piece]) -> list[tuple[int, int]]:
    """First call and end of what runs without a jump."""
    parts: list[tuple[int, int]] = []
    for piece in kept:
        if parts and parts[-1][1] == piece.start:
            parts[-1] = parts[-1][0], piece.stop
        else:
            parts.append((piece.start, piece.stop))
    return parts


def _learned(calls: Sequence[fx.Node], graph: ModelGraph) -> tuple[str, ...]:
    parameters, names = dict(graph.backbone.model.named_parameters(remove_duplicate=False)), graph.capture.tensors
    learned = dict.fromkeys(
        names[arg] for node in calls for arg in node.all_input_nodes if arg in names and names[arg] in parameters
    )
    for node in calls:
        learned.update({names[arg]: None for arg in statistics(node)})
    return tuple(learned)
