"""`ee-surgery serve`: HTTP to a real process. Answers are the model's, and bad requests harm no others."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import ee_surgery as ee
from tests.serving.malformed import malformed, picture, png
from tests.serving.server import SIDE, Served, adapter, serving

CHROMIUM = shutil.which("chromium")
JSON = {"content-type": "application/json"}
PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], ee.EarlyExitModel, torch.Tensor]:
    return adapter(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(files: Any) -> ee.EarlyExitModel:
    return files[1]


@pytest.fixture(scope="module")
def served(files: Any) -> Iterator[Served]:
    with serving(*files[0], "--audit", "0.5") as found:
        yield found


def metrics(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return {
        f"{sample.name}{''.join(f'.{value}' for value in sample.labels.values())}": sample.value
        for family in families
        for sample in family.samples
    }


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def agree(found: list[dict[str, Any]], model: ee.EarlyExitModel, x: torch.Tensor) -> None:
    expected = model.predict(x)
    names = [*model.exits, "original"]
    assert [each["exit"] for each in found] == [names[k] for k in expected.exit_index.tolist()]
    assert [each["class"] for each in found] == expected.logits.argmax(1).tolist()
    chances = torch.tensor([each["probability"] for each in found])
    torch.testing.assert_close(chances, expected.logits.softmax(1).amax(1), rtol=1e-3, atol=1e-4)
    fractions = torch.tensor([each["macs_fraction"] for each in found], dtype=torch.float64)
    torch.testing.assert_close(fractions, expected.macs_fraction)
    assert [each["score"] is None for each in found] == [k == len(names) - 1 for k in expected.exit_index.tolist()]


# --- answers


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", ["image", "application/octet-stream"])
def test_pictures_are_prepared_as_the_adapter_says(
    served: Served, model: ee.EarlyExitModel, form: str, kind: str
) -> None:
    body = picture(form, (97, 130))
    kind = f"image/{form.lower()}" if kind == "image" else kind
    response = served.client.post("/predict", content=body, headers={"content-type": kind})
    assert response.status_code == 200, response.text
    agree(response.json(), model, model.transform()(Image.open(io.BytesIO(body)))[None])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "LA"])
def test_pictures_of_any_mode_are_taken(served: Served, mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (30, 40)).save(file, "PNG")
    assert served.client.post("/predict", content=file.getvalue(), headers=PNG).status_code == 200


def test_numbers_are_one_sample_or_a_batch(served: Served, files: Any) -> None:
    _, model, x = files
    for given in (x[3], x[3:4], x[:20]):
        response = served.client.post("/predict", json={"inputs": given.tolist()})
        assert response.status_code == 200, response.text
        agree(response.json(), model, given.reshape(-1, 3, SIDE, SIDE))


def test_many_clients_at_once_get_their_own_answers(served: Served, files: Any) -> None:
    _, model, x = files

    def ask(i: int) -> None:
        rows = x[i : i + 1 + i % 3]
        agree(served.client.post("/predict", json={"inputs": rows.tolist()}).json(), model, rows)

    with ThreadPoolExecutor(8) as pool:
        assert len([*pool.map(ask, range(80))]) == 80


def test_the_knob_moves_the_point_for_later_requests(served: Served, files: Any) -> None:
    _, model, x = files
    points, body = model.frontier.points, {"inputs": x[:30].tolist()}
    start = served.client.get("/knob").json()
    assert [each["macs_fraction"] for each in start["frontier"]] == [each.macs_fraction for each in points]
    assert points[start["index"]] == model.operating_point
    try:
        for request, point in [
            ({"point": 0}, points[0]),
            ({"max_accuracy_drop": 0.0}, model.frontier.at(max_accuracy_drop=0)),
        ]:
            moved = served.client.put("/knob", json=request).raise_for_status().json()
            assert moved["point"]["macs_fraction"] == point.macs_fraction
            assert metrics(served.client)["ee_surgery_macs_fraction"] == point.macs_fraction
            model.operate(point)
            agree(served.client.post("/predict", json=body).json(), model, x[:30])
        assert served.client.put("/knob", json={"off": True}).json()["point"] is None
        assert {each["exit"] for each in served.client.post("/predict", json=body).json()} == {"original"}
        for request in (
            {"budget": 1e-3},
            {"budget": 0.0},
            {"point": 99},
            {"off": False},
            {"point": True},
            {},
            [],
            {"x": 1},
        ):
            response = served.client.put("/knob", json=request)
            assert response.status_code == (409 if request == {"budget": 1e-3} else 422), response.text
            assert response.json()["error"]
        assert served.client.get("/knob").json()["point"] is None  # none of them changed it
    finally:
        served.client.put("/knob", json={"point": start["index"]}).raise_for_status()
        model.operate(points[start["index"]])


def test_metrics_count_requests_samples_stages_and_the_audit(served: Served, files: Any) -> None:
    before, x = metrics(served.client), files[2]
    assert served.client.post("/predict", json={"inputs": x[:20].tolist()}).status_code == 200
    assert served.client.post("/predict", content=b"x", headers={"content-type": "text/x"}).status_code == 415
    after = metrics(served.client)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["ee_surgery_requests_total.answered"] == 1
    assert sum(grown[f"ee_surgery_samples_total.{name}"] for name in (*files[1].exits, "original")) == 20
    assert grown[f"ee_surgery_stage_samples_total.{files[1].exits[0]}"] == 20
    assert grown["ee_surgery_http_responses_total.415"] == 1
    assert grown["ee_surgery_audit_served_samples"] == 20
    assert after["ee_surgery_audit_epsilon"] == 0.5
    assert after["ee_surgery_audit_risk.low"] <= after["ee_surgery_audit_risk.high"]
    assert after["ee_surgery_pending_samples"] == 0


# --- refusals


def _lists(*shape: int) -> bytes:
    return json.dumps({"inputs": torch.zeros(shape).tolist()}).encode()


@pytest.mark.parametrize(
    ("headers", "body", "status", "said"),
    [
        ({"content-type": "text/plain"}, b"x", 415, "image/"),
        ({}, b"x", 415, "image/"),
        ({**PNG, "content-encoding": "gzip"}, b"x", 415, "Content-Encoding"),
        (PNG, b"", 422, "picture"),
        (PNG, b"\x89PNG\r\n\x1a\n", 422, "picture"),
        (PNG, picture("PNG")[:500], 422, "picture"),
        (PNG, picture("GIF"), 422, "JPEG, PNG, WEBP"),
        (PNG, png(50_000, 40_000), 413, "pixels"),
        (PNG, png(5_000, 5_000), 413, "pixels"),
        (PNG, png(1, 10_000), 422, "sides"),
        (PNG, picture("JPEG")[:-2] + b"\xff\xda" * 100, 422, "picture"),
        (JSON, b"{", 400, "JSON"),
        (JSON, b"\xff", 400, "JSON"),
        (JSON, b'{"inputs": NaN}', 400, "NaN"),
        (JSON, b'{"inputs": -Infinity}', 400, "Infinity"),
        (JSON, _lists(3, SIDE, SIDE).replace(b"0.0", b"1e999", 1), 422, "finite"),
        (JSON, _lists(3, SIDE, SIDE).replace(b"0.0", b"1e39", 1), 422, "finite"),  # not in float32
        (JSON, _lists(3, SIDE, SIDE).replace(b"0.0", b"null", 1), 422, "numbers"),
        (JSON, _lists(3, SIDE, SIDE).replace(b"0.0", b'"0.0"', 1), 422, "inputs"),
        (JSON, _lists(3, SIDE, SIDE).replace(b"0.0, ", b"", 1), 422, "equal lengths"),
        (JSON, _lists(3, SIDE, SIDE + 1), 422, "(B, 3, 64, 64)"),
        (JSON, _lists(2, 1, SIDE, SIDE), 422, "(B, 3, 64, 64)"),
        (JSON, b'{"inputs": []}', 422, "(B, 3, 64, 64)"),
        (JSON, b'{"inputs": 3}', 422, "(B, 3, 64, 64)"),
        (JSON, b"[1]", 422, "inputs"),
        (JSON, b'{"inputs": [1], "more": 2}', 422, "inputs"),
        (JSON, b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", 422, ""),
        (JSON, b'{"inputs": [' + b"[]," * 100_000 + b"[]]}", 413, "lists"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(
    served: Served, headers: dict[str, str], body: bytes, status: int, said: str
) -> None:
    response = served.client.post("/predict", content=body, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    assert said in response.json()["error"]


def test_too_many_samples_are_refused(served: Served) -> None:
    body = json.dumps({"inputs": torch.zeros(65, 3, SIDE, SIDE, dtype=torch.int8).tolist()})
    response = served.client.post("/predict", content=body, headers=JSON)
    assert (response.status_code, "65 samples" in response.text) == (413, True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("POST", "/knob", 405),
        ("PUT", "/", 405),
        ("GET", "/no", 404),
        ("POST", "/predict/x", 404),
    ],
)
def test_unknown_routes_and_methods_are_refused_in_json(served: Served, method: str, path: str, status: int) -> None:
    response = served.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]


def test_large_bodies_are_refused_whether_or_not_they_say_so(served: Served) -> None:
    before = served.rss_mib

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(1 << 20)

    for body in (bytes(17 << 20), parts()):
        response = served.client.post("/predict", content=body, headers=PNG)
        assert (response.status_code, "bytes" in response.text) == (413, True)
    with contextlib.suppress(httpx.TransportError):  # it does not read on for ever
        served.client.post("/predict", content=bytes(200 << 20), headers=PNG)
    assert served.client.get("/healthz").status_code == 200
    assert served.rss_mib < before + 100


def raw(served: Served, data: bytes) -> bytes:
    """What a socket gets back, until it is closed."""
    url = served.client.base_url
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_broken_http_is_refused(served: Served, data: bytes) -> None:
    assert raw(served, data)[:12] in (b"", b"HTTP/1.1 400")
    assert served.client.get("/healthz").status_code == 200


def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing(served: Served) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000000\r\n\r\n"
    for _ in range(20):  # more than all bodies may hold, were they not let go
        raw(served, head + bytes(4_000_000))
    assert served.client.post("/predict", content=picture("PNG"), headers=PNG).status_code == 200


def _attack(served: Served, count: int) -> None:
    good = picture("JPEG")
    for bad in malformed(90, seed=1):  # what libraries allocate once
        served.client.request(bad.method, bad.path, headers=bad.headers, content=bad.body)
    before, seen = served.rss_mib, Counter[tuple[str, int]]()
    for i, bad in enumerate(malformed(count)):
        response = served.client.request(bad.method, bad.path, headers=bad.headers, content=bad.body)
        seen[bad.kind, response.status_code] += 1
        assert 400 <= response.status_code < 500 or (bad.may_pass and response.status_code == 200), (
            i,
            bad,
            response.text,
        )
        if i % 100 == 0:
            assert served.client.post("/predict", content=good, headers=PNG).status_code == 200
    assert {kind for kind, _ in seen} == {bad.kind for bad in malformed(9)}
    assert served.rss_mib < before + 200, seen
    assert served.client.post("/predict", content=good, headers=PNG).status_code == 200
    assert metrics(served.client)["ee_surgery_requests_total.failed"] == 0


def test_malformed_requests_get_errors_of_theirs_and_good_ones_their_answers(served: Served) -> None:
    _attack(served, 300)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(served: Served) -> None:
    _attack(served, 10_000)


# --- the page, and the end


def test_the_page_is_self_contained_and_escapes_names(served: Served) -> None:
    response = served.client.get("/")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", response.headers["content-security-policy"])[1]
    assert response.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self';")
    assert re.findall(r'<(?:script|style)[^>]*nonce="([^"]+)"', response.text) == [nonce] * 2
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|\son\w+=|\sstyle=""", response.text)
    assert nonce not in served.client.get("/").text


def test_sigterm_answers_what_is_in_and_ends(files: Any) -> None:
    body = picture("PNG")
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(*files[0], "--no-knob") as (client, process):
        assert client.put("/knob", json={"off": True}).status_code == 403
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
            connection.sendall(head.encode() + body[:100])
            assert client.get("/healthz").status_code == 200  # so that the head has been read
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refuses(client))
            connection.sendall(body[100:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert process.wait(60) == 0
        assert process.stdout.read().strip().endswith("drained: 2 requests answered, 0 not")  # the first warmed it up


def refuses(client: httpx.Client) -> bool:
    try:
        with httpx.Client(base_url=client.base_url) as other:
            other.get("/healthz")
    except httpx.ConnectError:
        return True
    return False


def test_health_says_draining_first_and_a_second_signal_ends_it(files: Any) -> None:
    with serving(*files[0], "--grace", "600") as (client, process):
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/healthz").status_code == 503)
        assert client.post("/predict", content=picture("PNG"), headers=PNG).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in the PATH")
def test_the_slider_of_the_page_moves_the_knob(served: Served, files: Any) -> None:
    from tests.serving.browser import Browser

    start = served.client.get("/knob").json()["index"]
    last = len(files[1].frontier) - 1
    try:
        with Browser(str(CHROMIUM), str(served.client.base_url)) as browser:
            assert browser.run("document.getElementById('frontier').getAttribute('points').length") > 20
            browser.run(
                f"knob.value = {last}; knob.dispatchEvent(new Event('input')); knob.dispatchEvent(new Event('change'))"
            )
            browser.wait("!moving && by('said').textContent.includes('of the MACs')")
            assert served.client.get("/knob").json()["index"] == last
            share = 100 * files[1].frontier[last].macs_fraction
            assert f"{share:.1f} % of the MACs" in browser.run("by('said').textContent")
            served.client.put("/knob", json={"point": 0}).raise_for_status()
            browser.wait("knob.value === '0'")  # moved elsewhere, seen here
            assert browser.problems == []
    finally:
        served.client.put("/knob", json={"point": start})
