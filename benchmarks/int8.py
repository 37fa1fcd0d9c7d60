"""Float and 8-bit files of two recipes on ONNX Runtime: accuracy, MACs and time, of the originals and with exits.

    python -m recipes.cifar10_shortcuts && python -m recipes.imagenet_mobilenetv2
    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python -m benchmarks.int8

Activations get their ranges from 256 training images. Thresholds are chosen on one half of the test images and reported
on the other, 20 times, from the answers of each file itself; drops are below the original in float. Exits are timed at
the thresholds of the first half, on images of the second, all files in turn, on one thread. The float file is compared
with the model on all test images first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

import ee_surgery as ee
from benchmarks.releases import compare
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.evaluation.latency import environment
from ee_surgery.export.int8 import file_records
from ee_surgery.onnx import OnnxModel
from recipes import data
from recipes.cifar10_resnet56 import Requests, network, over_splits

RANGES, SIZE = 256, 160
NEVER = float("inf")
Subject = tuple[ee.EarlyExitModel, Tensor, Tensor, Tensor]
"""A model with exits; training images; test images with their labels."""


def resnet56(adapter: Path, few: int | None) -> Subject:
    """The network and the adapter of `recipes.cifar10_shortcuts`, and CIFAR-10."""
    _, mean, std = data.weights("cifar10_resnet56")
    train, (test, labels) = data.cifar10("train")[0][:RANGES], data.cifar10("test")
    train, test = ((images.float() / 255 - mean) / std for images in (train, test[:few]))
    return ee.from_pretrained(adapter, network(56)), train, test, labels[:few]


def mobilenetv2(adapter: Path, few: int | None) -> Subject:
    """Those of `recipes.imagenet_mobilenetv2`, and Imagenette at 160 px."""
    tensors, mean, std = data.weights("imagenet_mobilenetv2_100")
    model = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    model.load_state_dict(tensors)
    prepare = v2.Compose([
        v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.flatten().tolist(), std.flatten().tolist()),
    ])  # fmt: skip
    train, test = data.imagenette("train"), data.imagenette("test")
    mixed = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:RANGES].tolist()
    branched = ee.from_pretrained(adapter, model, sample=torch.zeros(1, 3, SIZE, SIZE))
    ranges, pixels = (
        torch.stack([prepare(train.images[i]) for i in mixed]),
        torch.stack([*map(prepare, test.images[:few])]),
    )
    return branched, ranges, pixels, test.imagenet_index[:few]


SUBJECTS: dict[str, tuple[Callable[[Path, int | None], Subject], str, tuple[float, ...]]] = {
    # name: (its parts, the folder of its recipe, accepted drops)
    "CIFAR ResNet-56": (resnet56, "runs/cifar10_shortcuts/adapter", (0.005, 0.01, 0.02)),
    "MobileNetV2 160 px": (mobilenetv2, "runs/imagenet_mobilenetv2/adapter", (0.01, 0.02, 0.05)),
}


def rows(name: str, few: int | None, seconds: float, folder: Path) -> list[list[str]]:
    """Measure one network."""
    make, adapter, drops = SUBJECTS[name]
    branched, ranges, test, labels = make(Path(adapter), few)
    branched.operate(score="max_prob", thresholds=0.9)
    held_out = list(zip(test.split(100), labels.split(100), strict=True))
    paths = {
        "float": branched.export(folder / "float.onnx"),
        "int8": branched.export(folder / "int8.onnx", quantize="int8", calibrate=list(ranges.split(64))),
    }
    print(name, ee.check_export(paths["float"], branched, held_out), flush=True)
    splits, k = both_ways(len(test)), len(branched.exits)
    records = {"float": ee.record(branched, held_out)}
    records["int8"] = file_records(branched.engine, OnnxModel(paths["int8"]), held_out, "max_prob")
    base = [records["float"].take(reported).base_accuracy for _, reported in splits]
    timed, found = {}, []
    for precision, kept in records.items():
        file, points = OnnxModel(paths[precision], threads=1), ee.Frontier.search(kept.take(splits[0][0]))
        own = [kept.take(reported).base_accuracy for _, reported in splits]
        requests: Requests = {f"drop {drop:.1%}": {"max_accuracy_drop": drop} for drop in drops}
        results = {"original": (own, [1.0] * len(own), (NEVER,) * k)}
        for request, (accuracy, cost, _, _) in over_splits(kept, splits, requests).items():
            results[request] = accuracy, cost, points.at(**requests[request]).thresholds
        for request, (accuracy, cost, taus) in results.items():
            below = [100 * (b - a) for a, b in zip(accuracy, base, strict=True)]
            found.append([name, precision, request, f"{100 * statistics.mean(accuracy):.2f}",
                          f"{statistics.mean(below):.2f} ± {statistics.stdev(below):.2f}",
                          f"{statistics.mean(cost):.1%}", f"{paths[precision].stat().st_size / 1e6:.1f}"])  # fmt: skip
            for batch in (1, 32):
                some = test[splits[0][1]][: 32 if batch == 1 else 128].numpy()
                chunks = [some[i : i + batch] for i in range(0, len(some), batch)]
                timed[len(found) - 1, batch] = partial(_all, file, chunks, taus)
    times = compare({f"{row} {batch}": call for (row, batch), call in timed.items()}, seconds)
    for row, cells in enumerate(found):
        cells += [f"{1e3 * times[f'{row} 1'] / 32:.2f}", f"{1e3 * times[f'{row} 32'] / 4:.2f}"]
    return found


def _all(file: OnnxModel, chunks: list[np.ndarray], taus: tuple[float, ...]) -> None:
    for chunk in chunks:
        file.run(chunk, taus)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SUBJECTS), action="append", help="only these networks")
    parser.add_argument("--images", type=int, help="of the test set; all by default")
    parser.add_argument("--seconds", type=float, default=120, help="of timing per network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(box=box.MARKDOWN)
    for head in ("network", "file", "request", "accuracy", "below float", "MACs", "MB", "ms, batch 1", "ms, batch 32"):
        table.add_column(head, justify="left" if head in ("network", "file", "request") else "right")
    for name in options.only or SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, options.images, options.seconds, Path(folder)):
                table.add_row(*row)
    console = Console(width=150)
    console.print(table)
    console.print(f"{environment(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
