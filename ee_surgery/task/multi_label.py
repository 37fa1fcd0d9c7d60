"""Several labels, each present or not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.errors import DataError
from ee_surgery.task.base import IGNORED, TASKS, Task, check_vectors, one_a_sample


def mean_average_precision(tallies: Tensor) -> float:
    """Mean over the labels that occur of the average precision of ranking the samples by each; NaN where none occurs.

    Args:
        tallies: logits, and labels of 0 or 1 behind them, (N, 2 C).
    """
    logits, target = tallies.chunk(2, 1)
    order = logits.argsort(dim=0, descending=True, stable=True)
    ranked, there = logits.gather(0, order), (target > 0.5).double().gather(0, order)
    found = there.cumsum(0)
    precision = found / torch.arange(1, len(logits) + 1, dtype=torch.float64, device=logits.device)[:, None]
    # samples of equal logits have one rank, the last of theirs: their order in the data means nothing
    ends = torch.ones_like(ranked, dtype=torch.bool)
    ends[:-1] = ranked[1:] != ranked[:-1]
    later = torch.where(ends, torch.arange(len(logits), device=logits.device)[:, None], len(logits) - 1)
    precision = precision.gather(0, later.flip(0).cummin(0).values.flip(0))
    occurs = found[-1] > 0
    return ((precision * there).sum(0)[occurs] / found[-1][occurs]).mean().item()


@TASKS.register("multi_label")
class MultiLabel(Task):
    """C labels, each present or not on its own: sigmoid, binary cross-entropy. Labels are multi-hot, (B, C).

    An outcome is the share of the C labels that are decided, at a probability of 0.5, as the sample's labels say.
    """

    measure = "label accuracy"
    decided = "output.logits > 0"
    measures = {"mean_average_precision": mean_average_precision}  # noqa: RUF012
    problem_types = ("multi_label_classification",)
    states = "multi_label_classification"

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of being absent and present, (B, C, 2)."""
        return F.logsigmoid(torch.stack([-logits, logits], -1))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of being absent and present, (B, C, 2)."""
        return torch.sigmoid(torch.stack([-logits, logits], -1))

    def labels_from(self, logits: Tensor) -> Tensor:
        """1 for labels of a probability above 0.5, else 0, floating (B, C)."""
        return (logits > 0).float()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy, mean over the labels, (B,)."""
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean(1)

    def tally(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits, and the labels behind them, (B, 2 C)."""
        return torch.cat([logits.double(), target.to(logits.device).double()], 1)

    def hard(self, target: Tensor) -> Tensor:
        """0, 1, or -100 for ignored samples, floating (B, C)."""
        return torch.where(target == IGNORED, target, (target > 0.5).to(target.dtype))

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels as floating (B, C): 1 where present, 0 where not, or a probability; rows of -100 are ignored.

        Args:
            target: booleans, integers or floating point numbers, (B, C).
            classes: C.
            rows: B.
        Raises:
            DataError: another shape, or other numbers.
        """
        one_a_sample(target, rows)
        wanted = f"Labels of a multi-label model are multi-hot, of shape (B, {classes}), from 0 (absent) to 1 (present)"
        if target.ndim != 2 or target.shape[1] != classes or target.is_complex():
            raise DataError(f"{wanted}; got {target.dtype} of shape {tuple(target.shape)}.")
        target = target if target.is_floating_point() else target.float()
        target = target if target.dtype in (torch.float32, torch.float64) else target.float()
        good = ((target >= 0) & (target <= 1)).all(1) | self.ignored(target)
        if not bool(good.all()):
            row = target[int((~good).nonzero()[0])]
            raise DataError(f"{wanted}; a row is {row[:5].tolist()} ... A row of {IGNORED} alone is ignored.")
        return target

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """One logit a label, of any number."""
        check_vectors(logits, rows, model_id)
