"""Segments: the pieces of a captured program between two cuts, as data; a backend makes one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.liveness import Liveness, backward_slice, is_size, live_out, writes


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a program: which calls, which tensors go in and out.

    Its nodes are those of the captured graph. Parameters, buffers and constants are inputs of that graph as well, but
    not `given`: a backend binds `weights` by name and puts constants in as they are. Sizes that the batch alone decides
    are no calls: each segment reads the batch size from its own inputs.
    """

    capture: Capture
    """The program that it is cut from."""
    calls: tuple[fx.Node, ...]
    """In program order."""
    given: tuple[fx.Node, ...]
    """What goes in: the inputs of the model, or the live tensors of the cut before."""
    wanted: tuple[fx.Node, ...]
    """What comes out: the live tensors of the next cut, or the logits."""
    axes: tuple[Axis | None, ...]
    """Where each tensor that goes in keeps its batch; None for one that all samples share."""
    mutates: bool
    """True when a call writes in place to a tensor that goes in."""
    learning: bool = False
    """Whether it takes `op_training=`: with True its BatchNorms use the statistics of the batch and update those they
    keep."""

    @classmethod
    def of(
        cls,
        capture: Capture,
        liveness: Liveness,
        given: Sequence[fx.Node],
        wanted: Sequence[fx.Node],
        start: int,
        stop: int,
        learning: bool = False,
    ) -> Segment:
        """The calls from index `start` up to `stop` that `wanted` needs, and earlier ones that no data goes into."""
        done = {*given} | {n for n in capture.nodes[:start] if n in liveness.data_dependent}
        needed = backward_slice(capture, liveness.root, wanted, done, stop)
        calls = tuple(node for node in capture.nodes if node in needed and not is_size(node, capture.batch))
        axes = tuple(axis for node in given if not isinstance(axis := liveness.axis[node], str))
        assert len(axes) == len(given), given
        roots = {liveness.root.get(node, node) for node in given}
        mutates = any(liveness.root.get(arg, arg) in roots for node in calls for arg in writes(node))
        return cls(capture, calls, tuple(given), tuple(wanted), axes, mutates, learning)

    @property
    def weights(self) -> dict[fx.Node, str]:
        """The parameters and buffers that it reads, by their names in the model; in order of use."""
        names = self.capture.tensors
        read = [*(arg for node in self.calls for arg in node.all_input_nodes), *self.wanted]
        return {node: names[node] for node in read if node in names}

    @property
    def batch_source(self) -> tuple[int, int, int]:
        """Where to read the batch size: which tensor that goes in, which dimension, and how often that holds it."""
        i, axis = next((i, axis) for i, axis in enumerate(self.axes) if axis is not None)
        return i, axis.dim, axis.before * axis.after


def cut(capture: Capture, liveness: Liveness, positions: Sequence[int], along: Sequence[fx.Node] = ()) -> list[Segment]:
    """Cut a program behind the given calls into `len(positions) + 1` segments.

    Args:
        positions: indices of calls in program order, strictly increasing; each a legal position.
        along: inputs that are handed from segment to segment although none may need them: a branch does.
    """
    live = live_out(capture, liveness)
    borders = [[*capture.inputs.values()], *(crossing(live[i], along) for i in positions), [capture.output]]
    starts, stops = [0, *(i + 1 for i in positions)], [*(i + 1 for i in positions), len(capture.nodes)]
    pieces = zip(borders[:-1], borders[1:], starts, stops, strict=True)
    return [Segment.of(capture, liveness, *piece) for piece in pieces]


def crossing(live: Sequence[fx.Node], along: Sequence[fx.Node]) -> list[fx.Node]:
    """What is handed over at a cut: the live tensors, then whatever else goes along."""
    return [*live, *(node for node in along if node not in live)]


def compact(live: Sequence[Tensor], axes: Sequence[Axis | None], keep: Tensor) -> tuple[Tensor, ...]:
    """Keep the samples `keep` of every live tensor, in that order.

    Args:
        live: tensors that cross an exit point, each with its batch where `axes` says; None belongs to all samples.
        keep: indices of the samples still in flight, int64, shape (B',).
    Source: side-branch exits of BranchyNet (Teerapittayanon et al., ICPR 2016, arXiv:1709.01686).
    """
    return tuple(tensor if axis is None else axis.select(tensor, keep) for tensor, axis in zip(live, axes, strict=True))


def statistics(node: fx.Node) -> list[fx.Node]:
    """The running mean and variance that a BatchNorm uses; nothing for other calls."""
    if node.target is not torch.ops.aten.batch_norm.default or node.args[5] is not False:
        return []
    return [arg for arg in node.args[3:5] if isinstance(arg, fx.Node)]
