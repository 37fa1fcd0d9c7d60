"""`ee.serve_app` inside the process: what a loaded, slow or failing model makes of requests, and other tasks."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.routing import Mount
from torch import nn

import ee_surgery as ee
from ee_surgery.serving.routes import _Routed
from tests.serving.malformed import picture
from tests.serving.test_engine import Held
from tests.zoo import SPECIAL, two_exits

ONE = {"inputs": torch.zeros(3, 16, 16).tolist()}


def ask(app: Any, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """What a conversation with an application returns."""

    async def main() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await talk(client)

    return asyncio.run(main())


def post(app: Any, body: object = ONE, path: str = "/predict") -> httpx.Response:
    return ask(app, lambda client: client.post(path, json=body))


def refused(response: httpx.Response, status: int, said: str) -> None:
    assert response.status_code == status, response.text
    assert said in response.json()["error"]
    assert ("retry-after" in response.headers) is (status == 503)


# --- load and failures


def test_a_full_queue_is_503_and_says_when_to_come_again(model: ee.EarlyExitModel, held: Held) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        first = [asyncio.create_task(client.post("/predict", json=ONE)) for _ in range(2)]
        while engine.stats().pending < 2:
            await asyncio.sleep(0.01)
        third = await client.post("/predict", json=ONE)
        held.go_on.set()
        return third, [each.status_code for each in await asyncio.gather(*first)]

    with ee.Engine(model, max_pending=2) as engine:
        third, others = ask(ee.serve_app(engine), talk)
    refused(third, 503, "max_pending=2")
    assert others == [200, 200]


def test_an_answer_that_takes_too_long_is_504(model: ee.EarlyExitModel, held: Held) -> None:
    clock = [0.0]

    async def talk(client: httpx.AsyncClient) -> Any:
        first = asyncio.create_task(client.post("/predict", json=ONE))
        while not held.reached.is_set():
            await asyncio.sleep(0.01)
        late = asyncio.create_task(client.post("/predict", json=ONE))
        while engine.stats().pending < 2:
            await asyncio.sleep(0.01)
        clock[0] = 31.0
        held.go_on.set()
        return await asyncio.gather(first, late)

    with ee.Engine(model, clock=lambda: clock[0]) as engine:
        answers = ask(ee.serve_app(engine), talk)
    refused(answers[1], 504, "30 s")


def test_a_body_that_does_not_come_is_408_and_holds_nothing(model: ee.EarlyExitModel) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    with ee.Engine(model) as engine:
        app = ee.serve_app(engine, limits=ee.HttpLimits(timeout_s=0.05))
        kind = {"content-type": "application/json"}
        refused(ask(app, lambda client: client.post("/predict", content=slow(), headers=kind)), 408, "0.05 s")
        assert app.state.service._bytes == 0


def test_bodies_share_a_bound(model: ee.EarlyExitModel) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield bytes(600 << 10)
        await go_on.wait()

    async def talk(client: httpx.AsyncClient) -> Any:
        kind = {"content-type": "image/png"}
        first = asyncio.create_task(client.post("/predict", content=body(), headers=kind))
        while not app.state.service._bytes:
            await asyncio.sleep(0.01)
        second = await client.post("/predict", content=bytes(600 << 10), headers=kind)
        go_on.set()
        return await first, second

    with ee.Engine(model) as engine:
        model.state.preprocessing = {"input_size": [3, 16, 16], "mean": [0.5], "std": [0.5]}
        app = ee.serve_app(engine, limits=ee.HttpLimits(bodies_mib=1))
        first, second = ask(app, talk)
    refused(first, 422, "picture")
    refused(second, 503, "bodies")
    assert app.state.service._bytes == 0


def test_a_model_that_fails_is_500_without_its_message(
    model: ee.EarlyExitModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with ee.Engine(model) as engine:
        app = ee.serve_app(engine)
        monkeypatch.setattr(_Routed, "visit", broken)
        monkeypatch.setattr(model.engine, "run", broken)
        response = post(app)
        refused(response, 500, "failed")
        assert "secret" not in response.text
        assert "secret" in caplog.text
        monkeypatch.undo()
        assert post(app).status_code == 200


def test_a_closed_engine_is_503(model: ee.EarlyExitModel) -> None:
    engine = ee.Engine(model)
    app = ee.serve_app(engine)
    engine.close()
    refused(post(app), 503, "closed")


# --- other models and settings


def test_other_sizes_are_taken_where_they_are_listed(model: ee.EarlyExitModel) -> None:
    large = {"inputs": torch.zeros(2, 3, 24, 24).tolist()}
    with ee.Engine(model) as engine:
        refused(post(ee.serve_app(engine), large), 422, "(B, 3, 16, 16)")
        app = ee.serve_app(engine, shapes=[(3, 24, 24)])
        assert len(post(app, large).json()) == 2
        refused(post(app, {"inputs": torch.zeros(3, 8, 8).tolist()}), 422, "and (B, 3, 24, 24)")


def test_without_preprocessing_pictures_are_refused(model: ee.EarlyExitModel) -> None:
    kind = {"content-type": "image/png"}
    with ee.Engine(model) as engine:
        answer = ask(ee.serve_app(engine), lambda client: client.post("/predict", content=picture("PNG"), headers=kind))
    refused(answer, 415, "send JSON")


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_several_labels_and_numbers_have_answers_of_their_own(task: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )
    kind: Any = task if task == "multi_label" else ee.Regression(tolerance=0.1)
    model, x = ee.augment(net.eval(), 1, sample=torch.randn(4, 3, 16, 16), task=kind), torch.randn(6, 3, 16, 16)
    with ee.Engine(model) as engine:
        found = post(ee.serve_app(engine), {"inputs": x.tolist()}).json()
    logits = model.predict(x).logits
    for each, row in zip(found, logits, strict=True):
        if task == "regression":
            torch.testing.assert_close(torch.tensor(each["value"]), row, rtol=1e-3, atol=1e-4)
        else:
            assert each["classes"] == [k for k in range(5) if row[k] > 0]
            assert each["labels"] == [None] * len(each["classes"])
            torch.testing.assert_close(
                torch.tensor(each["probabilities"]), row[row > 0].sigmoid(), rtol=1e-3, atol=1e-4
            )
        assert each["exit"] == "original"


def test_an_application_can_be_mounted_in_another_one(model: ee.EarlyExitModel) -> None:
    with ee.Engine(model) as engine, ee.Audit(model, epsilon=0.5) as audit:
        app = Starlette(routes=[Mount("/models/one", ee.serve_app(engine, audit=audit, knob=True))])
        assert post(app, path="/models/one/predict").status_code == 200
        page = ask(app, lambda client: client.get("/models/one/"))
        assert 'base = "/models/one/"' in page.text
        status = ask(app, lambda client: client.get("/models/one/status")).json()
    assert status["requests"] == 1
    assert sum(status["shares"]) == 1
    assert status["audit"]["epsilon"] == 0.5


def test_moving_the_knob_begins_the_audit_anew(model: ee.EarlyExitModel) -> None:
    x = torch.randn(64, 3, 16, 16)
    ee.calibrate(model, [x])
    model.operate(model.frontier[0])
    with ee.Engine(model) as engine, ee.Audit(model, epsilon=0.5, q=1.0) as audit:
        app = ee.serve_app(engine, audit=audit, knob=True)
        post(app, {"inputs": x.tolist()})
        (before,) = audit.state.streams
        assert ask(app, lambda client: client.put("/knob", json={"point": 0})).status_code == 200
        assert [*audit.state.streams] == [before]  # it is where it was
        ask(app, lambda client: client.put("/knob", json={"point": 1}))
        assert [*audit.state.streams] != [before]
        assert audit.state.risk().losses == 0


def test_other_engines_audits_and_answers_are_refused(model: ee.EarlyExitModel) -> None:
    with ee.Engine(model) as engine:
        with ee.Audit(two_exits(), epsilon=0.5) as audit, pytest.raises(ee.ConfigError, match="another model"):
            ee.serve_app(engine, audit=audit)
        for wrong in ({"knob": 1}, {"limits": 3}):
            with pytest.raises(ee.ConfigError):
                ee.serve_app(engine, **wrong)
    with pytest.raises(ee.ConfigError, match="Engine"):
        ee.serve_app(model)
    maps = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    text = next(each for each in SPECIAL if each.name == "hf-BertForSequenceClassification").augment()
    other = ee.augment(maps, 1, sample=torch.randn(4, 3, 16, 16), task="segmentation")
    for served, said in ((other, "maps"), (text, "one floating-point input")):
        with ee.Engine(served) as engine, pytest.raises(ee.ConfigError, match=said):
            ee.serve_app(engine)


@pytest.mark.parametrize("setting", [{"body_mib": 0}, {"pixels": 0}, {"samples": 1.5}, {"timeout_s": -1}])
def test_invalid_limits_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ee.ConfigError):
        ee.HttpLimits(**setting)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "ee_surgery.serving.app")
    with pytest.raises(ee.ConfigError, match=r"ee-surgery\[serve\]"):
        importlib.import_module("ee_surgery.serving.app")
