"""Evaluate an adapter and its original on a folder of images, like timm's validate.py.

    python -m recipes.validate FOLDER --adapter user/name --max-accuracy-drop 0.01 --results-file results.json

FOLDER has one sub-folder of images per class, named by class, WordNet id or class number, or in the order of the
classes. Images are preprocessed by the adapter's own transform. Original and routed model run on the same batches in
turn; times are of the model alone, with images in memory, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import ee_surgery as ee
from ee_surgery.backbone.base import make_model
from ee_surgery.evaluation.latency import environment
from ee_surgery.files import atomic_write
from ee_surgery.share.adapter import AdapterConfig, load_adapter
from ee_surgery.share.hub import fetch


@dataclass
class Sums:
    """Running totals of one model."""

    top1: int = 0
    top5: int = 0
    seconds: float = 0.0

    def add(self, logits: Tensor, labels: Tensor, seconds: float) -> None:
        """Count a batch: logits (B, C), labels (B,)."""
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.any(1).sum())
        self.seconds += seconds


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    top1: float
    """In [0, 1], as `top5`."""
    top5: float
    macs_fraction: float
    """Mean per sample, as a fraction of the original's."""
    images_per_second: float
    exit_shares: tuple[float, ...]


def base_of(config: AdapterConfig, weights: str) -> nn.Module | None:
    """The base with your own weights: a file for timm, a folder or repository for transformers; None by default."""
    base = config.base
    if not weights:
        return None
    if base.library == "timm":
        return make_model("timm", base.model_id, checkpoint=weights, num_classes=base.num_classes)
    return make_model("transformers", weights, architecture=base.architecture)


def class_numbers(folders: Sequence[str], config: AdapterConfig) -> list[int]:
    """The class number of each folder."""
    names = list(config.label_names or [])
    classes = config.head_classes or config.base.num_classes
    if classes == 1000 and folders[0][0] == "n" and folders[0][1:].isdigit():  # n01440764: WordNet ids
        from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]

        names = ImageNetInfo().label_names()
    if all(folder in names for folder in folders):
        return [names.index(folder) for folder in folders]
    if all(folder.isdigit() and int(folder) < classes for folder in folders):
        return [int(folder) for folder in folders]
    if len(folders) == classes:
        return list(range(classes))
    raise ee.DataError(f"{len(folders)} folders ({', '.join(folders[:5])} ...) are not the {classes} classes of "
                       f"{config.base.model_id}: name them by class or class number.")  # fmt: skip


def timed(model: ee.EarlyExitModel, pixels: Tensor, amp: bool) -> tuple[ee.ExitOutput, float]:
    """The model's output, and the time in seconds."""
    wait = torch.cuda.synchronize if pixels.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=amp):
        output = model.predict(pixels)
    wait()
    return output, time.perf_counter() - started


def validate(
    branched: ee.EarlyExitModel, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device, amp: bool
) -> list[Row]:
    """Run the original and the routed model on all batches, in turn."""
    original, routed = Sums(), Sums()
    left = torch.zeros(len(branched.exits) + 1, dtype=torch.long)
    macs, samples = 0.0, 0
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        for _ in range(0 if samples else 2):  # capture and warm up
            timed(branched, pixels, amp)
            with branched.exits_disabled():
                timed(branched, pixels, amp)
        with branched.exits_disabled():
            answer, seconds = timed(branched, pixels, amp)
        original.add(answer.logits, labels, seconds)
        answer, seconds = timed(branched, pixels, amp)
        routed.add(answer.logits, labels, seconds)
        left += torch.bincount(answer.exit_index, minlength=len(left)).cpu()
        macs += float(answer.macs_fraction.sum())
        samples += len(labels)
    shares = tuple((left / samples).tolist())
    no_exits = (*[0.0] * len(branched.exits), 1.0)
    return [
        Row(name, sums.top1 / samples, sums.top5 / samples, cost, samples / sums.seconds, exits)
        for name, sums, cost, exits in (
            ("original", original, 1.0, no_exits),
            ("early exit", routed, macs / samples, shares),
        )
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Load, run, print the table, and optionally write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="one sub-folder of images per class")
    parser.add_argument("--adapter", required=True, help="folder, or repository on the Hub")
    parser.add_argument("--revision", help="of the repository")
    parser.add_argument("--base", default="", help="weights of the base, if not the published ones")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--budget", type=float, help="mean MACs, a fraction of the original's")
    when.add_argument("--max-accuracy-drop", type=float, help="0.01 is one percentage point")
    when.add_argument("--risk", type=float, nargs=2, metavar=("EPS", "DELTA"), help="certified disagreement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where it is safe")
    parser.add_argument("--results-file", type=Path, help="JSON")
    options = parser.parse_args(arguments)

    hub = {"revision": options.revision}
    folder = Path(options.adapter) if Path(options.adapter).is_dir() else fetch(options.adapter, **hub)
    config = load_adapter(folder)[0]
    device = torch.device(options.device)
    branched = ee.from_pretrained(folder, base_of(config, options.base)).to(device)
    if options.budget is not None or options.max_accuracy_drop is not None or options.risk is not None:
        risk = None if options.risk is None else (options.risk[0], options.risk[1])
        branched.operate(budget=options.budget, max_accuracy_drop=options.max_accuracy_drop, risk=risk)
    pictures = ImageFolder(options.data, transform=branched.transform())
    pictures.target_transform = class_numbers(pictures.classes, config).__getitem__
    loader = DataLoader(pictures, options.batch_size, num_workers=options.workers, pin_memory=device.type == "cuda")
    rows = validate(branched, loader, device, options.amp)

    table = Table(box=box.MARKDOWN)
    for column in ("", "top-1 %", "top-5 %", "mean MACs %", "images/s", "share at each exit"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = " ".join(f"{share:.0%}" for share in row.exit_shares)
        numbers = [f"{100 * v:.2f}" for v in (row.top1, row.top5, row.macs_fraction)]
        table.add_row(row.model, *numbers, f"{row.images_per_second:.1f}", shares)
    console = Console(width=160)
    console.print(table)
    point = branched.operating_point
    console.print(f"{len(pictures)} images of {options.data}, batch {options.batch_size}"
                  f"{', bfloat16 autocast' if options.amp else ''}. Exits at {', '.join(branched.exits)}, "
                  f"{'no early exit' if point is None else f'operating point {point.rule}'}.")  # fmt: skip
    console.print(f"{environment(device)}. Original {branched.receipt()}.")
    if options.results_file is not None:
        about = {"adapter": options.adapter, "base": config.base.model_id, "exits": branched.exits}
        with atomic_write(options.results_file) as partial:
            partial.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
