"""EENet's learned scheduler against budgets met by a probability or an entropy, on the same records.

    python -m benchmarks.schedulers run sst2 runs/text_minilm/sst2-0/test_records.safetensors    # minutes
    python -m benchmarks.schedulers page                                                         # docs/schedulers.md

Ten budgets, equally far apart between the cost of the first exit and that of the original. For each, one half of the
records chooses thresholds and the other half is reported, 20 halves: accuracy, and the cost of the exits really taken.
`geometric` shares exits in geometric progression by the largest probability (MSDNet) or the entropy (BranchyNet's
score); `search` is this project's. The oracle leaves at the first correct exit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ee_surgery as ee
from benchmarks.frontier import calibrated
from benchmarks.methods_compare import append, read
from benchmarks.tables import table
from ee_surgery.calibration.correctness import ChanceOfBeingRight
from ee_surgery.calibration.eenet import eenet_scheduler
from ee_surgery.calibration.failure import failure_auroc
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.policies.exit_costs import exit_costs

RESULTS = Path("benchmarks/results/schedulers.jsonl")
PAGE = Path("docs/schedulers.md")
TITLES = {
    "resnet56": "CIFAR-10, ResNet-56",
    "vit4": "CIFAR-10, a 4-layer ViT",
    "sst2": "SST-2, MiniLM",
    "ag_news": "AG News, MiniLM",
}
Choose = Callable[[float], ee.OperatingPoint]


def _within(frontier: ee.Frontier) -> Choose:
    return lambda budget: frontier.at(budget=budget)


WAYS: dict[str, Callable[[ee.ExitRecords], Choose]] = {
    "eenet": lambda records: partial(eenet_scheduler, records),
    "geometric, max_prob": lambda records: partial(ee.geometric_budget, records),
    "geometric, entropy": lambda records: partial(ee.geometric_budget, records, score="entropy"),
    "search, max_prob": lambda records: _within(ee.Frontier.search(records)),
    "search, default score": lambda records: _within(calibrated(records)),
}


def run(name: str, records: ee.ExitRecords, halves: int) -> dict[str, Any]:
    """Every way at every budget."""
    cheapest = exit_costs(records.trunk_macs, records.branch_macs, [True] * len(records.exits))[0] / records.base_macs
    budgets = np.linspace(cheapest, 1, 12)[1:-1].tolist()
    splits = both_ways(len(records))[:halves]
    found = {
        way: np.array([accuracies(choose, records, split, budgets) for split in splits]).swapaxes(0, 1)
        for way, choose in WAYS.items()
    }  # each (budgets, halves, 2)
    first, second = splits[0]
    fitted, unseen = ChanceOfBeingRight.fit(records.take(first)), records.take(second)
    return {
        "key": name,
        "exits": list(records.exits),
        "samples": len(records),
        "base": records.base_accuracy,
        "alone": records.accuracies,
        "oracle": records.best_case(),
        "budgets": budgets,
        "halves": len(splits),
        "ways": {way: values.mean(1).tolist() for way, values in found.items()},
        "behind": {way: _apart(found["eenet"] - values) for way, values in found.items()},
        "default": _apart(found["search, default score"] - found["search, max_prob"]),
        "auroc": {"max_prob": failure_auroc(unseen), "fitted": failure_auroc(unseen, fitted)},
        "torch": torch.__version__,
    }


def _apart(differences: np.ndarray) -> list[list[float]]:
    """Mean and standard deviation over the halves, per budget, of differences in accuracy."""
    return np.stack([differences[..., 0].mean(1), differences[..., 0].std(1)], 1).tolist()


def accuracies(
    way: Callable[[ee.ExitRecords], Choose],
    records: ee.ExitRecords,
    split: tuple[torch.Tensor, torch.Tensor],
    budgets: list[float],
) -> list[tuple[float, float]]:
    """Accuracy and cost on the reported half, per budget."""
    choose, test = way(records.take(split[0])), records.take(split[1])
    replays = [test.replay(choose(budget).policy) for budget in budgets]
    return [(each.correct.double().mean().item(), each.macs.mean().item() / records.base_macs) for each in replays]


def page(lines: list[dict[str, Any]]) -> str:
    """docs/schedulers.md."""
    parts = [_PAGE]
    for line in sorted(lines, key=lambda line: list(TITLES).index(line["key"])):
        accuracy, cost = line["oracle"]
        aurocs = "; ".join(
            f"{name} {', '.join('-' if value is None else f'{value:.3f}' for value in values)}"
            for name, values in line["auroc"].items()
        )
        alone = ", ".join(f"{100 * value:.1f}" for value in line["alone"])
        rows = [
            [f"{budget:.3f}", *(f"{100 * line['ways'][way][k][0]:.2f}" for way in WAYS),
             *(" ± ".join(f"{100 * value:+.2f}" if n == 0 else f"{100 * value:.2f}" for n, value in enumerate(pair))
               for pair in (line["behind"]["geometric, max_prob"][k], line["default"][k])),
             f"{line['ways']['eenet'][k][1]:.3f}"]
            for k, budget in enumerate(line["budgets"])
        ]  # fmt: skip
        head = ["budget", *WAYS, "eenet - geometric", "default score - max_prob", "MACs taken by eenet"]
        parts += [
            f"## {TITLES[line['key']]}",
            f"{line['samples']} samples, {line['halves']} halves; exits at {', '.join(line['exits'])}, each alone, the "
            f"original last: {alone} %. Oracle: {accuracy:.2%} at {cost:.1%}. AUROC of each exit's score for "
            f"correctness, on the other half: {aurocs}. torch {line['torch']}.",
            table(head, rows),
        ]
    missing = [title for key, title in TITLES.items() if key not in {line["key"] for line in lines}]
    return "\n\n".join([*parts, *([f"Not run yet: {'; '.join(missing)}."] if missing else [])]) + "\n"


_PAGE = """# Schedulers for a budget

```bash
python -m recipes.text_minilm sst2
python -m benchmarks.schedulers run sst2 runs/text_minilm/sst2-0/test_records.safetensors
python -m benchmarks.schedulers page
```

EENet's learned scheduler (arXiv:2301.07099) against exit shares in geometric progression by the largest probability, as
MSDNet's, and by the entropy, BranchyNet's score, and against thresholds searched per exit, by the largest probability
and by the score that `calibrate` chooses by default. All on the same records, at ten budgets between the cost of the
first exit and the original's: one half chooses, the other is reported. Accuracy in %; differences with their standard
deviation over the halves. Every branch visited counts, and budgets are met by exits really taken.

With two classes, every function of one exit's softmax orders its answers alike, so only earlier exits' answers could
tell a learned score more; the AUROC of a logistic regression on both (`fitted`) beside the largest probability's shows
how much they do."""


def main() -> None:
    """Compare on one file of records, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "page"), default="run")
    parser.add_argument("name", nargs="?", choices=list(TITLES), default="sst2")
    parser.add_argument("records", nargs="?", type=Path)
    parser.add_argument("--smoke", action="store_true", help="made-up records, two halves, nothing is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "page":
        PAGE.write_text(page(read(RESULTS)))
        return
    if options.smoke:
        torch.manual_seed(0)
        labels = torch.randint(4, (600,))
        logits = torch.stack([(k + 1) * torch.nn.functional.one_hot(labels, 4) + torch.randn(600, 4) for k in range(4)])
        records = ee.ExitRecords(("a", "b", "c"), logits, (20, 50, 80, 100), (1, 1, 1), labels)
        print(page([run("sst2", records, 2)]))
        return
    append(RESULTS, run(options.name, ee.ExitRecords.load(options.records), 20))


if __name__ == "__main__":
    main()
