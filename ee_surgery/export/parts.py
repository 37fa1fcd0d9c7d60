"""A branched model in pieces that torch.onnx can export: stages, branches with their scores, and the end.

Between two pieces are the live tensors, and what a stateful score, a chain of branches or a fallback carries along.
Every piece takes and returns plain tensors with a symbolic batch, so that compaction can go in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_surgery.backbone.inputs import tensors
from ee_surgery.branches.base import Branch, run_branch
from ee_surgery.graph.backends.base import Run
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.features import ReadAllLive, ReadFeatures
from ee_surgery.policies.policy import ThresholdPolicy, certainty
from ee_surgery.policies.scores import ScoreOf, sound
from ee_surgery.runtime.engine import Engine
from ee_surgery.task import Task


@dataclass(frozen=True)
class Carried:
    """What goes from exit to exit beside the live tensors, each with the batch first."""

    state: tuple[Tensor, ...] = ()
    """Of a score that looks back."""
    log_probs: tuple[Tensor, ...] = ()
    """Of a chain of branches, one tensor; nothing before the first branch and where none is chained."""
    best: tuple[Tensor, ...] = ()
    """The most certain logits so far, for the `most_confident` fallback; NaN while no exit has answered."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in one fixed order."""
        return (*self.state, *self.log_probs, *self.best)

    def like(self, tensors: Sequence[Tensor]) -> Carried:
        """Other tensors in the same places."""
        n, m = len(self.state), len(self.state) + len(self.log_probs)
        return Carried(tuple(tensors[:n]), tuple(tensors[n:m]), tuple(tensors[m:]))


class StagePart(nn.Module):
    """The original between two exits: live tensors in, live tensors out."""

    def __init__(self, stage: Run) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        """Run the stage."""
        return self.stage(*live)


class BranchPart(nn.Module):
    """A branch and its score: live tensors and what is carried, to an answer and what is carried on to the next exit.

    Outputs, in order: logits (B, C); score (B,); the score that is compared with the threshold, NaN where the answer is
    not finite; then the tensors of `Carried`.
    """

    def __init__(
        self, branch: Branch, read: ReadFeatures | ReadAllLive, score: ScoreOf, index: int, live: int, carried: Carried,
        chained: bool, task: Task,
    ) -> None:  # fmt: skip
        super().__init__()
        self.branch, self.read, self.score, self.index = branch, read, score, index
        self.live, self.carried, self.chained, self.task = live, carried, chained, task

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Ask the branch."""
        live, carried = tensors[: self.live], self.carried.like(tensors[self.live :])
        previous = carried.log_probs[0] if carried.log_probs else None
        features = self.read(live)
        answer = run_branch(self.branch, features, previous) if self.chained else self.branch(*features)
        score, state = self.score(answer.logits, answer.confidence, carried.state, self.index)
        best = tuple(_better(one, answer.logits, self.task) for one in carried.best)
        log_probs = () if answer.log_probs is None else (answer.log_probs,)
        return answer.logits, score, sound(score, answer.logits), *Carried(tuple(state), log_probs, best).tensors


class EndPart(nn.Module):
    """The last stage, a new head where the original has none, and the fallback: live tensors and best, to logits."""

    def __init__(self, stage: Run, read: ReadFeatures | None, head: Branch | None, live: int, task: Task) -> None:
        super().__init__()
        self.stage, self.read, self.head, self.live, self.task = stage, read, head, live, task

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits (B, C)."""
        out = self.stage(*tensors[: self.live])
        logits = out[0] if self.head is None or self.read is None else self.head(*self.read(out)).logits
        for best in tensors[self.live :]:
            logits = _better(best, logits, self.task)
        return logits


def _better(best: Tensor, logits: Tensor, task: Task) -> Tensor:
    """Row by row, whichever answer is more certain; the earlier of equals; NaN throughout is no answer yet."""
    unset = torch.isnan(best).all(-1)
    return torch.where(
        (unset | (certainty(logits, task) > certainty(best, task)))[:, None], logits, best.to(logits.dtype)
    )


@dataclass(frozen=True)
class Piece:
    """A module with inputs to export it by."""

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


def pieces(engine: Engine, policy: ThresholdPolicy) -> Pieces:
    """Take a branched model apart, running its sample through to know every shape."""
    batch, branches = engine.backbone.own_batch(), engine.branches
    program = engine.entry(batch).program
    names, live = tuple(tensors(batch.arguments)), batch.tensors
    axes = tuple(None if (dim := batch.dims[name]) is None else Axis(dim) for name in names)
    task, chained = engine.backbone.task, branches.chained
    score = ScoreOf(policy.score, task)
    weight = next(branches.parameters())
    unset = torch.full((batch.size, engine.backbone.num_classes), torch.nan, dtype=weight.dtype, device=weight.device)
    carried = Carried(best=(unset,) if policy.fallback == "most_confident" else ())
    exits: list[ExitPieces] = []
    with torch.no_grad():
        for k, branch in enumerate(branches):
            stage = _piece(StagePart(program.stages[k]), live, axes)
            live, axes = stage.outputs, tuple(program.segments[k + 1].axes)
            part = BranchPart(branch, program.readers[k], score, k, len(live), carried, chained, task)
            asked = _piece(part, (*live, *carried.tensors), (*axes, *(Axis(0) for _ in carried.tensors)))
            exits.append(ExitPieces(stage, asked, carried))
            rest = asked.outputs[3:]
            m = len(rest) - len(carried.best)
            states = m - (1 if chained else 0)
            carried = Carried(rest[:states], rest[states:m], rest[m:])
        last = EndPart(program.stages[-1], program.head, branches.head, len(live), task)
        end = _piece(last, (*live, *carried.best), (*axes, *(Axis(0) for _ in carried.best)))
    return Pieces(names, exits, end, not (chained or score.stateful))


def _piece(module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[Axis | None, ...]) -> Piece:
    outputs = module(*inputs)
    return Piece(module, inputs, axes, outputs if isinstance(outputs, tuple) else (outputs,))
