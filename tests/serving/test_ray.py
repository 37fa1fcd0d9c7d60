"""Serving on Ray: one knob for all replicas, audits joined, a replica that is killed under load; offline scoring."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import ee_surgery as ee
from recipes.serve import tiny, tiny_adapter
from tests import ROOT

ray = pytest.importorskip("ray", reason="needs ee-surgery[ray]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """Ray on this machine; the port of Serve."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False, runtime_env=environment)
    serve.start(http_options={"port": port}, logging_config={"log_level": "WARNING"})
    yield port
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_adapter(tmp_path_factory.mktemp("ray") / "adapter")


@pytest.fixture(scope="module")
def service(cluster: int, adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ee_surgery.serving.ray import RayService

    found = RayService(
        adapter=adapter,
        base=tiny,
        epsilon=0.9,
        audit_settings={"q": 1.0, "waiting": 1, "period": 0.1},
        audit_folder=str(tmp_path_factory.mktemp("audits")),
        options={
            "num_replicas": 2,
            "ray_actor_options": {"num_cpus": 0.1},
            "health_check_period_s": 1,
            "health_check_timeout_s": 5,
        },
    )
    found.run()
    return found


@pytest.fixture
def url(cluster: int) -> str:
    return f"http://127.0.0.1:{cluster}"


def statuses(service: Any) -> list[dict[str, Any]]:
    """Of all replicas that answer."""
    from ray import serve

    try:
        return serve.get_app_handle(service.name).broadcast("status").results(timeout_s=30)
    except Exception:  # one of them has just died
        return []


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def replaced(service: Any, gone: int) -> bool:
    found = {each["pid"] for each in statuses(service)}
    return len(found) == 2 and gone not in found


def test_a_replica_that_is_killed_under_load_loses_no_request_silently(service: Any, url: str) -> None:
    x = torch.randn(12, 3, 64, 64)
    service.move({"point": 0})
    model = ee.from_pretrained(service.adapter, tiny())
    model.operate(model.frontier[0])
    right = [(k, [*model.exits, "original"][k]) for k in model.predict(x).exit_index.tolist()]
    classes = model.predict(x).logits.argmax(1).tolist()
    stop, counts = threading.Event(), {"right": 0, "error": 0, "after": 0}
    killed = threading.Event()

    def client(number: int) -> list[str]:
        wrong, i = [], number
        with httpx.Client(base_url=url, timeout=60) as http:
            while not stop.is_set():
                i = (i + 1) % len(x)
                try:
                    response = http.post("/predict", json={"inputs": x[i].tolist()})
                except httpx.TimeoutException:
                    wrong.append("no answer")
                    continue
                except httpx.TransportError:
                    counts["error"] += 1
                    continue
                if response.status_code != 200:
                    counts["error"] += 1
                    wrong += [] if response.status_code >= 500 else [response.text]
                    continue
                (found,) = response.json()
                counts["after" if killed.is_set() else "right"] += 1
                if (found["class"], found["exit"]) != (classes[i], right[i][1]):
                    wrong.append(str(found))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            wait_for(lambda: counts["right"] > 50)
            pid = statuses(service)[0]["pid"]
            os.kill(pid, signal.SIGKILL)
            killed.set()
            wait_for(lambda: replaced(service, pid))
            seen = counts["after"]
            wait_for(lambda: counts["after"] > seen + 50)
        finally:
            stop.set()
        assert [each.result(120) for each in clients] == [[]] * 4
    with httpx.Client(base_url=url, timeout=60) as http:
        for i in range(20):
            assert http.post("/predict", json={"inputs": x[i % 12].tolist()}).status_code == 200


def test_the_knob_moves_all_replicas_and_those_that_start_later(service: Any, url: str) -> None:
    pids = {each["pid"] for each in statuses(service)}
    for request, index in (({"max_accuracy_drop": 0.0}, None), ({"point": 0}, 0)):
        service.move(request)
        found = statuses(service)
        assert {each["pid"] for each in found} == pids  # none was started anew
        assert len({each["knob"]["index"] for each in found}) == 1
        assert index is None or found[0]["knob"]["index"] == index
    with pytest.raises(ee.OperatingPointError, match="budget"):
        service.move({"budget": 1e-3})
    with pytest.raises(ee.DataError):
        service.move({"budget": -1})
    gone = min(pids)
    os.kill(gone, signal.SIGKILL)
    wait_for(lambda: replaced(service, gone))
    assert [each["knob"]["index"] for each in statuses(service)] == [0, 0]
    assert httpx.put(f"{url}/knob", json={"off": True}).status_code == 403  # it would reach one replica alone


def test_audits_are_joined_and_outlive_their_replicas(service: Any, url: str) -> None:
    service.move({"point": 0})
    before, x = service.audited(), torch.randn(4, 3, 64, 64)
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(30):
            http.post("/predict", json={"inputs": x.tolist()}).raise_for_status()

    def losses() -> int:
        return sum(each.answers.all.losses for each in service.audited().streams.values())

    grown = sum(each.answers.all.losses for each in before.streams.values()) + 120
    wait_for(lambda: losses() == grown)
    gone = statuses(service)[0]["pid"]
    os.kill(gone, signal.SIGKILL)
    wait_for(lambda: replaced(service, gone))
    assert losses() == grown


def test_other_deployments_ask_by_the_handle(service: Any) -> None:
    from ray import serve

    x = torch.randn(5, 3, 64, 64)
    service.move({"off": True})
    found = serve.get_app_handle(service.name).predict.remote(x).result(timeout_s=60)
    assert found.exit_index.tolist() == [2] * 5
    torch.testing.assert_close(found.logits, tiny()(x), rtol=1e-3, atol=1e-4)


def test_scoring_offline_gives_the_answers_of_predict(cluster: int, adapter: str, tmp_path: Path) -> None:
    from recipes.score_ray import score

    model = ee.from_pretrained(adapter, tiny())
    model.operate(model.frontier[0])
    x = torch.randn(300, 3, 64, 64)
    rows = [{"id": i, "pixels": sample.numpy()} for i, sample in enumerate(x)]
    found = score(ray.data.from_items(rows), adapter, tiny, {"point": 0}, actors=2, block=100).take_all()
    expected = model.predict(x)
    found.sort(key=lambda row: row["id"])
    assert [row["exit"] for row in found] == expected.exit_index.tolist()
    assert [row["class"] for row in found] == expected.logits.argmax(1).tolist()
