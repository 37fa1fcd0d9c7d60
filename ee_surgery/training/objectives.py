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
    """Logits of the original, (B, C); with a gradient only where the original itself learns."""
    labels: Tensor
    """int64 (B,), or class probabilities (B, C)."""
    costs: Tensor
    """MACs of leaving at each of the K exits, as fractions of never leaving, (K,); the last is 1."""
    progress: float = 0.0
    """Share of the training that is done, in [0, 1]."""

    @property
    def learning(self) -> list[Tensor]:
        """Logits of the exits that learn: the branches', and the original's where it does."""
        return [*(exit.logits for exit in self.exits), *([self.original] if self.original.requires_grad else [])]


class ObjectiveSettings(Protocol):
    """The settings that an objective may read."""

    @property
    def cost_weight(self) -> float:
        """Lambda of the expected cost."""
        ...

    @property
    def exit_weights(self) -> tuple[float, ...] | str:
        """One an exit, or a rule."""
        ...

    @property
    def temperature(self) -> float:
        """Of the softmax in `kd`."""
        ...

    @property
    def survivor(self) -> float | None:
        """Threshold of the soft exits that weigh samples; None for equal weights."""
        ...


class Objective(Protocol):
    """Signature of an objective: a batch of answers and the settings to a scalar loss."""

    def __call__(self, answers: Answers, config: ObjectiveSettings) -> Tensor:
        """The loss, a scalar."""
        ...


OBJECTIVES: Registry[Objective] = Registry("objective", reads_labels=True, reads_original=True)
"""Name -> loss.

Properties: `reads_labels=False` for one that also works on unlabelled data; `reads_original=False` for one that does
not read what a frozen original answers, which then need not run where its features are cached.
"""


@OBJECTIVES.register("sum_ce", reads_original=False)
def sum_ce(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Sum over the exits that learn of their cross-entropies.

    Source: v0 of EENets (arXiv:2409.05336), Shallow-Deep Networks (arXiv:1810.07052) with a frozen original, MSDNet
    (arXiv:1703.09844). PTEENet takes the mean, which is the same up to the learning rate.
    """
    return _means(_cross_entropies(answers), answers, config).sum()


@OBJECTIVES.register("weighted_ce", reads_original=False)
def weighted_ce(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Weighted mean over the exits that learn of their cross-entropies; see `exit_weights`."""
    losses = _means(_cross_entropies(answers), answers, config)
    weights = exit_weights(config.exit_weights, answers.costs[: len(losses)], answers.progress)
    return losses @ weights.to(losses)


def exit_weights(weights: tuple[float, ...] | str, costs: Tensor, progress: float = 0.0) -> Tensor:
    """One weight an exit, scaled to sum 1, shape (L,) like `costs`.

    Args:
        weights: numbers; `uniform`; `falling`: from 1 at the first exit on a line to 0.3 at the last (BranchyNet's
            advice); `linear`: in proportion to the depth, counted from 1 (EENet, whose own weights
            k / (K (K + 1)) sum to one half); `ramp`: min(cost, 0.01 + progress * cost), from near nothing to each
            exit's relative cost, and 1 for the original (the joint training of Shallow-Deep Networks).
        costs: of leaving at each of the exits that learn, fractions of the whole.
        progress: share of the training that is done.
    Raises:
        ConfigError: a rule of no known name, not one for each exit, a negative one, or all zero.
    """
    n = len(costs)
    if weights == "uniform":
        weights = (1.0,) * n
    elif weights == "falling":
        weights = tuple(1 - 0.7 * k / max(1, n - 1) for k in range(n))
    elif weights == "linear":
        weights = tuple(float(k + 1) for k in range(n))
    elif weights == "ramp":
        weights = tuple(1.0 if cost >= 1 else min(cost, 0.01 + progress * cost) for cost in costs.tolist())
    if isinstance(weights, str) or len(weights) != n or min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(
            f"exit_weights must be 'uniform', 'falling', 'linear', 'ramp' or {n} numbers >= 0; got {weights!r}."
        )
    return torch.tensor(weights) / sum(weights)


@OBJECTIVES.register("final_only")
def final_only(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Cross-entropy of the original's own answer (v6 of PTEENet): trains the original before any branch is there.

    Raises:
        ConfigError: the original does not learn.
    """
    if not answers.original.requires_grad:
        raise ConfigError("The objective 'final_only' teaches the original alone, which is frozen: use joint=True.")
    return F.cross_entropy(answers.original, answers.labels)


@OBJECTIVES.register("kd", reads_labels=False)
def kd(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Sum over the branches of T^2 KL(softmax(z_K / T) || softmax(z_k / T)); reads no labels.

    The original is the teacher: no gradient flows into it from here. Source: EENet (arXiv:2301.07099), with T = 3.
    """
    t = config.temperature
    teacher = F.log_softmax(answers.original.detach().float() / t, -1)
    students = [F.log_softmax(exit.logits.float() / t, -1) for exit in answers.exits]
    losses = torch.stack([F.kl_div(s, teacher, log_target=True, reduction="none").sum(-1) for s in students])
    return t * t * _means(losses, answers, config).sum()


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
    for k, u in reversed(list(enumerate(_confidences(answers)))):
        leave, stay = F.logsigmoid(u)[:, None], F.logsigmoid(-u)[:, None]
        log_p.append(torch.logaddexp(leave + F.log_softmax(answers.exits[k].logits, -1), stay + log_p[-1]))
        c = torch.sigmoid(u)
        costs.append(c * answers.costs[k] + (1 - c) * costs[-1])
    return log_p[::-1], costs[::-1]


@OBJECTIVES.register("recursive")
def recursive(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """NLL of the mixture from the first exit on, plus lambda times its expected cost (v1 of the papers)."""
    log_p, costs = mixture(answers)
    return _means((_nll(log_p[0], answers.labels) + config.cost_weight * costs[0])[None], answers, config)[0]


@OBJECTIVES.register("cumulative")
def cumulative(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """The recursive loss started at every exit, summed over all K (v2, EENets; PTEENet divides it by K - 1)."""
    log_p, costs = mixture(answers)
    losses = [_nll(p, answers.labels) + config.cost_weight * t for p, t in zip(log_p, costs, strict=True)]
    return _means(torch.stack(losses), answers, config).sum()


@OBJECTIVES.register("normalized")
def normalized(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """sum_k (mean c_k / sum_j mean c_j) (CE_k + lambda t_k), the original's confidence being 1 (v3 of EENets)."""
    sure = torch.stack([*(torch.sigmoid(u) for u in _confidences(answers)), torch.ones_like(answers.original[:, 0])])
    shares = sure.mean(1) / sure.mean(1).sum()
    losses = _means(_cross_entropies(answers, all_of_them=True), answers, config)
    return shares @ (losses + config.cost_weight * answers.costs.to(losses))


@OBJECTIVES.register("tagged")
def tagged(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Each sample is tagged with the exit where CE + lambda t is least, taught there, and c learns the tags (v4).

    The binary cross-entropies of the confidences weigh "leaves here" and "does not" equally. Tags are worked out from
    the very batch: the published ones are kept by the number of the batch while the loader shuffles, and so belong to
    other images.

    Source: v4 of EENets (arXiv:2409.05336).
    """
    losses = _cross_entropies(answers, all_of_them=True)
    priced = losses + config.cost_weight * answers.costs.to(losses)[:, None]
    tags = priced.detach().argmin(0)
    loss = _means(priced.gather(0, tags[None]), answers, config)[0]
    for k, u in enumerate(_confidences(answers)):
        here = tags == k
        bce = F.binary_cross_entropy_with_logits(u, here.to(u), reduction="none")
        halves = [bce[rows].mean() for rows in (here, ~here) if rows.any()]
        loss = loss + torch.stack(halves).mean()
    return loss


_SOFTNESS = 0.05  # of the soft exits, in units of probability


def survivor_weights(answers: Answers, threshold: float) -> Tensor:
    """How likely each sample gets to each exit, scaled to mean 1 at every exit: (K, B), without gradient.

    prod_{j<k} (1 - s_j), where s_j is the confidence of exit j, or where it has no confidence unit
    sigmoid((max p_j - threshold) / 0.05).

    Source: survivor weighting of CalexNet (arXiv:2509.08318), which states the product and leaves s open.
    """
    with torch.no_grad():
        there = [torch.zeros_like(answers.original[:, 0])]  # in log space: a batch may be all but gone
        for exit in answers.exits:
            top = torch.softmax(exit.logits, -1).amax(-1)
            leaves = exit.confidence if exit.confidence is not None else (top - threshold) / _SOFTNESS
            there.append(there[-1] + F.logsigmoid(-leaves))
        return torch.softmax(torch.stack(there), 1) * len(there[0])


def _means(losses: Tensor, answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Means over the samples of losses (L, B) of the first L exits; survivors count more where they are asked to."""
    if config.survivor is None:
        return losses.mean(1)
    return (losses * survivor_weights(answers, config.survivor)[: len(losses)].to(losses)).mean(1)


def _cross_entropies(answers: Answers, all_of_them: bool = False) -> Tensor:
    """Of each sample at each exit that learns, or at all K, (L, B)."""
    logits = [*(exit.logits for exit in answers.exits), answers.original] if all_of_them else answers.learning
    return torch.stack([F.cross_entropy(z, answers.labels, reduction="none") for z in logits])


def _confidences(answers: Answers) -> list[Tensor]:
    found = [exit.confidence for exit in answers.exits if exit.confidence is not None]
    if len(found) != len(answers.exits):
        raise ConfigError(
            "Cost-aware objectives need branches with a confidence unit: BranchSpec(..., confidence=True)."
        )
    return found


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """Of each sample, (B,)."""
    return F.nll_loss(log_p, labels, reduction="none") if labels.ndim == 1 else -(labels * log_p).sum(-1)
