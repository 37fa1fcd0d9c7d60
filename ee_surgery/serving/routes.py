"""What runs requests: a route per input signature and operating point, whose stages samples can wait between."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Batch
from ee_surgery.errors import DataError, ServingError
from ee_surgery.model import EarlyExitModel
from ee_surgery.monitoring.watched import Watched
from ee_surgery.onnx import OnnxOutput, StagedModel
from ee_surgery.onnx.staged import Samples
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.runtime.compiled import CompiledRouter
from ee_surgery.runtime.engine import Engine as Runtime
from ee_surgery.runtime.engine import eval_mode
from ee_surgery.runtime.router import ExitOutput, InFlight, Leaving, Observer, Router

_ROUTES_KEPT = 16
Output: TypeAlias = ExitOutput | OnnxOutput
"""The answer to a request: what the model's own `predict`, or the folder's `run`, gives."""
Flight: TypeAlias = Any
"""Samples in front of a stage, in the form of their route."""
Left: TypeAlias = Any
"""Samples that leave at one exit, a tuple with names: `rows` (None for all of a batch), `logits` and `score`."""


class Route(ABC):
    """The stages that requests of one signature go through at one operating point."""

    visits: tuple[bool, ...] | None
    """Which branches run, K - 1; None where the original runs as a whole, in one stage."""
    scale: float = 1.0
    """MACs of the original at this input size, relative to the size it was augmented with."""
    held: object = None
    """What stays in memory as long as the route does."""

    @property
    def depth(self) -> int:
        """How many stages there are."""
        return 1 if self.visits is None else len(self.visits) + 1

    @abstractmethod
    def enter(self, inputs: Any) -> Flight:
        """A request in front of the first stage."""

    @abstractmethod
    def take(self, k: int, flight: Flight, rows: Sequence[int]) -> Flight:
        """Some of the samples in front of stage k."""

    @abstractmethod
    def join(self, k: int, flights: Sequence[Flight]) -> Flight:
        """Samples of several requests in front of stage k, one after the other."""

    @abstractmethod
    def visit(self, k: int, flight: Flight, observe: Observer | None = None) -> tuple[Left | None, Flight | None]:
        """Run stage k and its branch: samples that leave there, and those in front of stage k + 1 now, by `rows`.

        Args:
            observe: is told of it, where routes have audits.
        """

    @abstractmethod
    def collect(self, left: Sequence[tuple[int, Left]], size: int) -> Output:
        """The answer to a request, from all of its samples as they left, each with its exit."""

    @abstractmethod
    def alone(self, inputs: Any, watched: Watched | None = None) -> Output:
        """The answer to a request that shares nothing.

        Args:
            watched: what observes it, in place of any other audit.
        """

    def watch(self, size: int) -> Watched | None:
        """Ask the audit for a request of so many samples; None: none of them is chosen, or there is no audit."""
        return None


class Admission(NamedTuple):
    """A request at the door."""

    inputs: Any
    """In their normal form."""
    size: int
    """Samples."""
    key: Hashable
    """Of its route."""
    make: Callable[[], Route]
    """Makes that route, where there is none yet; may capture and compile, for seconds."""


class Served(ABC):
    """A model that requests come in for; keeps the routes that were used last."""

    def __init__(self) -> None:
        self._routes: OrderedDict[Hashable, Route] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def admit(self, inputs: Any) -> Admission:
        """A request, as things stand here and now: signature, operating point, autocast.

        Raises:
            DataError: the model takes no such inputs.
            ServingError: it has observers.
        """

    def known(self, given: Admission) -> Route | None:
        """The route of a request, if there is one yet."""
        with self._lock:
            found = self._routes.get(given.key)
            if found is not None:
                self._routes.move_to_end(given.key)
            return found

    def route(self, given: Admission) -> Route:
        """The route of a request, made where there is none yet; known ones go on meanwhile.

        Raises:
            CaptureError: the model cannot be captured for such inputs.
        """
        found = self.known(given)
        if found is not None:
            return found
        made = given.make()
        with self._lock:
            found = self._routes.setdefault(given.key, made)  # another thread may have been first
            if len(self._routes) > _ROUTES_KEPT:
                self._routes.popitem(last=False)
            return found


class ServedModel(Served):
    """A branched model, eager or compiled.

    Args:
        most: samples per batch; programs for batches of up to so many are compiled before the first request runs.
    """

    def __init__(self, branched: EarlyExitModel, most: int) -> None:
        super().__init__()
        self.branched, self.most = branched, most

    def admit(self, inputs: Any) -> Admission:
        engine, policy = self.branched.engine, self.branched.policy
        if engine.observers:  # they are told of whole runs of one request, which there are none of here
            raise ServingError(
                "This model has observers, which shared batches of an Engine do not ask: remove them first "
                "(branched.engine.observers = ()), or use branched.predict."
            )
        batch = engine.backbone.batch(inputs)
        shared = [batch.arguments[name] for name, dim in batch.dims.items() if dim is None and name in batch.arguments]
        compilation, casting = engine.compilation, _autocast()
        held = shared, compilation, policy  # by the route, so that their ids are theirs alone
        ids = tuple(map(id, (*shared, compilation, policy)))
        key = batch.key, casting, engine.backbone.latest, engine.backend, ids

        def make() -> Route:
            made = (
                _Whole(engine, batch, casting) if policy is None else _Routed(engine, batch, casting, policy, self.most)
            )
            made.held = held
            return made

        return Admission(batch, batch.size, key, make)


class _OfModel(Route):
    """Runs in eval mode, and under the autocast that its requests were made under."""

    def __init__(self, engine: Runtime, batch: Batch, casting: Sequence[tuple[str, torch.dtype]]) -> None:
        self.engine, self.casting = engine, casting
        with self.running():
            self.program = engine.entry(batch).program
        self.scale = self.program.trunk_macs[-1] / engine.trunk_macs[-1]

    @contextmanager
    def running(self) -> Iterator[None]:
        """What has to be in force for a run."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.engine.branches.training:
                stack.enter_context(eval_mode(list(self.engine.branches.modules())))
            for device, dtype in self.casting:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield


class _Routed(_OfModel):
    """Stages and branches of a model at an operating point."""

    def __init__(
        self, engine: Runtime, batch: Batch, casting: Sequence[tuple[str, torch.dtype]], policy: ThresholdPolicy,
        most: int,
    ) -> None:  # fmt: skip
        super().__init__(engine, batch, casting)
        self.policy = policy
        with self.running():
            self.router = engine.entry(batch).router(policy, engine.compilation)
        self.visits = policy.visits(engine.branches.chained)
        if isinstance(self.router, CompiledRouter):
            with (
                torch.inference_mode(False),
                self.running(),
            ):  # as requests will run
                sample = batch.sample().select([row % 4 for row in range(most)])
                self.router.prepare(sample.tensors, most)

    def enter(self, inputs: Batch) -> InFlight:
        return InFlight(inputs.tensors)

    def take(self, k: int, flight: InFlight, rows: Sequence[int]) -> InFlight:
        device = flight.live[0].device
        return flight.keep(torch.tensor(rows, device=device), self.router.axes[k])._replace(rows=None)

    def join(self, k: int, flights: Sequence[InFlight]) -> InFlight:
        return InFlight.join(flights, self.router.axes[k])

    def visit(
        self, k: int, flight: InFlight, observe: Observer | None = None
    ) -> tuple[Leaving | None, InFlight | None]:
        with self.running():
            return self.router.visit(k, flight, observe)

    def collect(self, left: Sequence[tuple[int, Any]], size: int) -> ExitOutput:
        return self.router.collect([(k, _on(leaving, leaving.logits.device)) for k, leaving in left], size)

    def alone(self, inputs: Batch, watched: Watched | None = None) -> ExitOutput:
        audit = _unwatched if watched is None else watched.again  # its samples are chosen already
        with self.running():
            return self.engine.run(inputs, self.policy, audit)

    def watch(self, size: int) -> Watched | None:
        audit = self.engine.audit
        found = None if audit is None else audit(self.router, size)
        assert found is None or isinstance(found, Watched)
        return found


class _Whole(_OfModel):
    """The original, where no sample leaves early: its own forward, on batches of several requests."""

    visits = None

    def enter(self, inputs: Batch) -> Batch:
        return inputs

    def take(self, k: int, flight: Batch, rows: Sequence[int]) -> Batch:
        return flight.select([*rows])

    def join(self, k: int, flights: Sequence[Batch]) -> Batch:
        return Batch.join(flights)

    def visit(self, k: int, flight: Batch, observe: Observer | None = None) -> tuple[Leaving, None]:
        return Leaving(None, self.alone(flight).logits, None), None

    def collect(self, left: Sequence[tuple[int, Any]], size: int) -> ExitOutput:
        first = left[0][1].logits
        logits = self.engine.backbone.task.empty(first, size)
        for _, leaving in left:
            logits[slice(None) if leaving.rows is None else leaving.rows] = leaving.logits
        last = torch.full((size,), len(self.engine.branches), device=first.device)
        costs = torch.tensor(self.program.trunk_macs, device=first.device)
        nan = torch.full((size,), torch.nan, device=first.device)
        return ExitOutput(logits, last, nan, costs, self.program.trunk_macs[-1])

    def alone(self, inputs: Batch, watched: Watched | None = None) -> ExitOutput:
        with self.running():
            return self.engine.run(inputs, None)


class ServedStages(Served):
    """A folder of stages, on whatever engine runs them."""

    def __init__(self, staged: StagedModel) -> None:
        super().__init__()
        self.staged = staged

    def admit(self, inputs: Any) -> Admission:
        """As `Served`; inputs are an array, or several by name."""
        staged = self.staged
        given = inputs if isinstance(inputs, Mapping) else {staged.inputs[0]: inputs}
        if missing := [name for name in staged.inputs if given.get(name) is None]:
            raise DataError(f"The stages take inputs {staged.inputs}; {missing} are missing.")
        named = {name: _array(given[name]) for name in staged.inputs}
        dims = dict(zip(staged.inputs, staged.input_dims, strict=True))
        sizes = {name: named[name].shape[dim : dim + 1] for name, dim in dims.items() if dim is not None}
        if len({*sizes.values()}) != 1 or () in sizes.values():
            shapes = {name: array.shape for name, array in named.items()}
            raise DataError(f"The inputs hold no batch, or different numbers of samples: {shapes}.")
        key = staged.in_force, *((array.dtype, *_without(array, dims[name])) for name, array in named.items())
        held = [named[name] for name, dim in dims.items() if dim is None]
        shared = tuple(map(id, held))
        size = next(iter(sizes.values()))[0]
        return Admission(named, size, (key, shared), lambda: _Staged(staged, key[0], held))


class _Staged(Route):
    """Stages of a folder at some thresholds."""

    def __init__(self, staged: StagedModel, thresholds: tuple[float, ...], held: object) -> None:
        self.staged, self.thresholds, self.held = staged, thresholds, held
        self.visits = tuple(staged.visits(thresholds))

    def enter(self, inputs: Any) -> Samples:
        return self.staged.start(inputs)

    def take(self, k: int, flight: Samples, rows: Sequence[int]) -> Samples:
        return self.staged.take(k, flight, np.array(rows))

    def join(self, k: int, flights: Sequence[Samples]) -> Samples:
        return self.staged.join(k, flights)

    def visit(self, k: int, flight: Samples, observe: Observer | None = None) -> tuple[Any, Samples | None]:
        rows = np.arange(len(flight.rows))
        leaving, staying = self.staged.visit(k, flight._replace(rows=rows), self.thresholds)
        if staying is not None and len(staying.rows) == len(rows):  # engines may write there again
            live, carried = ([np.array(array) for array in arrays] for arrays in (staying.live, staying.carried))
            staying = Samples(staying.rows, live, carried)
        return leaving, staying

    def collect(self, left: Sequence[tuple[int, Any]], size: int) -> OnnxOutput:
        every = slice(None)
        own = [(k, leaving._replace(rows=every) if leaving.rows is None else leaving) for k, leaving in left]
        return self.staged.collect(own, size, self.thresholds)

    def alone(self, inputs: Any, watched: Watched | None = None) -> OnnxOutput:
        return self.staged.run(inputs, self.thresholds)


def _unwatched(router: Router, size: int) -> None:
    """No sample is chosen."""


def _on(leaving: Leaving, device: torch.device) -> Leaving:
    """With its rows as a tensor: made once, and used for each of logits, scores and exits."""
    return leaving if leaving.rows is None else leaving._replace(rows=torch.tensor(leaving.rows, device=device))


def _array(value: object) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _without(array: np.ndarray, dim: int | None) -> tuple[int, ...]:
    """The shape but for the batch."""
    return array.shape if dim is None else (*array.shape[:dim], *array.shape[dim + 1 :])


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """Devices that this thread casts on, and to what."""
    return tuple((at, torch.get_autocast_dtype(at)) for at in ("cpu", "cuda") if torch.is_autocast_enabled(at))
