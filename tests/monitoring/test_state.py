"""State of an audit: a union over workers, exact in JSON, refused where no audit could be in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.monitoring.drift import Traffic
from ee_surgery.monitoring.losses import Losses
from ee_surgery.monitoring.state import Promise, Stream

PROMISE = Promise(0.1, 0.05, "disagreement", 0.3, 60.0)


def _stream(losses: list[float], updates: int) -> Stream:
    answers, labels = Losses(0.1, 0.05, 5), Losses(0.3, 0.05, 5)
    for k, loss in enumerate(losses):
        answers.add([loss], 5 + k)
        labels.add([1 - loss], 5 + k)
    traffic = Traffic("null", [1, 2], [[0.1 * k for k in range(9)]], [[0] * 9 + [updates]])
    return Stream(answers, labels, updates, 100, 10**25, 7, 9, traffic)


@st.composite
def _states(draw: st.DrawFn) -> ee.AuditState:
    names = draw(st.lists(st.sampled_from([c * 32 for c in "abc"]), unique=True, max_size=3))
    losses = st.lists(st.sampled_from([0.0, 0.25, 1.0]), max_size=4)
    streams = {name: _stream(draw(losses), draw(st.integers(0, 2))) for name in names}
    times = draw(st.lists(st.sampled_from([1.0, 2.0]), max_size=2))
    alarms = [ee.Alarm(time, "a" * 32, "answers", 3.5, 10, 0.5, "Nothing was changed.") for time in times]
    return ee.AuditState(PROMISE, streams, tuple(sorted(set(alarms))))


def _text(state: ee.AuditState) -> str:
    return json.dumps(state.to_dict())


@settings(deadline=None)
@given(_states(), _states(), _states())
def test_merging_is_a_union_bit_for_bit_in_any_order_and_grouping(
    a: ee.AuditState, b: ee.AuditState, c: ee.AuditState
) -> None:
    merge = ee.AuditState.merge
    assert _text(merge(a, b)) == _text(merge(b, a))
    assert _text(merge(merge(a, b), c)) == _text(merge(a, merge(b, c))) == _text(merge(a, b, c))
    assert _text(merge(a, a)) == _text(a)
    assert _text(merge(merge(a, b), b, a)) == _text(merge(a, b))
    assert merge(a, b).log_evidence() == merge(b, a).log_evidence()


@settings(deadline=None)
@given(_states())
def test_json_keeps_every_bit(state: ee.AuditState) -> None:
    again = ee.AuditState.from_dict(json.loads(_text(state)))
    assert _text(again) == _text(state)
    assert again.log_evidence("labels") == state.log_evidence("labels")
    assert again.promise == state.promise
    assert again.alarms == state.alarms


def test_of_two_states_of_a_worker_the_later_one_counts() -> None:
    early, late = (ee.AuditState(PROMISE, {"a" * 32: _stream([1.0] * n, n)}) for n in (2, 3))
    assert ee.AuditState.merge(late, early).risk().losses == 3


def test_states_of_other_promises_do_not_join() -> None:
    other = ee.AuditState(Promise(0.2, 0.05, "disagreement", None, 60.0))
    with pytest.raises(ee.DataError, match="2 promises"):
        ee.AuditState.merge(ee.AuditState(PROMISE), other)
    with pytest.raises(ee.DataError, match="AuditState"):
        ee.AuditState.merge("state")


def test_a_file_is_written_and_read_again(tmp_path: Path) -> None:
    state = ee.AuditState(PROMISE, {"a" * 32: _stream([0.25, 1.0], 2)})
    state.save(tmp_path / "audit.json")
    assert _text(ee.AuditState.load(tmp_path / "audit.json")) == _text(state)
    assert os.listdir(tmp_path) == ["audit.json"]


NAME = "a" * 32


def _at(*place: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _at("format_version", to=2),
        _at("surplus", to=1),
        _at("promise", "epsilon", to=1.5),
        _at("promise", "epsilon", to="0.1"),
        _at("promise", "label_epsilon", to=None),
        _at("promise", "period", to=0),
        _at("streams", to=[]),
        _at("streams", "../x", to={}),
        _at("streams", NAME, "served", to=-1),
        _at("streams", NAME, "served", to=True),
        _at("streams", NAME, "audit_macs", to=1 << 100),
        _at("streams", NAME, "answers", "rows", 0, 0, to=10**400),
        _at("streams", NAME, "answers", "rows", 0, 1, to=10**17),
        _at("streams", NAME, "answers", "rows", 0, 3, to=1e300),
        _at("streams", NAME, "answers", "rows", to=[[k] * 5 for k in range(10_000)]),
        _at("streams", NAME, "answers", "below", "log_bets", to=[]),
        _at("streams", NAME, "labels", to=None),
        _at("streams", NAME, "traffic", "scores", to=[]),
        _at("streams", NAME, "traffic", "exits", to=[1]),
        _at("streams", NAME, "traffic", "point", to="x" * 200_000),
        _at("alarms", to=[{"time": 1.0}]),
    ],
)
def test_what_no_audit_wrote_is_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    data = ee.AuditState(PROMISE, {NAME: _stream([0.25, 1.0], 2)}).to_dict()
    data = json.loads(json.dumps(data))
    change(data)
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ee.DataError, match=r"audit\.json"):
        ee.AuditState.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": NaN}', "[" * 100_000, "\x00"])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text)
    with pytest.raises(ee.DataError, match=r"audit\.json"):
        ee.AuditState.load(path)
    os.unlink(path)
    with pytest.raises(ee.DataError, match="no state"):
        ee.AuditState.load(path)
    os.mkfifo(path)
    with pytest.raises(ee.DataError, match="no state"):
        ee.AuditState.load(path)
