"""docs/methods.md and its plots, from the results of `benchmarks.methods compare`."""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import ee_surgery as ee
from benchmarks.methods_compare import COSTS, DROPS, GRID, LOW, read
from benchmarks.tables import table

TITLES = {
    "resnet56": "CIFAR-10, ResNet-56",
    "vit4": "CIFAR-10, a 4-layer ViT (`cifar10_vit4_prenorm`)",
    "mobilenetv2": "Imagenette, MobileNetV2 (`mobilenetv2_100`) among its ten classes",
}
OURS = ("search", "stopping")


def write_page(results: Path, docs: Path) -> None:
    """Write the page and one plot per backbone."""
    parts = [_HEAD]
    for backbone, title in TITLES.items():
        lines = _whole(read(results / f"methods-{backbone}.jsonl"))
        if lines:
            own = _own_protocol(results) if backbone == "resnet56" else {}
            parts += [f"## {title}", *_section(backbone, lines, docs, own)]
    (docs / "methods.md").write_text("\n\n".join(parts) + "\n")
    papers = (docs / "papers.md").read_text()
    for method in ee.PRESETS:
        papers = re.sub(f"<!-- ours:{method} -->.*", f"<!-- ours:{method} -->{_summary(method, results)}", papers)
    (docs / "papers.md").write_text(papers)


def _whole(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the seeds for which every method has been compared, and lines without a seed."""
    oracles = {(line["method"], line["seed"]) for line in lines if line["policy"] == "oracle"}
    seeds = {seed for _, seed in oracles if all((method, seed) in oracles for method in ("ours", *ee.PRESETS))}
    return [line for line in lines if line["seed"] in seeds or (line["seed"] is None and seeds)]


def _summary(method: str, results: Path) -> str:
    """One line for papers.md: the results of the method here."""
    found = []
    for backbone, title in (("resnet56", "ResNet-56"), ("vit4", "the ViT"), ("mobilenetv2", "MobileNetV2")):
        policy = ee.PRESETS[method].method
        lines = [
            line
            for line in _whole(read(results / f"methods-{backbone}.jsonl"))
            if (line["method"], line["policy"]) == (method, policy)
        ]
        if lines:
            point = f"{_percent([line['at_0.75'] for line in lines])} % at 0.75 of the MACs"
            within = f"at most 1 point lost from {np.mean([line['drop_0.01'] for line in lines]):.3f}"
            found.append(f"{title} {point}, {within}")
    return f"Ours (original frozen, short training; [methods.md](methods.md)): {'; '.join(found)}."


def _own_protocol(results: Path) -> dict[str, str]:
    """By method, what it reaches at its paper's own protocol: the last row of benchmarks.seeds."""
    found = {}
    for line in read(results / "seeds.jsonl"):
        last = line["points"][-1]
        found[line["paper"]] = (
            f"{last['cost']:.3f} at {100 * last['below']:.2f} points below, {line['epochs']} epochs, {line['network']}"
        )
    return found


def _section(backbone: str, lines: list[dict[str, Any]], docs: Path, own: dict[str, str]) -> Iterable[str]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["method"], line["policy"]].append(line)
    any_line = next(line for line in lines if line["policy"] == "search")
    seeds = sorted({line["seed"] for line in lines if line["seed"] is not None})
    oracles = {method: found for (method, policy), found in groups.items() if policy == "oracle"}
    yield (
        f"{any_line['samples']} images to choose on, as many others to report, {any_line['halves']} random halves; "
        f"seeds {', '.join(map(str, seeds))}; the original's accuracy is {_percent([any_line['base']])} %. Branches "
        f"saw {any_line['passes']} images each (torch {any_line['torch']}, timm {any_line['timm']}, "
        f"{platform.machine()} CPU, {any_line['threads']} thread)."
    )
    head = ["", "exits", *(f"at {cost:g}" for cost in COSTS), *(f"-{100 * drop:g}" for drop in DROPS), "area", "AUROC",
            "train"]  # fmt: skip
    rows = []
    for method in ("ours", *ee.PRESETS):
        policy = "search" if method == "ours" else ee.PRESETS[method].method
        found = groups.get((method, policy), [])
        if found:
            name = f"**ours** ({policy})" if method == "ours" else f"{method} ({policy})"
            rows.append([name, str(len(found[0]["exits"])), *_cells(found), _seconds(found), own.get(method, "")])
    for (method, policy), found in groups.items():
        if policy == "static":
            cost = f"static {method}: {_percent([found[0]['accuracy']])} % at {found[0]['cost']:.3f}"
            rows.append([cost, *[""] * len(head)])
    yield "**Each method as published**, on the frozen original: its branches, exits, loss and policy."
    yield table([*head, "own protocol"], rows) if own else table(head, [row[: len(head)] for row in rows])
    rows = []
    for policy in ee.CALIBRATORS:
        found = groups.get(("ours", policy), [])
        if found:
            name = f"**{policy}**" if policy in OURS else policy
            took = f"{np.mean([line['calibration_seconds'] for line in found]):.2f} s"
            rows.append([name, *_cells(found), took])
    rows.sort(key=lambda row: -float(row[len(COSTS) + len(DROPS) + 1].split(" ")[0]))
    for line in oracles.get("ours", [])[:1]:
        rows.append([f"oracle: {_percent([line['accuracy']])} % at {line['cost']:.3f}", *[""] * (len(head) - 2)])
    yield "**Each policy on the same branches** (ours), sorted by area; this project's are in bold."
    yield table(["", *head[2:-1], "calibration"], rows)
    areas = {
        policy: 100 * float(np.mean([line["area"] for line in groups["ours", policy]]))
        for policy in ee.CALIBRATORS
        if ("ours", policy) in groups
    }
    mine = max(OURS, key=lambda policy: areas.get(policy, 0.0))
    theirs = max(areas.keys() - set(OURS), key=lambda policy: areas[policy])
    yield (
        f"The best of ours, {mine}, reaches {areas[mine]:.2f}, the best of the published, {theirs}, reaches "
        f"{areas[theirs]:.2f}: {areas[mine] - areas[theirs]:+.2f} points."
    )
    _plot(groups, docs / f"methods-{backbone}.png", TITLES[backbone].replace("`", ""))
    yield f"![Accuracy against cost](methods-{backbone}.png)"


def _cells(found: list[dict[str, Any]]) -> list[str]:
    """Means over the seeds; the area also with its standard deviation over the seeds."""
    cells = [_percent([line[f"at_{cost:g}"] for line in found]) for cost in COSTS]
    cells += [f"{np.mean([line[f'drop_{drop:g}'] for line in found]):.3f}" for drop in DROPS]
    area = 100 * np.array([line["area"] for line in found])
    spread = f" ± {area.std(ddof=1):.2f}" if len(area) > 1 else ""
    auroc = np.nanmean([line["auroc"] for line in found])
    return [*cells, f"{area.mean():.2f}{spread}", f"{auroc:.3f}"]


def _seconds(found: list[dict[str, Any]]) -> str:
    return f"{np.mean([line['train_seconds'] for line in found]):.0f} s"


def _percent(values: list[float]) -> str:
    mean = 100 * np.mean(values)
    return "-" if np.isnan(mean) else f"{mean:.2f}"


def _plot(groups: dict[tuple[str, str], list[dict[str, Any]]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in ("ours", *ee.PRESETS):
        policy = "search" if method == "ours" else ee.PRESETS[method].method
        _curve(left, groups.get((method, policy), []), method, method == "ours")
    for policy in ee.CALIBRATORS:
        _curve(right, groups.get(("ours", policy), []), policy, policy in OURS)
    for (method, policy), found in groups.items():
        if policy == "static":
            left.plot(found[0]["cost"], 100 * found[0]["accuracy"], "ks", markersize=5)
            left.annotate(method, (found[0]["cost"], 100 * found[0]["accuracy"]), fontsize=7, xytext=(4, -9),
                          textcoords="offset points")  # fmt: skip
    for axes, what in ((left, "methods as published"), (right, "policies on the same branches")):
        top = 100 * max(max(line["curve"]) for found in groups.values() for line in found if "curve" in line)
        axes.set_ylim(top - 16, top + 0.5)
        axes.set_xlim(LOW, 1)
        axes.set_xlabel("mean MACs per sample / MACs of the original")
        axes.set_ylabel("accuracy (%)")
        axes.set_title(what, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _curve(axes: Any, found: list[dict[str, Any]], name: str, bold: bool) -> None:
    if not found:
        return
    curve = 100 * np.mean([line["curve"] for line in found], 0)
    shown = np.where(max(line["cheapest"] for line in found) <= GRID, curve, np.nan)
    axes.plot(GRID, shown, label=name, linewidth=2.4 if bold else 1.1, zorder=3 if bold else 2)


_HEAD = """# All methods under the same conditions

Generated by `python -m benchmarks.methods page` from `benchmarks/results/methods-*.jsonl`, which `train` and `compare`
fill (`EE_SURGERY_DATA` names the data folder).

The original is frozen in every row, also for methods whose paper trains it too, so that all start from the same
network and leave it unchanged. Each preset keeps its paper's branches, exits, loss and policy. The training is **far
shorter than published**: the same few images and the same optimizer for all (AdamW, peak rate 3e-3, cosine), since at
the papers' own rates some would have learned nothing yet. Costs are MACs as a fraction of the original's, including
every branch visited, which makes some methods look worse than in their papers. Thresholds come from one half of the
images that neither the original nor the branches have seen, results from the other half.

Columns: accuracy (%) at a fraction of the MACs (`-`: out of reach); the fraction of the MACs above which at most 0.5,
1 and 2 points are lost; area: mean accuracy over 0.3 to 1 of the MACs, counted as chance level where out of reach, with
the standard deviation over the seeds; AUROC of the exits' scores for correctness, mean over the exits; time to train or
to calibrate; own protocol: MACs and points lost after the paper's own, longer training ([seeds](seeds.md)). What the
methods do, and where we differ: [papers.md](papers.md).

Conclusions: with thousands of calibration images, thresholds searched per exit win; with 250, one threshold for all
exits does as well. The fallback for samples that never exit early matters, too. The most confident answer works as an
ensemble where branches and original err differently, as on MobileNetV2, and costs accuracy on CIFAR-10; `search` and
`stopping` try both by cross-validation. Of whole methods, the heads of Shallow-Deep Networks come close to ours on
CIFAR-10 and are ahead on MobileNetV2: mixed pooling of 4x4 cells, trained on labels alone, learns more there in so few
steps. Policies that rely on confidence units trained for so short a time (`learned`), or that need several branches to
agree (`patience`), are far behind. Heavy branches (`conv2` ten times, a convolution after every block) cost more than
they save on networks as small as these. And the smaller static networks beat every method at their cost: branches on
frozen features need longer training than this to come close ([recipes](results.md))."""
