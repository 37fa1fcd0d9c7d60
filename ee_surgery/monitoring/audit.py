"""Audit a model in service: is the promise of its operating point still kept?"""

from __future__ import annotations

import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import choice, count, instance, number, optional, path, positive
from ee_surgery.errors import ConfigError, DataError, SurgeryError, SurgeryWarning
from ee_surgery.model import EarlyExitModel
from ee_surgery.monitoring.drift import Traffic, identity
from ee_surgery.monitoring.followed import MOST_BYTES, Group, Waiting, unkept
from ee_surgery.monitoring.losses import Losses
from ee_surgery.monitoring.report import AuditReport
from ee_surgery.monitoring.state import ALARMS_KEPT, Alarm, AuditState, Kind, Loss, Promise, Stream, without
from ee_surgery.monitoring.watched import Watched
from ee_surgery.names import AlarmAction
from ee_surgery.policies.operating_point import OperatingPoint, describe
from ee_surgery.runtime.router import ExitOutput, Router
from ee_surgery.text import visible

_KINDS: tuple[Kind, ...] = get_args(Kind)


class Audit:
    """Tests in service, at any time and without labels, whether answers are as good as promised.

    Each sample is chosen with probability `q`. One that left early is also run to the end: only the rest of the depth
    is paid, later and together with others, and its answer is out by then. Its loss is whether the original answers
    otherwise; samples that reach the original's head have none. Bets that the mean loss, given all that came before,
    exceeds `epsilon` are fair as long as it does not, so the chance of ever raising a false alarm is at most `alpha`:
    whatever the data do, and whenever one looks (`monitoring/betting.py`).

    It watches the model from the moment it is made, until `close()` or the end of a `with` block. A model has one audit
    at a time; its copies have none. Runs without exits are not counted.

    Args:
        branched: the model that serves.
        epsilon: limit of the risk, in (0, 1): the mean loss of all samples of routed runs. 0.02 promises that at most
            2 % of the answers are not the original's.
        alpha: chance of ever raising a false alarm, in (0, 1).
        q: share of the samples to audit, in (0, 1].
        loss: `disagreement`, 1 where answers differ, see `Task.agrees`; or `outcome`, what the task's outcome lacks to
            1, the original's answer taken as the truth: of maps the share of pixels.
        on_alarm: `warn`; `tighten`, the next safer operating point of the model's frontier; or `disable`, the
            original's answers from then on. All three warn, and call `callback`. Where there is no safer point,
            `tighten` disables.
        callback: called with each `Alarm`, in the thread that found it, after the action. An error in it is a warning.
        label_epsilon: limit of the mean loss against late labels, in (0, 1), see `labels`; None: none are expected.
        records: of the calibration data, to compare scores with; exit shares are on the operating point.
        path: JSON file of the state: read if it is there, written once per period, at alarms and at the end. One file
            per worker.
        waiting: samples that left early to run together; more are faster, and known later.
        period: seconds of an epoch. Bets start anew every epoch, so that a change is found soon.
        seed: of the choice of samples; None: the system's randomness, which nothing in the data can know.
        clock: seconds since 1970.
    Raises:
        ConfigError: a setting outside its range, or the model has an audit.
        DataError: the file is no state of an audit, or of another promise.
    Source: Timans et al., UAI 2025, arXiv:2506.16416; Waudby-Smith & Ramdas, arXiv:2010.09686. They monitor one stream
    from its start; here bets start anew, samples are chosen, and workers' streams join.
    """

    def __init__(
        self,
        branched: EarlyExitModel,
        *,
        epsilon: float,
        alpha: float = 0.05,
        q: float = 0.05,
        loss: Loss = "disagreement",
        on_alarm: AlarmAction = "warn",
        callback: Callable[[Alarm], object] | None = None,
        label_epsilon: float | None = None,
        records: ExitRecords | None = None,
        path: str | os.PathLike[str] | None = None,
        waiting: int = 32,
        period: float = 60.0,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.branched = instance("branched", branched, EarlyExitModel)
        self.promise = Promise(
            epsilon=_level("epsilon", epsilon),
            alpha=_level("alpha", alpha),
            loss=choice("loss", loss, get_args(Loss)),
            label_epsilon=optional(_level)("label_epsilon", label_epsilon),
            period=positive("period", period),
        )
        """What is tested."""
        self.q = number("q", q, above=0, high=1)
        self.on_alarm: AlarmAction = choice("on_alarm", on_alarm, get_args(AlarmAction))
        if callback is not None and not callable(callback):
            raise ConfigError("callback must be a function of an Alarm.")
        self.callback, self.clock = callback, clock
        self.records = optional(lambda name, value: instance(name, value, ExitRecords))("records", records)
        self.path = _path(path)
        self._most = count("waiting", waiting)
        self._rng = np.random.default_rng(optional(count)("seed", seed, low=0))
        self._gap = self._next()
        self._waiting = Waiting()
        self._lock = threading.RLock()  # of the state
        self._settling = threading.Lock()  # one batch at a time, so that losses are bet on in their order
        self._gone: set[str] = set()
        self._saved = -math.inf
        self._state = self._resumed()
        engine = branched.engine
        if engine.audit is not None:
            raise ConfigError("This model has an audit: close() it first.")
        engine.audit = self._watch

    # --- what it says

    @property
    def state(self) -> AuditState:
        """All streams that it knows, as data of their own: to be sent to others, and merged."""
        with self._lock:
            return AuditState.from_dict(self._state.to_dict())

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All alarms, the latest last."""
        return self._state.alarms

    def report(self) -> AuditReport:
        """Risk, evidence, cost and drift as of now; samples that wait are run first."""
        self.flush()
        point = self.branched.operating_point
        with self._lock:
            traffic = self._stream.traffic
            same = traffic is not None and point is not None and identity(point) == traffic.point
            names = (*self.branched.exits, "original")
            return AuditReport.of(self._state, names, point if same else None, self.records if same else None)

    def __str__(self) -> str:
        return str(self.report())

    # --- what it is told

    def labels(self, answers: Tensor | ExitOutput, labels: Any) -> None:
        """Late labels of samples that were answered: their losses, what the task's outcome lacks to 1, have bets of
        their own against `label_epsilon`.

        Which samples get labels must not depend on how they were answered.

        Args:
            answers: what they were answered: logits, (n, C, ...), or the output of `predict`.
            labels: n of them, as the model's task takes them; ignored ones count nowhere.
        Raises:
            ConfigError: no `label_epsilon` was given.
            DataError: they are no labels, or not one for each answer.
        """
        if self.promise.label_epsilon is None:
            raise ConfigError("Labels need a limit of their own: ee.Audit(..., label_epsilon=0.1).")
        logits = instance("answers", answers.logits if isinstance(answers, ExitOutput) else answers, Tensor, DataError)
        task, rows = self.branched.task, len(logits)
        target = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
        target = task.check_target(target.to(logits.device), task.classes(self.branched.num_classes), rows)
        counts = ~task.ignored(target)
        losses = unkept(task.outcome(logits[counts], task.hard(target[counts])))
        with self._lock:
            if losses and self._stream.labels is not None:
                self._stream.labels.add(losses, self._epoch)
                self._stream.updates += 1
        self._look()

    def join(self, *others: AuditState) -> None:
        """Take in the states of other workers: evidence is then theirs and its own together.

        A state may be joined again, and then counts as its later one. Streams from before a `reset` or an action stay
        out.

        Raises:
            DataError: of another promise.
        """
        with self._lock:
            own = self._state.streams[self._name]
            known = AuditState.merge(self._state, *(without(each, {*self._gone, self._name}) for each in others))
            self._state = replace(known, streams={**known.streams, self._name: own})
        self._look()

    def flush(self) -> None:
        """Run all samples that wait to the end, and look at the evidence."""
        with self._settling:
            with self._lock:
                name, waiting = self._name, self._waiting
                self._waiting = Waiting()
            settled = [*waiting.losses(self.branched.task, self.promise.loss)] if waiting.groups else []
            if settled:
                self._settle(name, settled)
        self._look()

    def reset(self) -> None:
        """Begin anew with a wealth of 1: after a cause was found, or the operating point was chosen again."""
        with self._lock:
            self._gone.update(self._state.streams)
            self._waiting = Waiting()
            self._state = self._fresh(self._state.alarms)
            self._saved = -math.inf  # a restart must not find what was given up
        self._look()

    def save(self) -> None:
        """Write the state to `path`.

        Raises:
            ConfigError: there is no `path`.
            WriteError: it cannot be written.
        """
        if self.path is None:
            raise ConfigError("There is no file to save to: ee.Audit(..., path='audit.json').")
        with self._lock:
            self._own.save(self.path)
            self._saved = self.clock()

    def close(self) -> None:
        """Run what waits, save, and watch no longer."""
        if self.branched.engine.audit == self._watch:
            self.branched.engine.audit = None
        self.flush()
        if self.path is not None:
            self.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- watching runs

    def _watch(self, router: Router, size: int) -> Watched | None:
        """Choose samples of a run; None, most often at small batches, if none of them is. It never runs any."""
        with self._lock:
            name = self._name
            self._stream.served += size
            chosen: list[int] = []
            while self._gap < size:
                chosen.append(self._gap)
                self._gap += 1 + self._next()
            self._gap -= size
            late = self._late
        if not chosen and not late:
            return None
        return Watched(router, size, chosen, partial(self._add, name))

    @property
    def _late(self) -> bool:
        """Whether samples have waited for a whole period."""
        return bool(self._waiting.groups) and self.clock() - self._waiting.born >= self.promise.period

    def _next(self) -> int:
        """How many samples are not chosen before the next one is."""
        return int(self._rng.geometric(self.q)) - 1

    def _add(self, name: str, groups: list[Group]) -> None:
        """Chosen samples of a run that is through; none if bets began anew meanwhile: it had the point of before."""
        with self._lock:
            if name != self._name:
                return
            late, now = self._late, self.clock()
            for group in groups:
                self._waiting.add(group, now)
            waiting = self._waiting
            full = late or waiting.left >= self._most or waiting.bytes >= MOST_BYTES or waiting.shared
            full = full or len(waiting.groups) >= 64 * self._most  # hardly a sample leaves early
        if full:
            self.flush()

    def _settle(self, name: str, settled: list[tuple[Group, list[float]]]) -> None:
        with self._lock:
            if name != self._name:
                return
            stream = self._stream
            for group, _ in settled:
                router, size = group.router, len(group.answers)
                stream.audit_macs += group.macs
                stream.routed_macs += router.exit_macs[group.exit_index] * size
                stream.original_macs += router.original_macs * size
                self._count(stream, group)
            stream.answers.add([loss for _, losses in settled for loss in losses], self._epoch)
            stream.updates += 1

    def _count(self, stream: Stream, group: Group) -> None:
        """Where samples left, at the operating point in force; another one starts the counts anew."""
        point = self.branched.operating_point
        if point is None or point.thresholds != group.router.policy.thresholds:
            return  # it was changed since they left
        if stream.traffic is None or stream.traffic.point != identity(point):
            stream.traffic = Traffic.at(point, self.records)
        stream.traffic.add(group.exit_index, group.scores, len(group.answers))

    # --- alarms

    def _look(self) -> None:
        """Raise an alarm where the evidence is enough, and save once per period."""
        with self._lock:
            raised = [self._alarm(kind) for kind in _KINDS if self._due(kind)]
            said = [f"{self.branched.engine.backbone.model_id}: {alarm}" for alarm in raised]
            if self.path is not None and (raised or self.clock() - self._saved >= self.promise.period):
                said += self._write(self.path, durable=bool(raised))
        said += [failed for alarm in raised if (failed := self._call(alarm))]
        for each in said:  # last: where warnings are errors, all else is done
            warnings.warn(each, SurgeryWarning, stacklevel=2)

    def _call(self, alarm: Alarm) -> str:
        """Tell the callback; what it raised, in words."""
        try:
            if self.callback is not None:
                self.callback(alarm)
        except Exception as error:
            return f"The callback of an alarm failed: {type(error).__name__}: {error}"
        return ""

    def _due(self, kind: Kind) -> bool:
        """Whether the evidence is enough, and there was no alarm of it since the bets began."""
        known = any(alarm.kind == kind and alarm.stream == self._name for alarm in self._state.alarms)
        return not known and self.promise.limit(kind) is not None and self._state.broken(kind)

    def _alarm(self, kind: Kind) -> Alarm:
        losses = [each.all for each in self._state.losses(kind)]
        audited = sum(each.losses for each in losses)
        mean = sum(each.total for each in losses) / audited
        evidence, name = self._state.log_evidence(kind), self._name
        alarm = Alarm(self.clock(), name, kind, evidence, audited, min(mean, 1.0), self._act())
        alarms = (*self._state.alarms, alarm)[-ALARMS_KEPT:]
        if self.on_alarm == "warn":
            self._state = replace(self._state, alarms=alarms)
        else:  # other answers from now on: evidence about those so far is none about them
            self._gone.update(self._state.streams)
            self._waiting = Waiting()
            self._state = self._fresh(alarms)
        return alarm

    def _act(self) -> str:
        """Do what an alarm asks for; in words."""
        if self.on_alarm == "warn":
            return "Nothing was changed."
        safer = self._safer() if self.on_alarm == "tighten" else None
        self.branched.operate(safer)
        if safer is None or safer.policy.closed:
            why = "no operating point is safer" if self.on_alarm == "tighten" else "as asked"
            return f"Exits are disabled, {why}: all answers are the original's now."
        return f"Next safer operating point: {visible(safer)}."

    def _safer(self) -> OperatingPoint | None:
        """The next point of the frontier, which costs more; None where there is none, or nothing to compare by."""
        point, frontier = self.branched.operating_point, self.branched.frontier
        if point is None or frontier is None:
            return None
        own = describe(point)
        for k, each in enumerate(frontier.points):
            if describe(each) == own:
                return next(iter(frontier.points[k + 1 :]), None)
        return next((each for each in frontier.points if each.macs_fraction > point.macs_fraction), None)

    # --- the state

    @property
    def _stream(self) -> Stream:
        """Its own."""
        return self._state.streams[self._name]

    @property
    def _epoch(self) -> int:
        return max(0, int(self.clock() // self.promise.period))

    def _fresh(self, alarms: tuple[Alarm, ...] = ()) -> AuditState:
        """With one stream, of its own, that has seen nothing."""
        self._name = uuid.uuid4().hex
        promise, born = self.promise, self._epoch
        labels = None
        if promise.label_epsilon is not None:
            labels = Losses(promise.label_epsilon, promise.alpha, born)
        stream = Stream(Losses(promise.epsilon, promise.alpha, born), labels)
        return AuditState(promise, {self._name: stream}, alarms)

    @property
    def _own(self) -> AuditState:
        """Without other workers' streams."""
        return replace(self._state, streams={self._name: self._stream})

    def _resumed(self) -> AuditState:
        """What the file says."""
        if self.path is None or not os.path.lexists(self.path):
            return self._fresh()
        found = AuditState.load(self.path)
        if found.promise != self.promise:
            raise DataError(
                f"{self.path} is of another promise: {asdict(found.promise)}, not {asdict(self.promise)}. Give it that "
                "one, or another file."
            )
        if len(found.streams) != 1:
            raise DataError(f"{self.path} is of {len(found.streams)} workers: each resumes from a file of its own.")
        (self._name,) = found.streams
        return found

    def _write(self, where: Path, durable: bool) -> list[str]:
        """Save; a file that cannot be written is no reason not to answer, but is said."""
        self._saved = self.clock()
        try:
            self._own.save(where, durable=durable)
        except SurgeryError as error:
            return [f"The state of the audit was not saved: {error}"]
        return []


def _level(name: str, value: object) -> float:
    return float(number(name, value, above=0, below=1))


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else path("path", value)
