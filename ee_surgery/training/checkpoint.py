"""Training checkpoints: enough state to resume exactly."""

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
    """Restore all generators to the state from `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, even if the machine loses power.

    The file has torch's format, followed by the SHA-256 of its content, which torch ignores.

    Raises:
        TrainingError: it cannot be written; the previous one is intact.
    """
    content = io.BytesIO()
    torch.save({**state, "format_version": FORMAT_VERSION}, content)
    try:
        with atomic_write(folder / FILE) as path, open(path, "wb") as file:
            file.write(content.getbuffer())
            file.write(_MARK + hashlib.sha256(content.getbuffer()).digest())
    except WriteError as error:
        raise TrainingError(f"{error} The same call resumes from the last checkpoint that was written.") from error


def _verified(path: Path) -> io.BytesIO:
    """The content of a checkpoint file, after verifying its digest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    if not path.is_file():  # a folder, a link that leads nowhere, a pipe that would never end
        raise ValueError("it is not a file.")
    content = memoryview(path.read_bytes())
    size = len(content) - len(_MARK) - hashlib.sha256().digest_size
    if size < 0 or content[size : size + len(_MARK)] != _MARK:
        raise ValueError("it does not end in a digest.")
    if content[size + len(_MARK) :] != hashlib.sha256(content[:size]).digest():
        raise ValueError("its content does not match its digest (SHA-256).")
    return io.BytesIO(content[:size])


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in a folder, or None if there is none yet.

    Args:
        settings: plain data that must equal the settings it was written with.
    Raises:
        TrainingError: it is damaged, or was made with other settings; the differences are named.
    """
    path = folder / FILE
    try:
        path.lstat()  # of the link itself: a broken link is no reason to start over
        content = _verified(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Make {folder} readable and writable, or use another checkpoint_dir."
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
        raise refused(folder, f"it has format {version}, this version reads {FORMAT_VERSION}.")
    differ = {key: (stored.get(key), value) for key, value in settings.items() if stored.get(key) != value}
    if differ:
        changes = ", ".join(f"{key}: {was!r} there, {now!r} now" for key, (was, now) in differ.items())
        raise TrainingError(f"{path} was made with other settings ({changes}). Use another checkpoint_dir.")
    return state


def refused(folder: Path, why: object) -> TrainingError:
    """The error for a checkpoint that cannot be resumed from."""
    return TrainingError(
        f"{folder / FILE} is not a checkpoint of this version, or is damaged: {why} Remove it to start over, or use "
        "another checkpoint_dir."
    )
