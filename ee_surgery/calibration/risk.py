"""Risk control: thresholds with a guarantee about new data, not only an observed loss.

A path of policies runs from safe (no sample leaves) to risky. Each is tested on the records, in that order, for whether
its risk may exceed `eps`; the first that is not cleared ends the path. Testing in a fixed order needs no correction
for the number of tests, so any policy before the end may be used; the cheapest is.

Sources: risk control for early exit (Jazbec et al., arXiv:2405.20915); Learn then Test (Angelopoulos et al.,
arXiv:2110.01052); conformal risk control (arXiv:2208.02814). The papers share one threshold between exits and take the
last policy cleared; here thresholds may differ, and of the cleared ones the cheapest is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ee_surgery.calibration.bounds import ZERO_ONE, Scale, cleared, cleared_by_counts, samples_needed, upper_bound
from ee_surgery.calibration.records import ExitRecords, fingerprint, replay_point
from ee_surgery.calibration.search import search
from ee_surgery.checks import count, flag, instance, number
from ee_surgery.errors import ConfigError, DataError, SurgeryWarning
from ee_surgery.policies.certificate import Certificate, Check
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.policies.scores import SCORES
from ee_surgery.registry import Registry
from ee_surgery.task import CLASSIFICATION, Task, TaskNames, fits

FORMAT_VERSION = 1
SPLIT = 0.3
"""Share of the samples that choose the path of thresholds with `per_exit`; the rest certify."""

_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Risk:
    """A loss of leaving early, whose mean over samples is the risk; the original's own prediction has loss 0."""

    loss: Callable[[ExitRecords], _Floats]
    """Loss of each exit's prediction for each sample, shape (K, N); the last row, the original's, is 0."""
    scale: Scale
    labelled: bool
    """Whether it needs labels."""
    whole_outcomes: bool = False
    """Whether its losses are on that scale only where every outcome is 0 or 1."""
    tasks: TaskNames = ("classification",)
    """The tasks that it is for; None: all, as it asks `records.task` and `records.outcomes`."""
    vectors: bool = False
    """Whether it is for answers (B, C) alone, which can be expected to be the same: maps hardly ever are."""


RISKS: Registry[Risk] = Registry("risk", "ee_surgery.risks")


def _disagreement(records: ExitRecords) -> _Floats:
    return (1 - records.agreement.double()).clamp(0, 1).numpy()


def _accuracy_gap(records: ExitRecords) -> _Floats:
    return (records.outcomes[-1] - records.outcomes).numpy()


def _brier_gap(records: ExitRecords) -> _Floats:
    rows = []
    for logits in records.recorded_logits():
        p = records.task.probabilities(logits.double())
        p[torch.arange(len(records)), records.target] -= 1
        rows.append(p.square().sum(-1).nan_to_num(nan=2.0))  # non-finite logits get the largest loss
    brier = torch.stack(rows)
    return (brier - brier[-1]).numpy()


RISKS.register("disagreement")(Risk(_disagreement, ZERO_ONE, labelled=False, tasks=None, vectors=True))
_MAPS = ("segmentation", "map_regression")
RISKS.register("pixel_disagreement")(Risk(_disagreement, Scale(0, 1, False), labelled=False, tasks=_MAPS))
RISKS.register("accuracy_gap")(Risk(_accuracy_gap, Scale(-1, 1, True), labelled=True, whole_outcomes=True, tasks=None))
RISKS.register("outcome_gap")(Risk(_accuracy_gap, Scale(-1, 1, False), labelled=True, tasks=None))
RISKS.register("brier_gap")(Risk(_brier_gap, Scale(-2, 2, False), labelled=True))


def risk_control(
    records: ExitRecords,
    eps: float,
    delta: float = 0.05,
    *,
    risk: str = "disagreement",
    method: str | None = None,
    per_exit: bool = False,
    score: str | None = None,
    seed: int = 0,
) -> OperatingPoint:
    """The cheapest policy that is certified to lose at most `eps`.

    Args:
        records: of held-out data like future data: used neither to train the branches nor to fit the score.
        eps: the risk accepted on new data, in (0, 1), in units of the loss; 0.01 is one percentage point.
        delta: probability in (0, 1) that the guarantee is wrong, over the draw of the records.
        risk: `disagreement` with the original's answer (needs no labels), or of maps `pixel_disagreement`, the share of
            a picture's pixels in which they differ, `accuracy_gap` (wrong where the original is
            right, less right where it is wrong), `brier_gap`, or `outcome_gap`, which is `accuracy_gap` for tasks whose
            outcomes lie between 0 and 1; any name in `RISKS`.
        method: None takes an exact test for whole losses (`ltt-binomial`, or `ltt-paired` for -1, 0 and 1), else
            `wsr`, which bets. `ltt-trinomial` joins two binomial bounds, `ltt-hb` needs only the mean. `crc` promises
            only the expected risk; each sample's largest loss so far on the path stands for its loss.
        per_exit: a threshold for each exit, searched on a random 30 % of the records and certified on the rest.
        score: a registered name with values in [0, 1], or one that counts exits (`patience`); by default that of the
            task.
        seed: of that split, and of the order of bets in `wsr`.
    Returns:
        The point, evaluated on the certifying samples, with its certificate.
    Warns:
        SurgeryWarning: nothing could be certified, so all exits stay closed. Says how many samples are needed at least.
    Raises:
        ConfigError: a number outside its range, an unknown method or one that does not fit the losses.
        DataError: the risk needs labels, and there are none.
    """
    instance("records", records, ExitRecords)
    eps, delta = _levels(eps, delta)
    per_exit, seed = flag("per_exit", per_exit), count("seed", seed, low=0)
    score = score or records.task.default_score
    kind, method, _ = _risk(risk, records), _method(method, risk), SCORES[score]  # raises for an unknown score
    if per_exit:
        part, records = _halves(records, seed)
        path = _Path(records, _searched_path(part, kind, score, eps), score)
    else:
        path = _Path(records, _shared_path(records, score), score)
    order = _order(path.n, seed)
    of_exits, ok, peak = kind.loss(records), [], np.zeros((1, path.n))
    for losses in path.losses(of_exits):
        if method == "crc":
            # the running maximum covers every safer policy too, so crc holds for the cheapest of them
            losses = np.maximum.accumulate(np.maximum(losses, peak), 0)
            peak = losses[-1:]
        ok.extend(cleared(method, losses[:, order], kind.scale, eps, delta))
        if not all(ok):
            break
    best = _cheapest(path.fractions, ok)
    point, losses = (
        replay_point(records, path.policy(best), ""),
        _taken(of_exits, path.exit_index[best : best + 1])[:, order],
    )
    data = fingerprint(records)
    return _certified(point, losses, any(ok[:1]), risk, eps, delta, method, data, per_exit, seed)


def check_certificate(certificate: Certificate, records: ExitRecords) -> Check:
    """Test a certified policy on records: those that certified it, or new ones of the same exits.

    Args:
        records: for a `per_exit` certificate, all those given to `risk_control` or only the certifying part.
    Raises:
        DataError: a different number of exits, or no labels where the risk needs them.
    """
    instance("certificate", certificate, Certificate, hint="It is on the point: `point.certificate`.")
    instance("records", records, ExitRecords)
    risk, eps, delta = _risk(certificate.risk, records), certificate.eps, certificate.delta
    promised, there = len(certificate.thresholds), len(records.exits)
    if promised != there:
        raise DataError(f"The certificate is about {promised} exits, these records have {there}.")
    same = False
    if certificate.per_exit and len(records) > certificate.n:
        rest = _halves(records, certificate.seed)[1]
        same = fingerprint(rest) == certificate.data
        records = rest if same else records
    policy = ThresholdPolicy(certificate.thresholds, certificate.score)
    exit_index = records.replay(policy).exit_index.numpy()[None]
    losses = _taken(risk.loss(records), exit_index)[:, _order(len(records), certificate.seed)]
    holds = bool(cleared(certificate.method, losses, risk.scale, eps, delta)[0])
    # crc has no confidence level
    method = risk.scale.methods()[0] if certificate.method == "crc" else certificate.method
    ends = risk.scale.low + risk.scale.high  # mirrored losses and limit test the opposite claim
    return Check(
        observed=float(losses.mean()),
        n=len(records),
        bound=0.0 if policy.closed else upper_bound(method, losses, risk.scale, delta),
        holds=certificate.certified if policy.closed else holds,  # closed exits lose nothing on any data
        contradicted=bool(cleared(method, ends - losses, risk.scale, ends - eps, delta)[0]),
        same_data=same or fingerprint(records) == certificate.data,
        promise=certificate.promise,
    )


@dataclass(frozen=True)
class RiskTable:
    """Loss counts of the shared path on records: enough to certify any request later, without the records.

    Each request holds on its own: see `Certificate` for several. `worse` and `better` count, per point, the samples
    with a loss of 1 and of -1; `data` is the records' fingerprint.
    """

    risk: str
    score: str
    points: tuple[OperatingPoint, ...]
    """From safe to risky; the first closes all exits."""
    worse: tuple[int, ...]
    better: tuple[int, ...]
    data: str

    def at(self, eps: float, delta: float = 0.05) -> OperatingPoint:
        """The cheapest point certified to lose at most `eps`; takes less than a millisecond.

        By `ltt-binomial` for losses of 0 and 1, as `risk_control`; by `ltt-trinomial` for -1, 0 and 1, where
        `risk_control` takes longer and may certify a cheaper point. Warns and raises as `risk_control`.
        """
        eps, delta = _levels(eps, delta)
        method, n = _counted(self.risk), self.points[0].samples
        ok = cleared_by_counts(method, np.array(self.worse[1:]), np.array(self.better[1:]), n, eps, delta)
        best = _cheapest(np.array([point.macs_fraction for point in self.points]), ok)
        point, worse, better = self.points[best], self.worse[best], self.better[best]
        losses = np.repeat([[1.0, -1.0, 0.0]], [worse, better, n - worse - better], 1)
        return _certified(point, losses, any(ok[:1]), self.risk, eps, delta, method, self.data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        data |= {"format_version": FORMAT_VERSION, "points": [point.to_dict() for point in self.points]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RiskTable:
        """The inverse of `to_dict`.

        Raises:
            DataError: a different format version, or missing or unknown fields.
        """
        if (version := data.get("format_version")) != FORMAT_VERSION:
            raise DataError(f"A risk table of format {version!r}; this version reads {FORMAT_VERSION}.")
        try:
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "format_version"}
            return cls(**{**values, "points": tuple(OperatingPoint.from_dict(point) for point in data["points"])})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A damaged risk table: {error!r}.") from error


def risk_tables(records: ExitRecords) -> tuple[RiskTable, ...]:
    """What can be certified of these records later, without them: a table for each risk that counts tell."""
    named = ("disagreement", "accuracy_gap")
    known = [n for n in named if _suits(RISKS[n], records.task) and not (RISKS[n].labelled and not records.labelled)]
    return tuple(risk_table(records, name) for name in known) if records.logits is not None else ()


def risk_table(records: ExitRecords, risk: str = "disagreement", score: str | None = None) -> RiskTable:
    """Count the losses of every policy on the shared path, with the settings of `risk_control`.

    Raises:
        ConfigError: the losses of this risk are not integers, so counts do not determine their mean.
    """
    instance("records", records, ExitRecords)
    score = score or records.task.default_score
    kind, _ = _risk(risk, records), (SCORES[score], _counted(risk))
    path = _Path(records, _shared_path(records, score), score)
    worse, better = [0], [0]
    for losses in path.losses(kind.loss(records)):
        worse += (losses > 0).sum(1).tolist()
        better += (losses < 0).sum(1).tolist()
    points = tuple(replay_point(records, path.policy(row), f"risk_table({risk})") for row in range(len(path)))
    return RiskTable(risk, score, points, tuple(worse), tuple(better), fingerprint(records))


# --- Paths of policies from safe to risky; the first closes every exit.


class _Path:
    """Exits and costs of P policies on a path, without replaying each."""

    def __init__(self, records: ExitRecords, thresholds: _Floats, score: str) -> None:
        # Scores are float32: round thresholds as the comparison does.
        self.thresholds = thresholds.astype(np.float32).astype(np.float64)
        self.score, self.n = score, len(records)
        scores = records.scores(score).double().numpy()
        last = len(scores)
        self.exit_index = np.full((len(thresholds), self.n), last, dtype=np.int16)
        for k in reversed(range(last)):
            self.exit_index[scores[k] >= self.thresholds[:, k, None]] = k
        shares = np.stack([(self.exit_index == k).mean(1) for k in range(last + 1)], 1)
        visits = [self.policy(row).visits(records.chained) for row in range(len(thresholds))]
        costs = {v: exit_costs(records.trunk_macs, records.branch_macs, v) for v in set(visits)}
        self.fractions: _Floats = (shares * np.array([costs[v] for v in visits])).sum(1) / records.base_macs

    def __len__(self) -> int:
        return len(self.thresholds)

    def policy(self, row: int) -> ThresholdPolicy:
        return ThresholdPolicy(tuple(self.thresholds[row].tolist()), self.score)

    def losses(self, of_exits: _Floats) -> Iterator[_Floats]:
        """Losses of the policies in blocks (rows, N), from the first that is not closed; bounded memory."""
        step = max(8, 1_000_000 // self.n)
        for start in range(1, len(self), step):
            yield _taken(of_exits, self.exit_index[start : start + step])


def _taken(of_exits: _Floats, exit_index: NDArray[Any]) -> _Floats:
    """Losses at the exits taken by P policies, (P, N), from the losses at all exits, (K, N)."""
    return of_exits[exit_index, np.arange(of_exits.shape[1])]


def _shared_path(records: ExitRecords, score: str) -> _Floats:
    """The same threshold at all exits, independent of the data: shape (P, K - 1).

    Scores concentrate near 1, so thresholds are dense there: 1 - 10^-x, x from 7 to 0 in 200 steps.
    """
    taus = 1 - 10.0 ** -np.linspace(7, 0, 201)
    if SCORES.property(score, "counts_exits"):
        taus = np.arange(len(records.exits) - 1, -1, -1, dtype=np.float64)
    return np.repeat(np.concatenate([[NEVER], taus])[:, None], len(records.exits), 1)


def _searched_path(part: ExitRecords, risk: Risk, score: str, eps: float) -> _Floats:
    """Thresholds searched on samples that are not used to certify: shape (P, K - 1).

    A search on few samples jumps from no exits to the cheapest harmless ones. So the path first approaches the point
    expected to be just within `eps` in small steps, lowering all thresholds together from 1; then it continues over
    the cheaper points.
    """
    points = search(part if risk.labelled else part.unlabelled(), score, fallbacks=["last"])
    closed, found = np.full((1, len(part.exits)), NEVER), np.array([point.thresholds for point in points])
    opened = np.flatnonzero(np.isfinite(found).any(1))
    if not len(opened):
        return closed
    path = _Path(part, np.concatenate([closed, found]), score)
    realised = np.concatenate([losses.mean(1) for losses in path.losses(risk.loss(part))])
    optimism = np.array([point.accuracy - point.expected_accuracy for point in points])
    aim = next((row for row in opened if realised[row] + optimism[row] <= eps), opened[-1])
    room = 10.0 ** -np.linspace(4, 0, 81)[:-1, None]
    slope = np.where(found[aim] < 1, 1 - (1 - found[aim]) * room, found[aim])
    return np.concatenate([closed, slope, found[: aim + 1][::-1]])


def _halves(records: ExitRecords, seed: int) -> tuple[ExitRecords, ExitRecords]:
    """Samples to choose the path on, and samples to certify on."""
    rows = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    chosen = round(SPLIT * len(records))
    if chosen < 2:
        raise DataError(f"per_exit=True needs samples to search on as well: got only {len(records)} records.")
    return records.take(rows[:chosen]), records.take(rows[chosen:])


def _order(n: int, seed: int) -> NDArray[np.int64]:
    """The order of bets in `wsr`: independent of the data."""
    return np.random.default_rng(seed).permutation(n)


# --- Requests and certificates


def _cheapest(fractions: _Floats, ok: Sequence[bool] | NDArray[np.bool_]) -> int:
    """The cheapest policy before the first that is not cleared; the one with all exits closed needs no test."""
    end = 1 + int(np.logical_and.accumulate(ok).sum())
    return int(fractions[:end].argmin())


def _certified(
    point: OperatingPoint,
    losses: _Floats,
    certified: bool,
    risk: str,
    eps: float,
    delta: float,
    method: str,
    data: str,
    per_exit: bool = False,
    seed: int = 0,
) -> OperatingPoint:
    """Attach a certificate to the chosen point, from its losses (1, N); warns if nothing was certified."""
    scale, n, bound = RISKS[risk].scale, losses.shape[1], None
    if certified:
        # the bound has a finite step, or is from another test; the test at eps itself was passed
        bound = 0.0 if point.policy.closed else min(eps, upper_bound(method, losses, scale, delta))
    else:
        needed = samples_needed(eps, delta, method, scale)
        why = (
            f"{n} samples are too few: at least {needed} are needed, more if there are losses"
            if n < needed
            else f"on these {n} samples even the safest policy may lose more (without any loss, {needed} would do)"
        )
        warnings.warn(
            f"No early exit is certified for {risk} <= {eps:g} with delta={delta:g} ({method}): {why}. "
            "All exits stay closed. Record more samples, or accept a larger eps or delta.",
            SurgeryWarning,
            stacklevel=3,
        )
    # in the order of the fields
    found = (point.thresholds, str(point.score), n, float(losses.mean()), certified, bound)
    certificate = Certificate(risk, eps, delta, method, *found, data, per_exit, seed)
    return replace(point, rule=f"risk_control({risk} <= {eps:g}, delta={delta:g})", certificate=certificate)


def _levels(eps: float, delta: float) -> tuple[float, float]:
    limits = {"above": 0, "below": 1, "hint": "0.01 is one percent."}
    return number("eps", eps, **limits), number("delta", delta, **limits)


def _suits(risk: Risk, task: Task) -> bool:
    form = task.rank == CLASSIFICATION.rank or not risk.vectors
    return fits(risk.tasks, task) and form and (task.whole or not risk.whole_outcomes)


def _risk(name: str, records: ExitRecords) -> Risk:
    risk = RISKS[name]
    if not _suits(risk, records.task):
        others = ", ".join(repr(other) for other, r in RISKS.items() if _suits(r, records.task))
        raise ConfigError(f"The risk {name!r} is not defined for the task {records.task.name!r}. These are: {others}.")
    if risk.labelled and not records.labelled:
        free = ", ".join(repr(other) for other, r in RISKS.items() if not r.labelled and _suits(r, records.task))
        raise DataError(f"The risk {name!r} needs labels, and these records have none. Without labels: {free}.")
    return risk


def _method(name: str | None, risk: str) -> str:
    fitting = RISKS[risk].scale.methods()
    if name is not None and name not in fitting:
        raise ConfigError(
            f"Method {name!r} does not fit the losses of {risk!r}. Valid: {', '.join(map(repr, fitting))}."
        )
    return name or fitting[0]


def _counted(risk: str) -> str:
    method = RISKS[risk].scale.counted()
    if method is None:
        raise ConfigError(f"A risk table counts losses, and those of {risk!r} are not integers. Use risk_control.")
    return method
