"""When to leave: a score, and one threshold an exit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ee_surgery.errors import ConfigError
from ee_surgery.policies.scores import FittedScore, ScoreOf, State

NEVER = math.inf

Fallback = Literal["last", "most_confident"]


class Decision(NamedTuple):
    """What a policy says at one exit."""

    score: Tensor
    """Shape (B,)."""
    leaves: Tensor
    """Bool, shape (B,)."""
    state: State
    """Carried to the next exit; its rows are compacted with the batch."""


@dataclass(frozen=True)
class ThresholdPolicy:
    """Leave at the first exit whose score reaches its threshold; the original's head takes what is left.

    A sample whose logits are not all finite never leaves early.
    """

    thresholds: tuple[float, ...]
    """One for each branch, in program order; `inf` closes an exit."""
    score: str | FittedScore = "max_prob"
    """A registered name, or a score that was fitted on records."""
    fallback: Fallback = "last"
    """Whose answer a sample gets that never reached a threshold: the original's, or that of whichever exit on its
    way had the largest softmax probability, the original's included (Shallow-Deep Networks, arXiv:1810.07052)."""

    def __post_init__(self) -> None:
        if any(math.isnan(value) for value in self.thresholds):
            raise ConfigError(f"Thresholds must be numbers, got {self.thresholds}. Use inf to close an exit.")
        if self.fallback not in ("last", "most_confident"):
            raise ConfigError(f"fallback must be 'last' or 'most_confident', got {self.fallback!r}.")
        # Looked up once: decide runs at every exit. Scores are float32, so thresholds are compared as float32.
        object.__setattr__(self, "_score", ScoreOf(self.score))
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

    @property
    def closed(self) -> bool:
        """True when nothing can leave early."""
        return all(tau == NEVER for tau in self.thresholds)

    def to(self, device: torch.device) -> ThresholdPolicy:
        """The same policy, what its score has fitted on a device."""
        return self if isinstance(self.score, str) else replace(self, score=self.score.to(device))

    def decide(self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State) -> Decision:
        """Decide for every sample of a batch at one exit.

        Args:
            logits: (B, C), `confidence`: (B,) or None, `state`: from the exit before, () at the first.
        """
        logits = precise(logits)
        confidence = None if confidence is None else precise(confidence)
        score, state = self._score(logits, confidence, state, exit_index)  # pyright: ignore[reportAttributeAccessIssue]
        # One sum tells: it is finite unless a logit is not (or their sum overflows, which is no answer either).
        leaves = (score >= self._taus[exit_index]) & torch.isfinite(logits.sum(-1))  # pyright: ignore[reportAttributeAccessIssue]
        return Decision(score, leaves, state)

    def decide_one(
        self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State
    ) -> tuple[bool, Tensor, State]:
        """The same for a batch of one, compared in Python: a few kernel launches fewer, which count at batch 1."""
        logits = precise(logits)
        confidence = None if confidence is None else precise(confidence)
        score, state = self._score(logits, confidence, state, exit_index)  # pyright: ignore[reportAttributeAccessIssue]
        leaves = score.item() >= self._taus[exit_index] and math.isfinite(logits.sum().item())  # pyright: ignore[reportAttributeAccessIssue]
        return leaves, score, state


def precise(logits: Tensor) -> Tensor:
    """Logits in the one precision that scores are computed in: float32, that of records, whatever the model's own is.

    A float64 score on the far side of a threshold from its float32 record would leave elsewhere than replayed.
    """
    return logits.float()


def certainty(logits: Tensor) -> Tensor:
    """What `most_confident` compares exits by: the largest softmax probability; -inf where not finite, (B,)."""
    top = torch.softmax(precise(logits), -1).amax(-1)
    return torch.where(torch.isfinite(logits.sum(-1)), top, -torch.inf)
