"""What one line gives: `ee.augment(model, train=..., calibrate=..., effort=...)` on four pretrained networks.

    python -m benchmarks.effort run resnet56 --effort standard     # appends a line to benchmarks/results/effort.jsonl
    python -m benchmarks.effort page                               # docs/effort.md

Nothing else is set. Half of the images given to `calibrate=` choose exits and end the training; those are not reported.
Of all others, which neither network nor branches have seen, one half chooses thresholds and the other is reported, over
10 random splits, both ways. Beside the ResNet-56, steps of `recipes.cifar10_shortcuts` are timed in the same process:
36 epochs of them are what the recipe takes on this machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

import ee_surgery as ee
from benchmarks.frontier import SEARCHING, SETUPS, asked, calibrated, compare
from benchmarks.methods_compare import append, read
from benchmarks.tables import table
from ee_surgery.calibration.profile import processor
from ee_surgery.data.batches import halves
from ee_surgery.search.effort import EFFORTS, EffortName
from recipes.cifar10_resnet56 import network, pictures
from recipes.cifar10_shortcuts import CONFIG, EXITS, SIZE

RESULTS = Path("benchmarks/results/effort.jsonl")
PAGE = Path("docs/effort.md")
RUNS = Path("runs/effort")
NETWORKS = {"resnet56": "resnet56_searched", "resnet20": "resnet20", "vit4": "vit4", "mobilenetv2": "mobilenetv2"}
"""Key of the same network in benchmarks.frontier."""
RECIPE_EPOCHS = 36


def run(name: str, effort: EffortName, seed: int, smoke: bool = False) -> dict[str, Any]:
    """One line of code, its time, and what it gives."""
    setup = SETUPS[NETWORKS[name]]()
    batches = list(zip(setup.test.split(100), setup.labels.split(100), strict=True))
    number = 2 * SEARCHING[NETWORKS[name]] // 100
    given, rest = batches[:number], batches[number:]
    if smoke:
        given, rest = given[:2], rest[:1]
    recipe = recipe_minutes() if name == "resnet56" and not smoke else None
    started = time.perf_counter()
    branched = ee.augment(
        setup.model,
        sample=setup.sample,
        train=setup.train,
        calibrate=given,
        effort=effort,
        time_budget=0.1 if smoke else None,
        seed=seed,
    )
    minutes = (time.perf_counter() - started) / 60
    records = ee.record(branched, [*halves(given, 128)[1], *rest])
    if not branched.receipt().unchanged:
        raise SystemExit(str(branched.receipt()))
    if not smoke:
        records.save(RUNS / f"{name}-{effort}-{seed}.safetensors")
    found = compare(f"{name}-{effort}-{seed}", records, {})
    kept = ("key", "exits", "base", "samples", "exit_costs", "alone", "best_case", "asked", "threads", "torch", "timm")
    return {
        **{key: found[key] for key in kept},
        "by_default": asked(records, calibrated),
        "network": name,
        "effort": effort,
        "seed": seed,
        "minutes": minutes,
        "recipe_minutes": recipe,
        "branches": [f"{spec.name} {' '.join(map(str, spec.options.values()))}".strip() for spec in branched.specs],
        "found": branched.provenance["effort"],
        "precision": branched.provenance["training"]["mixed_precision"],
        "device": processor(torch.device("cpu")),
    }


def recipe_minutes(steps: int = 12) -> float:
    """Minutes of training that recipes.cifar10_shortcuts takes here, by some of its steps with and without teacher."""
    images, mean, std = pictures("train", None)
    model = network(56).to(memory_format=torch.channels_last)
    branches = [ee.BranchSpec("shortcut", options={"blocks": blocks}) for blocks in EXITS.values()]
    branched = ee.augment(model, list(EXITS), branch=branches, sample=torch.zeros(2, 3, 32, 32))
    seconds = []
    for start in (0.0, 1.0):  # the teacher runs for all steps, or for none
        config = replace(CONFIG, epochs=1, max_steps=steps, distill_from=start, progress=False)
        speed = (
            ee.train(branched, ee.AugmentedBatches(*images, mean=mean, std=std, batch_size=SIZE), config)
            .epochs[0]
            .speed
        )
        assert speed is not None
        seconds.append(speed.seconds_per_step)
    with_teacher, without = seconds
    share = CONFIG.distill_from
    return RECIPE_EPOCHS * (len(images[0]) // SIZE) * (share * without + (1 - share) * with_teacher) / 60


def page(lines: list[dict[str, Any]]) -> str:
    """docs/effort.md."""
    order = list(NETWORKS), list(EFFORTS)
    lines = sorted(lines, key=lambda line: (order[0].index(line["network"]), order[1].index(line["effort"])))
    by_default = "points below at 1 point", "MACs %"
    head = [
        "network",
        "effort",
        "seed",
        *by_default,
        *(f"{x}, max_prob" for x in by_default),
        "minutes",
        "epochs",
        "exits",
        "processor, precision",
    ]
    last = lines[-1]
    versions = f"torch {last['torch']}, timm {last['timm']}, {last['threads']} thread(s)"
    return f"{_PAGE}\n{table(head, [_row(line) for line in lines])}\n\n{versions}.\n"


def _row(line: dict[str, Any]) -> list[str]:
    minutes, recipe = f"{line['minutes']:.0f}", line["recipe_minutes"]
    if recipe:
        minutes += f" ({line['minutes'] / recipe:.2f} of the recipe's {recipe:.0f})"
    return [
        line["network"],
        line["effort"],
        str(line["seed"]),
        *(
            " ± ".join(f"{100 * value:.{digits}f}" for value in line[kind]["1"][what]) if kind in line else "-"
            for kind in ("by_default", "asked")
            for what, digits in (("drop", 2), ("cost", 1))
        ),
        minutes,
        str(line["found"]["epochs"]),
        ", ".join(f"`{name}` {branch}" for name, branch in zip(line["exits"], line["branches"], strict=True)),
        f"{line['device']}, {line['precision']}",
    ]


_PAGE = """# What one line gives

```bash
python -m benchmarks.effort run resnet56 --effort standard && python -m benchmarks.effort page
```

`ee.augment(model, train=..., calibrate=...)` with nothing else set: exits, branches, sizes and the length of the
training follow from the model and the data. The original is frozen and its receipt unchanged; every branch visited is
counted; MACs are means over 20 halves of images that neither network, branches nor search have seen, with thresholds on
the score that `calibrate` chooses, and on the largest probability. Minutes are those of the whole call, beside other
work. For the ResNet-56 they stand beside the time that the 36 epochs of `recipes.cifar10_shortcuts`, with exits and
blocks picked by hand, take on the same machine, from steps timed in the same process; the row of the Intel processor
counts the first of twelve, which is slower, so the recipe's minutes are somewhat too many there. Searched exits with
ten epochs took 40.9 %, the recipe 28.6 % ([frontier](frontier.md)). What has no row was not run yet.
"""


def main() -> None:
    """Run or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "page"), default="run")
    parser.add_argument("network", nargs="?", choices=list(NETWORKS))
    parser.add_argument("--effort", choices=get_args(EffortName), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--smoke", action="store_true", help="a few images to calibrate on, for seconds; writes nothing"
    )
    options = parser.parse_args()
    if options.smoke:
        options.network, options.effort = "resnet20", "quick"
    torch.set_num_threads(options.threads)
    if options.what == "page":
        PAGE.write_text(page(read(RESULTS)))
        return
    if options.network is None:
        sys.exit("Name a network to run.")
    line = run(options.network, options.effort, options.seed, options.smoke)
    print(line)
    if not options.smoke:
        append(RESULTS, line)


if __name__ == "__main__":
    main()
