"""The Hub: the real client against a server of our own; what goes wrong says so and leaves nothing half done."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load, load_model, save_model
from torch import nn

import ee_surgery as ee
from ee_surgery.backbone.base import Backbone
from ee_surgery.files import sealed
from ee_surgery.share.adapter import CONFIG
from ee_surgery.share.hub import FILES, push_folder
from tests import ROOT
from tests.hub_program import Net, X, base
from tests.hub_server import Hub
from tests.zoo import BY_NAME, original

REPO = "user/name"
WEIGHTS = "ee_adapter.safetensors"


def make(seed: int = 0) -> ee.EarlyExitModel:
    """Branches with weights from a seed, not calibrated."""
    return ee.augment(base(), ["blocks.0", "blocks.1"], branch="mlp", sample=X[:4], seed=seed)


@pytest.fixture(scope="module")
def model() -> ee.EarlyExitModel:
    """Calibrated, at a point where samples leave at every exit; shared: it stays as it is."""
    made = make()
    frontier = ee.calibrate(made, [X])
    made.operate(frontier[len(frontier) // 2])
    assert set(made.predict(X).exit_index.tolist()) == {0, 1, 2}
    return made


@pytest.fixture(scope="module")
def plain() -> ee.EarlyExitModel:
    """Not calibrated, and so without a plot, which takes a second to draw; shared too."""
    return make(seed=1)


@pytest.fixture(scope="module")
def files(model: ee.EarlyExitModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What it saves."""
    folder = model.save_pretrained(tmp_path_factory.mktemp("hub") / "adapter")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _folder(files: dict[str, bytes], to: Path) -> Path:
    for name, content in files.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


def _edited(files: dict[str, bytes], change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    change(config)
    return {**files, "config.json": json.dumps(sealed(config)).encode()}


def _load(repo: str = REPO, **options: Any) -> ee.EarlyExitModel:
    return ee.from_pretrained(repo, base(), **options)


def _same(one: ee.EarlyExitModel, other: ee.EarlyExitModel) -> None:
    mine, theirs = one.predict(X), other.predict(X)
    assert mine.exit_index.tolist() == theirs.exit_index.tolist()
    assert torch.equal(mine.logits, theirs.logits)


# --- there and back


@pytest.mark.slow  # test_adapter loads in a fresh process, too
def test_a_fresh_process_loads_by_repository_and_revision_and_offline(
    hub: Hub, model: ee.EarlyExitModel, tmp_path: Path
) -> None:
    model.push_to_hub(REPO)
    first = hub.history(REPO)[-1]
    later = make(seed=1)
    later.operate(thresholds=0.115)
    later.push_to_hub(REPO)
    expected = [(answer.logits, answer.exit_index) for answer in (model.predict(X), later.predict(X))]
    out = tmp_path / "answers.pt"
    command = [sys.executable, "-m", "tests.hub_program", str(out), REPO, first, "main"]
    for offline in ("0", "1"):
        if offline == "1":  # with the very cache that the first process filled, and no server to ask
            hub.stop()
        environment = {**os.environ, "HF_HUB_OFFLINE": offline}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        for (logits, exits), (expected_logits, expected_exits) in zip(
            torch.load(out, weights_only=True), expected, strict=True
        ):
            assert exits.tolist() == expected_exits.tolist()
            assert torch.equal(logits, expected_logits)
        out.unlink()


def test_a_push_is_one_commit_and_replaces_the_adapter_before_it(hub: Hub, model: ee.EarlyExitModel) -> None:
    model.push_to_hub(REPO)
    (_, first) = hub.history(REPO)  # making the repository is a commit too
    hub.put(REPO, {"notes.md": b"mine"})
    assert "frontier.json" in hub.files(REPO)
    bare = make(seed=1)
    link = bare.push_to_hub(REPO, message="Other branches, not calibrated")
    (*before, second) = hub.history(REPO)
    assert link.endswith(second)
    assert len(before) == 3
    assert hub.repos[REPO].commits[second].title == "Other branches, not calibrated"
    assert "frontier.json" not in hub.files(REPO)
    assert "assets/frontier.png" not in hub.files(REPO)
    assert hub.files(REPO)["notes.md"] == b"mine"
    assert not any(name.endswith(".partial") or "adapter_config" in name for name in hub.files(REPO))
    loaded = _load()
    assert loaded.frontier is None
    _same(loaded, bare)
    _same(_load(revision=first), model)


def test_a_card_that_was_written_by_hand_on_the_hub_is_kept(hub: Hub) -> None:
    plain = make()
    plain.push_to_hub(REPO)
    hub.put(REPO, {"README.md": b"# Mine\n"})
    with pytest.warns(UserWarning, match="README not written by ee_surgery"):
        plain.push_to_hub(REPO, license="mit")
    assert hub.files(REPO)["README.md"] == b"# Mine\n"
    assert json.loads(hub.files(REPO)["config.json"])["provenance"]["card"]["license"] == "mit"


def test_pushing_the_same_again_commits_nothing(hub: Hub, model: ee.EarlyExitModel) -> None:
    link = model.push_to_hub(REPO)
    assert model.push_to_hub(REPO) == link
    assert len(hub.history(REPO)) == 2


def test_a_branch_is_made_and_leaves_the_main_one_alone(
    hub: Hub, plain: ee.EarlyExitModel, files: dict[str, bytes]
) -> None:
    hub.put(REPO, files)
    main = hub.history(REPO)
    for _ in range(2):
        plain.push_to_hub(REPO, revision="next")
    assert hub.history(REPO) == main
    assert len(hub.history(REPO, "next")) == len(main) + 1
    _same(_load(revision="next"), plain)


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, plain: ee.EarlyExitModel, files: dict[str, bytes]) -> None:
    hub.put(REPO, files)
    before = hub.history(REPO)
    assert "/discussions/" in plain.push_to_hub(REPO, create_pr=True, token="hf_other")
    assert hub.history(REPO) == before
    _same(_load(revision="refs/pr/1"), plain)


def test_a_private_repository_is_for_its_owner(hub: Hub, plain: ee.EarlyExitModel) -> None:
    plain.push_to_hub(REPO, private=True)
    for token in (False, "hf_other"):
        with pytest.raises(ee.HubError, match=r"private and this token has no access.*token="):
            _load(token=token)
    _same(_load(token="hf_user"), plain)


def test_the_cache_serves_where_the_hub_cannot(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put(REPO, files)
    loaded = _load(cache_dir=tmp_path / "mine")
    assert not Path(constants.HF_HUB_CACHE).exists()  # nor anything else in the usual place
    hub.log.clear()
    _same(_load(cache_dir=tmp_path / "mine", local_files_only=True), loaded)
    assert not hub.log
    hub.stop()
    _same(_load(cache_dir=tmp_path / "mine"), loaded)
    for options in ({}, {"local_files_only": True}, {"cache_dir": tmp_path / "other"}):
        with pytest.raises(ee.HubError, match=r"Cannot load user/name .*in the cache.*cannot be reached"):
            _load(**options)


def test_a_transformers_base_comes_from_the_hub_at_its_own_revision(hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    config = BY_NAME["hf-ViT"].make().config
    evil = {"modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": _bomb(tmp_path)}
    networks = []
    for number in range(2):
        network = type(original("hf-ViT"))(config)  # pyright: ignore[reportCallIssue]
        networks.append(network)
        network.save_pretrained(tmp_path / str(number))
        saved = {path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()}
        settings = json.loads(saved["config.json"])
        settings["auto_map"] = {"AutoModelForImageClassification": "modeling_evil.Evil"}
        hub.put("user/base", {**saved, **evil, "config.json": json.dumps(settings).encode()})
        if number == 0:
            hub.repos["user/base"].private = True
            ee.augment(AutoModelForImageClassification.from_pretrained("user/base"), 2).push_to_hub(REPO)
    head = "classifier.weight"
    options = {"token": "hf_user", "cache_dir": tmp_path / "mine"}
    for more in ({}, {"local_files_only": True}):
        loaded = ee.from_pretrained(REPO, **options, **more)
        assert torch.equal(loaded.backbone.get_parameter(head), networks[0].get_parameter(head))
    with pytest.raises(ee.FingerprintError):  # the same name, another revision
        ee.from_pretrained(REPO, AutoModelForImageClassification.from_pretrained("user/base"))
    with pytest.raises(ee.AdapterError, match=r"(?s)transformers could not create the base user/base.*model="):
        ee.from_pretrained(REPO, token="hf_other", cache_dir=tmp_path / "other")
    assert not hub.asked("evil")
    assert not hub.asked("pytorch_model.bin")


# --- what goes wrong


def _nothing_half_done(cache: Path) -> None:
    """No file of a broken download counts as one: not on disk, and not for a load that has no connection."""
    kept = [path.name for path in cache.rglob("*")]
    assert WEIGHTS not in kept
    assert not [name for name in kept if name.endswith((".incomplete", ".partial"))]
    with pytest.raises(ee.HubError, match="in the cache"):
        _load(local_files_only=True)


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("user/nothing", {}, r"Cannot load user/nothing \(not a folder here\): there is no such repository"),
        (REPO, {"revision": "v9"}, "at revision 'v9': the repository has no such revision"),
        (REPO, {"token": "hf_nobody"}, "No valid token: log in with `hf auth login`, or pass token="),
        ("runs/of mine/adapter", {}, "not a folder here.*not a repository id such as user/name"),
        ("user/gated", {"token": "hf_other"}, "access is gated"),
        ("user/empty", {}, "has no config.json"),
        ("user/vit", {}, "type 'vit'.*reads type 'ee_surgery'"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    repo: str, options: dict[str, Any], message: str, hub: Hub, files: dict[str, bytes]
) -> None:
    for name in (REPO, "user/gated"):
        hub.put(name, files)
    hub.repos["user/gated"].gated = True
    hub.create("user/empty")
    hub.put("user/vit", {"config.json": b'{"model_type": "vit"}'})
    kind = ee.AdapterError if "reads type" in message else ee.HubError
    with pytest.raises(kind, match=f"(?s){message}"):
        _load(repo, **options)


BROKEN_LOADS = {
    "the Hub fails": (lambda hub: hub.fail("GET", "/api/models", 500), "500 .*Try again later"),
    "the Hub forbids": (lambda hub: hub.fail("GET", "/api/models", 403), "403 .*This token has no permission"),
    "a file is forbidden": (lambda hub: hub.fail("HEAD", WEIGHTS, 403), "403 .*This token has no permission"),
    "a file fails": (lambda hub: hub.fail("GET", WEIGHTS, 503), "503 .*Try again later"),
    "the list of files breaks off": (lambda hub: hub.cut("GET", "/tree/", after=20), "Check the connection"),
    "no byte of a file comes": (lambda hub: hub.cut("GET", WEIGHTS), "Check the connection"),
    "no answer at all": (lambda hub: hub.mishear("HEAD", WEIGHTS), "Check the connection|cannot be reached"),
}


@pytest.mark.parametrize("what", BROKEN_LOADS)
def test_a_broken_download_says_so_and_leaves_nothing_half_done(what: str, hub: Hub, files: dict[str, bytes]) -> None:
    harm, message = BROKEN_LOADS[what]
    hub.put(REPO, files)
    harm(hub)
    with pytest.raises(ee.HubError, match=f"(?s)Cannot load user/name.*{message}"):
        _load()
    _nothing_half_done(Path(constants.HF_HUB_CACHE))
    hub.mend()
    assert _load().exits == ["blocks.0", "blocks.1"]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: Hub, model: ee.EarlyExitModel, files: dict[str, bytes]
) -> None:
    hub.put(REPO, files)
    hub.cut("GET", WEIGHTS, after=1000, times=2)
    _same(_load(), model)
    assert len(hub.asked(WEIGHTS, "GET")) == 3


@contextmanager
def _no_room(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size`: the kernel refuses, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1000, 10_000])
def test_a_full_disk_on_loading_says_so_and_leaves_nothing_half_done(
    room: int, hub: Hub, files: dict[str, bytes]
) -> None:
    hub.put(REPO, files)
    with _no_room(room), pytest.raises(ee.HubError, match="not enough disk space"):
        _load()
    _nothing_half_done(Path(constants.HF_HUB_CACHE))
    assert _load().exits == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("room", [0, 1000, 10_000])
def test_a_full_disk_on_pushing_says_so_and_pushes_nothing(
    room: int, hub: Hub, model: ee.EarlyExitModel, tmp_path: Path
) -> None:
    with _no_room(room), pytest.raises((ee.AdapterError, ee.HubError), match=r"(?i)no room|too large"):
        model.push_to_hub(REPO)
    assert not hub.repos
    with _no_room(room), pytest.raises(ee.AdapterError):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.partial*"))


BROKEN_PUSHES = {
    "another's name space": (lambda hub: None, {"token": "hf_other"}, "403.*This token has no permission"),
    "no token": (lambda hub: None, {"token": False}, "No valid token"),
    "a wrong token": (lambda hub: None, {"token": "hf_nobody"}, "No valid token"),
    "the Hub fails": (lambda hub: hub.fail("POST", "/preupload/", 500), {}, "500.*Try again later"),
    "no right to write": (lambda hub: hub.fail("POST", "/preupload/", 403), {}, "403.*This token has no permission"),
    "no place for weights": (lambda hub: hub.fail("POST", "/objects/batch", 500), {}, "500.*Try again later"),
    "weights are forbidden": (lambda hub: hub.fail("PUT", "/lfs/", 403), {}, "403.*This token has no permission"),
    "weights break off": (lambda hub: hub.cut("PUT", "/lfs/", after=500), {}, "Check the connection"),
    "the commit breaks off": (lambda hub: hub.cut("POST", "/commit/", after=500), {}, "Check the connection"),
    "the commit is forbidden": (lambda hub: hub.fail("POST", "/commit/", 403), {}, "403.*This token has no permission"),
    "no connection": (Hub.stop, {}, "Check the connection"),
}


@pytest.mark.parametrize("what", BROKEN_PUSHES)
def test_a_broken_push_says_so_and_leaves_the_repository_as_it_was(
    what: str, hub: Hub, plain: ee.EarlyExitModel, files: dict[str, bytes]
) -> None:
    harm, options, message = BROKEN_PUSHES[what]
    hub.put(REPO, {**files, WEIGHTS: b"before"})
    before, history = hub.files(REPO), hub.history(REPO)
    harm(hub)
    with pytest.raises(ee.HubError, match=f"(?s)Cannot push to user/name: .*{message}"):
        plain.push_to_hub(REPO, **options)
    assert hub.files(REPO) == before
    assert hub.history(REPO) == history
    hub.mend()
    if what == "no connection":
        hub.start()
    plain.push_to_hub(REPO)
    stored, expected = load(hub.files(REPO)[WEIGHTS]), plain.branches.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert len(hub.history(REPO)) == len(history) + 1


def test_who_may_not_make_repositories_may_write_to_one_that_is_there(hub: Hub, plain: ee.EarlyExitModel) -> None:
    hub.fail("POST", "/repos/create", 403)
    with pytest.raises(ee.HubError, match=r"(?s)403.*This token has no permission"):
        plain.push_to_hub(REPO)
    hub.create(REPO)
    plain.push_to_hub(REPO)
    assert WEIGHTS in hub.files(REPO)


def test_an_upload_that_breaks_off_is_tried_again(hub: Hub, plain: ee.EarlyExitModel) -> None:
    hub.cut("PUT", "/lfs/", after=500, times=2)
    hub.fail("POST", "/preupload/", 503, times=1)
    plain.push_to_hub(REPO)
    assert len(hub.history(REPO)) == 2
    _same(_load(), plain)


def test_a_lost_answer_to_a_commit_makes_no_second_one(hub: Hub, plain: ee.EarlyExitModel) -> None:
    hub.mishear("POST", "/commit/", times=1)
    with pytest.raises(ee.HubError, match="Check the connection"):
        plain.push_to_hub(REPO)
    assert len(hub.history(REPO)) == 2
    plain.push_to_hub(REPO)
    assert len(hub.history(REPO)) == 2
    _same(_load(), plain)


def test_an_upload_through_xet_that_fails_leaves_the_repository_as_it_was(
    hub: Hub, plain: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ee.HubError, match="Cannot push to user/name"):  # this Hub has no xet
        plain.push_to_hub(REPO)
    assert hub.asked("xet-write-token")
    assert len(hub.history(REPO)) == 1


@pytest.mark.parametrize("repo", ["a/b/c", "user/my adapter", "user/-"])
def test_a_push_to_no_repository_id_says_so(repo: str, hub: Hub, model: ee.EarlyExitModel) -> None:
    with pytest.raises((ee.HubError, ee.ConfigError), match=f"{repo}"):
        model.push_to_hub(repo)
    assert not hub.log


# --- other versions, and what does not belong there


def test_newer_keys_and_newer_formats_are_refused(hub: Hub, files: dict[str, bytes]) -> None:
    def newer(config: dict[str, Any]) -> None:
        config["sparkle"] = 1
        config["base"]["aura"] = "blue"
        config["exits"][0]["mood"] = {"of": "the exit"}

    hub.put(REPO, _edited(files, newer))
    with pytest.raises(ee.AdapterError, match=r"'(sparkle|base.aura|exits.0.mood)': Extra"):
        _load()
    hub.put(REPO, _edited(files, lambda config: config.update(format_version=config["format_version"] + 1)))
    with pytest.raises(ee.AdapterError, match="upgrade"):
        _load()


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def _bomb(folder: Path) -> bytes:
    """A pickle that leaves a mark where it is loaded."""
    return pickle.dumps(_Bomb(folder / "exploded"))


def test_nothing_executable_is_downloaded_or_read(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    bomb, code = _bomb(tmp_path), f"open({str(tmp_path / 'exploded')!r}, 'w')".encode()
    evil = dict.fromkeys(("pytorch_model.bin", "ee_adapter.pkl", "ee_adapter.pt", "training_args.bin"), bomb)
    evil |= dict.fromkeys(("modeling_evil.py", "config.py", "sub/config.json", "__init__.py"), code)
    hub.put(REPO, {**files, **evil})
    _load()
    asked = {path.partition("/resolve/")[2].partition("/")[2] for path in hub.asked("/resolve/")}
    assert {"config.json", WEIGHTS, "frontier.json"} <= asked <= set(FILES)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it does go off


def test_a_pickle_in_place_of_the_weights_is_refused(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put(REPO, {**files, WEIGHTS: _bomb(tmp_path)})
    with pytest.raises(ee.AdapterError, match="missing or damaged"):
        _load()
    assert not (tmp_path / "exploded").exists()


# --- the base


def _perturbed(number: int) -> Net:
    """The base but for one thing: a value by one step, a sign, all values, the head."""
    generator = torch.Generator().manual_seed(number)
    if number % 4 == 2:
        return base(seed=100 + number)
    net = base(classes=10 + number % 8 // 4)
    if number % 4 == 3:
        net.head.load_state_dict(base(seed=100 + number, classes=net.head.out_features).head.state_dict())
        return net
    tensors = list(net.state_dict().values())
    flat = tensors[int(torch.randint(len(tensors), (), generator=generator))].view(-1)
    at = int(torch.randint(len(flat), (), generator=generator))
    if not flat.is_floating_point():
        flat[at] += 1
    else:
        flat[at] = -flat[at] if number % 4 == 1 else torch.nextafter(flat[at], flat[at] + 1)
    return net


def test_200_wrong_bases_of_200_are_refused_with_both_fingerprints(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = _folder(files, tmp_path)
    right = Backbone(base(), X[:4]).identity().fingerprint
    refused = 0
    for number in range(200):
        other = _perturbed(number)
        with pytest.raises(ee.FingerprintError) as caught:
            ee.from_pretrained(folder, other)
        assert right in str(caught.value)
        assert Backbone(other, X[:4]).identity().fingerprint in str(caught.value)
        refused += 1
    assert refused == 200


@contextmanager
def _one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_the_right_base_is_never_refused(model: ee.EarlyExitModel, files: dict[str, bytes], tmp_path: Path) -> None:
    folder = _folder(files, tmp_path)
    last = base().to(memory_format=torch.channels_last)
    assert last.blocks[1][0].weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    torch.testing.assert_close(ee.from_pretrained(folder, last).predict(X).logits, model.predict(X).logits)

    save_model(base(), str(tmp_path / "base.safetensors"))
    read = base(seed=9)
    load_model(read, str(tmp_path / "base.safetensors"))
    _same(ee.from_pretrained(folder, read), model)

    with _one_process():
        wrapped = nn.parallel.DistributedDataParallel(base())
        for given in (wrapped.module, wrapped):
            loaded = ee.from_pretrained(folder, given)
            assert loaded.backbone is wrapped.module
            _same(loaded, model)


def test_another_base_on_request_warns_and_is_remembered(files: dict[str, bytes], tmp_path: Path) -> None:
    folder, other = _folder(files, tmp_path / "adapter"), base(seed=5)
    trained_on = Backbone(base(), X[:4]).identity().fingerprint
    with pytest.warns(UserWarning, match="calibrate again"):
        taken = ee.from_pretrained(folder, other, other_base=True)
    assert taken.backbone is other
    again = ee.from_pretrained(taken.save_pretrained(tmp_path / "again"), base(seed=5))
    for one in (taken, again):
        assert one.provenance["other_base"]["trained_on"] == trained_on
    with pytest.raises(ee.FingerprintError):
        ee.from_pretrained(tmp_path / "again", base())


def test_the_adapter_holds_nothing_of_the_base(files: dict[str, bytes]) -> None:
    mine = load(files[WEIGHTS])
    for name, tensor in base().state_dict().items():
        if tensor.numel() > 8 and len(tensor.unique()) > 1:
            everywhere = [path for path, content in files.items() if tensor.numpy().tobytes() in content]
            assert not everywhere, f"{name} of the base is in {everywhere}"
        assert not [key for key, own in mine.items() if own.numel() > 8 and torch.equal(own, tensor)]


def test_four_pool_exits_of_a_resnet56_are_small(tmp_path: Path) -> None:
    network = original("cifar-resnet56")
    save_model(network, str(tmp_path / "base.safetensors"))
    whole = (tmp_path / "base.safetensors").stat().st_size
    branched = ee.augment(network, 4, branch="pool", sample=BY_NAME["cifar-resnet56"].sample())
    folder = branched.save_pretrained(tmp_path / "adapter")
    adapter = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert adapter < 0.15 * whole


# --- whose files, whose repository


def test_only_the_adapters_own_files_are_pushed(hub: Hub, model: ee.EarlyExitModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "adapter")
    for name in (
        "notes.txt",
        ".config.json.lock",
        ".config.json.abc.partial/a",
        ".config.json.abc.new/b",
        "secret.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    push_folder(folder, REPO)
    own = {CONFIG, WEIGHTS, "README.md", "frontier.json", "assets/frontier.png"}
    assert own <= set(hub.files(REPO)) <= {*own, ".gitattributes"}
    (folder / WEIGHTS).write_bytes(b"other")
    with pytest.raises(ee.AdapterError, match=f"{WEIGHTS} is not the file"):
        push_folder(folder, "user/another")
    assert "user/another" not in hub.repos


@pytest.mark.parametrize("foreign", [CONFIG, "adapter_config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("revision", [None, "exits"])
def test_a_repository_of_another_model_is_left_alone(
    foreign: str, revision: str | None, hub: Hub, model: ee.EarlyExitModel
) -> None:
    model_files = {foreign: b'{"model_type": "vit"}', "notes.md": b"mine"}
    HfApi().create_repo(REPO)
    hub.put(REPO, model_files)
    commits = hub.history(REPO)
    with pytest.raises(ee.AdapterError, match=f"{REPO} holds {foreign}.*Nothing was uploaded"):
        model.push_to_hub(REPO, revision=revision)
    assert hub.history(REPO) == commits
    assert list(hub.repos[REPO].branches) == ["main"]


def test_a_branch_of_a_repository_is_made_and_pushed_to_again(hub: Hub, model: ee.EarlyExitModel) -> None:
    for _ in range(2):
        model.push_to_hub(REPO, revision="v1")
    _same(_load(revision="v1"), model)
