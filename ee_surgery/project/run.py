"""Run a project: train, calibrate, evaluate and save as its file says; in every process of `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ee_surgery.backbone.base import Backbone, make_model
from ee_surgery.errors import ConfigError
from ee_surgery.evaluation.evaluate import evaluate
from ee_surgery.model import EarlyExitModel
from ee_surgery.pipeline import augment
from ee_surgery.project.pictures import Rowed, part
from ee_surgery.project.settings import Model, Project, Source
from ee_surgery.registry import suggest
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.trackers import JsonLines


class Library(NamedTuple):
    """Where models come from."""

    model: Callable[[Model], tuple[nn.Module, torch.Tensor | None]]
    """The original, and a sample if it does not describe its inputs."""
    transforms: Callable[[Model, nn.Module, bool], tuple[Any, Any]]
    """For training, augmented or not, and for calibration and testing."""


def run(
    project: Project, *, libraries: Mapping[str, Library] | None = None, rowed: Rowed | None = None
) -> EarlyExitModel:
    """Augment, train, calibrate, evaluate, save, and push if asked.

    Args:
        libraries: more than timm and transformers, by name.
        rowed: reads other kinds of data.
    Raises:
        SurgeryError: as of the single steps.
    """
    from accelerate.utils import set_seed

    known = {**LIBRARIES, **(libraries or {})}
    if project.model.library not in known:
        name = project.model.library
        raise ConfigError(f"model: library is {name!r}, which is not known. {suggest(name, known)}")
    library = known[project.model.library]
    out = Path(project.out)
    trackers = [JsonLines(out / "log.jsonl"), *project.log_with]
    accelerator = make_accelerator(project.train, log_with=trackers, project_dir=project.out)
    console = Console(width=160, record=True, quiet=not accelerator.is_main_process)
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        console.print(
            "Only one process: `accelerate launch --cpu` starts several only with MPI. Without it: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    set_seed(project.train.seed)  # random weights must be the same in all processes
    with accelerator.local_main_process_first():  # one process downloads
        model, sample = library.model(project.model)
    varied, plain = library.transforms(project.model, model, project.data.augment)
    classes = Backbone(model, sample).label_names
    with accelerator.local_main_process_first():
        train_set = part(project.data, project.data.train, varied, classes, rowed)
        held_out, test = (
            DataLoader(
                part(project.data, name, plain, classes, rowed),
                project.train.batch_size,
                num_workers=project.train.num_workers,
            )
            for name in (project.data.calibrate, project.data.test)
        )
    drop = project.operate.max_accuracy_drop
    branched = augment(
        model,
        project.exits,
        project.placement,
        project.branch,
        preset=project.preset,
        joint=project.joint,
        sample=sample,
        train=train_set,
        calibrate=held_out,
        config=project.train,
        max_accuracy_drop=0.01 if drop is None else drop,
        seed=project.train.seed,
        accelerator=accelerator,
    )
    console.print(branched.frontier)
    asked = {name: value for name, value in asdict(project.operate).items() if value is not None}
    branched.operate(**asked or {"point": None})
    console.print(str(evaluate(branched, test, accelerator=accelerator)), highlight=False)
    console.print(f"Original {branched.receipt()}.")
    seconds = branched.provenance["training"]["seconds"]
    console.print(f"{seconds:.0f} s of training, {accelerator.num_processes} process(es), {accelerator.device.type}.")
    console.print(f"Saved in {branched.save_pretrained(out / 'adapter', **_about(project.data))}.")
    if project.push:
        console.print(f"Pushed: {branched.push_to_hub(project.push)}")
    if accelerator.is_main_process:  # only this process saves and pushes
        console.save_text(str(out / "report.md"))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return branched


def _model(settings: Model) -> tuple[nn.Module, torch.Tensor | None]:
    model = make_model(
        settings.library,  # pyright: ignore[reportArgumentType]
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


def _of_timm(settings: Model, model: nn.Module, augmented: bool) -> tuple[Any, Any]:
    from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]

    config = Backbone(model).preprocessing or {}
    if settings.image_size is not None:
        config["input_size"] = (3, settings.image_size, settings.image_size)
    return create_transform(**config, is_training=augmented), create_transform(**config, is_training=False)


def _of_transformers(settings: Model, model: nn.Module, augmented: bool) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(settings.name)
    plain = v2.Lambda(partial(_pixels, processor))
    return v2.Compose([v2.RandomHorizontalFlip(0.5 if augmented else 0), plain]), plain


LIBRARIES = {"timm": Library(_model, _of_timm), "transformers": Library(_model, _of_transformers)}
"""By the name that a project gives."""
