"""The loss of one batch, according to the training settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ee_surgery.branches import ExitLogits
from ee_surgery.branches.scaled import Scaled
from ee_surgery.errors import DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.task import CLASSIFICATION, Task
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.objectives import OBJECTIVES, Answers, foretelling, kd


def relative_costs(branched: EarlyExitModel) -> Tensor:
    """MACs of leaving at each of the K exits, with every branch visited, as fractions of never leaving, (K,)."""
    costs = exit_costs(branched.trunk_macs, branched.branch_macs, [True] * len(branched.branches))
    return torch.tensor(costs) / costs[-1]


def require_labels(labels: Tensor | None, config: TrainConfig, new_head: bool) -> None:
    """Check before training that there are labels if they are needed.

    Raises:
        DataError: there are none.
    """
    if new_head and (labels is None or config.teach == "original"):
        raise DataError("The model has no head of its own to learn from: its new head needs labels.")
    if labels is None and config.teach != "original" and OBJECTIVES.property(config.objective, "reads_labels"):
        raise DataError('The batches have no labels. Use TrainConfig(teach="original") to learn without.')


def take_scale(branches: nn.Module, task: Task, original: Tensor, labels: Tensor | None, config: TrainConfig) -> None:
    """Before branches learn, they take over the scale of what they will answer: labels, or the original's answers.

    Args:
        original: answers of the original to a batch; zeros, where it did not run, have no scale.
        labels: of the batch; class numbers, of a gallery, have none.
    """
    by_original = config.teach == "original" or labels is None or labels.ndim == 1
    values = task.values(original.float() if by_original or labels is None else labels.float())
    for layer in branches.modules():
        if isinstance(layer, Scaled):
            layer.fit(values)


def batch_loss(
    exits: list[ExitLogits],
    original: Tensor,
    labels: Tensor | None,
    costs: Tensor,
    config: TrainConfig,
    *,
    new_head: bool = False,
    joint: bool = False,
    progress: float = 0.0,
    task: Task = CLASSIFICATION,
) -> Tensor:
    """The loss of one batch as `config` says: the objective on labels, and the KL term towards the original.

    Where answers are no choices, confidence units learn what each answer will be worth.

    Args:
        exits: answers of the branches, with gradients.
        original: logits of the original or, with `new_head`, of the head that stands in for the one it lacks, (B, C).
        labels: see `Task.check_target`; samples that it ignores count nowhere. Not read with `teach="original"`, not
            needed by an objective that reads none (`kd`).
        costs: see `relative_costs`.
        joint: the original learns too.
        progress: share of the training that is done.
        task: what the answers are.
    Raises:
        DataError: no labels where they are needed, or other than the task's.
    """
    require_labels(labels, config, new_head)
    if config.teach == "original":
        labels = task.labels_from(original)
    elif labels is not None:
        classes = task.classes(exits[0].logits.shape[task.class_dim])
        labels = task.check_target(labels.to(original.device), classes, len(original))
        counts = ~task.ignored(labels)
        if not counts.any():
            return torch.stack([exit.logits.sum() for exit in exits]).sum() * 0 + original.sum() * 0
        if not counts.all():
            labels, original = labels[counts], original[counts]
            exits = [ExitLogits(logits[counts], None if c is None else c[counts]) for logits, c, _ in exits]
    else:
        labels = task.labels_from(original)  # not read
    exits = [exit._replace(logits=exit.logits.float()) for exit in exits]
    teacher = original.float() if joint else original.detach().float()
    answers = Answers(exits, teacher, labels, costs, progress, task)
    own = task.mean_loss(original.float(), labels) if new_head else 0.0
    own = own if task.chooses else own + foretelling(answers)
    if config.distill == 1 or OBJECTIVES[config.objective] is kd:
        return own + kd(answers, config)
    loss = own + OBJECTIVES[config.objective](answers, config)
    if config.distill == 0 or answers.progress < config.distill_from:
        return loss
    return (1 - config.distill) * loss + config.distill * kd(answers, config)
