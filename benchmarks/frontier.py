"""The best recipe on four pretrained networks, compared with the alternatives.

    python -m benchmarks.frontier run       # an hour or two on two cores; resumes where it stopped
    python -m benchmarks.frontier page      # docs/frontier.md and its plots from benchmarks/results

Exits are searched as in `augment(exits="auto")`: some of the images that neither network nor branches have seen choose
the exits; of the others, one half chooses thresholds and the other is reported, over 10 random splits, both ways.
`resnet56` has the exits and the long training of recipes.cifar10_shortcuts, whose records it needs; `resnet56_short`
has the same exits, trained as briefly as the searched ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from benchmarks.methods import TASKS
from benchmarks.methods_compare import GRID, LOW, append, read, realised
from benchmarks.tables import table
from ee_surgery.calibration.search import best_score
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.search.exit_search import TRIED
from recipes.cifar10_resnet56 import Requests, network, over_splits, pictures, right
from recipes.cifar10_shortcuts import EXITS, SIZE

RUNS = Path("runs/frontier")
RESULTS = Path("benchmarks/results/frontier.jsonl")
DOCS = Path("docs")
REQUESTS: Requests = {f"{drop:g}": {"max_accuracy_drop": drop / 100} for drop in (0.3, 0.5, 1.0, 2.0)}
"""Keyed by the points of accuracy given up."""
DROP = 0.01
"""The accuracy drop that the search is run for."""
SEARCHING = {"resnet56_searched": 2_000, "resnet56_short": 2_000, "resnet20": 2_000, "vit4": 2_000, "mobilenetv2": 200}
"""Unseen images that choose exits and are not reported."""


def shortcuts(*budgets: float) -> list[ee.BranchSpec]:
    """Shortcut branches of these sizes."""
    return [ee.BranchSpec("shortcut", options={"budget": budget}) for budget in budgets]


@dataclass(frozen=True)
class Setup:
    """A pretrained network and how its branches are trained."""

    model: nn.Module
    sample: Tensor
    train: Any
    test: Tensor
    labels: Tensor
    branches: Sequence[str | ee.BranchSpec]
    config: ee.TrainConfig
    alternatives: Callable[[Tensor], dict[str, tuple[nn.Module, Tensor]]]
    """From the test images: smaller networks, each with its input."""
    by_hand: Sequence[str] = ()
    """Exits, one per branch, where they are not searched."""


def _cifar(
    model: nn.Module, branches: Sequence[str | ee.BranchSpec], others: Sequence[int] = (20, 32), **config: Any
) -> Setup:
    images, mean, std = pictures("train", None)
    (test, labels), _, _ = pictures("test", None)
    test = (test.float() / 255 - mean) / std
    common: dict[str, Any] = {"lr": 3e-3, "weight_decay": 5e-3, "mixed_precision": "auto", "validation": 0}
    settings = ee.TrainConfig(**{**common, **config})
    train, smaller = ee.AugmentedBatches(*images, mean=mean, std=std, batch_size=SIZE), partial(_smaller, others)
    return Setup(model, torch.zeros(2, 3, 32, 32), train, test, labels, branches, settings, smaller)


def _resnet56() -> Setup:
    """As recipes.cifar10_shortcuts, with less than a third of its epochs."""
    model = network(56).to(memory_format=torch.channels_last)
    return _cifar(model, TRIED, epochs=10, distill_from=0.7, cutmix=1.0)


def _resnet56_short() -> Setup:
    """The exits of recipes.cifar10_shortcuts, trained as briefly as the searched ones."""
    branches = [ee.BranchSpec("shortcut", options={"blocks": blocks}) for blocks in EXITS.values()]
    return replace(_resnet56(), branches=branches, by_hand=list(EXITS))


def _resnet20() -> Setup:
    model = network(20).to(memory_format=torch.channels_last)
    return _cifar(model, ["auto", *shortcuts(0.18, 0.3)], others=(32,), epochs=12)


def _vit4() -> Setup:
    return _cifar(TASKS["vit4"](0, 1).model, ["auto", *shortcuts(0.01, 0.26)], epochs=8, lr=1e-3)


def _mobilenetv2() -> Setup:
    task = TASKS["mobilenetv2"](0, 1)

    def smaller(test: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
        sizes = (128, 112, 96)
        return {
            f"the same at {n} px": (task.model, F.interpolate(test, n, mode="bicubic", antialias=True)) for n in sizes
        }

    config = ee.TrainConfig(epochs=12, batch_size=64, lr=1e-3, weight_decay=5e-3, mixed_precision="auto", validation=0)
    return Setup(task.model, task.sample, task.train, task.test, task.labels, TRIED, config, smaller)


SETUPS: dict[str, Callable[[], Setup]] = {
    "resnet56_searched": _resnet56,
    "resnet56_short": _resnet56_short,
    "resnet20": _resnet20,
    "vit4": _vit4,
    "mobilenetv2": _mobilenetv2,
}


def train(name: str, folder: Path) -> tuple[ee.ExitRecords, dict[str, Any]]:
    """Search exits, train their branches, and record logits on the remaining images."""
    setup = SETUPS[name]()
    batches = list(zip(setup.test.split(200), setup.labels.split(200), strict=True))
    number = SEARCHING[name] // 200
    choosing, reported = batches[:number], batches[number:]
    config = setup.config
    started = time.perf_counter()
    graph = ee.inspect(setup.model, setup.sample)
    branches, candidates = setup.branches, 0
    if setup.by_hand:
        plan = ee.place(graph, setup.by_hand)
    else:
        found = ee.search_exits(graph, setup.train, choosing, branch=branches, config=config, max_accuracy_drop=DROP)
        found.records.save(folder / f"{name}-probes.safetensors")
        print(found, flush=True)
        plan, branches, candidates = found.plan, found.branches, len(found.candidates)
    searched = time.perf_counter()
    branched = ee.attach(graph, plan, branches)
    ee.train(branched, setup.train, config)
    trained = time.perf_counter()
    pruned = ee.prune_exits(branched, ee.record(branched, choosing), DROP)
    records = ee.record(pruned, reported)
    if not pruned.receipt().unchanged:
        raise SystemExit(str(pruned.receipt()))
    records.save(folder / f"{name}.safetensors")
    unseen = torch.cat([images for images, _ in reported])
    return records, {
        "candidates": candidates,
        "trained": plan.names,
        "branches": [f"{spec.name} {' '.join(map(str, spec.options.values()))}".strip() for spec in pruned.specs],
        "search_seconds": round(searched - started),
        "train_seconds": round(trained - searched),
        "epochs": config.epochs,
        "precision": branched.provenance["training"]["mixed_precision"],
        "static": _alone(setup.alternatives(unseen), records),
    }


def _alone(networks: dict[str, tuple[nn.Module, Tensor]], records: ee.ExitRecords) -> dict[str, list[float]]:
    """MACs as a fraction of the original's, and accuracy, of smaller networks on the recorded images."""
    return {
        name: [
            ee.inspect(model, inputs[:2]).macs / records.base_macs,
            right(model, inputs, records.target).double().mean().item(),
        ]
        for name, (model, inputs) in networks.items()
    }


def _smaller(depths: Sequence[int], test: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    return {f"ResNet-{depth}": (network(depth), test) for depth in depths}


def recorded() -> tuple[ee.ExitRecords, dict[str, Any]]:
    """The records of the ResNet-56 from recipes.cifar10_shortcuts."""
    path = Path("runs/cifar10_shortcuts/test_records.safetensors")
    if not path.exists():
        raise SystemExit(f"No {path}: run python -m recipes.cifar10_shortcuts first.")
    records = ee.ExitRecords.load(path)
    (test, _), mean, std = pictures("test", None)
    static = _alone(_smaller((20, 32), (test.float() / 255 - mean) / std), records)
    branches = [f"shortcut {blocks}" for blocks in EXITS.values()]
    return records, {"candidates": 0, "trained": list(EXITS), "branches": branches, "static": static}


def calibrated(records: ee.ExitRecords) -> ee.Frontier:
    """As `ee.calibrate` does it by default: with the score that cross-validation chooses."""
    return ee.Frontier.of(records, best_score(records))


def asked(
    records: ee.ExitRecords, trace: Callable[[ee.ExitRecords], ee.Frontier] = ee.Frontier.search
) -> dict[str, dict[str, list[float]]]:
    """Drops and costs on the reported halves, by the points asked for."""
    splits = both_ways(len(records))
    rows = {}
    base = [records.take(reported).base_accuracy for _, reported in splits]
    for points, (accuracy, cost, shares, _) in over_splits(records, splits, REQUESTS, trace).items():
        below = [b - a for a, b in zip(accuracy, base, strict=True)]
        rows[points] = {
            "drop": [statistics.mean(below), statistics.stdev(below)],
            "cost": [statistics.mean(cost), statistics.stdev(cost)],
            "shares": [statistics.mean(column) for column in zip(*shares, strict=True)],
        }
    return rows


def compare(name: str, records: ee.ExitRecords, about: dict[str, Any]) -> dict[str, Any]:
    """Drops and costs on the reported halves, and the mean curve."""
    splits = both_ways(len(records))
    curves = [realised(ee.Frontier.search(records.take(a)), records.take(b))["curve"] for a, b in splits[:4]]
    return {
        "key": name,
        **about,
        "exits": list(records.exits),
        "base": records.base_accuracy,
        "samples": len(records),
        "exit_costs": [
            (t + b) / records.base_macs for t, b in zip(records.trunk_macs, [*records.branch_macs, 0], strict=True)
        ],
        "alone": records.accuracies,
        "best_case": records.best_case(),
        "asked": asked(records),
        "curve": np.mean(curves, 0).round(5).tolist(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def page(lines: list[dict[str, Any]], docs: Path) -> str:
    """docs/frontier.md, and a plot for each network."""
    parts = [_PAGE]
    for line in sorted(lines, key=lambda line: list(TITLES).index(line["key"])):
        parts += [f"## {TITLES[line['key']]}", _about(line), _asked(line), _static(line)]
        _plot(line, docs / f"frontier-{line['key']}.png")
        parts.append(f"![frontier](frontier-{line['key']}.png)")
    missing = [title for key, title in TITLES.items() if key not in {line["key"] for line in lines}]
    if missing:
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    precisions = ", ".join(sorted({line.get("precision", "bf16") for line in lines}))
    parts.append(
        f"torch {lines[0]['torch']}, timm {lines[0]['timm']}, CPU, mixed precision in training: {precisions}; seed 0."
    )
    return "\n\n".join(parts) + "\n"


def _about(line: dict[str, Any]) -> str:
    exits = ", ".join(f"`{e}` ({b})" for e, b in zip(line["exits"], line["branches"], strict=True))
    found = ""
    if line["candidates"]:
        found = f", found among {line['candidates']} candidates ({line['search_seconds'] / 60:.0f} min)"
    if "epochs" in line:
        found += (
            f"; {len(line['trained'])} branches trained for {line['epochs']} epochs ({line['train_seconds'] / 60:.0f} "
            f"min, {line['threads']} thread(s), on a busy machine)"
        )
    accuracy, cost = line["best_case"]
    return (
        f"Exits at {exits}{found}. Original {line['base']:.2%} on {line['samples']} images. Best case, leaving at the "
        f"first correct exit: {accuracy:.2%} at {cost:.1%} of the MACs."
    )


def _asked(line: dict[str, Any]) -> str:
    rows = [
        [
            f"{points} points",
            " ± ".join(f"{100 * value:.2f}" for value in row["drop"]),
            " ± ".join(f"{100 * value:.1f}" for value in row["cost"]),
            " ".join(f"{share:.0%}" for share in row["shares"]),
        ]
        for points, row in line["asked"].items()
    ]
    return table(["drop asked for", "points below the original", "MACs %", "share at each exit"], rows)


def _static(line: dict[str, Any]) -> str:
    """Smaller networks and single exits, and the cost of early exit at the accuracy of each."""
    lone = {
        f"exit `{e}` alone": values
        for e, *values in zip(line["exits"], line["exit_costs"], line["alone"], strict=False)
    }
    rows = []
    for name, (cost, accuracy) in {**line["static"], **lone}.items():
        reach = np.flatnonzero(np.array(line["curve"]) >= accuracy)
        there = float(GRID[reach[0]]) if len(reach) else float("nan")
        verdict = "not reached" if not len(reach) else "go" if there < cost else "no-go"
        shown = "" if name in lone else verdict
        at = "-" if not len(reach) else f"below {100 * LOW:.0f}" if reach[0] == 0 else f"{100 * there:.0f}"
        rows.append([name, f"{100 * (line['base'] - accuracy):.2f}", f"{100 * cost:.1f}", at, shown])
    head = ["instead", "points below the original", "MACs %", "early exit reaches it at %", ""]
    return table(head, rows)


def _plot(line: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curve = np.array(line["curve"])
    shown = np.where(curve > min(line["alone"]) - 0.02, curve, np.nan)
    axes.plot(GRID, 100 * shown, label="early exits", linewidth=2)
    axes.plot(line["exit_costs"], [100 * a for a in line["alone"]], "o", markersize=4, label="each exit alone")
    for name, (cost, accuracy) in line["static"].items():
        axes.plot(cost, 100 * accuracy, "ks", markersize=5)
        axes.annotate(name, (cost, 100 * accuracy), fontsize=8, xytext=(5, -10), textcoords="offset points")
    axes.set_xlabel("mean MACs per sample / MACs of the original")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(TITLES[line["key"]], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


TITLES = {
    "resnet56": "CIFAR-10, ResNet-56, exits by hand",
    "resnet56_searched": "CIFAR-10, ResNet-56, exits by search",
    "resnet56_short": "CIFAR-10, ResNet-56, exits by hand, trained no longer than those by search",
    "resnet20": "CIFAR-10, ResNet-20",
    "vit4": "CIFAR-10, a 4-layer ViT (`cifar10_vit4_prenorm`)",
    "mobilenetv2": "Imagenette, MobileNetV2 (`mobilenetv2_100`) among its ten classes",
}
_PAGE = """# The frontier of pretrained networks

```bash
python -m recipes.cifar10_shortcuts     # writes the records for the ResNet-56
python -m benchmarks.frontier run && python -m benchmarks.frontier page
```

In every case the original is frozen and its receipt unchanged; every branch visited is counted. Exits are searched
as in `augment(exits="auto")`, among small branches and shortcuts of two sizes, at up to 12 points, for a drop
of 1 point; on the ResNet-56 also picked by hand, with longer training. Some unseen images choose the exits; of the
others, one half chooses thresholds and the other is reported, over 10 random splits, both ways. *Go*: at the accuracy
of that network, exits cost less. One seed throughout.

On the ResNet-56, branches at searched exits train for 10 epochs, those at hand-picked exits for 36. The latter are also
shown after 10 epochs: they then cost about as much as the searched ones, so the difference comes from the longer
training. Searched exits with 36 epochs were not run."""


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "page"])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--networks", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "page":
        (DOCS / "frontier.md").write_text(page(read(options.results), DOCS))
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        if name not in {line["key"] for line in read(options.results)}:
            records, about = recorded() if name == "resnet56" else train(name, options.runs)
            append(options.results, compare(name, records, about))


if __name__ == "__main__":
    main()
