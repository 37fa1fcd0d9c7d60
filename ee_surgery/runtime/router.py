"""Run a batch so that every sample stops where the policy lets it leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_surgery.branches.base import Branch, run_branch
from ee_surgery.graph.segments import Stage, compact
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.policy import ThresholdPolicy, certainty
from ee_surgery.policies.scores import State
from ee_surgery.runtime.program import Program


class ExitOutput(NamedTuple):
    """Where each sample left, with what answer, at what cost."""

    logits: Tensor
    """Shape (B, C)."""
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
        self.costs = torch.tensor(exit_costs(program.trunk_macs, branch_macs, visits), device=device)
        # Copied at batch 1: cheaper than making tensors out of numbers.
        self._index = [torch.tensor([k], device=device) for k in range(self.last + 1)]
        self._unasked = torch.full((1,), torch.nan, device=device)
        # Exits that are closed have no branch to ask.
        asked = [branch if seen else None for branch, seen in zip(branches, visits, strict=True)]
        checked = [_checked(stage, same) for stage, same in zip(program.stages, program.unchanged, strict=True)]
        axes = [stage.axes for stage in program.stages[1:]]
        self.first = checked[0]
        self.steps = list(zip(checked[1:], axes, asked, program.readers, strict=True))

    def __call__(self, inputs: Sequence[Tensor], batch: int) -> ExitOutput:
        """Run stages, ask branches, let samples leave, compact what is left.

        Args:
            inputs: the program's, each with `batch` samples.
        Raises:
            Altered: the original is not what the program was captured from, as far as it had to run.
        """
        return self._one(inputs) if batch == 1 else self._batch(inputs, batch)

    def _batch(self, inputs: Sequence[Tensor], batch: int) -> ExitOutput:
        rows: Tensor | None = None  # which samples are still in flight; None while all are
        state: State = ()
        results: tuple[Tensor, Tensor, Tensor] | None = None  # made once the first answer tells classes and dtype
        best: Tensor | None = None
        log_probs: Tensor | None = None
        live = self.first(*inputs)
        for k, (stage, axes, branch, read) in enumerate(self.steps):
            if branch is not None:
                answer = run_branch(branch, read(live), log_probs) if self.chained else branch(*read(live))
                decision = self.policy.decide(k, answer.logits, answer.confidence, state)
                state, log_probs = decision.state, answer.log_probs
                if self.keeps_best:
                    best = _better(best, answer.logits)
                gone = decision.leaves.nonzero().squeeze(1)
                if len(gone) > 0:
                    results = results or self._results(answer.logits, batch)
                    done = gone if rows is None else rows[gone]
                    for result, value in zip(results, (answer.logits, decision.score), strict=False):
                        result[done] = value[gone].to(result.dtype)
                    results[2][done] = k
                    if len(gone) == len(decision.leaves):
                        break
                    stay = (~decision.leaves).nonzero().squeeze(1)
                    rows = stay if rows is None else rows[stay]
                    live = compact(live, axes, stay)
                    state = tuple(tensor.index_select(0, stay) for tensor in state)
                    log_probs = None if log_probs is None else log_probs.index_select(0, stay)
                    best = None if best is None else best.index_select(0, stay)
            live = stage(*live)
        else:  # somebody came through to the original's own head
            last = self._last(live)
            last = _better(best, last) if self.keeps_best else last
            results = results or self._results(last, batch)
            results[0][slice(None) if rows is None else rows] = last.to(results[0].dtype)
        logits, score, exit_index = results
        return ExitOutput(logits, exit_index, score, self.costs, self.original_macs)

    def _last(self, live: Sequence[Tensor]) -> Tensor:
        """Logits behind the last stage."""
        if self.head is None or self.program.head is None:
            return live[0]
        return self.head(*self.program.head(live)).logits

    def _results(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, score and exit of a batch of which nobody has left early."""
        score = torch.full((batch,), torch.nan, device=like.device)
        exit_index = torch.full((batch,), self.last, device=like.device)
        return like.new_empty((batch, like.shape[1])), score, exit_index

    def _one(self, inputs: Sequence[Tensor]) -> ExitOutput:
        """One sample: it leaves or it does not, so nothing is indexed."""
        state: State = ()
        best: Tensor | None = None
        log_probs: Tensor | None = None
        live = self.first(*inputs)
        for k, (stage, _, branch, read) in enumerate(self.steps):
            if branch is not None:
                answer = run_branch(branch, read(live), log_probs) if self.chained else branch(*read(live))
                leaves, score, state = self.policy.decide_one(k, answer.logits, answer.confidence, state)
                if leaves:
                    return ExitOutput(answer.logits, self._index[k].clone(), score, self.costs, self.original_macs)
                log_probs = answer.log_probs
                if self.keeps_best:
                    best = _better(best, answer.logits)
            live = stage(*live)
        index, score = self._index[self.last].clone(), self._unasked.clone()
        last = _better(best, self._last(live)) if self.keeps_best else self._last(live)
        return ExitOutput(last, index, score, self.costs, self.original_macs)


class Altered(Exception):
    """The original was changed since its program was captured: to be run again, by another."""


def _checked(stage: Stage, unchanged: Callable[[], bool]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*live: Tensor) -> tuple[Tensor, ...]:
        if not unchanged():
            raise Altered
        return stage(*live)

    return run


def _better(best: Tensor | None, logits: Tensor) -> Tensor:
    """Row by row, whichever of two answers (B, C) is more certain; the earlier one of equals."""
    if best is None:
        return logits
    return torch.where((certainty(logits) > certainty(best))[:, None], logits, best.to(logits.dtype))
