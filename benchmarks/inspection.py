"""Time of `inspect` on every model of the test zoo.

python -m benchmarks.inspection
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from tests.zoo import ZOO, original


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table()
    for column in ("model", "seconds", "calls", "legal points", "blocks", "illegal", "MMACs"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for entry in ZOO[:2] if options.smoke else ZOO:
        model = original(entry.name)
        start = time.perf_counter()
        graph = ee.inspect(model, entry.sample())
        seconds = time.perf_counter() - start
        counts = (len(graph.capture.nodes), len(graph.points), len(graph.blocks), len(graph.illegal))
        table.add_row(entry.name, f"{seconds:.1f}", *map(str, counts), f"{graph.macs / 1e6:.1f}")
    Console(width=120).print(table, environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
