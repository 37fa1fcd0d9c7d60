"""The router: steps over samples in flight, observers of them, one router per operating point."""

from __future__ import annotations

import pytest
import torch

import ee_surgery as ee
from ee_surgery.runtime.router import InFlight, Leaving
from tests.zoo import BY_NAME, graph


@pytest.fixture
def branched() -> ee.EarlyExitModel:
    return ee.attach(graph("cifar-resnet20"), ee.place(graph("cifar-resnet20"), 3), "pool")


def test_fewer_exits_of_a_model_that_was_moved_since(branched: ee.EarlyExitModel) -> None:
    moved = branched.copy().double()
    x = BY_NAME["cifar-resnet20"].sample(2).double()
    assert torch.equal(moved.with_exits(moved.exits[1:2]).all_exits(x)[0], moved.all_exits(x)[1])


@pytest.mark.parametrize("batch", [1, 7])
def test_observers_see_every_sample_leave_once_and_change_nothing(branched: ee.EarlyExitModel, batch: int) -> None:
    x = BY_NAME["cifar-resnet20"].sample(batch)
    scores = branched.all_exits(x)[:-1].softmax(-1).amax(-1)
    branched.operate(thresholds=scores.median(1).values.tolist())
    expected = branched.predict(x)
    exits = torch.full((batch,), -1)
    steps: list[int] = []

    def watch(k: int, arrived: InFlight, leaving: Leaving | None, staying: InFlight | None) -> None:
        steps.append(k)
        assert len(arrived.live[0]) == batch - int((exits >= 0).sum())
        if leaving is not None:
            rows = slice(None) if leaving.rows is None else leaving.rows
            assert (exits[rows] == -1).all()
            exits[rows] = k
            assert torch.equal(leaving.logits, output_of(rows))
            places = torch.arange(len(arrived.live[0])) if leaving.index is None else leaving.index
            assert torch.equal(places if arrived.rows is None else arrived.rows[places], torch.arange(batch)[rows])
        gone = int((exits >= 0).sum())
        assert (staying is None) == (gone == batch)
        if staying is not None:
            assert len(staying.live[0]) == batch - gone

    def output_of(rows: slice | torch.Tensor) -> torch.Tensor:
        return expected.logits[rows]

    branched.engine.observers = (watch,)
    found = branched.predict(x)
    assert exits.tolist() == found.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(found.logits, expected.logits)
    assert steps == [*range(int(found.exit_index.max()) + 1)]


def test_samples_of_several_requests_can_share_a_batch_between_two_steps(branched: ee.EarlyExitModel) -> None:
    x = BY_NAME["cifar-resnet20"].sample(6)
    point = branched.operate(thresholds=2.0)  # no sample leaves
    assert point is not None
    program = branched.engine.program(x)
    router = branched.engine.entry(branched.engine.backbone.batch(x)).router(point.policy)
    with torch.no_grad():
        flights = []
        for part in (x[:2], x[2:]):
            _, flight = router.step(0, router.start([part]))
            assert flight is not None
            flights.append(flight.live)
        axes = program.segments[2].axes
        shared = tuple(axis.concat(parts) for axis, *parts in zip(axes, *flights, strict=True) if axis is not None)
        leaving, flight = None, InFlight(shared)
        for k in range(1, router.last + 1):
            assert flight is not None
            leaving, flight = router.step(k, flight)
    assert leaving is not None
    assert flight is None
    torch.testing.assert_close(leaving.logits, branched.predict(x).logits)


def test_the_routers_of_the_last_few_operating_points_are_kept(branched: ee.EarlyExitModel) -> None:
    entry = branched.engine.entry(branched.engine.backbone.batch(BY_NAME["cifar-resnet20"].sample(2)))
    points = [branched.operate(thresholds=tau) for tau in (0.1, 0.2, 0.3, 0.4, 0.5)]
    policies = [point.policy for point in points if point is not None]
    assert [point.policy for point in points if point is not None] == policies
    first, second, *_ = [entry.router(policy) for policy in policies[:4]]
    assert entry.router(policies[0]) is first
    entry.router(policies[4])  # the first one goes
    assert entry.router(policies[1]) is second
    assert entry.router(policies[0]) is not first
