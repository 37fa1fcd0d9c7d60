"""The optimizer, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ee_surgery.training.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names. Norms and biases are not decayed, as usual."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return (torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW)(groups, lr=config.lr)


def learning_rate(config: TrainConfig, progress: float, steps: int) -> float:
    """The rate of one step.

    `wsd`, warmup-stable-decay, is constant up to the decay, so that the end need not be known before.
    Source: Hu et al., MiniCPM, 2024 (arXiv 2404.06395).

    Args:
        progress: fraction of the training that is done, in [0, 1).
        steps: of the whole training; 0 if unknown, for a constant rate.
    """
    if not steps:
        return config.lr
    rise = min(1.0, (progress + 1 / steps) / config.warmup) if config.warmup else 1.0
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "step": 0.1 ** sum(progress >= share for share in config.milestones),
        "constant": 1.0,
        "wsd": min(1.0, (1 - progress) / config.decay),
    }[config.schedule]
    return config.lr * rise * shape
