"""Settings of recipes/train.py are checked before anything runs; its data comes from where they say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.presets import PRESETS
from ee_surgery.project.pictures import Pictures, part
from ee_surgery.project.settings import Source, load
from ee_surgery.share.adapter import load_adapter
from recipes.train import CONFIGS, main, npz

TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
SMOKE = CONFIGS / "smoke.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_right(path: Path) -> None:
    assert load(path).model.name


def test_settings_are_what_the_file_says(tmp_path: Path) -> None:
    recipe = load(SMOKE, ["train.epochs=7", "operate.budget=null", "data.augment=true", "train.milestones=[0.1, 1]"])
    assert (recipe.train.epochs, recipe.train.milestones, recipe.operate.budget) == (7, (0.1, 1.0), None)
    assert recipe.branch == ee.BranchSpec("pool", confidence=True)
    assert recipe.train.lr == 1e-2  # written 1e-2, which YAML takes for text
    assert recipe.data.augment is True
    recipe = load(written(tmp_path, "model: {name: x}\npreset: sdn\ntrain: {epochs: 2}\noperate:\n"), ["data.train=a"])
    assert recipe.train == ee.TrainConfig(
        **{name: getattr(PRESETS["sdn"].config, name) for name in ee.TrainConfig.__slots__} | {"epochs": 2}
    )
    assert (recipe.exits, recipe.branch, recipe.data.train) == (None, None, "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: x}\nmodle: 3", r"my.yaml has no setting 'modle'. Did you mean 'model'\?"),
        ("model: {name: x}\ntrain: {epoch: 3}", r"train has no setting 'epoch'. Did you mean 'epochs'"),
        (
            "model: {name: x}\nbranch: {name: pool, confidense: true}",
            "branch has no setting 'confidense'.*'confidence'",
        ),
        ("exits: 3", "my.yaml lacks the setting 'model'"),
        ("model: {pretrained: true}", "model lacks the setting 'name'"),
        ("model: resnet18", "model must be a mapping of settings, got 'resnet18'"),
        ("model: {name: x}\ntrain: {epochs: two}", "train: epochs must be int, got 'two', a str"),
        ("model: {name: x}\ntrain: {epochs: 1.5}", "epochs must be int"),
        ("model: {name: x}\ntrain: {epochs: true}", "epochs must be int, got True, a bool"),
        ("model: {name: x}\ntrain: {lr: fast}", "lr must be float, got 'fast'"),
        ("model: {name: x}\ntrain: {lr: -1}", "lr must be a positive number"),
        ("model: {name: x}\ntrain: {optimizer: adm}", r"optimizer must be Literal\['adamw', 'adam', 'sgd'\]"),
        ("model: {name: x}\ntrain: {objective: sum_cee}", "Did you mean 'sum_ce'"),
        ("model: {name: x}\nexits: [1, 2]", r"exits must be int \| str \| list\[str\] \| None, got \[1, 2\], a list"),
        ("model: {name: x}\npreset: sdnn", "Did you mean 'sdn'"),
        ("", "must be a mapping of settings, got None"),
        ("model: {name: x", "cannot be read"),
    ],
    ids=lambda value: value[:30].replace("\n", " ") if "must" not in value else "",
)
def test_wrong_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ee.SurgeryError, match=message):
        load(written(tmp_path, text))


@pytest.mark.parametrize("change", ["train.epochs", "train.epochs.more=3", "a=1"])
def test_wrong_changes_are_named(change: str) -> None:
    with pytest.raises(ee.ConfigError, match=r"section\.name=value|no setting 'a'"):
        load(SMOKE, [change])


def labels(pictures: Pictures) -> list[int]:
    return [label for _, label in pictures]


def test_ranges_of_a_split_are_disjoint_and_in_one_random_order() -> None:
    source = Source(source="synthetic")
    whole, halves = part(source, "test", TENSOR), [part(source, f"test[{r}]", TENSOR) for r in (":25%", "25%:")]
    assert [len(whole), *map(len, halves)] == [64, 16, 48]
    assert sorted([*halves[0].index, *halves[1].index]) == list(range(64))
    assert list(halves[0].index) != sorted(halves[0].index)
    assert list(part(source, "test[:5]", TENSOR).index) == list(halves[0].index)[:5]
    assert list(part(source, "test[3:5]", TENSOR).index) == list(halves[0].index)[3:5]
    image, label = whole[0]
    assert image.shape == (3, 32, 32)
    assert 0 <= label < 10
    for wrong in ("test[9:3]", "test[:0]", "test[0.5:]", "te st"):
        with pytest.raises(ee.ConfigError):
            part(source, wrong, TENSOR)


def test_npz_files_are_read_from_any_folder(tmp_path: Path) -> None:
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8).numpy()
    planes = np.stack([pixels[:, 0] - pixels[:, 1], pixels[:, 1], pixels[:, 2] - pixels[:, 1]])
    for axis in (2, 3):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0)).astype(np.uint8)
    np.savez(tmp_path / "train.npz", residual=planes, labels=np.arange(5, dtype=np.uint8))
    found = part(Source(source=str(tmp_path)), "train", TENSOR, rowed=npz)
    assert labels(found) == [0, 1, 2, 3, 4]
    assert torch.equal((found[3][0] * 255).round().byte(), torch.from_numpy(pixels[3]))


def test_a_missing_package_or_split_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ee.DataError, match=r"pip install 'ee-surgery\[data\]'"):
        part(Source(source=str(tmp_path)), "train", TENSOR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures in each of three classes, whose names sort as text."""
    for split in ("train", "test"):
        for name in ("1", "2", "10"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8), 10 * int(name)).save(tmp_path / "pictures" / split / name / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_and_parquet_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
    found = part(Source(source=str(folder)), "test", TENSOR)
    assert sorted(labels(found)) == [1, 1, 2, 2, 10, 10]
    for image, label in found:
        assert image.shape == (3, 8, 8)
        assert image[0, 0, 0] == pytest.approx(10 * label / 255)
    names = [f"class {i}" for i in range(12)]
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["class 7", "class 3"]),
        }
    )
    photo = {"bytes": (folder / "test" / "1" / "0.png").read_bytes(), "path": None}
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    table = arrow.table({"id": [5, 6], "photo": [photo] * 2, "kind": [0, 1]}, schema=features.arrow_schema)
    (folder.parent / "files").mkdir()
    parquet.write_table(table, folder.parent / "files" / "train.parquet")
    source = Source(source=str(folder.parent / "files"))
    assert labels(part(source, "train", TENSOR, names)) == [7, 3]
    assert labels(part(source, "train", TENSOR)) == [0, 1]
    assert labels(part(Source(source=source.source, label="id"), "train", TENSOR)) == [5, 6]
    with pytest.raises(ee.DataError, match="has the columns"):
        part(Source(source=source.source, label="class"), "train", TENSOR)
    with pytest.raises(ee.DataError, match="No split 'test'"):
        part(source, "test", TENSOR)


def test_a_transformers_model_goes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    capsys.readouterr()
    text = f"model: {{name: {tmp_path / 'vit'}, library: transformers}}\nexits: 2\ntrain: {{validation: 0}}"
    settings = ["--set", "train.epochs=1", "--set", "data.augment=true"]
    path = written(tmp_path, text)
    main(["--config", str(path), "--data", "synthetic", "--out", str(tmp_path / "out"), *settings])
    printed = capsys.readouterr().out
    assert "epoch 1: loss" in printed
    assert "Original unchanged" in printed
    assert (tmp_path / "out" / "report.md").read_text() in printed
    named = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    loaded = ee.from_pretrained(tmp_path / "out" / "adapter", named)
    training = loaded.provenance["training"]
    assert (training["epochs"], training["samples"], training["device"]) == (1, 64, "cpu")
    card = load_adapter(tmp_path / "out" / "adapter")[0].provenance["card"]
    assert card["eval_name"] == "synthetic, test[50%:]"
    with pytest.raises(SystemExit, match="UnknownNameError: No preset 'sdnn'"):
        main(["--smoke", "--set", "preset=sdnn"])
    with pytest.raises(SystemExit):
        main([])
