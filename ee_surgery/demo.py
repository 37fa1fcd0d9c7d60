"""The whole pipeline on scikit-learn's digits; a small timm model, trained here, serves as the pretrained one."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import ee_surgery as ee
from ee_surgery.errors import SurgeryError
from ee_surgery.evaluation.bench import measure

EPOCHS = 6


def run(out: Path, console: Console) -> ee.EarlyExitModel:
    """Train a stand-in model, then augment, run and save; adapter and plot go to `out`."""
    torch.manual_seed(0)
    images, labels = digits()
    splits = [TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 900), (900, 1300), (1300, len(images)))]
    learn, held_out, test = splits

    console.rule("a stand-in for a pretrained model: timm resnet18 on handwritten digits")
    model = timm.create_model("resnet18", in_chans=1, num_classes=10)
    pretrain(model, learn.tensors[0], learn.tensors[1])
    console.print(f"trained on {len(learn)} digits for {EPOCHS} epochs, seed 0")

    console.rule("augment: find exits, train branches, calibrate on held-out digits")
    branched = ee.augment(model, train=learn, calibrate=held_out, effort="quick")
    frontier = branched.frontier
    assert frontier is not None
    console.print(frontier)

    console.rule("run: samples leave early")
    point = branched.operate(max_accuracy_drop=0.01)
    assert point is not None
    console.print(
        f"operating at {point.macs_fraction:.1%} of the MACs, expected accuracy {point.expected_accuracy:.2%}"
    )
    console.print(str(ee.evaluate(branched, test)), highlight=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch_size in (1, 64):
        console.print(str(measure(branched, test.tensors[0][:64], batch_size=batch_size, rounds=5)), highlight=False)
    torch.set_num_threads(threads)

    console.rule("save: branches only")
    folder = branched.save_pretrained(out / "adapter")
    frontier.plot(out / "frontier.png")
    page = ee.report(branched, out / "report.html", test)
    again = ee.from_pretrained(folder, model)
    same = torch.equal(again.predict(test.tensors[0]).logits, branched.predict(test.tensors[0]).logits)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    console.print(f"adapter of {size:.2f} MB in {folder}, report in {page}; same logits after loading: {same}")
    console.print(f"original {branched.receipt()}")
    if not (same and branched.receipt().unchanged):
        raise SurgeryError("The demo failed: the logits or the original changed, see above.")
    return branched


def digits(size: int = 32) -> tuple[Tensor, Tensor]:
    """The 1797 digits in a fixed random order: images (N, 1, size, size) in [-1, 1], labels (N,).

    Args:
        size: pixels to enlarge them to; they have 8.
    Raises:
        SurgeryError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SurgeryError("The demo needs scikit-learn: pip install 'ee-surgery[demo]'.") from error
    pixels, labels = load_digits(return_X_y=True)  # (N, 64) in 0..16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pixels).float()[order].view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, size=size, mode="bilinear"), torch.from_numpy(labels)[order]


def pretrain(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> None:
    """Train a whole model in the usual way: the step that a user has done, or downloaded, before using this library."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[rows].roll(shift, (2, 3))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
