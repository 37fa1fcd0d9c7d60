"""Timing: functions in turn, after a warm-up, synchronized; and the parts of a routed run alone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.branches.base import Branch, ExitLogits, run_branch
from ee_surgery.calibration.profile import processor
from ee_surgery.graph.segments import compact
from ee_surgery.model import EarlyExitModel

ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def environment(device: torch.device) -> str:
    """One line about the environment of a timing, without which it means little."""
    malloc = ", ".join(f"{key}={os.environ.get(key, 'unset')}" for key in ALLOCATOR)
    return (
        f"{device.type} {processor(device)}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {malloc}"
    )


def interleave(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 30, warmup: int = 3
) -> dict[str, list[float]]:
    """Time functions in turn, round after round, so that a slow moment of the machine hits all of them.

    Returns:
        Seconds of each call, `rounds` per function, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, order = list(functions), random.Random(0)
    for i in range(-warmup, rounds):
        order.shuffle(names)  # the previous function leaves its data in the caches: randomize which one that is
        for name in names:
            _synchronise(device)
            start = time.perf_counter()
            functions[name]()
            _synchronise(device)
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def parts(branched: EarlyExitModel, x: Inputs) -> dict[str, Callable[[], object]]:
    """Every stage and branch that a routed run of `x` would call, alone, on the samples that reach it.

    The sum of their times is the ideal for that run: its time if deciding and compacting were free.
    """
    policy, chained = branched.policy, branched.branches.chained
    batch = branched.engine.backbone.batch(x)
    program, live = branched.engine.entry(batch).program, batch.tensors
    found: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        exit_index = branched.predict(x).exit_index
        rows = torch.arange(batch.size, device=batch.device)
        log_probs: Tensor | None = None
        for k, stage in enumerate(program.stages):
            if len(rows) == 0:
                break
            # a stage may write to its inputs: time it on the same ones anyway, the values do not matter
            found[f"stage {k}"] = lambda stage=stage, live=live: stage(*live)
            live = stage(*(tensor.clone() for tensor in live))
            if k < len(branched.branches):
                stay = (exit_index[rows] > k).nonzero().squeeze(1)
                if policy is not None and policy.visits(chained)[k]:
                    features = tuple(tensor.clone() for tensor in program.readers[k](live))
                    call = partial(run_branch if chained else _alone, branched.branches[k], features, log_probs)
                    found[f"branch {k}"] = call
                    log_probs = call().log_probs if chained else None
                    log_probs = None if log_probs is None else log_probs.index_select(0, stay)
                live, rows = compact(live, program.segments[k + 1].axes, stay), rows[stay]
    return found


def _alone(branch: Branch, features: tuple[Tensor, ...], previous: Tensor | None) -> ExitLogits:
    return branch(*features)
