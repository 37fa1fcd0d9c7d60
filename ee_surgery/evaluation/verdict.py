"""Go or no-go: early exits against smaller models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_surgery.attachment import attach
from ee_surgery.backbone.inputs import Inputs
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.checks import count, instance, numbers, shown
from ee_surgery.data.batches import Data, batches
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.errors import ConfigError, DataError, OperatingPointError
from ee_surgery.evaluation.bench import against
from ee_surgery.evaluation.record import record
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import place
from ee_surgery.policies.operating_point import OperatingPoint

_TIMED = 128  # samples


@dataclass(frozen=True)
class Alternative:
    """A smaller model, and early exit at its accuracy."""

    name: str
    accuracy: float
    macs_fraction: float
    """As a fraction of the original's."""
    exits_accuracy: float
    """Of the cheapest operating point that is no less accurate here, from the one calibrated for this model's drop."""
    exits_macs_fraction: float
    time_fraction: float | None = None
    """Its latency as a fraction of the original's, if time was measured."""
    exits_time_fraction: float | None = None

    @property
    def go(self) -> bool:
        """Whether the exits are cheaper at no less accuracy: in time, if that was measured, else in MACs."""
        exits, alone = (
            (self.exits_macs_fraction, self.macs_fraction)
            if self.exits_time_fraction is None or self.time_fraction is None
            else (self.exits_time_fraction, self.time_fraction)
        )
        return exits < alone and self.exits_accuracy >= self.accuracy

    def __str__(self) -> str:
        end = "go" if self.go else f"no-go: take {self.name} instead"
        return (
            f"{self.name}: {self.accuracy:.2%} at {_costs(self.macs_fraction, self.time_fraction)}; with exits "
            f"{self.exits_accuracy:.2%} at {_costs(self.exits_macs_fraction, self.exits_time_fraction)}: {end}"
        )


def _costs(macs: float, time: float | None) -> str:
    return f"{macs:.1%} of the MACs" + ("" if time is None else f" and {time:.1%} of the time")


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
        """Whether the exits are cheaper than every alternative, at no less accuracy."""
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
    alternatives: Mapping[str, nn.Module | tuple[float, ...]],
    *,
    engine: str | None = None,
    time_batch: int = 1,
    batch_size: int = 128,
    class_map: ClassMap | None = None,
) -> Verdict:
    """Compare a calibrated model with smaller models on data that none of them has seen, at equal accuracy.

    For each of them, the operating point is taken that was calibrated for its accuracy drop below the original's on
    this data, or the next safer one that is no less accurate here.

    Args:
        data: labelled, other than what `calibrate` was given.
        alternatives: models that take the same inputs and answer with the same classes; or, where they were measured
            elsewhere, their accuracy in [0, 1] and MACs as a fraction of the original's, with `engine=` also their
            latency as such a fraction.
        engine: a name in `ENGINES`, on which time is measured too, by up to 128 samples of the data: exits and smaller
            models against the original. By default MACs alone count.
        time_batch: samples per batch there.
        batch_size: to record and to measure accuracy.
        class_map: as for `record`; the alternatives have the original's classes.
    Raises:
        OperatingPointError: the model is not calibrated.
        ConfigError: an alternative is neither a model nor its numbers.
        DataError: no labels.
        UnknownNameError: no such engine.
    """
    instance("branched", branched, EarlyExitModel)
    for name, other in instance("alternatives", alternatives, Mapping, hint="By name.").items():
        _check(name, other, timed=engine is not None)
    time_batch = count("time_batch", time_batch)
    if branched.frontier is None:
        raise OperatingPointError("No frontier to choose from: run ee.calibrate(branched, held_out) first.")
    records = record(branched, data, batch_size=batch_size, class_map=class_map)
    if records.labels is None:
        raise DataError("Comparing accuracy needs labels: give labelled data.")
    known, found = Labels(branched.engine, class_map), []
    for name, other in alternatives.items():
        graph, time = None, None
        if isinstance(other, nn.Module):
            graph = _captured(branched, other)
            accuracy = _accuracy(branched, graph, data, batch_size, known)
            macs = graph.macs / branched.trunk_macs[-1]
        else:
            accuracy, macs, *latency = other
            time = latency[0] if latency else None
        point = _at_least(branched.frontier, records, accuracy)
        exits_time = None
        if engine is not None:
            inputs, _ = next(_batches(branched, data, max(_TIMED, time_batch)))
            others = {} if graph is None else {"other": (attach(graph, place(graph, 1, clip=True)), inputs)}
            subject = branched.copy()
            subject.operate(point)
            times = against(subject, others, inputs, engine=engine, batch_size=time_batch)
            exits_time, time = times["exits"], times.get("other", time)
        found.append(Alternative(name, accuracy, macs, point.accuracy, point.macs_fraction, time, exits_time))
    return Verdict(records.base_accuracy, records.best_case(), tuple(found), len(records))


def _at_least(frontier: Frontier, records: ExitRecords, accuracy: float) -> OperatingPoint:
    """The cheapest point, from the one calibrated for this drop on, that is as accurate on these records."""
    start = frontier.at(max_accuracy_drop=min(1.0, max(0.0, records.base_accuracy - accuracy)))
    realised = replay_point(records, start.policy, start.rule)
    for point in frontier[[*frontier].index(start) + 1 :]:
        if realised.accuracy >= accuracy:
            break
        realised = replay_point(records, point.policy, point.rule)
    return realised


def _check(name: str, other: object, timed: bool) -> None:
    """Check that it is a model, or its measurements.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(other, nn.Module):
        return
    hint = "A model, or its (accuracy, MACs as a fraction of the original's), and its latency likewise if that counts."
    values = numbers(f"alternatives[{name!r}]", other, low=0, hint=hint)
    if len(values) not in ((3,) if timed else (2, 3)) or values[0] > 1:
        raise ConfigError(f"alternatives[{name!r}] must be accuracy in [0, 1] and costs, got {shown(other)}. {hint}")


def _captured(branched: EarlyExitModel, other: nn.Module) -> ModelGraph:
    sample = branched.sample
    own = sample if len(sample) > 1 else next(iter(sample.values()))  # it has its own name for the input
    return inspect(other, own, task=branched.task)


def _batches(branched: EarlyExitModel, data: Data, size: int) -> Iterator[tuple[Inputs, Tensor | None]]:
    home = next(iter(branched.branches.parameters()))
    return batches(data, size, home.device, home.dtype)


def _accuracy(branched: EarlyExitModel, graph: ModelGraph, data: Data, batch_size: int, known: Labels) -> float:
    task, right, total = branched.task, 0.0, 0
    for inputs, labels in _batches(branched, data, batch_size):
        assert labels is not None  # as in the records
        labels = known(labels, len(labels))
        counts = ~task.ignored(labels)
        with torch.no_grad():
            answers = graph.backbone.logits(graph.backbone(graph.backbone.arguments(inputs)))
        right += float(task.outcome(answers, labels)[counts].double().sum())
        total += int(counts.sum())
    return right / total
