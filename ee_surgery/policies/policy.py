"""When to leave: a score, and one threshold an exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ee_surgery.errors import ConfigError
from ee_surgery.policies.scores import SCORES, STATEFUL, State

NEVER = math.inf


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
    score: str = "max_prob"

    def __post_init__(self) -> None:
        if any(math.isnan(value) for value in self.thresholds):
            raise ConfigError(f"Thresholds must be numbers, got {self.thresholds}. Use inf to close an exit.")
        # Looked up once: decide runs at every exit. Scores are float32, so thresholds are compared as float32.
        object.__setattr__(self, "_score", SCORES[self.score])
        object.__setattr__(self, "_taus", torch.tensor(self.thresholds, dtype=torch.float32).tolist())

    @property
    def visits(self) -> tuple[bool, ...]:
        """Which branches have to run: closed ones are skipped, unless the score counts answers along the way."""
        return tuple(tau < NEVER or self.score in STATEFUL for tau in self.thresholds)

    @property
    def closed(self) -> bool:
        """True when nothing can leave early."""
        return all(tau == NEVER for tau in self.thresholds)

    def decide(self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State) -> Decision:
        """Decide for every sample of a batch at one exit.

        Args:
            logits: (B, C), `confidence`: (B,) or None, `state`: from the exit before, () at the first.
        """
        score, state = self._score(_precise(logits), confidence, state)  # pyright: ignore[reportAttributeAccessIssue]
        # One sum tells: it is finite unless a logit is not (or their sum overflows, which is no answer either).
        leaves = (score >= self._taus[exit_index]) & torch.isfinite(logits.sum(-1))  # pyright: ignore[reportAttributeAccessIssue]
        return Decision(score, leaves, state)

    def decide_one(
        self, exit_index: int, logits: Tensor, confidence: Tensor | None, state: State
    ) -> tuple[bool, Tensor, State]:
        """The same for a batch of one, compared in Python: a few kernel launches fewer, which count at batch 1."""
        score, state = self._score(_precise(logits), confidence, state)  # pyright: ignore[reportAttributeAccessIssue]
        leaves = score.item() >= self._taus[exit_index] and math.isfinite(logits.sum().item())  # pyright: ignore[reportAttributeAccessIssue]
        return leaves, score, state


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
