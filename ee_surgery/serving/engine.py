"""Engine: requests of many callers on one model, their samples in shared batches."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from operator import itemgetter
from types import TracebackType
from typing import Any, NoReturn

from ee_surgery.calibration.profile import Profile
from ee_surgery.checks import count, instance, number, optional, positive, refuse
from ee_surgery.errors import ConfigError, DataError, QueueFullError, RequestTimeoutError, ServingError
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import OnnxModel, OpenVinoModel, StagedModel
from ee_surgery.serving.audits import AuditQueue, observer
from ee_surgery.serving.lanes import Lane, Parcel, Request
from ee_surgery.serving.routes import Admission, Left, Output, Route, ServedModel, ServedStages
from ee_surgery.serving.schedule import Choice, Times, choose

_LANES_KEPT = 16
_POLL = 0.002  # seconds between two tries of a coroutine to get into a full queue


@dataclass
class StageCount:
    """What one stage has run."""

    batches: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Of the worker, branch and routing included."""


@dataclass
class EngineStats:
    """Counts since an engine started."""

    answered: int
    """Requests."""
    failed: int
    """Requests that raised an error of their own."""
    expired: int
    """Requests that ran out of time."""
    cancelled: int
    refused: int
    """Requests that found the queue full."""
    pending: int
    """Samples that have no answer yet."""
    exits: list[int]
    """Samples that left at each exit, the original's head last."""
    stages: list[StageCount]
    """Of each stage, with the branch behind it."""
    whole: StageCount
    """Of the original as a whole, where no operating point was set."""


class Engine:
    """Requests in, answers out: samples of many requests run in shared batches, and regroup behind every exit.

    Each stage has a queue. One worker thread runs the deepest stage that has samples, in batches of at most
    `max_batch`, whichever requests they belong to; each sample is decided on alone, so that neighbours change nothing
    about where it leaves. Requests of other input signatures (two sizes of pictures), and of other operating points,
    have queues of their own. A request keeps the operating point that was in force when it was submitted.

        with ee.Engine(branched) as engine:
            future = engine.submit(images)          # from any thread
            answer = await engine.submit_async(images)
            for answer in engine.map(batches): ...  # offline: late stages see full batches

    An answer is what `branched.predict(inputs)` gives, or the `run` of a folder of stages; logits can differ in the
    last bits, as they do between any two batch sizes. Inputs must not be written to before they are answered.

    An `Audit` of the model watches requests as it watches `predict`, in the order in which they came.

    Args:
        served: a branched model, on whatever backend, compiled or not; or a folder of ONNX stages.
        max_batch: samples per batch.
        max_pending: samples that are in at most, waiting or running; further requests are refused, or wait.
        timeout_s: seconds that a request has by default; None: any.
        profile: times of the stages, by which they wait for fuller batches when that pays (see
            `ee_surgery.serving.schedule.waits`); that of the frontier when left out, where it has
            batches as large as these. Without any, no stage waits.
        clock: seconds; another one for simulations.
    Raises:
        ConfigError: another object, or an invalid number; a profile of other exits, or of smaller batches.
    """

    def __init__(
        self,
        served: EarlyExitModel | StagedModel,
        *,
        max_batch: int = 32,
        max_pending: int = 1024,
        timeout_s: float | None = None,
        profile: Profile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch, self._clock = count("max_batch", max_batch), clock
        self.max_pending = count("max_pending", max_pending)
        self.served = served
        """What answers."""
        self.timeout_s = optional(positive)("timeout_s", timeout_s)
        if isinstance(served, EarlyExitModel):
            self._served, exits = ServedModel(served, self.max_batch), len(served.exits) + 1
            known = None if served.frontier is None else served.frontier.profile
            if profile is None and known is not None and known.batch_size >= self.max_batch:
                profile = known
        elif isinstance(served, StagedModel):
            self._served, exits = ServedStages(served), len(served.exits)
        else:
            hint = 'One file runs as a whole: export with layout="stages", and load a StagedModel.'
            whole = isinstance(served, (OnnxModel, OpenVinoModel))
            refuse("served", "an EarlyExitModel or a StagedModel", served, hint=hint if whole else "")
        self._times = None if profile is None else Times(_checked(profile, exits, self.max_batch))
        self._counts: dict[str, int] = dict.fromkeys(("answered", "failed", "expired", "cancelled", "refused"), 0)
        self._exits, self._stages, self._whole = [0] * exits, [StageCount() for _ in range(exits)], StageCount()
        self._lock = threading.Lock()
        self._room, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._pending, self._closed = 0, False
        self._inbox: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._abandoned: BaseException | None = None
        # of the worker alone
        self._lanes: dict[tuple[Route, bool], Lane] = {}
        self._requests: set[Request] = set()
        self._audits = AuditQueue()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="ee_surgery-engine", daemon=True)
        self._thread.start()

    # --- requests

    def submit(self, inputs: Any, *, timeout_s: float | None = None, wait_s: float = 0.0) -> Future[Output]:
        """Hand in a request; from any thread.

        A new input size is captured first, here and now, which takes seconds; others are served meanwhile.

        Args:
            inputs: what `predict` takes: a tensor of shape (B, ...), or a dict of them; for a folder of stages, arrays.
            timeout_s: seconds from now after which the future raises `RequestTimeoutError`; the engine's by default.
            wait_s: seconds to wait for room in a full queue; by default a full queue refuses at once.
        Returns:
            A future with the answer. Cancelled, its samples run no further than the stage that they are in.
        Raises:
            QueueFullError: there was no room.
            ServingError: the engine is closed.
            SurgeryError: the model does not take such inputs.
        """
        timeout, wait = _seconds("timeout_s", timeout_s, self.timeout_s), number("wait_s", wait_s, low=0, infinite=True)
        given = self._served.admit(inputs)
        return self._submit(given, self._served.route(given), timeout, wait) or self._refuse(given)

    async def submit_async(self, inputs: Any, *, timeout_s: float | None = None, wait_s: float = 0.0) -> Output:
        """The answer to a request, for coroutines; cancelling one cancels its request. See `submit`.

        Args:
            inputs: as of `submit`.
            timeout_s: seconds from now, waiting for room included.
            wait_s: seconds to wait for room in a full queue.
        """
        timeout, wait = _seconds("timeout_s", timeout_s, self.timeout_s), number("wait_s", wait_s, low=0, infinite=True)
        started, given = self._clock(), self._served.admit(inputs)
        route = self._served.known(given) or await asyncio.to_thread(self._served.route, given)
        while (future := self._submit(given, route, timeout - (self._clock() - started), 0.0)) is None:
            if self._clock() - started >= min(wait, timeout):
                self._refuse(given)
            await asyncio.sleep(_POLL)
        return await asyncio.wrap_future(future)

    def map(self, batches: Iterable[Any], *, ahead: int = 4096) -> Iterator[Output]:
        """Answers to many batches, in their order, for throughput: late stages wait until they have full batches.

        Requests of `submit` go first.

        Args:
            batches: of inputs, each as for `submit`; read as there is room.
            ahead: samples that may be in or answered beyond the first batch without a whole answer. Where few samples
                stay, many have to come in until a late stage has a full batch.
        """
        ahead, inside = count("ahead", ahead), 0
        waiting: deque[tuple[Future[Output], int]] = deque()
        try:
            for inputs in batches:
                given = self._served.admit(inputs)
                inside += given.size
                future = self._submit(given, self._served.route(given), math.inf, math.inf, offline=True)
                assert future is not None
                waiting.append((future, given.size))
                while waiting and (inside > ahead or waiting[0][0].done()):
                    inside -= waiting[0][1]
                    yield waiting[0][0].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][0].result()
                waiting.popleft()
        finally:
            for future, _ in waiting:
                future.cancel()

    def _submit(
        self, given: Admission, route: Route, timeout: float, wait: float, offline: bool = False
    ) -> Future[Output] | None:
        """A future, or None: no room."""
        size, future, now = given.size, Future[Output](), self._clock()
        if size > self.max_pending:
            raise DataError(f"A request of {size} samples, and max_pending={self.max_pending}: split it.")
        if not size:
            future.set_result(route.alone(given.inputs))
            return future
        request = Request(future, route, given.inputs, size, now, now + timeout, offline)
        with self._lock:
            longest = min(wait, max(timeout, 0.0), threading.TIMEOUT_MAX)
            room = self._room.wait_for(lambda: self._closed or self._pending + size <= self.max_pending, longest)
            if self._closed:
                raise ServingError("The engine is closed: it takes no more requests.") from self._abandoned
            if not room:
                return None
            request.watched = route.watch(size)  # here: audits choose by the order of the inbox
            self._pending += size
            self._inbox.append(request)
            self._work.notify()
        future.add_done_callback(lambda _: self._leave(request))
        return future

    def _refuse(self, given: Admission) -> NoReturn:
        with self._lock:
            self._counts["refused"] += 1
        raise QueueFullError(
            f"The engine is full, at max_pending={self.max_pending} samples: no room for {given.size} more. "
            "Try again later, or give wait_s=."
        )

    def _leave(self, request: Request) -> None:
        """There is room again."""
        with self._lock:
            self._pending -= request.size
            self._room.notify_all()
            if not request.settled:
                self._cancelled.append(request)
                self._work.notify()

    # --- the engine itself

    @property
    def open(self) -> bool:
        """Whether it takes requests: not once it is closed, nor where its worker has failed."""
        return not self._closed

    def stats(self) -> EngineStats:
        """Counts so far."""
        with self._lock:
            stages = [StageCount(**vars(each)) for each in (*self._stages, self._whole)]
            return EngineStats(**self._counts, pending=self._pending, exits=[*self._exits], stages=stages[:-1],
                               whole=stages[-1])  # fmt: skip

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, answer those that are in, and end the worker.

        Args:
            drain: False: those that are in fail with a `ServingError`.
            timeout_s: seconds to drain for; what is left then fails.
        """
        self._shut(None if drain else ServingError("The engine was closed before this request was answered."))
        if threading.current_thread() is self._thread:  # called back by a future
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._shut(ServingError(f"The engine was closed, and this request was not answered within {timeout_s} s."))
            self._thread.join()

    def _shut(self, error: BaseException | None) -> None:
        with self._lock:
            self._closed = True
            self._abandoned = self._abandoned or error
            self._room.notify_all()
            self._work.notify()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    # --- the worker

    def _serve(self) -> None:
        try:
            while (choice := self._next()) is not None:
                self._run(*choice)
        except BaseException as error:  # a mistake of ours: no caller may wait for ever
            stopped = ServingError(f"The engine stopped: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            self._shut(stopped)
            self._update(self._clock())
            raise

    def _next(self) -> Choice | None:
        """What to run next, once there is something; None when it is over."""
        while True:
            now = self._clock()
            self._update(now)
            if self._audits.hand_over():
                continue  # which takes a while
            choice = choose([*self._lanes.values()], self._times, now)
            if choice is not None:
                return choice
            with self._lock:
                if not (self._inbox or self._cancelled):
                    if self._closed:
                        return None
                    self._work.wait()

    def _update(self, now: float) -> None:
        """New requests into their lanes; out with those that are cancelled, late, or given up."""
        with self._lock:
            new, cancelled, abandoned = [*self._inbox], [*self._cancelled], self._abandoned
            self._inbox.clear()
            self._cancelled.clear()
        for request in new:
            self._requests.add(request)
            self._audits.enter(request)
            if request.deadline < math.inf:
                heapq.heappush(self._deadlines, (request.deadline, next(self._order), request))
            if abandoned is None:
                self._enter(request)
        for request in cancelled:
            self._settle(request, "cancelled")
        while self._deadlines and self._deadlines[0][0] <= now:
            late = heapq.heappop(self._deadlines)[2]
            spent = late.deadline - late.arrived
            self._settle(late, "expired", error=RequestTimeoutError(f"Not answered within {spent:.3g} s."))
        if abandoned is not None:
            for request in [*self._requests]:
                self._settle(request, "failed", error=abandoned)

    def _enter(self, request: Request) -> None:
        key = request.route, request.offline
        if key not in self._lanes:
            if len(self._lanes) >= _LANES_KEPT:
                self._lanes = {known: lane for known, lane in self._lanes.items() if lane.deepest >= 0}
            self._lanes[key] = Lane(request.route, self.max_batch, request.offline)
        try:
            self._lanes[key].enter(request, request.arrived)
        except Exception as error:
            self._settle(request, "failed", error=error)

    def _run(self, lane: Lane, k: int) -> None:
        """One batch of one stage."""
        started, requests = self._clock(), None
        try:
            parcel = lane.pull(k)
            if parcel is None:
                return
            requests = [request for request, _ in parcel.owners]
            leaving, staying = lane.route.visit(k, parcel.flight, observer(parcel.owners))
            everyone = [*range(len(parcel.owners))]
            stays = [] if staying is None else everyone if staying.rows is None else staying.rows.tolist()
            if leaving is not None:
                self._hand_out(k, leaving, parcel, everyone if leaving.rows is None else leaving.rows.tolist())
            if staying is not None:
                lane.put(k + 1, Parcel(staying, [parcel.owners[i] for i in stays], self._clock()))
        except Exception:  # whichever of them it was, and where the original has changed: each by itself
            self._one_by_one(requests or [each for each in self._requests if each.route is lane.route])
            return
        self._count(lane, k, len(everyone), len(stays), self._clock() - started)

    def _hand_out(self, k: int, leaving: Left, parcel: Parcel, places: list[int]) -> None:
        """The answers of one exit, to those whose they are."""
        start = 0
        for request, pairs in itertools.groupby([parcel.owners[place] for place in places], key=itemgetter(0)):
            rows = [row for _, row in pairs]
            mine = slice(start, start := start + len(rows))
            if request.live:
                score = None if leaving.score is None else leaving.score[mine]
                request.add(k, leaving._replace(rows=rows, logits=leaving.logits[mine], score=score))
                if not request.missing:
                    self._settle(request, "answered", request.answer())

    def _one_by_one(self, requests: Iterable[Request]) -> None:
        """Run each request alone, as `predict` does, after a batch of theirs failed: the culprit fails alone."""
        for request in dict.fromkeys(requests):
            if request.live:
                try:
                    answer = request.route.alone(request.inputs, request.watched)
                except Exception as error:
                    self._settle(request, "failed", error=error)
                else:
                    self._settle(request, "answered", answer)

    def _settle(self, request: Request, how: str, answer: Any = None, error: BaseException | None = None) -> None:
        """Once per request: its answer, or its error."""
        if request.settled:
            return
        request.settled = True
        self._requests.discard(request)
        if not request.future.set_running_or_notify_cancel():
            how = "cancelled"
        self._counts[how] += 1
        request.inputs, request.left = None, []  # the heap of deadlines may hold it for long
        if how != "answered" and request.watched is not None:
            request.watched.drop()
            request.watched = None
        if error is not None and how != "cancelled":
            request.future.set_exception(error)
        elif how != "cancelled":
            request.future.set_result(answer)

    def _count(self, lane: Lane, k: int, samples: int, stayed: int, seconds: float) -> None:
        lane.ran(k, samples, stayed)
        routed = lane.route.visits is not None
        self._exits[k if routed else -1] += samples - stayed
        count = self._stages[k] if routed else self._whole
        count.batches += 1
        count.samples += samples
        count.seconds += seconds


def _seconds(name: str, value: object, default: float | None) -> float:
    """A time limit; inf for none."""
    found = optional(positive)(name, value)
    found = default if found is None else found
    return math.inf if found is None else found


def _checked(profile: Profile, exits: int, most: int) -> Profile:
    """A profile that has times of all stages in batches of up to so many samples."""
    instance("profile", profile, Profile, hint="Make one with ee.profile.")
    if (timed := len(profile.trunk_ms[-1])) != exits:
        raise ConfigError(
            f"The profile has times of {timed} exits, the model has {exits} (the original's head counts)."
        )
    if profile.batch_size < most:
        raise ConfigError(f"The profile has times of batches of up to {profile.batch_size}, and max_batch={most}.")
    return profile
