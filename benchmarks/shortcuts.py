"""Do shortcut branches exist on any model, and do they run? The smallest model of every timm family, random weights.

    python -m benchmarks.shortcuts                 the table of docs/shortcuts.md
    python -m benchmarks.shortcuts resnet10t       of these models

At the block where the cost up to it plus that of the shortest path is least, that shortcut is built and run next to the
original; and the one that keeps every block, whose logits must be the original's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import ee_surgery as ee
from benchmarks import models
from ee_surgery.graph.shortcut import pieces, shortest
from ee_surgery.placement import ExitPlan

LIMIT = 12 * 10**9  # MACs of a model


def check(name: str) -> dict[str, Any]:
    """Build and run both on random weights.

    Raises:
        AssertionError: an output is wrong.
    """
    torch.manual_seed(0)
    graph = ee.inspect(timm.create_model(name).eval())
    if graph.macs > LIMIT:
        return {"why": f"left out: {graph.macs / 1e9:.0f} GMACs"}
    ways = shortest(graph)
    early = [point for point in graph.blocks if point.name in ways and point.macs > 0]
    if not early:
        return {"why": "no block ends before the whole cost is spent"}
    point = min(early, key=lambda p: p.macs_fraction + ways[p.name])
    every = [piece for piece in pieces(graph, point) if piece.optional]
    if not every:
        return {"why": "no two positions have the same live tensors"}
    row: dict[str, Any] = {"exit": point.name, "trunk": point.macs_fraction, "live": point.live}
    for kept in ([], every):
        spec = ee.BranchSpec("shortcut", options={"blocks": " ".join(piece.name for piece in kept)})
        branched = ee.attach(graph, ExitPlan(graph.backbone.model_id, "by hand", (point,)), spec)
        answer, original = branched.all_exits(branched.sample)
        assert answer.shape == original.shape, (answer.shape, original.shape)
        if kept:
            error = (answer - original).abs().max() / original.abs().max().clamp_min(1e-6)
            assert error < 1e-3, f"with every block, {error:.1e} off"
        else:
            row |= {"share": branched.branch_macs[0] / graph.macs, "skipped": len(every)}
    return row


def main() -> None:
    """One row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "exit", "live", "MACs up to it", "shortest path", "pieces skipped", box=box.MARKDOWN)
    console, found, started = Console(width=140), 0, time.perf_counter()
    for name in options.models or models.SMALLEST.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = check(name)
        except Exception as error:
            row = {"why": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        gc.collect()
        print(name, row, file=sys.stderr, flush=True)  # the table comes at the end
        if "why" in row:
            table.add_row(name, row["why"])
            continue
        found += 1
        costs = [f"{row[key]:.1%}" for key in ("trunk", "share")]
        table.add_row(name, row["exit"], str(row["live"]), *costs, str(row["skipped"]))
    console.print(table)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"{found} models have one. timm {timm.__version__}, torch {torch.__version__}, {minutes:.0f} min.")


if __name__ == "__main__":
    main()
