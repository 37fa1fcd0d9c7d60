"""Adapters that anyone may have written: damage changes nothing unnoticed, and no file asks for more than it holds."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModelForImageClassification

import ee_surgery as ee
from benchmarks.hostile import FAULTS, Subject, judge, make_subjects, use
from benchmarks.mutations import CONFIG, FRONTIER, WEIGHTS, edit, edit_metadata, edit_tensors, mutate
from ee_surgery.files import JSON_LIMIT, read_manifest
from ee_surgery.share.adapter import load_adapter, own_files


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return make_subjects(tmp_path_factory.mktemp("subjects"))


@pytest.fixture
def folder(subjects: dict[str, Subject], tmp_path: Path) -> Path:
    return shutil.copytree(subjects["thresholds"].folder, tmp_path / "adapter")


def _load(folder: Path, subjects: dict[str, Subject], name: str = "thresholds") -> ee.EarlyExitModel:
    return ee.from_pretrained(folder, subjects[name].make(), own_base=subjects[name].own_base)


@pytest.mark.parametrize("name", ["thresholds", "scheduler", "shortcut", "own base", "processor"])
def test_no_mutation_answers_otherwise_hangs_grows_or_raises_what_is_not_ours(
    name: str, subjects: dict[str, Subject], tmp_path: Path
) -> None:
    subject = subjects[name]
    expected = use(subject, subject.folder, card=False)
    outcomes = []
    for number in range(12):
        mutated = tmp_path / str(number)
        outcomes.append(judge(subject, expected, mutated, *mutate(subject.folder, mutated, f"test:{name}:{number}")))
    assert not [outcome for outcome in outcomes if outcome.kind in FAULTS]
    assert {outcome.kind for outcome in outcomes} > {"refused"}


def _set(*path: Any, value: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


BOMBS = {
    "width": (_set("exits", 0, "branch", value={"name": "msd", "confidence": False, "options": {"width": 10**9}}),
              "'exits.0.branch.options"),
    "a word as a threshold": (_set("operating_point", "thresholds", 0, value="nan"), "'operating_point.thresholds"),
    "width within bounds": (
        _set("exits", 0, "branch", value={"name": "msd", "confidence": False, "options": {"width": 60_000}}),
        "would have 3.24e"),
    "depth": (_set("exits", 0, "branch", value={"name": "conv", "confidence": False, "options": {"depth": 60_000}}),
              "depth must be"),
    "sizes that no layer takes": (
        _set("exits", 0, "branch", value={"name": "token", "confidence": False, "options": {"hidden": -5}}),
        "hidden must be"),
    "input": (_set("inputs", "x", "shape", value=[4, 3, 10**5, 10**5]), "too large to generate"),
    "classes of a head": (_set("head_classes", value=10**9), "'head_classes'"),
    "an opaque module of no name": (_set("opaque", value=["no.such.module"]), "keeps modules .*no.such.module"),
    "an exit twice": (lambda data: data["exits"].append(data["exits"][0]), "duplicate exits"),
    "exits out of order": (lambda data: data["exits"].reverse(), "out of order"),
    "features of another shape": (_set("exits", 0, "shape", value=[7, 32, 32]), "states features of shape"),
    "thresholds of another number": (lambda data: data["operating_point"]["thresholds"].append(0.5), "thresholds"),
    "shares that are no shares": (_set("operating_point", "exit_shares", value=[0.9, 0.9, 0.9]), "shares"),
    "a number as a word": (_set("base_macs", value="7"), "'base_macs'"),
    "a key of nobody's": (_set("sparkle", value=1), "'sparkle'"),
    "deep data": (_set("provenance", "x", value=json.loads("[" * 50 + "]" * 50)), "nested more than"),
    "a name that moves the cursor": (_set("base", "model_id", value="\x1b[2J"), "'base.model_id'"),
    "a longer name": (_set("base", "model_id", value="x" * 10_000), "'base.model_id'"),
    "a newer format": (_set("format_version", value=4), "upgrade"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_config_may_not_say_is_named(name: str, subjects: dict[str, Subject], folder: Path) -> None:
    change, message = BOMBS[name]
    edit(folder, change)
    with pytest.raises((ee.AdapterError, ee.ConfigError), match=message) as caught:
        _load(folder, subjects)
    assert len(str(caught.value)) < 2000


def test_a_frontier_has_to_fit_the_exits_and_itself(subjects: dict[str, Subject], folder: Path) -> None:
    whole = (folder / FRONTIER).read_bytes()
    for change, message in (
        (lambda data: data["exits"].__setitem__(0, "evil"), "is of exits"),
        (lambda data: data["points"].reverse(), "not ordered"),
        (lambda data: data["points"].pop(), "never exits early is missing"),
        (lambda data: data["points"][0]["thresholds"].pop(), "threshold"),
        (lambda data: data.update(base_accuracy=float("nan")), "damaged"),
    ):
        (folder / FRONTIER).write_bytes(whole)
        edit(folder, change, FRONTIER)
        with pytest.raises(ee.AdapterError, match=message):
            _load(folder, subjects)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"exits.0.classifier.bias": torch.zeros(10, dtype=torch.int64)}), "has dtype"),
        (lambda t: t.update({"exits.0.classifier.bias": torch.zeros(10, dtype=torch.bool)}), "has dtype"),
        (lambda t: t.update({"exits.0.classifier.bias": torch.zeros(10).to(torch.float8_e5m2)}), "has dtype"),
        (lambda t: t.update({"exits.0.classifier.bias": torch.full((10,), torch.nan)}), "not finite"),
        (lambda t: t.update({"exits.0.classifier.bias": torch.full((10,), 1e300, dtype=torch.float64)}), "not finite"),
        (lambda t: t.update({"exits.0.classifier.bias": torch.zeros(11)}), "has shape"),
        (lambda t: t.pop("exits.0.classifier.bias"), "has no tensor"),
        (lambda t: t.update({"exits.9.evil": torch.zeros(1)}), "does not use"),
    ],
)
def test_tensors_are_those_of_the_branches(
    change: Any, message: str, subjects: dict[str, Subject], folder: Path
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ee.AdapterError, match=message):
        _load(folder, subjects)


def test_a_scheduler_of_another_model_is_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    folder = shutil.copytree(subjects["scheduler"].folder, tmp_path / "adapter")
    edit_tensors(folder, lambda tensors: tensors.update({"policy.0": torch.zeros(3)}))
    with pytest.raises(ee.AdapterError, match="does not fit 2 exits and 10 classes"):
        _load(folder, subjects)


def _says_the_same(one: bytes, other: bytes) -> bool:
    """White space, and the last digits of a number that is the same in float64, say nothing."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_every_flipped_bit_of_json_and_tensors_is_seen(subjects: dict[str, Subject], folder: Path) -> None:
    for name in (CONFIG, FRONTIER, WEIGHTS):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            (folder / name).write_bytes(flipped)
            if name == CONFIG and _says_the_same(whole, flipped):
                continue
            with pytest.raises(ee.AdapterError):
                load_adapter(folder)
        (folder / name).write_bytes(whole)
    load_adapter(folder)


def test_a_huge_or_deep_file_is_not_even_parsed(subjects: dict[str, Subject], folder: Path) -> None:
    for text, message in ((" " * (JSON_LIMIT + 1), "bytes"), ("[" * 10**6, "recursion"), ("9" * 10**6, "range")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ee.AdapterError, match=message):
            _load(folder, subjects)


def test_a_base_of_its_own_is_said_to_be_another_model(subjects: dict[str, Subject]) -> None:
    folder = subjects["own base"].folder
    with pytest.warns(UserWarning, match=r"the published 'timm/test_resnet.*own_base=True"):
        branched = ee.from_pretrained(folder, local_files_only=True)
    assert "the base that came with the branches" in str(branched.receipt())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ee.from_pretrained(folder, own_base=True, local_files_only=True)


def test_a_base_is_no_larger_than_its_tensors(subjects: dict[str, Subject], tmp_path: Path) -> None:
    for key, value in (("num_classes", 90_000), ("model_id", "vit_giant_patch14_dinov2")):
        folder = shutil.copytree(subjects["own base"].folder, tmp_path / key)
        edit(folder, lambda data, key=key, value=value: data["base"].update({key: value}))
        with pytest.raises(ee.AdapterError, match=r"has shape|has no tensor|could not create"):
            ee.from_pretrained(folder, own_base=True, local_files_only=True)


@pytest.mark.parametrize("name", ["local-dir:/etc", "hf-hub:evil/model", "/etc/passwd", "../evil", "file:///etc"])
def test_a_base_is_made_by_a_plain_name_alone(
    name: str, subjects: dict[str, Subject], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: pytest.fail(f"asked for {args}"))
    for library in ("timm", "transformers"):
        edit(folder, lambda data, library=library: data["base"].update(library=library, model_id=name))
        with pytest.raises(ee.AdapterError, match="an adapter may not name files to read"):
            ee.from_pretrained(folder)


def test_keys_that_transformers_acts_upon_do_not_reach_it(subjects: dict[str, Subject], folder: Path) -> None:
    evil = {
        "_attn_implementation": "evil/kernel", "quantization_config": {"load_in_4bit": True}, "torch_dtype": "float16",
        "id2label": {"0": "evil"}, "to_dict": "evil", "return_dict": False, "architectures": ["Evil"],
    }  # fmt: skip
    edit(folder, lambda data: data.update(evil))
    config = AutoConfig.from_pretrained(folder)
    assert callable(config.to_dict)
    assert config.return_dict
    assert config.id2label[0] != "evil"
    assert getattr(config, "quantization_config", None) is None
    assert config._attn_implementation != "evil/kernel"
    with pytest.raises(ee.AdapterError, match=r"_attn_implementation|quantization_config|torch_dtype"):
        AutoModelForImageClassification.from_pretrained(folder, base_model=subjects["thresholds"].make())


def test_an_adapter_of_the_format_before_loads_with_a_warning_and_is_upgraded(
    subjects: dict[str, Subject], folder: Path
) -> None:
    edit_metadata(folder / WEIGHTS, format_version="2")
    config = read_manifest(folder / CONFIG)
    for key in ("files", "digest", "probe", "output"):
        del config[key]
    (folder / CONFIG).write_text(json.dumps({**config, "format_version": 2}))
    with pytest.warns(UserWarning, match="version without digests"):
        branched = _load(folder, subjects)
    branched.save_pretrained(folder)
    assert read_manifest(folder / CONFIG)["format_version"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _load(folder, subjects)


@pytest.mark.parametrize("name", ["README.md", WEIGHTS, FRONTIER])
def test_no_digest_is_taken_of_a_file_without_end(name: str, folder: Path) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(200 << 30)  # sparse: it takes no room
    with pytest.raises(ee.AdapterError, match="too many for an adapter"):
        own_files(folder)


def test_a_deep_config_of_another_model_is_refused_by_name(subjects: dict[str, Subject], tmp_path: Path) -> None:
    branched = _load(subjects["thresholds"].folder, subjects)
    (tmp_path / CONFIG).write_text("[" * 10**6)
    with pytest.raises(ee.AdapterError, match=r"holds config\.json"):
        branched.save_pretrained(tmp_path)
