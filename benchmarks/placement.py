"""Searched placement against the rules: identically trained branches at every block, of which some are kept.

    python -m benchmarks.placement run      # half an hour on one core; resumes where it stopped
    python -m benchmarks.placement page     # docs/placement.md from benchmarks/results

With the original frozen, a branch trains the same regardless of the others, so one training run of branches at all
blocks covers every placement with the same steps. The search sees other branches, probes with a quarter of the
steps. Of the images that neither network nor branches have seen, one half chooses (exits, their number, thresholds) and
the other is reported, over 5 random splits, both ways.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch

import ee_surgery as ee
from benchmarks.methods import BATCH, COMMON, PASSES, TASKS
from benchmarks.methods_compare import append, read, realised
from benchmarks.tables import table
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.search.exit_search import shortlist
from ee_surgery.search.exit_subset import Costs

RUNS = Path("runs/placement")
RESULTS = Path("benchmarks/results/placement.jsonl")
SEEDS = (0, 1, 2)
DROP = 0.01
MOST = 6
SHARE = 4
"""A probe trains for one step for every so many steps of a branch."""


def run(backbone: str, seed: int, passes: int, splits: int, folder: Path) -> dict[str, Any]:
    """Train probes and branches, choose exits in each way, and measure their cost."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[backbone](seed, passes)
    graph = ee.inspect(task.model, task.sample)
    every = ee.place(graph, "all")
    held = list(zip(task.test.split(250), task.labels.split(250), strict=True))
    steps = task.epochs * (len(task.train) // BATCH[backbone])  # pyright: ignore[reportArgumentType]
    config = ee.TrainConfig(**{**COMMON, "epochs": task.epochs, "batch_size": BATCH[backbone], "seed": seed})
    for name, taken in (("probes", steps // SHARE), ("branches", steps)):
        path = folder / f"{backbone}-{seed}-{name}.safetensors"
        if not path.exists():
            options: dict[str, Any] = {"points": every.names, "config": config, "probe_steps": taken, "seed": seed}
            found = ee.search_exits(graph, task.train, held, branch="auto", **options, max_accuracy_drop=0.1)
            found.records.save(path)
    probes, full = (
        ee.ExitRecords.load(folder / f"{backbone}-{seed}-{name}.safetensors") for name in ("probes", "branches")
    )
    names = list(full.exits)
    rules = {rule: [_places(graph, n, rule, names) for n in range(1, MOST + 1)] for rule in ee.PLACEMENTS}
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ("search", *rules)}
    for chosen, reported in both_ways(len(full), splits):
        part, rest = full.take(chosen), full.take(reported)
        known = Costs(part, DROP)
        worth, _ = shortlist(probes.take(chosen), DROP, MOST)
        kept = ee.cheapest_exits(part.keep(worth), DROP, most=MOST).exits
        exits = {"search": tuple(worth[k] for k in kept)}
        exits |= {rule: min(lists, key=known) for rule, lists in rules.items()}  # each with its best number
        for way, kept in exits.items():
            found = realised(ee.Frontier.search(part.keep(kept)), rest.keep(kept))
            rows[way].append({**found, "exits": len(kept)})
    metrics = ("drop_0.005", "drop_0.01", "drop_0.02", "area", "exits")
    return {
        "key": f"{backbone}/{seed}",
        "backbone": backbone,
        "seed": seed,
        "candidates": names,
        "costs": [(t + b) / full.base_macs for t, b in zip(full.trunk_macs, full.branch_macs, strict=False)],
        "alone": full.accuracies,
        "probes_alone": probes.accuracies,
        "steps": [steps // SHARE, steps],
        "splits": 2 * splits,
        "ways": {
            way: {name: statistics.mean(row[name] for row in found) for name in metrics} for way, found in rows.items()
        },
        "best": best(full),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _places(graph: ee.ModelGraph, n: int, rule: str, names: list[str]) -> tuple[int, ...]:
    """Where a rule puts n exits; one at the full cost saves nothing and is not a candidate."""
    return tuple(names.index(name) for name in ee.place(graph, n, rule, clip=True).names if name in names)


def best(records: ee.ExitRecords) -> dict[str, Any]:
    """The search result on these records, and the best of all subsets of up to three exits."""
    costs = Costs(records, DROP)
    started = time.perf_counter()
    found = ee.cheapest_exits(records, DROP, most=MOST)
    seconds = time.perf_counter() - started
    lists = [exits for n in range(1, 4) for exits in itertools.combinations(range(len(records.exits)), n)]
    three = ee.cheapest_exits(records, DROP, most=3)
    return {
        "search": found.cost,
        "exits": found.exits,
        "search_of_three": three.cost,
        "best_of_three": min(map(costs, lists)),
        "lists": len(lists),
        "seconds": round(seconds, 2),
    }


def page(lines: list[dict[str, Any]]) -> str:
    """docs/placement.md."""
    parts = [_PAGE.format(drop=100 * DROP, most=MOST, share=SHARE, splits=lines[0]["splits"])]
    ways = list(lines[0]["ways"])
    for heading, name in _TABLES.items():
        rows = []
        for line in lines:
            values = [line["ways"][way][name] for way in ways]
            shown = [f"{value:.1f}" if name == "exits" else f"{value:.3f}" for value in values]
            rows.append([f"{line['backbone']}, seed {line['seed']}", *shown])
        parts += [heading, table(["", *ways], rows)]
    rows = [
        [
            f"{line['backbone']}, seed {line['seed']}",
            str(len(line["candidates"])),
            str(line["best"]["lists"]),
            *(f"{line['best'][name]:.4f}" for name in ("best_of_three", "search_of_three", "search")),
            f"{line['best']['search_of_three'] / line['best']['best_of_three'] - 1:.2%}",
        ]
        for line in lines
    ]
    head = [
        "",
        "candidates",
        "subsets tried",
        "best of them",
        "search, up to 3",
        f"search, up to {MOST}",
        "worse than the best by",
    ]
    parts += [_BEST, table(head, rows)]
    parts.append(f"torch {lines[0]['torch']}, timm {lines[0]['timm']}, CPU.")
    return "\n\n".join(parts) + "\n"


_TABLES = {
    "Fraction of the MACs above which at most 1 point is lost, the drop that the search was asked for:": "drop_0.01",
    "The same for 0.5 points, with the exits chosen for 1:": "drop_0.005",
    "For 2 points:": "drop_0.02",
    "Number of exits, mean over the halves:": "exits",
}
_PAGE = """# Searched placement against the rules

```bash
python -m benchmarks.placement run && python -m benchmarks.placement page
```

`auto` branches at every block of three frozen networks, in the few steps of [methods.md](methods.md), then some of them
kept: chosen by `search_exits` for an accepted drop of {drop:g} point, or by a rule, with whichever number up to {most}
is best for that rule on the choosing half. With the original frozen, a branch trains the same regardless of the others,
so all placements share the same branches with the same steps; the search first sees probes with 1/{share} of the steps,
then the branches it selected for training. Means over {splits} halves: one chooses exits and thresholds, the other is
reported."""
_BEST = """On all records, the expected cost at that drop compared with the best of **all** subsets of up
to three exits (the cost of a subset is that of the best thresholds, with outcomes replaced by estimated probabilities
of being correct; `search/exit_subset.py`):"""


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "page"])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--backbones", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--passes", type=int, help="in place of the default of each backbone")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "page":
        Path("docs/placement.md").write_text(page(read(options.results)))
        return
    for backbone in options.backbones:
        for seed in options.seeds:
            if f"{backbone}/{seed}" not in {line["key"] for line in read(options.results)}:
                passes = options.passes or PASSES[backbone]
                append(options.results, run(backbone, seed, passes, options.splits, options.runs))


if __name__ == "__main__":
    main()
