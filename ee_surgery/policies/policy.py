"""When to leave: a score, and one threshold per exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from ee_surgery.checks import choice, numbers
from ee_surgery.errors import OperatingPointError, SurgeryError
from ee_surgery.policies.scores import FittedScore, ScoreOf, State, precise, sound
from ee_surgery.task import CLASSIFICATION, Task

NEVER = math.inf
_Number = TypeVar("_Number", float, Tensor)

Fallback = Literal["last", "most_confident"]


class Decision(NamedTuple):
    """Decisions of a policy at one exit."""

    score: Tensor
    """Shape (B,)."""
    leaves: Tensor
    """Bool, shape (B,)."""
    state: State
    """Carried to the next exit; its rows are compacted with the batch."""


@dataclass(frozen=True)
class ThresholdPolicy:
    """Leave at the first exit whose score reaches its threshold; the original's head takes what is left.

    A sample never leaves where one of its logits, its score, or the confidence that the score reads is NaN or infinite:
    at no threshold, -inf included.

    Raises:
        ConfigError: a threshold is not a number, or another setting is unknown.
        UnknownNameError: no such score.
    """

    thresholds: tuple[float, ...]
    """One per branch, in program order; `inf` closes an exit."""
    score: str | FittedScore = "max_prob"
    """A registered name, or a score that was fitted on records."""
    fallback: Fallback = "last"
    """Whose answer a sample gets that never reached a threshold: the original's, or that of whichever exit on its
    way was the most certain, the original's included (Shallow-Deep Networks, arXiv:1810.07052)."""
    task: Task | None = field(default=None, repr=False, compare=False)
    """What the answers are; None while it belongs to no model: each runs every policy with its own task."""

    def __post_init__(self) -> None:
        thresholds = numbers("thresholds", self.thresholds, infinite=True, hint="Use inf to close an exit.")
        object.__setattr__(self, "thresholds", thresholds)
        choice("fallback", self.fallback, get_args(Fallback))
        # Looked up once: decide runs at every exit. Scores are float32, so thresholds are compared as float32.
        object.__setattr__(self, "_score", ScoreOf(self.score, self.task))
        object.__setattr__(self, "_taus", torch.tensor(self.thresholds, dtype=torch.float32).tolist())

    def visits(self, chained: bool = False) -> tuple[bool, ...]:
        """Which branches have to run.

        Closed ones are skipped, unless an open exit behind them reads their answers: where branches are chained, or
        the score looks back.
        """
        opened = [tau < NEVER for tau in self.thresholds]
        if not (chained or self._score.stateful):  # pyright: ignore[reportAttributeAccessIssue]
            return tuple(opened)
        return tuple(any(opened[k:]) for k in range(len(opened)))

    @cached_property
    def closed(self) -> bool:
        """Whether no sample can leave early."""
        return all(tau == NEVER for tau in self.thresholds)

    def to(self, device: torch.device) -> ThresholdPolicy:
        """The same policy, what its score has fitted on a device."""
        return self if isinstance(self.score, str) else replace(self, score=self.score.to(device))

    def decide(self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State) -> Decision:
        """Decide for every sample of a batch at one exit.

        Args:
            logits: (B, C), `confidence`: (B,) or None, `state`: from the exit before, () at the first.
        """
        score, state = self._score(logits, confidence, state, exit_index)  # pyright: ignore[reportAttributeAccessIssue]
        return Decision(score, self.reached(exit_index, sound(score, logits)), state)

    def reached(self, exit_index: int, score: _Number) -> _Number:
        """Whether a score, NaN for an answer that is not finite, lets a sample leave; of many (B,), bool (B,)."""
        return score >= self._taus[exit_index]  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def decide_one(
        self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State
    ) -> tuple[bool, Tensor, State]:
        """The same for a batch of one, compared in Python: a few kernel launches fewer, which count at batch 1."""
        score, state = self._score(logits, confidence, state, exit_index)  # pyright: ignore[reportAttributeAccessIssue]
        value = score.item()
        leaves = value >= self._taus[exit_index] and math.isfinite(value + precise(logits).sum().item())  # pyright: ignore[reportAttributeAccessIssue]
        return leaves, score, state

    def check(self, classes: int, units: Sequence[bool], chained: bool = False) -> None:
        """Run it on made-up logits, to refuse a score that cannot work before any samples are run.

        Args:
            classes: C.
            units: whether each branch has a confidence unit.
            chained: whether each branch reads the answers of those before it.
        Raises:
            OperatingPointError: not a threshold for each branch, or the score does not take such answers.
            ConfigError: the score needs confidence units that are not there.
        """
        if len(self.thresholds) != len(units):
            raise OperatingPointError(f"{len(self.thresholds)} thresholds for {len(units)} branches: one per branch.")
        policy, state = self.to(torch.device("cpu")), ()
        try:
            for k, unit in enumerate(units):
                if self.visits(chained)[k]:
                    answer = (self.task or CLASSIFICATION).blank(2, classes), torch.zeros(2) if unit else None
                    score, leaves, state = policy.decide(k, *answer, state)
                    if leaves.shape != (2,):
                        raise ValueError(f"two samples have scores of shape {tuple(score.shape)}")
        except SurgeryError:
            raise
        except Exception as error:
            raise OperatingPointError(
                f"The score {self.score!r} does not take answers of these branches, over {classes} classes: {error}. "
                "Was it fitted on records of another model?"
            ) from error


def certainty(logits: Tensor, task: Task = CLASSIFICATION) -> Tensor:
    """What `most_confident` compares exits by, see `Task.certainty`; -inf where not finite, (B,)."""
    top = task.certainty(precise(logits))
    return torch.nan_to_num(sound(top, logits), nan=-torch.inf)
