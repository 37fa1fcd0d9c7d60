"""Audits under `ee.Engine`: the statistics are those of auditing `predict` of the same requests, come what may."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

import ee_surgery as ee
from ee_surgery.backbone.inputs import Batch
from ee_surgery.runtime.router import InFlight, Router
from ee_surgery.serving import audits
from ee_surgery.serving.lanes import Request
from tests.serving.test_engine import Held, split
from tests.zoo import POLICIES, two_exits

SIZES = [1, 7, 3, 20, 9, 1, 1, 12, 30, 4]


def audited(model: ee.EarlyExitModel, **options: Any) -> ee.Audit:
    return ee.Audit(model, **{"epsilon": 0.999, "q": 0.4, "seed": 5, "waiting": 8, "clock": lambda: 6e7, **options})


def seen(audit: ee.Audit) -> dict[str, Any]:
    (stream,) = audit.state.streams.values()
    return stream.to_dict()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The samples chosen of each request that an audit was asked about."""
    found: list[list[int]] = []
    ask = ee.Audit._watch

    def watch(audit: ee.Audit, router: Router, size: int) -> Any:
        watched = ask(audit, router, size)
        found.append([] if watched is None else sorted(watched.chosen))
        return watched

    monkeypatch.setattr(ee.Audit, "_watch", watch)
    return found


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """All counts and losses are the same; wealth, a float, within rounding."""
    rows, others = (torch.tensor(each["answers"].pop("rows")) for each in (one, other))
    torch.testing.assert_close(rows, others)
    assert one.pop("traffic")["exits"] == other.pop("traffic")["exits"]
    below, beyond = (each["answers"].pop("below")["log_bets"] for each in (one, other))
    torch.testing.assert_close(below, beyond)
    assert one == other


@pytest.mark.parametrize(("branch", "score", "fallback", "units"), POLICIES)
def test_statistics_are_those_of_predict(
    branch: str, score: str, fallback: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = two_exits(branch, units), torch.randn(sum(SIZES), 3, 16, 16)
    split(model, x, score=score, fallback=fallback)
    chosen = spied(monkeypatch)
    with audited(model) as audit:
        for part in x.split(SIZES):
            model.predict(part)
    alone, expected, asked = seen(audit), audit.alarms, [*chosen]
    chosen.clear()
    with audited(model) as audit, ee.Engine(model, max_batch=8) as engine:
        futures = [engine.submit(part) for part in x.split(SIZES)]
        assert len([future.result(60) for future in futures]) == len(SIZES)
        engine.close()
    assert chosen == asked
    assert (sum(map(len, asked)), expected) == (alone["answers"]["rows"][0][1], audit.alarms)
    close(seen(audit), alone)
    assert model.receipt().unchanged


def test_statistics_of_compiled_runs_are_those_of_predict(model: ee.EarlyExitModel) -> None:
    x = torch.randn(sum(SIZES), 3, 16, 16)
    split(model, x)
    with audited(model) as audit:
        for part in x.split(SIZES):
            model.predict(part)
    alone = seen(audit)
    model.compile(backend="eager")
    with audited(model) as audit, ee.Engine(model, max_batch=8) as engine:
        assert len([*engine.map(x.split(SIZES))]) == len(SIZES)
        engine.close()
    close(seen(audit), alone)


def test_a_request_that_is_answered_early_waits_for_those_before_it(
    model: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    add = ee.Audit._add

    def spy(audit: ee.Audit, name: str, groups: Any) -> None:
        order.append(sum(len(group.answers) for group in groups))
        add(audit, name, groups)

    monkeypatch.setattr(ee.Audit, "_add", spy)
    answered: list[int] = []
    with audited(model, q=1.0), ee.Engine(model, max_batch=4) as engine:
        futures = []
        for size in (3, 2, 4, 1):
            model.operate(thresholds=2.0 if size == 3 else -1.0)  # the first stays to the end, the others leave at once
            futures.append(engine.submit(torch.randn(size, 3, 16, 16)))
            futures[-1].add_done_callback(lambda _, size=size: answered.append(size))
        for future in futures:
            future.result(60)
        engine.close()
    assert order == [3, 2, 4, 1]
    assert sorted(answered) == [1, 2, 3, 4]


def test_requests_without_an_answer_have_no_losses_and_leave_nothing(model: ee.EarlyExitModel, held: Held) -> None:
    x = torch.randn(4, 3, 16, 16)
    model.operate(thresholds=2.0)
    clock = Clock()
    with audited(model, q=1.0) as audit, ee.Engine(model, max_batch=4, clock=clock) as engine:
        first = engine.submit(x)
        assert held.reached.wait(60)
        late, cancelled, fine = engine.submit(x, timeout_s=1), engine.submit(x), engine.submit(x[:3])
        kept = [weakref.ref(request.watched) for request in engine._inbox]
        clock.now += 2
        assert cancelled.cancel()
        held.go_on.set()
        first.result(60)
        fine.result(60)
        with pytest.raises(ee.RequestTimeoutError):
            late.result(60)
        engine.close()
    assert seen(audit)["answers"]["rows"][0][1] == 7  # losses: of the first and the last
    assert not engine._audits._requests
    del first, late, cancelled, fine, engine
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_that_are_run_again_alone_keep_their_choice(
    model: ee.EarlyExitModel, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(20, 3, 16, 16)
    chosen = spied(monkeypatch)
    with audited(model) as audit:
        for i, part in enumerate(x.split(4)):
            if i != 2:
                model.predict(part)
    asked = [*chosen]
    chosen.clear()
    poisoned = x.clone()
    poisoned[8, 0, 0, 0] = 77.0
    advance, run = Router._advance, model.engine.run

    def refuse(inputs: Tensor) -> None:
        if inputs.shape[1:] == (3, 16, 16) and (inputs == 77.0).any():
            raise RuntimeError("poisoned")

    def advance_if_sound(router: Router, k: int, flight: InFlight) -> InFlight:
        refuse(flight.live[0])
        return advance(router, k, flight)

    def run_if_sound(batch: Any, *how: Any) -> ee.ExitOutput:
        refuse(batch.tensors[0])
        return run(batch, *how)

    with audited(model) as audit, ee.Engine(model, max_batch=32) as engine:
        blocker = engine.submit(torch.randn(1, 3, 16, 16).fill_(torch.nan))
        assert held.reached.wait(60)
        monkeypatch.setattr(Router, "_advance", advance_if_sound)
        monkeypatch.setattr(model.engine, "run", run_if_sound)
        futures = [engine.submit(part) for part in poisoned.split(4)]
        held.go_on.set()
        blocker.result(60)
        failed = [future.exception(60) for future in futures]
        engine.close()
    assert [error is None for error in failed] == [True, True, False, True, True]
    stream = seen(audit)
    assert stream["served"] == 21
    whole = [len(each) for each in chosen]
    assert len(asked) == 4
    assert len(whole) == 6  # each request was asked about once, though four ran twice
    assert stream["answers"]["rows"][0][1] == sum(whole) - whole[3]


@pytest.mark.parametrize("action", ["tighten", "disable"])
def test_an_alarm_takes_effect_for_later_requests(model: ee.EarlyExitModel, action: Any) -> None:
    x = torch.randn(256, 3, 16, 16)
    ee.calibrate(model, [x])
    model.operate(model.frontier[0])
    told: list[ee.Alarm] = []
    with (
        audited(model, epsilon=1e-4, q=1.0, on_alarm=action, callback=told.append) as audit,
        ee.Engine(model, max_batch=16) as engine,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ee.SurgeryWarning)
        early = engine.submit(x).result(60)
        engine.submit(torch.randn(1, 3, 16, 16)).result(60)  # the worker is through with the audit of the first
        assert len(told) == 1
        assert model.operating_point == (model.frontier[1] if action == "tighten" else None)
        later = engine.submit(x).result(60)
    assert int((early.exit_index < 2).sum()) > 0
    if action == "disable":
        assert later.exit_index.tolist() == [2] * 256
    assert audit.alarms[0].kind == "answers"


def test_an_audit_that_fails_is_said_and_harms_no_request(
    model: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(16, 3, 16, 16)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Router, "follow", broken)
    model.operate(thresholds=-1.0)
    with audited(model, q=1.0, waiting=4) as audit, ee.Engine(model) as engine, caplog.at_level(logging.ERROR):
        for part in x.split(4):
            assert engine.submit(part).result(60).exit_index.tolist() == [0] * 4
        engine.close()
    assert caplog.text.count("no memory left") >= 4
    assert not audit._waiting.groups


def test_what_waits_behind_a_slow_request_is_bounded(model: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 16, 16)
    model.operate(thresholds=-1.0)
    with audited(model, q=1.0), ee.Engine(model) as engine:
        route = engine._served.route(engine._served.admit(x))
        slow, quick, later = (Request(Future(), route, None, 4, 0.0, watched=route.watch(4)) for _ in range(3))
        queue = audits.AuditQueue()
        queue.enter(slow)
        queue.enter(quick)
        assert quick.watched is not None
        route.visit(0, route.enter(Batch({"x": x}, {"x": 0})), audits.observer([(quick, row) for row in range(4)]))
        assert quick.watched.bytes > 0
        monkeypatch.setattr(audits, "MOST_BYTES", quick.watched.bytes - 1)
        queue.enter(later)
        assert later.watched is None
        assert not queue.hand_over()  # the slow one is not through
