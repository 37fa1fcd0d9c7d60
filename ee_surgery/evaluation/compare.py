"""Compare branched models and calibrators on the same samples: thresholds from one half, results from the other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from rich.table import Table
from torch import Tensor

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.methods import CALIBRATORS
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop, count, instance, names, positive
from ee_surgery.data.batches import Data
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import ConfigError, DataError, OperatingPointError
from ee_surgery.evaluation.record import record
from ee_surgery.model import EarlyExitModel
from ee_surgery.tables import Tabular, as_text, table

Request: TypeAlias = tuple[Literal["max_accuracy_drop", "budget"], float]
_LEAST = 20  # samples, of which thresholds are chosen on ten


@dataclass(frozen=True)
class Compared:
    """One model with one calibrator at one request, over all halves."""

    model: str
    method: str
    request: Literal["max_accuracy_drop", "budget"]
    value: float
    """Of the request, in [0, 1]."""
    drop: tuple[float, float]
    """Mean and standard deviation of the original's accuracy minus this one's, on the reported halves."""
    macs_fraction: tuple[float, float]
    """Mean and standard deviation, every branch visited included."""
    exit_shares: tuple[float, ...]
    """Mean share of the samples leaving at each exit, the original's head last."""
    halves: int
    """In which the request could be met; the others do not count."""


@dataclass(frozen=True)
class Comparison(Tabular):
    """Results side by side."""

    results: tuple[Compared, ...]
    samples: int
    """Of each reported half."""

    def rows(self) -> list[dict[str, Any]]:
        """One per model, calibrator and request."""
        return [
            {
                "model": r.model,
                "method": r.method,
                r.request: r.value,
                "drop": r.drop[0],
                "drop_std": r.drop[1],
                "macs_fraction": r.macs_fraction[0],
                "macs_fraction_std": r.macs_fraction[1],
                "halves": r.halves,
            }
            for r in self.results
        ]

    def table(self) -> Table:
        """The same numbers, rounded, in percent."""
        asked = {"max_accuracy_drop": "drop of {:g} points", "budget": "{:g}% of the MACs"}
        rows = [
            [
                r.model,
                r.method,
                asked[r.request].format(100 * r.value),
                f"{100 * r.drop[0]:.2f} ± {100 * r.drop[1]:.2f}",
                f"{100 * r.macs_fraction[0]:.1f} ± {100 * r.macs_fraction[1]:.1f}",
                " ".join(f"{share:.0%}" for share in r.exit_shares),
            ]
            for r in self.results
        ]
        heads = (
            "model",
            "calibrator",
            "asked for",
            "points below the original",
            "MACs %",
            "share leaving at each exit",
        )
        left = heads[:3]
        caption = f"mean ± standard deviation over halves of {self.samples} samples that chose no thresholds"
        return table("", caption, {head: "left" if head in left else "right" for head in heads}, rows)

    def __str__(self) -> str:
        return as_text(self.table())


def compare(
    models: Mapping[str, EarlyExitModel | ExitRecords] | EarlyExitModel | ExitRecords,
    data: Data | None = None,
    *,
    methods: str | Sequence[str] = ("search",),
    max_accuracy_drops: Sequence[float] = (0.005, 0.01, 0.02),
    budgets: Sequence[float] = (),
    splits: int = 10,
    batch_size: int = 128,
    class_map: ClassMap | None = None,
) -> Comparison:
    """What models and calibrators give on samples that their thresholds were not chosen on.

    All samples are split into random halves; thresholds come from one half and results from the other, both ways. To
    compare presets, train each first: `{name: ee.augment(model, preset=name, train=train) for name in names}`.

    Args:
        models: by name: branched models, or what `record` gave of them.
        data: held-out samples; needed for models, see `record`.
        methods: names in `CALIBRATORS`.
        max_accuracy_drops: to ask for, in [0, 1]; 0.01 is one percentage point.
        budgets: to ask for too: mean MACs as fractions of the original's. Calibrators made for budgets meet these.
        splits: number of random splits, each of which is used both ways.
        batch_size: of recording.
        class_map: as for `record`.
    Raises:
        UnknownNameError: no such calibrator.
        ConfigError: nothing to compare, or a calibrator that is not for a model's task.
        DataError: models but no data, or fewer than 20 samples.
    """
    if isinstance(models, (EarlyExitModel, ExitRecords)):
        models = {"": models}
    if not instance("models", models, Mapping):
        raise ConfigError("Nothing to compare: give branched models by name.")
    methods = names("methods", methods)
    for method in methods:
        CALIBRATORS[method]  # raises for an unknown name
    asked: list[Request] = [
        *(("max_accuracy_drop", accuracy_drop("max_accuracy_drops", drop)) for drop in max_accuracy_drops),
        *(("budget", positive("budgets", budget)) for budget in budgets),
    ]
    splits = count("splits", splits)
    results: list[Compared] = []
    n = 0
    for name, model in models.items():
        if isinstance(model, EarlyExitModel):
            if data is None:
                raise DataError(f"data= is missing: held-out samples that {name or 'the model'} is compared on.")
            model = record(model, data, batch_size=batch_size, class_map=class_map)
        records = instance(f"models[{name!r}]", model, ExitRecords)
        if len(records) < _LEAST:
            raise DataError(f"{len(records)} samples are too few to compare on: {_LEAST} are needed.")
        n = len(records) // 2
        for method in methods:
            results += _over_halves(name, records, method, asked, both_ways(len(records), splits))
    return Comparison(tuple(results), n)


def both_ways(n: int, splits: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Halves of n samples, to choose on and to report: indices of random splits, and each the other way round.

    Halves are complements: if one is easier than average, the other is harder. Over both ways this cancels.
    """
    halves = [torch.randperm(n, generator=torch.Generator().manual_seed(i)).chunk(2) for i in range(splits)]
    return [split for first, second in halves for split in ((first, second), (second, first))]


def _over_halves(
    name: str,
    records: ExitRecords,
    method: str,
    asked: Sequence[Request],
    halves: Sequence[tuple[Tensor, Tensor]],
) -> list[Compared]:
    met: dict[Request, list[tuple[float, float, list[float]]]] = {}
    for chosen, reported in halves:
        frontier, test = Frontier.trace(records.take(chosen), method), records.take(reported)
        for request in asked:
            kind, value = request
            try:
                point = frontier.at(**{kind: value})  # pyright: ignore[reportArgumentType]
            except OperatingPointError:  # out of reach on this half
                continue
            replay = test.replay(point.policy_for(records.task))
            shares = torch.bincount(replay.exit_index, minlength=len(records.exits) + 1) / len(test)
            drop = test.base_accuracy - replay.outcome.mean().item()
            met.setdefault(request, []).append((drop, replay.macs.mean().item() / records.base_macs, shares.tolist()))
    found = []
    for (kind, value), each in met.items():
        drops, costs, shares = zip(*each, strict=True)
        mean_shares = tuple(map(statistics.mean, zip(*shares, strict=True)))
        found.append(Compared(name, method, kind, value, _spread(drops), _spread(costs), mean_shares, len(each)))
    return found


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.pstdev(values)
