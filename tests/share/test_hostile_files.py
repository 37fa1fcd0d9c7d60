"""Folders of a stranger: no fifo is waited for, and nothing outside the folder is read, written or uploaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTImageProcessor
from typer.testing import CliRunner

import ee_surgery as ee
from ee_surgery import cli
from ee_surgery.backbone.base import Backbone
from ee_surgery.backbone.picture_settings import LARGEST_SIDE, check_preprocessing, processor_arguments
from ee_surgery.backbone.pictures import build_processor
from ee_surgery.files import (
    _ready,
    _state,
    change_folder,
    listed,
    locate,
    read_bytes,
    read_manifest,
    read_object,
    sealed,
    sha256,
)
from ee_surgery.share import hub as hub_folder
from ee_surgery.share.adapter import own_files
from ee_surgery.share.card import update_card
from ee_surgery.share.processor import load_preprocessing, load_processor, picture_transform
from tests.hub_server import Hub
from tests.zoo import BY_NAME, branched

CONFIG, CARD, PROCESSOR, WEIGHTS = "config.json", "README.md", "preprocessor_config.json", "ee_adapter.safetensors"
SECRET = "a line out of a file of the victim's"
PICTURE = Image.new("RGB", (40, 50), (200, 30, 90))
pytestmark = pytest.mark.filterwarnings("ignore:.* is left out:UserWarning")  # odd files, which is what this is about


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A test that waits at a fifo or reads a device without end fails after 20 seconds."""
    signal = pytest.importorskip("signal")
    if not hasattr(signal, "SIGALRM"):
        pytest.skip("no fifos and devices on this system")

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with all files that one of a network of pictures has."""
    model = branched("cifar-resnet20")
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    try:
        return model.save_pretrained(tmp_path_factory.mktemp("hostile") / "adapter")
    finally:
        model.frontier = None
        model.operate(None)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to plant things in."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder outside that is as it was at the end, whatever the test did."""
    place = tmp_path / "victim"
    (place / "ssh").mkdir(parents=True)
    for name in ("bashrc", "ssh/key", "frontier.png", "ee_surgery.yaml"):
        (place / name).write_text(SECRET)

    def seen() -> dict[str, tuple[int, bytes]]:
        paths = (path for path in place.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mode, path.read_bytes()) for path in paths}

    before = seen()
    yield place
    assert seen() == before


# --- what is no regular file


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _missing(path: Path) -> None:
    pass


ODD = [_fifo, _device, _folder, _loop]


@pytest.mark.parametrize("plant", [*ODD, _missing])
def test_only_regular_files_are_read_and_nothing_is_waited_for(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path / "there")
    for read in (lambda path: read_bytes(path, 100), sha256):
        with pytest.raises(OSError, match="there"):
            read(tmp_path / "there")


def test_a_bounded_read_takes_up_to_the_bound_and_follows_a_link_to_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"0123456789")
    link.symlink_to(path)
    assert read_bytes(link, 10) == b"0123456789"
    with pytest.raises(OSError, match="has 10 bytes; at most 9"):
        read_bytes(link, 9)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "\xff", "", "1" * 5000])
def test_what_is_no_plain_object_is_an_error_of_one_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (json has many texts)
        read_object(tmp_path / "file", 1 << 20)
    assert not isinstance(caught.value, RecursionError)


@pytest.mark.parametrize("plant", ODD)
def test_odd_files_in_place_of_listed_ones_are_not_those(plant: Callable[[Path], None], folder: Path) -> None:
    files = listed(read_manifest(folder / CONFIG))
    for name in (WEIGHTS, CARD):
        (folder / name).unlink()
        plant(folder / name)
        assert locate(folder / CONFIG, name, files) is None
        with pytest.raises(OSError, match=name):
            locate(folder / CONFIG, name, {})
    with pytest.raises(ee.AdapterError, match=WEIGHTS):
        own_files(folder)


@pytest.mark.parametrize("plant", ODD)
@pytest.mark.parametrize("name", [CONFIG, CARD, ".config.json.lock"])
def test_saving_over_odd_files_ends_well_or_says_which(plant: Callable[[Path], None], name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    plant(folder / name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            branched("cifar-resnet20").save_pretrained(folder)
    except ee.AdapterError as error:
        assert name in str(error)  # noqa: PT017 (either way)
    else:
        assert own_files(folder).keys() >= {CONFIG, WEIGHTS}
    assert not list(folder.glob(".*.partial"))


# --- links, and files that were prepared

Plant = Callable[[Path, Path], None]


def _link(name: str, target: str) -> Plant:
    def plant(folder: Path, victim: Path) -> None:
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(victim / target)

    return plant


def _hard_link(name: str) -> Plant:
    def plant(folder: Path, victim: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.link(victim / "bashrc", folder / name)

    return plant


def _ready_link(folder: Path, victim: Path) -> None:
    """What an interrupted save would have left, as a link: its files would be moved here."""
    data = read_manifest(folder / CONFIG)
    data["files"] = {name: sha256(victim / name) for name in ("bashrc", "ssh/key")}
    (folder / CONFIG).write_text(json.dumps(sealed(data)))
    _ready(folder / CONFIG, data["files"]).symlink_to(victim)


def _ready_folder_with_links(folder: Path, victim: Path) -> None:
    data = read_manifest(folder / CONFIG)
    data["files"] = {"ssh/key": sha256(victim / "ssh/key")}
    (folder / CONFIG).write_text(json.dumps(sealed(data)))
    ready = _ready(folder / CONFIG, data["files"])
    ready.mkdir()
    (ready / "ssh").symlink_to(victim / "ssh")


PLANTS: dict[str, Plant] = {
    "card.partial": _link("README.md.partial", "bashrc"),
    "card": _link(CARD, "bashrc"),
    "config": _link(CONFIG, "bashrc"),
    "branches": _link(WEIGHTS, "bashrc"),
    "assets": _link("assets", ""),
    "results": _link(".eval_results", ""),
    "plot": _link("assets/frontier.png", "bashrc"),
    "lock": _link(".config.json.lock", "bashrc"),
    "lock, hard": _hard_link(".config.json.lock"),
    "card, hard": _hard_link(CARD),
    "config, hard": _hard_link(CONFIG),
    "ready": _ready_link,
    "in ready": _ready_folder_with_links,
    "ready, any": _link(".config.json.0000000000000000.new", ""),
    "partial, any": _link(".config.json.0000000000000000.partial", ""),
}


@pytest.mark.parametrize("what", PLANTS)
def test_nothing_is_written_moved_or_removed_through_a_link(what: str, folder: Path, victim: Path) -> None:
    PLANTS[what](folder, victim)
    model = branched("cifar-resnet20")
    for change in (lambda: update_card(folder), lambda: model.save_pretrained(folder)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                change()
            except ee.AdapterError as error:
                assert str(folder) in str(error)  # noqa: PT017 (either way)
    moved = [
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    ]
    assert all(SECRET not in path.read_text(errors="replace") for path in moved)


def test_plots_and_checkpoints_of_trainer_replace_a_link(folder: Path, victim: Path) -> None:
    from ee_surgery.integrations.transformers import EarlyExitForImageClassification

    model = branched("cifar-resnet20")
    checkpoint = folder / "checkpoint-1"
    wrapped = EarlyExitForImageClassification.of(model)
    wrapped.save_pretrained(checkpoint)
    for name, target in (("model.safetensors", "bashrc"), (CARD, "nothing yet")):
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(victim / target)
    wrapped.save_pretrained(checkpoint)
    assert not any(path.is_symlink() for path in checkpoint.iterdir())
    assert not (victim / "nothing yet").exists()
    (folder / "plot.png").symlink_to(victim / "bashrc")
    frontier = ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    model.frontier = None
    model.operate(None)
    frontier.plot(folder / "plot.png")
    assert not (folder / "plot.png").is_symlink()


@pytest.mark.parametrize("plant", [_link(".config.json.lock", "bashrc"), _hard_link(".config.json.lock"),
                                   lambda folder, _: os.mkfifo(folder / ".config.json.lock")])  # fmt: skip
def test_what_is_no_lock_file_is_not_locked_but_named(plant: Plant, folder: Path, victim: Path) -> None:
    plant(folder, victim)
    with pytest.raises(ee.AdapterError, match=r"\.config\.json\.lock is .*, not a lock file: remove it"):
        update_card(folder)
    assert os.path.lexists(folder / ".config.json.lock")


def test_a_folder_in_place_of_a_file_stops_a_save_before_it_changes_anything(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(ee.AdapterError, match=rf"is unchanged: .*{WEIGHTS} is a folder"):
        branched("cifar-resnet20").save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() == before


def test_only_what_the_list_names_is_moved_to_its_place(folder: Path) -> None:
    files = listed(read_manifest(folder / CONFIG))
    ready = _ready(folder / CONFIG, files)
    ready.mkdir()
    (ready / CARD).write_text("prepared by someone else")
    (ready / ".env").write_text("prepared by someone else")
    with change_folder(folder, CONFIG) as change:
        change.data = read_manifest(folder / CONFIG)
    assert "someone else" not in (folder / CARD).read_text()
    assert not (folder / ".env").exists()
    assert not ready.exists()


def test_reading_does_not_walk_through_a_link(folder: Path, victim: Path) -> None:
    (folder / ".config.json.0000000000000000.new").symlink_to(victim)  # or to /, for hours
    assert _state(folder / CONFIG)[1] == []


def test_names_that_no_system_can_open_are_left_out_of_a_list() -> None:
    assert not listed({"files": dict.fromkeys(["a\0b", "\ud800", ".", "", "../x", "/x", "a/../../x"], "0")})
    assert not listed({"files": {f"{i}": "0" for i in range(100_000)}})


# --- what is uploaded


def _listed(folder: Path, *names: str) -> None:
    """Write the names into the list, with the digests of what is there."""
    data = read_manifest(folder / CONFIG)
    for name in names:
        path = folder / name
        data["files"][name] = sha256(path) if path.is_file() else "0" * 64
    (folder / CONFIG).write_text(json.dumps(sealed(data)))


def test_only_names_that_an_adapter_can_have_are_uploaded(folder: Path) -> None:
    names = [".env", ".git/config", ".cache/token", "notes.txt", "model.safetensors", "assets/other.png"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)
    before = own_files(folder)
    assert not before.keys() & set(names)
    _listed(folder, *names)
    with pytest.warns(UserWarning, match=r"no adapter can have.*\.cache/token"):
        found = own_files(folder)
    assert found.keys() == before.keys()


@pytest.mark.parametrize("plant", [_link(CARD, "ssh/key"), _hard_link(CARD), _link("assets", ""),
                                   _link("assets/frontier.png", "frontier.png"),
                                   _link(PROCESSOR, "ssh/key")])  # fmt: skip
def test_no_file_of_another_place_is_uploaded(plant: Plant, folder: Path, victim: Path) -> None:
    plant(folder, victim)
    with pytest.warns(UserWarning, match=r"is left out: .*(link|hard link)"):
        found = own_files(folder)
    assert all(SECRET not in path.read_text(errors="replace") for path in found.values())
    assert {CONFIG, WEIGHTS, "frontier.json"} <= found.keys()


def test_the_push_itself_uploads_no_secret(folder: Path, victim: Path, hub: Hub) -> None:
    (folder / ".env").write_text(SECRET)
    _link(CARD, "ssh/key")(folder, victim)
    with pytest.warns(UserWarning, match=r"README.md is left out"):
        hub_folder.push_folder(folder, "user/name")
    files = hub.files("user/name")
    assert WEIGHTS in files
    assert not any(SECRET.encode() in content for content in files.values())


def test_links_to_the_listed_contents_are_taken_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    before = {name: path.read_bytes() for name, path in own_files(folder).items()}
    for name in before:
        blob = tmp_path / hashlib.sha256(name.encode()).hexdigest()
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)
    assert {name: path.read_bytes() for name, path in own_files(folder).items()} == before


def test_a_card_changed_by_hand_is_uploaded_as_it_is(folder: Path) -> None:
    (folder / CARD).write_text("a card of my own")
    assert own_files(folder)[CARD].read_text() == "a card of my own"


def test_a_listed_file_that_is_missing_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ee.AdapterError, match=rf"{WEIGHTS}.*is missing"):
        own_files(folder)


# --- what is downloaded


def test_files_too_large_to_be_what_they_say_are_not_downloaded(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("user/name", {name: path.read_bytes() for name, path in own_files(folder).items()})
    assert hub_folder.fetch("user/name").is_dir()
    hub.put("user/name", {"frontier.json": b" " * 100_000})
    hub.log.clear()
    monkeypatch.setitem(hub_folder._LARGEST, "frontier.json", 50_000)
    with pytest.raises(ee.HubError, match=r"frontier.json has 100,000 bytes; an adapter's has at most 50,000"):
        hub_folder.fetch("user/name")
    assert not hub.asked("/resolve/")


def test_pulling_copies_only_the_adapter_s_own_files(
    folder: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text(SECRET)
    _link(CARD, "ssh/key")(folder, victim)
    _link("more", "")(folder, victim)
    monkeypatch.setattr("ee_surgery.share.hub.fetch", lambda name, revision=None: folder)
    with pytest.warns(UserWarning, match="README.md is left out"):
        done = CliRunner().invoke(cli.app, ["pull", "user/name", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert SECRET not in _all_text(tmp_path / "out")
    assert own_files(tmp_path / "out").keys() == own_files(folder).keys()


# --- the image processor


def _vit() -> Any:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                                    image_size=32, patch_size=8)  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return Backbone(_vit())


@pytest.fixture(scope="module")
def vit_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, place = _vit(), tmp_path_factory.mktemp("vit")
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    return model, ee.augment(model, ["vit.layers.0"]).save_pretrained(place / "adapter", processor=processor)


def _reads(victim: Path) -> dict[str, Any]:
    """Settings with which a class of transformers copies a file of this machine into its own settings."""
    (victim.parent / "private.json").write_text(json.dumps({"0": {"name": SECRET, "isthing": True}}))
    return {
        "image_processor_type": "OneFormerImageProcessor",
        "repo_path": str(victim.parent),
        "class_info_file": "private.json",
    }


_ASKS = {
    "image_processor_type": "OneFormerImageProcessor",
    "repo_path": "evil/data",
    "class_info_file": "found_me.json",
}


def _put(folder: Path, content: str, listed_too: bool = True) -> None:
    (folder / PROCESSOR).write_text(content)
    if listed_too:
        _listed(folder, PROCESSOR)


def _all_text(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_a_class_that_reads_a_file_does_not_carry_it_into_the_next_save(
    vit_adapter: tuple[nn.Module, Path], tmp_path: Path, victim: Path
) -> None:
    model, place = vit_adapter
    folder = Path(shutil.copytree(place, tmp_path / "adapter"))
    _put(folder, json.dumps(_reads(victim)))
    assert SECRET in AutoImageProcessor.from_pretrained(folder).to_json_string()  # the trap works
    with pytest.warns(UserWarning, match=r"left out.*OneFormerImageProcessor.*needs ViTImageProcessor"):
        loaded = ee.from_pretrained(folder, model)
    assert loaded.processor is None
    assert SECRET not in _all_text(loaded.save_pretrained(tmp_path / "again"))


def test_no_class_asks_the_hub_for_what_a_setting_names(
    vit_adapter: tuple[nn.Module, Path], tmp_path: Path, hub: Hub
) -> None:
    model, place = vit_adapter
    folder = Path(shutil.copytree(place, tmp_path / "adapter"))
    _put(folder, json.dumps(_ASKS))
    with pytest.raises(OSError, match="Hub"):
        AutoImageProcessor.from_pretrained(folder)
    assert hub.asked("evil/data")  # the trap works
    hub.log.clear()
    with pytest.warns(UserWarning, match="left out"):
        loaded = ee.from_pretrained(folder, model)
    with pytest.raises(ee.DataError, match="your own transform"):
        loaded.transform()
    loaded.save_pretrained(tmp_path / "again")
    assert not hub.log


def test_a_base_s_own_repository_is_believed_no_more(tmp_path: Path, victim: Path) -> None:
    _vit().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / PROCESSOR).write_text(json.dumps(_reads(victim)))
    assert SECRET in AutoImageProcessor.from_pretrained(tmp_path / "base").to_json_string()  # the trap works
    model = ee.augment(transformers.ViTForImageClassification.from_pretrained(tmp_path / "base"), ["vit.layers.0"])
    with pytest.raises(ee.DataError, match=r"cannot be loaded.*OneFormerImageProcessor"):
        model.transform()
    assert SECRET not in _all_text(model.save_pretrained(tmp_path / "adapter"))


@pytest.mark.parametrize("extra", ["processor_config.json", "tokenizer_config.json", "video_preprocessor_config.json"])
def test_no_other_file_says_how_pictures_are_prepared(extra: str, vit: Backbone, tmp_path: Path, victim: Path) -> None:
    settings = _reads(victim)
    (tmp_path / extra).write_text(json.dumps({**settings, "image_processor": settings}))
    data = {"model_type": "ee_surgery", "auto_map": {"AutoImageProcessor": "evil.Model"}, **settings}
    (tmp_path / CONFIG).write_text(json.dumps(data))
    (tmp_path / "evil.py").write_text("raise SystemExit")
    assert load_processor(tmp_path, {}, vit) is None
    (tmp_path / PROCESSOR).write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    found = load_processor(tmp_path, {}, vit)
    assert type(found) is ViTImageProcessor
    assert SECRET not in found.to_json_string()


OTHER_CLASSES = [
    {"image_processor_type": "Pix2StructImageProcessor"},
    {"image_processor_type": "OneFormerImageProcessorFast"},
    {"image_processor_type": "OneFormerImageProcessorPil"},
    {"feature_extractor_type": "OneFormerFeatureExtractor"},
    {"image_processor_type": "CLIPImageProcessor"},  # harmless, but not the base's
    {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": {"input_size": [3, 32, 32]}},
    {"image_processor_type": "AutoImageProcessor"},
    {"image_processor_type": "\x1b[2J"},
    {"image_processor_type": ["ViTImageProcessor"]},
    {"image_processor_type": 3},
    {"image_processor_type": "x" * 100_000},
]


@pytest.mark.parametrize("settings", OTHER_CLASSES, ids=lambda found: str(found)[:50])
def test_only_the_class_of_the_base_s_own_type_is_taken(
    settings: dict[str, Any], vit: Backbone, tmp_path: Path
) -> None:
    (tmp_path / PROCESSOR).write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="left out") as caught:
        assert load_processor(tmp_path, {}, vit) is None
    text = str(caught[0].message)
    assert text.isprintable()
    assert len(text) < 1000


@pytest.mark.parametrize("name", ["ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil",
                                  "ViTFeatureExtractor"])  # fmt: skip
def test_siblings_of_the_class_are_taken(name: str, vit: Backbone, tmp_path: Path) -> None:
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    settings = {key: name, "size": {"height": 24, "width": 20}, "auto_map": {"AutoImageProcessor": "evil.Model"}}
    (tmp_path / PROCESSOR).write_text(json.dumps(settings))
    found = load_processor(tmp_path, {}, vit)
    assert picture_transform(vit, processor=found)(PICTURE).shape == (3, 24, 20)


def test_other_classes_of_image_classifiers_are_for_bases_without_one_and_for_their_own_repositories(
    vit: Backbone,
) -> None:
    converted, plain = {"image_processor_type": "DeiTImageProcessor"}, nn.Linear(1, 1)
    with pytest.raises(ee.DataError, match=r"DeiTImageProcessor.*needs ViTImageProcessor"):
        build_processor(converted, vit.named)
    assert type(build_processor(converted, vit.named, related=True)) is transformers.DeiTImageProcessor
    assert type(build_processor(converted, plain)) is transformers.DeiTImageProcessor
    for settings in ({}, _ASKS, {"image_processor_type": "Pix2StructImageProcessor"}):
        with pytest.raises(ee.DataError, match="needs an image classifier's"):
            build_processor(settings, plain, related=True)


def test_saving_says_that_loading_will_not_take_a_processor_of_another_class(
    vit_adapter: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, place = vit_adapter
    loaded = ee.from_pretrained(place, model)
    with pytest.warns(UserWarning, match=r"loading will leave it out: .*CLIPImageProcessor.*ViTImageProcessor"):
        loaded.save_pretrained(tmp_path / "adapter", processor=CLIPImageProcessor())
    assert (tmp_path / "adapter" / PROCESSOR).exists()


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 1


BAD_SETTINGS: list[dict[str, Any]] = [
    {"size": {"height": 10**9, "width": 10**9}},
    {"size": LARGEST_SIDE + 1},
    {"size": "/etc/passwd"},
    {"size": {"height": "32"}},
    {"size": {"../x": 3}},
    {"crop_size": [1e300, 3]},
    {"crop_size": {"height": 5000, "width": 3}},
    {"image_mean": ["evil/repository"]},
    {"image_mean": [0.5] * 20_000},
    {"image_mean": _nested(50)},
    {"rescale_factor": 10**400},
    {"data_format": "evil/repository"},
    {"input_data_format": "gpt2"},
    {"resample": "bilinear"},
    {"do_resize": "yes"},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda found: str(found)[:40])
def test_settings_that_are_no_plain_ones_within_bounds_are_refused_and_named(
    settings: dict[str, Any], vit: Backbone, tmp_path: Path
) -> None:
    (tmp_path / PROCESSOR).write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **settings}))
    with pytest.warns(
        UserWarning, match=r"left out: .*(size|pixels|mean|std|factor|format|resample|do_resize)"
    ) as caught:
        assert load_processor(tmp_path, {}, vit) is None
    assert len(str(caught[0].message)) < 1000


@pytest.mark.parametrize("plant", ODD)
def test_odd_files_in_place_of_settings_are_left_out(
    plant: Callable[[Path], None], vit: Backbone, tmp_path: Path
) -> None:
    plant(tmp_path / PROCESSOR)
    with pytest.warns(UserWarning, match="left out"):
        assert load_processor(tmp_path, {}, vit) is None
    if plant is _device:
        (tmp_path / PROCESSOR).unlink()
        (tmp_path / PROCESSOR).write_text(" " * (2 << 20))
        with pytest.warns(UserWarning, match="left out: .*has 2097152 bytes"):
            assert load_processor(tmp_path, {}, vit) is None


def test_settings_that_the_class_does_not_have_are_left_out_and_named(vit: Backbone, tmp_path: Path) -> None:
    (tmp_path / PROCESSOR).write_text(json.dumps({"do_resize": False, "note": SECRET, "crop_pct": 1e-9}))
    with pytest.warns(UserWarning, match=r"no such settings; they are left out: 'note', 'crop_pct'"):
        found = load_processor(tmp_path, {}, vit)
    assert found.do_resize is False
    assert SECRET not in found.to_json_string()


def test_a_fraction_that_would_make_a_huge_picture_is_refused() -> None:
    base = SimpleNamespace(config=transformers.ConvNextConfig())
    with pytest.raises(ee.DataError, match="crop_pct"):
        build_processor({"size": {"shortest_edge": 224}, "crop_pct": 1e-9}, base)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ee.DataError, match="crop_pct"):
        build_processor({"crop_pct": 1e-9}, base)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "family", ["ViT", "ConvNext", "DeiT", "ImageGPT", "Siglip2", "Beit", "EfficientNet", "MobileViT"]
)
def test_what_transformers_saves_is_built_again_as_it_was(family: str, tmp_path: Path) -> None:
    more = {"clusters": [[i / 512, 0.5, -0.5] for i in range(512)]} if family == "ImageGPT" else {}
    processor = getattr(transformers, f"{family}ImageProcessor")(**more)
    processor.save_pretrained(tmp_path)
    base = SimpleNamespace(config=getattr(transformers, f"{family}Config")())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = build_processor(json.loads((tmp_path / PROCESSOR).read_text()), base)  # pyright: ignore[reportArgumentType]
    assert type(found) is type(processor)
    assert found.to_json_string() == processor.to_json_string()


def test_settings_that_do_not_fit_each_other_are_an_error_of_ours_at_the_first_picture(vit: Backbone) -> None:
    transform = picture_transform(vit, processor=build_processor({"image_mean": [0.5] * 7}, vit.named))
    with pytest.raises(ee.DataError, match=r"ViTImageProcessor cannot process an image of \(40, 50\)"):
        transform(PICTURE)


_words = st.sampled_from(
    ["", "channels_first", "height", "gpt2", "/etc/passwd", "evil/x", "\x1b[2J", "image_processor_type"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=2),
    max_leaves=6,
)
_KNOWN = ["size", "crop_size", "crop_pct", "image_mean", "data_format", "do_resize"]


@given(st.dictionaries(st.sampled_from(_KNOWN) | _words, _json, max_size=3))
def test_no_text_but_two_words_and_no_large_side_comes_through(settings: dict[str, Any]) -> None:
    try:
        arguments, _ = processor_arguments(settings, _KNOWN)
    except ee.DataError:
        return
    text = json.dumps(arguments, allow_nan=False)  # finite
    assert arguments.keys() <= set(_KNOWN)
    leaves: list[Any] = [arguments]
    for leaf in leaves:
        leaves.extend(leaf.values() if isinstance(leaf, dict) else leaf if isinstance(leaf, list) else ())
        assert not isinstance(leaf, str) or leaf in ("channels_first", "channels_last"), text
        assert not isinstance(leaf, int | float) or abs(leaf) <= 1e6, text


# --- timm's settings

GOOD = {"input_size": [3, 64, 48], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9,
        "crop_mode": "squash"}  # fmt: skip
BAD_PREPROCESSING: list[Any] = [
    [],
    "evil/repository",
    {**GOOD, "tf_preprocessing": True, "use_prefetcher": True},
    {**GOOD, "separate": True},
    {**GOOD, "auto_augment": "x" * 100_000},
    {**GOOD, "input_size": [3, 10**6, 10**6]},
    {**GOOD, "input_size": [3, 64]},
    {**GOOD, "input_size": [3, 64, True]},
    {**GOOD, "input_size": [3, 64, 0.5]},
    {**GOOD, "input_size": 64},
    {**GOOD, "crop_pct": 1e-9},
    {**GOOD, "crop_pct": 0},
    {**GOOD, "crop_pct": 5},
    {**GOOD, "crop_pct": "1"},
    {**GOOD, "crop_pct": float("nan")},
    {**GOOD, "interpolation": "/etc/passwd"},
    {**GOOD, "interpolation": ["bilinear"]},
    {**GOOD, "crop_mode": "none"},
    {**GOOD, "mean": [float("inf")] * 3},
    {**GOOD, "mean": [0.5] * 2},
    {**GOOD, "mean": "abc"},
    {**GOOD, "std": [0.0] * 3},
    {**GOOD, "std": [1e-300] * 3},
    {**GOOD, "std": [10**400] * 3},
]


@pytest.mark.parametrize("settings", BAD_PREPROCESSING, ids=lambda found: str(found)[-40:])
def test_settings_of_timm_s_transforms_out_of_bounds_are_left_out(settings: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`preprocessing` cannot be used") as caught:
        assert load_preprocessing(tmp_path, settings) is None
    assert len(str(caught[0].message)) < 1000


def test_settings_of_timm_s_transforms_are_taken_as_they_are(tmp_path: Path) -> None:
    assert load_preprocessing(tmp_path, GOOD) == GOOD
    assert load_preprocessing(tmp_path, None) is None
    for mean in ([0.5], (0.1, 0.2, 0.3)):
        assert check_preprocessing({**GOOD, "mean": mean})["mean"] == mean
    assert check_preprocessing({"crop_pct": 0.5}) == {"crop_pct": 0.5}


def test_an_adapter_with_hostile_settings_prepares_pictures_as_the_base_says(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=5).eval()
    branched = ee.augment(model, 2)
    wanted = branched.transform()(PICTURE)
    branched.preprocessing = {**GOOD, "input_size": [3, 10**6, 10**6]}
    folder = branched.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="`preprocessing` cannot be used"):
        loaded = ee.from_pretrained(folder, model)
    assert (loaded.transform()(PICTURE) == wanted).all()
    again = read_manifest(loaded.save_pretrained(tmp_path / "again") / CONFIG)
    assert again["preprocessing"] == again["pretrained_cfg"] == loaded.preprocessing
