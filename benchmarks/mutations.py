"""Mutations of adapter folders: accidental damage, or attacks that recompute the digests.

Each mutation is a function of a folder, which it changes in place, and a random generator; it returns a description.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_surgery.files import sealed, sha256

CONFIG, WEIGHTS, FRONTIER, CARD, PROCESSOR = (
    "config.json", "ee_adapter.safetensors", "frontier.json", "README.md", "preprocessor_config.json",
)  # fmt: skip
Mutation: TypeAlias = Callable[[Path, random.Random], str]

HOSTILE_TEXTS = (
    "\x1b]0;owned\x07", "\x1b[2J\x1b[H", "\x1b]52;c;ZXZpbA==\x07", "\x9b2J", "\u202egpj.exe", "\u200b\u2028",
    "[link=http://x.test]click[/link]", "[/]", "[bold", "# heading\n", "<script>alert(1)</script>",
    "![x](http://x.test/y.png)", "[a](javascript:alert(1))", "```\n---\nlicense: mit\n---", "| a | b |\n|---|---|",
    "a: b\n- c", "{{ 7 * 7 }}", "../../../../etc/passwd", "/etc/passwd", "local-dir:/etc", "hf-hub:evil/model",
    "file:///etc/passwd", "evil/model", "~/.ssh/id_rsa", "A" * 10_000, "", "\x00", "%s%n", "${HOME}", "NaN", "True",
)  # fmt: skip
_NUMBERS = (0, -1, 1, 2, 7, 10**4, 10**6, 10**9, 2**31, 2**63, 10**40, -(10**9), 0.0, -0.5, 0.5, 1.5, 1e300, -1e300)
_WORDS = ("inf", "-inf", "nan", "last", "most_confident", "pool", "conv", "conv3", "mlp", "shortcut", "auto", "eenet",
          "max_prob", "learned", "patience", "timm", "torch", "transformers", "nchw", "tokens", "sequence", "float16",
          "int64", "original")  # fmt: skip
_KEYS = ("_attn_implementation", "quantization_config", "id2label", "torch_dtype", "to_dict", "return_dict",
         "auto_map", "checkpoint_path", "num_classes", "__class__", "tensor", "digest", "files", "own_base",
         "trust_remote_code", "image_processor_type", "processor_class")  # fmt: skip


# --- rewriting with digests that fit


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = CONFIG) -> None:
    """Change one of the JSON files, and update the digests."""
    data = json.loads((folder / name).read_text())
    change(data)
    _write(folder / name, data)
    seal(folder)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = WEIGHTS) -> None:
    """Change the tensors, and update the digests."""
    with safe_open(folder / name, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / name, metadata)
    seal(folder)


def edit_metadata(path: Path, **metadata: str) -> None:
    """Change the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        before, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**before, **metadata})


def seal(folder: Path) -> None:
    """Update the digests of a folder."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(config, dict):
        return
    if isinstance(files := config.get("files"), dict):
        config["files"] = {name: sha256(folder / name) for name in files if (folder / name).is_file()}
    _write(folder / CONFIG, sealed(config))


def _write(path: Path, data: object) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(data))


# --- accidents: no digest is recomputed


def _any_file(folder: Path, rng: random.Random) -> Path:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    read = [path for path in files if path.suffix in (".json", ".safetensors")]
    return rng.choice(files if rng.random() < 0.1 else read)  # cards and plots are not read


def flip_bits(folder: Path, rng: random.Random) -> str:
    """One to eight flipped bits."""
    path, count = _any_file(folder, rng), rng.choice((1, 1, 1, 2, 8))
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{count} bits of {path.name}"


def change_digit(folder: Path, rng: random.Random) -> str:
    """Another digit in a JSON file."""
    path = rng.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    place = rng.choice([i for i, letter in enumerate(text) if letter.isdigit()])
    digit = rng.choice([d for d in "0123456789" if d != text[place]])
    path.write_text(text[:place] + digit + text[place + 1 :])
    return f"a digit of {path.name}"


def cut(folder: Path, rng: random.Random) -> str:
    """A truncated or extended file."""
    path = _any_file(folder, rng)
    data = path.read_bytes()
    more = rng.random() < 0.3
    path.write_bytes(data + rng.randbytes(rng.randint(1, 4096)) if more else data[: rng.randrange(len(data))])
    return f"{'longer' if more else 'shorter'} {path.name}"


def overwrite(folder: Path, rng: random.Random) -> str:
    """A block of zeros or noise."""
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    start, size = rng.randrange(len(data)), rng.randint(1, 512)
    block = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    data[start : start + size] = block[: len(data) - start]
    path.write_bytes(data)
    return f"a block of {path.name}"


def remove(folder: Path, rng: random.Random) -> str:
    """A missing or empty file."""
    path = _any_file(folder, rng)
    path.unlink()
    if empty := rng.random() < 0.5:
        path.touch()
    return f"{'empty' if empty else 'no'} {path.name}"


def hand_edit(folder: Path, rng: random.Random) -> str:
    """A JSON file edited by hand."""
    path = rng.choice(sorted(folder.glob("*.json")))
    data = json.loads(path.read_text())
    description = _mutate(data, rng)
    _write(path, data)
    return f"{path.name}: {description}"


# --- attacks: digests fit


def rewritten(folder: Path, rng: random.Random) -> str:
    """A JSON file rewritten in one to three places."""
    path = rng.choice([path for path in sorted(folder.glob("*.json")) for _ in range(3 if path.name == CONFIG else 2)])
    data = json.loads(path.read_text())
    description = "; ".join(_mutate(data, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    _write(path, data)
    seal(folder)
    return f"{path.name}: {description}"


def tensors(folder: Path, rng: random.Random) -> str:
    """Tensors with other dtypes, shapes or values."""
    name = rng.choice([path.name for path in sorted(folder.glob("*.safetensors"))])
    kind = rng.choice(("nan", "inf", "huge", "dtype", "shape", "flat", "extra", "missing", "empty", "swapped", "zero"))

    def change(found: dict[str, Tensor]) -> None:
        key = rng.choice(sorted(found))
        tensor = found[key].contiguous()
        if kind in ("nan", "inf") and tensor.is_floating_point():
            tensor = tensor.clone()
            tensor.view(-1)[0] = float(kind)
        elif kind == "huge":
            tensor = torch.full(tensor.shape, 1e300, dtype=torch.float64)
        elif kind == "dtype":
            kinds = ("int64", "int8", "bool", "float8_e4m3fn", "float16", "float64", "uint8", "complex64")
            tensor = tensor.to(getattr(torch, rng.choice(kinds)))
        elif kind == "shape":
            tensor = torch.cat([tensor.view(-1), tensor.view(-1)])
        elif kind == "flat":
            tensor = tensor.view(-1)
        elif kind == "zero":
            tensor = torch.zeros_like(tensor)
        if kind == "extra":
            found[rng.choice(("exits.0.evil", "policy.999", "evil", "head.classifier.weight"))] = tensor.clone()
        elif kind in ("missing", "empty"):
            found.pop(key)
            if kind == "empty":
                found[key] = torch.empty(0)
        elif kind == "swapped":
            other = rng.choice(sorted(found))
            found[key], found[other] = found[other].clone(), tensor.clone()
        else:
            found[key] = tensor.clone()

    edit_tensors(folder, change, name)
    return f"{name}: {kind}"


def header(folder: Path, rng: random.Random) -> str:
    """A safetensors header for data that is missing."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(("length", "offsets", "shape", "deep", "many", "long"))
    if kind == "length":
        data = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1))) + data[8:]
    else:
        text = json.loads(data[8 : 8 + size])
        key = rng.choice([key for key in text if key != "__metadata__"])
        if kind == "offsets":
            text[key]["data_offsets"] = [rng.choice((0, -1, 2**40)), rng.choice((0, 2**40, 2**63))]
        elif kind == "shape":
            text[key]["shape"] = rng.choice(([2**40], [2**32, 2**32], [-1], [0], [10**6, 10**6], "x"))
        elif kind == "many":
            text |= {f"exits.0.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        elif kind == "long":
            text["__metadata__"] = {"x" * 100: "y" * 2_000_000}
        encoded = b"[" * 100_000 if kind == "deep" else json.dumps(text).encode()
        data = struct.pack("<Q", len(encoded)) + encoded + data[8 + size :]
    path.write_bytes(data)
    seal(folder)
    return f"header of {path.name}: {kind}"


def no_file(folder: Path, rng: random.Random) -> str:
    """A pipe, a device, a folder or a link loop in place of a file."""
    path = _any_file(folder, rng)
    kind = rng.choice(("pipe", "folder", "loop", "device", "dangling", "sparse"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(200 << 30)
    else:
        path.symlink_to({"loop": path.name, "device": "/dev/zero", "dangling": folder / "nothing"}[kind])
    return f"{kind} as {path.name}"


def bomb(folder: Path, rng: random.Random) -> str:
    """Numbers that would take much time or memory."""
    name, change = rng.choice(_BOMBS)
    edit(folder, change)
    return name


def json_bomb(folder: Path, rng: random.Random) -> str:
    """JSON that is deep, long or made of huge numbers."""
    path = rng.choice(sorted(folder.glob("*.json")))
    kind, text = rng.choice(
        [("deep", "[" * 10**6), ("closed", '{"a":' * 10**5 + "1" + "}" * 10**5), ("digits", "9" * 10**6),
         ("empty lists", "[" + "[]," * 3 * 10**6 + "1]"), ("string", '"' + "x" * 10**7 + '"'), ("float", "1e99999"),
         ("surrogate", '"\\ud800"'), ("constant", "[NaN, Infinity]"), ("not text", "\udcff"), ("number", "3"),
         ("null", "null")]
    )  # fmt: skip
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return f"{kind} in {path.name}"


def other_base(folder: Path, rng: random.Random) -> str:
    """Another base, or its own base with wrong contents."""
    kind = rng.choice(("own", "name", "library", "hub", "classes", "architecture"))

    def change(config: dict[str, Any]) -> None:
        base = config["base"]
        if kind == "own":
            config["own_base"] = not config["own_base"]
        elif kind == "library":
            base["library"] = rng.choice(("timm", "torch", "transformers", "os", 3, None))
        elif kind == "classes":
            base["num_classes"] = rng.choice((0, 1, 3, 10**5, 10**9, -1, None))
        else:
            key = {"name": "model_id", "hub": "hub_id", "architecture": "architecture"}[kind]
            base[key] = rng.choice(("resnet18", "vit_giant_patch14_dinov2", *HOSTILE_TEXTS))

    edit(folder, change)
    return f"base: {kind}"


def processor(folder: Path, rng: random.Random) -> str:
    """An image processor of the attacker's choice."""
    kinds = ("ViTImageProcessor", "TimmWrapperImageProcessor", "CLIPImageProcessor", "Owlv2ImageProcessor",
             "DetrImageProcessor", "IdeficsImageProcessor", "FuyuImageProcessor", "DonutImageProcessor")  # fmt: skip
    data: dict[str, Any] = {
        "image_processor_type": rng.choice(kinds),
        rng.choice(("class_info_file", "size", "image_mean", "repo_path", "auto_map", "processor_class")): rng.choice(
            (
                "/etc/passwd",
                {"height": 10**9, "width": 10**9},
                [1e300],
                {"AutoImageProcessor": "evil.Evil"},
                "x" * 10**5,
            )
        ),
    }
    _write(folder / PROCESSOR, data)
    if rng.random() < 0.5:
        edit(folder, lambda config: config["files"].update({PROCESSOR: "0" * 64}))
    return f"processor: {data['image_processor_type']}"


def _branch(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["exits"][0]["branch"].update(changes)


def _input(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: next(iter(config["inputs"].values())).update(changes)


_BOMBS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("wide msd", _branch(name="msd", options={"width": 10**9})),
    ("msd of 60,000", _branch(name="msd", options={"width": 60_000})),
    ("deep conv", _branch(name="conv", options={"depth": 10**9})),
    ("conv of 60,000 layers", _branch(name="conv", options={"depth": 60_000})),
    ("wide mlp", _branch(name="mlp", options={"hidden": 65_000, "cells": 1000})),
    ("mlp cells", _branch(name="mlp", options={"cells": 60_000})),
    ("token hidden", _branch(name="token", options={"hidden": 65_536})),
    ("token negative", _branch(name="token", options={"hidden": -5})),
    ("eenet narrow", _branch(name="eenet", options={"narrow": -1})),
    ("auto", _branch(name="auto", options={})),
    ("shortcut budget", _branch(name="shortcut", options={"budget": 1e9})),
    ("shortcut blocks", _branch(name="shortcut", options={"blocks": "evil " * 3000})),
    ("option names", _branch(options={"graph": 1, "point": 2})),
    ("option lists", _branch(options={"width": [1, 2]})),
    ("option of the class", _branch(options={"num_classes": 10**6})),
    ("large input", _input(shape=[4, 3, 100_000, 100_000])),
    ("16 million numbers", _input(shape=[1024, 1024, 16, 1])),
    ("many channels", _input(shape=[4, 2**20, 2, 2])),
    ("input of no samples", _input(shape=[0, 3, 32, 32])),
    ("input without a size", _input(shape=[])),
    ("negative input", _input(shape=[4, -3, 32, 32])),
    ("another size", _input(shape=[4, 3, 64, 64])),
    ("one sample", _input(shape=[1, 3, 32, 32])),
    ("token ids", _input(dtype="int64", highest=2**31)),
    ("no such dtype", _input(dtype="load")),
    ("a module's name as dtype", _input(dtype="nn")),
    ("head of 100,000", lambda c: c.update(head_classes=100_000)),
    ("head of 10^9", lambda c: c.update(head_classes=10**9)),
    ("exit twice", lambda c: c["exits"].append(dict(c["exits"][-1]))),
    ("exits reversed", lambda c: c["exits"].reverse()),
    ("exits of the same place", lambda c: c["exits"][-1].update(name=c["exits"][0]["name"])),
    ("10,000 exits", lambda c: c.update(exits=c["exits"] * 5000)),
    ("no exits", lambda c: c.update(exits=[])),
    ("opaque of nothing", lambda c: c["opaque"].append("no.such.module")),
    ("all opaque", lambda c: c.update(opaque=[""])),
    ("100,000 labels", lambda c: c.update(label_names=["x" * 1000] * 100_000)),
    ("labels of another number", lambda c: c.update(label_names=["a", "b"])),
    ("hostile labels", lambda c: c.update(label_names=list(HOSTILE_TEXTS)[: c["base"]["num_classes"]])),
    ("options of the call", lambda c: c["options"].update(self=1, output_attentions=True)),
    ("options without end", lambda c: c["options"].update(x=[[1]] * 1000)),
    ("thresholds", lambda c: c.update(operating_point={"thresholds": [0.5] * 3})),
    ("deep provenance", lambda c: c["provenance"].update(x=json.loads("[" * 100 + "]" * 100))),
    ("wide provenance", lambda c: c["provenance"].update({str(i): "y" * 100 for i in range(20_000)})),
    ("card", lambda c: c["provenance"].update(card={"license": "# x", "datasets": 3, "repo_id": "../x"})),
    ("evaluation", lambda c: c["provenance"].update(evaluation={"accuracy": 0.9999})),
    ("newer format", lambda c: c.update(format_version=99)),
    ("no format", lambda c: c.pop("format_version")),
    ("old format", lambda c: c.update(format_version=2)),
    ("files outside", lambda c: c["files"].update({"../../x": "0" * 64, "/etc/passwd": "0" * 64})),
    ("probe of its own", lambda c: c.update(probe={"seed": 0, "logits": [[1e9]], "noise": 1.0, "rounding": 1.0})),
    ("probe without end", lambda c: c.update(probe={"seed": 0, "logits": [[0.0] * 999] * 999, "noise": 0.0,
                                                    "rounding": 1e9})),
    ("timm settings", lambda c: c.update(preprocessing={"input_size": [3, 10**6, 10**6], "crop_pct": -1})),
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of JSON data with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _mutate(data: Any, rng: random.Random) -> str:
    """Change one place of JSON data."""
    where, key = rng.choice(list(_places(data)))
    value = where[key]
    kind = rng.choice(("remove", "add", "number", "number", "text", "word", "type", "repeat", "shuffle", "scale"))
    if kind == "remove":
        del where[key]
    elif kind == "add" and isinstance(where, dict):
        where[rng.choice((*_KEYS, *HOSTILE_TEXTS))] = rng.choice((*_NUMBERS, *HOSTILE_TEXTS, None, {}, []))
    elif kind == "repeat" and isinstance(where, list):
        where.insert(key, value)
    elif kind == "shuffle" and isinstance(value, list):
        rng.shuffle(value)
    elif kind == "scale" and isinstance(value, int | float) and not isinstance(value, bool):
        where[key] = value * rng.choice((0.5, 2, -1, 10, 1e6, 0.999999))
    elif kind == "text":
        where[key] = rng.choice(HOSTILE_TEXTS)
    elif kind == "word":
        where[key] = rng.choice(_WORDS)
    elif kind == "type":
        where[key] = rng.choice((None, True, False, [], {}, [value], {"tensor": "policy.0"}, str(value), 1.0))
    else:
        where[key] = rng.choice(_NUMBERS)
    return f"{kind} at {str(key)[:40]!r}"


ACCIDENTS: tuple[Mutation, ...] = (flip_bits, change_digit, cut, overwrite, remove, hand_edit)
ATTACKS: tuple[Mutation, ...] = (rewritten, tensors, header, no_file, bomb, json_bomb, other_base, processor)


def mutate(source: Path, target: Path, seed: str) -> tuple[str, bool, str]:
    """A copy of an adapter folder with one mutation.

    Returns:
        Which mutation, whether it was an accident, and what it did.
    """
    rng = random.Random(seed)
    shutil.copytree(source, target)
    mutation = rng.choice(rng.choice((ACCIDENTS, ATTACKS)))
    description = mutation(target, rng)
    return mutation.__name__, mutation in ACCIDENTS, description
