"""What exits save on the engines that people serve with: PyTorch and ONNX Runtime, the original beside its exits.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.engines

Random weights, two exits with `pool` branches at a third and two thirds of the MACs, one thread. Thresholds are set so
that half of the batch leaves at the first exit and half of the rest at the second; at batch 1, the sample leaves at the
second. All calls of a row are made in turn; times are medians. The ideal is what stages and branches alone take in ONNX
Runtime for the samples that reach them, each as a file of its own, without routing and compaction.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ee_surgery as ee
from benchmarks.releases import CASES, compare
from ee_surgery.onnx import OnnxModel

BATCHES = {
    "CIFAR ResNet-56": (1, 32),
    "MobileNetV2 160 px": (1, 32),
    "ResNet-50 160 px": (1, 32),
    "ViT-S/16": (1, 8),
}


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


def row(name: str, batch: int, seconds: float, folder: Path) -> list[str]:
    """Measure one network at one batch size."""
    make, size, _ = next(case for label, case in CASES.items() if label.startswith(name))
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(batch, 3, size, size)
    branched = ee.augment(model, 2, branch="pool", sample=torch.randn(4, 3, size, size))
    branched.export(folder / "model.onnx")
    branched.export(folder / "stages", layout="stages")
    torch.onnx.export(model, (torch.randn(4, 3, size, size),), folder / "original.onnx", dynamo=True, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=20)  # fmt: skip
    branched.operate(thresholds=thresholds(branched.all_exits(x).softmax(-1).amax(-1)[:2]))
    output, pixels = branched.predict(x), x.numpy()
    file, original = OnnxModel(folder / "model.onnx", threads=1), session(folder / "original.onnx")
    point = branched.operating_point
    assert point is not None
    alone = stages_alone(folder / "stages", pixels, output.exit_index.numpy())
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: model(x),
        "torch exits": lambda: branched(x),
        "onnx": lambda: original(pixels),
        "onnx exits": lambda: file.run(pixels, point.thresholds),
        **alone,
    }
    with torch.no_grad():
        times = compare(calls, seconds)
    ideal = sum(times[name] for name in alone)
    ms = [f"{1e3 * times[name]:.2f}" for name in ("torch", "torch exits", "onnx", "onnx exits")]
    return [
        f"{name}, batch {batch}", f"{output.macs_fraction.mean():.2f}", *ms,
        f"{times['torch'] / times['onnx exits']:.2f}x", f"{times['onnx'] / times['onnx exits']:.2f}x",
        f"{ideal / times['onnx exits']:.0%}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="per row")
    parser.add_argument("--only", choices=list(BATCHES), action="append", help="only these networks")
    parser.add_argument("--smoke", action="store_true", help="the smallest row, for a moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    title = f"ms per batch, one thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    table = Table(title=title)
    heads = ("network", "MACs", "PyTorch", "with exits", "ONNX Runtime", "with exits", "against PyTorch",
             "against ONNX Runtime", "of the ideal")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "network" else "right")
    for name in ["CIFAR ResNet-56"] if options.smoke else options.only or list(BATCHES):
        for batch in BATCHES[name][:1] if options.smoke else BATCHES[name]:
            with tempfile.TemporaryDirectory() as folder:
                table.add_row(*row(name, batch, 0.2 if options.smoke else options.seconds, Path(folder)))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
