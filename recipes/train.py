"""`ee-surgery train` with the recipes' own networks and data beside those of timm, transformers and the Hub.

    python -m recipes.train --config recipes/configs/cifar10_resnet20.yaml --set train.epochs=2
    accelerate launch --multi_gpu --num_processes 2 recipes/train.py --config my.yaml --data user/pictures

`library: cifar10` is a network of recipes/data.py such as `cifar10_resnet56`; `--data` may be a folder of its npz
files.
For several CPU processes, set ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`; see docs/scale.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))  # if the file is run by its path, as above

import ee_surgery as ee
from ee_surgery.project.pictures import Arrays, Rows
from ee_surgery.project.run import Library, run
from ee_surgery.project.settings import Model, Source, load
from recipes import data
from recipes.networks import CifarResNet

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the settings and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument("--data", help="overrides data.source")
    parser.add_argument("--out", help="overrides out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as train.epochs=2")
    parser.add_argument("--threads", type=int, help="CPU threads per process")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds: configs/smoke.yaml")
    options = parser.parse_args(arguments)
    changes = list(options.set)
    changes += [f"{name}={value}" for name, value in (("data.source", options.data), ("out", options.out)) if value]
    if options.threads:
        torch.set_num_threads(options.threads)
    if not (options.config or options.smoke):
        parser.error("--config is missing")
    try:
        run(load(options.config or CONFIGS / "smoke.yaml", changes), libraries={"cifar10": CIFAR10}, rowed=npz)
    except ee.SurgeryError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def npz(settings: Source, split: str) -> Rows | None:
    """The two layouts of the recipes' own data."""
    folder = Path(settings.source) if Path(settings.source).is_dir() else data.folder() / settings.source
    if not settings.source or not (folder / f"{split}.npz").exists():
        return None
    if folder.name == "imagenette160":
        photos = data.imagenette(split, folder)
        return list(zip(photos.images, photos.imagenet_index.tolist(), strict=True))
    images, labels = data.cifar10(split, folder)
    return Arrays(images.permute(0, 2, 3, 1), labels)


def _model(settings: Model) -> tuple[nn.Module, torch.Tensor]:
    model = CifarResNet(int(settings.name.rpartition("resnet")[2]))
    model.load_state_dict(data.weights(settings.name)[0], strict=False)  # no BatchNorm counters in the file
    return model.eval(), torch.zeros(1, 3, 32, 32)


def _transforms(settings: Model, model: nn.Module, augmented: bool) -> tuple[Any, Any]:
    _, mean, std = data.weights(settings.name)
    scale = v2.Normalize(mean.flatten().tolist(), std.flatten().tolist())
    plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), scale]
    varied = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain]
    return v2.Compose(varied if augmented else plain), v2.Compose(plain)


CIFAR10 = Library(_model, _transforms)


if __name__ == "__main__":
    main()
