"""Early exit on a pretrained CIFAR-10 ResNet-56 against the smaller networks a user would pick instead.

    python -m recipes.cifar10_resnet56

The branches learn from the training set; thresholds are chosen on 5,000 test images and reported on the other 5,000,
over 20 random splits, because the pretrained network has seen all training images (it is 99.98 % right there).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

import ee_surgery as ee
from ee_surgery.runtime.measure import environment, interleave, measure
from recipes import data
from recipes.networks import CifarResNet

REQUESTS: list[tuple[str, dict[str, float]]] = [
    ("drop 0.5 points", {"max_accuracy_drop": 0.005}),
    ("drop 1 point", {"max_accuracy_drop": 0.01}),
    ("drop 2 points", {"max_accuracy_drop": 0.02}),
    ("budget 0.75", {"budget": 0.75}),
    ("budget 0.5", {"budget": 0.5}),
]
SCORES = ("max_prob", "margin", "entropy")


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
    """Train, record, split twenty times, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_resnet56"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few images, one epoch")
    options = parser.parse_args()
    few = 256 if options.smoke else None
    torch.set_num_threads(options.threads)
    started = time.time()
    console = Console(width=130)

    networks = {depth: _network(depth) for depth in (20, 32, 56)}
    _, mean, std = data.weights("cifar10_resnet56")
    images, labels = (tensor[:few] for tensor in data.cifar10("train"))
    epochs = 1 if options.smoke else options.epochs
    branched = _branch(networks[56], Varied(images, labels, mean, std), epochs, options.out)

    test, truth = (tensor[:few] for tensor in data.cifar10("test"))
    test = (test.float() / 255 - mean) / std
    records = ee.record(branched, list(zip(test.split(250), truth.split(250), strict=True)))
    records.save(options.out / "test_records.safetensors")
    static = {depth: _right(networks[depth], test, truth) for depth in (20, 32)}

    splits = [torch.randperm(len(test), generator=torch.Generator().manual_seed(i)).chunk(2) for i in range(20)]
    rows = _splits(records, splits)
    base = [records.take(reported).base_accuracy for _, reported in splits]
    table = Table(
        title=f"CIFAR-10, ResNet-56, exits at {', '.join(branched.exits)}; 20 splits {len(test) // 2}/{len(test) // 2}"
    )
    for column in (
        "",
        "accuracy",
        "below original",
        "mean MACs",
        "share leaving at each exit",
        "latency b1",
        "throughput b64",
    ):
        table.add_column(column, justify="right", overflow="fold")
    table.add_row("original", _spread(base), "", "100 %", "", "1", "1")
    torch.set_num_threads(1)
    first = ee.Frontier.search(records.take(splits[0][0]), SCORES)
    timed = test[splits[0][1]]
    for name, request in REQUESTS:
        branched.operate(first.at(**request))
        one = measure(branched, timed[:192], batch_size=1, rounds=2 if options.smoke else 5)
        many = measure(branched, timed[:1280], batch_size=64, rounds=2 if options.smoke else 5)
        accuracy, cost, shares = rows[name]
        drops = [b - a for a, b in zip(accuracy, base, strict=True)]
        mean_shares = " ".join(f"{statistics.mean(column):.0%}" for column in zip(*shares, strict=True))
        speed = [f"{one.latency_ratio:.3f}", f"{1 / many.latency_ratio:.3f}"]
        table.add_row(name, _spread(accuracy), _spread(drops), _spread(cost), mean_shares, *speed)
    branched.operate(None)
    for depth, right in static.items():
        accuracy = [right[reported].double().mean().item() for _, reported in splits]
        drops = [b - a for a, b in zip(accuracy, base, strict=True)]
        cost = f"{ee.inspect(networks[depth], test[:3]).macs / records.base_macs:.1%}"
        speed = _against(networks[depth], networks[56], test, 3 if options.smoke else 30)
        table.add_row(f"static ResNet-{depth}", _spread(accuracy), _spread(drops), cost, "", *speed)
    console.print(table)
    alone = ", ".join(f"{accuracy:.2%}" for accuracy in records.accuracies)
    costs = ", ".join(f"{macs / records.base_macs:.1%}" for macs in records.branch_macs)
    console.print(f"each exit alone on the whole test set: {alone}; branches cost {costs} of the original")
    branched.frontier = first
    branched.operate(max_accuracy_drop=0.01)
    branched.save_pretrained(options.out / "adapter")
    first.plot(options.out / "frontier.png")
    console.print(f"original {branched.receipt()}")
    console.print(
        f"seed 0, {epochs} epochs, {time.time() - started:.0f} s in all with {options.threads} threads to train; speed "
        f"on split 0: {environment(test.device)}"
    )


def _network(depth: int) -> CifarResNet:
    model = CifarResNet(depth)
    model.load_state_dict(data.weights(f"cifar10_resnet{depth}")[0], strict=False)  # no BatchNorm counters in the file
    return model.eval()


def _branch(model: CifarResNet, train: Varied, epochs: int, out: Path) -> ee.EarlyExitModel:
    branched = ee.augment(model, 6, "linear", sample=torch.zeros(1, 3, 32, 32))
    config = ee.TrainConfig(
        epochs=epochs, lr=3e-3, weight_decay=5e-3, distill=0.5, validation=0, checkpoint_dir=str(out / "training")
    )
    ee.train(branched, train, config)
    return branched


def _right(model: CifarResNet, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(-1) for batch in images.split(250)]) == labels


def _splits(
    records: ee.ExitRecords, splits: list[tuple[Tensor, ...]]
) -> dict[str, tuple[list[float], list[float], list[list[float]]]]:
    """Accuracy, mean MACs fraction and exit shares of every request on the reported half of every split."""
    rows = {name: ([], [], []) for name, _ in REQUESTS}
    for chosen, reported in splits:
        frontier, test = ee.Frontier.search(records.take(chosen), SCORES), records.take(reported)
        for name, request in REQUESTS:
            replay = test.replay(frontier.at(**request).policy)
            accuracy, cost, shares = rows[name]
            accuracy.append(replay.correct.double().mean().item())
            cost.append(replay.macs.mean().item() / records.base_macs)
            shares.append((torch.bincount(replay.exit_index, minlength=len(records.exits) + 1) / len(test)).tolist())
    return rows


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def _against(model: CifarResNet, original: CifarResNet, images: Tensor, rounds: int) -> list[str]:
    """Latency ratio at batch 1 and throughput ratio at batch 64."""
    ratios = []
    for batch in (1, 64):
        x = images[:batch]
        with torch.no_grad():
            times = interleave({"a": lambda x=x: model(x), "b": lambda x=x: original(x)}, x.device, rounds=rounds)
        ratios.append(statistics.median(times["a"]) / statistics.median(times["b"]))
    return [f"{ratios[0]:.3f}", f"{1 / ratios[1]:.3f}"]


if __name__ == "__main__":
    main()
