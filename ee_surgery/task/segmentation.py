"""One class per pixel: semantic segmentation.

A picture is the unit of everything else: it leaves whole, has one score and one outcome. Branches may answer on a
coarser grid than the original: scores read that grid, and only what leaves is enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.errors import CaptureError, DataError
from ee_surgery.task.base import IGNORED, TASKS, Task, one_a_sample
from ee_surgery.task.classification import PROBABILITIES, are_probabilities

VOID = 255
"""What label maps hold where a pixel has no class, beside `IGNORED`."""
_LOWEST = 20  # a weakest part: one pixel in so many


def _counts(tallies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tallies (N, 3 C): pixels found, predicted and labelled of each class in all pictures, each (C,)."""
    found, predicted, labelled = tallies.double().sum(0).chunk(3)
    return found, predicted, labelled


def mean_iou(tallies: Tensor) -> float:
    """Mean over the classes that occur of found / (predicted + labelled - found), over all pixels of all pictures."""
    found, predicted, labelled = _counts(tallies)
    occurs = labelled > 0
    return (found / (predicted + labelled - found).clamp_min(1))[occurs].mean().item()


def class_accuracy(tallies: Tensor) -> float:
    """Mean over the classes that occur of the share of their pixels that is found."""
    found, _, labelled = _counts(tallies)
    occurs = labelled > 0
    return (found[occurs] / labelled[occurs]).mean().item()


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) in another size, bilinearly, as transformers resizes logits; one of this size unchanged."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, (int(size[0]), int(size[1])), mode="bilinear", align_corners=False)


@TASKS.register("segmentation")
class Segmentation(Task):
    """One right class of C for each pixel: softmax, cross-entropy. Labels are maps of class numbers (B, H, W).

    The outcome of a picture is the share of its labelled pixels that are right. Logits of another size than the labels
    are resized bilinearly. Pixels labelled -100 or 255 count nowhere, nor do pictures of such pixels alone.
    """

    measure = "pixel accuracy"
    least = 2
    rank = 4
    keeps_logits = False
    decided = "output.logits.argmax(1)"
    hub_tags = {"image": "image-segmentation"}  # noqa: RUF012
    measures = {"mean_iou": mean_iou, "class_accuracy": class_accuracy}  # noqa: RUF012

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(B, pixels, C)."""
        return F.log_softmax(logits, 1).flatten(2).mT

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, pixels, C)."""
        return torch.softmax(logits, 1).flatten(2).mT

    def certainty(self, logits: Tensor) -> Tensor:
        """Mean over the pixels of the largest probability, (B,)."""
        return torch.softmax(logits, 1).amax(1).flatten(1).mean(1)

    def weakest(self, choices: Tensor) -> Tensor:
        """The value below which one pixel in twenty is: the very least sure one is on an edge in every picture."""
        lowest = max(1, choices.shape[1] // _LOWEST)
        return choices.topk(lowest, 1, largest=False).values.amax(1)

    def labels_from(self, logits: Tensor) -> Tensor:
        """The class with the largest logit, int64 (B, h, w)."""
        return logits.argmax(1)

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether two maps are the same in every pixel, bool (B,)."""
        if a.shape != b.shape:  # of two grids
            b = F.interpolate(b[:, None].float(), tuple(a.shape[1:]), mode="nearest")[:, 0].to(a.dtype)
        return super().same(a, b)

    def disagreement(self, a: Tensor, b: Tensor) -> Tensor:
        """The share of pixels in which two answers differ, (B,)."""
        return (self.labels_from(a) != self.labels_from(resized(b, a.shape[-2:]))).float().flatten(1).mean(1)

    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """The share of labelled pixels that are right, (B,)."""
        counts = ~self._void(target)
        right = self.labels_from(resized(logits, target.shape[-2:])) == target.to(logits.device)
        return (right & counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)

    def tally(self, logits: Tensor, target: Tensor) -> Tensor:
        """Pixels found, predicted and labelled of each class, (B, 3 C), int64."""
        classes, target = logits.shape[1], target.to(logits.device)
        predicted, counts = self.labels_from(resized(logits, target.shape[-2:])), ~self._void(target)
        rows = torch.arange(len(target), device=target.device).view(-1, 1, 1) * classes

        def number(maps: Tensor, where: Tensor) -> Tensor:
            return torch.bincount((rows + maps)[where], minlength=len(maps) * classes).view(len(maps), classes)

        right = counts & (predicted == target)
        return torch.cat([number(target, right), number(predicted, counts), number(target, counts)], 1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, mean over the labelled pixels of each picture, (B,)."""
        counts = (~self._void(target)).flatten(1).sum(1).clamp_min(1)
        found = F.cross_entropy(resized(logits, target.shape[-2:]), target, ignore_index=IGNORED, reduction="none")
        return found.flatten(1).sum(1) / counts

    def divergence(self, logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """KL divergence from a teacher's map, averaged to the size of this one, mean over the pixels, (B,)."""
        if teacher.shape != logits.shape:
            teacher = F.adaptive_avg_pool2d(teacher, (int(logits.shape[2]), int(logits.shape[3])))
        own, wanted = (F.log_softmax(each / temperature, 1) for each in (logits, teacher))
        return F.kl_div(own, wanted, log_target=True, reduction="none").sum(1).flatten(1).mean(1)

    def enlarge(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """A map in the size of the original's, bilinearly."""
        return resized(logits, shape[-2:])

    def ignored(self, target: Tensor) -> Tensor:
        """Pictures without a labelled pixel."""
        return self._void(target).flatten(1).all(1)

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Label maps as class numbers, int64 (B, H, W); -100 where a pixel is ignored.

        Args:
            target: integers of any width, (B, H, W) or (B, 1, H, W); 255, where that is no class, and -100 are ignored.
            classes: C.
            rows: B.
        Raises:
            DataError: they are no such maps; what was seen is named.
        """
        one_a_sample(target, rows)
        if target.ndim == 4 and target.shape[1] == 1:
            target = target.squeeze(1)
        wanted = f"Label maps must be class numbers below {classes} of shape ({rows}, H, W); got "
        if target.ndim != 3:
            raise DataError(f"{wanted}a tensor of shape {tuple(target.shape)}. One-hot maps: labels.argmax(1).")
        if target.is_floating_point() or target.is_complex():
            raise DataError(f"{wanted}{target.dtype}. Where these are class numbers, give labels.long().")
        target = target.long()
        if classes <= VOID:
            target = target.masked_fill(target == VOID, IGNORED)
        wrong = (target != IGNORED) & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            seen = target[wrong].unique()[:5].tolist()
            raise DataError(f"{wanted}{seen}. Pixels without a class are {IGNORED} or {VOID}.")
        return target

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Logits over two classes or more, one map per picture."""
        if logits.ndim != 4 or logits.shape[0] != rows or not logits.is_floating_point():
            raise CaptureError(
                f"{model_id} answers with a tensor of shape {tuple(logits.shape)} and type {logits.dtype}, not logits "
                f"of shape ({rows}, classes, height, width)."
            )
        if logits.shape[1] < self.least:
            raise CaptureError(
                f"{model_id} answers with one number per pixel, {tuple(logits.shape)}: a mask of a sigmoid, or a "
                "depth. Of a mask, wrap the model in a module that answers with two classes, "
                "torch.cat([torch.zeros_like(z), z], 1), whose softmax is the sigmoid of z."
            )
        if are_probabilities(logits):
            raise CaptureError(
                f"{model_id} answers with probabilities (they sum to 1 over the classes), not logits: {PROBABILITIES}"
            )

    def blank(self, rows: int, classes: int) -> Tensor:
        """Zeros, (rows, classes, 4, 4)."""
        return torch.zeros(rows, classes, 4, 4)

    def _void(self, target: Tensor) -> Tensor:
        return target == IGNORED


@TASKS.register("segmentation_iou")
class SegmentationIoU(Segmentation):
    """The same, with the mean over the classes present of intersection over union as a picture's outcome.

    Present is what the labels of the picture show. It weighs a small object as much as the road.
    """

    measure = "IoU per picture"

    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the classes that the labels show of intersection over union, (B,)."""
        found, predicted, labelled = self.tally(logits, target).double().chunk(3, 1)
        there = labelled > 0
        iou = (found / (predicted + labelled - found).clamp_min(1)).where(there, 0)
        return (iou.sum(1) / there.sum(1).clamp_min(1)).float()


SEGMENTATION = TASKS["segmentation"]
