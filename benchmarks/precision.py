"""Training speed of recipes.cifar10_shortcuts by number format and memory format, in one run.

    python -m benchmarks.precision
    python -m benchmarks.precision --gradients    # where bfloat16 weight gradients of convolutions are wrong here

Steps of the recipe on the frozen CIFAR-10 ResNet-56, settings in turn, `ROUNDS` times; the first step of each is left
out. `auto` is what the recipe uses; until a trial was added to it, the recipe always trained in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from torch.nn import functional

import ee_surgery as ee
from benchmarks.tables import table
from ee_surgery.evaluation.latency import environment
from recipes.cifar10_resnet56 import network, pictures
from recipes.cifar10_shortcuts import CONFIG, EXITS, SIZE

SETTINGS = {
    "bfloat16, channels last": ("bf16", True),
    "float32, channels last": ("no", True),
    "float32": ("no", False),
    "auto, channels last (the recipe)": ("auto", True),
}
ROUNDS = 3


def step(precision: str, channels_last: bool, teacher: bool, steps: int) -> tuple[float, str]:
    """Seconds per step, and the number format that was used."""
    images, mean, std = pictures("train", (steps + 1) * SIZE)
    model = network(56)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    branches = [ee.BranchSpec("shortcut", options={"blocks": blocks}) for blocks in EXITS.values()]
    branched = ee.augment(model, list(EXITS), branch=branches, sample=torch.zeros(2, 3, 32, 32))
    config = replace(
        CONFIG,
        epochs=1,
        max_steps=steps,
        distill_from=0.0 if teacher else 1.0,
        mixed_precision=precision,
        progress=False,
    )
    batches = ee.AugmentedBatches(*images, mean=mean, std=std, batch_size=SIZE)
    speed = ee.train(branched, batches, config).epochs[0].speed
    assert speed is not None
    return speed.seconds_per_step, branched.provenance["training"]["mixed_precision"]


def gradients() -> str:
    """Largest error of weight gradients in bfloat16, relative to the largest in float32, by size of the map."""
    rows = []
    for side in (1, 2, 4):
        for kernel, stride in ((3, 1), (3, 2), (5, 2)):
            x, weight = torch.randn(64, 64, side, side), torch.randn(64, 64, kernel, kernel) / 30
            found = []
            for dtype in (torch.float32, torch.bfloat16):
                own = weight.bfloat16().to(dtype).requires_grad_()
                junk = [torch.full_like(own, torch.inf) for _ in range(4)]  # what freed memory may hold
                del junk
                out = functional.conv2d(x.bfloat16().to(dtype), own, None, stride, kernel // 2)
                out.backward(torch.ones_like(out))
                assert own.grad is not None
                found.append(own.grad.float())
            error = (found[1] - found[0]).abs().max() / found[0].abs().max()
            rows.append([f"{side} x {side}", str(kernel), str(stride), f"{error.item():.4f}"])
    return table(["map", "kernel", "stride", "relative error"], rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="one round of two steps, in float32 alone")
    parser.add_argument("--gradients", action="store_true", help="weight gradients instead of speed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.gradients:
        print(gradients())
        print(environment(torch.device("cpu")))
        return
    rounds, steps = (1, 2) if options.smoke else (ROUNDS, options.steps)
    settings = {name: each for name, each in SETTINGS.items() if not options.smoke or each[0] == "no"}
    seconds: dict[str, list[list[float]]] = {name: [] for name in settings}
    used = {}
    for _ in range(rounds):
        for name, (precision, channels_last) in settings.items():
            both = [step(precision, channels_last, teacher, steps) for teacher in (False, True)]
            seconds[name].append([found for found, _ in both])
            used[name] = both[0][1]
    share = CONFIG.distill_from
    rows, first = [], None
    for name, found in seconds.items():
        alone, taught = (statistics.median(column) for column in zip(*found, strict=True))
        whole = share * alone + (1 - share) * taught
        first = first or whole
        cells = f"{alone:.2f}", f"{taught:.2f}", f"{SIZE / whole:.0f}", f"{first / whole:.2f}x"
        rows.append([f"{name}: {used[name]}", *cells])
    head = ["", "s per step", "with the teacher", "images/s, whole recipe", "speed-up"]
    print(table(head, rows))
    print(environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
