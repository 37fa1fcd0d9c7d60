"""Faults from outside: a full or failing disk, a damaged checkpoint, an interruption anywhere, calls without end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.memory import kinds
from ee_surgery.errors import OUT_OF_MEMORY
from ee_surgery.evaluation.bench import measure
from ee_surgery.files import atomic_write
from ee_surgery.runtime import engine
from ee_surgery.share.card import update_card
from ee_surgery.training import checkpoint, features, trackers
from tests.faults import OPERATIONS, At, Trap, content, failing, files_up_to, state_of, switches, weights_of

ERRORS = (KeyboardInterrupt, SystemExit, MemoryError)


def network() -> nn.Sequential:
    """Two exits, at "2" and "4"; `Trap`s beside them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), Trap(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def small(branch: str = "mlp") -> ee.EarlyExitModel:
    return ee.augment(network(), ["2", "4"], branch=branch, sample=torch.randn(3, 3, 8, 8))


@cache
def shared() -> ee.EarlyExitModel:
    """Leave it as it was."""
    return small()


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4) for _ in range(count)]


@cache
def records() -> ee.ExitRecords:
    return ee.record(shared(), batches())


@cache
def frontier() -> ee.Frontier:
    return ee.calibrate(small(), batches())


# --- disks


def _checkpoint(folder: Path, version: int) -> None:
    checkpoint.save(folder, {"settings": {}, "w": torch.full((5000,), float(version))})


def _features(folder: Path, version: int) -> None:
    lesson = features.BranchBatch(None, [(torch.full((64, 32), float(version)),)], torch.ones(64, 4), None, 64, 64)
    features._save(lesson, folder / "0-0.safetensors")


def _records(folder: Path, version: int) -> None:
    replace(records(), logits=records().logits + version).save(folder / "records.safetensors")


def _plot(name: str) -> Callable[[Path, int], None]:
    def write(folder: Path, version: int) -> None:
        point = frontier().points[0]
        shown = replace(frontier(), points=(*frontier().points, replace(point, macs_fraction=1.0 + version)))
        shown.plot(folder / name)

    return write


def _adapter(folder: Path, version: int) -> None:
    model = shared()
    model.operate(thresholds=float(version))
    try:
        model.save_pretrained(folder)
    finally:
        model.operate(None)


def _card(folder: Path, version: int) -> None:
    if not version:
        _adapter(folder, 0)
    update_card(folder, license=f"mit-{version}")


def _tracker(folder: Path, version: int) -> None:
    trackers.JsonLines(folder / "log.jsonl").log({"loss": version, "note": "x" * 5000}, step=version)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "checkpoint": _checkpoint,
    "features": _features,
    "records": _records,
    "png": _plot("frontier.png"),
    "pdf": _plot("frontier.pdf"),
    "svg": _plot("frontier.svg"),
    "adapter": _adapter,
    "card": _card,
    "tracker": _tracker,
}


def _fails_whole(write: Callable[[Path, int], None], folder: Path, advice: str) -> None:
    """The write of version 1 fails by an error of ours that names the folder, and leaves version 0 alone."""
    before = content(folder)
    with pytest.raises(ee.SurgeryError) as caught:
        write(folder, 1)
    assert str(folder) in str(caught.value)
    assert advice in str(caught.value)
    assert content(folder) == before


@pytest.mark.parametrize("room", [0, 600])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_and_leaves_what_was_there(name: str, room: int, tmp_path: Path) -> None:
    write = WRITERS[name]
    write(tmp_path, 0)
    before = content(tmp_path)
    with files_up_to(room):
        _fails_whole(write, tmp_path, "")
    write(tmp_path, 1)
    assert content(tmp_path) != before
    assert not [path for path in content(tmp_path) if ".partial" in path or ".lock" in path or ".new" in path]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("pdf", "svg")])
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some disk space"),
        (errno.EACCES, "a folder with write permission"),
        (errno.EROFS, "a folder with write permission"),
        (errno.EIO, "may be failing"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_a_failing_disk_is_said_and_leaves_what_was_there(
    number: int, advice: str, name: str, operation: str, tmp_path: Path
) -> None:
    write = WRITERS[name]
    write(tmp_path, 0)
    with failing(operation, tmp_path, lambda: OSError(number, os.strerror(number))) as hits:
        if (name, operation) in _NEVER:
            write(tmp_path, 1)
        else:
            _fails_whole(write, tmp_path, advice)
            assert hits
    write(tmp_path, 1)


# What a writer does without: safetensors and appended lines.
_NEVER = {
    *((name, "open") for name in ("features", "records")),
    ("features", "fsync"),
    *(("tracker", operation) for operation in OPERATIONS if operation != "open"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("pdf", "svg")])
def test_an_interrupted_write_leaves_what_was_there(name: str, operation: str, tmp_path: Path) -> None:
    write = WRITERS[name]
    write(tmp_path, 0)
    before = content(tmp_path)
    if (name, operation) not in _NEVER:
        with failing(operation, tmp_path, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            write(tmp_path, 1)
    assert content(tmp_path) == before
    write(tmp_path, 1)


def test_a_line_that_does_not_fit_into_a_log_is_not_begun(tmp_path: Path) -> None:
    log = trackers.JsonLines(tmp_path / "log.jsonl")
    log.log({"loss": 1.0}, step=1)
    before = log.path.read_bytes()
    with files_up_to(len(before) + 7), pytest.raises(ee.WriteError, match=r"log\.jsonl cannot be written.*are intact"):
        log.log({"loss": 2.0}, step=2)
    assert log.path.read_bytes() == before


def test_a_file_that_is_in_place_but_not_yet_safe_is_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    failed = OSError(errno.EIO, "Input/output error")

    def failing(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").resolve() == tmp_path.resolve():
            raise failed
        fsync(number)

    monkeypatch.setattr(os, "fsync", failing)
    with (
        pytest.raises(ee.WriteError, match="is written, but may not") as caught,
        atomic_write(tmp_path / "a"),
    ):
        (next(tmp_path.glob(".a.*.partial")) / "a").write_text("new")
    assert caught.value.errno == errno.EIO
    assert (tmp_path / "a").read_text() == "new"


def test_errors_of_others_in_a_write_are_passed_on(tmp_path: Path) -> None:
    for error in (ValueError("a"), ee.HubError("b"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "a"):
            raise error
        assert caught.value is error
    assert content(tmp_path) == {}


def test_pictures_of_unknown_kinds_are_refused_and_those_without_are_png(tmp_path: Path) -> None:
    with pytest.raises(ee.ConfigError, match=r"x\.doc is not a supported image format.*'png'"):
        frontier().plot(tmp_path / "x.doc")
    assert content(tmp_path) == {}
    frontier().plot(tmp_path / "x")
    assert (tmp_path / "x").read_bytes().startswith(b"\x89PNG")


QUICK = ee.TrainConfig(epochs=2, lr=1e-2, validation=0, progress=False, ema=0.5, checkpoint_steps=1)


def _weights(model: ee.EarlyExitModel) -> list[Tensor]:
    return [tensor.clone() for tensor in model.branches.state_dict().values()]


@cache
def _trained() -> list[Tensor]:
    model = small()
    ee.train(model, batches(), QUICK)
    return _weights(model)


def _is_trained(model: ee.EarlyExitModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_weights(model), _trained(), strict=True))


@pytest.mark.parametrize("step", [1, 4])
def test_a_training_whose_disk_fills_up_goes_on_from_the_last_checkpoint(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, save, saved = replace(QUICK, checkpoint_dir=str(tmp_path)), checkpoint.save, 0

    def filling(folder: Path, state: dict[str, Any]) -> None:
        nonlocal saved
        saved += 1
        with files_up_to(1000 if saved == step else 10**9):
            save(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", filling)
        with pytest.raises(ee.TrainingError, match=r"training\.pt cannot be written.*Free some disk.*resumes from"):
            ee.train(small(), batches(), config)
    assert [path.name for path in tmp_path.iterdir()] == ([checkpoint.FILE] if step > 1 else [])
    model = small()
    ee.train(model, batches(), config)
    assert _is_trained(model)


def test_features_that_cannot_be_kept_or_read_back_are_named_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_FASTER", float("inf"))
    config = replace(QUICK, epochs=3, views=1, checkpoint_dir=str(tmp_path), checkpoint_steps=100)
    with (
        files_up_to(500),
        pytest.raises(ee.TrainingError, match=r"Features cannot be cached in .*features-0.*cache_gb=0"),
    ):
        ee.train(small(), batches(), config)
    assert content(tmp_path) == {}
    load = features._load

    def damaged(path: Path, device: torch.device) -> features.BranchBatch:
        if path.name == "0-1.safetensors":
            path.write_bytes(path.read_bytes()[:-9])
        return load(path, device)

    monkeypatch.setattr(features, "_load", damaged)
    with pytest.raises(ee.TrainingError, match=r"Features cannot be cached in .*features-0.*cache_gb=0"):
        ee.train(small(), batches(), config)
    assert list(content(tmp_path)) == [checkpoint.FILE]


# --- checkpoints


def _changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A checkpoint with a good digest, but not what training wrote."""
    state = torch.load(checkpoint._verified(path), weights_only=True)
    change(state)
    checkpoint.save(path.parent, state)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _format(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 9)
        _changed(path, lambda state: None)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a folder": _folder,
    "a link that leads nowhere": _link,
    "a pipe": _pipe,
    "another format": _format,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half of a learner": lambda path: _changed(path, lambda state: state["learner"].popitem()),
    "a learner of other shapes": lambda path: _changed(
        path, lambda state: state["learner"].update({[*state["learner"]][-1]: torch.zeros(77)})
    ),
    "no average": lambda path: _changed(path, lambda state: state["average"].popitem()),
    "another optimizer": lambda path: _changed(path, lambda state: state["optimizer"]["param_groups"].pop()),
    "no counters": lambda path: _changed(path, lambda state: state["counters"].pop("epoch")),
    "no history": lambda path: _changed(path, lambda state: state.pop("history")),
    "no random state": lambda path: _changed(path, lambda state: state["random"][0].pop("numpy")),
    "no settings": lambda path: _changed(path, lambda state: state.pop("settings")),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint after an epoch."""
    folder = tmp_path_factory.mktemp("training")
    ee.train(small(), batches(), replace(QUICK, checkpoint_dir=str(folder), epochs=2))
    return (folder / checkpoint.FILE).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_of_it_is_taken(
    damage: str, written: bytes, tmp_path: Path
) -> None:
    path, model = tmp_path / checkpoint.FILE, small()
    path.write_bytes(written)
    DAMAGES[damage](path)
    model.operate(thresholds=0.5)
    before, there = _weights(model), content(tmp_path)
    kept = state_of(model) if damage != "a pipe" else None
    with pytest.raises(ee.TrainingError, match=rf"{path} is not a checkpoint.*Remove it to start over, or use another"):
        ee.train(model, batches(), replace(QUICK, checkpoint_dir=str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(model), strict=True))
    assert kept is None or kept == state_of(model)
    assert damage == "a pipe" or content(tmp_path) == there
    path.rmdir() if path.is_dir() else path.unlink()
    ee.train(model, batches(), replace(QUICK, checkpoint_dir=str(tmp_path)))
    assert _is_trained(model)


def test_a_checkpoint_folder_that_is_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = small()
    before = _weights(model)
    with pytest.raises(
        ee.TrainingError, match=r"training\.pt cannot be read: .*Not a directory.*another checkpoint_dir"
    ):
        ee.train(model, batches(), replace(QUICK, checkpoint_dir=str(tmp_path / "file")))
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(model), strict=True))


def test_a_checkpoint_of_another_model_is_refused(written: bytes, tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE).write_bytes(written)
    other = small("pool")
    with pytest.raises(ee.TrainingError, match=r"other settings \(exits: .*another checkpoint_dir"):
        ee.train(other, batches(), replace(QUICK, checkpoint_dir=str(tmp_path)))
    other = small()
    next(other.backbone.parameters()).data.mul_(2)
    other.rebase()
    with pytest.raises(ee.TrainingError, match=r"other settings \(fingerprint: .*another checkpoint_dir"):
        ee.train(other, batches(), replace(QUICK, checkpoint_dir=str(tmp_path)))
    assert (tmp_path / checkpoint.FILE).read_bytes() == written


# --- interruptions


def _leaving() -> ee.EarlyExitModel:
    model = small()
    model.operate(thresholds=[0.3, 0.26])
    return model


class Verb:
    """A public call on a model of its own, over and over, and what it gives.

    Args:
        weights: whether it changes the weights of the branches; they are put back before each call.
    """

    def __init__(
        self,
        call: Callable[[ee.EarlyExitModel, Path], Any],
        weights: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.call, self.weights, self.dtype = call, weights, dtype

    @property
    def model(self) -> ee.EarlyExitModel:
        """Made on first use."""
        if "_model" not in vars(self):
            self._model = _leaving().to(self.dtype)
            self._first = {name: tensor.clone() for name, tensor in self._model.branches.state_dict().items()}
        return self._model

    def reset(self) -> None:
        """Back to the first state."""
        self.model.branches.load_state_dict(self._first)
        self.model.operate(thresholds=[0.3, 0.26])

    def run(self, folder: Path) -> Any:
        """Once, from the first state."""
        self.reset()
        return self.call(self.model, folder)


def _train(**options: Any) -> Callable[[ee.EarlyExitModel, Path], list[Tensor]]:
    joint = options.pop("joint", False)
    config = replace(QUICK, epochs=1, **options)

    def call(model: ee.EarlyExitModel, folder: Path) -> list[Tensor]:
        model.frontier = None
        trained = ee.train(model, batches(2), config, joint=joint, validation=batches(1)).model
        return [tensor.clone() for tensor in trained.state_dict().values()]

    return call


def _calibrate(model: ee.EarlyExitModel, folder: Path) -> str:
    try:
        return str(ee.calibrate(model, batches(1, 4)))
    finally:
        model.frontier = None


def _evaluate(model: ee.EarlyExitModel, folder: Path) -> str:
    try:
        return str(ee.evaluate(model, batches()))
    finally:
        model.provenance.pop("evaluation", None)


def _save(model: ee.EarlyExitModel, folder: Path) -> dict[str, bytes]:
    return content(model.save_pretrained(folder))


def _predict(model: ee.EarlyExitModel, folder: Path) -> list[Tensor]:
    return [*model.predict(batches()[0][0])[:4], model(batches()[0][0][:1])]


def _measure(model: ee.EarlyExitModel, folder: Path) -> float:
    return measure(model, batches()[0][0], batch_size=4, rounds=2).macs_fraction


RUNS = {
    "train": Verb(_train(), weights=True),
    "train in bfloat16": Verb(_train(mixed_precision="bf16", mixup=0.5), weights=True),
    "train branches in half precision": Verb(_train(), weights=True, dtype=torch.bfloat16),
    "calibrate": Verb(_calibrate),
    "evaluate": Verb(_evaluate),
    "predict": Verb(_predict),
    "all exits": Verb(lambda model, folder: model.all_exits(batches()[0][0])),
    "measure": Verb(_measure),
    "save": Verb(_save),
}
"""Interrupted at any operator that torch runs."""


def _augment(model: ee.EarlyExitModel, folder: Path) -> Tensor:
    return ee.augment(model.backbone, ["2", "4"], sample=torch.zeros(3, 3, 8, 8)).all_exits(batches()[0][0])


def _new_size(model: ee.EarlyExitModel, folder: Path) -> Tensor:
    model.engine.programs.clear()
    return model.predict(torch.ones(5, 3, 9, 9)).logits


def _copy(model: ee.EarlyExitModel, folder: Path) -> Tensor:
    return model.copy().all_exits(batches()[0][0])


def _load(model: ee.EarlyExitModel, folder: Path) -> Tensor:
    if not folder.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trap, "n", 0)
            model.save_pretrained(folder)
    return ee.from_pretrained(folder, model.backbone).predict(batches()[0][0]).logits


CAPTURES = {
    "augment": Verb(_augment),
    "keep a module whole": Verb(
        lambda model, folder: ee.augment(model.backbone, ["2", "4"], opaque=["5"], sample=torch.zeros(3, 3, 8, 8)).exits
    ),
    "another size": Verb(_new_size),
    "copy": Verb(_copy),
    "fewer exits": Verb(lambda model, folder: model.with_exits(["4"]).all_exits(batches()[0][0])),
    "load": Verb(_load),
    "train the original along": Verb(_train(joint=True)),
    "without exits": Verb(lambda model, folder: _without(model)),
}
"""Interrupted at any call of a module of the original."""


def _without(model: ee.EarlyExitModel) -> Tensor:
    with model.exits_disabled():
        return model(batches()[0][0])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, list):
        return all(map(_same, a, b))
    return a == b


@cache
def _expected(name: str, captures: bool, folder: Path) -> tuple[Any, int]:
    """What a verb gives, and how many operators or calls it takes."""
    verb = (CAPTURES if captures else RUNS)[name]
    verb.run(folder)  # whatever is made once and kept
    verb.reset()
    with Trap.at() if captures else At() as counted:
        result = verb.call(verb.model, folder)
    return result, counted.count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


def _interrupt(name: str, captures: bool, folder: Path, share: float, error: type[BaseException]) -> None:
    verb = (CAPTURES if captures else RUNS)[name]
    folder = folder / name.replace(" ", "-")
    expected, count = _expected(name, captures, folder)
    n, model = 1 + int(share * (count - 1)), verb.model
    verb.reset()
    there, before, weights = content(folder), (state_of(model), switches()), weights_of(model.branches)
    with pytest.raises(error), Trap.at(n, error) if captures else At(n, error):
        verb.call(model, folder)
    after = state_of(model), switches()
    assert content(folder) == there
    assert weights_of(model.branches) == weights or verb.weights
    if verb.weights:  # thresholds of weights that are gone
        for state in (before[0], after[0]):
            state.pop("setting")
    assert after == before, (n, count)
    assert _same(verb.run(folder), expected)


@pytest.mark.parametrize("name", RUNS)
def test_an_interruption_at_any_operator_leaves_everything_ready_for_the_next_call(name: str, folder: Path) -> None:
    @given(st.floats(0, 1), st.sampled_from(ERRORS))
    @settings(max_examples=5)
    def check(share: float, error: type[BaseException]) -> None:
        _interrupt(name, False, folder, share, error)

    check()


@pytest.mark.parametrize("share", [0.93, 0.95, 0.97, 0.99])
def test_an_interruption_while_the_base_s_types_come_back_waits_for_them(share: float, folder: Path) -> None:
    _interrupt("train branches in half precision", False, folder, share, KeyboardInterrupt)


@pytest.mark.parametrize("name", CAPTURES)
def test_an_interruption_at_any_call_of_the_original_leaves_everything_ready(name: str, folder: Path) -> None:
    _, count = _expected(name, True, folder / name.replace(" ", "-"))
    random = Random(0)
    for n in sorted(random.sample(range(1, count + 1), min(count, 2))):
        _interrupt(name, True, folder, (n - 0.5) / count, random.choice(ERRORS))


@pytest.mark.parametrize("bad", ["labels out of range", "no batch", "an interruption"])
def test_a_training_that_fails_before_its_first_step_loses_nothing(bad: str) -> None:
    def stopping() -> Any:
        raise KeyboardInterrupt
        yield

    data: Any = {"labels out of range": [(batches()[0][0], torch.full((8,), 9))], "no batch": []}.get(bad, stopping())
    model = small()
    ee.calibrate(model, batches())
    model.operate(max_accuracy_drop=1.0)
    ee.evaluate(model, batches())
    before, weights = state_of(model), _weights(model)
    with pytest.raises(KeyboardInterrupt if bad == "an interruption" else ee.DataError):
        ee.train(model, data, replace(QUICK, epochs=1, schedule="constant", warmup=0.0))
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, _weights(model), strict=True))


def test_memory_that_runs_out_is_never_taken_for_an_answer() -> None:
    """Neither for a model that takes no batch of one, nor for one that cannot be captured, nor for another base."""
    model = small().backbone
    with Trap.at() as calls:
        ee.augment(model, ["2", "4"], sample=torch.randn(3, 3, 8, 8))
    errors = []
    for n in range(1, calls.count + 1):
        with pytest.raises(OUT_OF_MEMORY) as caught, Trap.at(n, MemoryError):
            ee.augment(model, ["2", "4"], sample=torch.randn(3, 3, 8, 8))
        errors.append(caught.type)
    assert errors == [MemoryError] * calls.count


# --- calls without end


def test_memory_does_not_grow_over_calls_of_changing_sizes_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """By kind of object: nothing of ours or of torch's adds up. The long form is `benchmarks.memory`."""
    monkeypatch.setattr(engine, "_PROGRAMS_KEPT", 2)
    model, random = small(), Random(0)

    def call(side: int) -> None:
        score = random.choice(["max_prob", "margin", "entropy", "patience"])
        model.operate(thresholds=[random.random(), random.random()], score=score)
        model.predict(torch.randn(random.randint(1, 9), 3, side, side))

    for side in (9, 10, 11):
        for _ in range(10):  # the routers that are kept for each
            call(side)
    before = kinds()
    for side in (12, 13, 14):
        call(side)
    for _ in range(200):
        call(random.choice([13, 14]))
    assert len(model.engine.programs) == 2
    grown = {kind: count - before[kind] for kind, count in kinds().items() if count - before[kind] >= 3}
    assert not grown  # three captures
