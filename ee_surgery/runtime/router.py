"""Run a batch so that every sample stops where the policy lets it leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ee_surgery.branches.base import Branch, run_branch
from ee_surgery.graph.backends.base import Run
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.segments import compact
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.policy import ThresholdPolicy, certainty
from ee_surgery.policies.scores import State
from ee_surgery.runtime.program import Program
from ee_surgery.task import CLASSIFICATION


class ExitOutput(NamedTuple):
    """Where each sample left, with what answer, at what cost."""

    logits: Tensor
    """Shape (B, C), or what else the original answers with."""
    exit_index: Tensor
    """int64, shape (B,); the last is the original's own head, whose place a policy may let an earlier answer take."""
    score: Tensor
    """Score at the exit taken, shape (B,); NaN at the original's head, which is not asked."""
    costs: Tensor
    """MACs of leaving at each exit, int64, shape (K,)."""
    original_macs: int
    """Of one sample of this size through the original."""

    @property
    def macs(self) -> Tensor:
        """int64, shape (B,): the stages that ran for each sample and every branch it was shown to."""
        return self.costs[self.exit_index]

    @property
    def macs_fraction(self) -> Tensor:
        """float64, shape (B,): `macs` as a fraction of the original's."""
        return self.macs.double() / self.original_macs


class InFlight(NamedTuple):
    """The samples of a batch that have not left, between two stages."""

    live: tuple[Tensor, ...]
    """What crosses the cut, with a batch of b."""
    rows: Tensor | None = None
    """Which samples of the batch they are, int64 (b,); None while all are in flight."""
    state: State = ()
    """Of the policy."""
    log_probs: Tensor | None = None
    """Of the branch before, (b, ...), where branches read each other's answers."""
    best: Tensor | None = None
    """The most certain answer so far, (b, C), where the policy falls back on that."""
    asked: tuple[Tensor, ...] = ()
    """What the branch at their exit answered, where a stage and its branch are one compiled part; what is carried is
    as it is behind that branch then."""

    def keep(self, stay: Tensor, axes: Sequence[Axis | None]) -> InFlight:
        """The samples `stay` of them, int64 indices (b',)."""
        return InFlight(
            compact(self.live, axes, stay),
            stay if self.rows is None else self.rows[stay],
            tuple(tensor.index_select(0, stay) for tensor in self.state),
            None if self.log_probs is None else self.log_probs.index_select(0, stay),
            None if self.best is None else self.best.index_select(0, stay),
        )

    @classmethod
    def join(cls, flights: Sequence[InFlight], axes: Sequence[Axis | None]) -> InFlight:
        """Samples of several batches at the same place, one after the other, counted anew."""
        first, *others = flights
        if not others:
            return first._replace(rows=None)
        live = tuple(
            parts[0] if axis is None else axis.concat(parts)
            for axis, *parts in zip(axes, *(flight.live for flight in flights), strict=True)
        )
        state = tuple(torch.cat(parts) for parts in zip(*(flight.state for flight in flights), strict=True))
        log_probs, best = (
            torch.cat(parts) if (parts := [tensor for tensor in column if tensor is not None]) else None
            for column in ([flight.log_probs for flight in flights], [flight.best for flight in flights])
        )
        return cls(live, None, state, log_probs, best)

    def cloned(self) -> InFlight:
        """With tensors of its own."""
        log_probs, best = (None if tensor is None else tensor.clone() for tensor in (self.log_probs, self.best))
        live, state = (tuple(tensor.clone() for tensor in tensors) for tensors in (self.live, self.state))
        return InFlight(live, self.rows, state, log_probs, best)


class Leaving(NamedTuple):
    """The samples that leave at one exit, with their answers."""

    rows: Tensor | None
    """Which samples of the batch, int64 (n,); None for all of them."""
    logits: Tensor
    """(n, C)."""
    score: Tensor | None
    """(n,); None at the original's head, which is not asked."""
    places: Tensor | None = None
    """Theirs among the samples that reached the exit, int64 (n,); None for all of those."""


Observer: TypeAlias = Callable[[int, InFlight, Leaving | None, InFlight | None], None]
"""Told at each exit, in order, before the next stage runs: its index, the samples that reached it, which of them leave
and which stay; None for no sample. What it keeps of their live tensors it copies: later stages may write to them.
Where the original is changed in the middle of a run, that run starts again at exit 0."""


class Router:
    """Stages, branches and a policy, ready to run: everything that does not depend on the batch is worked out here.

    Args:
        program: K stages.
        branches: K - 1, in eval mode.
        branch_macs: of each branch, one sample.
        head: on a model that has none of its own.
    """

    def __init__(
        self,
        program: Program,
        branches: Sequence[Branch],
        policy: ThresholdPolicy,
        branch_macs: Sequence[int],
        head: Branch | None = None,
    ) -> None:
        device = next(branches[0].parameters()).device
        self.program = program
        self.policy = policy.to(device)
        self.chained = any(branch.chained for branch in branches)
        self.keeps_best = policy.fallback == "most_confident"
        self.head = head
        self.original_macs = program.trunk_macs[-1]
        self.last = len(branches)
        visits = policy.visits(self.chained)
        self.exit_macs = exit_costs(program.trunk_macs, branch_macs, visits)
        self.costs = torch.tensor(self.exit_macs, device=device)
        # Copied at batch 1: cheaper than making tensors out of numbers.
        self._index = [torch.tensor([k], device=device) for k in range(self.last + 1)]
        self._unasked = torch.full((1,), torch.nan, device=device)
        # Exits that are closed have no branch to ask.
        self.branches = [branch if seen else None for branch, seen in zip(branches, visits, strict=True)]
        self.stages = [_checked(stage, same) for stage, same in zip(program.stages, program.unchanged, strict=True)]
        self.axes = [segment.axes for segment in program.segments]
        self.task = policy.task or CLASSIFICATION

    def __call__(self, inputs: Sequence[Tensor], batch: int, observers: Sequence[Observer] = ()) -> ExitOutput:
        """Run stages, ask branches, let samples leave, compact what is left.

        Args:
            inputs: the program's, each with `batch` samples.
            observers: are told of each step.
        Raises:
            Altered: the original is not what the program was captured from, as far as it had to run.
        """
        return self._one(inputs) if batch == 1 and not observers else self._batch(inputs, batch, observers)

    def start(self, inputs: Sequence[Tensor]) -> InFlight:
        """A batch at the first exit."""
        return self._advance(0, InFlight(tuple(inputs)))

    def step(self, k: int, flight: InFlight) -> tuple[Leaving | None, InFlight | None]:
        """Ask the branch of exit k, and run the next stage for the samples that stay.

        Returns:
            Those that leave, and those that are at exit k + 1 now. At the original's head, the last, all leave.
        """
        leaving, staying = self._decide(k, flight)
        return leaving, None if staying is None else self._advance(k + 1, staying)

    def visit(
        self, k: int, flight: InFlight, observe: Observer | None = None
    ) -> tuple[Leaving | None, InFlight | None]:
        """Run stage k and ask the branch behind it: `step`, cut where samples can wait for those of other batches.

        Args:
            observe: is told of it.
        Returns:
            Those that leave at exit k, and those that are in front of stage k + 1 now.
        """
        arrived = self._advance(k, flight)
        leaving, staying = self._decide(k, arrived)
        if observe is not None:
            observe(k, arrived, leaving, staying)
        return leaving, staying

    def follow(self, waiting: Mapping[int, Sequence[tuple[Tensor, ...]]]) -> Tensor:
        """The original's own answers to samples that left, (n, C, ...): only the stages behind their exits run.

        Args:
            waiting: of exits, the live tensors there of one or several groups of samples, compacted; of the last, what
                the last stage gives. Those of later exits join on the way; what samples share is the same in all.
        Returns:
            In the order of the exits, and of the groups of each.
        Raises:
            Altered: as for a call.
        """
        live: tuple[Tensor, ...] = ()
        for k, axes in enumerate([*self.axes[1:], [Axis(0)]]):
            groups = [*([live] if live else []), *waiting.get(k, ())]
            if len(groups) > 1:
                joined = zip(axes, zip(*groups, strict=True), strict=True)
                live = tuple(parts[0] if axis is None else axis.concat(parts) for axis, parts in joined)
            elif groups:
                live = groups[0]
            if groups and k < self.last:
                live = self.stages[k + 1](*live)
        return self._last(live)

    def _decide(self, k: int, flight: InFlight) -> tuple[Leaving | None, InFlight | None]:
        """The samples at exit k that leave there, and those that stay."""
        if k == self.last:
            return Leaving(flight.rows, self._end(flight), None), None
        if self.branches[k] is None:
            return None, flight
        logits, score, leaves, flight = self._ask(k, flight)
        gone = leaves.nonzero().squeeze(1)
        if len(gone) == 0:
            return None, flight
        answer = self.task.enlarge(logits[gone], self.program.answer)
        rows = gone if flight.rows is None else flight.rows[gone]
        leaving = Leaving(rows, answer, score[gone], gone)
        if len(gone) == len(leaves):
            return leaving, None
        return leaving, flight.keep((~leaves).nonzero().squeeze(1), self.axes[k + 1])

    def _advance(self, k: int, flight: InFlight) -> InFlight:
        """Run stage k."""
        return flight._replace(live=self.stages[k](*flight.live))

    def _ask(self, k: int, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, InFlight]:
        """Logits (b, C) and score (b,) at exit k, which samples leave (b,), and the samples behind its branch."""
        live, rows, state, log_probs, best, _ = flight
        branch, read = self.branches[k], self.program.readers[k]
        assert branch is not None
        answer = run_branch(branch, read(live), log_probs) if self.chained else branch(*read(live))
        score, leaves, state = self.policy.decide(k, answer.logits, answer.confidence, state)
        if self.keeps_best:
            best = self._better(best, answer.logits)
        return answer.logits, score, leaves, InFlight(live, rows, state, answer.log_probs, best)

    def _end(self, flight: InFlight) -> Tensor:
        """Logits (b, C) behind the last stage."""
        last = self._last(flight.live)
        return self._better(flight.best, last) if self.keeps_best else last

    def _batch(self, inputs: Sequence[Tensor], batch: int, observers: Sequence[Observer]) -> ExitOutput:
        flight = self.start(inputs)
        left: list[tuple[int, Leaving]] = []
        for k in range(self.last + 1):
            leaving, staying = self._decide(k, flight)
            for observe in observers:
                observe(k, flight, leaving, staying)
            if leaving is not None:
                left.append((k, leaving))
            if staying is None:
                break
            flight, staying = self._advance(k + 1, staying), None  # the next stage needs the memory
        return self.collect(left, batch)

    def collect(self, left: Sequence[tuple[int, Leaving]], batch: int) -> ExitOutput:
        """The answers to a batch, from all that left of it, each with its exit; in the dtype of the first."""
        logits, score, exit_index = self._results(left[0][1].logits, batch)
        for k, leaving in left:
            rows = slice(None) if leaving.rows is None else leaving.rows
            logits[rows] = leaving.logits.to(logits.dtype)
            exit_index[rows] = k
            if leaving.score is not None:
                score[rows] = leaving.score.to(score.dtype)
        return ExitOutput(logits, exit_index, score, self.costs, self.original_macs)

    def _last(self, live: Sequence[Tensor]) -> Tensor:
        """Logits behind the last stage."""
        if self.head is None or self.program.head is None:
            return live[0]
        return self.head(*self.program.head(live)).logits

    def _results(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, score and exit of a batch before any sample has left."""
        score = torch.full((batch,), torch.nan, device=like.device)
        exit_index = torch.full((batch,), self.last, device=like.device)
        return self.task.empty(like, batch), score, exit_index

    def _one(self, inputs: Sequence[Tensor]) -> ExitOutput:
        """One sample: it leaves or it does not, so nothing is indexed."""
        state: State = ()
        best: Tensor | None = None
        log_probs: Tensor | None = None
        live = self.stages[0](*inputs)
        for k, (stage, branch, read) in enumerate(
            zip(self.stages[1:], self.branches, self.program.readers, strict=True)
        ):
            if branch is not None:
                answer = run_branch(branch, read(live), log_probs) if self.chained else branch(*read(live))
                leaves, score, state = self.policy.decide_one(k, answer.logits, answer.confidence, state)
                if leaves:
                    logits = self.task.enlarge(answer.logits, self.program.answer)
                    return ExitOutput(logits, self._index[k].clone(), score, self.costs, self.original_macs)
                log_probs = answer.log_probs
                if self.keeps_best:
                    best = self._better(best, answer.logits)
            live = stage(*live)
        index, score = self._index[self.last].clone(), self._unasked.clone()
        last = self._better(best, self._last(live)) if self.keeps_best else self._last(live)
        return ExitOutput(last, index, score, self.costs, self.original_macs)

    def _better(self, best: Tensor | None, logits: Tensor) -> Tensor:
        """Row by row, whichever of two answers (B, C, ...) is more certain; the earlier one of equals."""
        logits = self.task.enlarge(logits, self.program.answer)
        if best is None:
            return logits
        better = certainty(logits, self.task) > certainty(best, self.task)
        return torch.where(per_sample(better, logits), logits, best.to(logits.dtype))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in a shape that goes with tensors (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


class Altered(Exception):
    """The original was changed since its program was captured: to be run again, by another."""


def _checked(stage: Run, unchanged: Callable[[], bool]) -> Run:
    def run(*live: Tensor) -> tuple[Tensor, ...]:
        if not unchanged():
            raise Altered
        return stage(*live)

    return run
