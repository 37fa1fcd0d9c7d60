"""Requests, and the queues that their samples wait in: one per stage, for each route."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ee_surgery.monitoring.watched import Watched
from ee_surgery.serving.routes import Flight, Left, Output, Route


@dataclass(eq=False)
class Request:
    """One call of `submit`."""

    future: Future[Output]
    route: Route
    inputs: Any
    size: int
    arrived: float
    """Seconds, by `time.monotonic`."""
    deadline: float = math.inf
    offline: bool = False
    """Part of a `map`."""
    watched: Watched | None = None
    """Its samples that an audit chose; None for no sample."""
    settled: bool = False
    left: list[tuple[int, Left]] = field(default_factory=list)
    """Its samples that have an answer, each with its exit."""
    missing: int = 0
    """How many have none."""

    def __post_init__(self) -> None:
        self.missing = self.size

    @property
    def live(self) -> bool:
        """Whether its samples still have to run; not so once it was cancelled or has failed."""
        return not (self.settled or self.future.cancelled())

    def add(self, k: int, leaving: Left) -> None:
        """Take the answers of exit k for its samples `leaving.rows`, in rising order."""
        count = len(leaving.rows)
        self.left.append((k, leaving._replace(rows=None) if count == self.size else leaving))
        self.missing -= count

    def answer(self) -> Output:
        """All of it."""
        return self.route.collect(sorted(self.left, key=lambda pair: pair[0]), self.size)


Owner: TypeAlias = tuple[Request, int]
"""Whose a sample is, and which of theirs."""


class Parcel(NamedTuple):
    """Samples in front of a stage."""

    flight: Flight
    owners: list[Owner]
    since: float
    """When they came here, seconds."""


class Lane:
    """The queues of one route.

    Args:
        most: samples per batch.
    """

    def __init__(self, route: Route, most: int, offline: bool = False) -> None:
        self.route, self.most, self.offline = route, most, offline
        self.queues: list[deque[Parcel]] = [deque() for _ in range(route.depth)]
        self.counts = [0] * route.depth
        """Samples in each."""
        self.visited, self.stayed = [0] * route.depth, [0] * route.depth
        """Samples that each stage ran, and that did not leave behind it."""

    def enter(self, request: Request, now: float) -> None:
        """A new request, in parcels of at most one batch."""
        flight = self.route.enter(request.inputs)
        for start in range(0, request.size, self.most):
            rows = range(start, min(start + self.most, request.size))
            part = flight if len(rows) == request.size else self.route.take(0, flight, [*rows])
            self.put(0, Parcel(part, [(request, row) for row in rows], now))

    def put(self, k: int, parcel: Parcel) -> None:
        """Samples that wait for stage k from now on."""
        self.queues[k].append(parcel)
        self.counts[k] += len(parcel.owners)

    def pull(self, k: int) -> Parcel | None:
        """The next batch for stage k, of those that wait longest; None where none of their requests lives."""
        taken: list[Parcel] = []
        room, queue = self.most, self.queues[k]
        while queue and room:
            parcel = queue.popleft()
            self.counts[k] -= len(parcel.owners)
            live = {request: request.live for request in {request for request, _ in parcel.owners}}
            rows = [i for i, (request, _) in enumerate(parcel.owners) if live[request]]
            if len(rows) > room:
                rest = self._part(k, parcel, rows[room:])
                queue.appendleft(rest)
                self.counts[k] += len(rest.owners)
            if rows:
                taken.append(self._part(k, parcel, rows[:room]))
                room -= len(taken[-1].owners)
        if not taken:
            return None
        flight = self.route.join(k, [parcel.flight for parcel in taken])
        return Parcel(flight, [owner for parcel in taken for owner in parcel.owners], taken[0].since)

    def ran(self, k: int, samples: int, stayed: int) -> None:
        """Count a batch of stage k."""
        self.visited[k] += samples
        self.stayed[k] += stayed

    def stay_share(self, k: int) -> float:
        """Share of the samples that do not leave behind stage k, as far as seen."""
        return (self.stayed[k] + 1) / (self.visited[k] + 2)

    @property
    def deepest(self) -> int:
        """The deepest stage that samples wait for; -1 where none do."""
        return next((k for k in reversed(range(len(self.counts))) if self.counts[k]), -1)

    def _part(self, k: int, parcel: Parcel, rows: Sequence[int]) -> Parcel:
        if len(rows) == len(parcel.owners):
            return parcel
        return Parcel(self.route.take(k, parcel.flight, rows), [parcel.owners[i] for i in rows], parcel.since)
