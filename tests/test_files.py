"""Saving is one change: old or new and never a mixture, one writer at a time, nothing through a link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import ee_surgery as ee
from benchmarks.mutations import edit_metadata
from ee_surgery.files import atomic_write, change_folder, listed, read_manifest
from ee_surgery.share.adapter import load_adapter, own_files
from ee_surgery.share.card import update_card
from tests import ROOT
from tests.zoo import BY_NAME, branched, original

MANIFEST = "config.json"


def _model() -> ee.EarlyExitModel:
    """Like new: the zoo's models are shared by all tests."""
    model = branched("cifar-resnet20")
    model.frontier = None
    model.operate(None)
    return model


@pytest.fixture(autouse=True)
def _weights_stay() -> Iterator[None]:
    state = {name: tensor.clone() for name, tensor in branched("cifar-resnet20").branches.state_dict().items()}
    yield
    _model().branches.load_state_dict(state)


def _program(*arguments: str) -> list:  # pyright: ignore[reportMissingTypeArgument]
    command = [sys.executable, "-m", "tests.killed_saves", *arguments]
    one = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **one}, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_save_killed_at_any_rename_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    found = _program("kills", str(tmp_path))
    assert len(found) >= 8
    assert {before for before, *_ in found} == {"old", "new"}
    assert all(rest == ["old"] for _, *rest in found)  # the next save is whole, and clears up


@pytest.mark.slow
def test_two_writers_and_a_reader_see_one_of_the_two(tmp_path: Path) -> None:
    seen = _program("races", str(tmp_path))
    assert set(seen) <= {"old", "new"}
    assert len(seen) > 2


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_rename_that_fails_leaves_the_old_folder_or_the_new_one(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(text: str) -> None:
        with change_folder(tmp_path, MANIFEST) as change:
            change.place("a").write_text(text)
            change.place("b/c").write_text(text)

    save("old")
    rename, count = os.replace, 0

    def failing(*places: str) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise OSError(5, "Input/output error")
        rename(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        if moment < 5:
            with pytest.raises(OSError, match="Input/output"):
                save("new")
        else:
            save("new")
    with change_folder(tmp_path, MANIFEST):  # the next writer finishes what was accepted
        pass
    assert {(tmp_path / name).read_text() for name in ("a", "b/c")} == {"old" if moment < 3 else "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", MANIFEST]


def _interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save anew, and fail at the first file behind the manifest: files wait beside their places."""
    rename = os.replace

    def failing(start: Path, end: Path) -> None:
        if Path(end).parent == folder and Path(end).name == "ee_adapter.safetensors":
            raise OSError(5, "Input/output error")
        rename(start, end)

    model = _model()
    model.operate(thresholds=0.75)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(os, "replace", failing)
        for parameter in model.branches.parameters():
            parameter.add_(1)
        with pytest.raises(ee.AdapterError, match="is saved, but not all"):
            model.save_pretrained(folder)


def test_an_unfinished_move_is_read_without_writing_pushed_and_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    model.operate(thresholds=0.25)
    folder = model.save_pretrained(tmp_path / "adapter")
    before = (folder / "ee_adapter.safetensors").read_bytes()
    _interrupted(folder, monkeypatch)
    assert (folder / "ee_adapter.safetensors").read_bytes() == before
    there = sorted(folder.rglob("*"))
    config, stored, _ = load_adapter(folder)
    assert config.operating_point is not None
    assert config.operating_point.thresholds == (0.75,) * 3
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in _model().branches.state_dict().items())
    assert sorted(folder.rglob("*")) == there
    assert own_files(folder)["ee_adapter.safetensors"].read_bytes() != before
    assert all(not name.startswith(".") for name in own_files(folder))
    update_card(folder)
    assert (folder / "ee_adapter.safetensors").read_bytes() != before
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", MANIFEST, "ee_adapter.safetensors"]


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    model = _model()
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    with _umask(mask):
        folder = model.save_pretrained(tmp_path / "adapter")
        model.frontier.plot(tmp_path / "frontier.png")  # pyright: ignore[reportOptionalMemberAccess]
        ee.record(model, [BY_NAME["cifar-resnet20"].sample(8)]).save(tmp_path / "records.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} == {0o777 & ~mask}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("mine")
    folder.mkdir()
    names = ["README.md", MANIFEST, "ee_adapter.safetensors"]
    for name in names:
        for planted in (
            f"{name}.partial",
            f".{name}.partial",
            f".{MANIFEST}.{name}.partial",
            f".{MANIFEST}.{name}.new",
        ):
            (folder / planted).symlink_to(victim)
    (folder / "ee_adapter.safetensors").symlink_to(victim)
    _model().save_pretrained(folder)
    assert victim.read_text() == "mine"
    assert not (folder / "ee_adapter.safetensors").is_symlink()
    with atomic_write(folder / "README.md.partial") as path:  # where the link itself is
        path.write_text("new")
    assert victim.read_text() == "mine"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / f".{MANIFEST}.lock").symlink_to(victim)
    with pytest.raises(ee.AdapterError, match="lock"):
        _model().save_pretrained(folder)
    assert victim.read_text() == "mine"


def test_a_folder_behind_a_link_is_not_written_into(tmp_path: Path) -> None:
    model, elsewhere = _model(), tmp_path / "elsewhere"
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    elsewhere.mkdir()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "assets").symlink_to(elsewhere)
    with pytest.raises(ee.AdapterError, match="assets is a link"):
        model.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["assets"]
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["ee_adapter.safetensors", "frontier.json", MANIFEST])
def test_a_mixture_of_two_saves_is_refused_and_named(name: str, tmp_path: Path) -> None:
    model = _model()
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    old = model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in model.branches.parameters():
            parameter.add_(0.1)
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    new = model.save_pretrained(tmp_path / "new")
    shutil.copy(old / name, new / name)
    seen = "ee_adapter.safetensors" if name == MANIFEST else name
    with pytest.raises(ee.AdapterError, match=f"{seen} is not the file that config.json lists"):
        ee.from_pretrained(new, original("cifar-resnet20"))
    with pytest.raises(ee.AdapterError, match=f"{seen} is not the file"):
        own_files(new)
    model.save_pretrained(new)
    load_adapter(new)


def test_a_frontier_of_another_save_is_not_taken_up(tmp_path: Path) -> None:
    model = _model()
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    old = model.save_pretrained(tmp_path / "old")
    model.frontier = None
    new = model.save_pretrained(tmp_path / "new")
    shutil.copy(old / "frontier.json", new)
    assert load_adapter(new)[2] is None
    assert "frontier.json" not in own_files(new)


def test_folders_from_before_digests_load_with_a_warning_and_get_them(tmp_path: Path) -> None:
    model = _model()
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    folder = model.save_pretrained(tmp_path / "adapter")
    data = read_manifest(folder / MANIFEST)
    del data["files"], data["probe"], data["digest"]
    data["format_version"] = 2
    edit_metadata(folder / "ee_adapter.safetensors", format_version="2")
    for upgrade in (lambda: update_card(folder), lambda: model.save_pretrained(folder)):
        (folder / MANIFEST).write_text(json.dumps(data))
        with pytest.warns(UserWarning, match="version without digests"):
            assert load_adapter(folder)[2] is not None
        with pytest.warns(UserWarning, match="version without digests"):
            assert ee.from_pretrained(folder, original("cifar-resnet20")).exits == model.exits
        if upgrade.__code__.co_names[0] == "update_card":
            with pytest.warns(UserWarning, match="version without digests"):
                upgrade()
        else:
            upgrade()
        assert {"ee_adapter.safetensors", "frontier.json", "README.md"} <= listed(
            read_manifest(folder / MANIFEST)
        ).keys()


def test_a_card_written_anew_keeps_the_list_of_the_others(tmp_path: Path) -> None:
    model = _model()
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    folder = model.save_pretrained(tmp_path / "adapter")
    before = listed(read_manifest(folder / MANIFEST))
    update_card(folder, license="mit")
    after = listed(read_manifest(folder / MANIFEST))
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    (folder / "README.md").write_text("a card of my own")
    with pytest.warns(UserWarning, match="is kept"):
        model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "a card of my own"
    assert own_files(folder)["README.md"] == folder / "README.md"


def test_equal_saves_are_equal_files(tmp_path: Path) -> None:
    model = _model()
    one, two = (model.save_pretrained(tmp_path / name / "adapter") for name in "ab")
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


def test_names_in_a_list_stay_in_the_folder() -> None:
    assert not listed({"files": {"../a": "0", "/a": "0", "a/../../b": "0", "": "0", "a": 3}})
    assert listed({"files": {"a/b": "0"}}) == {"a/b": "0"}


# --- folders of others


def _hf(folder: Path) -> None:
    original("hf-ViT").save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def _peft(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _timm(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"architecture": "resnet18"}')


def _weights(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


def _no_object(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


@pytest.mark.parametrize("put", [_hf, _peft, _timm, _weights, _no_object])
def test_saving_into_a_folder_of_another_model_is_refused(put: object, tmp_path: Path) -> None:
    put(tmp_path)  # pyright: ignore[reportCallIssue]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    name = next(
        n for n in ("config.json", "adapter_config.json", "model-00001-of-00002.safetensors") if (tmp_path / n).exists()
    )
    with pytest.raises(ee.AdapterError, match=f"holds {name}.*separate folder"):
        _model().save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_adapter_is_saved_again(tmp_path: Path) -> None:
    model = _model()
    folder = model.save_pretrained(tmp_path)
    for damage in ("{", "[]"):
        (folder / MANIFEST).write_text(damage)
        model.save_pretrained(folder)
        load_adapter(folder)
    (folder / MANIFEST).unlink()
    model.save_pretrained(folder)
    assert isinstance(ee.from_pretrained(folder, original("cifar-resnet20")), nn.Module)
