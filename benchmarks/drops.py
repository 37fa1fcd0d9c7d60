"""Accuracy drops asked for, and the drops on other samples.

    python -m benchmarks.drops runs/cifar10_shortcuts/test_records.safetensors      # ten minutes

Twice: thresholds from one half of the records, judged by the other half; and thresholds from as many samples drawn
with replacement, judged by all records, which then are the population that the samples come from.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ee_surgery as ee
from recipes.cifar10_shortcuts import REQUESTS


def draw(n: int, number: int, replacement: bool) -> tuple[Tensor, Tensor]:
    """Samples to choose thresholds on, and samples to evaluate on."""
    generator = torch.Generator().manual_seed(number)
    if replacement:
        return torch.randint(n, (n // 2,), generator=generator), torch.arange(n)
    first, second = torch.randperm(n, generator=generator).chunk(2)
    return first, second


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    records = ee.ExitRecords.load(options.records)
    asked = {name: request for name, request in REQUESTS.items() if "max_accuracy_drop" in request}
    table = Table(box=box.MARKDOWN)
    for column in ("asked for", "by", "calibration", "optimism", "held out", "deviation"):
        table.add_column(column, justify="right")
    for by, replacement in (("the other half", False), ("the population", True)):
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in asked}
        for number in range(options.draws):
            chosen, judged = (records.take(rows) for rows in draw(len(records), number, replacement))
            frontier = ee.Frontier.search(chosen)
            for name, request in asked.items():
                point = frontier.at(**request)
                accuracy = judged.replay(point.policy).correct.double().mean().item()
                optimism = point.accuracy - point.expected_accuracy
                rows[name].append((point.accuracy_drop, optimism, judged.base_accuracy - accuracy))
        for name, drops in rows.items():
            seen, optimism, new = zip(*drops, strict=True)
            means = [f"{100 * statistics.mean(values):.2f}" for values in (seen, optimism, new)]
            table.add_row(name, by, *means, f"{100 * statistics.stdev(new):.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
