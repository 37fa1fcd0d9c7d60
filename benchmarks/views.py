"""Repeated epochs with features cached on disk, against repeated epochs that run the original again.

    python -m benchmarks.views      # some minutes; prints a table

On the frozen CIFAR-10 ResNet-56 and images of its training set: the same training twice in one run, with the same
weights at the end. The first passes are computed in both; the ratio is of the repeated ones.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from recipes.cifar10_resnet56 import network, pictures
from recipes.cifar10_shortcuts import EXITS, SIZE

KINDS = {
    "6 exits, auto": (6, "auto"),
    "6 exits, pool": (6, "pool"),
    "2 shortcuts": (list(EXITS), [ee.BranchSpec("shortcut", options={"blocks": b}) for b in EXITS.values()]),
}


def main() -> None:
    """Train each kind of branch with and without a cache, and print the time per epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, mean, std = pictures("train", options.images)
    table = Table(box=box.MARKDOWN)
    for column in ("branches", "computed, s per epoch", "cached, s per epoch", "ratio"):
        table.add_column(column, justify="right")
    for name, (exits, branch) in KINDS.items():
        seconds, weights = {}, []
        for cache_gb in (0.0, 10.0):
            branched = ee.augment(network(56), exits, branch=branch, sample=torch.zeros(2, 3, 32, 32))
            config = ee.TrainConfig(epochs=5, views=1, cache_gb=cache_gb, lr=3e-3, validation=0)
            train = ee.AugmentedBatches(*images, mean=mean, std=std, batch_size=SIZE)
            report = ee.train(branched, train, config)
            seconds[cache_gb] = statistics.median(epoch.seconds for epoch in report.epochs[1:])
            weights.append(list(branched.branches.parameters()))
        if not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)):
            raise SystemExit(f"{name}: training on cached features gave other weights.")
        computed, kept = seconds[0.0], seconds[10.0]
        table.add_row(name, f"{computed:.1f}", f"{kept:.1f}", f"{kept / computed:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{options.images} images, batches of 128; {environment(images[0].device)}.")


if __name__ == "__main__":
    main()
