"""Early exits for a model on your images, configured by a YAML file: train, calibrate, evaluate, save.

    python -m recipes.train --config recipes/configs/cifar10_resnet20.yaml --set train.epochs=2
    accelerate launch --multi_gpu --num_processes 2 recipes/train.py --config my.yaml --data user/pictures

recipes/settings.py lists all settings. `--data` is a data set on the Hub, a folder of images or parquet files
(`pip install 'ee-surgery[data]'`), or npz files such as `cifar10` (recipes/data.py). For several CPU processes, set
ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`; see docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))  # if the file is run by its path, as above

import ee_surgery as ee
from ee_surgery.backbone.base import Backbone, make_model
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.trackers import JsonLines
from recipes import data
from recipes.networks import CifarResNet
from recipes.pictures import part
from recipes.settings import Model, Recipe, Source, load

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
        run(load(options.config or CONFIGS / "smoke.yaml", changes))
    except ee.SurgeryError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(recipe: Recipe) -> ee.EarlyExitModel:
    """The pipeline; call it in every process."""
    out = Path(recipe.out)
    trackers = [JsonLines(out / "log.jsonl"), *recipe.log_with]
    accelerator = make_accelerator(recipe.train, log_with=trackers, project_dir=recipe.out)
    console = Console(width=160, record=True, quiet=not accelerator.is_main_process)
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        console.print(
            "Only one process: `accelerate launch --cpu` starts several only with MPI. Without it: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    set_seed(recipe.train.seed)  # random weights must be the same in all processes
    with accelerator.local_main_process_first():  # one process downloads
        model, sample = _model(recipe.model)
    varied, plain = _transforms(recipe.model, model, recipe.data.augment)
    classes = Backbone(model, sample).label_names
    with accelerator.local_main_process_first():
        train_set = part(recipe.data, recipe.data.train, varied, classes)
        held_out, test = (
            DataLoader(
                part(recipe.data, name, plain, classes), recipe.train.batch_size, num_workers=recipe.train.num_workers
            )
            for name in (recipe.data.calibrate, recipe.data.test)
        )
    drop = recipe.operate.max_accuracy_drop
    branched = ee.augment(
        model,
        recipe.exits,
        recipe.placement,
        recipe.branch,
        preset=recipe.preset,
        joint=recipe.joint,
        sample=sample,
        train=train_set,
        calibrate=held_out,
        config=recipe.train,
        max_accuracy_drop=0.01 if drop is None else drop,
        seed=recipe.train.seed,
        accelerator=accelerator,
    )
    console.print(branched.frontier)
    asked = {name: value for name, value in asdict(recipe.operate).items() if value is not None}
    branched.operate(**asked or {"point": None})
    console.print(str(ee.evaluate(branched, test, accelerator=accelerator)), highlight=False)
    console.print(f"Original {branched.receipt()}.")
    seconds = branched.provenance["training"]["seconds"]
    console.print(f"{seconds:.0f} s of training, {accelerator.num_processes} process(es), {accelerator.device.type}.")
    console.print(f"Saved in {branched.save_pretrained(out / 'adapter', **_about(recipe.data))}.")
    if recipe.push:
        console.print(f"Pushed: {branched.push_to_hub(recipe.push)}")
    if accelerator.is_main_process:  # only this process saves and pushes
        console.save_text(str(out / "report.md"))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return branched


def _model(settings: Model) -> tuple[nn.Module, torch.Tensor | None]:
    """The original, and a sample if it does not describe its inputs."""
    if settings.library == "cifar10":
        model = CifarResNet(int(settings.name.rpartition("resnet")[2]))
        model.load_state_dict(data.weights(settings.name)[0], strict=False)  # no BatchNorm counters in the file
        return model.eval(), torch.zeros(1, 3, 32, 32)
    model = make_model(
        settings.library,
        settings.name,
        checkpoint=settings.checkpoint,
        num_classes=settings.num_classes,
        pretrained=settings.pretrained,
    )
    size = settings.image_size
    return model, None if size is None else torch.zeros(2, 3, size, size)


def _pixels(processor: Any, picture: Any) -> torch.Tensor:
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def _about(settings: Source) -> dict[str, str]:
    """Fields of the model card about the data."""
    if "/" not in settings.source or Path(settings.source).exists():
        return {"eval_name": f"{settings.source}, {settings.test}"}
    return {"datasets": settings.source, "eval_dataset": settings.source, "eval_split": settings.test.partition("[")[0]}


def _transforms(settings: Model, model: nn.Module, augment: bool) -> tuple[Any, Any]:
    """Transforms for training, and for calibration and testing."""
    if settings.library == "cifar10":
        _, mean, std = data.weights(settings.name)
        scale = v2.Normalize(mean.flatten().tolist(), std.flatten().tolist())
        plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), scale]
        varied = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain]
        return v2.Compose(varied if augment else plain), v2.Compose(plain)
    if settings.library == "transformers":
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(settings.name)
        flip = v2.RandomHorizontalFlip(0.5 if augment else 0)
        plain = v2.Lambda(partial(_pixels, processor))
        return v2.Compose([flip, plain]), plain
    from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]

    config = Backbone(model).preprocessing or {}
    if settings.image_size is not None:
        config["input_size"] = (3, settings.image_size, settings.image_size)
    return create_transform(**config, is_training=augment), create_transform(**config, is_training=False)


if __name__ == "__main__":
    main()
