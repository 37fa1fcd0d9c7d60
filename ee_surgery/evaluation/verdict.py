"""Go or no-go: early exits against smaller models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ee_surgery.calibration.records import replay_point
from ee_surgery.checks import instance, numbers, shown
from ee_surgery.data.batches import Data, batches
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.errors import ConfigError, DataError, OperatingPointError
from ee_surgery.evaluation.record import record
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel


@dataclass(frozen=True)
class Alternative:
    """A smaller model, and early exit at its accuracy."""

    name: str
    accuracy: float
    macs_fraction: float
    """As a fraction of the original's."""
    exits_accuracy: float
    """Of the operating point that was calibrated for this model's accuracy drop."""
    exits_macs_fraction: float

    @property
    def go(self) -> bool:
        """Whether the exits are cheaper."""
        return self.exits_macs_fraction < self.macs_fraction

    def __str__(self) -> str:
        end = "go" if self.go else f"no-go: take {self.name} instead"
        return (
            f"{self.name}: {self.accuracy:.2%} at {self.macs_fraction:.1%} of the MACs; "
            f"with exits {self.exits_accuracy:.2%} at {self.exits_macs_fraction:.1%}: {end}"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether early exits pay off."""

    accuracy: float
    """Of the original."""
    best_case: tuple[float, float]
    """Accuracy and mean MACs of leaving at the first correct exit; see `ExitRecords.best_case`."""
    alternatives: tuple[Alternative, ...]
    samples: int

    @property
    def go(self) -> bool:
        """Whether the exits are cheaper than every alternative at its accuracy."""
        return all(alternative.go for alternative in self.alternatives)

    def __str__(self) -> str:
        accuracy, cost = self.best_case
        lines = [
            f"original: {self.accuracy:.2%}, {self.samples} samples",
            f"best case, leaving at the first correct exit: {accuracy:.2%} at {cost:.1%} of the MACs",
        ]
        return "\n".join([*lines, *map(str, self.alternatives)])


def verdict(
    branched: EarlyExitModel,
    data: Data,
    alternatives: Mapping[str, nn.Module | tuple[float, float]],
    *,
    batch_size: int = 128,
    class_map: ClassMap | None = None,
) -> Verdict:
    """Compare a calibrated model with smaller models on data that none of them has seen.

    For each of them, the operating point is taken that was calibrated for its accuracy drop below the original's on
    this data, and what that point gives on this data is stated.

    Args:
        data: labelled, other than what `calibrate` was given.
        alternatives: models that take the same inputs and answer with the same classes; or, where they were measured
            elsewhere, their accuracy in [0, 1] and their MACs as a fraction of the original's.
        class_map: as for `record`; the alternatives have the original's classes.
    Raises:
        OperatingPointError: the model is not calibrated.
        DataError: no labels.
    """
    instance("branched", branched, EarlyExitModel)
    for name, other in instance("alternatives", alternatives, Mapping, hint="By name.").items():
        _check(name, other)
    if branched.frontier is None:
        raise OperatingPointError("No frontier to choose from: run ee.calibrate(branched, held_out) first.")
    records = record(branched, data, batch_size=batch_size, class_map=class_map)
    if records.labels is None:
        raise DataError("Comparing accuracy needs labels: give labelled data.")
    known, found = Labels(branched.engine, class_map), []
    for name, other in alternatives.items():
        accuracy, cost = other if isinstance(other, tuple) else _measure(branched, other, data, batch_size, known)
        point = branched.frontier.at(max_accuracy_drop=min(1.0, max(0.0, records.base_accuracy - accuracy)))
        realised = replay_point(records, point.policy, point.rule)
        found.append(Alternative(name, accuracy, cost, realised.accuracy, realised.macs_fraction))
    return Verdict(records.base_accuracy, records.best_case(), tuple(found), len(records))


def _check(name: str, other: object) -> None:
    """Check that it is a model, or its measurements.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(other, nn.Module):
        return
    hint = "A model, or its (accuracy, MACs as a fraction of the original's)."
    if len(numbers(f"alternatives[{name!r}]", other, low=0, hint=hint)) != 2 or other[0] > 1:  # pyright: ignore[reportIndexIssue]
        raise ConfigError(f"alternatives[{name!r}] must be accuracy in [0, 1] and MACs, got {shown(other)}. {hint}")


def _measure(
    branched: EarlyExitModel, other: nn.Module, data: Data, batch_size: int, known: Labels
) -> tuple[float, float]:
    """Accuracy, and MACs as a fraction of the original's."""
    sample = branched.sample
    task = branched.task
    own = sample if len(sample) > 1 else next(iter(sample.values()))  # it has its own name for the input
    graph = inspect(other, own, task=type(task))
    home = next(iter(branched.branches.parameters()))
    right, total = 0.0, 0
    for inputs, labels in batches(data, batch_size, home.device, home.dtype):
        assert labels is not None  # as in the records
        labels = known(labels, len(labels))
        counts = ~task.ignored(labels)
        arguments = graph.backbone.arguments(inputs)
        with torch.no_grad():
            answers = graph.backbone.logits(graph.backbone(arguments))
        right += float(task.outcome(answers, labels)[counts].double().sum())
        total += int(counts.sum())
    return right / total, graph.macs / branched.trunk_macs[-1]
