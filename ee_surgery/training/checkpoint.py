"""Where training stands, on disk: enough to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ee_surgery.errors import OUT_OF_MEMORY, TrainingError, WriteError
from ee_surgery.files import atomic_write

FILE = "training.pt"
FORMAT_VERSION = 1
_MARK = b"ee_surgery SHA-256:"


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as plain data and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (users' transforms use it)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators back to what `random_state` saw."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; whole or not at all, even when the machine loses power.

    The file is torch's, and ends in the SHA-256 of all before it. torch reads it as it is; it looks at no such end.

    Raises:
        TrainingError: it cannot be written; the one before is whole.
    """
    content = io.BytesIO()
    torch.save({**state, "format_version": FORMAT_VERSION}, content)
    try:
        with atomic_write(folder / FILE) as path, open(path, "wb") as file:
            file.write(content.getbuffer())
            file.write(_MARK + hashlib.sha256(content.getbuffer()).digest())
    except WriteError as error:
        raise TrainingError(f"{error} The same call goes on from the last checkpoint that was written.") from error


def _verified(path: Path) -> io.BytesIO:
    """The content of a file with its digest; nothing of a damaged one is read any further.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    if not path.is_file():  # a folder, a link that leads nowhere, a pipe that would never end
        raise ValueError("it is no file.")
    content = memoryview(path.read_bytes())
    size = len(content) - len(_MARK) - hashlib.sha256().digest_size
    if size < 0 or content[size : size + len(_MARK)] != _MARK:
        raise ValueError("it does not end in a digest.")
    if content[size + len(_MARK) :] != hashlib.sha256(content[:size]).digest():
        raise ValueError("its content has another digest (SHA-256) than the one that was written.")
    return io.BytesIO(content[:size])


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in a folder, or None where there is none yet.

    Args:
        settings: what must be the same as when it was written, as plain data.
    Raises:
        TrainingError: it is damaged, or was made with other settings; the differences are named.
    """
    path = folder / FILE
    try:
        path.lstat()  # of a link itself: one that leads nowhere is no reason to start over
        content = _verified(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Make {folder} a folder that you may read and write, or use another "
            "checkpoint_dir."
        ) from error
    except ValueError as error:
        raise refused(folder, error) from error
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        stored, version = state["settings"], state.get("format_version", FORMAT_VERSION)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise refused(folder, error) from error
    if version != FORMAT_VERSION:
        raise refused(folder, f"it is of format {version}, this version reads {FORMAT_VERSION}.")
    differ = {key: (stored.get(key), value) for key, value in settings.items() if stored.get(key) != value}
    if differ:
        changes = ", ".join(f"{key}: {was!r} there, {now!r} now" for key, (was, now) in differ.items())
        raise TrainingError(f"{path} was made with other settings ({changes}). Use another checkpoint_dir.")
    return state


def refused(folder: Path, why: object) -> TrainingError:
    """What to raise about a checkpoint in a folder that cannot be gone on from."""
    return TrainingError(
        f"{folder / FILE} is no checkpoint of this version, or was damaged: {why} Remove it to start over, or use "
        "another checkpoint_dir."
    )
