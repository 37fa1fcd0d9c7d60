"""Run by `accelerate launch`, and called by tests/data/test_distributed.py: the same work on one process or several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ee_surgery as ee
from ee_surgery.training import loop
from ee_surgery.training.trackers import JsonLines
from recipes import train
from tests.search.test_exit_search import CONFIG as SEARCHED
from tests.search.test_exit_search import learnt

CONV, VECTOR = ee.BranchSpec("conv"), ee.BranchSpec("mlp", options={"norm": True})  # both with BatchNorm
SURE, CHAINED = ee.BranchSpec("mlp", confidence=True), ee.BranchSpec("ztw")
PLAIN = {"validation": 0, "progress": False}


@cache
def graph(seed: int = 0) -> ee.ModelGraph:
    """A small network with BatchNorm, captured once."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    return ee.inspect(net, torch.randn(3, 3, 8, 8))


def model(*branches: ee.BranchSpec, seed: int = 0) -> ee.EarlyExitModel:
    """The network with two branches."""
    return ee.attach(graph(seed), ee.place(graph(seed), ["2", "4"]), branches)


def blobs(n: int) -> TensorDataset:
    """Four classes, told apart by the mean colour."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 4
    colours = torch.randn(4, 3, generator=generator) * 2
    return TensorDataset(colours[labels][:, :, None, None] + torch.randn(n, 3, 8, 8, generator=generator), labels)


class Noisy(Dataset[Any]):
    """Samples that are other ones each time."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 8, 8) + index % 4, index % 4


def trained(branched: ee.EarlyExitModel, data: Any, accelerator: Accelerator | None, **settings: Any) -> dict[str, Any]:
    """Train, and tell what came of it."""
    joint = settings.pop("joint", False)
    report = ee.train(branched, data, ee.TrainConfig(**{**PLAIN, **settings}), accelerator=accelerator, joint=joint)
    module = report.model if joint else report.model.branches
    assert branched.receipt().unchanged
    return {
        "weights": module.state_dict(),
        "losses": [epoch.loss for epoch in report.epochs],
        "accuracies": report.accuracies,
        "skipped": [epoch.skipped for epoch in report.epochs],
        "provenance": report.model.provenance["training"],
    }


def trainings(accelerator: Accelerator) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that training can be asked for, on batches that do not divide by two."""

    def run(*args: Any, **settings: Any) -> dict[str, Any]:
        return trained(*args, accelerator, **settings)

    yield "sgd", run(model(CONV, VECTOR), blobs(45), epochs=2, batch_size=7, optimizer="sgd", lr=0.02)
    # 22 to train on: the last batch is a single sample, none of it for the second process
    yield "adamw", run(model(CONV, CONV), blobs(29), epochs=2, batch_size=7, validation=0.25, progress=True, lr=3e-3)
    for objective in ("tagged", "normalized"):  # which mix the samples of a batch, as the survivors do
        yield objective, run(model(SURE, SURE), blobs(30), epochs=1, batch_size=9, objective=objective, survivor=0.5)
    yield "accumulate", run(model(SURE, SURE), blobs(30), epochs=2, batch_size=3, accumulate=3)
    yield "joint", run(model(CONV, VECTOR), blobs(30), epochs=2, batch_size=7, joint=True, optimizer="sgd", lr=0.02)
    cut = ee.attach(graph(), ee.place(graph(), ["0"]), ee.BranchSpec("shortcut", options={"budget": 1.0}))
    yield "shortcut", run(cut, blobs(30), epochs=2, batch_size=7, optimizer="sgd", lr=0.02)
    yield "ensembles", run(model(CHAINED, CHAINED), blobs(30), epochs=1, batch_size=7, ensemble_epochs=5)
    x, y = blobs(30).tensors
    batches = [{"pixel_values": a, "labels": b} for a, b in zip(x.split(7), y.split(7), strict=True)]
    yield "iterable", run(model(CONV, SURE), batches, epochs=2)
    x[20] = torch.nan  # in the hands of one process
    yield "a bad sample", run(model(SURE, SURE), TensorDataset(x, y), epochs=1, batch_size=8, lr=1e-2)
    loader = DataLoader(blobs(30), 8, shuffle=True, drop_last=True)
    yield "a loader", run(model(SURE, SURE), loader, epochs=2, teach="original")


def resumed(folder: Path, accelerator: Accelerator, data: Any = None) -> dict[str, Any]:
    """Train, or go on where the checkpoint in the folder stands."""
    settings = {"epochs": 2, "batch_size": 6, "checkpoint_dir": str(folder), "checkpoint_steps": 2, "lr": 1e-2}
    return trained(model(CONV, VECTOR), data or blobs(32), accelerator, optimizer="sgd", **settings)


def interrupted(folder: Path, accelerator: Accelerator, data: Any = None, steps: int = 9) -> None:
    """Train as `resumed` does, and stop before this step: in the second epoch, behind a checkpoint and a step."""
    left = iter(range(steps))
    one_step = loop._Run._one_step

    def step(self: Any, shares: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        one_step(self, shares)

    with patch.object(loop._Run, "_one_step", step), suppress(KeyboardInterrupt):
        resumed(folder, accelerator, data)
        raise AssertionError("it ran through")


def recorded(accelerator: Accelerator) -> dict[str, Any]:
    """13 samples in batches of 4: records, a frontier, an evaluation, from each form of data."""
    branched = model(SURE, SURE)
    data = blobs(13)
    records = ee.record(branched, data, batch_size=4, accelerator=accelerator)
    handed_out = ee.record(branched, DataLoader(data, 4).__iter__(), accelerator=accelerator)
    frontier = ee.calibrate(branched, data, batch_size=4, accelerator=accelerator)
    branched.operate(thresholds=[0.4, 0.3])
    evaluation = ee.evaluate(branched, data, batch_size=4, accelerator=accelerator)
    alone = ee.record(branched, data, batch_size=4)
    assert len(alone) == 13
    fields = ("logits", "labels", "confidence")
    return {
        "records": {name: getattr(records, name) for name in fields},
        "handed out": {name: getattr(handed_out, name) for name in fields},
        "alone": {name: getattr(alone, name) for name in fields},
        "frontier": [(point.thresholds, point.accuracy, point.macs_fraction) for point in frontier],
        "evaluation": asdict(evaluation),
    }


def searched(accelerator: Accelerator) -> dict[str, Any]:
    """Exits by search, trained, left out and calibrated."""
    network, data = learnt()
    found = ee.augment(
        network, "auto", branch=["mlp", "pool"], sample=torch.randn(2, 3, 8, 8), train=data, max_accuracy_drop=0.02,
        calibrate=DataLoader(blobs(301), 32), config=SEARCHED, accelerator=accelerator,
    )  # fmt: skip
    assert found.frontier is not None
    return {
        "exits": found.exits,
        "placement": found.provenance["placement"],
        "weights": found.branches.state_dict(),
        "frontier": [(point.thresholds, point.accuracy, point.macs_fraction) for point in found.frontier],
    }


def everything(folder: Path) -> dict[str, Any]:
    """All of it, in this process together with the others."""
    accelerator = Accelerator(log_with=[JsonLines(folder / "log.jsonl")])
    results: dict[str, Any] = dict(trainings(accelerator))
    results["uninterrupted"] = resumed(folder / "whole", accelerator)
    results["recorded"] = recorded(accelerator)
    results["searched"] = searched(accelerator)
    return results


def main(folder: Path, other: Path) -> None:
    """The same on several processes, each with results of its own; and what only several can show.

    Args:
        other: where one process stopped in the middle.
    """
    torch.set_num_threads(1)
    accelerator = Accelerator()
    results = everything(folder)
    interrupted(folder / "stopped", accelerator)
    results["resumed"] = resumed(other, accelerator)
    whole = resumed(folder / "noisy", accelerator, Noisy())
    interrupted(folder / "noisy stopped", accelerator, Noisy(), steps=7)
    results["noisy"] = whole, resumed(folder / "noisy stopped", accelerator, Noisy())
    try:
        trained(model(SURE, SURE, seed=accelerator.process_index), blobs(30), accelerator)
    except ee.TrainingError as error:
        results["another original"] = str(error)
    results["processes"] = accelerator.num_processes
    results["saved"] = str(model(SURE, SURE).save_pretrained(folder / f"saved{accelerator.process_index}"))
    results["bf16"] = trained(model(CONV, CONV), blobs(30), None, batch_size=7, epochs=1, mixed_precision="bf16")
    torch.save(results, folder / f"process{accelerator.process_index}.pt")
    AcceleratorState._reset_state()  # another precision is another accelerator
    train.main(["--smoke", "--out", str(folder / "recipe")])  # last: at its end it parts from the other processes


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
