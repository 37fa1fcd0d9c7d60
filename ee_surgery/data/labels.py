"""Labels: checked, mapped to the model's classes, and compared with the original's predictions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from scipy.special import bdtr, bdtrc
from torch import Tensor

from ee_surgery.backbone.base import Backbone
from ee_surgery.errors import ConfigError, DataError, SurgeryWarning
from ee_surgery.runtime.engine import Engine
from ee_surgery.task import CLASSIFICATION, IGNORED

ClassMap: TypeAlias = Sequence[int | str] | Mapping[int, int | str]
"""Label of the data -> class of the model: its number, its name or its WordNet id."""

_POOR = 0.2  # accuracy below which labels look foreign, given far more than five classes
_SURE = 0.002
_ENOUGH = 256  # labelled samples after which the next check is at the end of the data
_CLASSES = 3  # classes to see before any verdict: the data may be sorted by class
_MANY = 8  # classes: so many are not shifted by the same number by chance


def check_labels(labels: Tensor, num_classes: int, rows: int) -> Tensor:
    """Labels of one right class, see `Classification.check_target`."""
    return CLASSIFICATION.check_target(labels, num_classes, rows)


def hard(labels: Tensor) -> Tensor:
    """Checked labels as class numbers, int64 (B,): of probabilities the most probable class."""
    return CLASSIFICATION.hard(labels)


class Labels:
    """The labels of one data set, mapped to the classes of one model.

    Args:
        class_map: the model's class for each label of the data; by default the same number. If it is given, labels that
            do not match the original's predictions cause a warning, not an error, since the user has vouched for them.
    Raises:
        ConfigError: the map names an unknown or ambiguous class, or labels of the model's task are not class numbers.
    """

    def __init__(self, engine: Engine, class_map: ClassMap | None = None) -> None:
        self.backbone: Backbone = engine.backbone
        self.task = engine.backbone.task
        self.classes = self.task.classes(engine.backbone.num_classes)
        if class_map is not None and not self.task.class_numbers:
            raise ConfigError(f"class_map= maps class numbers, and labels of the task {self.task.name!r} are none.")
        self.table = None if class_map is None else class_numbers(class_map, self.backbone)
        # a new head knows what it has learned so far
        self.compares = engine.branches.head is None and self.task.class_numbers
        self.warned = False
        self.answers: list[Tensor] = []
        self.truth: list[Tensor] = []
        self.seen = 0

    def __call__(self, labels: Tensor, rows: int) -> Tensor:
        """Checked labels of a batch of `rows` samples, as the model's classes; see `Task.check_target`."""
        if self.table is None:
            return self.task.check_target(labels, self.classes, rows)
        labels = self.task.check_target(labels, len(self.table), rows)
        table = self.table.to(labels.device)
        if labels.ndim == 2:
            return labels.new_zeros(rows, self.classes).index_add_(1, table.clamp_min(0), labels)
        mapped = torch.where(labels == IGNORED, IGNORED, table[labels.clamp_min(0)])
        if bool((mapped == -1).any()):
            raise DataError(f"class_map= has no entry for label {int(labels[mapped == -1][0])}.")
        return mapped

    @property
    def curious(self) -> bool:
        """Whether more samples are needed to judge if the labels match the original's classes."""
        return self.compares and self.seen < _ENOUGH

    def compare(self, answers: Tensor, labels: Tensor) -> None:
        """Compare the original's predicted classes, (B,), with checked labels.

        Raises:
            DataError: the labels clearly are not the original's classes.
        """
        if not self.compares:
            return
        counts = ~self.task.ignored(labels)
        self.answers.append(answers[counts].cpu())
        self.truth.append(self.task.hard(labels)[counts].cpu())
        curious, self.seen = self.curious, self.seen + len(self.truth[-1])
        if curious and self.seen:
            self._look(_CLASSES)

    def settle(self) -> None:
        """Judge the labels at the end of the data.

        Raises:
            DataError: they clearly are not the original's classes.
        """
        if self.seen:
            self._look(1)
            warning = _warning(torch.cat(self.answers), torch.cat(self.truth))
            if warning and not self.warned:
                warnings.warn(f"{self.backbone.model_id} {warning}", SurgeryWarning, stacklevel=3)

    def _look(self, least: int) -> None:
        answers, truth = torch.cat(self.answers), torch.cat(self.truth)
        found = strangers(answers, truth, self.classes, least)
        if found is None or self.warned:
            return
        finding = f"{self.backbone.model_id} is right on {_percent(answers == truth)} of {len(truth)} samples: {found}"
        if self.table is not None:
            self.warned = True
            warnings.warn(f"{finding} Is class_map= right?", SurgeryWarning, stacklevel=4)
            return
        label = int(truth[answers != truth].mode().values)
        most = int(answers[truth == label].bincount().argmax())
        names = self.backbone.label_names
        raise DataError(
            f"{finding} It mostly predicts class {most}{f' ({names[most]})' if names else ''} for label {label}. "
            "Map labels to classes with class_map=, one class number, name or WordNet id per label (for folders with "
            'such names, class_map=data.classes). Or work without labels: TrainConfig(teach="original"), and '
            "ee.unlabelled(data) for calibrate and evaluate, which then measure agreement with the original. For new "
            "classes, use a base without a head, and num_classes=."
        )


def strangers(answers: Tensor, truth: Tensor, classes: int, least: int = 1) -> str | None:
    """The reason why these labels clearly are not the model's classes; None if that is not certain.

    Low accuracy alone is not enough, since the model may be untrained: the labels must also use far fewer numbers than
    the model has classes, or its predictions must follow them under other numbers. With three or more classes, the
    best one is left out: of ten folders numbered from 0, one may be the right class by chance.

    Args:
        answers, truth: class numbers of the same samples, int64 (N,).
        classes: C.
        least: how many classes must have been seen.
    """
    totals = truth.bincount(minlength=classes)
    seen = totals.nonzero().squeeze(1)
    if len(seen) < max(1, least):
        return None
    moved = _moved(answers, truth, seen)
    if moved is not None:
        return f"its predictions are mostly the label {moved:+d}, so labels are numbered differently."
    right = truth[answers == truth].bincount(minlength=classes)
    best = int(right.argmax()) if len(seen) >= _CLASSES and int(right.max()) else None
    hits, n = int(right.sum()), len(truth)
    if best is not None:
        hits, n = hits - int(right[best]), n - int(totals[best])
    if n < 1 or bdtr(hits, n, _POOR) >= _SURE:
        return None
    expected = classes * (1 - (1 - 1 / classes) ** len(truth))  # distinct classes among so many samples
    if len(seen) <= min(expected / 2, classes / 4):
        numbers = f"{int(seen[0])} to {int(seen[-1])}" if len(seen) > 1 else f"{int(seen[0])}"
        return f"the labels are {len(seen)} of its {classes} class numbers, {numbers}, but clearly not those classes."
    modes = [answers[truth == label].bincount(minlength=classes).max(0) for label in seen.tolist()]
    # with two or three classes, an untrained model may separate them and be wrong about all
    one_to_one = len({int(mode.indices) for mode in modes}) == len(seen) > _CLASSES
    if len(truth) >= 8 * len(seen) and one_to_one and sum(int(m.values) for m in modes) > 0.9 * len(truth):
        return "its predictions follow the labels, but under other numbers."
    return None


def _moved(answers: Tensor, truth: Tensor, seen: Tensor) -> int | None:
    """The shift between labels and predictions, if most labels in most classes are shifted by the same number."""
    if len(truth) < 28 or len(seen) < _MANY:
        return None
    by = int((answers - truth).mode().values)
    off = answers == truth + by
    if by == 0 or off.double().mean() <= 0.5:
        return None
    return by if len(truth[off].unique()) >= len(seen) / 2 else None


def _warning(answers: Tensor, truth: Tensor) -> str | None:
    """A warning if the original's predictions are unrelated to the labels."""
    size = int(max(answers.max(), truth.max())) + 1
    n = len(truth)
    chance = float((answers.bincount(minlength=size) / n) @ (truth.bincount(minlength=size) / n))
    right = int((answers == truth).sum())
    if n < 64 or len(truth.unique()) == 1 or (right and bdtrc(right - 1, n, min(chance, 1.0)) < 0.01):
        return None
    return (
        f"is right on {_percent(answers == truth)} of {n} samples, no better than chance. Is it trained, and are "
        "these the classes that it was trained on?"
    )


def _percent(right: Tensor) -> str:
    return f"{right.double().mean().item():.1%}"


# --- class maps


def class_numbers(class_map: ClassMap, backbone: Backbone) -> Tensor:
    """The model's class for every label of the data, int64; -1 for labels without an entry.

    Raises:
        ConfigError: an unknown class, or a name that several classes have.
    """
    if isinstance(class_map, str) or not isinstance(class_map, (Mapping, Sequence)) or not len(class_map):
        raise ConfigError(
            f"class_map must be a list with one class per label, or a dict {{label: class}}; got {class_map!r}."
        )
    given = dict(class_map) if isinstance(class_map, Mapping) else dict(enumerate(class_map))
    if not all(isinstance(label, int) and label >= 0 for label in given):
        raise ConfigError(f"The keys of class_map must be label numbers of the data; got {list(given)[:5]}.")
    names = _class_names(backbone) if any(isinstance(name, str) for name in given.values()) else {}
    table = torch.full((max(given) + 1,), -1)
    for label, name in given.items():
        table[label] = _class_number(name, names, backbone)
    return table


def _class_number(name: object, names: Mapping[str, list[int]], backbone: Backbone) -> int:
    if isinstance(name, int) and not isinstance(name, bool):
        if 0 <= name < backbone.num_classes:
            return name
        raise ConfigError(f"class_map: {backbone.model_id} has classes 0 to {backbone.num_classes - 1}; got {name}.")
    found = names.get(_plain(str(name)), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"class_map: {backbone.model_id} has several classes named {name!r}, {found}: give a number.")
    known = f"its names, such as {', '.join(list(names)[:3])}" if names else "nothing else: it has no class names"
    raise ConfigError(f"class_map: {backbone.model_id} has no class {name!r}. Give class numbers, or {known}.")


def _class_names(backbone: Backbone) -> dict[str, list[int]]:
    """All names of all classes, each synonym separately, and WordNet ids for ImageNet classes."""
    lists = [backbone.label_names or []]
    if backbone.library == "timm" or not lists[0] or _are_imagenets(lists[0], backbone.num_classes):
        lists += _imagenet_names(backbone.num_classes)
    found: dict[str, list[int]] = {}
    for names in lists:
        for number, name in enumerate(names):
            for each in {name, *name.split(", ")}:
                numbers = found.setdefault(_plain(each), [])
                if number not in numbers:
                    numbers.append(number)
    return found


def _are_imagenets(names: Sequence[str], classes: int) -> bool:
    """Whether a transformers model has ImageNet's class names, allowing for small differences."""
    known = _imagenet_names(classes)
    if not known:
        return False
    pairs = zip(names, known[1], strict=False)
    return sum(_plain(a.split(",")[0]) == _plain(b.split(",")[0]) for a, b in pairs) > 0.9 * classes


def _imagenet_names(classes: int) -> list[list[str]]:
    """WordNet ids and descriptions of the ImageNet variant with so many classes; empty if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset  # pyright: ignore[reportPrivateImportUsage]

    subset = infer_imagenet_subset({"num_classes": classes})
    if not subset:
        return []
    info = ImageNetInfo(subset)
    return [list(info.label_names()), list(info.label_descriptions())]


def _plain(name: str) -> str:
    """Lower case, with spaces in place of underscores and hyphens."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
