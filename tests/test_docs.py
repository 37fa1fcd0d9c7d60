"""Every Python snippet of README and docs runs, file by file, on small stand-ins for what would be downloaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image

import ee_surgery as ee
from ee_surgery.search.effort import EFFORTS
from tests import ROOT
from tests.test_structure import ROOMS

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders of pictures in the working directory, no downloads, small models."""
    for split in ("train", "held_out"):
        for name in ("tench", "English springer"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    vit = transformers.ViTForImageClassification(config)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", lambda name: vit)

    def processor(picture: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.rand(1, 3, 32, 32)}

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda name, **options: processor)
    monkeypatch.setitem(EFFORTS, "standard", replace(EFFORTS["quick"], points=2, probe_steps=1, steps=(2, 2)))
    monkeypatch.setattr(ee.EarlyExitModel, "push_to_hub", ee.EarlyExitModel.save_pretrained)  # test_hub pushes


_SLOW = ("papers.md", "guide.md", "trainer.md", "deploy.md")  # every preset, every verb, several exports


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in _SLOW)) for path in FILES],
)
@pytest.mark.usefixtures("photos")
def test_snippets_run(path: Path) -> None:
    namespace: dict[str, object] = {}
    registries = (ee.BRANCHES, ee.SCORES, ee.CALIBRATORS)
    before = [set(registry) for registry in registries]
    try:
        for i, code in enumerate(SNIPPET.findall(path.read_text())):
            exec(compile(code, f"{path.name}[{i}]", "exec"), namespace)
    finally:
        for registry, known in zip(registries, before, strict=True):
            for name in set(registry) - known:
                del registry._items[name]
    branched = namespace.get("branched")
    if path.name in ("README.md", "guide.md"):
        assert isinstance(branched, ee.EarlyExitModel)
        assert branched.receipt().unchanged


def test_the_readme_examples_are_short() -> None:
    for code in SNIPPET.findall((ROOT / "README.md").read_text()):
        assert len([line for line in code.splitlines() if line.strip()]) < 20


def test_every_public_name_is_mentioned_in_the_docs() -> None:
    text = "\n".join(path.read_text() for path in FILES)
    functions = [name for name in ee.__all__ if name.islower()]
    assert [name for name in functions if not re.search(rf"\b{name}\b", text)] == []


def test_every_public_name_has_its_place_in_the_api_reference() -> None:
    listed = re.findall(r"^::: ee_surgery\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(ee.__all__)


def test_links_lead_somewhere() -> None:
    for path in FILES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_design_page_lists_the_rooms_in_their_order() -> None:
    block = re.search(r"## The rooms.*?```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    assert block is not None
    columns = [re.split(r" {3,}", line)[0] for line in block[1].splitlines()]
    assert [name.removesuffix("/") for column in columns for name in column.split()] == ROOMS
