"""Policies on records: thresholds from one half of the samples, results from the other."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ee_surgery as ee
from ee_surgery.policies.exit_costs import exit_costs

HALVES = 20
COSTS = (0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
DROPS = (0.005, 0.01, 0.02)
LOW = 0.3
"""Areas are mean accuracies over costs from here to 1."""
_Floats = NDArray[np.float64]


def compare(
    records: ee.ExitRecords,
    about: Mapping[str, Any],
    results: Path,
    static: Mapping[str, tuple[float, Tensor]],
    halves: int = HALVES,
) -> None:
    """Append one line per policy to `results`: metrics of these records, means over the halves.

    A preset gets its paper's policy; our own branches get all policies, the oracle and the static networks.
    """
    done = {line["key"] for line in read(results)}
    method, seed = about["method"], about["seed"]
    names = list(ee.CALIBRATORS) if method == "ours" else [ee.PRESETS[method].method]
    for name in names:
        key = f"{method}/{name}/{seed}"
        if key in done or (name == "learned" and records.confidence is None):
            continue
        append(results, {"key": key, "policy": name, **about, **measure(records, name, halves)})
    if f"{method}/oracle/{seed}" not in done:
        append(results, {"key": f"{method}/oracle/{seed}", "policy": "oracle", **about, **oracle(records)})
    for name, (cost, right) in static.items():
        if f"static/{name}" not in done:
            both = [split(len(records), i) for i in range(halves)]
            below = [records.take(b).base_accuracy - right[b].double().mean().item() for _, b in both]
            line = {"cost": cost, "accuracy": right.double().mean().item(), "drop": statistics.mean(below)}
            append(results, {"key": f"static/{name}", "policy": "static", "method": name, "seed": None, **line})


def split(n: int, number: int) -> tuple[Tensor, Tensor]:
    """The halves of random split `number`: to choose on, and to report."""
    first, second = torch.randperm(n, generator=torch.Generator().manual_seed(number)).chunk(2)
    return first, second


def measure(records: ee.ExitRecords, policy: str, halves: int) -> dict[str, Any]:
    """Results of a policy on the reported halves."""
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    score: str | ee.FittedScore = "max_prob"
    for number in range(halves):
        chosen, reported = split(len(records), number)
        part = records.take(chosen)
        started = time.perf_counter()
        frontier = ee.Frontier.trace(part, policy)
        seconds.append(time.perf_counter() - started)
        rows.append(realised(frontier, records.take(reported)))
        score = frontier[0].score
    auroc = [
        roc_auc_score(right, row.clamp(-1e6, 1e6)) if 0 < right.sum() < len(right) else float("nan")
        for right, row in zip(records.correct[:-1], records.scores(score), strict=True)
    ]
    return {
        **{name: _mean([row[name] for row in rows]) for name in rows[0] if name != "curve"},
        "curve": np.nanmean([row["curve"] for row in rows], 0).round(5).tolist(),
        "auroc": [round(float(a), 4) for a in auroc],
        "calibration_seconds": statistics.mean(seconds),
        "halves": halves,
        "samples": len(records) // 2,
    }


GRID = np.linspace(LOW, 1, 71)


def realised(frontier: ee.Frontier, reported: ee.ExitRecords) -> dict[str, Any]:
    """The curve of the operating points on other samples, interpolated at fixed costs and drops.

    Straight lines between neighbours; a cost below the cheapest point is out of reach, and counts as guessing.
    """
    points = [frontier[0]]
    for point in frontier:
        if point.macs_fraction > points[-1].macs_fraction + 0.004 or point is frontier[-1]:
            points.append(point)
    replays = [reported.replay(point.policy) for point in points]
    costs = np.array([replay.macs.mean().item() / reported.base_macs for replay in replays])
    accuracies = np.array([replay.correct.double().mean().item() for replay in replays])
    order = np.argsort(costs, kind="stable")
    costs, accuracies = costs[order], accuracies[order]
    guess = 1 / reported.recorded_logits().shape[-1]
    curve = np.interp(GRID, costs, accuracies, left=guess)
    found: dict[str, Any] = {"area": float(curve.mean()), "curve": curve, "base": reported.base_accuracy}
    found["cheapest"] = float(costs[0])
    for cost in COSTS:
        found[f"at_{cost:g}"] = float(np.interp(cost, costs, accuracies, left=np.nan))
    for drop in DROPS:
        found[f"drop_{drop:g}"] = _cheapest(costs, accuracies, reported.base_accuracy - drop)
    return found


def _cheapest(costs: _Floats, accuracies: _Floats, floor: float) -> float:
    """The lowest cost from which the curve stays at or above an accuracy; 1 at most."""
    fine = np.linspace(costs[0], max(1.0, costs[-1]), 2000)
    low = np.interp(fine, costs, accuracies) < floor - 1e-12
    last = int(np.flatnonzero(low)[-1]) + 1 if low.any() else 0
    return float(min(1.0, fine[min(last, len(fine) - 1)]))


def oracle(records: ee.ExitRecords) -> dict[str, Any]:
    """Leave at the first correct exit, or at the cheapest one if none is correct: no policy can do better."""
    accuracy, cost = records.best_case()
    costs = exit_costs(records.trunk_macs, records.branch_macs, [True] * len(records.exits))
    return {"cost": cost, "accuracy": accuracy, "base": records.base_accuracy,
            "exit_accuracies": records.accuracies, "exit_costs": [c / records.base_macs for c in costs]}  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a results file; empty if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _mean(values: list[float]) -> float:
    return float(np.mean(values))  # NaN, where a cost was out of reach on some half
