"""Running a branched model: a program per input signature, a router per operating point, from any number of threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ee_surgery.backbone.base import Backbone, State
from ee_surgery.backbone.inputs import Batch
from ee_surgery.branches.base import ExitLogits, PreparedBranch, Reads
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.errors import OUT_OF_MEMORY, ExitPointError
from ee_surgery.graph.backends.base import BACKENDS
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.graph.inspection import read
from ee_surgery.placement import ExitPlan
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.runtime.compilation import Compilation
from ee_surgery.runtime.compiled import CompiledRouter, Parts
from ee_surgery.runtime.program import Program, build_program
from ee_surgery.runtime.router import Altered, ExitOutput, Observer, Router
from ee_surgery.runtime.verify import verify

_PROGRAMS_KEPT = 8  # input shapes, dtypes and devices; each holds a graph, no weights
_ROUTERS_KEPT = 4  # operating points in turn
Key: TypeAlias = tuple[State, str, Hashable]
"""State of the original, backend, input signature."""
Watch: TypeAlias = Callable[[Router, int], Observer | None]
"""Given the router and the number of samples of a run: who observes it; None: it runs as if there were no audit."""
# The engines whose exits are disabled, in this thread or task alone.
_DISABLED: ContextVar[tuple[object, ...]] = ContextVar("ee_surgery_disabled", default=())


@contextmanager
def eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Put `modules` in eval mode; give each its own `training` flag back afterwards, also on an error."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class Entry:
    """What runs inputs of one signature."""

    def __init__(
        self, program: Program, prepared: list[PreparedBranch], branches: BranchBank, backbone: Backbone
    ) -> None:
        self.program, self.prepared, self.branches = program, prepared, branches
        self.parts = Parts(program, prepared, branches, backbone.model, backbone.task)
        # replaced as a whole: other threads read it
        self._routers: tuple[tuple[ThresholdPolicy, Compilation | None, Router], ...] = ()

    def router(self, policy: ThresholdPolicy, compilation: Compilation | None = None) -> Router:
        """The router of one policy; those made last are kept."""
        for known, how, router in self._routers:
            if known is policy and how is compilation:
                return router
        macs = [branch.macs for branch in self.prepared]
        given = self.program, list(self.branches), policy, macs, self.branches.head
        router = Router(*given) if compilation is None else CompiledRouter(self.parts.of(policy, compilation), *given)
        self._routers = ((policy, compilation, router), *self._routers)[:_ROUTERS_KEPT]
        return router

    def clear(self) -> None:
        """Let go of routers and of compiled parts."""
        self._routers = ()
        self.parts.clear()


class Engine:
    """Backbone, exits and branches, ready to run whatever input signature comes.

    Calls from several threads do not disturb each other: each reads the operating point once, known signatures run
    without waiting, and a new one is captured once, under a process-wide lock.

    Args:
        graph: of the sample, which is the first signature it knows.
        backend: what makes stages run, by its name in `BACKENDS`.
    Raises:
        UnknownNameError: no such backend.
    """

    def __init__(self, graph: ModelGraph, plan: ExitPlan, branches: BranchBank, backend: str = "python") -> None:
        self.backbone, self.plan, self.branches = graph.backbone, plan, branches
        self.observers: tuple[Observer, ...] = ()
        """Told of every step of a routed run. They cost nothing where there are none."""
        self.audit: Watch | None = None
        """Asked before each routed run for one observer more; None: there is no audit."""
        self._compilation: Compilation | None = None
        self._backend = backend
        self._lock = threading.Lock()
        self.programs: OrderedDict[Key, Entry] = OrderedDict()
        self._latest: Entry | None = None
        sample = self.backbone.own_batch()
        first = self._compile(graph, sample, backend)
        self._keep((graph.capture.state, backend, sample.key), first)
        self.answer = (self.backbone.num_classes,) if branches.head is not None else first.program.answer
        """Shape of the answer to one sample of the size it was augmented with."""
        self.trunk_macs = first.program.trunk_macs
        """MACs of the original up to each exit and in whole, one sample of the size it was augmented with."""
        self.branch_macs = tuple(branch.macs for branch in first.prepared)
        """MACs of each branch, one sample of that size."""

    def __getstate__(self) -> dict[str, object]:
        # Stages are functions over this very original's tables: a copy makes its own on first use.
        # An audit watches one model.
        return {**self.__dict__, "_lock": None, "programs": OrderedDict(), "_latest": None, "audit": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def backend(self) -> str:
        """What makes the stages run: a name in `BACKENDS`.

        Setting it captures the sample again and verifies the stages; other input signatures follow on first use.
        """
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        BACKENDS[name]
        before, self._backend = self._backend, name
        try:
            self.entry(self.backbone.own_batch())
        except Exception:
            self._backend = before
            raise

    @property
    def compilation(self) -> Compilation | None:
        """How routed runs are compiled; None: they run by the backend. Setting it lets go of all compiled parts."""
        return self._compilation

    @compilation.setter
    def compilation(self, chosen: Compilation | None) -> None:
        self._compilation = chosen
        for entry in [*self.programs.values()]:
            entry.clear()

    @property
    def frozen_mib(self) -> float:
        """MiB of the weights that compiled parts have copies of; 0 without `freeze`."""
        return sum(entry.parts.frozen_bytes for entry in [*self.programs.values()]) / 2**20

    # --- exits on or off

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """No exits in this thread, or asyncio task, for a while; other callers do not notice."""
        token = _DISABLED.set((*_DISABLED.get(), self))
        try:
            yield
        finally:
            _DISABLED.reset(token)

    @property
    def is_disabled(self) -> bool:
        """Whether exits are disabled here."""
        return any(engine is self for engine in _DISABLED.get())

    # --- running

    def run(self, batch: Batch, policy: ThresholdPolicy | None, audit: Watch | None = None) -> ExitOutput:
        """Logits, exit, score and costs of every sample.

        Args:
            policy: when samples leave; None: they all run through to the original's head.
            audit: asked in place of `self.audit`.
        """
        if torch.is_grad_enabled() or self.branches.training:
            with torch.no_grad(), eval_mode(list(self.branches.modules())):
                return self.run(batch, policy, audit)
        values, size = batch.tensors, batch.size
        if size == 0:
            return self._empty_output(values[0].device)
        if policy is None:
            return self._full_run(batch, self.entry(batch).program)
        state, ask = self.backbone.latest, self.audit if audit is None else audit
        while True:  # each stage looks whether its modules have changed: samples that leave pay for no more than that
            try:
                router = self.entry(batch, state).router(policy, self.compilation)
                watching = None if ask is None else ask(router, size)
                return router(values, size, self.observers if watching is None else (*self.observers, watching))
            except Altered:  # noqa: PERF203 (once in a while)
                state = self.backbone.state()

    def _full_run(self, batch: Batch, program: Program) -> ExitOutput:
        logits = self.backbone.logits(self.backbone(batch.arguments))
        if self.branches.head is not None and program.head is not None:
            logits = self.branches.head(*program.head([logits])).logits
        last = torch.full((len(logits),), len(self.branches), device=logits.device)
        nan = torch.full((len(logits),), torch.nan, device=logits.device)
        costs = torch.tensor(program.trunk_macs, device=logits.device)
        return ExitOutput(logits, last, nan, costs, program.trunk_macs[-1])

    def _empty_output(self, device: torch.device) -> ExitOutput:
        """For an empty batch, which many models do not take."""
        dtype, macs = next(self.branches.parameters()).dtype, self.trunk_macs
        logits = torch.empty((0, *self.answer), dtype=dtype, device=device)
        index, score = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device)
        return ExitOutput(logits, index, score, torch.tensor(macs, device=device), macs[-1])

    def features(self, *inputs: Any, **named: Any) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """What every branch reads, its features (B, *shape) first, and the original's answer; without gradients."""
        batch = self.backbone.batch(*inputs, **named)
        found, original = self.entry(batch).program.run(batch.tensors)
        assert original is not None
        return found, original

    def features_alone(self, *inputs: Any, **named: Any) -> list[tuple[Tensor, ...]]:
        """`features` without the original's answer, for which all behind the last exit would have to run."""
        batch = self.backbone.batch(*inputs, **named)
        return self.entry(batch).program.run(batch.tensors, whole=False)[0]

    def answers(self, *inputs: Any, **named: Any) -> tuple[list[ExitLogits], Tensor]:
        """The answer of every branch, and the original's logits (B, C), without gradients, in eval mode."""
        features, logits = self.features(*inputs, **named)
        with torch.no_grad(), eval_mode(list(self.branches.modules())):
            return self.branches.split(self.branches(features), logits)

    # --- programs, one for inputs of each shape, dtype and device

    def program(self, *inputs: Any, **named: Any) -> Program:
        """The stages that inputs like these (shape, dtype, device; any batch size) run through."""
        return self.entry(self.backbone.batch(*inputs, **named)).program

    def entry(self, batch: Batch, state: State | None = None) -> Entry:
        """What runs inputs like these (shape, dtype, device; any batch size), captured on first use and kept.

        Args:
            state: of the original; the one that it is in when left out, which takes a look at all of it.
        Raises:
            CaptureError: the model cannot be captured for such inputs.
            ExitPointError: its owner changed it, and the exits do not fit it any more.
        """
        backend, inputs = self._backend, batch.key
        signature = state or self.backbone.state(), backend, inputs
        entry = self.programs.get(signature)
        if entry is None:
            with GLOBAL_STATE:
                entry = self.programs.get(signature)  # another thread may have been first
                if entry is None:
                    state, entry = self._capture(batch.sample(), backend)
                    signature = state, backend, inputs
        if entry is not self._latest:
            self._keep(signature, entry)
        return entry

    def _keep(self, signature: Key, entry: Entry) -> None:
        """Make it the one used last, and drop the one not used for longest where there are too many."""
        with self._lock:
            self.programs[signature] = entry
            self.programs.move_to_end(signature)
            self._latest = entry
            if len(self.programs) > _PROGRAMS_KEPT:
                self.programs.popitem(last=False)

    def _capture(self, sample: Batch, backend: str) -> tuple[State, Entry]:
        try:
            graph = read(self.backbone, sample)
            entry = self._compile(graph, sample, backend)
            if self.backbone.altered:
                self._check_fit(entry.program, sample)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            altered = self.backbone.altered
            if not altered:
                raise
            raise ExitPointError(
                f"{self.backbone.model_id} was changed after it got its exits ({'; '.join(altered[:5])}), and they do "
                f"not fit it any more: {error} Undo the change, or call ee.augment again."
            ) from error
        return graph.capture.state, entry

    def _check_fit(self, program: Program, sample: Batch) -> None:
        """Run the branches once: a change of the model may have changed what they read.

        Raises:
            ExitPointError: they answer otherwise than the original does; or whatever they raise.
        """
        features, original = program.run(sample.tensors)
        with torch.no_grad(), eval_mode(list(self.branches.modules())):
            answers = self.branches(features)
        logits = self.backbone.task.enlarge(answers[0].logits, program.answer)
        if original is not None and self.branches.head is None and logits.shape != original.shape:
            shapes = tuple(logits.shape), tuple(original.shape)
            raise ExitPointError(f"branches answer with logits of shape {shapes[0]}, the model with {shapes[1]}.")

    def _compile(self, graph: ModelGraph, sample: Batch, backend: str) -> Entry:
        head = self.branches.head
        head_macs = 0 if head is None or graph.head is None else head.macs(graph.head.shape)
        reads: list[Reads] = [branch.reads for branch in self.branches]
        program = build_program(graph, self.plan.names, reads, head_macs, backend)
        verify(program, self.backbone, sample)
        prepared = [b.prepare(graph, p) for b, p in zip(self.branches, program.points, strict=True)]
        return Entry(program, prepared, self.branches, self.backbone)
