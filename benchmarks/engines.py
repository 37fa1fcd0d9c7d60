"""What exits save on the engines that people serve with, the original beside its exits.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.engines
    ... python -m benchmarks.engines --adapter runs/cifar10_shortcuts/adapter     and the recipe's own exits

Random weights, two exits with `pool` branches at a third and two thirds of the MACs, one thread. Thresholds are set so
that half of the batch leaves at the first exit and half of the rest at the second; at batch 1, the sample leaves at the
second. An adapter of `recipes.cifar10_shortcuts` runs at its own operating point, on test images. All calls of a
network and batch are made in turn; times are medians. The ideal is what stages and branches take alone on the same
engine, on the samples that reach them, without routing and compaction: in PyTorch as functions; under torch.compile
each stage with its branch as one program; in ONNX Runtime and OpenVINO each as a file of its own. `compile, frozen`
packs copies of the weights, those of the original as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ee_surgery as ee
from benchmarks.releases import CASES, compare
from ee_surgery.evaluation.engines import served
from ee_surgery.evaluation.latency import environment, parts
from ee_surgery.onnx import Runner, on_onnxruntime, on_openvino
from ee_surgery.runtime.compiled import CompiledRouter
from ee_surgery.runtime.router import InFlight
from recipes import data
from recipes.cifar10_resnet56 import network

BATCHES = {
    "CIFAR ResNet-56": (1, 32),
    "MobileNetV2 160 px": (1, 32),
    "ResNet-50 160 px": (1, 32),
    "ViT-S/16": (1, 8),
}
ENGINES = {"eager": "PyTorch", "compile": "compile", "frozen": "compile, frozen", "onnx": "ONNX Runtime",
           "openvino": "OpenVINO"}  # fmt: skip
Calls: TypeAlias = dict[str, Callable[[], object]]


def thresholds(scores: Tensor) -> list[float]:
    """Half of the samples at the first exit, half of the rest at the second; one sample alone at the second."""
    first, second = scores[0], scores[1]
    if len(first) == 1:
        return [2.0, -1.0]
    tau = first.median().item()
    rest = second[first < tau]
    return [tau, rest.median().item()]


def stages_alone(folder: Path, x: np.ndarray, exit_index: np.ndarray, load: Callable[[str], Runner]) -> Calls:
    """Each stage and branch on the samples that reach it."""
    calls: Calls = {}
    live, rows, exits = [x], np.arange(len(x)), len([*folder.glob("branch_*.onnx")])
    for k in range(exits + 1):
        stage = load(str(folder / f"stage_{k}.onnx"))
        calls[f"stage {k}"] = partial(stage, live)
        live = [*stage(live)]
        if k < exits:
            branch = load(str(folder / f"branch_{k}.onnx"))
            calls[f"branch {k}"] = partial(branch, live)
            stays = np.flatnonzero(exit_index[rows] > k)
            live, rows = [tensor[stays] for tensor in live], rows[stays]
            if not len(rows):
                break
    return calls


def compiled_alone(branched: ee.EarlyExitModel, x: Tensor, exit_index: Tensor) -> Calls:
    """Each compiled part on the samples that reach it."""
    point, engine = branched.operating_point, branched.engine
    assert point is not None
    router = engine.entry(engine.backbone.batch(x)).router(point.policy, engine.compilation)
    assert isinstance(router, CompiledRouter)
    router([x], len(x))
    calls: Calls = {}
    flight, rows = InFlight((x,)), torch.arange(len(x))
    for k, part in enumerate(router.parts):
        calls[f"part {k}"] = lambda part=part, flight=flight: part.run(flight, router.score)
        if k == router.last:
            break
        flight = part.run(flight, router.score)
        stays = (exit_index[rows] > k).nonzero().squeeze(1)
        if not len(stays):
            break
        flight, rows = flight.keep(stays, router.axes[k + 1]), rows[stays]
    return calls


def calls_of(branched: ee.EarlyExitModel, x: Tensor, engine: str, folder: Path, quick: bool) -> Calls:
    """The original, the exits and the parts alone, on one engine.

    Args:
        quick: trace only, and compile nothing.
    """
    exit_index, subject = branched.predict(x).exit_index, branched.copy()
    if engine in ("compile", "frozen"):
        options: dict[str, Any] = {"backend": "aot_eager"} if quick else {"freeze": engine == "frozen"}
        subject.compile(**options)
    both = served(subject, "compile" if engine == "frozen" else engine, folder)
    if engine == "eager":
        alone = parts(branched, x)
    elif engine in ("compile", "frozen"):
        assert isinstance(both.exits, ee.EarlyExitModel)
        alone = compiled_alone(both.exits, x, exit_index)
    else:
        stages = folder / "stages"
        if not stages.exists():
            branched.export(stages, layout="stages")
        load = partial(on_onnxruntime if engine == "onnx" else on_openvino, threads=1)
        alone = stages_alone(stages, x.numpy(), exit_index.numpy(), load)
    return {"original": partial(both.original, x), "exits": partial(both.exits, x), **alone}


def random_subject(name: str, batch: int) -> tuple[ee.EarlyExitModel, Tensor]:
    """A network with random weights, and a batch of which half leaves at each exit."""
    make, size, _ = next(case for label, case in CASES.items() if label.startswith(name))
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(batch, 3, size, size)
    branched = ee.augment(model, 2, branch="pool", sample=torch.randn(4, 3, size, size))
    branched.operate(thresholds=thresholds(branched.all_exits(x).softmax(-1).amax(-1)[:2]))
    return branched, x


def recipe_subject(adapter: Path, batch: int) -> tuple[ee.EarlyExitModel, Tensor]:
    """The network of a recipe, and test images; a single one leaves at the second exit."""
    branched = ee.from_pretrained(adapter, network(56))
    _, mean, std = data.weights("cifar10_resnet56")
    x = (data.cifar10("test")[0][:256].float() / 255 - mean) / std
    if batch == 1:
        at = branched.predict(x).exit_index
        x = x[at == 1]
    return branched, x[:batch]


def row(
    name: str, branched: ee.EarlyExitModel, x: Tensor, seconds: float, folder: Path, engines: Sequence[str]
) -> list[str]:
    """Measure one network on one batch, a cell per engine."""
    share = branched.predict(x).macs_fraction.mean().item()
    with torch.no_grad():
        measured = {one: calls_of(branched, x, one, folder, quick=seconds < 1) for one in engines}
        calls = {f"{engine}: {call}": run for engine, every in measured.items() for call, run in every.items()}
        times = compare(calls, seconds)
    cells = [f"{name}, batch {len(x)}", f"{share:.2f}"]
    for engine, every in measured.items():
        own = {call: 1e3 * times[f"{engine}: {call}"] for call in every}
        original, exits = own.pop("original"), own.pop("exits")
        cells.append(f"{original:.2f} to {exits:.2f}, {original / exits:.2f}x, {sum(own.values()) / exits:.0%}")
    return cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="per network and batch")
    parser.add_argument("--only", choices=list(BATCHES), action="append", help="only these networks")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="only these")
    parser.add_argument("--adapter", type=Path, help="of recipes.cifar10_shortcuts, measured as well")
    parser.add_argument("--smoke", action="store_true", help="the smallest row, for a moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["CIFAR ResNet-56"] if options.smoke else options.only or list(BATCHES)
    cases = [(name, batch, partial(random_subject, name)) for name in names for batch in BATCHES[name]]
    if options.adapter is not None:
        cases += [("ResNet-56, recipe", batch, partial(recipe_subject, options.adapter)) for batch in (1, 32)]
    engines = options.engine or (["eager", "compile", "onnx"] if options.smoke else [*ENGINES])
    table = Table(box=box.MARKDOWN)
    for head in ("network", "MACs", *(ENGINES[engine] for engine in engines)):
        table.add_column(head, justify="left" if head == "network" else "right")
    for name, batch, make in cases[:1] if options.smoke else cases:
        with tempfile.TemporaryDirectory() as folder:
            seconds = 0.2 if options.smoke else options.seconds
            table.add_row(*row(name, *make(batch), seconds, Path(folder), engines))
    console = Console(width=200)
    console.print("ms per batch, original to exits; speed-up; share of the ideal")
    console.print(table)
    console.print(f"{environment(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
