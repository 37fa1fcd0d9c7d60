"""Every preset on the same backbones and data: train, record, compare.

    python -m benchmarks.methods train      # hours; goes on where it stopped
    python -m benchmarks.methods compare    # policies on the records; an hour; goes on where it stopped
    python -m benchmarks.methods page       # docs/methods.md and its plots, from benchmarks/results

Branches learn from training images with the original frozen, by each paper's own loss, all in the same few steps
(`PASSES`) of the same optimiser (`COMMON`): at the papers' own rates, made for hundreds of times as many steps, some
would have learned nothing yet. Answers to images that neither the original nor the branches have seen are recorded
once. Policies choose their thresholds on one random half of those and are reported on the other, over `HALVES` halves.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import ee_surgery as ee
from benchmarks.methods_compare import HALVES, compare, read
from benchmarks.methods_page import write_page
from recipes import data
from recipes.cifar10_resnet56 import Varied
from recipes.networks import CifarResNet

RUNS = Path("runs/methods")
RESULTS = Path("benchmarks/results")
SEEDS = (0, 1, 2)
METHODS = ("ours", *ee.PRESETS)
PHOTO_SIZE = 160
IMAGENET_CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


@dataclass(frozen=True)
class Task:
    """A pretrained network, images to train its branches on, and images that neither has seen."""

    model: nn.Module
    sample: Tensor
    train: Dataset  # pyright: ignore[reportMissingTypeArgument]
    test: Tensor
    labels: Tensor
    epochs: int


class TenWay(nn.Module):
    """An ImageNet network restricted to the ten classes of Imagenette."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", torch.tensor(IMAGENET_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        return self.model(x)[:, self.classes]


class Photographs(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Training photographs, with random crops, flips and color jitter."""

    def __init__(self, images: list[Image.Image], labels: Tensor, transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def _cifar(weights: str, model: nn.Module, seed: int, passes: int) -> Task:
    """The branches see a random `passes` of the 50,000 training images once."""
    tensors, mean, std = data.weights(weights)
    model.load_state_dict(tensors, strict=False)
    images, labels = data.cifar10("train")
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:passes]
    test, truth = data.cifar10("test")
    train = Varied(images[some], labels[some], mean, std)
    return Task(model.eval(), torch.zeros(1, 3, 32, 32), train, (test.float() / 255 - mean) / std, truth, 1)


def _resnet56(seed: int, passes: int) -> Task:
    return _cifar("cifar10_resnet56", CifarResNet(56), seed, passes)


def _vit(seed: int, passes: int) -> Task:
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    vit = timm.models.VisionTransformer(**shape, num_classes=10)  # pyright: ignore[reportArgumentType]
    return _cifar("cifar10_vit4_prenorm", vit, seed, passes)


def _mobilenet(seed: int, passes: int) -> Task:
    tensors, mean, std = data.weights("imagenet_mobilenetv2_100")
    model = timm.create_model("mobilenetv2_100", pad_type="same")
    model.load_state_dict(tensors)
    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    varied = v2.Compose([v2.RandomResizedCrop(PHOTO_SIZE, (0.35, 1.0)), v2.RandomHorizontalFlip(), *finish])
    plain = v2.Compose([v2.Resize(PHOTO_SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(PHOTO_SIZE), *finish])
    place = {index: k for k, index in enumerate(IMAGENET_CLASSES)}
    train, test = data.imagenette("train"), data.imagenette("test")
    labels = torch.tensor([place[int(index)] for index in train.imagenet_index])
    unseen = [i for i, fresh in enumerate(test.from_imagenet_val) if fresh]  # the base learned from the others
    inputs = torch.stack([plain(test.images[i]) for i in unseen])
    truth = torch.tensor([place[int(test.imagenet_index[i])] for i in unseen])
    epochs = max(1, round(passes / len(labels)))
    sample = torch.zeros(1, 3, PHOTO_SIZE, PHOTO_SIZE)
    return Task(TenWay(model).eval(), sample, Photographs(train.images, labels, varied), inputs, truth, epochs)


TASKS: dict[str, Callable[[int, int], Task]] = {
    "resnet56": _resnet56,
    "vit4": _vit,
    "mobilenetv2": _mobilenet,
}
PASSES = {"resnet56": 10_000, "vit4": 10_000, "mobilenetv2": 2_500}
"""Images that the branches of each method see, counting every augmented view."""
BATCH = {"resnet56": 32, "vit4": 32, "mobilenetv2": 16}
COMMON: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 5e-3,
    "schedule": "cosine",
    "warmup": 0.05,
    "clip_grad": 1.0,
    "validation": 0,
}


def train(backbone: str, method: str, seed: int, passes: int, folder: Path) -> None:
    """Train one method's branches and record all exits on the test images."""
    path = folder / backbone / f"{method}-{seed}.safetensors"
    if path.exists():
        return
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (transforms use it)
    task = TASKS[backbone](seed, passes)
    graph = ee.inspect(task.model, task.sample)
    common: dict[str, Any] = {**COMMON, "epochs": task.epochs, "batch_size": BATCH[backbone], "seed": seed}
    if method == "ours":
        plan = ee.place(graph, 6, "linear", clip=True)
        branches: list[ee.BranchSpec] = [ee.BranchSpec("auto")] * len(plan.points)
        config = ee.TrainConfig(**common)
    else:
        preset = ee.PRESETS[method]
        plan = preset.plan(graph)
        branches = preset.branches(plan.points)
        config = replace(preset.config, **common)
    branched = ee.attach(graph, plan, branches, seed=seed)
    started = time.perf_counter()
    ee.train(branched, task.train, config)
    seconds = time.perf_counter() - started
    batches = list(zip(task.test.split(250), task.labels.split(250), strict=True))
    records = ee.record(branched, batches)
    if not branched.receipt().unchanged:
        raise SystemExit(str(branched.receipt()))
    records.save(path)
    about = {
        "backbone": backbone,
        "method": method,
        "seed": seed,
        "passes": task.epochs * len(task.train),  # pyright: ignore[reportArgumentType]
        "train_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "exits": list(records.exits),
        "branches": [spec.name for spec in branched.specs],
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=1))


def static_networks(backbone: str, records: ee.ExitRecords) -> dict[str, tuple[float, Tensor]]:
    """Smaller networks for comparison: MACs fraction, and whether each image is classified correctly."""
    found = {}
    for depth in (20, 32) if backbone == "resnet56" else ():
        small = CifarResNet(depth)
        task = _cifar(f"cifar10_resnet{depth}", small, 0, 1)
        with torch.no_grad():
            answers = torch.cat([small(batch).argmax(-1) for batch in task.test.split(250)])
        found[f"ResNet-{depth}"] = (ee.inspect(small, task.sample).macs / records.base_macs, answers == task.labels)
    return found


def main() -> None:
    """Train what is missing, compare what is not compared yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "compare", "page"])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--backbones", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--passes", type=int, help="in place of the default of each backbone")
    parser.add_argument("--halves", type=int, default=HALVES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.verb == "page":
        write_page(options.results, Path("docs"))
        return
    for seed in options.seeds:
        for backbone in options.backbones:
            for method in options.methods:
                results = options.results / f"methods-{backbone}.jsonl"
                if options.verb == "train":
                    if any(line["key"] == f"{method}/oracle/{seed}" for line in read(results)):
                        continue  # compared already, here or elsewhere
                    train(backbone, method, seed, options.passes or PASSES[backbone], options.runs)
                    continue
                about = options.runs / backbone / f"{method}-{seed}.json"
                if not about.exists():
                    continue
                records = ee.ExitRecords.load(about.with_suffix(".safetensors"))
                about = json.loads(about.read_text())
                static = static_networks(backbone, records) if (method, seed) == ("ours", 0) else {}
                compare(records, about, results, static, options.halves)


if __name__ == "__main__":
    main()
