"""Free memory that torch.export keeps after a capture; otherwise calls with ever new sizes would fill it."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def caches_emptied() -> Iterator[None]:
    """Empty torch's process-wide caches of what ran inside. They are only caches: no result changes.

    Methods of every `ShapeEnv` cache their last results, and with them the environment. The source of every graph
    module is kept forever for tracebacks.
    """
    # private to torch, so it may disappear: then there is nothing to empty
    sources: dict[str, str] = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
    before = {*sources}
    try:
        yield
    finally:
        for name in [*sources]:
            if name not in before:
                sources.pop(name, None)
                linecache.cache.pop(name, None)
        for method in vars(ShapeEnv).values():
            if (clear := getattr(method, "cache_clear", None)) is not None:
                clear()


def untie(program: torch.export.ExportedProgram) -> None:
    """Make a program collectable once it is no longer referenced.

    Its `ShapeEnv` lists the fake inputs, whose sizes hold the `ShapeEnv` in C++, a cycle that Python cannot see.
    The list is for making guards, which an exported program no longer needs.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None) if isinstance(value, Tensor) else None
        listed = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None)
        if listed:
            listed.clear()
            return
