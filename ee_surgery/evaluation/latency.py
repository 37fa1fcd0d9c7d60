"""Timing: interleaved with the original, after a warm-up, synchronized, with the number of threads."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs, tensors
from ee_surgery.branches.base import Branch, ExitLogits, run_branch
from ee_surgery.calibration.profile import processor
from ee_surgery.checks import count, refuse
from ee_surgery.errors import DataError
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


@dataclass(frozen=True)
class Measurement:
    """Routed runs against the original's, paired batch by batch."""

    batch_size: int
    samples: int
    rounds: int
    latency_ms: float
    """Of one batch, median over the rounds, mean over the batches."""
    original_latency_ms: float
    throughput: float
    """Samples per second, from the latency."""
    original_throughput: float
    latency_ratio: float
    """Routed / original; below 1 is faster."""
    spread: tuple[float, float]
    """Quartiles of that ratio over the rounds."""
    macs_fraction: float
    """Mean MACs of these samples as a fraction of the original's: the ratio if time were proportional to MACs."""
    environment: str

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size}: {self.latency_ms:.2f} ms against {self.original_latency_ms:.2f} ms of the "
            f"original (ratio {self.latency_ratio:.3f}, quartiles {self.spread[0]:.3f}-{self.spread[1]:.3f}), "
            f"{self.throughput:.0f} against {self.original_throughput:.0f} samples/s, at {self.macs_fraction:.1%} of "
            f"the MACs\n  {self.samples} samples x {self.rounds} interleaved rounds; {self.environment}"
        )


def measure(
    branched: EarlyExitModel, inputs: Inputs, *, batch_size: int = 1, rounds: int = 10, warmup: int = 2
) -> Measurement:
    """Time a branched model at its operating point against its original, on the same batches in the same run.

    Args:
        inputs: samples as in production, shape (N, ...) or a dict of such, on the model's device; which exits
            they take decides the time, so take real ones.
        batch_size: samples per batch; a smaller last batch is left out.
    Raises:
        DataError: fewer inputs than one batch, or no input tensors.
        ConfigError: an invalid number.
    """
    if not hasattr(branched, "operate"):
        refuse("branched", "an EarlyExitModel", branched)
    batch_size, rounds, warmup = (
        count("batch_size", batch_size),
        count("rounds", rounds),
        count("warmup", warmup, low=0),
    )
    if not isinstance(inputs, Tensor) and not (isinstance(inputs, Mapping) and tensors(inputs)):
        refuse("inputs", "a tensor of samples, or a dict of such", inputs, DataError)
    named = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    first = next(iter(tensors(named).values()))
    batches: list[Inputs] = []
    for start in range(0, len(first) - batch_size + 1, batch_size):
        rows = {name: v[start : start + batch_size] if isinstance(v, Tensor) else v for name, v in named.items()}
        batches.append(rows[""] if isinstance(inputs, Tensor) else rows)
    if not batches:
        raise DataError(f"{len(first)} inputs do not fill a batch of {batch_size}.")

    model = branched.engine.backbone.state().model  # the original in eval mode, without our checks at every call

    def original(batch: Inputs) -> object:
        return model(batch) if isinstance(batch, Tensor) else model(**batch)

    with torch.no_grad():
        cost = torch.cat([branched.predict(batch).macs_fraction for batch in batches]).mean().item()
        routed, plain = [[0.0] * rounds for _ in range(2)]
        latencies: dict[str, list[float]] = {"routed": [], "original": []}
        for batch in batches:
            times = interleave(
                {
                    "routed": lambda batch=batch: branched(batch),
                    "original": lambda batch=batch: original(batch),
                },
                first.device,
                rounds=rounds,
                warmup=warmup,
            )
            routed = [a + b for a, b in zip(routed, times["routed"], strict=True)]
            plain = [a + b for a, b in zip(plain, times["original"], strict=True)]
            for name, values in times.items():
                latencies[name].append(statistics.median(values))
    ratios = [a / b for a, b in zip(routed, plain, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    latency, plainly = (statistics.mean(latencies[name]) for name in ("routed", "original"))
    return Measurement(
        batch_size=batch_size,
        samples=len(batches) * batch_size,
        rounds=rounds,
        latency_ms=latency * 1e3,
        original_latency_ms=plainly * 1e3,
        throughput=batch_size / latency,
        original_throughput=batch_size / plainly,
        latency_ratio=latency / plainly,
        spread=(quartiles[0], quartiles[2]),
        macs_fraction=cost,
        environment=environment(first.device),
    )


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
