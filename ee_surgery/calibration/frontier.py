"""The frontier: every trade-off between accuracy and cost that the branches can reach."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ee_surgery.calibration.failure import failure_auroc
from ee_surgery.calibration.methods import CALIBRATORS
from ee_surgery.calibration.pareto import pareto
from ee_surgery.calibration.plots import plot_frontier
from ee_surgery.calibration.profile import Profile
from ee_surgery.calibration.records import ExitRecords, replay_point
from ee_surgery.calibration.risk import RiskTable
from ee_surgery.calibration.search import search
from ee_surgery.checks import accuracy_drop, instance, names, numbers, positive, renamed, shown, word
from ee_surgery.errors import DataError, OperatingPointError
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.tables import Tabular, table
from ee_surgery.task import CLASSIFICATION, TASKS, require
from ee_surgery.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
_LEVELS = "(eps, delta): with confidence 1 - delta, at most a fraction eps of new samples; (0.01, 0.05) for example."


@dataclass(frozen=True)
class Frontier(Tabular, Sequence[OperatingPoint]):
    """Pareto-optimal operating points in expected accuracy and cost, from the cheapest to the most expensive.

    Cost is mean MACs, or with a profile mean time. Costs, shares and `accuracy` are those of exits actually taken on
    the calibration data; `expected_accuracy` is corrected for the optimism of choosing thresholds, and requests are
    judged by it. Sampling error remains.
    """

    points: tuple[OperatingPoint, ...]
    base_accuracy: float
    """Of the original on the calibration data; 1.0 if its own predictions served as labels."""
    exits: tuple[str, ...]
    """Names of the exits, the original's head (`original`) last."""
    exit_accuracies: tuple[float, ...]
    """Of each exit alone, all samples leaving there."""
    exit_macs: tuple[float, ...]
    """Cost of leaving at each exit as a fraction of the original's MACs, counting only that exit's own branch."""
    labelled: bool
    """False where accuracy means agreement with the original."""
    risks: tuple[RiskTable, ...] = ()
    """Risk tables for certificates, one per risk; filled by `calibrate`."""
    task: str = CLASSIFICATION.name
    """What the answers are, by its name in `TASKS`."""
    profile: Profile | None = None
    """Where time is the cost: of which engine and device."""
    exit_aurocs: tuple[float | None, ...] = ()
    """Of each branch, how well the score tells right answers from wrong ones; see `failure_auroc`."""

    @classmethod
    def search(cls, records: ExitRecords, scores: Iterable[str] | None = None) -> Frontier:
        """Search thresholds for the best realised trade-offs.

        Args:
            records: of held-out data: neither what trained the branches nor what will be reported.
            scores: the scores to search; each operating point uses one of them. By default that of the task.
        """
        instance("records", records, ExitRecords)
        wanted = [records.task.default_score] if scores is None else names("scores", scores)
        return cls.of(records, [point for score in wanted for point in search(records, score)])

    @classmethod
    def trace(cls, records: ExitRecords, method: str = "search", *, policy: str | None = None) -> Frontier:
        """The frontier of one calibrator, by its name in `CALIBRATORS`.

        Args:
            records: held-out answers, as for `search`.
            policy: old name of `method`.
        """
        instance("records", records, ExitRecords)
        name = renamed("policy=", policy, "method=", method)
        require(f"The calibrator {name!r}", CALIBRATORS.property(name, "tasks"), records.task)
        return cls.of(records, CALIBRATORS[name](records))

    @classmethod
    def of(cls, records: ExitRecords, points: Iterable[OperatingPoint], profile: Profile | None = None) -> Frontier:
        """The best of some operating points of these records; never exiting is always one of them.

        Args:
            profile: time is the cost then, and not MACs.
        """
        never = ThresholdPolicy((NEVER,) * len(records.exits), records.task.default_score)
        points = [*points, replace(replay_point(records, never, "never"), expected_accuracy=records.base_accuracy)]
        if profile is not None:
            points = [profile.timed(records, point) for point in points]
        best = _best(points)
        return cls(
            points=best,
            base_accuracy=records.base_accuracy,
            exits=(*records.exits, "original"),
            exit_accuracies=tuple(records.accuracies),
            exit_macs=tuple(records.exit_macs),
            labelled=records.labelled,
            task=records.task.name,
            profile=profile,
            exit_aurocs=tuple(failure_auroc(records, best[0].score)),  # of the score of the cheapest point
        )

    def at(
        self,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        latency_ms: float | None = None,
        risk: tuple[float, float] | None = None,
        risk_of: str = "disagreement",
    ) -> OperatingPoint:
        """The cheapest point within an accuracy drop, the most accurate within a budget, or the cheapest certified one.

        Args:
            max_accuracy_drop: of the expected accuracy below the original's, in [0, 1]; 0.01 is one percentage
                point. The realised drop on the calibration data is no larger.
            budget: mean MACs as a fraction of the original's, branches included.
            latency_ms: mean milliseconds of a batch, of a frontier that was calibrated with a profile.
            risk: (eps, delta): with confidence 1 - delta, at most a fraction eps of new samples gets a prediction other
                than the original's. If the records cannot certify any exit, all stay closed, with a warning that says
                how many samples are needed. `risk_control` has more risks and sharper tests.
            risk_of: `accuracy_gap`: at most eps of the accuracy is lost.
        Raises:
            OperatingPointError: none or several were given, or no point meets the request.
        """
        if sum(asked is not None for asked in (max_accuracy_drop, budget, latency_ms, risk)) != 1:
            raise OperatingPointError("Give exactly one of max_accuracy_drop=, budget=, latency_ms= and risk=.")
        if risk is not None:
            levels = numbers("risk", risk, above=0, below=1, error=OperatingPointError, hint=_LEVELS)
            if len(levels) != 2:
                raise OperatingPointError(f"risk must be (eps, delta), got {shown(risk)}. {_LEVELS}")
            return self._certified(risk_of, *levels)
        if max_accuracy_drop is not None:
            max_accuracy_drop = accuracy_drop("max_accuracy_drop", max_accuracy_drop, OperatingPointError)
            # Never exiting is a point of every search, so there always is one.
            floor = self.base_accuracy - max_accuracy_drop - 1e-12
            return next(p for p in self.points if p.expected_accuracy >= floor)
        if latency_ms is not None:
            return self._within(positive("latency_ms", latency_ms, OperatingPointError, "In milliseconds: 2.5."))
        budget = positive("budget", budget, OperatingPointError, "A fraction of the original's MACs: 0.5.")
        affordable = [point for point in self.points if point.macs_fraction <= budget + 1e-12]
        if not affordable:
            least = min(point.macs_fraction for point in self.points)
            raise OperatingPointError(
                f"No operating point within a budget of {budget:g}: the cheapest costs {least:.3f} of the original's "
                "MACs. Add an earlier exit or raise the budget."
            )
        return affordable[-1]

    def _within(self, latency_ms: float) -> OperatingPoint:
        if self.profile is None:
            raise OperatingPointError("No times are known: run ee.calibrate(..., profile=ee.profile(branched)) first.")
        affordable = [point for point in self.points if _cost(point) <= latency_ms + 1e-12]
        if not affordable:
            raise OperatingPointError(
                f"No operating point takes {latency_ms:g} ms or less for a batch of {self.profile.batch_size}: the "
                f"fastest takes {_cost(self.points[0]):.3g} ms. Add an earlier exit or allow more time."
            )
        return affordable[-1]

    def _certified(self, name: str, eps: float, delta: float) -> OperatingPoint:
        word("risk_of", name, OperatingPointError)
        for certified in self.risks:
            if certified.risk == name:
                return certified.at(eps, delta)
        raise OperatingPointError(
            f"Nothing is known about the risk {name!r}, only about {[table.risk for table in self.risks]}. Run "
            "ee.calibrate on labelled data, or ee.risk_control on records."
        )

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[OperatingPoint]:
        return iter(self.points)

    @property
    def measure(self) -> str:
        """What `accuracy` is of this task where there were labels; see `Task.measure`."""
        return TASKS.get(self.task, CLASSIFICATION).measure

    @property
    def what(self) -> str:
        """What is measured: `measure` where there were labels, else agreement with the original."""
        return self._what if self.labelled else f"{self._what} with the original"

    @property
    def _what(self) -> str:
        return self.measure if self.labelled else "agreement"

    @property
    def _aurocs(self) -> str:
        shown = " ".join("-" if auroc is None else f"{auroc:.3f}" for auroc in self.exit_aurocs)
        return f"; AUROC of right against wrong answers at each branch: {shown}" if shown else ""

    def __str__(self) -> str:
        width = max(9, len(self._what))
        timed = self.profile is not None
        lines = [f"{self._what:>{width}}  expected    MACs {'      ms' * timed}  share leaving at each exit"]
        for point in self.milestones():
            shares = " ".join(f"{share:.0%}" for share in point.exit_shares)
            numbers = f"{point.accuracy:{width}.2%}  {point.expected_accuracy:8.2%}  {point.macs_fraction:6.1%}"
            numbers += f" {point.latency_ms:8.2f}" if timed else ""
            lines.append(f"{numbers}   {shares}  ({visible(point.score)})")
        return "\n".join([*lines, *filter(None, [self._why_one.strip()])])

    @property
    def _why_one(self) -> str:
        """Why there is a single operating point at all round drops."""
        found = self.milestones()
        if len(found) > 1:
            return ""
        if found[0].exit_shares[-1] == 1:
            alone = ", ".join(f"{accuracy:.1%}" for accuracy in self.exit_accuracies[:-1])
            return (
                f"One point: no exit saves anything, even at a drop of 10 points; alone they reach {alone}. "
                "Train longer or on more data, or use a smaller model. "
            )
        return "One point: nothing cheaper stays within a drop of 10 points, and nothing dearer is more accurate. "

    def table(self) -> Table:
        """The operating points at some round accuracy drops."""
        what = self._what
        rows = [
            [
                f"{p.accuracy:.2%}",
                f"{p.expected_accuracy:.2%}",
                f"{100 * (self.base_accuracy - p.expected_accuracy):.2f}",
                f"{p.macs_fraction:.1%}",
                *([] if p.latency_ms is None else [f"{p.latency_ms:.2f}"]),
                str(p.score),
                " ".join(f"{share:4.0%}" for share in p.exit_shares),
            ]
            for p in self.milestones()
        ]
        exits = ", ".join(map(visible, self.exits))
        time = [] if self.profile is None else ["ms per batch"]
        names = (what, "expected", "drop, points", "MACs", *time, "score", "share leaving at each exit")
        return table(
            f"Frontier on {self.points[0].samples} held-out samples; original: {what} {self.base_accuracy:.2%}",
            f"{self._why_one}expected: corrected for selection bias by cross-validation; exits: {exits}{self._aurocs}",
            dict.fromkeys(names, "right"),
            rows,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Every operating point, cheapest first: accuracies in [0, 1], cost, score, thresholds and shares per exit."""
        return [
            {
                "accuracy": p.accuracy,
                "expected_accuracy": p.expected_accuracy,
                "expected_drop": self.base_accuracy - p.expected_accuracy,
                "macs_fraction": p.macs_fraction,
                **({} if self.profile is None else {"latency_ms": p.latency_ms}),
                "score": str(p.score),
                "fallback": p.fallback,
                "rule": p.rule,
                **{f"threshold {name}": t for name, t in zip(self.exits, p.thresholds, strict=False)},
                **{f"share {name}": share for name, share in zip(self.exits, p.exit_shares, strict=True)},
            }
            for p in self
        ]

    def milestones(self, drops: Sequence[float] = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)) -> list[OperatingPoint]:
        """The distinct points at some round accuracy drops, from the smallest drop to the largest."""
        return list(dict.fromkeys(self.at(max_accuracy_drop=drop) for drop in drops))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Accuracy against mean MACs: the frontier, the original, and each exit alone.

        Args:
            path: write the plot there (format by suffix, PNG without one), atomically.
        Raises:
            SurgeryError: matplotlib is not installed.
            ConfigError: the image format is not supported.
            WriteError: the file cannot be written.
        """
        exits = list(zip(self.exits, self.exit_macs, self.exit_accuracies, strict=True))[:-1]
        return plot_frontier(self.points, exits, self.base_accuracy, self.what, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, and the tensors of fitted scores."""
        # older versions read a frontier as before where there is nothing new to say
        task = {} if self.task == CLASSIFICATION.name else {"task": self.task}
        return {
            "format_version": FORMAT_VERSION,
            **task,
            "points": [point.to_dict() for point in self.points],
            "base_accuracy": self.base_accuracy,
            "exits": list(self.exits),
            "exit_accuracies": list(self.exit_accuracies),
            "exit_macs": list(self.exit_macs),
            "labelled": self.labelled,
            "risks": [table.to_dict() for table in self.risks],
            **({} if self.profile is None else {"profile": self.profile.to_dict()}),
            **({"exit_aurocs": list(self.exit_aurocs)} if self.exit_aurocs else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Frontier:
        """The inverse of `to_dict`.

        Raises:
            DataError: a different format version, or missing fields.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"A frontier of format {data.get('format_version')!r}; this version reads {FORMAT_VERSION}."
            )
        try:
            return cls(
                points=tuple(OperatingPoint.from_dict(point) for point in data["points"]),
                base_accuracy=data["base_accuracy"],
                exits=tuple(data["exits"]),
                exit_accuracies=tuple(data["exit_accuracies"]),
                exit_macs=tuple(data["exit_macs"]),
                labelled=data["labelled"],
                risks=tuple(RiskTable.from_dict(table) for table in data.get("risks", [])),
                task=data.get("task", CLASSIFICATION.name),
                profile=None if data.get("profile") is None else Profile.from_dict(data["profile"]),
                exit_aurocs=tuple(data.get("exit_aurocs", ())),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"A damaged frontier: {error!r}.") from error


def _best(points: Iterable[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    """Points sorted by cost, each expected to be more accurate than all cheaper ones.

    Points without an expected accuracy use the one on the calibration data.
    """
    known = [p if not math.isnan(p.expected_accuracy) else replace(p, expected_accuracy=p.accuracy) for p in points]
    return tuple(pareto(known, _cost, lambda p: p.expected_accuracy))


def _cost(point: OperatingPoint) -> float:
    """The cost that points are ordered by."""
    return point.macs_fraction if point.latency_ms is None else point.latency_ms
