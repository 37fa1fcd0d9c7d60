"""A moving average of the trained weights, which is often better than the last weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AveragedWeights:
    """Exponential moving average of a module's parameters and buffers; with a decay of 0, the module itself.

    Source: Polyak & Juditsky (SIAM J. Control Optim. 1992); exponential as in Tarvainen & Valpola (arXiv:1703.01780).
    """

    def __init__(self, learner: nn.Module, decay: float) -> None:
        self.learner = learner
        self.mean = (
            AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
        )

    def update(self) -> None:
        """Update the average with the current weights."""
        if self.mean is not None:
            self.mean.update_parameters(self.learner)

    def settle(self) -> None:
        """Copy the average into the module at the end of training."""
        if self.mean is not None:
            self.learner.load_state_dict(self.mean.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {} if self.mean is None else self.mean.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if self.mean is not None:
            self.mean.load_state_dict(state)
