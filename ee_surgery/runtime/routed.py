"""Run a batch so that every sample stops where the policy lets it leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_surgery.branches.base import Branch
from ee_surgery.graph.stages import compact
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import State
from ee_surgery.runtime.program import Program


@dataclass(frozen=True, eq=False)
class ExitOutput:
    """Where each sample left, with what answer, at what cost."""

    logits: Tensor
    """Shape (B, C)."""
    exit_index: Tensor
    """int64, shape (B,); the last is the original's own head."""
    score: Tensor
    """Score at the exit taken, shape (B,); NaN at the original's head, which is not asked."""
    macs: Tensor
    """int64, shape (B,): the stages that ran for the sample and every branch it was shown to."""


def route(
    program: Program, branches: Sequence[Branch], policy: ThresholdPolicy, costs: Sequence[int], x: Tensor
) -> ExitOutput:
    """Run stages, ask branches, let samples leave, compact what is left.

    Args:
        program: K stages. `branches`: K - 1, in eval mode.
        costs: MACs of leaving at each of the K exits.
        x: inputs, shape (B, ...).
    """
    if x.shape[0] == 1:
        return _route_one(program, branches, policy, costs, x)
    visits, dims = policy.visits, [stage.batch_dims for stage in program.stages]
    rows: Tensor | None = None  # which samples are still in flight; None while all are
    state: State = ()
    live = program.stages[0](x)
    # Filled once the first answer tells classes and dtype.
    logits = exit_index = score = None
    for k, branch in enumerate(branches):
        if visits[k]:
            answer = branch(program.features(k, live))
            decision = policy.decide(k, answer.logits, answer.confidence, state)
            state = decision.state
            gone = decision.leaves.nonzero().squeeze(1)
            if len(gone) > 0:
                if logits is None or exit_index is None or score is None:
                    logits, exit_index, score = _empty(answer.logits, x.shape[0], len(branches))
                stay = None if len(gone) == len(decision.leaves) else (~decision.leaves).nonzero().squeeze(1)
                done = gone if rows is None else rows[gone]
                everyone = stay is None and rows is None
                logits[done] = answer.logits if everyone else answer.logits[gone]
                score[done] = (decision.score if everyone else decision.score[gone]).to(score.dtype)
                exit_index[done] = k
                if stay is None:
                    return _output(logits, exit_index, score, costs)
                rows = stay if rows is None else rows[stay]
                live = compact(live, dims[k + 1], stay)
                state = tuple(tensor.index_select(0, stay) for tensor in state)
        live = program.stages[k + 1](*live)
    if logits is None or exit_index is None or score is None or rows is None:
        _, exit_index, score = _empty(live[0], x.shape[0], len(branches))
        return _output(live[0], exit_index, score, costs)
    logits[rows] = live[0].to(logits.dtype)
    return _output(logits, exit_index, score, costs)


def _empty(like: Tensor, batch: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = like.new_empty((batch, like.shape[1]))
    exit_index = torch.full((batch,), last, device=like.device)
    return logits, exit_index, torch.full((batch,), torch.nan, device=like.device)


def _output(logits: Tensor, exit_index: Tensor, score: Tensor, costs: Sequence[int]) -> ExitOutput:
    return ExitOutput(logits, exit_index, score, torch.tensor(costs, device=logits.device)[exit_index])


def _route_one(
    program: Program, branches: Sequence[Branch], policy: ThresholdPolicy, costs: Sequence[int], x: Tensor
) -> ExitOutput:
    """One sample: it leaves or it does not, so nothing is indexed."""
    visits = policy.visits
    state: State = ()
    live = program.stages[0](x)
    for k, branch in enumerate(branches):
        if visits[k]:
            answer = branch(program.features(k, live))
            decision = policy.decide(k, answer.logits, answer.confidence, state)
            if decision.leaves.item():
                return _single(answer.logits, k, decision.score.float(), costs)
            state = decision.state
        live = program.stages[k + 1](*live)
    return _single(live[0], len(branches), torch.full((1,), torch.nan, device=x.device), costs)


def _single(logits: Tensor, exit_index: int, score: Tensor, costs: Sequence[int]) -> ExitOutput:
    device = logits.device
    return ExitOutput(
        logits, torch.tensor([exit_index], device=device), score, torch.tensor([costs[exit_index]], device=device)
    )
