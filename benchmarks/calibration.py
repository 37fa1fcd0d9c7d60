"""Time to calibrate and to choose a point, and how much of the naive saving risk control certifies.

    python -m benchmarks.calibration runs/methods/resnet56/ours-0.safetensors

On one core; with no records given, on 5,000 made-up samples, 6 exits and 10 classes.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

import ee_surgery as ee
from benchmarks.methods_compare import split
from ee_surgery.calibration.risk import risk_table

BUDGETS = 20
EPS = (0.005, 0.01, 0.02)
DELTA = 0.05
HALVES = 10


def made_up(n: int = 10_000, exits: int = 6, classes: int = 10) -> ee.ExitRecords:
    """Made-up records whose exits get better with depth."""
    g = torch.Generator().manual_seed(0)
    labels, ease = torch.randint(classes, (n,), generator=g), torch.rand(n, generator=g)
    logits = torch.randn(exits + 1, n, classes, generator=g)
    for k in range(exits + 1):
        logits[k, torch.arange(n), labels] += 6 * (0.4 + 0.6 * (k + 1) / (exits + 1)) * (1.2 - ease)
    trunk = tuple(10**6 * (k + 1) // (exits + 1) for k in range(exits + 1))
    confidence = logits[:-1].softmax(-1).amax(-1)
    return ee.ExitRecords(tuple(map(str, range(exits))), logits, trunk, (10**4,) * exits, labels, confidence)


def main() -> None:
    """Time every policy, the knob and the scheduler, and compare certified with naive savings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    whole = made_up() if options.records is None else ee.ExitRecords.load(options.records)
    records = whole.take(split(len(whole), 0)[0])
    console.print(f"{options.records or 'made up'}: {len(records)} samples, {len(records.exits)} exits, 1 thread")

    table = Table("policy", "seconds", "operating points", box=box.MARKDOWN)
    for name in ee.CALIBRATORS:
        if name == "learned" and records.confidence is None:
            continue
        started = time.perf_counter()
        frontier = ee.Frontier.trace(records.take(torch.arange(len(records))), name)  # a copy: nothing is cached
        table.add_row(name, f"{time.perf_counter() - started:.2f}", str(len(frontier)))
    console.print(table)
    frontier = ee.Frontier.search(records)
    started = time.perf_counter()
    for _ in range(100):
        frontier.at(budget=0.7)
    console.print(f"choosing a point by budget: {10 * (time.perf_counter() - started):.3f} ms")
    certified = risk_table(records)
    started = time.perf_counter()
    for _ in range(100):
        certified.at(0.05, DELTA)
    console.print(f"choosing a point by risk: {10 * (time.perf_counter() - started):.3f} ms")

    cheapest = ee.Frontier.trace(records, "geometric")[0].macs_fraction
    started = time.perf_counter()
    over = 0
    for i in range(BUDGETS):
        budget = cheapest + (1 - cheapest) * (i + 1) / (BUDGETS + 1)
        over += ee.eenet_scheduler(records, budget).macs_fraction > budget
    seconds = (time.perf_counter() - started) / BUDGETS
    console.print(
        f"EENet scheduler: {seconds:.2f} s per budget; {over} of {BUDGETS} budgets exceeded by realised exits"
    )

    table = Table("risk", "eps", "naive saving", "certified", "ratio", "per exit", "normal", box=box.MARKDOWN)
    for risk in ("disagreement", "accuracy_gap"):
        for eps in EPS:
            saved: list[list[float]] = []
            for number in range(HALVES):
                part = whole.take(split(len(whole), number)[0])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    points = [
                        ee.risk_control(part, eps, DELTA, risk=risk, per_exit=per_exit) for per_exit in (False, True)
                    ]
                saved.append([*uncertified(part, risk, eps), *(1 - point.macs_fraction for point in points)])
            plain, normal, certain, each = (statistics.mean(column) for column in zip(*saved, strict=True))
            row = (plain, certain, certain / plain, each, normal / plain)
            table.add_row(risk, f"{eps:g}", *(f"{value:.3f}" for value in row))
    console.print(table)
    console.print(
        f"delta {DELTA}, means over {HALVES} random halves. Naive: the cheapest shared threshold within eps here; "
        "ratio: certified / naive saving; normal: the ratio of a test that assumes normally distributed mean losses"
    )


def uncertified(records: ee.ExitRecords, risk: str, eps: float) -> tuple[float, float]:
    """Two savings on the shared path, without a valid guarantee.

    That of the cheapest point whose loss on these very samples is within eps; and of the cheapest one before the first
    whose loss is not below eps by the quantile of the normal distribution: about the most that any test can tell.
    """
    table = risk_table(records, risk)
    n, worse, better = len(records), np.array(table.worse), np.array(table.better)
    mean = (worse - better) / n
    error = np.sqrt(((worse + better) / n - mean**2) / n)
    within = mean + norm.ppf(1 - DELTA) * error <= eps
    saving = np.array([1 - point.macs_fraction for point in table.points])
    return saving[mean <= eps].max(), saving[np.logical_and.accumulate(within)].max()


if __name__ == "__main__":
    main()
