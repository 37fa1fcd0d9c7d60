"""The papers that the presets come from, at their own protocol: branches, places, loss, optimiser, rule, epochs.

    python -m benchmarks.seeds run cascade                   # each of them minutes to hours; resumes where it stopped
    python -m benchmarks.seeds run pteenet --lam 0.9
    python -m benchmarks.seeds run eenets --lam 1.0
    python -m benchmarks.seeds page                          # docs/seeds.md from benchmarks/results/seeds.jsonl

The CIFAR ResNets of the data folder stand in for the ResNet-110 of the papers. PTEENet and the cascade leave the
original frozen, and its receipt must say so; EENets trains it too, here on a copy of the pretrained one. EENet's
scheduler is compared on records: `python -m benchmarks.schedulers`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import ee_surgery as ee
from benchmarks.methods_compare import append, read
from benchmarks.tables import table
from ee_surgery.calibration.profile import processor
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.policies.exit_costs import exit_costs
from recipes.cifar10_resnet56 import network, pictures, right

RUNS = Path("runs/seeds")
RESULTS = Path("benchmarks/results/seeds.jsonl")
PAGE = Path("docs/seeds.md")
Row = dict[str, Any]


def rule(records: ee.ExitRecords) -> list[Row]:
    """Thresholds by the cascade's rule from one half, results on the other: means over 20 halves."""
    rows = []
    for drop in (0.0, 0.01, 0.02, 0.04, 0.07, 0.08):
        found = [
            point(records.take(b), ee.accuracy_drop_rule(records.take(a), drop).policy)
            for a, b in both_ways(len(records))
        ]
        rows.append({"asked": f"its rule, {drop:.0%}", **mean(found)})
    for drop in (0.004, 0.012):
        found = []
        for a, b in both_ways(len(records)):
            frontier = ee.Frontier.trace(records.take(a), "cascade")
            found.append(point(records.take(b), frontier.at(max_accuracy_drop=drop).policy))
        rows.append({"asked": f"the largest within {100 * drop:g} points", **mean(found)})
    return rows


def half(records: ee.ExitRecords) -> list[Row]:
    """Leave where the confidence unit says more than 0.5: nothing is chosen, so all images are reported."""
    policy = ee.ThresholdPolicy((0.5,) * len(records.exits), "learned")
    return [{"asked": "confidence above 0.5", **point(records, policy)}]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A preset at its paper's protocol."""

    depth: int
    """Of the CIFAR ResNet."""
    points: Callable[[ee.ExitRecords], list[Row]]
    published: str
    """Its own numbers, with what they are of."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Beyond those of the preset."""


PAPERS = {
    "cascade": Paper(
        depth=56,
        points=rule,
        published="ResNet-110, heads alone 77.5 and 81.4 %, original 93.1 %: rule at 1 %: 92.7 % with 27.4 % fewer "
        "MACs; 2 %: 91.9 %, 33.9 %; 4 %: 91.1 %, 42.4 %",
        # two augmented views of every image in turn, so that the original runs twice and not twenty times
        settings={"views": 2, "cache_gb": 12.0},
    ),
    "pteenet": Paper(
        depth=56,
        points=half,
        published="ResNet-110, lambda 0.9: 26.9 % fewer MACs at 97.15 % agreement with the original",
        settings={"teach": "original"},
    ),
    "eenets": Paper(depth=20, points=half, published="similar accuracy at about 20 % of the MACs, several networks"),
}


def point(records: ee.ExitRecords, policy: ee.ThresholdPolicy) -> Row:
    """What a policy does on these records; its cost by every branch visited, and by the last branch alone."""
    replay = records.replay(policy)
    leaving = replay.exit_index
    own = [t + b for t, b in zip(records.trunk_macs, [*records.branch_macs, 0], strict=True)]
    answers = records.recorded_logits().argmax(-1)
    same = answers.gather(0, leaving[None])[0] == answers[-1]
    return {
        "accuracy": replay.correct.double().mean().item(),
        "below": records.base_accuracy - replay.correct.double().mean().item(),
        "agreement": same.double().mean().item(),
        "cost": replay.macs.mean().item() / records.base_macs,
        "own_branch_cost": torch.tensor(own)[leaving].double().mean().item() / records.base_macs,
    }


def mean(rows: list[Row]) -> Row:
    """Of every column."""
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def run(name: str, lam: float | None, seed: int, epochs: int | None, few: int | None) -> Row:
    """Train as published, record the test images, and replay."""
    paper, preset = PAPERS[name], ee.PRESETS[name]
    images, mean_, std = pictures("train", few)
    (test, truth), _, _ = pictures("test", few)
    test = (test.float() / 255 - mean_) / std
    graph = ee.inspect(network(paper.depth), torch.zeros(2, 3, 32, 32))
    plan = preset.plan(graph)
    folder = RUNS / f"{name}-{lam or 0:g}-{seed}"
    config = replace(
        preset.config,
        **paper.settings,
        epochs=epochs or preset.config.epochs,
        cost_weight=preset.config.cost_weight if lam is None else lam,
        validation=0.0,
        seed=seed,
        mixed_precision="auto",
        checkpoint_dir=None if few else str(folder / "training"),
    )
    branched = ee.attach(graph, plan, preset.branches(plan.points), seed=seed)
    batches = ee.AugmentedBatches(*images, mean=mean_, std=std, batch_size=config.batch_size)
    report = ee.train(branched, batches, config, joint=preset.joint)
    trained = report.model
    records = ee.record(trained, list(zip(test.split(250), truth.split(250), strict=True)))
    if not trained.receipt().unchanged:
        raise SystemExit(str(trained.receipt()))
    if not few:
        records.save(folder / "test_records.safetensors")
    return {
        "paper": name,
        "network": f"ResNet-{paper.depth}",
        "lam": lam,
        "seed": seed,
        "epochs": config.epochs,
        "published_epochs": preset.config.epochs,
        "joint": preset.joint,
        "base": records.base_accuracy,
        "pretrained": right(network(paper.depth), test, truth).double().mean().item(),
        "alone": records.accuracies,
        "exits": list(records.exits),
        "exit_costs": [
            cost / records.base_macs
            for cost in exit_costs(records.trunk_macs, records.branch_macs, [True] * len(records.exits))
        ],
        "points": paper.points(records),
        "minutes": sum(epoch.seconds for epoch in report.epochs) / 60,
        "precision": trained.provenance["training"]["mixed_precision"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": processor(torch.device("cpu")),
    }


def page(lines: list[Row]) -> str:
    """docs/seeds.md."""
    parts = [_PAGE]
    for name, paper in PAPERS.items():
        preset, found = ee.PRESETS[name], [line for line in lines if line["paper"] == name]
        parts += [f"## {preset.paper}", f"Published: {paper.published}."]
        if not found:
            parts.append(f"Not run yet: `python -m benchmarks.seeds run {name}`.")
            continue
        costs = "MACs %, last branch alone", "MACs %, all visited"
        head = ["", "accuracy %", "below its original", "agreement %", *costs]
        rows = [
            [
                f"{_what(line)}: {row['asked']}",
                f"{100 * row['accuracy']:.2f}",
                f"{100 * row['below']:.2f}",
                f"{100 * row['agreement']:.2f}",
                f"{100 * row['own_branch_cost']:.1f}",
                f"{100 * row['cost']:.1f}",
            ]
            for line in found
            for row in line["points"]
        ]
        parts.append(table(head, rows))
        parts += [_about(line) for line in found]
    return "\n\n".join(parts) + "\n"


def _what(line: Row) -> str:
    lam = "" if line["lam"] is None else f", λ {line['lam']:g}"
    return f"{line['network']}{lam}, seed {line['seed']}"


def _about(line: Row) -> str:
    alone = ", ".join(f"{100 * value:.1f}" for value in line["alone"])
    trained = f", trained with its branches, from {line['pretrained']:.2%}" if line["joint"] else ", frozen"
    return (
        f"{_what(line)}: {line['epochs']} epochs (published: {line['published_epochs']}), {line['minutes']:.0f} min, "
        f"{line['threads']} thread(s), {line['device']}, torch {line['torch']}, mixed precision {line['precision']}. "
        f"Original {line['base']:.2%}{trained}. Exits at {', '.join(line['exits'])}; each alone, the original last: "
        f"{alone} %."
    )


_PAGE = """# Three papers at their own protocol

```bash
python -m benchmarks.seeds run cascade && python -m benchmarks.seeds page
```

Each preset with the branches, places, loss, optimiser, batch size and rule of its paper, on the CIFAR-10 ResNets at
hand, results on the 10,000 test images. Costs are MACs as a fraction of the original's, in two ways: with the branch
where a sample leaves alone, as PTEENet and EENets count, and with every branch visited, which is what a sample really
takes. EENet's scheduler: [schedulers](schedulers.md). Shorter training of all presets under the same conditions:
[methods](methods.md)."""


def main() -> None:
    """Run one, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "page"), default="run")
    parser.add_argument("paper", nargs="?", choices=list(PAPERS), default="cascade")
    parser.add_argument("--lam", type=float, help="weight of the cost in the loss; by default the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default the published number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few images, one epoch, nothing is kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "page":
        PAGE.write_text(page(read(RESULTS)))
        return
    few, epochs = (256, 1) if options.smoke else (None, options.epochs)
    line = run(options.paper, options.lam, options.seed, epochs, few)
    if options.smoke:
        print(page([line]))
    else:
        append(RESULTS, line)


if __name__ == "__main__":
    main()
