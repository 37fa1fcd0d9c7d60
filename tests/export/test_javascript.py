"""The exported file in Node and in Chromium: exits and logits are those of Python's onnxruntime.

Needs node and `make javascript`, or EE_SURGERY_NODE_MODULES: the `node_modules` with what requirements/javascript.json
lists. The page also needs Chromium in the PATH.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ee_surgery as ee
from ee_surgery.calibration.profile import processor
from tests import ROOT
from tests.zoo import two_exits

onnx = pytest.importorskip("onnx", reason="needs ee-surgery[onnx]")
pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")

from ee_surgery.onnx import METADATA, OnnxModel  # noqa: E402

MODULES = Path(os.environ.get("EE_SURGERY_NODE_MODULES", ROOT / "runs" / "node" / "node_modules"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INF = np.inf
BATCHES = (1, 2, 7, 257)
HERE = Path(__file__).parent


def node(script: str, *arguments: object, steps: Any) -> Any:
    """What a script of this folder prints, with the packages of `MODULES`."""
    command = ["node", str(HERE / script), str(MODULES), *map(str, arguments)]
    done = subprocess.run(command, input=json.dumps(steps), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def needs(*packages: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    for package in packages:
        if not (MODULES / package).is_dir():
            pytest.skip(f"{package} is not in {MODULES}: run `make javascript`, or set EE_SURGERY_NODE_MODULES")


LIVE = ROOT / "docs" / "live" / "model.onnx"


@pytest.fixture(
    scope="module", params=["live", *(pytest.param(name, marks=pytest.mark.slow) for name in ("made now", "int8"))]
)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The live page's file, and two by the exporter as it is now."""
    if request.param == "live":
        return LIVE
    model = two_exits()
    times = ee.Profile("python", processor(torch.device("cpu")), 1, 1, (1,), ((1.0, 2.0, 9.0),), ((0.1, 0.1),))
    held_out = [(torch.randn(64, 3, 16, 16), torch.randint(10, (64,)))]
    ee.calibrate(model, held_out, profile=times)
    model.operate(latency_ms=5.0)
    quantized = {"quantize": "int8", "calibrate": held_out} if request.param == "int8" else {}
    return model.export(tmp_path_factory.mktemp("javascript") / "model.onnx", **quantized)


@pytest.fixture(scope="module")
def pixels(path: Path) -> np.ndarray:
    shape = OnnxModel(path).session.get_inputs()[0].shape[1:]
    return np.random.default_rng(0).standard_normal((max(BATCHES), *shape), dtype=np.float32)


def apart(scores: np.ndarray) -> float:
    """A threshold between two scores near the middle, far from both: engines round differently."""
    middle = np.sort(scores)[len(scores) // 4 : 3 * len(scores) // 4]
    k = int(np.diff(middle).argmax())
    return float(middle[k : k + 2].mean())


def settings(file: OnnxModel, pixels: np.ndarray) -> list[list[float] | None]:
    """Left out; all leave at the first exit, or at the second; none leaves; one exit closed; some leave at each."""
    first, second = (apart(file.run(pixels, taus).score) for taus in ([-INF, INF], [INF, -INF]))
    return [None, [-INF, -INF], [INF, -INF], [INF, INF], [INF, second], [first, INF], [first, second]]


def plain(thresholds: list[float] | None) -> list[float | str] | None:
    """As JSON has it: infinities are strings."""
    return None if thresholds is None else [tau if np.isfinite(tau) else str(tau) for tau in thresholds]


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_node_gives_the_exits_and_logits_of_python(runtime: str, path: Path, pixels: np.ndarray) -> None:
    needs(runtime)
    file = OnnxModel(path, threads=1)
    left_out, *given = settings(file, pixels)
    cases = [*product(BATCHES[:-1], given, [True]), (BATCHES[-1], given[-1], True), (BATCHES[-1], given[2], True)]
    cases += product(BATCHES, [left_out], [True, False])
    steps = [{"batch": n, "thresholds": plain(taus), "withModule": module} for n, taus, module in cases]
    data = {"cases": steps, "dims": pixels.shape, "pixels": base64.b64encode(pixels.tobytes()).decode()}
    found = node("run_file.mjs", runtime, path, steps=data)
    assert (found["exits"], found["points"]) == (file.exits, len(file.points))
    seen = set()
    for (n, thresholds, module), theirs in zip(cases, found["answers"], strict=True):
        own = file.run(pixels[:n], thresholds)
        assert theirs["exitIndex"] == own.exit_index.tolist(), (n, thresholds, module)
        close = 1e-5 * np.abs(own.logits).max()
        np.testing.assert_allclose(np.reshape(theirs["logits"], own.logits.shape), own.logits, rtol=0, atol=close)
        np.testing.assert_allclose([float(score) for score in theirs["score"]], own.score, atol=1e-5)
        assert theirs.get("macs", own.macs.tolist()) == own.macs.tolist()
        seen.add(tuple(sorted(set(theirs["exitIndex"]))))
    assert {(0,), (1,), (2,), (0, 1, 2)} <= seen


def test_requests_choose_the_points_that_python_chooses(path: Path, pixels: np.ndarray) -> None:
    needs("onnxruntime-node")
    file = OnnxModel(path, threads=1)
    requests = [({"budget": 1.0}, {"budget": 1.0}), ({"maxAccuracyDrop": 0.5}, {"max_accuracy_drop": 0.5}), ({}, {})]
    if file.about["points"][0].latency_ms > 0:
        requests.append(({"latencyMs": 5.0}, {"latency_ms": 5.0}))
    steps = [{"batch": 7, "request": request, "withModule": True} for request, _ in requests]
    data = {"cases": steps, "dims": pixels.shape, "pixels": base64.b64encode(pixels.tobytes()).decode()}
    for (_, request), theirs in zip(
        requests, node("run_file.mjs", "onnxruntime-node", path, steps=data)["answers"], strict=True
    ):
        file.operate(**request)
        assert theirs["exitIndex"] == file.run(pixels[:7]).exit_index.tolist()


@pytest.mark.parametrize(
    "edit", [{"format_version": 2}, {"exits": None}, {"thresholds": []}, {"points": [{}]}, {"trunk_macs": ["1", {}, 2]}]
)
def test_node_refuses_damaged_metadata(edit: dict[str, object], path: Path, tmp_path: Path) -> None:
    needs("onnxruntime-node")
    model = onnx.load(path)
    about = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    onnx.helper.set_model_props(model, {METADATA: json.dumps({**about, **edit})})
    onnx.save(model, tmp_path / "other.onnx")
    data = {"cases": [], "dims": [1, 1], "pixels": ""}
    assert "The file" in node("run_file.mjs", "onnxruntime-node", tmp_path / "other.onnx", steps=data)["error"]


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_node_refuses_what_is_cut_short(keep: int, path: Path, tmp_path: Path) -> None:
    needs("onnxruntime-node")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:keep])
    data = {"cases": [], "dims": [1, 1], "pixels": ""}
    assert "The file" in node("run_file.mjs", "onnxruntime-node", tmp_path / "cut.onnx", steps=data)["error"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The built site on a local port, and its folder."""
    needs("onnxruntime-web", "puppeteer-core")
    pytest.importorskip("mkdocs", reason="needs mkdocs to build the page")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/live/", folder
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_page_shows_the_exits_of_python(site: tuple[str, Path]) -> None:
    url, folder = site
    ort = folder / "live" / "ort"
    ort.mkdir(exist_ok=True)
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(MODULES / "onnxruntime-web" / "dist" / name, ort)
    ink = json.loads((ROOT / "docs" / "live" / "pictures.json").read_text())["ink"]
    pixels = np.array(ink, np.float32).reshape(-1, 1, 8, 8) / 8 - 1
    file = OnnxModel(LIVE, threads=1)
    photo = Image.new("L", (60, 90), 255)
    photo.paste(20, (25, 10, 35, 80))
    photo.save(folder / "one.png")
    steps: list[dict[str, object]] = [
        {"picture": 0},
        {"picture": 3},
        {"slider": "point", "value": 0},
        {"slider": "point", "key": "End"},
        {"slider": "threshold0", "value": 0.7},
        {"slider": "threshold1", "value": 0.9},
        {"slider": "threshold0", "key": "Home"},
        {"slider": "threshold0", "key": "End"},
        {"slider": "threshold1", "key": "End"},
        {"slider": "threshold0", "key": "Home", "picture": 5},
        {"file": str(folder / "one.png")},
        {"draw": [[0.5, 0.1], [0.5, 0.9]]},
    ]
    found = node("open_page.mjs", CHROMIUM, url, steps=steps)
    assert (found["problems"], found["status"]) == ([], "")
    thresholds, picture = [*file.about["thresholds"]], None
    for step, shown in zip(steps, found["shown"], strict=True):
        taus = shown["thresholds"]
        if step.get("slider") == "point":
            point = file.points[-1 if "key" in step else 0]
            thresholds = list(point.thresholds)
            np.testing.assert_allclose(taus, np.minimum(thresholds, 1.01), atol=1e-3)
        elif "slider" in step:
            thresholds = [INF if tau > 1 else tau for tau in taus]
        own = file.run(pixels, thresholds).exit_index.tolist()
        picture = None if "draw" in step or "file" in step else step.get("picture", picture)
        assert shown["exits"] == own, step
        if picture is not None:
            assert shown["exit"] == own[picture], step
        assert "ms" in shown["cost"]
    exits = [shown["exit"] for shown in found["shown"]]
    assert set(exits) == {0, 1, 2}  # moving the sliders changed where the pictures left
    assert all("at exit 0" in shown["answer"] for shown in found["shown"][-2:])  # a dropped and a drawn digit


@pytest.mark.slow
def test_the_page_says_what_to_do_without_the_runtime(site: tuple[str, Path]) -> None:
    shutil.rmtree(site[1] / "live" / "ort", ignore_errors=True)
    found = node("open_page.mjs", CHROMIUM, site[0], steps=[])
    assert "make live" in found["status"]
