"""A branch with its score, and the end, as modules over tensors: what engines compile or export as one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ee_surgery.branches.base import Branch, run_branch
from ee_surgery.graph.features import Read, ReadFeatures
from ee_surgery.policies.policy import certainty
from ee_surgery.policies.scores import ScoreOf, sound
from ee_surgery.runtime.router import per_sample
from ee_surgery.task import Task


class Carried(NamedTuple):
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


Asked: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Logits (B, C); score (B,); the score that is compared with the threshold, NaN where the answer is not finite."""


class AskBranch(nn.Module):
    """A branch and its score: live tensors and what is carried, to an answer and what is carried on to the next exit.

    Args:
        shape: of the original's answer to one sample.
        keeps_best: its answer is the best so far where none is carried.
    """

    def __init__(
        self, branch: Any, read: Read, index: int, chained: bool, task: Task, shape: Sequence[int],
        keeps_best: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.branch, self.read, self.index, self.chained, self.task = branch, read, index, chained, task
        self.shape, self.keeps_best = tuple(shape), keeps_best

    def forward(self, live: Sequence[Tensor], carried: Carried, score: ScoreOf) -> tuple[Asked, Carried]:
        """Ask the branch."""
        previous = carried.log_probs[0] if carried.log_probs else None
        features = self.read(live)
        answer = run_branch(self.branch, features, previous) if self.chained else self.branch(*features)
        value, state = score(answer.logits, answer.confidence, carried.state, self.index)
        best = carried.best
        if best or self.keeps_best:
            whole = self.task.enlarge(answer.logits, self.shape)
            best = tuple([_better(one, whole, self.task) for one in best]) or (whole,)
        log_probs = () if answer.log_probs is None else (answer.log_probs,)
        return (answer.logits, value, sound(value, answer.logits)), Carried(tuple(state), log_probs, best)


class AskEnd(nn.Module):
    """What the last stage gives, a new head where the original has none, and the fallback."""

    def __init__(self, read: ReadFeatures | None, head: Branch | None, task: Task) -> None:
        super().__init__()
        self.read, self.head, self.task = read, head, task

    def forward(self, out: Sequence[Tensor], best: Sequence[Tensor]) -> Tensor:
        """Logits (B, C)."""
        logits = out[0] if self.head is None or self.read is None else self.head(*self.read(out)).logits
        for one in best:
            logits = _better(one, logits, self.task)
        return logits


def _better(best: Tensor, logits: Tensor, task: Task) -> Tensor:
    """Row by row, whichever answer is more certain; the earlier of equals; NaN throughout is no answer yet."""
    unset = torch.isnan(best).flatten(1).all(-1)
    better = unset | (certainty(logits, task) > certainty(best, task))
    return torch.where(per_sample(better, logits), logits, best.to(logits.dtype))
