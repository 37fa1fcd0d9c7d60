"""The command line: every sub-command on real files, and its errors."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf  # pyright: ignore[reportPrivateImportUsage]
from typer.testing import CliRunner

import ee_surgery as ee
from ee_surgery.cli import app

runner = CliRunner()


def _run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file and a folder with two pictures in each of three classes."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=1000).state_dict(), folder / "weights.pt")
    for name in ("0", "7", "999"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(0, 256, (160, 160, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    return folder


def test_the_pipeline_command_by_command(files: Path, tmp_path: Path) -> None:
    pictures, weights = str(files / "pictures"), ["--checkpoint", str(files / "weights.pt")]
    adapter = str(tmp_path / "adapter")
    out = _run(
        "augment", "test_resnet", "--out", adapter, "--exits", "2", "--train", pictures, "--calibrate", pictures,
        "--epochs", "1", "--batch-size", "2", *weights,
    )  # fmt: skip
    assert "unchanged: all" in out
    assert "Frontier on 6 held-out samples" in out
    assert "agreement" in _run("calibrate", adapter, "--data", pictures, "--unlabelled", "--budget", "2", *weights)
    with pytest.warns(ee.SurgeryWarning, match="--policy is now --method"):
        _run("calibrate", adapter, "--data", pictures, "--policy", "shared", *weights)
    assert "of its MACs, 6 samples" in _run("evaluate", adapter, "--data", pictures, "--save", *weights)
    assert "## Measured" in (tmp_path / "adapter" / "README.md").read_text()
    assert "interleaved rounds" in _run("bench", adapter, "--data", pictures, "--samples", "2", *weights)
    results = tmp_path / "bench.csv"
    _run(
        "bench",
        adapter,
        "--data",
        pictures,
        "--samples",
        "4",
        "--batch-size",
        "1,2",
        "--results",
        str(results),
        *weights,
    )
    assert [line.split(",")[5] for line in results.read_text().splitlines()[1:]] == ["1", "1", "2", "2"]
    assert "report.html" in _run("report", adapter, "--data", pictures, *weights)
    assert "Classes" in (tmp_path / "adapter" / "report.html").read_text()
    assert "needs images" in _run("report", adapter, "--bench", *weights, code=1)
    out = _run("export", adapter, str(tmp_path / "int8.onnx"), "--quantize", "int8", *weights, code=1)
    assert "calibrate=, held-out data, together" in " ".join(out.split())
    assert "FingerprintError" in _run("evaluate", adapter, "--data", pictures, "--random-weights", code=1)


def test_a_fine_tuned_model_keeps_its_classes(files: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    save_for_hf(model, str(tmp_path / "local"))
    made, pictures = tmp_path / "in_python", str(files / "pictures")
    ee.augment(model, 2).save_pretrained(made)
    for weights in (str(tmp_path / "weights.pt"), f"local-dir:{tmp_path / 'local'}"):
        assert "6 held-out" in _run("calibrate", str(made), "--data", pictures, "--checkpoint", weights)
        assert "6 samples" in _run("evaluate", str(made), "--data", pictures, "--checkpoint", weights)
    out = _run("evaluate", str(made), "--data", pictures, "--checkpoint", str(files / "weights.pt"), code=1)
    assert "could not create test_resnet" in " ".join(out.split())
    adapter, told = tmp_path / "told", ["--train", pictures, "--calibrate", pictures, "--exits", "1", "--epochs", "1"]
    _run(
        "augment", "test_resnet", "--out", str(adapter), "--num-classes", "3", "--checkpoint",
        str(tmp_path / "weights.pt"), *told, "--lr", "0.002", "--seed", "7", "--views", "1", "--device", "cpu",
        "--precision", "no", "--batch-size", "3",
    )  # fmt: skip
    training = ee.from_pretrained(adapter, model).provenance["training"]
    assert [training[name] for name in ("lr", "seed", "views", "batch_size", "epochs")] == [0.002, 7, 1, 3, 1]
    named = ["augment", f"local-dir:{tmp_path / 'local'}", "--out", str(tmp_path / "named"), "--exits", "1"]
    assert "untrained: " in _run(*named)
    for device in ("cuda:99", "gpu"):
        assert f"--device '{device}' cannot be used" in _run(*named, "--device", device, code=1)


def test_exits_by_search_need_pictures_and_take_several_branches(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def search_exits(*_: object, **options: object) -> None:
        given.update(options)
        raise ee.ExitPointError("nothing pays")

    monkeypatch.setattr("ee_surgery.pipeline.search_exits", search_exits)
    pictures, out = str(files / "pictures"), str(tmp_path / "a")
    arguments = ["augment", "test_resnet", "--out", out, "--exits", "auto", "--random-weights", "--train", pictures]
    assert "give train= and calibrate=" in _run(*arguments, code=1)
    found = _run(
        *arguments, "--branch", "pool,mlp", "--unlabelled", "--calibrate", pictures, "--max-accuracy-drop", "0.05",
        "--epochs", "1", code=1,
    )  # fmt: skip
    assert "nothing pays" in found
    assert given["branch"] == ["pool", "mlp"]
    assert given["max_accuracy_drop"] == 0.05


def test_with_data_alone_effort_decides(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def fit(setting: Any, name: str, **options: Any) -> ee.EarlyExitModel:
        given.append({"name": name, **options})
        return ee.attach(setting.graph, ee.place(setting.graph, 1))

    monkeypatch.setattr("ee_surgery.pipeline.fit", fit)
    pictures = str(files / "pictures")
    arguments = ["augment", "test_resnet", "--out", str(tmp_path / "a"), "--random-weights", "--train", pictures]
    arguments += ["--unlabelled", "--calibrate", pictures]
    for more in ([], ["--exits", "auto"], ["--effort", "best", "--exits", "2"], ["--time-budget", "1"]):
        _run(*arguments, *more)
    assert [each["name"] for each in given[:3]] == ["standard", "standard", "best"]
    assert all(each["config"] is None for each in given)
    assert [each["plan"] is None for each in given] == [True, True, False, True]
    assert given[3]["minutes"] == 1
    assert "leave out --epochs" in _run(*arguments, "--effort", "best", "--epochs", "3", code=1)


def test_a_project_from_a_yaml_file(tmp_path: Path) -> None:
    text = "model: {name: test_resnet, pretrained: false, num_classes: 10, image_size: 32}\ndata: {source: synthetic}"
    (tmp_path / "mine.yaml").write_text(f"{text}\nexits: 2\nbranch: pool\ntrain: {{epochs: 2, validation: 0}}")
    arguments = ["train", "--config", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]
    assert "Original unchanged" in _run(*arguments, "--set", "train.epochs=1")
    model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(ee.FingerprintError):  # of other random weights
        ee.from_pretrained(tmp_path / "out" / "adapter", model)
    assert "has no setting 'epoch'" in _run(*arguments, "--set", "train.epoch=1", code=1)
    out = _run(*arguments, "--set", "model.library=tim", code=1)
    assert "library is 'tim', which is not known. Did you mean 'timm'?" in " ".join(out.split())


def test_help_ends_with_a_command_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("inspect", "augment"):
        example = _run(command, "--help").split("Example: ")[1].splitlines()[0]
        _run(*shlex.split(example)[1:])
    for command in ("calibrate", "evaluate", "bench", "export", "report", "card", "push", "pull", "demo"):
        assert f"Example: ee-surgery {command}" in _run(command, "--help")


def test_inspect_shows_blocks_or_everything() -> None:
    out = _run("inspect", "test_resnet", "--random-weights")
    assert "layer2" in out
    assert "If half of the samples left" in out
    assert "layer2.0.conv1" in _run("inspect", "test_resnet", "--random-weights", "--all")


def test_errors_are_one_sentence_and_exit_code_1(files: Path, tmp_path: Path) -> None:
    assert "Cannot create 'no_such_model'" in _run("inspect", "no_such_model", code=1)
    assert "Cannot load" in _run("evaluate", str(tmp_path / "none"), "--data", str(tmp_path), code=1)
    out = _run(
        "augment", "test_resnet", "--out", str(tmp_path / "a"), "--exits", "99", "--random-weights", code=1
    )  # fmt: skip
    assert "has no room for 99 exits" in out
    (tmp_path / "cats" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "cat" / "0.png")
    out = _run(
        "augment", "test_resnet", "--out", str(tmp_path / "b"), "--train", str(tmp_path / "cats"), "--random-weights",
        code=1,
    )  # fmt: skip
    assert "--unlabelled" in out


# --- pictures with masks


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of transformers in a folder of its own, and six pictures with masks of its four classes."""
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16,
        num_attention_heads=[1, 1, 2, 2],
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder / "model")
    size = {"height": 64, "width": 64}
    transformers.SegformerImageProcessor(size=size, do_reduce_labels=False).save_pretrained(folder / "model")
    made = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / "data" / part).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(made.integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(folder / "data/images" / f"{i}.png")
        mask = made.integers(0, 4, (48, 80), dtype=np.uint8)
        mask[0, 0] = 255
        Image.fromarray(mask).save(folder / "data/masks" / f"{i}.png")
    return folder


def test_a_segmenter_learns_and_is_measured_on_pictures_beside_masks(masked: Path, tmp_path: Path) -> None:
    model, data, adapter = str(masked / "model"), str(masked / "data"), str(tmp_path / "adapter")
    out = _run(
        "augment", model, "--out", adapter, "--exits", "1", "--train", data, "--calibrate", data, "--epochs", "1",
        "--batch-size", "2",
    )  # fmt: skip
    assert "unchanged: all" in out
    assert "pixel accuracy" in out
    base = ("--checkpoint", model)  # an adapter may not name folders
    evaluated = _run("evaluate", adapter, "--data", data, *base)
    assert "mean_iou" in evaluated
    assert "6 samples" in evaluated
    assert "agreement" in _run("evaluate", adapter, "--data", data, "--unlabelled", *base)
    assert "interleaved rounds" in _run("bench", adapter, "--data", data, "--samples", "2", *base)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: (data / "masks" / "3.png").unlink(), "1 of 6 pictures have no mask"),
        (lambda data: Image.new("RGB", (80, 48)).save(data / "masks" / "3.png"), "one channel"),
        (lambda data: Image.new("L", (81, 48)).save(data / "masks" / "3.png"), "81, 48"),
        (lambda data: Image.new("L", (80, 48), 9).save(data / "masks" / "3.png"), "class numbers below 4"),
        (lambda data: (data / "masks" / "3.png").write_text("no picture"), "Cannot read the mask"),
        (lambda data: (data / "images").rename(data / "pictures"), "needs the folders 'images' and"),
    ],
)
def test_masks_that_do_not_fit_are_named(spoil: Any, says: str, masked: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(masked / "data", data)
    spoil(data)
    arguments = ("augment", str(masked / "model"), "--out", str(tmp_path / "out"), "--exits", "1", "--train", str(data))
    assert says in " ".join(_run(*arguments, "--epochs", "1", code=1).split())


def test_estimate_tells_times_and_an_answer(files: Path) -> None:
    out = _run(
        "estimate", "test_resnet", "--random-weights", "--data", str(files / "pictures"), "--unlabelled",
        "--exits", "2", "--batch-size", "1", "--seconds", "0.1",
    )  # fmt: skip
    assert "probe %" in out
    assert any(answer in out for answer in ("go:", "perhaps:", "no-go:"))
    assert "must be" in _run("estimate", "test_resnet", "--random-weights", "--batch-size", "0", code=1)


def test_the_version_is_told() -> None:
    assert _run("--version").strip() == ee.__version__
    assert "ee-surgery demo" in _run("--help")


def test_serving_says_what_is_missing_or_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn", reason="needs ee-surgery[serve]")
    adapter = str(tmp_path)
    assert "--audit-file goes with --audit" in _run("serve", adapter, "--audit-file", "a.json", code=1)
    assert "--grace must be" in _run("serve", adapter, "--grace", "-1", code=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Give another --host or --port" in " ".join(_run("serve", adapter, "--port", port, code=1).split())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find_spec(name))
    assert "starlette: pip install 'ee-surgery[serve]'" in " ".join(_run("serve", adapter, code=1).split())
