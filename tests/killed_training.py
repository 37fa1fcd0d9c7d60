"""Run as a program: train branches with a checkpoint folder, slowly, and save them. Tests kill it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import timm
import torch
from torch.utils.data import Dataset

import ee_surgery as ee


class Slow(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Augmented samples: their noise comes from torch's own generator, so order and state must be resumed exactly."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(48, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.delay)
        return self.images[index] + 0.1 * torch.randn(3, 32, 32), index % 10


def main(folder: Path, delay: float) -> None:
    """Train and write `branches.pt`; prints after every checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    branched = ee.augment(model, 2, sample=torch.randn(3, 3, 32, 32))
    config = ee.TrainConfig(
        epochs=3,
        batch_size=4,
        validation=0.25,
        ema=0.9,
        views=2,
        checkpoint_dir=str(folder / "training"),
        checkpoint_steps=2,
        lr=1e-2,
    )
    report = ee.train(branched, Slow(delay), config)
    assert branched.receipt().unchanged
    torch.save((branched.branches.state_dict(), [epoch.loss for epoch in report.epochs]), folder / "branches.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
