"""Losses of multi-exit training: pure functions of the logits of all exits."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.branches.base import ExitLogits
from ee_surgery.errors import ConfigError
from ee_surgery.registry import Registry
from ee_surgery.task import CLASSIFICATION, Task


class Answers(NamedTuple):
    """The logits of all exits on one batch, with labels and costs."""

    exits: list[ExitLogits]
    """Of the K - 1 branches."""
    original: Tensor
    """Logits of the original, (B, C); with a gradient only where the original itself learns."""
    labels: Tensor
    """As the task checked them: for one right class int64 (B,), or class probabilities (B, C)."""
    costs: Tensor
    """MACs of leaving at each of the K exits, as fractions of never leaving, (K,); the last is 1."""
    progress: float = 0.0
    """Share of the training that is done, in [0, 1]."""
    task: Task = CLASSIFICATION
    """What the answers are: `task.loss(logits, labels)` is the loss of each sample."""

    @property
    def learning(self) -> list[Tensor]:
        """Logits of the trained exits: the branches', and the original's if it is trained."""
        return [*(exit.logits for exit in self.exits), *([self.original] if self.original.requires_grad else [])]


class ObjectiveSettings(Protocol):
    """The settings that an objective may read."""

    @property
    def cost_weight(self) -> float:
        """Lambda of the expected cost."""
        ...

    @property
    def exit_weights(self) -> tuple[float, ...] | str:
        """One per exit, or a rule."""
        ...

    @property
    def temperature(self) -> float:
        """Of the softmax in `kd`."""
        ...

    @property
    def survivor(self) -> float | None:
        """Threshold of the soft exits that weight samples; None for equal weights."""
        ...


class Objective(Protocol):
    """Signature of an objective: a batch of answers and the settings to a scalar loss."""

    def __call__(self, answers: Answers, config: ObjectiveSettings) -> Tensor:
        """The loss, a scalar."""
        ...


OBJECTIVES: Registry[Objective] = Registry(
    "objective", "ee_surgery.objectives", reads_labels=True, reads_original=True, tasks=("classification",)
)
"""Name -> loss.

Properties: `reads_labels=False` for one that also works on unlabelled data; `reads_original=False` for one that does
not read what a frozen original answers, which then need not run where its features are cached;
`tasks=None` for one that takes answers of any task, as through `answers.task.loss`, or the names of some.
"""


@OBJECTIVES.register("sum_ce", reads_original=False, tasks=None)
def sum_ce(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Sum over the exits that learn of their losses: cross-entropies, for one right class.

    Source: v0 of EENets (arXiv:2409.05336), Shallow-Deep Networks (arXiv:1810.07052) with a frozen original, MSDNet
    (arXiv:1703.09844). PTEENet takes the mean, which is the same up to the learning rate.
    """
    return _means(_losses(answers), answers, config).sum()


@OBJECTIVES.register("weighted_ce", reads_original=False, tasks=None)
def weighted_ce(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Weighted mean over the exits that learn of their losses (as `sum_ce`); see `exit_weights`."""
    losses = _means(_losses(answers), answers, config)
    weights = exit_weights(config.exit_weights, answers.costs[: len(losses)], answers.progress)
    return losses @ weights.to(losses)


WeightRule: TypeAlias = Literal["uniform", "falling", "linear", "ramp"]


def exit_weights(weights: tuple[float, ...] | str, costs: Tensor, progress: float = 0.0) -> Tensor:
    """One weight per exit, scaled to sum to 1, shape (L,) like `costs`.

    >>> exit_weights("linear", torch.tensor([0.25, 0.5, 1.0])) * 6
    tensor([1., 2., 3.])

    Args:
        weights: numbers; `uniform`; `falling`: from 1 at the first exit on a line to 0.3 at the last (BranchyNet's
            advice); `linear`: in proportion to the depth, counted from 1 (EENet, whose own weights
            k / (K (K + 1)) sum to one half); `ramp`: min(cost, 0.01 + progress * cost), from near nothing to each
            exit's relative cost, and 1 for the original (the joint training of Shallow-Deep Networks).
        costs: of leaving at each of the exits that learn, fractions of the whole.
        progress: share of the training that is done.
    Raises:
        ConfigError: an unknown rule, not one per exit, a negative weight, or all zero.
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
        raise ConfigError(f"exit_weights must be one of {get_args(WeightRule)}, or {n} numbers >= 0; got {weights!r}.")
    return torch.tensor(weights) / sum(weights)


@OBJECTIVES.register("final_only", tasks=None)
def final_only(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Loss of the original's own answer (v6 of PTEENet): trains the original before any branch is there.

    Raises:
        ConfigError: the original is frozen.
    """
    if not answers.original.requires_grad:
        raise ConfigError("The objective 'final_only' teaches the original alone, which is frozen: use joint=True.")
    return answers.task.mean_loss(answers.original, answers.labels)


@OBJECTIVES.register("kd", reads_labels=False, tasks=None)
def kd(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Sum over the branches of T^2 KL(softmax(z_K / T) || softmax(z_k / T)); reads no labels.

    Of several labels, the mean over them of the divergence of each.

    The original is the teacher: no gradient flows into it from here. Source: EENet (arXiv:2301.07099), with T = 3.
    """
    t = config.temperature
    teacher, task = answers.original.detach().float(), answers.task
    losses = torch.stack([task.divergence(exit.logits.float(), teacher, t) for exit in answers.exits])
    return t * t * _means(losses, answers, config).sum()


def foretelling(answers: Answers) -> Tensor:
    """Sum over the branches of the cross-entropy between confidence units and the outcomes of their answers."""
    total = answers.original.new_zeros(())
    for exit in answers.exits:
        if exit.confidence is not None:
            with torch.no_grad():
                wanted = answers.task.outcome(exit.logits, answers.labels).to(exit.confidence)
            total = total + F.binary_cross_entropy_with_logits(exit.confidence, wanted)
    return total


def mixture(answers: Answers) -> tuple[list[Tensor], list[Tensor]]:
    """The network's prediction and cost if each exit is taken with the probability given by its confidence.

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


@OBJECTIVES.register("normalized", tasks=None)
def normalized(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """sum_k (mean c_k / sum_j mean c_j) (CE_k + lambda t_k), the original's confidence being 1 (v3 of EENets)."""
    sure = torch.stack(
        [*(torch.sigmoid(u) for u in _confidences(answers)), answers.original.new_ones(len(answers.original))]
    )
    shares = sure.mean(1) / sure.mean(1).sum()
    losses = _means(_losses(answers, all_of_them=True), answers, config)
    return shares @ (losses + config.cost_weight * answers.costs.to(losses))


@OBJECTIVES.register("tagged", tasks=None)
def tagged(answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Each sample is tagged with the exit where CE + lambda t is least, taught there, and c learns the tags (v4).

    The binary cross-entropies of the confidences weigh "leaves here" and "does not" equally. Tags are worked out from
    the very batch: the published ones are kept by the number of the batch while the loader shuffles, and so belong to
    other images.

    Source: v4 of EENets (arXiv:2409.05336).
    """
    losses = _losses(answers, all_of_them=True)
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
    """Probability that each sample reaches each exit, scaled to mean 1 per exit: (K, B), without gradient.

    prod_{j<k} (1 - s_j), where s_j is the confidence of exit j, or where it has no confidence unit
    sigmoid((max p_j - threshold) / 0.05).

    Source: survivor weighting of CalexNet (arXiv:2509.08318), which states the product and leaves s open.
    """
    with torch.no_grad():
        there = [answers.original.new_zeros(len(answers.original))]  # in log space: nearly all samples may have left
        for exit in answers.exits:
            top = answers.task.certainty(exit.logits)
            leaves = exit.confidence if exit.confidence is not None else (top - threshold) / _SOFTNESS
            there.append(there[-1] + F.logsigmoid(-leaves))
        return torch.softmax(torch.stack(there), 1) * len(there[0])


def _means(losses: Tensor, answers: Answers, config: ObjectiveSettings) -> Tensor:
    """Means over the samples of losses (L, B) of the first L exits; survivors count more where they are asked to."""
    if config.survivor is None:
        return losses.mean(1)
    return (losses * survivor_weights(answers, config.survivor)[: len(losses)].to(losses)).mean(1)


def _losses(answers: Answers, all_of_them: bool = False) -> Tensor:
    """Of each sample at each exit that learns, or at all K, (L, B)."""
    logits = [*(exit.logits for exit in answers.exits), answers.original] if all_of_them else answers.learning
    return torch.stack([answers.task.loss(z, answers.labels) for z in logits])


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
