"""Numbers in place of classes: one or several for each sample, or a map of them, such as depths."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.checks import flag, number
from ee_surgery.errors import CaptureError, ConfigError, DataError
from ee_surgery.task.base import IGNORED, TASKS, Task, check_vectors, one_a_sample
from ee_surgery.task.segmentation import resized


class Numbers(Task):
    """Answers that are no choices: no probability says how sure they are."""

    chooses = False
    scaled = True

    @abstractmethod
    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """What each answer is worth, (B,) in [0, 1]."""

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """There are none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"Answers of the task {self.name!r} are numbers, and have no probabilities.")

    def labels_from(self, logits: Tensor) -> Tensor:
        """The numbers themselves."""
        return logits.detach()

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether the second is wholly right by the first, bool (B,)."""
        return self.outcome(b, a) == 1

    def divergence(self, logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The loss, with the teacher's answer as the target: numbers have no temperature."""
        return self.loss(logits, teacher) / temperature**2  # undoes the factor that `kd` has for softened classes


def mean_absolute_error(tallies: Tensor) -> float:
    """Mean absolute error over all labelled values.

    Args:
        tallies: its sum, and how many values, (N, 2).
    """
    total, values = tallies.double().sum(0)
    return (total / values.clamp_min(1)).item()


@TASKS.register("regression")
@dataclass(frozen=True, eq=False, repr=False)
class Regression(Numbers):
    """C numbers, each right where it is near enough. Labels are floating (B, C); NaN where a value counts nowhere.

    The outcome of a sample is the share of its values with an error of at most `tolerance`. A model that answers with
    maps, such as depths, gets `MapRegression` with the same options.
    """

    measure = "accuracy within tolerance"
    measures = {"mean_absolute_error": mean_absolute_error}  # noqa: RUF012
    ranks = (2, 3, 4)
    hub_tags = {"text": "text-classification"}  # noqa: RUF012

    tolerance: float = 0.0
    """In units of the answer, above 0."""
    relative: bool = False
    """Whether it is a fraction of the labelled value instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", number("tolerance", self.tolerance, low=0))
        flag("relative", self.relative)

    def of(self, logits: Tensor) -> Task:
        """Itself for vectors, `MapRegression` for maps."""
        return MapRegression(self.tolerance, self.relative) if logits.ndim > 2 else self

    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """The share of labelled values within the tolerance, (B,)."""
        error, counts = self._errors(logits, target)
        near = error <= self._near(target, error)
        return (near & counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)

    def tally(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum of absolute errors, and how many there are, (B, 2)."""
        error, counts = self._errors(logits, target)
        return torch.stack([error.double().flatten(1).sum(1), counts.flatten(1).sum(1).double()], 1)

    def error(self, answer: Tensor, target: Tensor) -> Tensor:
        """How far each value is from its label, at least 0; override it for angles, say."""
        return (answer - target).abs()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 in units of the tolerance, mean over the labelled values, (B,)."""
        error, counts = self._errors(logits, target)
        scaled = error / self._near(target, error, least=1e-3)
        found = F.smooth_l1_loss(scaled, torch.zeros_like(scaled), reduction="none")
        return found.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)

    def ignored(self, target: Tensor) -> Tensor:
        """Samples without a labelled value."""
        return target.isnan().flatten(1).all(1)

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels as floating (B, C).

        Args:
            target: numbers (B, C), or (B,) for one each; NaN, or a row of -100, is ignored.
            classes: C.
            rows: B.
        Raises:
            DataError: another shape, or numbers that are infinite.
        """
        one_a_sample(target, rows)
        target = target[:, None] if target.ndim == 1 and classes == 1 else target
        wanted = f"Labels of a regression are numbers of shape ({rows}, {classes})"
        if target.ndim != 2 or target.shape[1] != classes or target.is_complex():
            raise DataError(f"{wanted}; got {target.dtype} of shape {tuple(target.shape)}.")
        return _numbers(target, wanted)

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Numbers of any count."""
        self._check_tolerance()
        if logits.shape == (rows,):
            raise CaptureError(
                f"{model_id} answers with one number per sample, {tuple(logits.shape)}: wrap it in a module that "
                "answers with shape (B, 1)."
            )
        check_vectors(logits, rows, model_id)

    def _check_tolerance(self) -> None:
        if not self.tolerance:
            raise ConfigError(
                "A regression needs the error that still counts as right: task=ee.Regression(tolerance=)."
            )

    def _errors(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Errors, 0 where nothing is labelled, and where something is."""
        target = _placed(target, logits)
        counts, known = ~target.isnan(), target.nan_to_num()
        return self.error(self._fitted(logits, known), known).where(counts, 0), counts

    def _near(self, target: Tensor, like: Tensor, least: float = 0.0) -> Tensor | float:
        """The largest error that counts as right, of each value; labels below `least` count as that."""
        if not self.relative:
            return self.tolerance
        return self.tolerance * _placed(target, like).nan_to_num().abs().clamp_min(least)

    def _fitted(self, logits: Tensor, target: Tensor) -> Tensor:
        """The answer in the size of the labels."""
        return logits.float()


@TASKS.register("map_regression")
@dataclass(frozen=True, eq=False, repr=False)
class MapRegression(Regression):
    """A map of numbers: depth, flow, heat. Labels are floating (B, H, W), or (B, C, H, W); NaN counts nowhere.

    Branches answer on a coarser grid; what leaves is resized bilinearly.
    """

    rank = 4
    ranks = (3, 4)
    keeps_logits = False
    hub_tags = {"image": "depth-estimation"}  # noqa: RUF012
    decided = "output.logits.shape"

    def width(self, logits: Tensor) -> int:
        """1 for maps (B, h, w)."""
        return 1 if logits.ndim == 3 else int(logits.shape[1])

    def values(self, answers: Tensor) -> Tensor:
        """Of all pixels, (N, C)."""
        return super().values(answers[:, None] if answers.ndim == 3 else answers)

    def enlarge(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """A map in the form of the original's: (H, W) or (C, H, W) for one sample."""
        if tuple(logits.shape[1:]) == tuple(shape):
            return logits
        found = resized(logits, shape[-2:])
        return found if len(shape) == 3 else found[:, 0]

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Label maps, floating (B, C, H, W), or (B, H, W) where C is 1.

        Args:
            target: numbers, (B, H, W) or (B, C, H, W); NaN where a pixel counts nowhere.
            classes: C.
            rows: B.
        Raises:
            DataError: another shape, or numbers that are infinite.
        """
        one_a_sample(target, rows)
        wanted = f"Label maps are numbers of shape ({rows}, {classes}, H, W){' or (B, H, W)' if classes == 1 else ''}"
        whole = target.ndim == 4 and target.shape[1] == classes
        if not (whole or (target.ndim == 3 and classes == 1)) or target.is_complex():
            raise DataError(f"{wanted}; got {target.dtype} of shape {tuple(target.shape)}.")
        return _numbers(target, wanted)

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """One map per sample."""
        self._check_tolerance()
        if logits.ndim not in self.ranks or logits.shape[0] != rows or not logits.is_floating_point():
            raise CaptureError(
                f"{model_id} answers with a tensor of shape {tuple(logits.shape)} and type {logits.dtype}, not maps of "
                f"shape ({rows}, height, width) or ({rows}, C, height, width)."
            )

    def disagreement(self, a: Tensor, b: Tensor) -> Tensor:
        """The share of places where the first answer is not near the second, (B,)."""
        return 1 - self.outcome(a, self.labels_from(b))

    def blank(self, rows: int, classes: int) -> Tensor:
        """Zeros, (rows, classes, 4, 4)."""
        return torch.zeros(rows, classes, 4, 4)

    def _fitted(self, logits: Tensor, target: Tensor) -> Tensor:
        maps = logits[:, None] if logits.ndim == 3 else logits
        found = resized(maps.float(), target.shape[-2:])
        return found[:, 0] if target.ndim == 3 else found


def _placed(target: Tensor, like: Tensor) -> Tensor:
    return target.to(like.device, torch.float32)


def _numbers(target: Tensor, wanted: str) -> Tensor:
    """Labels as float32 with NaN where they count nowhere."""
    target = target.float()
    if bool(target.isinf().any()):
        raise DataError(f"{wanted}; some are infinite. Values that count nowhere are NaN.")
    whole = (target == IGNORED).flatten(1).all(1)
    return target.masked_fill(whole.view(-1, *[1] * (target.ndim - 1)), torch.nan)
