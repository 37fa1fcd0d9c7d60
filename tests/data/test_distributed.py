"""Training, recording and evaluating on two processes gives what one process gives; one launch serves many claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import ee_surgery as ee
from ee_surgery.data.distributed import Processes, ShardedBatches
from recipes import train
from tests import ROOT
from tests import distributed_runs as runs


def launch(*program: str) -> str:
    """Run a program as two CPU processes; what they print."""
    # Not `accelerate launch --cpu`: that starts one process, whatever --num_processes says, unless there is MPI.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--main_process_port", "0", "--mixed_precision", "no", *program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The work on this process alone."""
    folder = tmp_path_factory.mktemp("one")
    results = runs.everything(folder)
    runs.interrupted(folder / "stopped", Accelerator())
    return {**results, "folder": folder}


@pytest.fixture(scope="module")
def two(one: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same on two processes: what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    printed = launch("tests/distributed_runs.py", str(folder), str(one["folder"] / "stopped"))
    found = [torch.load(folder / f"process{i}.pt", weights_only=True) for i in range(2)]
    return [{**results, "folder": folder, "printed": printed} for results in found]


def differ(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


TRAININGS = ["sgd", "adamw", "tagged", "normalized", "accumulate", "joint", "shortcut", "ensembles", "iterable",
             "a bad sample", "a loader", "uninterrupted"]  # fmt: skip


def test_there_are_two_processes(two: list[dict[str, Any]]) -> None:
    assert [results["processes"] for results in two] == [2, 2]


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_end_with_the_weights_of_one(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for results in two:
        assert differ(one[name]["weights"], results[name]["weights"]) < 1e-5
        assert results[name]["losses"] == pytest.approx(one[name]["losses"], abs=1e-5)
        for same in ("accuracies", "skipped"):
            assert results[name][same] == one[name][same]
        assert results[name]["provenance"]["samples"] == one[name]["provenance"]["samples"]
        assert results[name]["provenance"]["processes"] == 2
    assert differ(two[0][name]["weights"], two[1][name]["weights"]) == 0


def test_the_trainings_were_hard_enough(one: dict[str, Any]) -> None:
    assert one["a bad sample"]["skipped"] == [1]
    start = runs.model(runs.CONV, runs.VECTOR).branches.state_dict()
    assert differ(start, one["sgd"]["weights"]) > 1e-2
    assert one["accumulate"]["provenance"]["samples"] == 60


def test_low_precision_is_close(two: list[dict[str, Any]]) -> None:
    config = ee.TrainConfig(**{**runs.PLAIN, "epochs": 1, "batch_size": 7, "mixed_precision": "bf16"})
    alone = runs.model(runs.CONV, runs.CONV)
    ee.train(alone, runs.blobs(30), config)
    AcceleratorState._reset_state()  # or all that come after are in bf16
    assert two[0]["bf16"]["provenance"]["mixed_precision"] == "bf16"
    assert differ(alone.branches.state_dict(), two[0]["bf16"]["weights"]) < 1e-2


def test_records_are_whole_and_in_order_in_every_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    wanted = one["recorded"]["records"]
    assert wanted["logits"].shape == (3, 13, 4)
    assert torch.equal(wanted["labels"], runs.blobs(13).tensors[1])
    for results in two:
        for form in ("records", "handed out", "alone"):
            found = results["recorded"][form]
            assert torch.equal(found["labels"], wanted["labels"])
            assert found["logits"].shape == wanted["logits"].shape
            assert differ(found, wanted) < 1e-6
    assert differ(two[0]["recorded"]["records"], two[1]["recorded"]["records"]) == 0


def test_thirteen_samples_are_thirteen(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for results in two:
        assert results["recorded"]["evaluation"]["samples"] == 13
        assert results["recorded"]["evaluation"] == one["recorded"]["evaluation"]
        assert len(results["recorded"]["frontier"]) == len(one["recorded"]["frontier"])
        for found, wanted in zip(results["recorded"]["frontier"], one["recorded"]["frontier"], strict=True):
            assert found[0] == pytest.approx(wanted[0], abs=1e-6)
            assert found[1:] == wanted[1:]


def test_a_search_finds_the_same_exits_in_every_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    wanted = one["searched"]
    assert len(wanted["placement"]["candidates"]) >= 4
    for results in two:
        found = results["searched"]
        assert found["exits"] == wanted["exits"]
        for a, b in zip(found["placement"]["candidates"], wanted["placement"]["candidates"], strict=True):
            assert {**a, "accuracy": None} == {**b, "accuracy": None}
            assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.05)  # one of 20 samples
        assert differ(found["weights"], wanted["weights"]) < 1e-4
        assert len(found["frontier"]) == len(wanted["frontier"])
    assert two[0]["searched"]["frontier"] == two[1]["searched"]["frontier"]
    assert differ(two[0]["searched"]["weights"], two[1]["searched"]["weights"]) == 0


def test_training_resumes_on_another_number_of_processes(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    wanted = one["uninterrupted"]
    from_two = runs.resumed(two[0]["folder"] / "stopped", Accelerator())
    for found in (two[0]["resumed"], two[1]["resumed"], from_two):
        assert differ(found["weights"], wanted["weights"]) < 1e-5
        assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        assert found["provenance"]["samples"] == 64


def test_the_same_number_of_processes_resumes_to_the_bit_though_samples_are_random(two: list[dict[str, Any]]) -> None:
    for results in two:
        whole, again = results["noisy"]
        assert differ(whole["weights"], again["weights"]) == 0
        assert whole["losses"] == again["losses"]


def test_another_original_in_another_process_is_refused(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert results["another original"].startswith("Process 1 has a different original from process 0")


def test_one_process_prints_and_writes(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    printed = two[0]["printed"]
    assert printed.count("epoch 2: loss") == 2  # of the training that shows its progress, and the recipe's
    assert printed.count("not finite; skipped") == 1
    texts = [(run["folder"] / "log.jsonl").read_text() for run in (one, two[0])]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line.get("epoch") for line in logs[0]] == [line.get("epoch") for line in logs[1][: len(logs[0])]]
    assert "settings" in logs[0][0]
    assert logs[0][3]["accuracy/4"] == logs[1][3]["accuracy/4"]  # the first epoch of the second training
    assert logs[0][3]["lr"] > logs[0][4]["lr"]
    saved = [Path(results["saved"]) for results in two]
    assert [(folder.name, folder.exists()) for folder in saved] == [("saved0", True), ("saved1", False)]
    others = {"recipe", "saved0"}
    files = {path.name for path in two[0]["folder"].rglob("*") if path.is_file() and not others & {*path.parts}}
    assert files == {"log.jsonl", "training.pt", "process0.pt", "process1.pt"}


def test_the_recipe_gives_one_adapter_on_two_processes(two: list[dict[str, Any]], tmp_path: Path) -> None:
    check_recipe(two[0]["folder"] / "recipe", two[0]["printed"], tmp_path)


@pytest.mark.slow
def test_the_recipe_can_be_launched_by_its_path(tmp_path: Path) -> None:
    printed = launch("recipes/train.py", "--smoke", "--out", str(tmp_path / "two"), "--threads", "1")
    check_recipe(tmp_path / "two", printed, tmp_path)


def check_recipe(out: Path, printed: str, folder: Path) -> None:
    """The recipe on two processes printed once, and saved what it saves on one."""
    assert printed.count("Original unchanged") == 1
    assert "2 process(es)" in printed
    train.main(["--smoke", "--out", str(folder / "one")])
    adapters = [out / "adapter", folder / "one" / "adapter"]
    assert differ(*(load_file(adapter / "ee_adapter.safetensors") for adapter in adapters)) < 1e-5
    frontiers = [json.loads((adapter / "frontier.json").read_text()) for adapter in adapters]
    assert len(frontiers[0]["points"]) == len(frontiers[1]["points"])
    provenance = json.loads((adapters[0] / "config.json").read_text())["provenance"]
    assert provenance["training"]["processes"] == 2
    assert provenance["evaluation"]["samples"] == 32
    assert len((out / "log.jsonl").read_text().splitlines()) == 3


def _several(kind: DistributedType = DistributedType.MULTI_CPU) -> Accelerator:
    return cast("Accelerator", SimpleNamespace(num_processes=2, process_index=0, distributed_type=kind))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_models_that_are_split_up_are_refused(kind: str) -> None:
    with pytest.raises(ee.ConfigError, match=f"{kind} shards the model"):
        Processes(_several(DistributedType(kind)))


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ee.ConfigError, match="ACCELERATE_USE_CPU=true"):
        ee.train(runs.model(runs.SURE, runs.SURE), runs.blobs(8))


def test_a_loader_that_is_split_already_is_refused() -> None:
    prepared = Accelerator().prepare(DataLoader(runs.blobs(8), 4))
    with pytest.raises(ee.DataError, match="plain DataLoader"):
        ShardedBatches(prepared, Processes(_several()))


def test_gradients_that_the_accelerator_would_add_up_otherwise_are_refused() -> None:
    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = 4
    try:
        with pytest.raises(ee.ConfigError, match="set both to the same"):
            ee.train(runs.model(runs.SURE, runs.SURE), runs.blobs(8), accelerator=accelerator)
    finally:
        accelerator.gradient_accumulation_steps = 1


def test_adding_up_gradients_is_one_large_batch() -> None:
    weights = []
    for batch_size, accumulate in ((12, 1), (4, 3)):  # 30: the last step has 6 samples
        branched = runs.model(runs.SURE, runs.SURE)
        config = ee.TrainConfig(**runs.PLAIN, epochs=2, batch_size=batch_size, accumulate=accumulate)
        ee.train(branched, runs.blobs(30), config)
        weights.append(branched.branches.state_dict())
    assert differ(*weights) < 1e-5
