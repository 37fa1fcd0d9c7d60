"""Early exits for several labels: pairs of CIFAR-10 images side by side, each pair labelled with both of its classes.

    python -m recipes.multi_label_pairs
    python -m recipes.multi_label_pairs --smoke --out DIR --threads 1      # a few pairs, few steps

No multi-label set is at hand, so one is made: (3, 32, 64), 10 labels, two of them present (one where both images are of
the same class). The CIFAR ResNet-20 is fine-tuned on pairs of training images, with a sigmoid for each label; that is
the original here, frozen from then on. Pairs of test images calibrate (2,500) and are reported (2,500).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTImageProcessor, pipeline

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from ee_surgery.integrations.transformers import EarlyExitForImageClassification
from recipes.cifar10_resnet56 import network, pictures

DROPS = (0.0, 0.0025, 0.005, 0.01, 0.02)
CLASSES, BATCH, LR = 10, 128, 3e-3


def pairs(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 64) and labels (count, 10), drawn at random."""
    made = torch.Generator().manual_seed(seed)
    left, right = (torch.randperm(len(images), generator=made)[:count] for _ in range(2))
    several = F.one_hot(labels[left], CLASSES) | F.one_hot(labels[right], CLASSES)
    return torch.cat([images[left], images[right]], 3), several.float()


def fine_tuned(train: ee.AugmentedBatches, epochs: int, steps: int | None, where: Path) -> nn.Module:
    """The ResNet-20 with a sigmoid for each label; read back if it was trained before."""
    model = network(20)
    if where.exists():
        load_model(model, str(where))
        return model.eval()
    model.train()
    total = epochs * (steps or len(train))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=total)
    done = 0
    while done < total:
        for images, labels in train:
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == total:
                break
    where.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(where))
    return model.eval()


def by_pipeline(branched: ee.EarlyExitModel, images: Tensor, mean: Tensor, std: Tensor) -> list[set[int]]:
    """The labels that `pipeline` finds in images (N, 3, 32, 64): its own post-processing takes a sigmoid of each."""
    processor = ViTImageProcessor(
        do_resize=False, do_rescale=True, image_mean=mean.flatten().tolist(), image_std=std.flatten().tolist()
    )
    model: Any = EarlyExitForImageClassification.of(branched)
    pipe = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    found: Any = pipe([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], top_k=CLASSES)
    numbers = model.config.label2id
    return [{numbers[one["label"]] for one in answers if one["score"] > 0.5} for answers in found]


def main() -> None:
    """Fine-tune, find and train exits, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--effort", choices=("quick", "standard", "best"), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/multi_label_pairs"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    console = Console(width=160, record=True)
    few = 256 if options.smoke else None
    (images, labels), mean, std = pictures("train", None)
    (others, truth), _, _ = pictures("test", None)
    train = pairs(images, labels, few or 25_000, options.seed)
    held_out = pairs(others, truth, few or 5_000, options.seed)
    started = time.perf_counter()
    batches = ee.AugmentedBatches(*train, mean=mean, std=std, batch_size=BATCH)
    epochs = 1 if options.smoke else options.epochs
    model = fine_tuned(batches, epochs, 2 if options.smoke else None, options.out / f"base-{options.seed}.safetensors")
    tuned = time.perf_counter()

    pixels = (held_out[0].float() / 255 - mean) / std
    given = list(zip(pixels.split(125), held_out[1].split(125), strict=True))
    calibrating, test = given[: (len(given) + 1) // 2], given[(len(given)) // 2 :]
    branched = ee.augment(
        model,
        sample=pixels[:2],
        task="multi_label",
        train=batches,
        calibrate=calibrating,
        effort="quick" if options.smoke else options.effort,
        time_budget=0.2 if options.smoke else None,
        max_accuracy_drop=0.005,
        seed=options.seed,
    )
    minutes = (time.perf_counter() - tuned) / 60
    branched.save_pretrained(options.out / "adapter")

    table = Table(box=box.MARKDOWN)
    for column in ("", "label accuracy %", "mAP %", "both right %", "mean MACs %", "share at each exit"):
        table.add_column(column, justify="right")
    frontier = branched.frontier
    assert frontier is not None
    for drop in (None, *DROPS):
        branched.operate(None if drop is None else frontier.at(max_accuracy_drop=drop))
        found = ee.evaluate(branched, test)
        said = torch.cat([branched.predict(x).logits > 0 for x, _ in test])
        exact = (said == torch.cat([y for _, y in test]).bool()).all(1).double().mean().item()
        table.add_row(
            "original" if drop is None else f"drop {100 * drop:g} points",
            f"{100 * found.accuracy:.2f}",
            f"{100 * found.measures['mean_average_precision']:.2f}",
            f"{100 * exact:.2f}",
            f"{100 * found.macs_fraction:.1f}",
            " ".join(f"{share:.0%}" for share in found.exit_shares),
        )
    console.print(table)
    some = held_out[0][-8:]
    own = [set(row.nonzero().flatten().tolist()) for row in branched.predict(pixels[-8:]).logits > 0]
    if by_pipeline(branched, some, mean, std) != own:
        raise SystemExit("pipeline finds other labels than the model")
    branches = ", ".join(f"{name} ({spec.name})" for name, spec in zip(branched.exits, branched.specs, strict=True))
    console.print(f"Exits at {branches}; score {frontier[0].score}.")
    console.print(
        f"Seed {options.seed}; fine-tuning {epochs} epochs, {(tuned - started) / 60:.0f} min; the one line "
        f"({options.effort}) {minutes:.0f} min; {environment(torch.device('cpu'))}."
    )
    console.print(f"Original {branched.receipt()}.")
    console.save_text(str(options.out / "report.md"))


if __name__ == "__main__":
    main()
