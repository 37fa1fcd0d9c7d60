"""Embeddings: vectors whose direction matters, alone or beside those of a gallery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.checks import number, positive, refuse
from ee_surgery.errors import CaptureError, ConfigError, DataError
from ee_surgery.task.base import TASKS, Task, check_vectors, one_a_sample
from ee_surgery.task.classification import CLASSIFICATION
from ee_surgery.task.regression import Numbers

_LARGEST = 1 << 26  # numbers in the table of entries and classes
_LENGTH = 0.1  # weight of the length in the loss, beside the direction


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angles between rows, (B,)."""
    return F.cosine_similarity(a.float(), b.to(a.device).float(), dim=1)


def distance(own: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine, and a little for another length, (B,)."""
    own, wanted = own.float(), wanted.to(own.device).float()
    ratio = own.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-6)
    return 1 - cosine(own, wanted) + _LENGTH * (ratio - 1).clamp(-1, 1).square()


@TASKS.register("embedding")
@dataclass(frozen=True, eq=False, repr=False)
class Embedding(Numbers):
    """A vector for each sample: features of timm (`num_classes=0`), CLIP, DINOv2, sentence encoders.

    The outcome is 1 where its cosine to the label is at least `floor`. Labels are embeddings (B, D); the original's own
    where there are none.
    """

    measure = "share above the cosine floor"
    measures = {"mean_cosine": lambda tallies: tallies.double().mean().item()}  # noqa: RUF012
    whole = True
    of_features = True
    hub_tags = {"image": "image-feature-extraction", "text": "feature-extraction"}  # noqa: RUF012
    decided = "output.logits.shape"

    floor: float = 0.9
    """Above 0, at most 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", number("floor", self.floor, above=0, high=1))

    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """1 where the cosine reaches the floor, else 0, (B,)."""
        return (cosine(logits, target) >= self.floor - 1e-6).float()

    def tally(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cosine, (B, 1)."""
        return cosine(logits, target)[:, None]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """1 - cosine, and a little for another length, (B,)."""
        return distance(logits, target)

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Embeddings as float32 (B, D); rows of -100 are ignored.

        Raises:
            DataError: another shape, or numbers that are not finite.
        """
        one_a_sample(target, rows)
        wanted = f"Labels of an embedding are embeddings of shape ({rows}, {classes})"
        if target.ndim != 2 or target.shape[1] != classes or not target.is_floating_point():
            raise DataError(
                f"{wanted}; got {target.dtype} of shape {tuple(target.shape)}. With class numbers of a gallery: "
                "task=ee.Gallery(embeddings, labels). Without labels: ee.unlabelled(data)."
            )
        if not bool(target.isfinite().all()):
            raise DataError(f"{wanted}; some numbers are not finite.")
        return target.float()

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """One vector per sample."""
        _check_embeddings(logits, rows, model_id)


@TASKS.register("gallery")
@dataclass(frozen=True, eq=False, repr=False)
class Gallery(Task):
    """An embedding that is looked up in a gallery: retrieval, or zero-shot classes by their text embeddings.

    The answer of a sample is the entry with the largest cosine, or that entry's class. Labels are the numbers of
    entries, or of classes where the gallery has some; the original's answers where there are none. The softmax over
    `scale` times the cosines says how sure it is.
    """

    measure = "recall@1"
    scaled = True
    whole = True
    of_features = True
    hub_tags = {"image": "image-feature-extraction", "text": "feature-extraction"}  # noqa: RUF012
    decided = "output.logits.shape"

    embeddings: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(G, D), of any length."""
    labels: Tensor | None = None
    """Class number of each entry, (G,)."""
    scale: float = 100.0
    """CLIP's `logit_scale.exp()`."""

    _unit: ClassVar[Tensor]  # of length 1; set for each, as is the next
    _table: ClassVar[Tensor]  # which entry is of which class, (G, classes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", positive("scale", self.scale))
        given = self.embeddings
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point():
            refuse("embeddings", "floating point numbers of shape (entries, D)", given)
        object.__setattr__(self, "embeddings", given.detach().float())
        object.__setattr__(self, "_unit", F.normalize(self.embeddings, dim=1))
        if self.labels is None:
            return
        if not isinstance(self.labels, Tensor) or self.labels.shape != given.shape[:1]:
            refuse("labels", f"whole numbers of shape ({len(given)},), one for each entry", self.labels)
        labels = self.labels.detach().long()
        if len(labels) and int(labels.min()) < 0:
            refuse("labels", "class numbers from 0", self.labels)
        if len(labels) and len(labels) * (int(labels.max()) + 1) > _LARGEST:
            refuse("labels", f"class numbers of which entries x classes is at most {_LARGEST:,}", self.labels)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "_table", F.one_hot(labels).float())

    def options(self) -> dict[str, Any]:
        """Labels as floating point numbers, which adapters store."""
        return {**super().options(), "labels": None if self.labels is None else self.labels.float()}

    def classes(self, width: int) -> int:
        """Entries, or classes of entries."""
        return len(self.embeddings) if self.labels is None else int(self.labels.max()) + 1

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of entries, (B, G), or of their classes."""
        return self._of_classes(torch.softmax(self._similar(logits), 1)).clamp_min(1e-30).log()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of entries, (B, G), or of their classes."""
        return self._of_classes(torch.softmax(self._similar(logits), 1))

    def labels_from(self, logits: Tensor) -> Tensor:
        """The nearest entry, or its class, int64 (B,)."""
        nearest = self._similar(logits).argmax(1)
        return nearest if self.labels is None else self.labels.to(nearest.device)[nearest]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, (B,)."""
        log_p = self.log_probabilities(logits)
        return F.nll_loss(log_p, target, reduction="none") if target.ndim == 1 else -(target * log_p).sum(1)

    def divergence(self, logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """KL divergence over the gallery, softened, and the distance of the embeddings, (B,)."""
        soft = super().divergence(logits, teacher, temperature)
        return soft + distance(logits, teacher) / temperature**2  # `kd` multiplies by its square

    def hard(self, target: Tensor) -> Tensor:
        """Class numbers, int64 (B,)."""
        return CLASSIFICATION.hard(target)

    def ignored(self, target: Tensor) -> Tensor:
        """Those labelled -100, and rows of zeros."""
        return CLASSIFICATION.ignored(target)

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Numbers of entries or classes, as those of classes of a `Classification`.

        Args:
            classes: see `classes`.
        """
        return CLASSIFICATION.check_target(target, classes, rows)

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Vectors as wide as those of the gallery."""
        if len(self.embeddings) < 2:
            raise ConfigError(
                f"A gallery has two entries or more, and this one {len(self.embeddings)}: task=ee.Gallery(embeddings)."
            )
        _check_embeddings(logits, rows, model_id)
        if logits.shape[1] != self.embeddings.shape[1]:
            raise CaptureError(
                f"{model_id} answers with embeddings of {logits.shape[1]} numbers, and those of the gallery have "
                f"{self.embeddings.shape[1]}."
            )

    def _similar(self, logits: Tensor) -> Tensor:
        """Scaled cosines to the entries, (B, G)."""
        own = F.normalize(logits, dim=1)
        return self.scale * own @ self._unit.to(own).T

    def _of_classes(self, of_entries: Tensor) -> Tensor:
        """Probabilities of entries summed over those of a class."""
        if self.labels is None:
            return of_entries
        return of_entries @ self._table.to(of_entries)


def _check_embeddings(logits: Tensor, rows: int, model_id: str) -> None:
    if logits.ndim > 2:
        raise CaptureError(
            f"{model_id} answers with a tensor of shape {tuple(logits.shape)}, one vector for each place, not one for "
            f"each sample, ({rows}, D): say where that is (output=), or wrap the model in a module that pools them."
        )
    check_vectors(logits, rows, model_id)
