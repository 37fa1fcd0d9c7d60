"""How sure an exit is of its answer. Every score grows with confidence.

A score takes one exit's logits (B, C), its confidence logit (B,) or None, and the state it carried from the exit
before (a tuple of tensors with the batch first, empty at the first exit). It gives the score (B,) and the new state.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ee_surgery.errors import ConfigError
from ee_surgery.registry import Registry

State: TypeAlias = tuple[Tensor, ...]


class Score(Protocol):
    """Signature of a score."""

    def __call__(self, logits: Tensor, confidence: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Score one exit."""
        ...


SCORES: Registry[Score] = Registry("score")

STATEFUL: set[str] = {"patience"}
"""Scores that need every exit's answer, closed exits included."""


@SCORES.register("max_prob")
def max_prob(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Largest softmax probability, in [1/C, 1]. Source: cascaded inference (arXiv:1805.10982)."""
    return torch.softmax(logits, -1).amax(-1), ()


@SCORES.register("margin")
def margin(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Difference between the two largest softmax probabilities, in [0, 1]."""
    top = torch.softmax(logits, -1).topk(2, -1).values
    return top[..., 0] - top[..., 1], ()


@SCORES.register("entropy")
def entropy(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """1 - H(p) / log C, in [0, 1]: 1 for a certain answer. BranchyNet (arXiv:1709.01686) thresholds H itself."""
    log_p = torch.log_softmax(logits, -1)
    # 0 * -inf is 0 here: a class that is ruled out carries no entropy
    h = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    return 1 - h / math.log(logits.shape[-1]), ()


@SCORES.register("learned")
def learned(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Sigmoid of the branch's confidence unit, in [0, 1]. Source: EENets (arXiv:2409.05336), PTEENet."""
    if confidence is None:
        raise ConfigError(
            "The score 'learned' needs branches with a confidence unit: BranchSpec(..., confidence=True)."
        )
    return torch.sigmoid(confidence), ()


@SCORES.register("patience")
def patience(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """How many exits before this one gave the same class without a break. Source: PABEE (arXiv:2006.04152)."""
    answer = logits.argmax(-1)
    if not state:
        streak = torch.zeros(answer.shape, dtype=torch.float32, device=answer.device)
    else:
        before, streak = state
        streak = torch.where(answer == before, streak + 1, torch.zeros_like(streak))
    return streak, (answer, streak)
