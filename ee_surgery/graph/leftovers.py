"""What torch.export leaves in memory behind a capture, cut loose: else calls in ever new sizes would fill it."""

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
    """Behind what runs inside, torch's process-wide caches hold nothing of it. They are caches: no result changes.

    Methods of every `ShapeEnv` remember their last answers, and with them the environment. The source of every graph
    that was made into a module is kept for tracebacks, for good.
    """
    # torch's own business, so it may be gone tomorrow: then there is nothing to empty
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
    """Let the garbage collector have a program once nobody needs it.

    Its `ShapeEnv` lists the fake inputs, whose sizes hold the `ShapeEnv`: in C++, where Python cannot see the cycle.
    The list is for making guards, which an exported program has behind it.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None) if isinstance(value, Tensor) else None
        listed = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None)
        if listed:
            listed.clear()
            return
