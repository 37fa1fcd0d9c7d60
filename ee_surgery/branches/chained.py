"""Branches that also read the log-probabilities of earlier branches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ee_surgery.branches.base import (
    BRANCHES,
    Branch,
    ExitLogits,
    append_log_probs,
    channels,
    grid,
    mixed_pool,
    summary,
    to_nchw,
)
from ee_surgery.checks import flag
from ee_surgery.graph.exit_points import ExitPoint
from ee_surgery.task import TaskNames


class Ensemble(nn.Module):
    """A weighted geometric mean of the predictions of several heads, with one bias per class.

    softmax(mean_j(exp(w_j) * log p_j) + b), returned as logits.

    Args:
        heads: number of heads.
    Source: Zero Time Waste (Wolczyk et al., NeurIPS 2021), section on ensembling; `w` starts near 0 and `b` at 0.
    """

    def __init__(self, heads: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(heads))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, log_p: Tensor) -> Tensor:
        """log p of the heads (B, heads, C) -> logits (B, C)."""
        return (self.weight.exp()[:, None] * log_p).mean(1) + self.bias


@BRANCHES.register("ztw")
class ZtwBranch(Branch):
    """3x3 conv -> ReLU -> mixed pooling to 4 x 4 cells, concatenated with the previous head -> linear -> ensemble.

    The previous head's log-probabilities are detached and layer-normed. In training mode a head returns its own logits;
    in eval mode the geometric ensemble of all heads so far, whose weights `train` fits on recorded logits after the
    heads are trained. On tokens, the class token and the mean are read, without a convolution.

    Args:
        before: number of heads before this one.
        ensemble: False for the cascade without ensembles.
    Source: Zero Time Waste (Wolczyk et al., NeurIPS 2021), with as many channels as the features have.
    """

    any_layout: ClassVar[bool] = True
    chained: ClassVar[bool] = True
    tasks: ClassVar[TaskNames] = ("classification",)  # it averages log-probabilities of classes

    def __init__(
        self, point: ExitPoint, num_classes: int, confidence: bool = False, ensemble: bool = True, before: int = 0
    ) -> None:
        c, size = channels(point), None if point.layout == "tokens" else grid(point)
        cells = 0 if size is None else min(4, *size)
        width = c * cells**2 if cells else c * (2 if point.prefix_tokens else 1)
        super().__init__(point, num_classes, confidence, width + (num_classes if before else 0))
        self.cells = cells
        self.before, self.num_classes = before, num_classes
        self.conv = nn.Conv2d(c, c, 3, padding=1) if self.cells else None
        self.share = nn.Parameter(torch.rand(())) if self.cells else None
        self.norm = nn.LayerNorm(num_classes) if before else None
        self.ensemble = Ensemble(before + 1, num_classes) if flag("ensemble", ensemble) else None

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) -> the part of the vector that comes from the features."""
        if self.conv is not None and self.share is not None:
            maps = F.relu(self.conv(to_nchw(features, self.layout, self.prefix_tokens)))
            return mixed_pool(maps, self.cells, self.share)
        return summary(features, self.layout, self.prefix_tokens, mask)

    def forward(self, features: Tensor, mask: Tensor | None = None, previous: Tensor | None = None) -> ExitLogits:
        """Features, and log p of earlier heads (B, before, C) -> logits, and log p of all heads so far."""
        vector = self.vector(self.in_own_type(features), mask)
        if self.norm is not None:
            if previous is None:  # when MACs are counted: only shapes matter
                previous = vector.new_zeros((len(vector), self.before, self.num_classes))
            # log p differs from the logits by a constant per sample, which the norm removes
            vector = torch.cat([vector, self.norm(previous[:, -1].detach())], 1)
        answer = self.answer(vector)
        log_probs = append_log_probs(answer.logits, previous)
        if self.ensemble is None or self.training:
            return answer._replace(log_probs=log_probs)
        return ExitLogits(self.ensemble(log_probs), answer.confidence, log_probs)
