"""An ablation of the training recipe, on one shortcut branch of the CIFAR-10 ResNet-56.

    python -m benchmarks.training run       # an hour or two; resumes where it stopped
    python -m benchmarks.training page      # docs/training.md from benchmarks/results

All settings start from the same branch and see the same images in the same order for the same number of steps; the
original stays frozen. On the test images, thresholds come from one half, results from the other.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

import ee_surgery as ee
from benchmarks.methods_compare import DROPS, append, measure, read
from benchmarks.tables import table
from recipes.cifar10_resnet56 import network, pictures
from recipes.cifar10_shortcuts import EXITS, SIZE

RESULTS = Path("benchmarks/results/training.jsonl")
PAGE = Path("docs/training.md")
EXIT = "layer1.1"
UNSEEN = 5_000
"""Test images that one setting is trained on, without labels; no setting is evaluated on them."""


@dataclass(frozen=True)
class Setting:
    """What differs from training on labels alone."""

    config: dict[str, Any] = field(default_factory=dict)
    rand_augment: bool = False
    unseen: bool = False
    pair: bool = False
    """The two branches of recipes.cifar10_shortcuts in place of one."""


SETTINGS = {
    "labels alone": Setting(),
    "CutMix": Setting({"cutmix": 1.0}),
    "Mixup": Setting({"mixup": 0.2}),
    "RandAugment (m9, n2)": Setting(rand_augment=True),
    "weight averaging (EMA, 0.998)": Setting({"ema": 0.998}),
    "distillation, half of the loss": Setting({"distill": 0.5}),
    "distillation at temperature 4": Setting({"distill": 0.5, "temperature": 4.0}),
    "distillation and CutMix": Setting({"distill": 0.5, "cutmix": 1.0}),
    "the original's predictions, 5,000 unseen images": Setting({"teach": "original", "distill": 0.5}, unseen=True),
    "two branches, labels alone": Setting(pair=True),
    "two branches, survivor=0.5": Setting({"survivor": 0.5}, pair=True),
    "two branches, survivor=0.9": Setting({"survivor": 0.9}, pair=True),
}


class Augmented(ee.AugmentedBatches):
    """With RandAugment before the images are shifted."""

    change = staticmethod(rand_augment_transform("rand-m9-n2", {}))

    def vary(self, images: Tensor) -> Tensor:
        """Whole numbers (B, 3, 32, 32) to what the networks take."""
        changed = [np.asarray(self.change(Image.fromarray(image))) for image in images.permute(0, 2, 3, 1).numpy()]
        return super().vary(torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2))


def run(name: str, epochs: int, few: int | None) -> dict[str, Any]:
    """Train with one setting, and evaluate it on test images that no setting was trained on."""
    setting = SETTINGS[name]
    (images, labels), mean, std = pictures("train", few)
    (test, truth), _, _ = pictures("test", few)
    unseen, (test, truth) = test[:UNSEEN], (test[len(test) // 2 :], truth[len(truth) // 2 :])
    steps = len(images) // SIZE
    if setting.unseen:
        images, labels = torch.cat([images, unseen]), torch.cat([labels, torch.zeros(len(unseen), dtype=labels.dtype)])
    original = network(56).to(memory_format=torch.channels_last)
    exits = EXITS if setting.pair else {EXIT: EXITS[EXIT]}
    specs = [ee.BranchSpec("shortcut", options={"blocks": blocks}) for blocks in exits.values()]
    branched = ee.augment(original, list(exits), branch=specs, sample=torch.zeros(2, 3, 32, 32))
    config = ee.TrainConfig(
        **{
            "epochs": epochs,
            "distill": 0.0,
            "lr": 3e-3,
            "weight_decay": 5e-3,
            "mixed_precision": "auto",
            "validation": 0,
            **setting.config,
        }
    )
    kind = Augmented if setting.rand_augment else ee.AugmentedBatches
    batches = kind(images, labels, mean=mean, std=std, batch_size=SIZE, steps=steps)
    started = time.perf_counter()
    ee.train(branched, batches, config)
    seconds = time.perf_counter() - started
    test = (test.float() / 255 - mean) / std
    records = ee.record(branched, list(zip(test.split(250), truth.split(250), strict=True)))
    if not branched.receipt().unchanged:
        raise SystemExit(str(branched.receipt()))
    return {
        "key": name,
        "epochs": epochs,
        "images": len(images),
        "steps": steps * epochs,
        "seconds": round(seconds),
        "precision": branched.provenance["training"]["mixed_precision"],
        "threads": torch.get_num_threads(),
        "alone": records.accuracies[-2],
        "original": records.base_accuracy,
        "torch": torch.__version__,
        "timm": timm.__version__,
        **measure(records, "search", 20),
    }


def page(lines: list[dict[str, Any]]) -> str:
    """docs/training.md."""
    rows = [
        [
            line["key"],
            f"{100 * line['alone']:.2f}",
            f"{line['auroc'][-1]:.3f}",
            *(f"{line[f'drop_{drop:g}']:.3f}" for drop in DROPS),
            f"{100 * line['area']:.2f}",
            str(line["steps"]),
        ]
        for line in lines
    ]
    first = lines[0]
    head = ["", "alone %", "AUROC", "0.5 points", "1 point", "2 points", "area", "steps"]
    text = _PAGE.format(exit=EXIT, blocks=EXITS[EXIT], epochs=first["epochs"], half=first["samples"], unseen=UNSEEN)
    versions = f"torch {first['torch']}, timm {first['timm']}, CPU"
    precision = first.get("precision", "bf16")
    return f"{text}\n{table(head, rows)}\n\n{versions}, mixed precision {precision}, seed 0.\n"


_PAGE = """# An ablation of the training recipe

```bash
python -m benchmarks.training run && python -m benchmarks.training page
```

One shortcut branch on the frozen CIFAR-10 ResNet-56, at `{exit}`, blocks `{blocks}`, {epochs} epochs of AdamW (3e-3,
cosine, weight decay 5e-3), all settings from the same initialization. Accuracy of the branch alone and AUROC of its
confidence on {half} x 2 test images that no setting was trained on; the fraction of the MACs above which at most 0.5, 1
and 2 points are lost, and the area of the frontier (mean accuracy over 0.3 to 1 of the MACs), thresholds from one half
and results from the other, 20 halves. The row with the original's predictions uses {unseen} more test images, without
labels, which are not among the reported ones.

One seed: differences below half a point of accuracy, or 0.03 of the MACs, are treated as noise. In such short training
RandAugment or CutMix is worse than labels alone at 1 point; nothing is better by more than noise, so the defaults stay
as they were (distillation at temperature 2, no mixing). The 36 epochs of [results.md](results.md) use CutMix. Weighting
samples by their probability of reaching an exit does nothing with one branch: it is measured on two, `{exit}` being the
later one, where it is clearly worse with `survivor=0.5` and within noise with 0.9; it stays off by default.
"""


def main() -> None:
    """Train what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "page"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--few", type=int, help="images, to try it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "page":
        PAGE.write_text(page(read(options.results)))
        return
    for name in options.settings:
        if name not in {line["key"] for line in read(options.results)}:
            append(options.results, run(name, options.epochs, options.few))


if __name__ == "__main__":
    main()
