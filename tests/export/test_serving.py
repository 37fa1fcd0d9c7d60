"""The serving recipes answer as the file does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests import ROOT

pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")

from ee_surgery.onnx import OnnxModel

PATH = ROOT / "docs" / "live" / "model.onnx"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((40, 1, 8, 8), dtype=np.float32)


def agree(answers: list[dict[str, Any]], file: OnnxModel, pixels: np.ndarray, point: int | None = None) -> None:
    own = file.run(pixels, None if point is None else file.points[point].thresholds)
    assert [answer["exit"] for answer in answers] == [file.exits[k] for k in own.exit_index]
    assert [answer["class"] for answer in answers] == own.logits.argmax(1).tolist()
    assert [answer["macs"] for answer in answers] == own.macs.tolist()


def test_fastapi_serves_the_file(pixels: np.ndarray) -> None:
    pytest.importorskip("fastapi", reason="needs fastapi")
    pytest.importorskip("httpx", reason="fastapi's TestClient needs httpx")
    TestClient = pytest.importorskip("fastapi.testclient").TestClient
    from recipes.serve_fastapi import create

    file = OnnxModel(PATH, threads=1)
    with TestClient(create(str(PATH), threads=1)) as client:
        assert len(client.get("/points").json()) == len(file.points)
        for point in (None, 0, len(file.points) - 1):
            query = {} if point is None else {"point": point}
            agree(client.post("/predict", content=pixels.tobytes(), params=query).json(), file, pixels, point)
        for body, query in (
            (b"", {}),
            (b"123", {}),
            (pixels.tobytes(), {"point": 10**6}),
            (pixels.tobytes(), {"point": -1}),
        ):
            assert client.post("/predict", content=body, params=query).status_code == 422
        with ThreadPoolExecutor(8) as pool:  # requests do not share their operating points
            points = [k % len(file.points) for k in range(24)]
            ask = lambda k: client.post("/predict", content=pixels.tobytes(), params={"point": k}).json()  # noqa: E731
            for point, answers in zip(points, pool.map(ask, points), strict=True):
                agree(answers, file, pixels, point)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_ray_serve_puts_requests_into_batches(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs ray[serve]")
    serve = pytest.importorskip("ray.serve", reason="needs ray[serve]")
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from recipes.serve_ray import Classifier

    file = OnnxModel(PATH, threads=1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.run(Classifier.bind(str(PATH)))
        with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60, trust_env=False) as client:
            with ThreadPoolExecutor(16) as pool:
                answers = [*pool.map(lambda x: client.post("/", content=x.tobytes()).json(), pixels)]
            agree(answers, file, pixels)
            assert client.post("/", content=b"123").status_code == 422
            assert client.post("/", content=pixels.tobytes()).status_code == 422
    finally:
        serve.shutdown()
        ray.shutdown()
