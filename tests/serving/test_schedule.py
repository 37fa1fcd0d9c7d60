"""Which stage runs next: decided from counts, times and deadlines alone."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ee_surgery as ee
from ee_surgery.serving.lanes import Lane, Parcel, Request
from ee_surgery.serving.routes import Route
from ee_surgery.serving.schedule import Choice, Times, choose, waits

COUNTS = st.lists(st.integers(0, 40), min_size=3, max_size=3)
MOST = 16


class _Counted(Route):
    """Three stages that run nothing: a flight is a list of numbers."""

    visits = (True, True)

    def enter(self, inputs: list[int]) -> list[int]:
        return inputs

    def take(self, k: int, flight: list[int], rows: Any) -> list[int]:
        return [flight[row] for row in rows]

    def join(self, k: int, flights: Any) -> list[int]:
        return [each for flight in flights for each in flight]

    def visit(self, k: int, flight: Any, observe: Any = None) -> Any:
        raise AssertionError

    def collect(self, left: Any, size: int) -> Any:
        raise AssertionError

    def alone(self, inputs: Any, watched: Any = None) -> Any:
        raise AssertionError


ROUTE = _Counted()


def request(samples: int, deadline: float = math.inf) -> Request:
    return Request(Future(), ROUTE, [*range(samples)], samples, 0.0, deadline)


def lane(counts: list[int], offline: bool = False, since: float = 0.0, deadline: float = math.inf) -> Lane:
    """A lane with so many samples in front of each stage, of which half have stayed at each exit so far."""
    found = Lane(ROUTE, MOST, offline)
    for k, count in enumerate(counts):
        if count:
            mine = request(count, deadline)
            found.put(k, Parcel([*range(count)], [(mine, row) for row in range(count)], since))
        found.ran(k, 100, 50)
    return found


def times(fixed: float, each: float) -> Times:
    """Milliseconds of a batch of n in every stage: fixed + each * n."""
    sizes = (1, MOST)
    per_stage = [fixed + each * n for n in sizes]
    trunk = tuple(tuple(ms * (k + 1) for k in range(3)) for ms in per_stage)
    return Times(ee.Profile("python", "cpu", 1, MOST, sizes, trunk, ((0.0, 0.0), (0.0, 0.0))))


@given(COUNTS)
def test_without_a_profile_the_deepest_stage_with_samples_runs(counts: list[int]) -> None:
    one = lane(counts)
    deepest = max((k for k, count in enumerate(counts) if count), default=None)
    assert choose([one], None, 0.0) == (None if deepest is None else Choice(one, deepest))


@given(COUNTS)
def test_offline_full_batches_go_first_and_else_the_shallowest(counts: list[int]) -> None:
    one = lane(counts, offline=True)
    full = [k for k, count in enumerate(counts) if count >= MOST]
    rest = [k for k, count in enumerate(counts) if count]
    expected = max(full) if full else min(rest, default=None)
    if full and rest and min(rest) > max(full):  # pragma: no cover - a full stage is among the rest
        raise AssertionError
    assert choose([one], None, 0.0) == (None if expected is None else Choice(one, expected))


@given(COUNTS, COUNTS, st.floats(0, 10), st.floats(0, 5), st.floats(0, 1))
def test_something_runs_whenever_something_waits(
    one: list[int], other: list[int], fixed: float, each: float, now: float
) -> None:
    lanes = [lane(one), lane(other, offline=True)]
    found = choose(lanes, times(fixed, each), now)
    assert (found is None) == (not any(one) and not any(other))
    if found is not None:
        assert found.lane.counts[found.stage] > 0
        assert found.lane is lanes[0] or not any(one)


@given(COUNTS, st.floats(0, 10), st.floats(0, 5))
def test_a_stage_that_saves_nothing_by_waiting_does_not_wait(counts: list[int], fixed: float, each: float) -> None:
    one = lane(counts)
    assert not any(waits(one, k, sum(counts), times(0.0, each), 0.0) for k in range(3))
    assert not any(waits(one, k, sum(counts), None, 0.0) for k in range(3))


def test_a_stage_waits_where_that_saves_many_samples_more_than_it_costs_a_few() -> None:
    costly = times(fixed=10.0, each=0.1)
    assert waits(lane([16, 0, 1]), 2, 500, costly, 0.0)
    assert not waits(lane([16, 0, 1]), 2, 2, costly, 0.0)  # there are none to gain from it
    assert not waits(lane([16, 0, 16]), 2, 500, costly, 0.0)  # it is full
    assert not waits(lane([0, 0, 1]), 2, 500, costly, 0.0)  # no others will come
    assert choose([lane([16, 0, 1])], costly, 0.0) is not None


def test_a_stage_does_not_wait_when_a_deadline_is_near_or_it_has_waited_long() -> None:
    costly = times(fixed=10.0, each=0.1)
    assert waits(lane([16, 0, 1], deadline=1.0), 2, 500, costly, 0.0)
    assert not waits(lane([16, 0, 1], deadline=0.02), 2, 500, costly, 0.0)
    assert not waits(lane([16, 0, 1], since=-0.1), 2, 500, costly, 0.0)


def test_of_two_lanes_the_deeper_and_then_the_longer_waiting_goes_first() -> None:
    old, new, deep = lane([1, 0, 0], since=1.0), lane([1, 0, 0], since=2.0), lane([0, 1, 0], since=3.0)
    assert choose([new, old], None, 4.0) == Choice(old, 0)
    assert choose([new, old, deep], None, 4.0) == Choice(deep, 1)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=8))
def test_batches_are_full_in_order_and_without_those_called_off(given_: list[tuple[int, bool]]) -> None:
    one, expected = Lane(ROUTE, MOST), []
    for samples, cancelled in given_:
        mine = request(samples)
        one.enter(mine, 0.0)
        if cancelled:
            mine.future.cancel()
        else:
            expected += [(mine, row) for row in range(samples)]
    seen: list[tuple[Request, int]] = []
    sizes = []
    while one.deepest >= 0:
        parcel = one.pull(0)
        if parcel is not None:
            assert parcel.flight == [row for _, row in parcel.owners]
            seen += parcel.owners
            sizes.append(len(parcel.owners))
    assert seen == expected
    assert all(size == MOST for size in sizes[:-1])
    assert one.counts == [0, 0, 0]


def test_times_are_those_of_the_profile_and_scale_with_the_input() -> None:
    one, known = lane([1, 1, 1]), times(fixed=2.0, each=1.0)
    assert known.seconds(one, 1, 8) == pytest.approx(0.01)
    assert known.seconds(one, 1, 0) == 0
    ROUTE.scale = 2.0
    try:
        assert known.seconds(one, 1, 8) == pytest.approx(0.02)
    finally:
        ROUTE.scale = 1.0
