"""What exits save on the engines that people serve with: PyTorch, torch.compile and ONNX Runtime, the original beside
its exits.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.engines

Random weights, two exits with `pool` branches at a third and two thirds of the MACs, one thread. Thresholds are set so
that half of the batch leaves at the first exit and half of the rest at the second; at batch 1, the sample leaves at the
second. All calls of a network and batch are made in turn; times are medians. The ideal is what stages and branches take
alone on the same engine, on the samples that reach them, without routing and compaction: in PyTorch as functions; under
torch.compile each stage with its branch as one program; in ONNX Runtime each as a file of its own. `compile, frozen`
packs copies of the weights, those of the original as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.releases import CASES, compare
from ee_surgery.evaluation.latency import parts
from ee_surgery.onnx import OnnxModel
from ee_surgery.runtime.compilation import Compilation
from ee_surgery.runtime.compiled import CompiledRouter
from ee_surgery.runtime.router import InFlight

BATCHES = {
    "CIFAR ResNet-56": (1, 32),
    "MobileNetV2 160 px": (1, 32),
    "ResNet-50 160 px": (1, 32),
    "ViT-S/16": (1, 8),
}
ENGINES = ("torch", "onnx")


def session(path: Path) -> Callable[..., Any]:
    """One file of a staged export on one thread; called with its inputs in order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in made.get_inputs()]
    return lambda *inputs: made.run(None, dict(zip(names, inputs, strict=True)))


def thresholds(scores: Tensor) -> list[float]:
    """Half of the samples at the first exit, half of the rest at the second; one sample alone at the second."""
    first, second = scores[0], scores[1]
    if len(first) == 1:
        return [2.0, -1.0]
    tau = first.median().item()
    rest = second[first < tau]
    return [tau, rest.median().item()]


def stages_alone(folder: Path, x: np.ndarray, exit_index: np.ndarray) -> dict[str, Callable[[], object]]:
    """Each stage and branch on the samples that reach it."""
    calls: dict[str, Callable[[], object]] = {}
    live, rows = [x], np.arange(len(x))
    for k in range(3):
        stage = session(folder / f"stage_{k}.onnx")
        calls[f"stage {k}"] = lambda stage=stage, live=live: stage(*live)
        live = stage(*live)
        if k < 2:
            branch = session(folder / f"branch_{k}.onnx")
            calls[f"branch {k}"] = lambda branch=branch, live=live: branch(*live)
            stays = np.flatnonzero(exit_index[rows] > k)
            live, rows = [tensor[stays] for tensor in live], rows[stays]
            if not len(rows):
                break
    return calls


def compiled_alone(branched: ee.EarlyExitModel, x: Tensor, exit_index: Tensor) -> dict[str, Callable[[], object]]:
    """Each compiled part on the samples that reach it."""
    point, engine = branched.operating_point, branched.engine
    assert point is not None
    router = engine.entry(engine.backbone.batch(x)).router(point.policy, engine.compilation)
    assert isinstance(router, CompiledRouter)
    router([x], len(x))
    calls: dict[str, Callable[[], object]] = {}
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


Calls: TypeAlias = dict[str, Callable[[], object]]


def in_torch(model: nn.Module, branched: ee.EarlyExitModel, x: Tensor, quick: bool) -> dict[str, Calls]:
    """The original, the exits and the parts alone, on each engine within PyTorch.

    Args:
        quick: trace only, and compile nothing.
    """
    exit_index, engines = branched.predict(x).exit_index, {}
    engines["PyTorch"] = {"original": lambda: model(x), "exits": lambda: branched(x), **parts(branched, x)}
    for freeze in (False,) if quick else (False, True):
        compiled, how = branched.copy(), Compilation({"backend": "aot_eager"} if quick else {}, freeze)
        compiled.engine.compilation = how
        alone = compiled_alone(compiled, x, exit_index)
        marked = x.clone()
        original = how.apply(model.forward)
        if len(x) > 1:
            torch._dynamo.mark_dynamic(marked, 0)
        with how.compiling():
            original(marked)
        calls: Calls = {"original": lambda original=original: original(x), "exits": lambda c=compiled: c(x)}
        engines["compile, frozen" if freeze else "compile"] = {**calls, **alone}
    return engines


def in_onnx(model: nn.Module, branched: ee.EarlyExitModel, x: Tensor, folder: Path) -> Calls:
    """The same in ONNX Runtime."""
    branched.export(folder / "model.onnx")
    branched.export(folder / "stages", layout="stages")
    torch.onnx.export(model, (torch.randn(4, *x.shape[1:]),), folder / "original.onnx", dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=20)  # fmt: skip
    file, original, pixels = OnnxModel(folder / "model.onnx", threads=1), session(folder / "original.onnx"), x.numpy()
    point = branched.operating_point
    assert point is not None
    alone = stages_alone(folder / "stages", pixels, branched.predict(x).exit_index.numpy())
    return {"original": lambda: original(pixels), "exits": lambda: file.run(pixels, point.thresholds), **alone}


def rows(name: str, batch: int, seconds: float, folder: Path, engines: Sequence[str]) -> list[list[str]]:
    """Measure one network at one batch size, a row per engine."""
    make, size, _ = next(case for label, case in CASES.items() if label.startswith(name))
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(batch, 3, size, size)
    branched = ee.augment(model, 2, branch="pool", sample=torch.randn(4, 3, size, size))
    branched.operate(thresholds=thresholds(branched.all_exits(x).softmax(-1).amax(-1)[:2]))
    share = branched.predict(x).macs_fraction.mean().item()
    with torch.no_grad():
        measured = in_torch(model, branched, x, quick=seconds < 1) if "torch" in engines else {}
        if "onnx" in engines:
            measured["ONNX Runtime"] = in_onnx(model, branched, x, folder)
        calls = {f"{engine}: {call}": run for engine, every in measured.items() for call, run in every.items()}
        times = compare(calls, seconds)
    found: list[list[str]] = []
    for engine, every in measured.items():
        own = {call: times[f"{engine}: {call}"] for call in every}
        original, exits = own.pop("original"), own.pop("exits")
        ideal = sum(own.values())
        found.append([f"{name}, batch {batch}", f"{share:.2f}", engine, f"{1e3 * original:.2f}", f"{1e3 * exits:.2f}",
                      f"{original / exits:.2f}x", f"{ideal / exits:.0%}"])  # fmt: skip
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="per network and batch")
    parser.add_argument("--only", choices=list(BATCHES), action="append", help="only these networks")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="only these")
    parser.add_argument("--smoke", action="store_true", help="the smallest row, for a moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    title = f"ms per batch, one thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    table = Table(title=title)
    for head in ("network", "MACs", "engine", "original", "with exits", "speed-up", "of the ideal"):
        table.add_column(head, justify="left" if head in ("network", "engine") else "right")
    for name in ["CIFAR ResNet-56"] if options.smoke else options.only or list(BATCHES):
        for batch in BATCHES[name][:1] if options.smoke else BATCHES[name]:
            with tempfile.TemporaryDirectory() as folder:
                seconds = 0.2 if options.smoke else options.seconds
                for row in rows(name, batch, seconds, Path(folder), options.engine or ENGINES):
                    table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
