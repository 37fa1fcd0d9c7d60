"""What an audit has found so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.monitoring.drift import Drift
from ee_surgery.monitoring.state import Alarm, AuditState, Kind
from ee_surgery.policies.operating_point import OperatingPoint


@dataclass(frozen=True)
class Process:
    """One of the two tests: against the original's answers, or against late labels."""

    epsilon: float
    """Limit of the risk."""
    alpha: float
    log_evidence: float
    """Natural logarithm of the wealth; an alarm is due at log(1 / alpha)."""
    broken: bool
    """Whether it is there now."""
    losses: int
    """How many, of all workers."""
    risk: float
    """Mean of the latest 1,000 of them, or of all where there are fewer; NaN of none."""
    bounds: tuple[float, float]
    """Confidence bounds on the risk in that time, at 1 - alpha. Each span of time has its own: they hold at every
    moment of it, and not for all spans at once."""
    renewals: int
    """How often bets on the promise being kept have won, of all workers: each time the risk was shown to be below the
    limit, at level alpha."""
    renewed: float | None
    """When that was last, in seconds since 1970, at the precision of an epoch."""

    @classmethod
    def of(cls, state: AuditState, kind: Kind) -> Process:
        """Of a state with a limit for it."""
        limit, alpha = state.promise.limit(kind), state.promise.alpha
        assert limit is not None
        losses, late = state.losses(kind), state.risk(kind)
        renewed = max((each.renewed for each in losses if each.renewed is not None), default=None)
        return cls(
            limit, alpha, state.log_evidence(kind), state.broken(kind), sum(each.all.losses for each in losses),
            late.mean, late.interval(alpha), sum(each.renewals for each in losses),
            None if renewed is None else renewed * state.promise.period,
        )  # fmt: skip

    def __str__(self) -> str:
        state = "broken" if self.broken else f"renewed {self.renewals} times" if self.renewals else "not refuted"
        low, high = self.bounds
        risk = "no losses yet" if math.isnan(self.risk) else f"{self.risk:.2%} ({low:.2%} to {high:.2%})"
        wealth = math.exp(min(self.log_evidence, 700))
        return (
            f"{risk}, promised at most {self.epsilon:.2%}: {state}; wealth {wealth:.3g} of the {1 / self.alpha:.3g} of "
            f"an alarm, {self.losses} losses"
        )


@dataclass(frozen=True)
class AuditReport:
    """What an audit has found so far, over all of its workers."""

    answers: Process
    """Against the original's answers."""
    labels: Process | None
    """Against late labels, where a limit was given."""
    served: int
    """Samples of routed runs."""
    audited: int
    """How many of them were chosen."""
    overhead: float
    """MACs paid for audits, as a fraction of those of all routed runs, by the audited samples; NaN without any."""
    original: float
    """The same as a fraction of what the original would have cost for all."""
    drift: Drift | None
    """Where audited samples leave, at the operating point of the last one."""
    alarms: tuple[Alarm, ...]

    @classmethod
    def of(
        cls,
        state: AuditState,
        exits: Sequence[str] = (),
        point: OperatingPoint | None = None,
        records: ExitRecords | None = None,
    ) -> AuditReport:
        """Of a state; that of one worker, or of several.

        Args:
            state: to be reported.
            exits: names of the exits, the original's head last; numbers when left out.
            point: the operating point of the counts, to compare with.
            records: of the calibration data.
        """
        streams = list(state.streams.values())
        audit, routed, original = (
            sum(getattr(each, name) for each in streams) for name in ("audit_macs", "routed_macs", "original_macs")
        )
        served, audited = sum(each.served for each in streams), sum(each.answers.all.losses for each in streams)
        traffic = None
        for each in sorted(streams, key=lambda stream: -stream.answers.latest):
            if each.traffic is not None:
                traffic = each.traffic if traffic is None else traffic.joined(each.traffic)
        names = exits or [str(k) for k in range(len(traffic.exits) if traffic else 0)]
        drift = None if traffic is None else Drift.of(traffic, names, point, records)
        share = served / audited if audited else math.nan  # samples that an audited one stands for
        return cls(
            Process.of(state, "answers"),
            None if state.promise.label_epsilon is None else Process.of(state, "labels"),
            served,
            audited,
            audit / (routed * share) if routed and served else math.nan,
            audit / (original * share) if original and served else math.nan,
            drift,
            state.alarms,
        )

    def __str__(self) -> str:
        lines = [f"risk against the original  {self.answers}"]
        if self.labels is not None:
            lines.append(f"risk against labels        {self.labels}")
        lines.append(f"cost                       {self.audited} of {self.served} samples audited{self._cost}")
        if self.drift is not None:
            lines.append(str(self.drift))
        return "\n".join([*lines, *map(str, self.alarms)])

    @property
    def _cost(self) -> str:
        if math.isnan(self.overhead):
            return ""
        return f": {self.overhead:+.2%} MACs, {self.original:.2%} of the original's"
