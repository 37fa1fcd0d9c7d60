"""Settings of branch training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from ee_surgery.checks import choice, count, flag, number, numbers, optional, path, word
from ee_surgery.errors import UnknownNameError
from ee_surgery.names import TrainPrecision
from ee_surgery.registry import suggest
from ee_surgery.training.objectives import OBJECTIVES, WeightRule

Teacher: TypeAlias = Literal["labels", "original"]
Optimizer: TypeAlias = Literal["adamw", "adam", "sgd"]
Schedule: TypeAlias = Literal["cosine", "linear", "step", "constant", "wsd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train the branches. The original is not trained and stays in eval mode.

    Raises:
        ConfigError: a value of the wrong type or outside its range; all numbers must be finite.
    """

    epochs: int = 5
    """Passes over the training set."""
    max_steps: int | None = None
    """Largest number of steps, over which the schedule then runs; None for all epochs."""
    batch_size: int = 128
    """Samples per global batch, sharded over processes; not used if the data already comes in batches."""
    accumulate: int = 1
    """Batches per step; their gradients are summed, weighted by their number of samples."""
    objective: str = "sum_ce"
    """Loss on the labels: a name in `OBJECTIVES`; `kd` uses no labels."""
    distill: float = 0.5
    """Weight in [0, 1] of the KL term towards the original's logits; the objective has the rest."""
    distill_from: float = 0.0
    """Fraction of the training after which the KL term is used."""
    temperature: float = 2.0
    """Of the softmax in the KL term."""
    survivor: float | None = None
    """Weight samples by their probability of reaching each exit, given this threshold in [0, 1] at earlier exits."""
    teach: Teacher = "labels"
    """`original`: the original's predictions are used as labels, and no labels are read."""
    cutmix: float = 0.0
    """Alpha of CutMix, which pastes a patch of another image of the batch and mixes the labels; 0 for none."""
    mixup: float = 0.0
    """Alpha of Mixup, which blends two images and their labels; 0 for none. With both, one is drawn at random."""
    mix_share: float = 0.5
    """Fraction of the batches that CutMix or Mixup changes."""
    views: int | None = None
    """Number of distinct augmented passes; later epochs repeat them exactly, so backbone features can be cached on disk
    if that is faster than running the original. None: every epoch is new."""
    cache_gb: float = 10.0
    """Largest size of the feature cache in gigabytes; 0 for no cache. It is in `checkpoint_dir`, or in the system's
    temporary folder, and is removed at the end."""
    ema: float = 0.0
    """Decay per step in [0, 1) of a moving average of the weights, which the branches end with; 0 for none."""
    exit_weights: tuple[float, ...] | WeightRule = "uniform"
    """For `weighted_ce`: one weight per trained exit, falling with depth (BranchyNet), growing with depth (`linear`,
    EENet), or growing during training (`ramp`, Shallow-Deep Networks); scaled to sum to 1."""
    cost_weight: float = 1.0
    """Lambda of the cost-aware objectives (1 in EENets, 0.9 in PTEENet)."""
    optimizer: Optimizer = "adamw"
    """`adam` adds the weight decay to the gradient, as in the papers that used it."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of SGD (Nesterov)."""
    schedule: Schedule = "cosine"
    """`step` divides by ten at each of the `milestones`; `wsd` is constant and falls to 0 over the last `decay`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the training, in [0, 1]."""
    decay: float = 0.25
    """Fraction of the training, in (0, 1], over which the rate falls to 0 linearly with `wsd`."""
    warmup: float = 0.05
    """Fraction of all steps over which the rate rises from 0."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient of all trained parameters together; None for no clipping."""
    ensemble_epochs: int = 500
    """Passes over recorded logits to fit the ensembles of `ztw` branches, after training; 0 for none."""
    mixed_precision: TrainPrecision = "no"
    """`auto`: bfloat16 if the device supports it natively and is faster with it, else float32 (`no`), also from where
    steps are not finite in bfloat16; training prints which. In bfloat16 a frozen original that answers with classes
    runs in it too. The default is the same on every machine."""
    validation: float = 0.1
    """Fraction of a map-style training set held out to report each exit's accuracy; 0 for none."""
    num_workers: int = 0
    """Processes that load data."""
    seed: int = 0
    checkpoint_dir: str | None = None
    """Folder of the checkpoint that the same call resumes from exactly; None for no checkpoints."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; one is written after every epoch too."""
    patience_nonfinite: int = 10
    """Number of consecutive skipped steps (non-finite loss) after which training stops with an error."""
    progress: bool = True
    """Show a progress bar on a terminal, one line per epoch elsewhere."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        OBJECTIVES[self.objective]  # raises for an unknown name


def changed_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Some settings by name, checked.

    Raises:
        UnknownNameError: one is not a setting.
        ConfigError: a value that it cannot have.
    """
    known = [each.name for each in fields(TrainConfig)]
    for name in changes:
        if name not in known:
            raise UnknownNameError(f"TrainConfig has no setting {name!r}. {suggest(name, known)}")
    return {name: getattr(TrainConfig(**changes), name) for name in changes}


def _exit_weights(name: str, value: object) -> tuple[float, ...] | str:
    if isinstance(value, str):
        return choice(name, value, get_args(WeightRule))
    return numbers(name, value, low=0, hint=f"One per trained exit, or one of {get_args(WeightRule)}.")


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
    "milestones": partial(numbers, low=0, high=1, hint="Fractions of the training."),
    "decay": partial(number, above=0, high=1),
    "warmup": _SHARE,
    "clip_grad": optional(partial(number, above=0, hint="None for no clipping.")),
    "ensemble_epochs": partial(count, low=0),
    "mixed_precision": partial(choice, known=get_args(TrainPrecision)),
    "validation": partial(number, low=0, below=1),
    "num_workers": partial(count, low=0),
    "seed": partial(count, low=0),
    "checkpoint_dir": optional(_folder),
    "checkpoint_steps": count,
    "patience_nonfinite": count,
    "progress": flag,
}
