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
        object.__setattr__(self, "_score", SCORES[self.score])  # looked up once: decide runs at every exit

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
        score, state = self._score(logits, confidence, state)  # pyright: ignore[reportAttributeAccessIssue]
        # One sum tells: it is finite unless a logit is not (or their sum overflows, which is no answer either).
        leaves = (score >= self.thresholds[exit_index]) & torch.isfinite(logits.sum(-1))
        return Decision(score, leaves, state)
