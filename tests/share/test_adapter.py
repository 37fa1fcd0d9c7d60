"""The adapter folder: the same model in a fresh process, damage and wrong bases refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import ee_surgery as ee
from benchmarks.mutations import edit
from tests import ROOT
from tests.zoo import BY_NAME, branched, original

LOADER = """
import sys, torch
import ee_surgery as ee
from tests.zoo import BY_NAME, original
name, folder = sys.argv[1:]
model = ee.from_pretrained(folder, original(name))
x = BY_NAME[name].sample(6)
with torch.no_grad():
    print(model.predict(x).exit_index.tolist())
torch.save(model.predict(x).logits, folder + "/../logits.pt")
"""


@pytest.mark.parametrize(
    "name",
    ["test_vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar-resnet20", "hf-Swin"))],
)
def test_save_and_load_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    model, x = branched(name), BY_NAME[name].sample(6)
    ee.calibrate(model, [x])
    frontier = model.frontier
    assert frontier is not None
    middle = frontier[len(frontier) // 2]
    model.operate(middle)
    folder = model.save_pretrained(tmp_path / "adapter")
    expected = model.predict(x)
    model.operate(None)
    model.frontier = None
    command = [sys.executable, "-c", LOADER, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.exit_index.tolist()
    again = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(again, expected.logits, rtol=0, atol=0 if name == "cifar-resnet20" else 1e-5)


def _saved(tmp_path: Path) -> Path:
    model = branched("cifar-resnet20")
    return model.save_pretrained(tmp_path / "adapter")


def test_the_folder_holds_branches_only(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "ee_adapter.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "ee_surgery"
    assert config["base"]["library"] == "torch"
    with safe_open(folder / "ee_adapter.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["fingerprint"] == config["base"]["fingerprint"]
    assert names == set(branched("cifar-resnet20").branches.state_dict())


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    other = BY_NAME["cifar-resnet20"].make()
    mine = json.loads((folder / "config.json").read_text())["base"]["fingerprint"]
    with pytest.raises(ee.FingerprintError) as caught:
        ee.from_pretrained(folder, other)
    assert mine in str(caught.value)
    assert ee.inspect(other, torch.randn(3, 3, 32, 32)).backbone.identity().fingerprint in str(caught.value)


def test_one_changed_buffer_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    other = BY_NAME["cifar-resnet20"].make()
    other.load_state_dict(original("cifar-resnet20").state_dict())
    assert ee.from_pretrained(folder, other).exits == branched("cifar-resnet20").exits
    other.get_buffer("bn1.running_mean")[3] += 1e-6
    with pytest.raises(ee.FingerprintError):
        ee.from_pretrained(folder, other)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated weights": (lambda f: _truncate(f / "ee_adapter.safetensors"), "missing or damaged"),
    "no weights": (lambda f: (f / "ee_adapter.safetensors").unlink(), "missing or damaged"),
    "truncated config": (lambda f: _truncate(f / "config.json"), "missing or damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "missing or damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "contains a list"),
    "a field gone": (lambda f: edit(f, lambda d: d.pop("exits")), "damaged: 'exits': Field required"),
    "other fingerprint": (
        lambda f: edit(f, lambda d: d["base"].update(fingerprint="0" * 64)),
        "do not belong together",
    ),
    "other format": (lambda f: edit(f, lambda d: d.update(format_version=99)), "format '99'.*upgrade"),
    "fewer exits": (lambda f: edit(f, lambda d: d["exits"].pop()), "does not use"),
    "unknown exit": (
        lambda f: edit(f, lambda d: d["exits"][0].update(name="layer7")),
        "No exit point 'layer7'",
    ),
    "other branch": (
        lambda f: edit(f, lambda d: d["exits"][0]["branch"].update(name="mlp")),
        "has no tensor|has shape|does not use",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(ee.SurgeryError, match=message):
        ee.from_pretrained(folder, original("cifar-resnet20"))


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ee.HubError, match=r"not a folder here\): it is not a repository id such as user/name"):
        ee.from_pretrained(tmp_path / "nothing")


def test_a_plain_module_has_to_be_passed(tmp_path: Path) -> None:
    with pytest.raises(ee.AdapterError, match=r"plain torch module.*model="):
        ee.from_pretrained(_saved(tmp_path))


def test_saving_again_replaces_everything(tmp_path: Path) -> None:
    model = branched("cifar-resnet20")
    ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    folder = model.save_pretrained(tmp_path / "a")
    assert (folder / "frontier.json").exists()
    model.frontier = None
    model.save_pretrained(folder)
    assert not (folder / "frontier.json").exists()
    assert not list(folder.glob("*.partial*"))


def test_no_folder_is_read_because_an_adapter_names_it(tmp_path: Path) -> None:
    model = original("hf-ViT")
    model.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    folder = ee.augment(base, 2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ee.AdapterError, match=r"an adapter may not name files to read.*model="):
        ee.from_pretrained(folder)
    assert ee.from_pretrained(folder, base).receipt().unchanged


def test_a_timm_base_that_cannot_be_fetched_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet")
    folder = ee.augment(model, 2).save_pretrained(tmp_path / "adapter")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ee.AdapterError, match=r"timm could not create the base .*no network.*model="):
        ee.from_pretrained(folder)


@pytest.mark.parametrize("method", ["stopping", "eenet", "classwise", "scaled", "most_confident"])
def test_fitted_policies_and_certificates_survive_the_folder(method: str, tmp_path: Path) -> None:
    model, x = branched("cifar-resnet20"), BY_NAME["cifar-resnet20"].sample(40)
    frontier = ee.calibrate(model, [x], method=method)
    model.operate(frontier[len(frontier) // 2])
    expected = model.predict(x)
    folder = model.save_pretrained(tmp_path / "adapter")
    again = ee.from_pretrained(folder, original("cifar-resnet20"))
    assert again.predict(x).exit_index.tolist() == expected.exit_index.tolist()
    assert len(again.frontier) == len(frontier)
    for one, other in zip(frontier, again.frontier, strict=True):
        assert one.thresholds == other.thresholds
        assert str(one.score) == str(other.score)
    model.operate(risk=(0.3, 0.2))
    certified = model.operating_point
    model.save_pretrained(folder)
    again = ee.from_pretrained(folder, original("cifar-resnet20"))
    assert again.operating_point.certificate == certified.certificate
    assert again.operate(risk=(0.3, 0.2)) == certified
    with pytest.raises(ee.OperatingPointError, match="accuracy_gap"):
        again.operate(risk=(0.3, 0.2), risk_of="accuracy_gap")  # no labels were there
