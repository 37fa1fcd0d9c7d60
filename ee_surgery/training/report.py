"""Results of training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ee_surgery.model import EarlyExitModel
from ee_surgery.tables import Tabular, table
from ee_surgery.training.speed import Speed

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Epoch:
    """Results of one pass over the training data."""

    epoch: int
    loss: float
    """Mean over the steps taken; NaN if there were none."""
    accuracies: tuple[float, ...]
    """Of each branch and the original on the validation split; empty without one."""
    seconds: float
    skipped: int
    """Steps skipped because their loss or gradient was not finite."""
    speed: Speed | None = None
    """None if the epoch was resumed at its very end."""
    cached: bool = False
    """Whether features of the original are kept on disk, see `TrainConfig.views`."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Epoch:
        """The inverse of `asdict`."""
        speed = data["speed"] and Speed(**data["speed"])
        return cls(**{**data, "accuracies": tuple(data["accuracies"]), "speed": speed})


@dataclass(frozen=True)
class TrainReport(Tabular):
    """Results of a training run."""

    exits: tuple[str, ...]
    model: EarlyExitModel = field(repr=False)
    """The trained model: the one passed in, or with `joint=True` a new one."""
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def accuracies(self) -> dict[str, float]:
        """Last validation accuracy by exit, the original's head as `original`."""
        last = self.epochs[-1].accuracies if self.epochs else ()
        return dict(zip((*self.exits, "original"), last)) if last else {}  # noqa: B905 (same length by construction)

    def rows(self) -> list[dict[str, Any]]:
        """One per epoch: loss, validation accuracy of each exit, seconds, steps skipped."""
        names = [f"accuracy {name}" for name in (*self.exits, "original")]
        return [
            {
                "epoch": epoch.epoch + 1,
                "loss": epoch.loss,
                **dict(zip(names, epoch.accuracies or [None] * len(names), strict=True)),
                "seconds": epoch.seconds,
                "skipped": epoch.skipped,
                "images_per_second": epoch.speed and epoch.speed.images_per_second,
            }
            for epoch in self.epochs
        ]

    def table(self) -> Table:
        """The same numbers, rounded."""
        exits = [*self.exits, "original"] if any(epoch.accuracies for epoch in self.epochs) else []
        rows = [
            [str(e.epoch + 1), f"{e.loss:.4f}", *(f"{a:.2%}" for a in e.accuracies), f"{e.seconds:.0f}"]
            for e in self.epochs
        ]
        return table("Training", "", dict.fromkeys(["epoch", "loss", *exits, "seconds"], "right"), rows)

    def __str__(self) -> str:
        return "\n".join(describe(epoch) for epoch in self.epochs)


def describe(epoch: Epoch) -> str:
    """One line about an epoch."""
    accuracies = " ".join(f"{accuracy:.2%}" for accuracy in epoch.accuracies)
    skipped = f", {epoch.skipped} steps skipped" if epoch.skipped else ""
    shown = f", validation accuracy by exit {accuracies}" if accuracies else ""
    speed = f", {epoch.speed}" if epoch.speed else ""
    return f"epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}{shown}, {epoch.seconds:.0f} s{skipped}{speed}"


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Start the trackers that an accelerator was made with, unless its owner did so already."""
    if accelerator.log_with and not accelerator.trackers:
        plain = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
        accelerator.init_trackers("ee_surgery", config=plain)
