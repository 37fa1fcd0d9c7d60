"""Running a branched model: a program per input signature, a router per operating point, from any number of threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from ee_surgery.backbone.base import State
from ee_surgery.backbone.inputs import Arguments, as_sample, key, tensors
from ee_surgery.branches.base import PreparedBranch
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.errors import OUT_OF_MEMORY, ExitPointError
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.graph.inspection import read
from ee_surgery.placement import ExitPlan
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.runtime.program import Program, build_program
from ee_surgery.runtime.router import Altered, ExitOutput, Router
from ee_surgery.runtime.verify import verify

_PROGRAMS_KEPT = 8  # input shapes, dtypes and devices; each holds a graph, no weights
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

    def __init__(self, program: Program, prepared: list[PreparedBranch], branches: BranchBank) -> None:
        self.program, self.prepared, self.branches = program, prepared, branches
        self._router: tuple[ThresholdPolicy, Router] | None = None

    def router(self, policy: ThresholdPolicy) -> Router:
        """The router of one policy; the last one asked for is kept."""
        found = self._router  # read once: another thread may move the knob meanwhile
        if found is None or found[0] is not policy:
            macs = [branch.macs for branch in self.prepared]
            found = policy, Router(self.program, list(self.branches), policy, macs, self.branches.head)
            self._router = found
        return found[1]


class Engine:
    """Backbone, exits and branches, ready to run whatever input signature comes.

    Calls from several threads do not disturb each other: each reads the operating point once, known signatures run
    without waiting, and a new one is captured once, under a process-wide lock.

    Args:
        graph: of the sample, which is the first signature it knows.
    """

    def __init__(self, graph: ModelGraph, plan: ExitPlan, branches: BranchBank) -> None:
        self.backbone, self.plan, self.branches = graph.backbone, plan, branches
        self._lock = threading.Lock()
        self.programs: OrderedDict[tuple[State, Hashable], Entry] = OrderedDict()
        self._latest: Entry | None = None
        sample = graph.backbone.sample
        first = self._compile(graph, sample)
        self._keep((graph.capture.state, key(sample, graph.backbone.batch_dims)), first)
        self.trunk_macs = first.program.trunk_macs
        """MACs of the original up to each exit and in whole, one sample of the size it was augmented with."""
        self.branch_macs = tuple(branch.macs for branch in first.prepared)
        """MACs of each branch, one sample of that size."""

    def __getstate__(self) -> dict[str, object]:
        # Stages are functions over this very original's tables: a copy makes its own on first use.
        return {**self.__dict__, "_lock": None, "programs": OrderedDict(), "_latest": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

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

    def run(self, arguments: Arguments, policy: ThresholdPolicy | None) -> ExitOutput:
        """Logits, exit, score and costs of every sample.

        Args:
            policy: when samples leave; None: they all run through to the original's head.
        """
        if torch.is_grad_enabled() or self.branches.training:
            with torch.no_grad(), eval_mode(list(self.branches.modules())):
                return self.run(arguments, policy)
        dims = self.backbone.dims(arguments)
        values = tuple(tensors(arguments).values())
        batch = values[0].shape[0]
        if batch == 0:
            return self._empty_output(values[0].device)
        if policy is None:
            return self._full_run(arguments, self.entry(arguments, dims).program)
        state = self.backbone.latest
        while True:  # each stage looks whether its modules have changed: samples that leave pay for no more than that
            try:
                return self.entry(arguments, dims, state).router(policy)(values, batch)
            except Altered:  # noqa: PERF203 (once in a while)
                state = self.backbone.state()

    def sample_program(self) -> tuple[Program, Arguments]:
        """The program of the sample's signature, and the sample."""
        arguments = self.backbone.sample
        return self.entry(arguments, self.backbone.dims(arguments)).program, arguments

    def _full_run(self, arguments: Arguments, program: Program) -> ExitOutput:
        logits = self.backbone.logits(self.backbone(arguments))
        if self.branches.head is not None and program.head is not None:
            logits = self.branches.head(*program.head([logits])).logits
        last = torch.full((len(logits),), len(self.branches), device=logits.device)
        nan = torch.full((len(logits),), torch.nan, device=logits.device)
        costs = torch.tensor(program.trunk_macs, device=logits.device)
        return ExitOutput(logits, last, nan, costs, program.trunk_macs[-1])

    def _empty_output(self, device: torch.device) -> ExitOutput:
        """For an empty batch, which many models do not take."""
        dtype, macs = next(self.branches.parameters()).dtype, self.trunk_macs
        logits = torch.empty((0, self.backbone.num_classes), dtype=dtype, device=device)
        index, score = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device)
        return ExitOutput(logits, index, score, torch.tensor(macs, device=device), macs[-1])

    # --- programs, one for inputs of each shape, dtype and device

    def entry(self, arguments: Arguments, dims: Mapping[str, int | None], state: State | None = None) -> Entry:
        """What runs inputs like these (shape, dtype, device; any batch size), captured on first use and kept.

        Args:
            state: of the original; the one that it is in when left out, which takes a look at all of it.
        Raises:
            CaptureError: the model cannot be captured for such inputs.
            ExitPointError: its owner changed it, and the exits do not fit it any more.
        """
        inputs = key(arguments, dims)
        signature = state or self.backbone.state(), inputs
        entry = self.programs.get(signature)
        if entry is None:
            with GLOBAL_STATE:
                entry = self.programs.get(signature)  # another thread may have been first
                if entry is None:
                    state, entry = self._capture(as_sample(arguments, dims))
                    signature = state, inputs
        if entry is not self._latest:
            self._keep(signature, entry)
        return entry

    def _keep(self, signature: tuple[State, Hashable], entry: Entry) -> None:
        """Make it the one used last, and drop the one not used for longest where there are too many."""
        with self._lock:
            self.programs[signature] = entry
            self.programs.move_to_end(signature)
            self._latest = entry
            if len(self.programs) > _PROGRAMS_KEPT:
                self.programs.popitem(last=False)

    def _capture(self, sample: Arguments) -> tuple[State, Entry]:
        try:
            graph = read(self.backbone, sample)
            entry = self._compile(graph, sample)
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

    def _check_fit(self, program: Program, sample: Arguments) -> None:
        """Run the branches once: a change of the model may have changed what they read.

        Raises:
            ExitPointError: they answer otherwise than the original does; or whatever they raise.
        """
        features, original = program.run([*tensors(sample).values()])
        with torch.no_grad(), eval_mode(list(self.branches.modules())):
            answers = self.branches(features)
        if original is not None and self.branches.head is None and answers[0].logits.shape != original.shape:
            shapes = tuple(answers[0].logits.shape), tuple(original.shape)
            raise ExitPointError(f"branches answer with logits of shape {shapes[0]}, the model with {shapes[1]}.")

    def _compile(self, graph: ModelGraph, sample: Arguments) -> Entry:
        head = self.branches.head
        head_macs = 0 if head is None or graph.head is None else head.macs(graph.head.shape)
        program = build_program(graph, self.plan.names, [branch.reads_all for branch in self.branches], head_macs)
        verify(program, self.backbone, sample)
        prepared = [b.prepare(graph, p) for b, p in zip(self.branches, program.points, strict=True)]
        return Entry(program, prepared, self.branches)
