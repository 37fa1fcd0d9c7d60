"""Branches for an ImageNet network, trained without labels on 2,500 photographs.

    python -m recipes.imagenet_mobilenetv2

timm's mobilenetv2_100 with ImageNet-1k weights; the branches are trained on its own predictions for the Imagenette
training photographs, thresholds are chosen on the 500 test photographs of ImageNet-train origin, and the 500 of
ImageNet-validation origin, which no network here has seen, are reported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.evaluation.bench import measure
from ee_surgery.evaluation.latency import environment
from recipes import data

CLASSES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
SPEED = 96
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("original", {}),
    *((f"agreement drop {drop:.0%}", {"max_accuracy_drop": drop}) for drop in (0.01, 0.02, 0.05, 0.1)),
    *((f"budget {budget}", {"budget": budget}) for budget in (0.8, 0.7, 0.6)),
]


class Unlabelled(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Photographs under a transform, without labels."""

    def __init__(self, images: list[Image.Image], transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.images[index]),)


def main() -> None:
    """Train, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet_mobilenetv2"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few photographs, one epoch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=160, record=True)

    tensors, mean, std = data.weights("imagenet_mobilenetv2_100")
    model = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    model.load_state_dict(tensors)
    train, test = data.imagenette("train"), data.imagenette("test")
    few = 48 if options.smoke else None
    size = 64 if options.smoke else 160
    finish = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean.flatten().tolist(), std.flatten().tolist()),
        ]
    )
    varied = v2.Compose(
        [v2.RandomResizedCrop(size, (0.35, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), finish]
    )
    plain = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), finish])

    branched = ee.augment(model, 4, sample=torch.zeros(1, 3, size, size))
    config = ee.TrainConfig(
        epochs=1 if options.smoke else options.epochs,
        batch_size=32,
        lr=2e-3,
        weight_decay=1e-2,
        objective="kd",
        teach="original",
        temperature=1.0,
        validation=0,
        checkpoint_dir=str(options.out / "training"),
    )
    trained = ee.train(branched, Unlabelled(train.images[:few], varied), config)

    inputs = torch.stack([plain(image) for image in test.images])
    unseen = test.from_imagenet_val
    held_out, reported, labels = inputs[~unseen][:few], inputs[unseen][:few], test.imagenet_index[unseen][:few]
    frontier = ee.calibrate(branched, list(held_out.split(50)))

    table = Table(box=box.MARKDOWN)
    for column in ("", "agreement", "10-way accuracy", "MACs", "share at each exit", "latency b1", "throughput b32"):
        table.add_column(column, justify="right")
    for name, request in REQUESTS:
        if request:
            branched.operate(**request)
        result = ee.evaluate(branched, list(reported.split(50)))
        logits = torch.cat([branched.predict(batch).logits for batch in reported.split(50)])
        ten = (torch.tensor(CLASSES)[logits[:, CLASSES].argmax(-1)] == labels).double().mean()
        shares = " ".join(f"{share:.0%}" for share in result.exit_shares)
        row = [name, f"{result.agreement:.1%}", f"{ten:.1%}", f"{result.macs_fraction:.1%}", shares]
        table.add_row(*row, *(_speed(branched, reported[:SPEED]) if request else ("1", "1")))
        torch.set_num_threads(options.threads)
    console.print(table)
    branched.save_pretrained(options.out / "adapter")
    frontier.plot(options.out / "frontier.png")
    count, minutes = len(trained.epochs), sum(epoch.seconds for epoch in trained.epochs) / 60
    console.print(f"mobilenetv2_100 at {size} px, exits at {', '.join(branched.exits)}; {len(labels)} photographs.")
    console.print(f"Training: seed 0, {count} epochs, {minutes:.0f} min, {options.threads} thread(s).")
    console.print(f"Speed on {SPEED} photographs: {environment(inputs.device)}, timm {timm.__version__}.")
    console.print(f"Original {branched.receipt()}.")
    console.save_text(str(options.out / "report.md"))


def _speed(branched: ee.EarlyExitModel, inputs: Tensor) -> tuple[str, str]:
    """Latency at batch 1 and throughput at batch 32, relative to the original's."""
    torch.set_num_threads(1)
    one, many = (measure(branched, inputs, batch_size=batch, rounds=3).latency_ratio for batch in (1, 32))
    return f"{one:.3f}", f"{1 / many:.3f}"


if __name__ == "__main__":
    main()
