"""Audits of a model in service: false alarms, how soon a change is found, and what they cost. One thread.

    python -m benchmarks.audit null       # 2,000 streams x 20,000 losses at a risk of exactly epsilon: a minute each
    python -m benchmarks.audit change     # CIFAR-10, a ResNet-56 with branches trained for two epochs of 10,000 images
    python -m benchmarks.audit cost       # throughput with q = 5 % against none, forced exits, interleaved
    python -m benchmarks.audit --smoke    # all three in small, on random weights; nothing is kept

`change`: one half of the test images chooses thresholds whose answers differ from the original's as often as promised;
losses are drawn from the other half, 2,000 of clean images and then of images with noise, which is chosen so that the
disagreement there is twice that of the clean ones. Epochs of 50 losses.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ee_surgery as ee
from benchmarks.tables import table
from ee_surgery.evaluation.latency import environment
from ee_surgery.monitoring.betting import Wealth
from recipes.networks import CifarResNet

ALPHA, EPOCH = 0.05, 50
LOSSES = {
    "0 or 1": lambda rng, risk, n: rng.random(n) < risk,
    "between": lambda rng, risk, n: rng.beta(0.5, 0.5 / risk - 0.5, n),
}
EPSILONS = (0.02, 0.05, 0.1)
SHARES = {"1/4, 1/4": (0.25, 1 / 3), "1/2, 1/4": (0.5, 0.5)}
"""What leaves at a third and at two thirds of the depth: names, and quantiles among those that reach an exit."""
BATCH, Q = 64, 0.05


def first_alarms(losses: np.ndarray, epsilon: float) -> np.ndarray:
    """The step at which each stream, (N, T), raises an alarm; T where it does not."""
    wealth, steps = Wealth(epsilon, losses.shape[:1]), losses.shape[1]
    found = np.full(len(losses), steps)
    for step in range(steps):
        wealth.bet(losses[:, step, None], step // EPOCH)
        found[(found == steps) & (wealth.log_evidence >= -math.log(ALPHA))] = step
        if (found < steps).all():
            break
    return found


def null(streams: int, steps: int) -> None:
    """False alarms of streams whose risk is exactly epsilon."""
    rows, rng = [], np.random.default_rng(0)
    bound = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / streams)
    for name, draw in LOSSES.items():
        for epsilon in EPSILONS:
            alarms = (first_alarms(draw(rng, epsilon, (streams, steps)).astype(np.float32), epsilon) < steps).mean()
            rows.append([name, f"{epsilon:.0%}", f"{alarms:.2%}", f"{bound:.2%}", "yes" if alarms <= bound else "NO"])
    print(f"{streams} streams x {steps} losses at a risk of exactly epsilon, alpha {ALPHA:.0%}, seed 0\n")
    print(table(["losses", "epsilon", "streams with an alarm", "alpha + 3 sigma", "within"], rows))


# --- a change on CIFAR-10


def trained(few: int | None, folder: Path) -> ee.EarlyExitModel:
    """A ResNet-56 with three branches, trained briefly; kept in `folder`."""
    from recipes.cifar10_resnet56 import network, pictures

    original = CifarResNet(56).eval() if few else network(56)
    if not few and (folder / "config.json").exists():
        return ee.from_pretrained(folder, original)
    branched = ee.augment(original, 3, "linear", sample=torch.zeros(2, 3, 32, 32), seed=0)
    (images, labels), mean, std = _noise_free(few) if few else pictures("train", 10_000)
    batches = ee.AugmentedBatches(images, labels, mean=mean, std=std, batch_size=128)
    ee.train(branched, batches, ee.TrainConfig(epochs=1 if few else 2, lr=3e-3, validation=0, progress=False))
    if not few:
        branched.save_pretrained(folder)
    return branched


def _noise_free(few: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Made-up pictures."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (few, 3, 32, 32), dtype=torch.uint8, generator=g)
    return (images, torch.randint(0, 10, (few,), generator=g)), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def recorded(branched: ee.EarlyExitModel, images: Tensor, noise: float, mean: Tensor, std: Tensor) -> ee.ExitRecords:
    """Answers to images with Gaussian noise, of this standard deviation where white is 1."""
    pixels = images.float() / 255
    pixels = (pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    return ee.record(branched, list(((pixels - mean) / std).split(250)))


def change(runs: int, before: int, after: int, few: int | None, folder: Path) -> None:
    """How many audited samples pass between a change and its alarm."""
    from recipes.cifar10_resnet56 import pictures

    branched = trained(few, folder)
    (images, _), mean, std = _noise_free(few) if few else pictures("test", None)
    halves = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).chunk(2)
    clean = recorded(branched, images, 0.0, mean, std)
    known, unseen = (clean.take(half) for half in halves)
    levels = (0.02, 0.025) if few is None else (0.2,)
    noisy = {noise: recorded(branched, images, noise, mean, std).take(halves[1]) for noise in levels}
    frontier, rng, rows = ee.Frontier.search(known), np.random.default_rng(0), []
    for asked in EPSILONS:
        point = min(frontier, key=lambda point: abs(1 - point.accuracy - asked))
        epsilon = max(1 - point.accuracy, 1e-3)
        losses = 1 - unseen.replay(point.policy).outcome.numpy()
        by_level = {noise: 1 - records.replay(point.policy).outcome.numpy() for noise, records in noisy.items()}
        noise, worse = min(by_level.items(), key=lambda pair: abs(pair[1].mean() - 2 * losses.mean()))
        drawn = np.concatenate([rng.choice(losses, (runs, before)), rng.choice(worse, (runs, after))], 1)
        found = first_alarms(drawn, epsilon) - before
        late = found[found >= 0]
        low, middle, high = np.quantile(late, [0.25, 0.5, 0.75]) if len(late) else [math.nan] * 3
        rows.append(
            [f"{epsilon:.2%}", f"{point.macs_fraction:.1%}", f"{losses.mean():.2%}", f"{worse.mean():.2%}",
             f"{noise:g}", f"{(found < 0).mean():.1%}", f"{middle:.0f}", f"{low:.0f} to {high:.0f}"]
        )  # fmt: skip
    print(f"\n{runs} runs, {before} audited samples before the change, alpha {ALPHA:.0%}, seed 0\n")
    head = [
        "epsilon",
        "MACs",
        "disagreement",
        "after the change",
        "noise",
        "alarm before it",
        "found after",
        "quartiles",
    ]
    print(table(head, rows))


# --- what it costs


def cost(batches: int, rounds: int, depth: int) -> None:
    """Processor time of routed runs with an audit against runs without; each batch in both ways in turn."""
    torch.manual_seed(0)
    branched = ee.augment(CifarResNet(depth).eval(), 2, "linear", sample=torch.randn(3, 3, 32, 32))
    images = torch.randn(batches, BATCH, 3, 32, 32)
    records = ee.record(branched, list(images))
    rows = []
    for name, shares in SHARES.items():
        scores, here, thresholds = records.scores("max_prob"), torch.ones(len(records), dtype=torch.bool), []
        for row, share in zip(scores, shares, strict=True):
            thresholds.append(row[here].quantile(1 - share).item())
            here &= row < thresholds[-1]
        branched.operate(thresholds=thresholds)
        for q in (0.01, Q):
            audit = ee.Audit(branched, epsilon=0.999, q=q, seed=0)
            ratios = _ratios(branched, audit, images, rounds)
            audit.close()
            report, low_high = audit.report(), statistics.quantiles(ratios, n=4)
            macs = branched.predict(images[0]).macs_fraction.mean().item()
            rows.append(
                [name, f"{macs:.1%}", f"{q:.0%}", str(report.audited), f"{report.overhead:+.2%}",
                 f"{statistics.median(ratios) - 1:+.2%}", f"{low_high[0] - 1:+.2%} to {low_high[2] - 1:+.2%}"]
            )  # fmt: skip
    print(f"\nCIFAR ResNet-{depth}, batch {BATCH}, forced exits, {rounds} rounds of {batches} batches in both ways\n")
    print(table(["leaving", "MACs", "q", "audited", "MACs of audits", "processor time", "quartiles"], rows))


def _ratios(branched: ee.EarlyExitModel, audit: ee.Audit, images: Tensor, rounds: int) -> list[float]:
    """Of each round, the time of all batches with an audit as a fraction of that without."""
    watch, order, ratios = branched.engine.audit, random.Random(0), []
    for number in range(-1, rounds):
        spent = {True: 0.0, False: 0.0}
        for batch in images:
            for audited in order.sample([True, False], 2):
                branched.engine.audit = watch if audited else None
                started = time.process_time()
                branched.predict(batch)
                spent[audited] += time.process_time() - started
        branched.engine.audit = watch
        started = time.process_time()
        audit.flush()
        spent[True] += time.process_time() - started
        if number >= 0:
            ratios.append(spent[True] / spent[False])
    return ratios


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("null", "change", "cost"))
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), help="where the trained branches are kept")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = ("null", "change", "cost") if options.what is None else (options.what,)
    if "null" in asked:
        null(*((100, 500) if options.smoke else (2000, 20_000)))
    if "change" in asked:
        change(*((20, 100, 300, 256) if options.smoke else (1000, 2000, 3000, None)), options.out / "adapter")
    if "cost" in asked:
        cost(*((4, 2, 20) if options.smoke else (26, 5, 56)))
    print(f"\n{environment(torch.device('cpu'))}, numpy {np.__version__}")


if __name__ == "__main__":
    main()
