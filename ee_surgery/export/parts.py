"""A branched model in pieces that torch.onnx can export: stages, branches with their scores, and the end.

Between two pieces are the live tensors, and what a stateful score, a chain of branches or a fallback carries along.
Every piece takes and returns plain tensors with a symbolic batch, so that compaction can go in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ee_surgery.backbone.inputs import Batch, tensors
from ee_surgery.graph.backends.base import Run
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import ScoreOf
from ee_surgery.runtime.asking import AskBranch, AskEnd, Carried
from ee_surgery.runtime.engine import Engine


class StagePart(nn.Module):
    """The original between two exits: live tensors in, live tensors out."""

    def __init__(self, stage: Run) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        """Run the stage."""
        return self.stage(*live)


class BranchPart(nn.Module):
    """`AskBranch` over plain tensors: `live` live tensors, then those of `carried`.

    Outputs, in order: logits (B, C, ...), as large as the original's; score (B,); the score that is compared with the
    threshold; then the tensors of `Carried`.
    """

    def __init__(self, ask: AskBranch, score: ScoreOf, live: int, carried: Carried) -> None:
        super().__init__()
        self.ask, self.score, self.live, self.carried = ask, score, live, carried

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Ask the branch."""
        ask = self.ask
        (logits, *scores), carried = ask(tensors[: self.live], self.carried.like(tensors[self.live :]), self.score)
        return ask.task.enlarge(logits, ask.shape), *scores, *carried.tensors


class EndPart(nn.Module):
    """The last stage and `AskEnd`: live tensors and best, to logits."""

    def __init__(self, stage: Run, ask: AskEnd, live: int) -> None:
        super().__init__()
        self.stage, self.ask, self.live = stage, ask, live

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.ask(self.stage(*tensors[: self.live]), tensors[self.live :])


@dataclass(frozen=True)
class Piece:
    """A module with inputs to export it by."""

    name: str
    """`stage_0`, `branch_0`, `stage_1`, ...; the last stage is the end."""
    module: nn.Module
    inputs: tuple[Tensor, ...]
    axes: tuple[Axis | None, ...]
    """Where each input has its batch; None for one that all samples share."""
    outputs: tuple[Tensor, ...]
    """What it gives for these inputs."""


@dataclass(frozen=True)
class ExitPieces:
    """One exit: the stage up to it and its branch; `carried` is what the branch takes beside the live tensors."""

    stage: Piece
    branch: Piece
    carried: Carried

    @property
    def live_axes(self) -> tuple[Axis | None, ...]:
        """Where each tensor that the stage gives has its batch."""
        return self.branch.axes[: len(self.stage.outputs)]


@dataclass(frozen=True)
class Pieces:
    """A whole branched model in pieces, for one input signature."""

    names: tuple[str, ...]
    """Of the inputs."""
    exits: list[ExitPieces]
    end: Piece
    closes_alone: bool
    """Whether a closed exit's branch is skipped even where later ones are open."""

    def __iter__(self) -> Iterator[Piece]:
        for part in self.exits:
            yield part.stage
            yield part.branch
        yield self.end


def pieces(engine: Engine, policy: ThresholdPolicy, batch: Batch | None = None) -> Pieces:
    """Take a branched model apart; a batch runs through, its sample by default, so that each piece knows its inputs."""
    batch = engine.backbone.own_batch() if batch is None else batch
    branches = engine.branches
    program = engine.entry(batch).program
    names, live = tuple(tensors(batch.arguments)), batch.tensors
    axes = tuple(None if (dim := batch.dims[name]) is None else Axis(dim) for name in names)
    task, chained = engine.backbone.task, branches.chained
    score = ScoreOf(policy.score, task)
    weight = next(branches.parameters())
    shape = (batch.size, *(program.answer if engine.branches.head is None else (engine.backbone.num_classes,)))
    unset = torch.full(shape, torch.nan, dtype=weight.dtype, device=weight.device)
    carried = Carried(best=(unset,) if policy.fallback == "most_confident" else ())
    exits: list[ExitPieces] = []
    with torch.no_grad():
        for k, branch in enumerate(branches):
            stage = _piece(f"stage_{k}", StagePart(program.stages[k]), live, axes)
            live, axes = stage.outputs, tuple(program.segments[k + 1].axes)
            ask = AskBranch(branch, program.readers[k], k, chained, task, program.answer)
            part = BranchPart(ask, score, len(live), carried)
            asked = _piece(f"branch_{k}", part, (*live, *carried.tensors), (*axes, *(Axis(0) for _ in carried.tensors)))
            exits.append(ExitPieces(stage, asked, carried))
            rest = asked.outputs[3:]
            m = len(rest) - len(carried.best)
            states = m - (1 if chained else 0)
            carried = Carried(rest[:states], rest[states:m], rest[m:])
        last = EndPart(program.stages[-1], AskEnd(program.head, branches.head, task), len(live))
        end = _piece(f"stage_{len(exits)}", last, (*live, *carried.best), (*axes, *(Axis(0) for _ in carried.best)))
    return Pieces(names, exits, end, not (chained or score.stateful))


class Whole(nn.Module):
    """The original: all stages, one after the other."""

    def __init__(self, stages: Sequence[Run], end: AskEnd) -> None:
        super().__init__()
        self.stages, self.end = stages, end

    def forward(self, *live: Tensor) -> Tensor:
        """Logits (B, C)."""
        for stage in self.stages:
            live = tuple(stage(*live))
        return self.end(live, ())


def whole(engine: Engine) -> tuple[tuple[str, ...], Piece]:
    """The original as one piece, and the names of its inputs."""
    batch = engine.backbone.own_batch()
    program = engine.entry(batch).program
    names = tuple(tensors(batch.arguments))
    axes = tuple(None if (dim := batch.dims[name]) is None else Axis(dim) for name in names)
    end = AskEnd(program.head, engine.branches.head, engine.backbone.task)
    with torch.no_grad():
        return names, _piece("original", Whole(program.stages, end), batch.tensors, axes)


def _piece(name: str, module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[Axis | None, ...]) -> Piece:
    outputs = module(*inputs)
    return Piece(name, _Part(module), inputs, axes, outputs if isinstance(outputs, tuple) else (outputs,))


class _FourDimensions(TorchFunctionMode):
    """torch.onnx knows attention over four dimensions alone: with fewer or more, all but the last two are folded."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "") != "scaled_dot_product_attention" or args[0].ndim == 4:
            return func(*args, **named)
        lead = args[0].shape[:-2]

        def fold(tensor: Tensor) -> Tensor:
            return tensor.expand(*lead, *tensor.shape[-2:]).reshape(-1, 1, *tensor.shape[-2:])

        mask = args[3] if len(args) > 3 else named.pop("attn_mask", None)
        out = func(*map(fold, args[:3]), None if mask is None else fold(mask), *args[4:], **named)
        return out.reshape(*lead, *out.shape[-2:])


class _Part(nn.Module):
    """A part as torch.onnx takes it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with _FourDimensions():
            return self.part(*tensors)
