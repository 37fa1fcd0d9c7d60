"""The state of an audit: plain data that survives restarts, and can be joined over workers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ee_surgery.checks import instance, path
from ee_surgery.errors import DataError
from ee_surgery.files import atomic_write, read_object
from ee_surgery.monitoring.drift import Traffic
from ee_surgery.monitoring.losses import Losses, Summary, log_evidence, recent

FORMAT_VERSION = 1
ENOUGH = 1000
"""Losses that the current risk is about."""
ALARMS_KEPT = 1000
Loss = Literal["disagreement", "outcome"]
Kind = Literal["answers", "labels"]


@dataclass(frozen=True)
class Promise:
    """What is tested; the same for all workers of a service."""

    epsilon: float
    """Limit of the risk: the mean loss of answers against the original's, in (0, 1)."""
    alpha: float
    """Chance of ever raising a false alarm, of each process."""
    loss: Loss
    label_epsilon: float | None
    """Limit of the mean loss against late labels; None: none are expected."""
    period: float
    """Seconds of an epoch."""

    def limit(self, kind: Kind) -> float | None:
        """Of one of the two processes."""
        return self.epsilon if kind == "answers" else self.label_epsilon


@dataclass(frozen=True, order=True)
class Alarm:
    """A promise was broken, at level alpha."""

    time: float
    """Seconds since 1970."""
    stream: str
    """The worker's stream of losses that raised it."""
    kind: Kind
    """`answers` or `labels`: what the losses are against."""
    log_evidence: float
    """Natural logarithm of the wealth; log(1 / alpha) is enough."""
    audited: int
    """Losses behind it."""
    mean: float
    """Of them."""
    action: str
    """What was done."""

    def __str__(self) -> str:
        what = "the original's answers" if self.kind == "answers" else "late labels"
        return (
            f"The risk against {what} is above its limit: evidence 1 to {math.exp(min(self.log_evidence, 700)):.3g} "
            f"after {self.audited} audited samples, mean loss {self.mean:.2%}. {self.action}"
        )


@dataclass
class Stream:
    """What one worker has seen since its last restart of the bets."""

    answers: Losses
    labels: Losses | None
    updates: int = 0
    """Grows with every change: of two states of a stream, that with more is the later one."""
    served: int = 0
    """Samples of routed runs, audited or not."""
    audit_macs: int = 0
    """Paid for audits."""
    routed_macs: int = 0
    """Of the audited samples up to their exits."""
    original_macs: int = 0
    """What they cost in the original."""
    traffic: Traffic | None = None
    """Where audited samples leave, at the operating point of the last one."""

    def losses(self, kind: Kind) -> Losses | None:
        """Of one of the two processes."""
        return self.answers if kind == "answers" else self.labels

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rest = {name: getattr(self, name) for name in _COUNTS}
        labels = None if self.labels is None else self.labels.to_dict()
        traffic = None if self.traffic is None else asdict(self.traffic)
        return {"answers": self.answers.to_dict(), "labels": labels, **rest, "traffic": traffic}


_COUNTS = ("updates", "served", "audit_macs", "routed_macs", "original_macs")


@dataclass(frozen=True)
class AuditState:
    """An audit as data: the promise, each worker's stream of losses, and alarms.

    `merge` is a union: of each stream the later state. So it may be done in any order, in any grouping, and twice. The
    evidence of several streams is one wealth whose every bet has seen all their losses (`losses.log_evidence`).
    """

    promise: Promise
    streams: Mapping[str, Stream] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()

    @classmethod
    def merge(cls, *states: AuditState) -> AuditState:
        """Join the states of several workers.

        Raises:
            DataError: none, or of different promises.
        """
        for each in states:
            instance("state", each, AuditState, DataError)
        if len({each.promise for each in states}) != 1:
            raise DataError(f"States of {len({each.promise for each in states})} promises: only those of one can join.")
        streams: dict[str, Stream] = {}
        for state in states:
            for name, stream in state.streams.items():
                known = streams.get(name)
                if known is None or _order(stream) > _order(known):
                    streams[name] = stream
        alarms = sorted({alarm for state in states for alarm in state.alarms})
        return cls(states[0].promise, dict(sorted(streams.items())), tuple(alarms[-ALARMS_KEPT:]))

    def losses(self, kind: Kind = "answers") -> list[Losses]:
        """Of all streams, in the order of their names."""
        return [own for _, each in sorted(self.streams.items()) if (own := each.losses(kind)) is not None]

    def log_evidence(self, kind: Kind = "answers") -> float:
        """Log of the evidence that the risk is above its limit; 0 before there are losses."""
        losses = self.losses(kind)
        return log_evidence(losses) if losses else 0.0

    def broken(self, kind: Kind = "answers") -> bool:
        """Whether the promise is refuted now, at level alpha."""
        return self.log_evidence(kind) >= -math.log(self.promise.alpha)

    def risk(self, kind: Kind = "answers") -> Summary:
        """The latest losses, some `ENOUGH` of them: their mean is the current risk."""
        losses = self.losses(kind)
        return recent(losses, ENOUGH)[1] if losses else Summary(0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; JSON keeps every bit of it."""
        return {
            "format_version": FORMAT_VERSION,
            "promise": asdict(self.promise),
            "streams": {name: stream.to_dict() for name, stream in sorted(self.streams.items())},
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditState:
        """The inverse of `to_dict`; every number is checked.

        Raises:
            DataError: it is no such state, or one that no audit could be in.
        """
        try:
            form = _StateForm.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"No state of an audit: {place or 'it'}: {first['msg']}.") from error
        plain = form.model_dump()
        promise = Promise(**plain["promise"])
        streams = {name: _stream(each, promise) for name, each in plain["streams"].items()}
        return cls(promise, streams, tuple(Alarm(**alarm) for alarm in plain["alarms"]))

    def save(self, where: str | os.PathLike[str], *, durable: bool = True) -> None:
        """Write it as JSON, whole or not at all.

        Args:
            where: path of the file.
            durable: wait until it is on the disk.
        Raises:
            WriteError: it cannot be written.
        """
        with atomic_write(path("where", where), durable=durable) as partial:
            partial.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, where: str | os.PathLike[str]) -> AuditState:
        """Read what `save` wrote. The file may be anyone's: nothing of it is trusted.

        Raises:
            DataError: it is missing, too large, or no state of an audit.
        """
        place = path("where", where)
        try:
            return cls.from_dict(read_object(place, _LARGEST))
        except DataError as error:
            raise DataError(f"{place}: {error.args[0]}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{place} is no state of an audit: {error}.") from error


def _order(stream: Stream) -> tuple[int, str]:
    return stream.updates, json.dumps(stream.to_dict(), sort_keys=True)


def _stream(data: dict[str, Any], promise: Promise) -> Stream:
    labels, limit = data["labels"], promise.label_epsilon
    if (labels is None) != (limit is None):
        raise DataError("Losses against labels, and no limit of them, or the other way round.")
    return Stream(
        Losses.from_dict(data["answers"], promise.epsilon, promise.alpha),
        None if labels is None or limit is None else Losses.from_dict(labels, limit, promise.alpha),
        **{name: data[name] for name in _COUNTS},
        traffic=None if data["traffic"] is None else Traffic.from_dict(data["traffic"]),
    )


def without(state: AuditState, names: Iterable[str]) -> AuditState:
    """A state without some streams."""
    gone = set(names)
    return replace(state, streams={name: each for name, each in state.streams.items() if name not in gone})


# --- forms of the file: typed and bounded before anything is made of it

_LARGEST = 64 << 20  # bytes of a file: a hundred workers' streams of many years
_Count = Annotated[int, Field(ge=0, le=1 << 62)]
_Macs = Annotated[int, Field(ge=0, le=1 << 90)]
_Epoch = Annotated[int, Field(ge=0, le=1 << 40)]
_Name = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Level = Annotated[float, Field(gt=0, lt=1)]
_Number = Annotated[float, Field(ge=-1e18, le=1e18)]
_Text = Annotated[str, Field(max_length=100_000)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _BelowForm(_Form):
    born: _Epoch
    epoch: Annotated[int, Field(ge=-1, le=1 << 40)]
    log_bets: Annotated[list[_Number], Field(min_length=1, max_length=64)] | None


class _LossesForm(_Form):
    born: _Epoch
    rows: Annotated[list[Annotated[list[_Epoch | _Number], Field(min_length=3, max_length=66)]], Field(max_length=8192)]
    below: _BelowForm
    renewals: _Count
    renewed: _Epoch | None


class _TrafficForm(_Form):
    point: _Text
    exits: Annotated[list[_Count], Field(min_length=2, max_length=1001)]
    edges: Annotated[list[Annotated[list[_Number], Field(min_length=9, max_length=9)]], Field(max_length=1000)]
    scores: Annotated[list[Annotated[list[_Count], Field(min_length=10, max_length=10)]], Field(max_length=1000)]


class _StreamForm(_Form):
    answers: _LossesForm
    labels: _LossesForm | None
    updates: _Count
    served: _Count
    audit_macs: _Macs
    routed_macs: _Macs
    original_macs: _Macs
    traffic: _TrafficForm | None


class _PromiseForm(_Form):
    epsilon: _Level
    alpha: _Level
    loss: Loss
    label_epsilon: _Level | None
    period: Annotated[float, Field(gt=0, le=1e9)]


class _AlarmForm(_Form):
    time: Annotated[float, Field(ge=0, le=1e12)]
    stream: _Name
    kind: Kind
    log_evidence: _Number
    audited: _Count
    mean: Annotated[float, Field(ge=0, le=1)]
    action: Annotated[str, Field(max_length=1000)]


class _StateForm(_Form):
    format_version: Literal[1]
    promise: _PromiseForm
    streams: Annotated[dict[_Name, _StreamForm], Field(max_length=10_000)]
    alarms: Annotated[list[_AlarmForm], Field(max_length=1000)]
