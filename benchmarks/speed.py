"""The time of a routed run against that of its stages and branches alone. Forced exits, interleaved, one thread.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.speed

Half of the samples are made to leave at a third of the depth and a quarter of them at two thirds, by thresholds at
quantiles of the batch's own scores. Ideal, in the same interleaved rounds: the sum of the times of the stages and
branches that ran, each measured alone, on the samples that reached it; at batch 1, where a warm cache matters more than
the overhead being measured, all of them called in sequence; if no samples leave, the original plus the branches' own
times. Random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Literal

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment, interleave, parts
from recipes.networks import CifarResNet

CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: (model, image size, batch size)
    "ViT-S/16": (lambda: timm.create_model("vit_small_patch16_224"), 224, 8),
    "ResNet-50 160 px": (lambda: timm.create_model("resnet50"), 160, 16),
    "CIFAR ResNet-56": (lambda: CifarResNet(56), 32, 64),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these")
    parser.add_argument("--smoke", action="store_true", help="the smallest case, two rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=140)
    rounds = 2 if options.smoke else options.rounds
    names = ["CIFAR ResNet-56"] if options.smoke else options.case or list(CASES)
    routed, single = _table("forced exits, 50 % + 25 %"), _table("batch 1, leaving at each exit in turn")
    closed = _table("no sample leaves, batch 64")
    for name in names:
        make, size, batch = CASES[name]
        branched = ee.augment(make().eval(), 2, "linear", sample=torch.randn(3, 3, size, size))
        x = torch.randn(batch, 3, size, size)
        _force(branched, x)
        _add(routed, f"{name}, batch {batch}", *_compare(branched, x, rounds, "parts"))
        for k in range(3):
            thresholds = [0.0 if k == j else 2.0 for j in range(2)]
            branched.operate(thresholds=thresholds)
            _add(single, f"{name}, exit {k}", *_compare(branched, x[:1], rounds * 8, "sequence"))
        if name == "CIFAR ResNet-56" or not options.smoke:
            branched.operate(thresholds=2.0)
            _add(closed, name, *_compare(branched, torch.randn(64, 3, size, size), max(2, rounds // 2), "original"))
    for table in (routed, single, closed):
        console.print(table)
    stage = _stage_against_modules(rounds * 8)
    console.print(
        f"a stage relative to the same part of the original, batch 1, CIFAR ResNet-56 (stem + layer1): {stage:.3f}"
    )
    console.print(environment(torch.device("cpu")), f"median of {rounds} rounds or more, seed 0", sep=", ")


def _table(title: str) -> Table:
    table = Table(title=title, box=box.MARKDOWN)
    for column in ("", "original ms", "routed ms", "ideal ms", "routed / ideal", "ideal / routed", "routed / original"):
        table.add_column(column, justify="right")
    return table


def _add(table: Table, name: str, original: float, routed: float, ideal: float) -> None:
    numbers = [f"{1e3 * value:.2f}" for value in (original, routed, ideal)]
    table.add_row(name, *numbers, f"{routed / ideal:.3f}", f"{ideal / routed:.1%}", f"{routed / original:.3f}")


def _force(branched: ee.EarlyExitModel, x: Tensor) -> None:
    """Thresholds by which half of `x` leaves at the first exit and half of the rest at the second."""
    scores = ee.record(branched, [x]).scores("max_prob")
    here, thresholds = torch.ones(len(x), dtype=torch.bool), []
    for row in scores:
        ranked = row[here].sort(descending=True).values
        count = len(ranked) // 2
        thresholds.append(((ranked[count - 1] + ranked[count]) / 2).item())
        here &= row < thresholds[-1]
    branched.operate(thresholds=thresholds)
    left = torch.bincount(branched.predict(x).exit_index, minlength=3).tolist()
    assert left == [len(x) // 2, len(x) // 4, len(x) // 4], left


def _compare(
    branched: ee.EarlyExitModel, x: Tensor, rounds: int, ideal: Literal["parts", "sequence", "original"]
) -> tuple[float, float, float]:
    """Median times of the original, of the routed run, and of the ideal, in the same rounds.

    Args:
        ideal: `parts`: the sum of the times of its stages and branches, each on its own; `sequence`: one call of
            them all, one after the other; `original`: the original plus the branches' own times.
    """
    pieces = parts(branched, x)
    calls = {"original": lambda: branched.backbone(x), "routed": lambda: branched.predict(x)}
    if ideal == "sequence":
        steps = list(pieces.values())
        pieces = {"sequence": lambda: [step() for step in steps]}
    elif ideal == "original":
        pieces = {name: call for name, call in pieces.items() if name.startswith("branch")}
    with torch.no_grad():
        times = interleave({**calls, **pieces}, x.device, rounds=rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    total = sum(median[name] for name in pieces) + (median["original"] if ideal == "original" else 0)
    return median["original"], median["routed"], total


def _stage_against_modules(rounds: int) -> float:
    """Stage 0 of the CIFAR ResNet-56, cut after layer1, relative to the same modules of the original, at batch 1."""
    model = CifarResNet(56).eval()
    branched = ee.augment(model, ["layer1"], sample=torch.randn(3, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    stage = branched.engine.program(x).stages[0]

    def modules() -> Tensor:
        return model.layer1(F.relu(model.bn1(model.conv1(x))))

    with torch.no_grad():
        assert math.isclose(stage(x)[0].sum().item(), modules().sum().item(), rel_tol=1e-4)
        times = interleave({"stage": lambda: stage(x), "modules": modules}, x.device, rounds=rounds)
    return statistics.median(times["stage"]) / statistics.median(times["modules"])


if __name__ == "__main__":
    main()
