"""Early exit on a pretrained CIFAR-10 ResNet-56 against smaller networks.

    python -m recipes.cifar10_resnet56

The branches are trained on the training set; thresholds are chosen on 5,000 test images and reported on the other
5,000, and the other way round, over 10 random splits: the pretrained network has seen all training images, and is 99.98
% right there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.evaluation.bench import measure
from ee_surgery.evaluation.compare import both_ways
from ee_surgery.evaluation.latency import environment, interleave
from recipes import data
from recipes.networks import CifarResNet

Requests: TypeAlias = Mapping[str, Mapping[str, Any]]
REQUESTS: Requests = {
    "drop 0.5 points": {"max_accuracy_drop": 0.005},
    "drop 1 point": {"max_accuracy_drop": 0.01},
    "drop 2 points": {"max_accuracy_drop": 0.02},
    "budget 0.75": {"budget": 0.75},
    "budget 0.5": {"budget": 0.5},
}
COLUMNS = (
    "",
    "accuracy %",
    "below original",
    "optimism",
    "mean MACs %",
    "share at each exit",
    "latency b1",
    "throughput b64",
)


class Varied(Dataset):  # pyright: ignore[reportMissingTypeArgument]
    """Training images, shifted, mirrored and normalised."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean.flatten().tolist(), std.flatten().tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def main() -> None:
    """Train, record, report."""
    options = arguments(__doc__, Path("runs/cifar10_resnet56"), epochs=10)
    original = network(56)
    images, mean, std = pictures("train", options.few)
    branched = ee.augment(original, 6, "linear", sample=torch.zeros(1, 3, 32, 32), seed=options.seed)
    config = ee.TrainConfig(
        epochs=options.epochs,
        lr=3e-3,
        weight_decay=5e-3,
        validation=0,
        seed=options.seed,
        checkpoint_dir=str(options.out / "training"),
    )
    trained = ee.train(branched, Varied(*images, mean, std), config)
    report(trained, REQUESTS, options)


def arguments(about: str | None, out: Path, epochs: int) -> argparse.Namespace:
    """Command-line options of these recipes; sets the threads of torch. `few`: images to read, None for all."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="to train; speed is measured with one")
    parser.add_argument("--smoke", action="store_true", help="a few images, one epoch")
    options = parser.parse_args()
    options.few = 256 if options.smoke else None
    options.epochs = 1 if options.smoke else options.epochs
    torch.set_num_threads(options.threads)
    return options


def pictures(split: str, few: int | None) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Images (N, 3, 32, 32) as integers and labels (N,); mean and standard deviation for the networks."""
    _, mean, std = data.weights("cifar10_resnet56")
    images, labels = data.cifar10(split)
    return (images[:few], labels[:few]), mean, std


def report(trained: ee.TrainReport, requests: Requests, options: argparse.Namespace) -> None:
    """Thresholds from one half of the test set, results on the other, 20 times, compared with the smaller networks."""
    branched, original = trained.model, trained.model.backbone
    console = Console(width=160, record=True)
    (test, truth), mean, std = pictures("test", options.few)
    test = (test.float() / 255 - mean) / std
    records = ee.record(branched, list(zip(test.split(250), truth.split(250), strict=True)))
    records.save(options.out / "test_records.safetensors")
    splits = both_ways(len(test))
    frontier = ee.Frontier.search(records.take(splits[0][0]))
    torch.set_num_threads(1)
    rounds = 2 if options.smoke else 10

    table = Table(box=box.MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, justify="right", overflow="fold")
    base = [records.take(reported).base_accuracy for _, reported in splits]
    table.add_row("original", _spread(base), "", "", "100", "", "1", "1")
    unseen, kept = test[splits[0][1]], []
    for name, (accuracy, cost, shares, optimism) in over_splits(records, splits, requests).items():
        branched.operate(frontier.at(**requests[name]))
        one = measure(branched, unseen[:192], batch_size=1, rounds=rounds)
        many = measure(branched, unseen[:640], batch_size=64, rounds=rounds)
        saving = [timed for timed in (one, many) if timed.macs_fraction < 1]
        kept += [(1 - timed.latency_ratio) / (1 - timed.macs_fraction) for timed in saving]
        speed = f"{one.latency_ratio:.3f}", f"{1 / many.latency_ratio:.3f}"
        shown = " ".join(f"{statistics.mean(column):.0%}" for column in zip(*shares, strict=True))
        optimistic = f"{100 * statistics.mean(optimism):.2f}"
        table.add_row(name, _spread(accuracy), _below(accuracy, base), optimistic, _spread(cost), shown, *speed)
    for depth in (20, 32):
        smaller = network(depth)
        found = right(smaller, test, truth)
        accuracy = [found[reported].double().mean().item() for _, reported in splits]
        cost = f"{100 * ee.inspect(smaller, test[:3]).macs / records.base_macs:.1f}"
        speed = _against(smaller, original, test, 5 * rounds)
        table.add_row(f"static ResNet-{depth}", _spread(accuracy), _below(accuracy, base), "", cost, "", *speed)

    console.print(table)
    alone = ", ".join(f"{accuracy:.2%}" for accuracy in records.accuracies)
    costs = ", ".join(f"{macs / records.base_macs:.1%}" for macs in records.branch_macs)
    console.print(f"Exits at {', '.join(branched.exits)}, 10 splits of {len(test)} test images in halves, both ways.")
    console.print(f"Each exit alone on the whole test set: {alone}; the branches cost {costs} of the original.")
    minutes = sum(epoch.seconds for epoch in trained.epochs) / 60
    run = f"seed {options.seed}, {len(trained.epochs)} epochs, {minutes:.0f} min, {options.threads} thread(s)"
    console.print(f"Training: {run}.")
    console.print(f"Speed on split 0: {environment(test.device)}.")
    if kept:
        console.print(f"Of the MACs saved on the timed images, at least {min(kept):.1%} is also saved in time.")
    branched.frontier = frontier
    branched.operate(max_accuracy_drop=0.01)
    branched.save_pretrained(options.out / "adapter")
    frontier.plot(options.out / "frontier.png")
    unseen = [(test[rows], truth[rows]) for rows in splits[0][1].split(250)]
    ee.report(branched, options.out / "report.html", unseen)
    console.print(f"Original {branched.receipt()}.")
    console.save_text(str(options.out / "report.md"))


def network(depth: int) -> CifarResNet:
    """A pretrained one."""
    model = CifarResNet(depth)
    model.load_state_dict(data.weights(f"cifar10_resnet{depth}")[0], strict=False)  # no BatchNorm counters in the file
    return model.eval()


def right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 250) -> Tensor:
    """Which of the images (N, 3, H, W) a network gets right, bool (N,)."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(-1) for batch in images.split(batch_size)]) == labels


def over_splits(
    records: ee.ExitRecords,
    splits: list[tuple[Tensor, Tensor]],
    requests: Requests,
    trace: Callable[[ee.ExitRecords], ee.Frontier] = ee.Frontier.search,
) -> dict[str, tuple[list[float], list[float], list[list[float]], list[float]]]:
    """Per request and split: accuracy, mean MACs and exit shares on the reported half, optimism on the other."""
    rows = {name: ([], [], [], []) for name in requests}
    for chosen, reported in splits:
        frontier, test = trace(records.take(chosen)), records.take(reported)
        for name, request in requests.items():
            point = frontier.at(**request)
            replay = test.replay(point.policy)
            accuracy, cost, shares, optimism = rows[name]
            optimism.append(point.accuracy - point.expected_accuracy)
            accuracy.append(replay.correct.double().mean().item())
            cost.append(replay.macs.mean().item() / records.base_macs)
            shares.append((torch.bincount(replay.exit_index, minlength=len(records.exits) + 1) / len(test)).tolist())
    return rows


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def _below(accuracy: list[float], base: list[float]) -> str:
    return _spread([b - a for a, b in zip(accuracy, base, strict=True)])


def _against(model: nn.Module, original: nn.Module, images: Tensor, rounds: int) -> tuple[str, str]:
    """Latency ratio at batch 1 and throughput ratio at batch 64."""
    ratios = []
    for batch in (1, 64):
        x = images[:batch]
        with torch.no_grad():
            times = interleave({"a": lambda x=x: model(x), "b": lambda x=x: original(x)}, x.device, rounds=rounds)
        ratios.append(statistics.median(times["a"]) / statistics.median(times["b"]))
    return f"{ratios[0]:.3f}", f"{1 / ratios[1]:.3f}"


if __name__ == "__main__":
    main()
