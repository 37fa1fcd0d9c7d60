"""Scores of maps: one number for a picture out of the probabilities of its pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.policies.scores import SCORES, State

_SURE = 0.9


def _largest(logits: Tensor) -> Tensor:
    """Largest probability of each pixel, (B, h, w)."""
    return torch.softmax(logits, 1).amax(1)


@SCORES.register("sure_pixels", stateful=False, tasks=("segmentation",))
def sure_pixels(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Share of the pixels whose largest probability is at least 0.9."""
    return (_largest(logits) >= _SURE).float().flatten(1).mean(1), ()


@SCORES.register("low_pixels", stateful=False, tasks=("segmentation",))
def low_pixels(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Mean of the largest probability over the least sure tenth of the pixels."""
    sure = _largest(logits).flatten(1)
    return sure.topk(max(1, sure.shape[1] // 10), 1, largest=False).values.mean(1), ()


@SCORES.register("boundary", stateful=False, tasks=("segmentation",))
def boundary(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Mean of the largest probability over the pixels whose right or lower neighbour has another class; 1 for none."""
    sure, classes = _largest(logits), logits.argmax(1)
    right = F.pad((classes[:, :, :-1] != classes[:, :, 1:]).float(), (0, 1))
    below = F.pad((classes[:, :-1] != classes[:, 1:]).float(), (0, 0, 0, 1))
    edge = torch.maximum(right, below).flatten(1)
    count = edge.sum(1)
    return torch.where(count > 0, (edge * sure.flatten(1)).sum(1) / count.clamp_min(1), 1.0), ()
