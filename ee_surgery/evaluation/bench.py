"""Time a branched model against its original: one or more engines and batch sizes, interleaved, on real inputs."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs, tensors
from ee_surgery.checks import count, instance, names, refuse
from ee_surgery.errors import ConfigError, DataError
from ee_surgery.evaluation.engines import ENGINES, Served, served
from ee_surgery.evaluation.latency import environment, interleave
from ee_surgery.files import atomic_write
from ee_surgery.model import EarlyExitModel
from ee_surgery.tables import Tabular, table


@dataclass(frozen=True)
class Measurement:
    """Routed runs against the original's on one engine, paired batch by batch."""

    engine: str
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
            f"{self.engine}, batch {self.batch_size}: {self.latency_ms:.2f} ms against {self.original_latency_ms:.2f} "
            f"ms of the original (ratio {self.latency_ratio:.3f}, quartiles {self.spread[0]:.3f} to "
            f"{self.spread[1]:.3f}), {self.throughput:.0f} against {self.original_throughput:.0f} samples/s, at "
            f"{self.macs_fraction:.1%} of the MACs\n  {self.samples} samples x {self.rounds} interleaved rounds; "
            f"{self.environment}"
        )


@dataclass(frozen=True)
class Bench(Tabular, Sequence[Measurement]):
    """Several engines and batch sizes, side by side."""

    model: str
    """Id of the original."""
    size: tuple[int, ...]
    """Of one sample."""
    macs: int
    """Of the original, one sample."""
    parameters: int
    """Of the original and the branches."""
    measurements: tuple[Measurement, ...]

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.measurements[index]

    def __len__(self) -> int:
        return len(self.measurements)

    def table(self) -> Table:
        """A row per engine and batch size."""
        rows = [
            [m.engine, str(m.batch_size), f"{m.original_latency_ms:.2f}", f"{m.latency_ms:.2f}",
             f"{m.spread[0]:.3f}-{m.spread[1]:.3f}", f"{1 / m.latency_ratio:.2f}x", f"{m.throughput:.0f}",
             f"{m.macs_fraction:.1%}"]
            for m in self
        ]  # fmt: skip
        heads = ("engine", "batch", "original ms", "with exits ms", "ratio, quartiles", "speed-up", "samples/s", "MACs")
        caption = f"{self[0].samples} samples x {self[0].rounds} interleaved rounds; {self[0].environment}"
        return table(self.model, caption, {head: "left" if head == "engine" else "right" for head in heads}, rows)

    def rows(self) -> list[dict[str, Any]]:
        """Plain data, two rows per measurement, by the names of timm's benchmark script where it has them."""
        return [
            {
                "model": self.model,
                "engine": m.engine,
                "exits": exits,
                "infer_samples_per_sec": round(m.throughput if exits else m.original_throughput, 2),
                "infer_step_time": round(m.latency_ms if exits else m.original_latency_ms, 4),
                "infer_batch_size": m.batch_size,
                "infer_img_size": self.size[-1],
                "infer_gmacs": round(self.macs * (m.macs_fraction if exits else 1) / 1e9, 4),
                "param_count": round(self.parameters / 1e6, 3),
                "speedup": round(1 / m.latency_ratio, 4) if exits else 1.0,
                "samples": m.samples,
                "rounds": m.rounds,
                "environment": m.environment,
            }
            for m in self
            for exits in (False, True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV or JSON, by the suffix of the file.

        Raises:
            ConfigError: another suffix.
            WriteError: it cannot be written.
        """
        path = Path(path)
        if path.suffix == ".csv":
            self.to_csv(path)
        elif path.suffix == ".json":
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(self.rows(), indent=2))
        else:
            raise ConfigError(f"Results are written as .csv or .json, not {path.name!r}.")


def bench(
    branched: EarlyExitModel,
    inputs: Inputs,
    *,
    engines: Iterable[str] = ("eager",),
    batch_sizes: Iterable[int] = (1, 32),
    rounds: int = 10,
    warmup: int = 2,
) -> Bench:
    """Time a branched model at its operating point against its original, on the same batches in the same run.

    Args:
        inputs: samples as in production, shape (N, ...) or a dict of such, on the model's device; which exits
            they take decides the time, so take real ones.
        engines: names in `ENGINES`: `eager`, `compile`, `onnx`, `openvino`. They take turns, on as many threads as
            torch has.
        batch_sizes: samples per batch; a smaller last batch is left out.
    Raises:
        DataError: fewer inputs than one batch, or no input tensors.
        ConfigError: an invalid number, or an engine that cannot run the model.
        UnknownNameError: no such engine.
        SurgeryError: an engine is not installed.
    """
    instance("branched", branched, EarlyExitModel)
    chosen, rounds, warmup = names("engines", engines), count("rounds", rounds), count("warmup", warmup, low=0)
    sizes = [count("batch_sizes", size) for size in batch_sizes]
    if not chosen or not sizes:
        raise ConfigError("Give at least one engine and one batch size.")
    for name in chosen:
        ENGINES[name]
    if not isinstance(inputs, Tensor) and not (isinstance(inputs, Mapping) and tensors(inputs)):
        refuse("inputs", "a tensor of samples, or a dict of such", inputs, DataError)
    split = {size: _batches(inputs, size) for size in sizes}
    found: list[Measurement] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        running = {name: served(branched, name, Path(folder)) for name in chosen}
        for size, batches in split.items():
            cost = torch.cat([branched.predict(batch).macs_fraction for batch in batches]).mean().item()
            found += _measured(running, batches, size, cost, rounds, warmup)
    backbone = branched.engine.backbone
    shape = next(iter(tensors(backbone.batch(split[sizes[0]][0]).arguments).values())).shape[1:]
    parameters = sum(tensor.numel() for tensor in [*backbone.model.parameters(), *branched.branches.parameters()])
    return Bench(backbone.model_id, tuple(shape), branched.trunk_macs[-1], parameters, tuple(found))


def measure(
    branched: EarlyExitModel, inputs: Inputs, *, batch_size: int = 1, rounds: int = 10, warmup: int = 2
) -> Measurement:
    """`bench` in PyTorch alone, at one batch size."""
    return bench(branched, inputs, batch_sizes=(batch_size,), rounds=rounds, warmup=warmup)[0]


def against(
    branched: EarlyExitModel,
    others: Mapping[str, tuple[EarlyExitModel, Inputs]],
    inputs: Inputs,
    *,
    engine: str = "eager",
    batch_size: int = 1,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, float]:
    """Latency of a branched model at its operating point (`exits`), and of the originals of others by name, as
    fractions of its original's, in one run.

    Args:
        others: each with its own inputs, as many as `inputs`.
    """
    device = _first(inputs).device
    split = {name: _batches(own, batch_size) for name, (_, own) in {"": (branched, inputs), **others}.items()}
    sums: dict[str, float] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        calls = {name: (call, split[""]) for name, call in served(branched, engine, Path(folder))._asdict().items()}
        for name, (other, _) in others.items():
            own = Path(folder) / str(len(calls))
            own.mkdir()
            calls[name] = served(other, engine, own).original, split[name]
        for k in range(len(split[""])):
            running = {name: partial(call, batches[k]) for name, (call, batches) in calls.items()}
            for name, seconds in interleave(running, device, rounds=rounds, warmup=warmup).items():
                sums[name] = sums.get(name, 0.0) + statistics.median(seconds)
    return {name: seconds / sums["original"] for name, seconds in sums.items() if name != "original"}


def _first(inputs: Inputs) -> Tensor:
    return inputs if isinstance(inputs, Tensor) else next(iter(tensors(inputs).values()))


def _batches(inputs: Inputs, size: int) -> list[Inputs]:
    named = {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    total = len(next(iter(tensors(named).values())))
    batches: list[Inputs] = []
    for start in range(0, total - size + 1, size):
        rows = {name: v[start : start + size] if isinstance(v, Tensor) else v for name, v in named.items()}
        batches.append(rows[""] if isinstance(inputs, Tensor) else rows)
    if not batches:
        raise DataError(f"{total} inputs do not fill a batch of {size}.")
    return batches


def _measured(
    running: Mapping[str, Served], batches: Sequence[Inputs], size: int, cost: float, rounds: int, warmup: int
) -> list[Measurement]:
    """All engines in turn, batch by batch."""
    device = _first(batches[0]).device
    times: dict[str, list[list[float]]] = {}
    for batch in batches:
        calls = {
            f"{name} {kind}": partial(call, batch)
            for name, both in running.items()
            for kind, call in both._asdict().items()
        }
        for name, seconds in interleave(calls, device, rounds=rounds, warmup=warmup).items():
            times.setdefault(name, []).append(seconds)
    found: list[Measurement] = []
    for name in running:
        routed, plain = (np.array(times[f"{name} {kind}"]) for kind in ("exits", "original"))  # (batches, rounds)
        ratios = (routed.sum(0) / plain.sum(0)).tolist()
        low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        latency, original = (float(np.median(seconds, 1).mean()) for seconds in (routed, plain))
        found.append(
            Measurement(
                engine=name,
                batch_size=size,
                samples=len(batches) * size,
                rounds=rounds,
                latency_ms=latency * 1e3,
                original_latency_ms=original * 1e3,
                throughput=size / latency,
                original_throughput=size / original,
                latency_ratio=latency / original,
                spread=(low, high),
                macs_fraction=cost,
                environment=environment(device),
            )
        )
    return found
