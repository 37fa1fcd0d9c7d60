"""Branches for an ImageNet network, taught without labels on 2,500 photographs.

    python -m recipes.imagenet_mobilenetv2

timm's mobilenetv2_100 with ImageNet-1k weights; the branches learn from its own answers on the Imagenette training
photographs, thresholds are set on the 500 test photographs of ImageNet-train origin, and the 500 of
ImageNet-validation origin, which no network here has seen, are reported.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.runtime.measure import measure
from recipes import data

CLASSES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


class Photos(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Photographs under a transform, without labels."""

    def __init__(self, images: list[Tensor], transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.images[index]),)


def main() -> None:
    """Train, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet_mobilenetv2"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few photographs, one epoch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    started = time.time()
    console = Console(width=120)

    tensors, mean, std = data.weights("imagenet_mobilenetv2_100")
    model = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    model.load_state_dict(tensors)
    train, test = data.imagenette("train"), data.imagenette("test")
    finish = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean.flatten().tolist(), std.flatten().tolist()),
    ]
    size = 64 if options.smoke else 160
    varied = v2.Compose(
        [v2.RandomResizedCrop(size, (0.35, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), *finish]
    )
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *finish])
    few = 48 if options.smoke else None

    branched = ee.augment(model, 4, sample=torch.randn(3, 3, size, size), branch="auto")
    config = ee.TrainConfig(
        epochs=1 if options.smoke else options.epochs, batch_size=32, lr=2e-3, weight_decay=1e-2, objective="kd",
        teach="original", temperature=1.0, validation=0, checkpoint_dir=str(options.out / "training"),
    )  # fmt: skip
    ee.train(branched, Photos(train["images"][:few], varied), config)

    inputs = torch.stack([plain(image) for image in test["images"]])
    seen = test["from_imagenet_val"]
    held_out, reported = inputs[~seen][:few], inputs[seen][:few]
    ee.calibrate(branched, list(held_out.split(50)))

    labels = test["imagenet_index"][seen][:few]
    table = Table(
        title=f"mobilenetv2_100 at {size} px, exits at {', '.join(branched.exits)}: {len(labels)} photographs of ImageNet-validation origin"
    )
    for column in ("", "agreement", "10-way accuracy", "MACs", "shares", "latency, batch 1", "time a sample, batch 32"):
        table.add_column(column, justify="right")
    timed = reported[:96]
    for name, request in [("original", None), *((f"agreement drop {d:.0%}", {"max_accuracy_drop": d}) for d in (0.01, 0.02, 0.05, 0.1)),
                          *((f"budget {b:.0%}", {"budget": b}) for b in (0.8, 0.7, 0.6))]:  # fmt: skip
        branched.operate(**request) if request else branched.operate(None)
        outputs = [branched.predict(batch) for batch in reported.split(32)]
        logits, exit_index, macs = (
            torch.cat([getattr(o, key) for o in outputs]) for key in ("logits", "exit_index", "macs")
        )
        result = ee.evaluate(branched, list(reported.split(50)))
        ten = torch.tensor(CLASSES)[logits[:, CLASSES].argmax(-1)] == labels
        shares = " ".join(
            f"{s:.0%}" for s in (torch.bincount(exit_index, minlength=len(branched.exits) + 1) / len(labels)).tolist()
        )
        torch.set_num_threads(1)
        ratios = (
            [f"{measure(branched, timed, batch_size=b, rounds=3).latency_ratio:.3f}" for b in (1, 32)]
            if request
            else ["1", "1"]
        )
        torch.set_num_threads(options.threads)
        table.add_row(
            name,
            f"{result.agreement:.1%}",
            f"{ten.double().mean():.1%}",
            f"{macs.double().mean() / branched.trunk_macs[-1]:.1%}",
            shares,
            *ratios,
        )
    console.print(table)
    branched.save_pretrained(options.out / "adapter")
    assert branched.frontier is not None
    branched.frontier.plot(options.out / "frontier.png")
    console.print(f"original {branched.receipt()}")
    console.print(
        f"seed 0, {options.threads} threads to train and 1 to time, torch {torch.__version__}, timm {timm.__version__}, {time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
