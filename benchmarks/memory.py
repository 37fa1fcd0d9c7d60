"""Memory over calls whose sizes, thresholds and scores keep changing.

    python -m benchmarks.memory                      # 3,000 calls
    python -m benchmarks.memory --calls 500 --every 50
    python -m benchmarks.memory --compiled           # what branched.compile adds

A small CIFAR ResNet on images and a small BERT on texts are called with batches of 1 to 12 samples; one call in ten
has a size not among the last eight, so that programs are captured and dropped all the time.
Before each call the operating point changes: to other thresholds, another score, or none. Now and then a model is
calibrated, evaluated or augmented again.

Objects are those that Python's garbage collector knows after a full collection; the resident set is as the system
reports it. The first calls fill caches; growth is counted from there.

With `--compiled`, ResNet-50s of random weights are compiled one after the other, each kept: the first brings the
compiler itself into memory, the others show what a model takes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table

import ee_surgery as ee
from ee_surgery.backbone.inputs import Inputs
from recipes.networks import CifarResNet

SCORES = ("max_prob", "margin", "entropy", "patience")
_COUNTED = ("ee_surgery", "torch")
SIDES = range(16, 65)
LENGTHS = range(4, 60)


@dataclass(frozen=True)
class Reading:
    """What is in use after so many calls."""

    calls: int
    objects: int
    tensors: int
    resident_mb: float
    captures: int
    """Programs that were captured so far."""


class Traffic:
    """Calls without end, the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self.choose = random.Random(seed)
        torch.manual_seed(seed)
        pictures = CifarResNet(8).eval()
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        )
        config.num_labels = 5
        texts = transformers.BertForSequenceClassification(config).eval()
        sample = torch.randn(4, 3, 32, 32)
        self.pictures = ee.augment(pictures, 2, branch="pool", sample=sample)
        self.texts = ee.augment(texts, 2)
        self.sample = sample
        self.captures = 0
        self.known: dict[int, list[int]] = {id(self.pictures): [32], id(self.texts): [16]}

    def call(self, new_size: float = 0.1, rare: float = 0.01) -> None:
        """One call.

        Args:
            new_size: how often with a size that is not among those used last.
            rare: how often something other than a prediction.
        """
        model = self.choose.choice((self.pictures, self.texts))
        score = self.choose.choice(SCORES)
        model.operate(None)
        if self.choose.random() < 0.9:
            model.operate(thresholds=[self.choose.random() * 2 for _ in model.exits], score=score)
        inputs = self._inputs(model, new_size)
        if self.choose.random() < rare:
            self._rare(model, inputs)
        elif self.choose.random() < 0.5:
            model.predict(inputs)
        else:
            model.predict(inputs)
            model(inputs)

    def _inputs(self, model: ee.EarlyExitModel, new_size: float) -> Inputs:
        known, sizes = self.known[id(model)], SIDES if model is self.pictures else LENGTHS
        size = self.choose.choice(known)
        if self.choose.random() < new_size:
            size = self.choose.choice([other for other in sizes if other not in known])
            self.captures += 1
            known[:] = [*known, size][-7:]
        batch = self.choose.randint(1, 12)
        if model is self.pictures:
            return torch.randn(batch, 3, size, size)
        return {"input_ids": torch.randint(1, 99, (batch, size)), "attention_mask": torch.ones(batch, size).long()}

    def _rare(self, model: ee.EarlyExitModel, inputs: Inputs) -> None:
        what = self.choose.choice(("calibrate", "evaluate", "augment", "train"))
        if what == "calibrate":
            ee.calibrate(model, [inputs])
        elif what == "evaluate":
            ee.evaluate(model, [inputs])
        elif what == "train":
            config = ee.TrainConfig(epochs=1, teach="original", progress=False)
            ee.train(model, [inputs], config)
        else:
            ee.augment(self.pictures.backbone, 2, branch="pool", sample=self.sample)

    def read(self, calls: int) -> Reading:
        """What is in use now."""
        for _ in range(3):
            gc.collect()
        objects = gc.get_objects()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in objects)
        return Reading(calls, len(objects), tensors, resident() / 1e6, self.captures)

    def run(self, calls: int, every: int, **how: float) -> Iterator[Reading]:
        """Readings before the first call and after each `every` of them."""
        yield self.read(0)
        for number in range(1, calls + 1):
            self.call(**how)
            if number % every == 0:
                yield self.read(number)


def kinds() -> Counter[str]:
    """How many objects of this package and of torch the garbage collector knows, by type."""
    for _ in range(3):
        gc.collect()
    found = (f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    return Counter(name for name in found if name.startswith(_COUNTED))


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def added() -> Iterator[tuple[str, float, float, float]]:
    """Of models compiled in turn: how, MiB of weights, MiB more in memory, MiB that the engine says it froze."""
    kept: list[ee.EarlyExitModel] = []
    images = torch.randn(1, 3, 160, 160)
    for freeze in (False, False, True, True):
        branched = ee.augment(timm.create_model("resnet50"), 2, branch="pool", sample=images.expand(4, -1, -1, -1))
        branched.operate(thresholds=2.0)
        branched.predict(images)
        before = trimmed()
        branched.compile(freeze=freeze)
        for _ in range(2):
            branched.predict(images)
        weights = sum(tensor.nbytes for tensor in branched.unload().state_dict().values())
        kept.append(branched)
        yield ("frozen" if freeze else "by reference"), weights / 2**20, trimmed() - before, branched.engine.frozen_mib


def trimmed() -> float:
    """MiB of this process in memory once it has given back what it does not use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident() / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--every", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="20 calls")
    parser.add_argument("--compiled", action="store_true", help="what branched.compile adds, instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.compiled:
        for how, *mib in added():
            print(
                "{}: weights {:.0f} MiB, resident {:+.0f} MiB, engine.frozen_mib {:.0f}".format(how, *mib), flush=True
            )
        return
    calls, every = (20, 10) if options.smoke else (options.calls, options.every)
    started = time.perf_counter()
    readings = []
    for reading in Traffic(options.seed).run(calls, every):
        print(f"{time.perf_counter() - started:.0f} s: {reading}", file=sys.stderr, flush=True)
        readings.append(reading)
    seconds = time.perf_counter() - started
    table = Table(title=f"{calls} calls, seed {options.seed}, {seconds:.0f} s, torch {torch.__version__}")
    for column in ("calls", "programs captured", "objects", "of them tensors", "resident, MB"):
        table.add_column(column, justify="right")
    for r in readings:
        table.add_row(f"{r.calls:,}", f"{r.captures:,}", f"{r.objects:,}", f"{r.tensors:,}", f"{r.resident_mb:,.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
