"""Training: only branches learn, kills do no harm, bad losses and bad data are said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ee_surgery as ee
from ee_surgery.training import checkpoint, features, precision
from ee_surgery.training import loop as training_loop
from ee_surgery.training.optimizer import learning_rate
from ee_surgery.training.precision import resolve_precision
from ee_surgery.training.speed import Speed, StopWatch
from tests import ROOT

PROGRAM = ROOT / "tests/killed_training.py"


def small(confidence: bool = False, branch: str = "mlp") -> ee.EarlyExitModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    spec = ee.BranchSpec(branch, confidence=confidence)
    return ee.augment(model, ["2", "4"], branch=spec, sample=torch.randn(3, 3, 8, 8))


def blobs(n: int = 256) -> TensorDataset:
    """Four classes, told apart by the mean colour."""
    labels = torch.arange(n) % 4
    colours = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 2
    return TensorDataset(colours[labels][:, :, None, None] + torch.randn(n, 3, 8, 8), labels)


QUICK = ee.TrainConfig(epochs=3, batch_size=32, lr=1e-2, progress=False)


@pytest.mark.parametrize("objective", ["sum_ce", "weighted_ce", "kd", "recursive", "cumulative"])
def test_every_objective_trains_the_branches_and_nothing_else(objective: str) -> None:
    branched = small(confidence=True)
    data = blobs()
    first = ee.train(branched, data, ee.TrainConfig(epochs=1, batch_size=32, objective=objective, progress=False))
    later = ee.train(branched, data, ee.TrainConfig(epochs=3, batch_size=32, objective=objective, progress=False))
    assert later.epochs[-1].loss < first.epochs[0].loss
    assert branched.receipt().unchanged
    assert all(parameter.grad is None for parameter in branched.backbone.parameters())


def test_branches_learn_and_report_validation_accuracy() -> None:
    branched = small()
    report = ee.train(branched, blobs(), ee.TrainConfig(epochs=8, batch_size=16, lr=2e-2, distill=0, progress=False))
    assert report.accuracies["4"] > 0.8
    assert set(report.accuracies) == {"2", "4", "original"}
    assert not branched.training


@pytest.mark.parametrize("joint", [False, True])
def test_an_average_of_the_weights_is_what_remains(joint: bool) -> None:
    steps: list[list[Tensor]] = []

    def batches():  # each step's weights are there when the next batch is asked for
        for batch in blobs(64).tensors[0].split(16):
            yield batch, torch.arange(16) % 4
            steps.append([p.detach().clone() for p in learner.parameters()])

    class Data:
        def __len__(self) -> int:
            return 4

        __iter__ = staticmethod(batches)

    for ema in (0.0, 0.7):
        steps.clear()
        torch.manual_seed(0)
        model = small()
        learner = model.branches
        if joint and not ema:
            continue
        report = ee.train(model, Data(), ee.TrainConfig(epochs=2, ema=ema, validation=0, progress=False), joint=joint)
        if joint:
            assert all(torch.isfinite(p).all() for p in report.model.parameters())
            assert model.receipt().unchanged
            continue
        expected = steps[0]
        for after in steps[1:]:
            expected = [torch.lerp(a, b, 1 - ema) for a, b in zip(expected, after, strict=True)]
        assert len(steps) == 8
        for found, wanted in zip(learner.parameters(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_teaching_from_the_original_needs_no_labels() -> None:
    branched = small()
    inputs = [batch for batch, _ in DataLoader(blobs(), 32)]
    config = ee.TrainConfig(epochs=6, teach="original", lr=1e-2, progress=False)
    ee.train(branched, inputs, config)
    agreement = ee.record(branched, inputs).accuracies
    assert min(agreement) > 0.9
    with pytest.raises(ee.DataError, match='teach="original"'):
        ee.train(branched, inputs, QUICK)


def test_every_form_of_data_gives_the_same_training() -> None:
    data = blobs(64)
    batches = [(x, y) for x, y in DataLoader(data, 16)]
    forms = [batches, [{"pixel_values": x, "labels": y} for x, y in batches], DataLoader(data, 16)]
    config = ee.TrainConfig(epochs=2, validation=0, progress=False)
    results = []
    for form in forms:
        branched = small()
        ee.train(branched, form, config)
        results.append(torch.cat([p.flatten() for p in branched.branches.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([("a", "b")], "must be inputs"),
        ([(torch.randn(4, 3, 8, 8), torch.zeros(3))], "4 inputs but 3 labels"),
        ([(torch.randn(4, 3, 8, 8), torch.full((4,), 7))], "class numbers below 4"),
        (3, "must be a Dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_named(data: object, message: str) -> None:
    with pytest.raises(ee.DataError, match=message):
        ee.train(small(), data, ee.TrainConfig(epochs=1, progress=False))  # pyright: ignore[reportArgumentType]


def test_an_iterator_cannot_be_trained_on_twice() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

    with pytest.raises(ee.DataError, match="used up after one pass"):
        ee.train(small(), stream(), ee.TrainConfig(epochs=2, schedule="constant", progress=False))


@pytest.mark.parametrize("branch", ["mlp", "bnpool"])
def test_a_step_that_is_not_finite_is_skipped_and_said(branch: str, capsys: pytest.CaptureFixture[str]) -> None:
    branched = small(branch=branch)
    bad = torch.randn(4, 3, 8, 8)
    bad[0] = torch.nan
    good = [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 3
    report = ee.train(branched, [*good, (bad, torch.arange(4)), *good], ee.TrainConfig(epochs=1, progress=False))
    assert report.epochs[0].skipped == 1
    assert "not finite; skipped" in capsys.readouterr().out
    state = branched.branches.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    steps = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert set(steps) == ({6} if branch == "bnpool" else set())


def test_a_loss_that_stays_not_finite_stops_training() -> None:
    bad = [(torch.full((4, 3, 8, 8), torch.nan), torch.arange(4))] * 30
    with pytest.raises(ee.TrainingError, match="not finite for 10 steps in a row"):
        ee.train(small(), bad, ee.TrainConfig(epochs=1, progress=False))


def test_mixed_precision_and_sgd_train() -> None:
    branched = small()
    for numbers in ("bf16", "no"):
        config = ee.TrainConfig(
            epochs=2,
            batch_size=32,
            optimizer="sgd",
            lr=0.05,
            schedule="step",
            mixed_precision=numbers,
            progress=False,
        )
        report = ee.train(branched, blobs(), config)
    assert report.epochs[-1].loss < report.epochs[0].loss
    assert next(branched.branches.parameters()).dtype == torch.float32


_X86 = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("has", "ratio", "expected"),
    [
        (_X86, 0.5, "no"),
        ({**_X86, "avx512_bf16": True}, 0.5, "bf16"),
        ({**_X86, "avx512_bf16": True}, 1.8, "no"),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, 0.5, "no"),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, 0.5, "bf16"),
        ({}, 0.5, "no"),
    ],
)
def test_auto_precision_is_bfloat16_where_the_processor_is_faster_with_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has: dict[str, Any],
    ratio: float,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(precision, "_speed_ratio", lambda: ratio)
    config = replace(QUICK, epochs=1, mixed_precision="auto")
    report = ee.train(small(), blobs(32), config)
    assert report.model.provenance["training"]["mixed_precision"] == expected
    assert "mixed_precision" not in capsys.readouterr().out
    ee.train(small(), blobs(32), replace(config, progress=True))
    number = {"no": "float32", "bf16": "bfloat16"}[expected]
    assert capsys.readouterr().out.count(f"mixed_precision='auto' on this cpu: {number}\n") == 1


def test_the_speed_of_bfloat16_is_measured_without_a_trace() -> None:
    before = torch.random.get_rng_state()
    assert 0.01 < precision._speed_ratio() < 100
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_does_not_take_emulated_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", torch.device("cuda")) == ("bf16" if native else "no")
    assert resolve_precision("bf16", torch.device("cuda")) == "bf16"  # asked for by name
    assert resolve_precision("auto", torch.device("meta")) == "no"


def test_a_checkpoint_of_auto_precision_goes_on_in_the_same_precision_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(QUICK, epochs=1, checkpoint_dir=str(tmp_path))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(precision, "_speed_ratio", lambda: 0.5)
    ee.train(small(), blobs(32), replace(config, mixed_precision="auto"))
    ee.train(small(), blobs(32), replace(config, mixed_precision="bf16"))  # the same by another name
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ee.TrainingError, match="mixed_precision"):
        ee.train(small(), blobs(32), replace(config, mixed_precision="auto"))


def test_auto_gives_bfloat16_up_where_its_gradients_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(training_loop, "resolve_precision", lambda asked, device: "bf16" if asked == "auto" else asked)

    def broken() -> ee.EarlyExitModel:
        branched = small()
        branched.branches[0].register_forward_hook(
            lambda module, inputs, answer: (
                answer._replace(logits=answer.logits * torch.nan) if torch.is_autocast_enabled("cpu") else answer
            )
        )
        return branched

    config = replace(QUICK, mixed_precision="auto", validation=0.0, progress=True)
    report = ee.train(broken(), blobs(), replace(config, checkpoint_dir=str(tmp_path)))
    assert [epoch.skipped for epoch in report.epochs] == [3] + [0] * (config.epochs - 1)
    assert report.model.provenance["training"]["mixed_precision"] == "no"
    assert "3 steps were not finite in bfloat16: float32 from here on" in capsys.readouterr().out
    again = ee.train(broken(), blobs(), replace(config, checkpoint_dir=str(tmp_path)))  # resumed where it ended
    assert again.model.provenance["training"]["mixed_precision"] == "no"
    with pytest.raises(ee.TrainingError, match="not finite for 10 steps in a row"):
        ee.train(broken(), blobs(), replace(config, mixed_precision="bf16", epochs=9))


def test_precisions_that_are_not_known_are_refused() -> None:
    for wrong in ("bfloat16", "Auto", "fp8", ""):
        with pytest.raises(ee.ConfigError, match="mixed_precision must be one of"):
            ee.TrainConfig(mixed_precision=wrong)  # pyright: ignore[reportArgumentType]


def test_the_users_random_state_is_given_back() -> None:
    branched, data = small(), blobs(32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ee.train(branched, data, QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_decide_the_result() -> None:
    def weights(seed: int) -> Tensor:
        branched = small()
        ee.train(branched, blobs(64), ee.TrainConfig(epochs=1, batch_size=16, seed=seed, progress=False))
        return torch.cat([p.flatten() for p in branched.branches.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def _run(folder: Path, delay: float) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), str(delay)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])},
    )  # fmt: skip


def test_training_drops_thresholds_that_were_found_with_other_weights() -> None:
    model = small()
    data = DataLoader(blobs(16), 8)
    ee.calibrate(model, data)
    model.operate(thresholds=0.1)
    ee.evaluate(model, data)
    ee.train(model, data, ee.TrainConfig(epochs=1))
    assert model.frontier is None
    assert model.operating_point is None
    assert "evaluation" not in model.provenance


@pytest.mark.slow
@pytest.mark.parametrize("target", [(0, 4), (1, 4)], ids=["early", "late"])
def test_a_killed_training_ends_in_the_same_weights(target: tuple[int, int], tmp_path: Path) -> None:
    whole, folder = _run(tmp_path / "whole", 0), tmp_path / "killed"
    out, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, out
    process = _run(folder, 0.05)
    _kill_at(process, folder, target)
    assert not (folder / "branches.pt").exists()
    process = _run(folder, 0)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    (expected, losses), (seen, again) = (
        torch.load(f / "branches.pt", weights_only=True) for f in (tmp_path / "whole", folder)
    )
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    assert losses == again


def _kill_at(process: subprocess.Popen[str], folder: Path, target: tuple[int, int]) -> None:
    """SIGKILL once the checkpoint stands in the middle of an epoch at or behind `target`."""
    path = folder / "training" / checkpoint.FILE
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            counters = torch.load(path, weights_only=True)["counters"]
            if (counters["epoch"], counters["step"]) >= target and counters["step"]:
                process.send_signal(signal.SIGKILL)
                process.communicate()  # and close its pipe
                return
        time.sleep(0.01)
    raise AssertionError(f"training never stood at {target}: {process.communicate()[0]}")


def test_checkpoints_of_other_settings_or_none_are_refused(tmp_path: Path) -> None:
    config = ee.TrainConfig(epochs=1, batch_size=32, checkpoint_dir=str(tmp_path), progress=False)
    branched = small()
    ee.train(branched, blobs(64), config)
    weights = [parameter.clone() for parameter in branched.branches.parameters()]
    again = small()
    report = ee.train(again, blobs(64), config)  # finished already: nothing left to do but to load it
    assert all(torch.equal(a, b) for a, b in zip(weights, again.branches.parameters(), strict=True))
    assert len(report.epochs) == 1
    other = ee.TrainConfig(epochs=1, batch_size=32, lr=0.5, checkpoint_dir=str(tmp_path), progress=False)
    with pytest.raises(ee.TrainingError, match=r"lr: 0\.001 there, 0\.5 now"):
        ee.train(small(), blobs(64), other)
    (tmp_path / checkpoint.FILE).write_bytes(b"torn")
    with pytest.raises(ee.TrainingError, match="not a checkpoint of this version"):
        ee.train(small(), blobs(64), config)


def test_a_damaged_checkpoint_is_refused_by_name_and_never_resumed(tmp_path: Path) -> None:
    state = {"settings": {"lr": 1}, "learner": {"w": torch.arange(500.0)}, "random": [1, "a", None]}
    checkpoint.save(tmp_path, state)
    path = tmp_path / checkpoint.FILE
    whole, random = path.read_bytes(), Random(0)
    size, half = len(whole), len(whole) // 2
    damages = [whole[:half], whole + b"\0", whole + whole, whole[half:] + whole[:half], b"", b"\0" * size, whole[::-1]]
    damages += [whole[: random.randrange(size)] for _ in range(100)]
    damages += [whole[: (k := random.randrange(size))] + whole[k + random.randrange(1, 99) :] for _ in range(100)]
    damages += [whole + random.randbytes(random.randrange(1, 99)) for _ in range(50)]
    for _ in range(1000):
        place = random.randrange(size)
        damages.append(whole[:place] + bytes([whole[place] ^ 1 << random.randrange(8)]) + whole[place + 1 :])
    for damage in damages:
        path.write_bytes(damage)
        with pytest.raises(ee.TrainingError, match=rf"{path} is not a checkpoint .*or is damaged.*Remove"):
            checkpoint.load(tmp_path, {"lr": 1})
    torch.save(state, path)  # as older versions wrote them
    with pytest.raises(ee.TrainingError, match=r"does not end in a digest.*Remove it .*another checkpoint_dir"):
        checkpoint.load(tmp_path, {"lr": 1})
    path.write_bytes(whole)
    again = checkpoint.load(tmp_path, {"lr": 1})
    assert again is not None
    assert torch.equal(again["learner"]["w"], state["learner"]["w"])
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.FILE]


def test_calibrate_operate_evaluate() -> None:
    branched = small()
    data = blobs(512)
    ee.train(branched, data, ee.TrainConfig(epochs=6, batch_size=32, lr=2e-2, teach="original", progress=False))
    with pytest.raises(ee.OperatingPointError, match=r"run ee\.calibrate"):
        branched.operate(budget=0.5)
    frontier = ee.calibrate(branched, data)
    point = branched.operate(max_accuracy_drop=0.02)
    assert point is not None
    assert point in list(frontier)
    result = ee.evaluate(branched, data)
    assert result.accuracy == pytest.approx(point.accuracy, abs=0.005)
    assert result.macs_fraction == pytest.approx(point.macs_fraction, abs=0.005)
    assert result.exit_shares == pytest.approx(point.exit_shares, abs=0.005)
    assert sum(result.exit_shares) == pytest.approx(1)
    assert branched.operate(None) is None
    assert ee.evaluate(branched, data).macs_fraction == 1
    with pytest.raises(ee.OperatingPointError, match="exactly one"):
        branched.operate(budget=0.5, max_accuracy_drop=0.1)
    with pytest.raises(ee.OperatingPointError, match="3 thresholds for 2 branches"):
        branched.operate(thresholds=[0.1, 0.2, 0.3])
    with pytest.raises(ee.DataError, match="empty"):
        ee.evaluate(branched, [])


def test_the_one_liner_does_it_all() -> None:
    model = small().backbone
    branched = ee.augment(
        model, ["2", "4"], branch="mlp", sample=torch.randn(3, 3, 8, 8), train=blobs(), calibrate=blobs(), config=QUICK
    )
    assert branched.frontier is not None
    assert branched.receipt().unchanged


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Another view of the blobs each time."""

    def __init__(self) -> None:
        self.blobs = blobs(96)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.blobs[index]
        return image + 0.5 * torch.randn_like(image), label


class Dropping(ee.Branch):
    """Draws random numbers while it learns."""

    def __init__(self, point: ee.ExitPoint, num_classes: int, confidence: bool = False) -> None:
        super().__init__(point, num_classes, confidence, point.shape[0])

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Means of the map, some left out."""
        return nn.functional.dropout(features.mean((2, 3)), 0.3, self.training)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_features_kept_on_disk_teach_the_same(
    accumulate: int, format: torch.memory_format, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(ee.BRANCHES._items, "dropping", Dropping)
    data = Noisy()
    weights, runs = [], []
    for worth in (-1.0, float("inf")):
        monkeypatch.setattr(features, "_FASTER", worth)
        torch.manual_seed(0)
        branched = small(branch="dropping")
        branched.backbone.to(memory_format=format)  # pyright: ignore[reportArgumentType]
        run, calls = branched.engine.features, []
        monkeypatch.setattr(
            branched.engine, "features", lambda *args, run=run, calls=calls: (calls.append(1), run(*args))[1]
        )
        config = ee.TrainConfig(
            epochs=5, batch_size=16, views=2, cutmix=1.0, accumulate=accumulate, lr=1e-2, validation=0,
            checkpoint_dir=str(tmp_path / str(worth)), distill_from=0.5,
        )  # fmt: skip
        ee.train(branched, data, config)
        weights.append([p.detach() for p in branched.branches.parameters()])
        runs.append(len(calls))
        assert not list(tmp_path.rglob("features*"))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert runs[1] == 2 * 6 + 1  # two passes of six batches, one of them timed
    printed = capsys.readouterr().out
    assert "features are not cached" in printed
    assert "features of 2 passes are cached" in printed


def test_features_that_do_not_fit_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "_FASTER", float("inf"))
    config = ee.TrainConfig(epochs=3, batch_size=16, views=1, validation=0, cache_gb=1e-6)
    ee.train(small(), blobs(64), config)
    assert "with cache_gb=1e-06" in capsys.readouterr().out


def test_passes_repeat_after_so_many_views() -> None:
    seen: list[Tensor] = []

    class Watched(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            seen.append(image)
            return image, label

    config = ee.TrainConfig(epochs=5, batch_size=16, views=2, validation=0, progress=False, cache_gb=0)
    ee.train(small(), Watched(), config)
    passes = torch.stack(seen).view(5, 96, -1)
    assert torch.equal(passes[0], passes[2])
    assert torch.equal(passes[1], passes[3])
    assert not torch.equal(passes[0], passes[1])
    with pytest.raises(ee.ConfigError, match="views"):
        ee.TrainConfig(views=0)


# --- half precision, steps that are skipped, batches of one


def half(dtype: torch.dtype, branch: str = "mlp") -> ee.EarlyExitModel:
    model = small().backbone.to(dtype)
    options = {"budget": 0.9} if branch == "shortcut" else {}
    spec = ee.BranchSpec(branch, options=options)
    return ee.augment(model, ["2", "4"], branch=spec, sample=torch.randn(3, 3, 8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("branch", "optimizer"), [("mlp", "adam"), ("bnpool", "adamw"), ("ztw", "sgd"), ("shortcut", "adamw")]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_branches_of_a_base_in_half_precision_learn_in_float32(dtype: torch.dtype, branch: str, optimizer: str) -> None:
    config = replace(QUICK, epochs=2, optimizer=optimizer, distill=0, validation=0)
    whole, branched = half(torch.float32, branch), half(dtype, branch)
    branched.branches.load_state_dict(whole.branches.state_dict())
    data = blobs(128)
    expected = ee.train(whole, data, config)
    report = ee.train(branched, data, config)
    assert sum(epoch.skipped for epoch in report.epochs) == 0
    assert report.epochs[-1].loss == pytest.approx(expected.epochs[-1].loss, rel=0.02)
    assert {p.dtype for p in branched.branches.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in branched.branches.parameters())
    assert branched.receipt().unchanged
    accuracies, wanted = (ee.record(model, data).accuracies[:-1] for model in (branched, whole))
    assert accuracies == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_average_in_half_precision_moves_as_far_as_in_float32(dtype: torch.dtype) -> None:
    moved = []
    for kind in (torch.float32, dtype):
        branched = half(kind)
        before = [p.detach().float().clone() for p in branched.branches.parameters()]
        ee.train(branched, blobs(256), replace(QUICK, ema=0.99, lr=1e-3, validation=0, distill=0))
        after = [p.detach().float() for p in branched.branches.parameters()]
        moved.append(sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)) ** 0.5)
    assert moved[1] == pytest.approx(moved[0], rel=0.1)


@pytest.mark.parametrize("joint", [False, True])
def test_a_training_in_half_precision_goes_on_exactly_where_it_stopped(tmp_path: Path, joint: bool) -> None:
    batches = list(DataLoader(blobs(64), 16))

    class Failing:
        def __init__(self, good: int) -> None:
            self.good = good

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[list[Tensor]]:
            for batch in batches:
                self.good -= 1
                if self.good < 0:
                    raise RuntimeError("out of power")
                yield batch

    config = replace(QUICK, ema=0.9, validation=0, checkpoint_steps=1)
    whole = ee.train(half(torch.bfloat16), batches, config, joint=joint).model
    kept = replace(config, checkpoint_dir=str(tmp_path))
    stopped = half(torch.bfloat16)
    with pytest.raises(RuntimeError, match="out of power"):
        ee.train(stopped, Failing(6), kept, joint=joint)
    assert {p.dtype for p in stopped.branches.parameters()} == {torch.bfloat16}
    again = ee.train(half(torch.bfloat16), batches, kept, joint=joint).model
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_an_original_in_half_precision_learns_in_float32_too() -> None:
    branched = half(torch.bfloat16)
    trained = ee.train(branched, blobs(), replace(QUICK, epochs=6, optimizer="adam"), joint=True).model
    assert {p.dtype for p in trained.parameters()} == {torch.bfloat16}
    assert min(ee.record(trained, blobs()).accuracies) > 0.8
    assert branched.receipt().unchanged
    assert trained.receipt().unchanged


def test_a_training_that_is_mostly_skipped_fails() -> None:
    good = (torch.randn(4, 3, 8, 8), torch.arange(4))
    bad = (torch.full((4, 3, 8, 8), torch.nan), torch.arange(4))
    branched = small()
    with pytest.raises(ee.TrainingError, match="8 of 12 steps were skipped"):
        ee.train(branched, [bad, good, bad] * 4, ee.TrainConfig(epochs=1, progress=False))
    ee.train(branched, [bad, good, good] * 4, ee.TrainConfig(epochs=1, progress=False))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("objective", ["sum_ce", "kd", "tagged"])
def test_a_last_batch_of_one_sample_is_learned_from(objective: str, joint: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    spec = ee.BranchSpec("bnpool", confidence=True)
    branched = ee.augment(model, ["4", "7"], branch=spec, sample=torch.randn(2, 3, 8, 8))
    config = replace(QUICK, epochs=1, validation=0, objective=objective, max_steps=3)
    report = ee.train(branched, blobs(65), config, joint=joint)  # 32, 32 and 1
    assert report.epochs[0].skipped == 0
    assert all(torch.isfinite(tensor).all() for tensor in report.model.branches.state_dict().values())
    before = report.model.branches.state_dict()
    one = ee.train(report.model, [blobs(1).tensors], config, joint=joint).model.branches.state_dict()
    for name in before:
        if "running" in name:  # one value has no variance: they stay
            assert torch.equal(before[name], one[name]), name


def test_training_ends_early_once_it_is_watched_to_be_enough() -> None:
    """With `wsd`, the rate decays from there: a third more steps at a decay of 1/4."""
    rates: list[list[float]] = []
    for schedule in ("wsd", "constant"):
        seen: list[tuple[bool, Tensor]] = []

        def watch(branched: ee.EarlyExitModel, seen: list[tuple[bool, Tensor]] = seen) -> bool:
            torch.rand(3)  # random numbers here change nothing of the training
            seen.append((branched.branches.training, next(branched.branches.parameters()).clone()))
            return len(seen) == 3

        config = replace(QUICK, epochs=50, schedule=schedule, ema=0.5)
        branched = small()
        report = ee.train(branched, blobs(32), config, watch=watch)
        assert len(seen) == 3
        assert not any(training for training, _ in seen)
        assert len(report.epochs) == (4 if schedule == "wsd" else 3)
        if schedule == "constant":
            assert torch.equal(seen[-1][1], next(branched.branches.parameters()))  # the average, and so the end
    for decay in (0.25, 1.0):
        config = replace(QUICK, schedule="wsd", warmup=0.0, decay=decay)
        rates.append([learning_rate(config, step / 8, 8) / config.lr for step in range(8)])
    assert rates == [pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.5]), pytest.approx([1 - step / 8 for step in range(8)])]


def test_an_early_end_survives_a_kill(tmp_path: Path) -> None:
    config = replace(QUICK, epochs=50, schedule="wsd")
    whole = ee.train(small(), blobs(32), config, watch=lambda _: True).model
    config = replace(config, checkpoint_dir=str(tmp_path))

    def killed(_: ee.EarlyExitModel) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ee.train(small(), blobs(32), config, watch=killed)
    again = ee.train(small(), blobs(32), config, watch=lambda _: True).model
    for a, b in zip(whole.branches.parameters(), again.branches.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_report_says_how_fast_training_was_and_on_what_time_was_spent() -> None:
    report = ee.train(small(), blobs(64), replace(QUICK, epochs=1))
    speed = report.epochs[0].speed
    assert speed is not None
    assert speed.images_per_second > 0
    assert speed.data >= 0 < speed.original < 1 - speed.data
    assert f"{speed.images_per_second:,.0f} images/s (original" in str(report)


def test_a_tensor_that_several_branches_read_is_cached_once(tmp_path: Path) -> None:
    mask, rest = torch.rand(4, 1, 6, 6), torch.rand(8, 5)
    read = [(rest[:4], mask), (rest[4:], mask), (mask, rest.T)]
    whole = features.BranchBatch(None, read, torch.rand(4, 3), torch.arange(4), 4, 4)
    features._save(whole, tmp_path / "a")
    again = features._load(tmp_path / "a", torch.device("cpu"))
    for before, after in zip(read, again.features, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (tmp_path / "a").stat().st_size < 4 * (2 * rest.numel() + mask.numel()) + 1500


def test_the_first_step_of_an_epoch_is_not_counted_into_its_speed() -> None:
    watch = StopWatch(torch.device("cpu"))
    watch.seconds = {"data": [9.0, 1.0, 1.0, 0.0], "original": [5.0, 5.0, 1.0, 1.0, 1.0, 1.0], "step": [9.0, 3.0, 3.0]}
    assert watch.read(30) == Speed(images_per_second=2.5, seconds_per_step=4.0, data=0.25, original=0.5)
    watch.seconds = {"data": [1.0], "step": [3.0]}
    assert watch.read(10) == Speed(images_per_second=2.5, seconds_per_step=4.0, data=0.25, original=0.0)
    assert watch.read(10) is None
