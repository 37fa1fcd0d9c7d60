"""The shortcut branch: trainable copies of some of the original's own remaining blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import Tensor, nn

from ee_surgery.branches.base import BRANCHES, Branch, ExitLogits, Option, PreparedBranch, Reads
from ee_surgery.checks import positive
from ee_surgery.errors import BranchError
from ee_surgery.graph.backends.base import BoundWeights, Run, bind
from ee_surgery.graph.backends.graph_module import BoundStage
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.segments import Segment
from ee_surgery.graph.shortcut import Key, find_shortcut, key, named, pieces, within

BUDGET = 0.25
"""Default largest cost of a shortcut as a fraction of the original's MACs."""


@BRANCHES.register("shortcut")
class ShortcutBranch(Branch):
    """Copies of some of the remaining blocks and of the head, initialized with the original's weights.

    From the exit, the features skip blocks to one that takes tensors of the same shape, and so on to the logits.
    Copies of BatchNorms have their own statistics.

    Args:
        graph: of the original.
        budget: largest cost as a fraction of the original's MACs.
        blocks: names of the blocks to keep, separated by spaces, besides those that cannot be skipped; instead of a
            budget.
    Raises:
        BranchError: the shortest path costs more than the budget, or the original has no head to copy.
    """

    reads: ClassVar[Reads] = "live"
    copies: ClassVar[bool] = True
    rank: ClassVar[int | None] = None

    def __init__(
        self,
        point: ExitPoint,
        num_classes: int,
        confidence: bool = False,
        budget: float = BUDGET,
        blocks: str | None = None,
        *,
        graph: ModelGraph,
    ) -> None:
        super().__init__(point, num_classes, confidence, num_classes)
        self.classifier = nn.Identity()  # the copied tail includes the original's classifier
        if graph.head is not None:
            raise BranchError(f"No shortcut in {graph.backbone.model_id}: it has no head to copy.")
        budget, blocks = positive("budget", budget), None if blocks is None else str(blocks)
        given = pieces(graph, point)
        if blocks is None:
            kept = within(given, budget * graph.macs)
            if kept is None:
                least = sum(piece.macs for piece in given if not piece.optional) / graph.macs
                raise BranchError(
                    f"The shortest path from {point.name!r} to the logits costs {least:.1%} of the MACs, more than "
                    f"the budget of {budget:.1%}: choose a later exit, a larger budget or another branch."
                )
        else:
            kept = named(given, blocks.split())
        self.blocks = [piece.name for piece in kept if piece.optional]
        """Names of the blocks it keeps although they could be skipped."""
        self.weights = nn.Module()
        model = graph.backbone.model
        tables = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        for name in find_shortcut(graph, point, kept).learned:
            _put(self.weights, name, tables[name])
        self._ways: WeakValueDictionary[Key, _Way] = WeakValueDictionary()

    def prepare(self, graph: ModelGraph, point: ExitPoint) -> PreparedBranch:
        """Build the shortcut for inputs like those of this graph."""
        found = find_shortcut(graph, point, named(pieces(graph, point), self.blocks))
        learned = set(found.learned)

        def owner(name: str) -> nn.Module:
            return self.weights if name in learned else graph.backbone.model

        stages = [bind("python", segment, owner) for segment in found.segments]
        return PreparedBranch(found.macs, self._ways.setdefault(found.key, _Way(found.segments, stages, owner)))

    def traceable(self, prepared: PreparedBranch) -> nn.Module:
        """Its graphs in place of its functions."""
        way = prepared.code
        assert isinstance(way, _Way)
        return _Traceable(self, way)

    def resolved_options(self) -> Mapping[str, Option]:
        """The blocks it keeps."""
        return {"blocks": " ".join(self.blocks)}

    def forward(self, *live: Tensor) -> ExitLogits:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All live tensors at the exit, in the graph's order -> logits (B, C)."""
        return self.answer(self.vector(*live))

    def vector(self, *live: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits (B, C), which are also the input of a confidence unit."""
        way = self._way(live)
        if way.segments[0].mutates:
            live = tuple(tensor.clone() for tensor in live)
        for stage in way.stages:
            live = stage(*live, op_training=self.training)
        return live[0]

    def _way(self, live: tuple[Tensor, ...]) -> _Way:
        # from a snapshot of references: another thread may be adding a size
        ways = [way for reference in self._ways.valuerefs() if (way := reference()) is not None]
        if len(ways) == 1:  # only one input size so far
            return ways[0]
        for way in ways:
            if (found := self._ways.get(key(live, way.segments[0].axes))) is not None:
                return found
        raise BranchError(
            f"A shortcut runs only inside its model, but is not prepared for {[tuple(t.shape) for t in live]}."
        )

    def __getstate__(self) -> dict[str, Any]:
        # Stages are functions over these tensors: a copy must be prepared again.
        return {name: value for name, value in self.__dict__.items() if name != "_ways"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ways = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class _Way:
    """What runs inputs of one size; referenced by the programs of such inputs, and freed with the last of them."""

    segments: Sequence[Segment]
    """The first takes what crosses the exit."""
    stages: Sequence[Run]
    """Each made to run."""
    owner: Callable[[str], nn.Module]
    """Has the tensor of a name."""


class _Traceable(nn.Module):
    """A shortcut for inputs of one size as graphs."""

    chained = False

    def __init__(self, branch: ShortcutBranch, way: _Way) -> None:
        super().__init__()
        self.branch, self.mutates = branch, way.segments[0].mutates
        self.stages = nn.ModuleList(
            BoundStage(segment, BoundWeights(segment.weights.values(), way.owner)) for segment in way.segments
        )

    def forward(self, *live: Tensor) -> ExitLogits:
        """As the branch."""
        if self.mutates:
            live = tuple([tensor.clone() for tensor in live])
        for stage in self.stages:
            live = stage(*live)
        return self.branch.answer(live[0])


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a copy of a tensor under its dotted name; parameters become trainable."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, nn.Parameter(tensor.detach().clone(), tensor.is_floating_point()))
    else:
        root.register_buffer(last, tensor.detach().clone())
