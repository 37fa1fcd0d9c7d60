"""Settings of branch training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_surgery.errors import ConfigError
from ee_surgery.training.objectives import OBJECTIVES


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train the branches. The original learns nothing and stays in eval mode."""

    epochs: int = 5
    """Passes over the training set."""
    max_steps: int | None = None
    """Steps after which training ends in any case, and over which the schedule then runs; None for all epochs."""
    batch_size: int = 128
    """Samples a batch, of which each process runs its piece; not used when the data comes in batches already."""
    accumulate: int = 1
    """Batches a step; their gradients are added up, weighed by their samples."""
    objective: str = "sum_ce"
    """Loss on the labels: a name in `OBJECTIVES`, or `kd` for none."""
    distill: float = 0.5
    """Weight in [0, 1] of the KL term towards the original's logits, the objective having the rest."""
    distill_from: float = 0.0
    """Share of the training after which the KL term sets in."""
    temperature: float = 2.0
    """Of the softmax in the KL term."""
    survivor: float | None = None
    """Weigh samples by how likely they get to each exit: a threshold in [0, 1] of those before; None for no weights."""
    teach: Literal["labels", "original"] = "labels"
    """`original`: no labels are read; the original's own answer stands for them."""
    cutmix: float = 0.0
    """Alpha of CutMix, which pastes a patch of another picture of the batch and shares the label; 0 for none."""
    mixup: float = 0.0
    """Alpha of Mixup, which blends two pictures and their labels; 0 for none. With both, either is drawn."""
    mix_share: float = 0.5
    """Share of the batches that CutMix or Mixup changes."""
    views: int | None = None
    """How many passes over the data differ; then the first comes again, crop for crop. None: all do. With it, what
    the original makes of them is kept on disk where reading that back is quicker than running the original."""
    cache_gb: float = 10.0
    """Most disk space that kept features may take, in gigabytes; 0 for none. They lie beside the checkpoint, or among
    the system's temporary files, and are removed at the end."""
    ema: float = 0.0
    """Decay in [0, 1), a step, of the moving average of the weights that the branches end with; 0 for the last ones."""
    exit_weights: tuple[float, ...] | Literal["uniform", "falling", "linear", "ramp"] = "uniform"
    """For `weighted_ce`: one weight an exit that learns, falling with depth (BranchyNet), growing with depth
    (`linear`, EENet), or growing with time (`ramp`, Shallow-Deep Networks); scaled to sum 1."""
    cost_weight: float = 1.0
    """Lambda of the cost-aware objectives (1 in EENets, 0.9 in PTEENet)."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """`adam` adds the weight decay to the gradient, as the papers that used it did."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of SGD (Nesterov)."""
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """`step` divides by ten at each of the `milestones`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training, in [0, 1]."""
    warmup: float = 0.05
    """Share of all steps over which the rate rises from 0."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient of all that learns together."""
    ensemble_epochs: int = 500
    """Passes over recorded answers that fit the ensembles of `ztw` branches, after all else; 0 for none."""
    mixed_precision: Literal["no", "auto", "bf16", "fp16"] = "no"
    """`auto`: bfloat16 where the device has instructions for it, float32 (`no`) elsewhere; training says which. The
    default is the same on every machine."""
    validation: float = 0.1
    """Share of a map-style training set held out to report each exit's accuracy; 0 for none."""
    num_workers: int = 0
    """Processes that load data."""
    seed: int = 0
    checkpoint_dir: str | None = None
    """Where to keep the checkpoint that the same call resumes from, exactly; None for none."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; one is written after every epoch too."""
    patience_nonfinite: int = 10
    """Skipped steps in a row, their loss not finite, after which training stops with an error."""
    progress: bool = True
    """Show a progress bar where the output is a terminal, one line an epoch elsewhere."""

    def __post_init__(self) -> None:
        OBJECTIVES[self.objective]  # raises with near names
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_steps", "patience_nonfinite"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("max_steps", "views"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, or None, got {getattr(self, name)}.")
        for name in ("distill", "distill_from", "warmup", "survivor", "mix_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {value}.")
        if not all(0 <= share <= 1 for share in self.milestones):
            raise ConfigError(f"milestones must be shares of the training in [0, 1], got {self.milestones}.")
        if self.ensemble_epochs < 0:
            raise ConfigError(f"ensemble_epochs must be at least 0, got {self.ensemble_epochs}.")
        for name in ("cutmix", "mixup", "cache_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("validation", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")


_CHOICES = {
    "teach": ("labels", "original"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "linear", "step", "constant"),
    "mixed_precision": ("no", "auto", "bf16", "fp16"),
}
