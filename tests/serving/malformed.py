"""Requests that no server should take, from a seeded generator: bytes, pictures, bombs, JSON and headers."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from PIL import Image


class Bad(NamedTuple):
    """One request."""

    kind: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    may_pass: bool = False
    """Whether it may still be read: decoders conceal damage inside a picture."""


def picture(form: str, size: tuple[int, int] = (60, 50), seed: int = 0) -> bytes:
    """A sound picture of noise."""
    pixels, file = random.Random(seed).randbytes(3 * size[0] * size[1]), io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, form)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"", bits: int = 8, color: int = 2) -> bytes:
    """A PNG that says so of itself, with right checksums."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


_ZEROS = zlib.compress(bytes(8 << 20), 9)
_SOUND = {form: picture(form) for form in ("JPEG", "PNG", "WEBP")}
_TYPES = {form: {"content-type": f"image/{form.lower()}"} for form in _SOUND}
_JSON = {"content-type": "application/json"}
_SAMPLE = json.dumps({"inputs": [[[0.5] * 64] * 64] * 3}).encode()


def _noise(r: random.Random) -> Bad:
    start = r.choice([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 ", b"GIF89a", b"%PDF-"])
    kind = r.choice([*(_TYPES[form] for form in _TYPES), {"content-type": "application/octet-stream"}])
    return Bad("noise", "POST", "/predict", kind, start + r.randbytes(r.randrange(400)))


def _truncated(r: random.Random) -> Bad:
    form = r.choice([*_SOUND])
    return Bad("truncated", "POST", "/predict", _TYPES[form], _SOUND[form][: r.randrange(len(_SOUND[form]) // 2)])


def _damaged(r: random.Random) -> Bad:
    form = r.choice([*_SOUND])
    data = bytearray(_SOUND[form])
    for _ in range(r.randint(1, 40)):
        data[r.randrange(len(data))] = r.randrange(256)
    return Bad("damaged", "POST", "/predict", _TYPES[form], bytes(data), may_pass=True)


def _bomb(r: random.Random) -> Bad:
    side = r.choice([5_000, 60_000, 1 << 20, (1 << 31) - 1])
    sizes = r.choice([(side, side), (1, side), (side, 1), (40_000, 300)])
    return Bad("bomb", "POST", "/predict", _TYPES["PNG"], png(*sizes, _ZEROS if r.random() < 0.05 else b""))


def _json_value(r: random.Random, depth: int = 0) -> Any:
    leaves: list[Callable[[], Any]] = [
        lambda: r.randint(-9, 9), lambda: r.random(), lambda: None, lambda: True, lambda: "x" * r.randrange(50),
        lambda: float("nan"), lambda: float("inf"), lambda: 10 ** r.randrange(400), lambda: "1.5",
    ]  # fmt: skip
    if depth > 4 or r.random() < 0.4:
        return r.choice(leaves)()
    if r.random() < 0.3:
        return {r.choice(["inputs", "x", ""]): _json_value(r, depth + 1) for _ in range(r.randrange(3))}
    return [_json_value(r, depth + 1) for _ in range(r.randrange(5))]


def _garbage(r: random.Random) -> Bad:
    return Bad("json", "POST", "/predict", _JSON, json.dumps({"inputs": _json_value(r)}).encode())


def _odd_json(r: random.Random) -> Bad:
    deep, side = r.randint(10, 100_000), r.choice([1, 63, 65])
    numbers = [b"NaN", b"1e999", b"-Infinity", b'"0.5"', b"[]", b"9" * r.choice([400, 5000]), b"1e39", b"null", b"true"]
    odd = [
        *(_SAMPLE.replace(b"0.5", number, 1) for number in numbers),
        *(b"", b"{", b"nul", b"\xff", _SAMPLE[: r.randrange(len(_SAMPLE) - 1)], _SAMPLE[:-1] + b', "more": 1}'),
        *(b"[" * deep, b'{"inputs":' + b"[" * deep + b"]" * deep + b"}", b'{"a":' * (deep // 100)),
        *(b'{"inputs": [' + b"[]," * deep + b"[]]}", b'{"inputs": ' + b"0," * deep + b"}"),
        json.dumps({"inputs": [[[0] * side] * 64] * 3}).encode(),
        json.dumps({"inputs": [["x" * deep] * 64]}).encode(),
        json.dumps({"inputs": [[[[0] * 2] * 64] * 3] * 65}).encode(),
        _SAMPLE.decode().encode("utf-16"),
    ]
    return Bad("odd json", "POST", "/predict", _JSON, r.choice(odd))


def _headers(r: random.Random) -> Bad:
    form = r.choice([*_SOUND])
    odd: list[dict[str, str]] = [
        {}, {"content-type": "text/html"}, {"content-type": "multipart/form-data"}, {"content-type": "image"},
        {"content-type": "x" * r.randrange(2000)}, {"content-type": ";;;"}, {"content-type": "application/json"},
        {**_TYPES[form], "content-encoding": "gzip"}, {**_TYPES[form], "expect": "nothing", "content-encoding": "br"},
    ]  # fmt: skip
    return Bad("headers", "POST", "/predict", r.choice(odd), _SOUND[form])


def _routes(r: random.Random) -> Bad:
    path = r.choice(["/predict/", "/../etc/passwd", "/%00", "/knobs", "/metrics/x", "/" + "a" * r.randrange(3000)])
    method, path = r.choice(
        [("GET", "/predict"), ("DELETE", "/knob"), ("POST", "/metrics"), ("PATCH", "/"), ("GET", path), ("POST", path)]
    )
    return Bad("routes", method, path, {}, b"")


def _knob(r: random.Random) -> Bad:
    odd: list[Any] = [
        {}, [], None, 1, "off", {"off": False}, {"off": 1}, {"point": -1}, {"point": 10**6}, {"point": 1.5},
        {"budget": 0}, {"budget": -1}, {"budget": float("nan")}, {"budget": 1e-9}, {"max_accuracy_drop": 2},
        {"budget": 1, "point": 0}, {"thresholds": [0, 0]}, {"point": 10**400}, {"x" * 100: 1},
    ]  # fmt: skip
    body = json.dumps(r.choice(odd)).encode() if r.random() < 0.8 else r.randbytes(r.randrange(6000))
    return Bad("knob", "PUT", "/knob", _JSON if r.random() < 0.9 else {}, body)


_KINDS = (_noise, _truncated, _damaged, _bomb, _garbage, _odd_json, _headers, _routes, _knob)


def malformed(count: int, seed: int = 0) -> Iterator[Bad]:
    """This many requests, of all kinds in turn."""
    r = random.Random(seed)
    for i in range(count):
        yield _KINDS[i % len(_KINDS)](r)
