"""One right class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.errors import CaptureError, DataError
from ee_surgery.task.base import IGNORED, TASKS, Task, check_vectors, one_a_sample

PROBABILITIES = (
    "losses and scores would take the softmax of a softmax. Leave the softmax out, or wrap the model in a module that "
    "answers with the logarithm of its probabilities."
)


@TASKS.register("classification")
class Classification(Task):
    """One right class of C: softmax, cross-entropy, accuracy. Labels are class numbers (B,) or probabilities (B, C)."""

    whole = True
    class_numbers = True
    least = 2
    decided = "output.logits.argmax(-1)"
    problem_types = ("single_label_classification",)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(B, C)."""
        return F.log_softmax(logits, -1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C)."""
        return torch.softmax(logits, -1)

    def certainty(self, logits: Tensor) -> Tensor:
        """The largest probability, (B,)."""
        return torch.softmax(logits, -1).amax(-1)  # asked at every exit: two calls less

    def labels_from(self, logits: Tensor) -> Tensor:
        """The class with the largest logit, int64 (B,)."""
        return logits.argmax(-1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, (B,)."""
        return F.cross_entropy(logits, target, reduction="none")

    def mean_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar."""
        return F.cross_entropy(logits, target)

    def hard(self, target: Tensor) -> Tensor:
        """Class numbers, int64 (B,)."""
        return target if target.ndim == 1 else target.argmax(1).masked_fill(self.ignored(target), IGNORED)

    def ignored(self, target: Tensor) -> Tensor:
        """Those labelled -100, and rows of zeros."""
        return target == IGNORED if target.ndim == 1 else target.sum(1) == 0

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels as class numbers, int64 (B,), or as class probabilities, floating (B, C).

        Args:
            target: integers of any width, (B,) or (B, 1); one-hot integers or probabilities (B, C). A sample labelled
                -100, or with a row of zeros, is ignored.
            classes: C.
            rows: B.
        Raises:
            DataError: they are neither; what was seen is named.
        """
        one_a_sample(target, rows)
        if target.ndim == 2 and target.shape[1] == classes > 1 and not target.is_complex():
            return _distributions(target)
        if target.ndim == 2 and target.shape[1] == 1:
            target = target.squeeze(1)  # (B, 1) beside (B,) answers would compare every sample with every other
        wanted = f"Labels must be class numbers below {classes} (or probabilities of shape (B, C)); got "
        if target.ndim != 1:
            raise DataError(f"{wanted}a tensor of shape {tuple(target.shape)}.")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            seen = f", {target[:3].tolist()} ..." if len(target) else ""
            raise DataError(f"{wanted}{target.dtype}{seen}. Where these are class numbers, give labels.long().")
        target = target.long()
        counted = target[target != IGNORED]
        if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            low, high = int(counted.min()), int(counted.max())
            raise DataError(f"{wanted}{low} to {high}. {_advice(low, high, classes)}")
        return target

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Logits of a softmax over two classes or more."""
        if logits.shape in ((rows, 1), (rows,)) and logits.is_floating_point():
            raise CaptureError(
                f"{model_id} answers with one number per sample, {tuple(logits.shape)}: a binary head (sigmoid) or a "
                "regression, not a softmax over classes. If a sigmoid makes a probability of it, say "
                'task="multi_label" (the answer must be of shape (B, 1)), or wrap the model in a module that answers '
                "with two classes, [0, z], whose softmax is the sigmoid of z: torch.stack([torch.zeros_like(z), z], 1) "
                "for z (B,). Of a regression, say how large an error still counts as right: "
                "task=ee.Regression(tolerance=)."
            )
        check_vectors(logits, rows, model_id)
        if are_probabilities(logits):
            raise CaptureError(
                f"{model_id} answers with probabilities (they sum to 1 over the classes), not logits: {PROBABILITIES}"
            )


CLASSIFICATION = TASKS["classification"]


def are_probabilities(logits: Tensor) -> bool:
    """Whether numbers (B, C, ...) sum to 1 over the classes."""
    if logits.is_meta:
        return False
    numbers = logits.detach().double()
    near = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(((numbers >= 0) & (numbers <= 1)).all() and ((numbers.sum(1) - 1).abs() <= near).all())


def _distributions(labels: Tensor) -> Tensor:
    """Rows (B, C) as probabilities, or as class numbers where they are integers."""
    total = labels.double().sum(1)
    whole = not labels.is_floating_point()
    one = (total - 1).abs() <= (0 if whole else 1e-2)
    good = torch.isfinite(total) & (one | (total == 0)) & (labels >= 0).all(1)
    if not bool(good.all()):
        row = labels[int((~good).nonzero()[0])]
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} must be one-hot or probabilities, each row summing to 1; a row is "
            f"{row[:5].tolist()} ... with sum {row.sum().item():g}. Several classes for one sample are labels of a "
            'model with task="multi_label".'
        )
    return torch.where(total == 0, IGNORED, labels.long().argmax(1)) if whole else labels.float()


def _advice(low: int, high: int, classes: int) -> str:
    if low == 1 and high == classes:
        return "Numbered from 1? The first class is 0: give labels - 1."
    if low < 0:
        return f"Label samples without a class {IGNORED}: they are ignored."
    return "If these are not the model's classes, map them with class_map=."
