"""Is a call as fast as in another checkout? Both versions in one process, call by call in turn, one thread.

    git worktree add ../before v0.1.0
    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.releases ../before

In two processes the times of the same program differ by up to 10 %, depending on memory layout; so the package is
loaded twice into one. Random weights, two exits with `pool` branches at a third and two thirds of the MACs; all samples
leave at the exit that the row names. The same model objects serve both. Ratios are of medians, this checkout relative
to the other.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from recipes.networks import CifarResNet

CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: (model, image size, batch size)
    "CIFAR ResNet-20, batch 1": (lambda: CifarResNet(20), 32, 1),
    "CIFAR ResNet-56, batch 1": (lambda: CifarResNet(56), 32, 1),
    "CIFAR ResNet-56, batch 64": (lambda: CifarResNet(56), 32, 64),
    "MobileNetV2 160 px, batch 1": (lambda: timm.create_model("mobilenetv2_100"), 160, 1),
    "ResNet-50 160 px, batch 1": (lambda: timm.create_model("resnet50"), 160, 1),
    "ViT-S/16, batch 8": (lambda: timm.create_model("vit_small_patch16_224"), 224, 8),
}
MODES: dict[str, list[float] | None] = {
    "no operating point": None,
    "first exit": [-1.0, -1.0],
    "second exit": [2.0, -1.0],
    "no sample leaves": [2.0, 2.0],
}


class _Unregistered:
    """In place of an operator that the other version has registered with torch already; no model here calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Do nothing."""
        return function


def load(checkout: Path, again: bool) -> ModuleType:
    """Load the package from a checkout, next to one that is already loaded."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ee_surgery"]:
        del sys.modules[name]
    unregistered = patch.object(torch.library, "custom_op", lambda *_, **__: _Unregistered)
    with patch.object(sys, "path", [str(checkout), *sys.path]):
        if again:
            with unregistered:
                return importlib.import_module("ee_surgery")
        return importlib.import_module("ee_surgery")


def compare(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median time of each call, made in turn for so many seconds; the order changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            call()
    order, stop = list(calls), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for name in order:
            started = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - started)
        order.reverse()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, default=Path(), help="the other checkout; this one by default")
    parser.add_argument("--seconds", type=float, default=8, help="per row")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these")
    parser.add_argument("--smoke", action="store_true", help="the smallest case, for a moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    here = Path(__file__).parents[1]
    versions = {"before": load(options.before.resolve(), False), "now": load(here, True)}
    table = Table(title=f"this checkout against {options.before}; torch {torch.__version__}, one thread")
    for column in ("case", "leaving", "before ms", "now ms", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "leaving") else "right")
    for case in ["CIFAR ResNet-20, batch 1"] if options.smoke else options.case or list(CASES):
        make, size, batch = CASES[case]
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(batch, 3, size, size)
        sample = torch.randn(3, 3, size, size)
        branched = {n: ee.augment(model, 2, branch="pool", sample=sample) for n, ee in versions.items()}
        for leaving, thresholds in MODES.items():
            calls = {name: _call(each, thresholds, x) for name, each in branched.items()}
            with torch.no_grad():
                times = compare(calls, 0.1 if options.smoke else options.seconds)
            before, now = times["before"], times["now"]
            table.add_row(case, leaving, f"{1e3 * before:.3f}", f"{1e3 * now:.3f}", f"{now / before:.3f}")
    Console(width=120).print(table)


def _call(branched: Any, thresholds: list[float] | None, x: Tensor) -> Callable[[], object]:
    if thresholds is None:
        branched.operate(None)
    else:
        branched.operate(thresholds=thresholds)
    return lambda: branched(x)


if __name__ == "__main__":
    main()
