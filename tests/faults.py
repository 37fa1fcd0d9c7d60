"""Faults for tests: a disk that fails, an interruption at any operation, and what the world looks like beside them."""

from __future__ import annotations

import builtins
import io
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import _trace
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import ee_surgery as ee
from ee_surgery.backbone.base import digest
from ee_surgery.graph import opaque
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.runtime import engine

# --- disks


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: writes fail as on a full disk, by the kernel itself."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


OPERATIONS = ("mkdir", "open", "create", "fsync", "replace")


@contextmanager
def failing(operation: str, folder: Path, fault: Callable[[], BaseException]) -> Iterator[list[object]]:
    """Every such operation on a file in a folder raises; yields the operations that did.

    Args:
        operation: `create` is `os.open` that may make a file, as lock files are made; `open` is Python's own.
    """
    hits: list[object] = []

    def wrapped(original: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if concerns(*args, **kwargs):
                hits.append(args)
                raise fault()
            return original(*args, **kwargs)

        return run

    def inside(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(folder)

    def writes(path: object, mode: str = "r", *_: object, **__: object) -> bool:
        return inside(path) and any(letter in mode for letter in "wax+")

    with pytest.MonkeyPatch.context() as patch:
        if operation == "open":
            for module in (builtins, io):
                patch.setattr(module, "open", wrapped(io.open, writes))
        elif operation == "create":
            patch.setattr(
                os, "open", wrapped(os.open, lambda path, flags, *_, **__: inside(path) and flags & os.O_CREAT)
            )
        elif operation == "fsync":
            patch.setattr(os, "fsync", wrapped(os.fsync, lambda number: True))
        else:
            patch.setattr(os, operation, wrapped(getattr(os, operation), lambda path, *_, **__: inside(path)))
        yield hits


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


# --- interruptions


class At(TorchDispatchMode):
    """Raise at the n-th operator that torch runs, in forward, backward, or a step of an optimizer; count them all."""

    def __init__(self, n: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.n, self.error, self.count = n, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.n:
            raise self.error
        return func(*args, **(kwargs or {}))


class Trap(nn.Module):
    """Passes on what it gets, but raises at its n-th call in the whole process: in whatever copy, traced or not."""

    n, error, count = 0, KeyboardInterrupt, 0

    @classmethod
    @contextmanager
    def at(cls, n: int = 0, error: type[BaseException] = KeyboardInterrupt) -> Iterator[type[Trap]]:
        """Set it, and count the calls; 0: none raises."""
        cls.n, cls.error, cls.count = n, error, 0  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield cls
        finally:
            cls.n = 0

    def forward(self, x: Tensor) -> Tensor:
        """Give it back."""
        Trap.count += 1
        if Trap.count == Trap.n:
            raise Trap.error
        return x


# --- the world


def switches() -> dict[str, object]:
    """Everything process-wide that a call must leave as it was."""
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "numbers": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        "backends": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch._C._get_mkldnn_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "exporting": torch.compiler.is_compiling(),
        "random": (random.getstate(), str(np.random.get_state(legacy=True)), digest(torch.get_rng_state())),  # noqa: NPY002
        "warnings": [*warnings.filters],
        "patched": (ShapeEnv._set_replacement, vars(_trace)["_ignore_backend_decomps"]),
        "kept whole": [*opaque._running],
        "disabled": engine._DISABLED.get(),
        "threads": threading.active_count(),
        "free": _is_free(GLOBAL_STATE),
    }


def _is_free(lock: Any) -> bool:
    """Whether another thread could take it."""
    taken: list[bool] = []

    def take() -> None:
        taken.append(lock.acquire(blocking=False))
        if taken[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


def shape_of(module: nn.Module) -> dict[str, object]:
    """Everything of a module that is no weight: flags, hooks, attributes."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        found[path] = (
            part.training,
            sorted(vars(part)),
            [dict(table) for name, table in vars(part).items() if name.endswith("_hooks")],
            [(name, p.requires_grad, p.grad is None, p.dtype) for name, p in part.named_parameters(recurse=False)],
        )
    return found


def weights_of(module: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer."""
    return {name: digest(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def state_of(branched: ee.EarlyExitModel) -> dict[str, object]:
    """A branched model but for the weights of its branches."""
    mine = branched.engine
    return {
        "original": (shape_of(branched.backbone), weights_of(branched.backbone)),
        "branches": shape_of(branched.branches),
        "setting": (branched.operating_point, branched.frontier, repr(branched.provenance), branched.own_base),
        "free": (_is_free(mine._lock), _is_free(branched.engine.backbone._lock)),
    }
