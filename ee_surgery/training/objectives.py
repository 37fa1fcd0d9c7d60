"""Losses of multi-exit training: pure functions of what the exits answered."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.branches.base import ExitLogits
from ee_surgery.errors import ConfigError
from ee_surgery.registry import Registry


class Answers(NamedTuple):
    """One batch, as all exits see it."""

    exits: list[ExitLogits]
    """Of the K - 1 branches."""
    original: Tensor
    """Logits of the original, (B, C), without gradient."""
    labels: Tensor
    """int64 (B,), or class probabilities (B, C)."""
    costs: Tensor
    """MACs of leaving at each of the K exits, as fractions of never leaving, (K,); the last is 1."""


class Weights(Protocol):
    """The settings that an objective may read."""

    @property
    def cost_weight(self) -> float:
        """Lambda of the expected cost."""
        ...

    @property
    def exit_weights(self) -> tuple[float, ...] | str:
        """One a branch, `uniform` or `linear`."""
        ...

    @property
    def temperature(self) -> float:
        """Of the softmax in `kd`."""
        ...


class Objective(Protocol):
    """Signature of an objective: a batch of answers and the settings to a scalar loss."""

    def __call__(self, answers: Answers, config: Weights) -> Tensor:
        """The loss, a scalar."""
        ...


OBJECTIVES: Registry[Objective] = Registry("objective")


@OBJECTIVES.register("sum_ce")
def sum_ce(answers: Answers, config: Weights) -> Tensor:
    """Sum over the branches of their cross-entropies."""
    return torch.stack([F.cross_entropy(exit.logits, answers.labels) for exit in answers.exits]).sum()


@OBJECTIVES.register("weighted_ce")
def weighted_ce(answers: Answers, config: Weights) -> Tensor:
    """Weighted mean over the branches of their cross-entropies.

    Source: the linear weights k / (K (K + 1)) of EENet (Ilhan et al., arXiv:2301.07099), here scaled to sum 1
    over the branches that learn.
    """
    losses = torch.stack([F.cross_entropy(exit.logits, answers.labels) for exit in answers.exits])
    return losses @ exit_weights(config.exit_weights, len(losses)).to(losses)


def exit_weights(weights: tuple[float, ...] | str, n: int) -> Tensor:
    """Weights of n branches, summing to 1, float32 (n,).

    Raises:
        ConfigError: not one for each branch, a negative one, or all zero.
    """
    if weights == "uniform":
        weights = (1.0,) * n
    elif weights == "linear":
        weights = tuple(float(k + 1) for k in range(n))
    if isinstance(weights, str) or len(weights) != n or min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(f"exit_weights must be 'uniform', 'linear' or {n} numbers >= 0, got {weights!r}.")
    return torch.tensor(weights) / sum(weights)


@OBJECTIVES.register("kd")
def kd(answers: Answers, config: Weights) -> Tensor:
    """Sum over the branches of T^2 KL(softmax(z_K / T) || softmax(z_k / T)); reads no labels."""
    t = config.temperature
    teacher = F.log_softmax(answers.original.float() / t, -1)
    losses = [
        F.kl_div(F.log_softmax(exit.logits.float() / t, -1), teacher, log_target=True, reduction="batchmean")
        for exit in answers.exits
    ]
    return t * t * torch.stack(losses).sum()


def mixture(answers: Answers) -> tuple[list[Tensor], list[Tensor]]:
    """What the network answers, and costs, when each exit is taken with the probability its confidence gives.

    P_K = p_K, P_k = c_k p_k + (1 - c_k) P_{k+1} and T_K = 1, T_k = c_k t_k + (1 - c_k) T_{k+1}, in log space.

    Returns:
        log P_k, each (B, C), and T_k, each (B,); for k = 1..K.
    Raises:
        ConfigError: a branch has no confidence unit.
    Source: EENets (arXiv:2409.05336) and PTEENet (arXiv:2501.02508), whose code takes the log of the mixture.
    """
    log_p = [F.log_softmax(answers.original, -1)]
    costs = [torch.ones_like(log_p[0][:, 0])]
    for k in reversed(range(len(answers.exits))):
        logits, u = answers.exits[k]
        if u is None:
            raise ConfigError(
                "Cost-aware objectives need branches with a confidence unit: BranchSpec(..., confidence=True)."
            )
        leave, stay = F.logsigmoid(u)[:, None], F.logsigmoid(-u)[:, None]
        log_p.append(torch.logaddexp(leave + F.log_softmax(logits, -1), stay + log_p[-1]))
        c = torch.sigmoid(u)
        costs.append(c * answers.costs[k] + (1 - c) * costs[-1])
    return log_p[::-1], costs[::-1]


@OBJECTIVES.register("recursive")
def recursive(answers: Answers, config: Weights) -> Tensor:
    """NLL of the mixture from the first exit on, plus lambda times its expected cost (v1 of the papers)."""
    log_p, costs = mixture(answers)
    return _nll(log_p[0], answers.labels) + config.cost_weight * costs[0].mean()


@OBJECTIVES.register("cumulative")
def cumulative(answers: Answers, config: Weights) -> Tensor:
    """The recursive loss started at every exit, summed over all K (v2, EENets; PTEENet divides it by K - 1)."""
    log_p, costs = mixture(answers)
    terms = [_nll(p, answers.labels) + config.cost_weight * t.mean() for p, t in zip(log_p, costs, strict=True)]
    return torch.stack(terms).sum()


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_p, labels) if labels.ndim == 1 else -(labels * log_p).sum(-1).mean()
