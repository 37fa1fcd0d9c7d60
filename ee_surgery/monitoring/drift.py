"""Exit shares and scores of audited samples against those of calibration: a plain report, no test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.errors import DataError
from ee_surgery.policies.operating_point import OperatingPoint, describe

BINS = 10


def edges(records: ExitRecords, point: OperatingPoint) -> list[list[float]]:
    """Of each exit, the deciles of its score on all calibration samples, (K - 1, 9)."""
    found = []
    for row in records.scores(point.score):
        known = row[torch.isfinite(row)].double().numpy()
        found.append(np.quantile(known, np.arange(1, BINS) / BINS).tolist() if len(known) else [0.0] * (BINS - 1))
    return found


@dataclass
class Traffic:
    """Audited samples at one operating point, counted."""

    point: str
    """Its identity, as JSON."""
    exits: list[int]
    """How many left at each exit, K numbers."""
    edges: list[list[float]] = field(default_factory=list)
    """Between the bins of the scores, (K - 1, 9); empty without records."""
    scores: list[list[int]] = field(default_factory=list)
    """How many left in each bin, (K - 1, 10)."""

    @classmethod
    def at(cls, point: OperatingPoint, records: ExitRecords | None) -> Traffic:
        """No samples yet."""
        exits = len(point.thresholds)
        known = [] if records is None else edges(records, point)
        return cls(identity(point), [0] * (exits + 1), known, [[0] * BINS for _ in known])

    def add(self, k: int, scores: Sequence[float], count: int) -> None:
        """Samples that left at exit k, with their scores where it has one."""
        self.exits[k] += count
        if self.edges and scores:
            for place in np.searchsorted(self.edges[k], scores, "right").tolist():
                self.scores[k][place] += 1

    def joined(self, other: Traffic) -> Traffic:
        """With those of another worker; only its own where that ran another operating point, or other bins."""
        if (self.point, self.edges) != (other.point, other.edges):
            return self
        both = zip(self.scores, other.scores, strict=True)
        exits = [a + b for a, b in zip(self.exits, other.exits, strict=True)]
        return Traffic(self.point, exits, self.edges, [[a + b for a, b in zip(*rows, strict=True)] for rows in both])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Traffic:
        """The inverse of `asdict`, of data whose form was checked.

        Raises:
            DataError: it is not of one model.
        """
        found = cls(data["point"], data["exits"], data["edges"], data["scores"])
        exits = len(found.exits) - 1
        if len(found.scores) != len(found.edges) or len(found.edges) not in (0, exits):
            raise DataError(f"Scores of {len(found.scores)} exits do not go with {exits} branches.")
        return found


def identity(point: OperatingPoint) -> str:
    """What two operating points have in common that take the same exits."""
    return json.dumps(describe(point), sort_keys=True)


@dataclass(frozen=True)
class Drift:
    """How audited samples leave, against how calibration samples did."""

    exits: tuple[str, ...]
    """Names, the original's head (`original`) last."""
    counts: tuple[int, ...]
    """Audited samples that left at each."""
    shares: tuple[float, ...]
    """Their shares."""
    expected: tuple[float, ...]
    """The shares on the calibration data; empty where they are not known, as of thresholds set by hand."""
    scores: tuple[tuple[float, ...], ...] = ()
    """Of each branch, the shares of its samples by score, in the tenths of all calibration samples; with records."""
    expected_scores: tuple[tuple[float, ...], ...] = ()
    """The same of those calibration samples that left there."""

    @classmethod
    def of(
        cls, traffic: Traffic, names: Sequence[str], point: OperatingPoint | None, records: ExitRecords | None
    ) -> Drift:
        """Compare.

        Args:
            traffic: what was counted, at `point`.
            names: of the exits, the original's head last.
            records: of the calibration data, for scores.
        """
        expected = point.exit_shares if point is not None and point.samples else ()
        known: list[list[float]] = []
        if point is not None and records is not None and traffic.edges:
            replayed = records.replay(point.policy_for(records.task)).exit_index
            then = Traffic.at(point, records)
            for k, row in enumerate(records.scores(point.score)):
                then.add(k, row[replayed == k].tolist(), int((replayed == k).sum()))
            then.exits[-1] = len(records) - sum(then.exits)
            expected, known = tuple(_shares(then.exits)), [_shares(row) for row in then.scores]
        return cls(
            tuple(names), tuple(traffic.exits), tuple(_shares(traffic.exits)), tuple(expected),
            tuple(tuple(_shares(row)) for row in traffic.scores), tuple(map(tuple, known)),
        )  # fmt: skip

    @property
    def moved(self) -> float | None:
        """Total variation distance of the exit shares, in [0, 1]; None where nothing is known of calibration."""
        return _distance(self.shares, self.expected) if self.expected and sum(self.counts) else None

    @property
    def scores_moved(self) -> tuple[float | None, ...]:
        """The same of the scores at each branch; None where no sample left."""
        pairs = zip(self.scores, self.expected_scores, strict=False)
        return tuple(_distance(*pair) if sum(pair[0]) and sum(pair[1]) else None for pair in pairs)

    def __str__(self) -> str:
        lines = [f"{'exit':32} {'now':>7} {'then':>7}  scores moved by"]
        apart = [*self.scores_moved, *[None] * len(self.exits)]
        for k, name in enumerate(self.exits):
            then = f"{self.expected[k]:7.1%}" if self.expected else f"{'-':>7}"
            score = "-" if apart[k] is None else f"{apart[k]:.1%}"
            lines.append(f"{name:32} {self.shares[k]:7.1%} {then}  {score}")
        moved = "" if self.moved is None else f"; {self.moved:.1%} of the samples leave elsewhere"
        return "\n".join([*lines, f"{sum(self.counts)} audited samples{moved}"])


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2
