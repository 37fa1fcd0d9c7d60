"""Settings of branch training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from ee_surgery.checks import choice, count, flag, number, numbers, optional, path, word
from ee_surgery.training.objectives import OBJECTIVES, WeightRule
from ee_surgery.training.precision import AskedPrecision

Teacher: TypeAlias = Literal["labels", "original"]
Optimizer: TypeAlias = Literal["adamw", "adam", "sgd"]
Schedule: TypeAlias = Literal["cosine", "linear", "step", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train the branches. The original learns nothing and stays in eval mode.

    Raises:
        ConfigError: a value of another kind, or outside its range: all numbers are finite.
    """

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
    teach: Teacher = "labels"
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
    exit_weights: tuple[float, ...] | WeightRule = "uniform"
    """For `weighted_ce`: one weight an exit that learns, falling with depth (BranchyNet), growing with depth
    (`linear`, EENet), or growing with time (`ramp`, Shallow-Deep Networks); scaled to sum 1."""
    cost_weight: float = 1.0
    """Lambda of the cost-aware objectives (1 in EENets, 0.9 in PTEENet)."""
    optimizer: Optimizer = "adamw"
    """`adam` adds the weight decay to the gradient, as the papers that used it did."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of SGD (Nesterov)."""
    schedule: Schedule = "cosine"
    """`step` divides by ten at each of the `milestones`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """ShardedBatches of the training, in [0, 1]."""
    warmup: float = 0.05
    """Share of all steps over which the rate rises from 0."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient of all that learns together."""
    ensemble_epochs: int = 500
    """Passes over recorded answers that fit the ensembles of `ztw` branches, after all else; 0 for none."""
    mixed_precision: AskedPrecision = "no"
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
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        OBJECTIVES[self.objective]  # raises with near names


def _exit_weights(name: str, value: object) -> tuple[float, ...] | str:
    if isinstance(value, str):
        return choice(name, value, get_args(WeightRule))
    return numbers(name, value, low=0, hint=f"One per exit that learns, or one of {get_args(WeightRule)}.")


def _folder(name: str, value: object) -> str:
    return str(path(name, value))


_SHARE = partial(number, low=0, high=1)
_RATE = partial(number, above=0)
_LEAST_0 = partial(number, low=0)
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "epochs": count,
    "max_steps": optional(count),
    "batch_size": count,
    "accumulate": count,
    "objective": word,
    "distill": _SHARE,
    "distill_from": _SHARE,
    "temperature": _RATE,
    "survivor": optional(_SHARE),
    "teach": partial(choice, known=get_args(Teacher)),
    "cutmix": _LEAST_0,
    "mixup": _LEAST_0,
    "mix_share": _SHARE,
    "views": optional(count),
    "cache_gb": _LEAST_0,
    "ema": partial(number, low=0, below=1),
    "exit_weights": _exit_weights,
    "cost_weight": _LEAST_0,
    "optimizer": partial(choice, known=get_args(Optimizer)),
    "lr": _RATE,
    "weight_decay": _LEAST_0,
    "momentum": partial(number, low=0, below=1),
    "schedule": partial(choice, known=get_args(Schedule)),
    "milestones": partial(numbers, low=0, high=1, hint="ShardedBatches of the training."),
    "warmup": _SHARE,
    "clip_grad": optional(partial(number, above=0, hint="None for gradients as they are.")),
    "ensemble_epochs": partial(count, low=0),
    "mixed_precision": partial(choice, known=get_args(AskedPrecision)),
    "validation": partial(number, low=0, below=1),
    "num_workers": partial(count, low=0),
    "seed": partial(count, low=0),
    "checkpoint_dir": optional(_folder),
    "checkpoint_steps": count,
    "patience_nonfinite": count,
    "progress": flag,
}
