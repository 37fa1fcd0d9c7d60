"""Time every stage and branch on the engine that serves, by moving the thresholds alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.calibration.profile import Profile, processor
from ee_surgery.checks import count, positive, refuse
from ee_surgery.errors import DataError
from ee_surgery.evaluation.latency import interleave
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.runtime.engine import eval_mode
from ee_surgery.runtime.router import Router

_LEAVE, _STAY = -NEVER, 1e30  # thresholds that every sample meets, and that none does although its branch is asked
_ROUNDS = range(5, 200)
Run: TypeAlias = Callable[[tuple[float, ...]], object]
"""Run one batch at some thresholds."""


def profile(
    served: EarlyExitModel | OnnxModel | StagedModel,
    inputs: Inputs | Mapping[str, Any] | None = None,
    *,
    batch_size: int = 1,
    sizes: Sequence[int] | None = None,
    seconds: float = 20.0,
) -> Profile:
    """Time every stage and branch of a model on the engine that runs it, here and now.

    For `ee.calibrate(..., profile=)`, after which the frontier is one of accuracy and time. All that is timed are runs
    in which all samples leave at one exit, with and without a branch before it, in turn: whatever engine runs them.

    Args:
        served: a branched model, on the backend and device that it has, or an exported file. A branched model is
            asked by the score and fallback of its operating point, or by the default one.
        inputs: a batch of any size, repeated as needed; by default what a branched model was augmented with.
        batch_size: samples per call in production.
        sizes: numbers of samples still in flight to time besides `batch_size`, at most that; by default 1, a quarter
            and a half of it. Times between them are interpolated.
        seconds: about how long to take.
    Raises:
        DataError: no inputs for an exported file, or none at all.
        ConfigError: another object, or an invalid number.
    """
    batch_size, seconds = count("batch_size", batch_size), positive("seconds", seconds)
    fewer = [max(1, batch_size // part) for part in (2, 4, batch_size)] if sizes is None else sizes
    if isinstance(served, EarlyExitModel):
        run_of, exits = _routed(served, inputs), len(served.exits)
        device, engine = next(served.branches.parameters()).device, served.engine.backend
        engine += ", torch.compile" if served.engine.compilation is not None else ""
        threads = torch.get_num_threads()
    elif isinstance(served, (OnnxModel, StagedModel)):
        run_of, exits = _exported(served, inputs), len(served.exits) - 1
        device = torch.device("cuda" if "CUDA" in served.engine and torch.cuda.is_available() else "cpu")
        engine, threads = served.engine, served.threads
    else:
        refuse("served", "an EarlyExitModel or an exported file", served)
    ladder = sorted({*(count("sizes", n, high=batch_size) for n in fewer), batch_size})
    calls = {f"{n} {name}": call for n in ladder for name, call in _calls(run_of(n), exits).items()}
    once = sum(spent for (spent,) in interleave(calls, device, rounds=1, warmup=2).values())
    rounds = min(max(int(seconds / once), _ROUNDS[0]), _ROUNDS[-1])
    times = interleave(calls, device, rounds=rounds)
    trunk, branches = zip(*(_split(times, n, exits) for n in ladder), strict=True)
    return Profile(engine, processor(device), threads, batch_size, tuple(ladder), trunk, branches)


def _calls(run: Run, exits: int) -> dict[str, Callable[[], object]]:
    """For each exit, the run that leaves there, and the one that asks its branch in vain and leaves at the next."""
    found: dict[str, Callable[[], object]] = {}
    for k in range(exits + 1):
        leave = [NEVER] * exits
        if k < exits:
            leave[k] = _LEAVE
        found[f"leave {k}"] = lambda taus=tuple(leave): run(taus)
        if k > 0:
            ask = tuple(_STAY if j == k - 1 else tau for j, tau in enumerate(leave))
            found[f"ask {k - 1}"] = lambda taus=ask: run(taus)
    return found


def _split(times: Mapping[str, Sequence[float]], n: int, exits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Milliseconds up to each exit, and of each branch, at one batch size."""
    branches: list[float] = []
    for k in range(exits):  # differences within a round: a slow moment hits both
        pairs = zip(times[f"{n} ask {k}"], times[f"{n} leave {k + 1}"], strict=True)
        branches.append(max(1e3 * statistics.median(ask - leave for ask, leave in pairs), 0.0))
    leave = [1e3 * statistics.median(times[f"{n} leave {k}"]) for k in range(exits + 1)]
    trunk = [max(total - branch, 0.0) for total, branch in zip(leave, (*branches, 0.0), strict=True)]
    return tuple(accumulate(trunk, max)), tuple(branches)


def _routed(branched: EarlyExitModel, inputs: Inputs | Mapping[str, Any] | None) -> Callable[[int], Run]:
    batch = branched.engine.backbone.batch(branched.sample if inputs is None else inputs)
    if not batch.size:
        raise DataError("No inputs to time: the batch is empty.")
    point = branched.operating_point or OperatingPoint.by_hand(NEVER, branched.task.default_score, len(branched.exits))
    engine, policy = branched.engine, point.policy_for(branched.task)

    def run_of(n: int) -> Run:
        rows = batch.select([i % batch.size for i in range(n)])
        known: dict[tuple[float, ...], Router] = {}  # the engine keeps fewer

        def run(taus: tuple[float, ...]) -> object:
            if taus not in known:
                known[taus] = engine.entry(rows).router(replace(policy, thresholds=taus), engine.compilation)
            with torch.no_grad(), eval_mode(list(branched.branches.modules())):
                return known[taus](rows.tensors, rows.size)

        return run

    return run_of


def _exported(file: OnnxModel | StagedModel, inputs: Inputs | Mapping[str, Any] | None) -> Callable[[int], Run]:
    named = {file.inputs[0]: inputs} if inputs is None or not isinstance(inputs, Mapping) else dict(inputs)
    arrays: dict[str, Any] = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in named.items()
    }
    if inputs is None or not all(len(array) for array in arrays.values()):
        raise DataError("Give inputs= to time an exported file: a batch of what it takes.")

    def run_of(n: int) -> Run:
        rows = {name: array[[i % len(array) for i in range(n)]] for name, array in arrays.items()}
        return lambda taus: file.run(rows, taus)

    return run_of
