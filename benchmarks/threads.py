"""Many threads share a model: counts calls whose output is wrong or stale, or which fail.

    python -m benchmarks.threads                     # 8 threads x 500 calls
    python -m benchmarks.threads --threads 4 --calls 50

Two models serve routed calls from all threads at once: a CIFAR ResNet on images of changing sizes and a BERT on texts
of changing lengths, in batches of changing sizes and now and then of another dtype. Meanwhile another thread moves the
operating points, with its own exits disabled half of the time; one puts the ResNet's original into train mode
and back, as its owner would who fine-tunes elsewhere; one runs the BERT's original on its own; one evaluates; one
augments further models, two at a time; some calls disable the exits for themselves; and asyncio hands calls to a pool.
New sizes keep coming, so that programs are captured, and dropped, beside running calls.

An output is right if exits, logits and costs are those that a serial run of an independent copy gives at one of the
operating points that were set during the call. With exits disabled it must be the original's.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery.backbone.inputs import Inputs, take
from ee_surgery.policies.operating_point import OperatingPoint
from recipes.networks import CifarResNet

POOL = 12  # samples of each size
POINTS: tuple[float | None, ...] = (None, 0.25, 0.5, 0.75)  # quantiles of the scores that thresholds stand at


@dataclass
class Expected:
    """The output of a serial run for the samples of one size."""

    inputs: Inputs
    original: Tensor
    """Logits of the original, (POOL, C)."""
    exits: dict[int, Tensor]
    """By operating point, (POOL,)."""
    logits: dict[int, Tensor]
    costs: dict[int, Tensor]


@dataclass
class Subject:
    """A model under load, and its expected outputs."""

    name: str
    branched: ee.EarlyExitModel
    thresholds: list[list[float] | None]
    """Of each operating point; None: no early exit."""
    expected: dict[int, Expected]
    known: list[int]
    """Sizes that most calls come in."""
    dtypes: tuple[torch.dtype, ...]
    """That the same inputs may come in, the usual one first."""


class _AnyDtype(CifarResNet):
    """Takes pictures of any floating dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to logits, in the dtype of the weights."""
        return super().forward(x.to(self.conv1.weight.dtype))


def image_subject(sizes: list[int]) -> Subject:
    """A CIFAR ResNet-20 of random weights with two exits."""
    torch.manual_seed(0)
    model = _AnyDtype(20).eval()
    branched = ee.augment(model, 2, branch="pool", sample=torch.randn(4, 3, 32, 32))
    pictures: dict[int, Inputs] = {
        size: torch.randn(POOL, 3, size, size).half().float() for size in sizes
    }  # exact in all dtypes
    return _subject("ResNet-20", branched, pictures, (torch.float32, torch.float64, torch.float16))


def text_subject(lengths: list[int]) -> Subject:
    """A BERT of four small layers with two exits."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    config.num_labels = 5
    branched = ee.augment(transformers.BertForSequenceClassification(config).eval(), 2)
    inputs: dict[int, Inputs] = {}
    for length in lengths:
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (POOL, 1))).long()
        inputs[length] = {"input_ids": torch.randint(1, 100, (POOL, length)) * mask, "attention_mask": mask}
    return _subject("BERT", branched, inputs, (torch.int64, torch.int32))


def _subject(
    name: str, branched: ee.EarlyExitModel, inputs: dict[int, Inputs], dtypes: tuple[torch.dtype, ...]
) -> Subject:
    for parameter in branched.branches.parameters():  # or all answers would be about equally sure
        nn.init.normal_(parameter, std=0.5)
    serial = branched.copy()
    first = ee.record(serial, [next(iter(inputs.values()))]).scores("max_prob")
    thresholds = [None if q is None else [row.quantile(q).item() for row in first] for q in POINTS]
    expected = {size: _expect(serial, given, thresholds) for size, given in inputs.items()}
    return Subject(name, branched, thresholds, expected, list(inputs)[:2], dtypes)


def _expect(serial: ee.EarlyExitModel, inputs: Inputs, thresholds: list[list[float] | None]) -> Expected:
    with torch.no_grad():
        answer = serial.backbone(**inputs).logits if isinstance(inputs, dict) else serial.backbone(inputs)
    expected = Expected(inputs, answer, {}, {}, {})
    for point, values in enumerate(thresholds):
        serial.operate(None if values is None else OperatingPoint.by_hand(values, "max_prob"))
        output = serial.predict(inputs)
        expected.exits[point], expected.logits[point] = output.exit_index, output.logits
        expected.costs[point] = output.costs
    return expected


@dataclass
class Tally:
    """Counts of the calls and their outcomes."""

    calls: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def count(self, kind: str, call: Callable[[], bool]) -> None:
        """Make one call and record whether its output was right."""
        self.calls[kind] += 1
        try:
            if not call():
                self.wrong[kind] += 1
        except Exception as error:
            self.wrong[kind] += 1
            self.failures.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")


class Traffic:
    """All concurrent activities.

    Args:
        subjects: what serves.
        calls: of each thread.
        rare: share of the calls with another size, and of those with another dtype.
    """

    def __init__(self, subjects: list[Subject], threads: int, calls: int, seed: int = 0, rare: float = 0.03) -> None:
        self.subjects, self.threads, self.calls, self.seed, self.rare = subjects, threads, calls, seed, rare
        self.tally = Tally()
        self.over = threading.Event()
        # Per subject: the operating point, and how often it was moved; even while it rests.
        self.points = [[0, 0] for _ in subjects]

    def run(self) -> Tally:
        """Run until every thread has made its calls."""
        jobs = [threading.Thread(target=self._serve, args=(number,)) for number in range(self.threads)]
        background = [self._move_knobs, self._own, self._run_original, self._evaluate, self._augment, self._serve_async]
        others = [threading.Thread(target=job) for job in background]
        for job in [*others, *jobs]:
            job.start()
        for job in jobs:
            job.join()
        self.over.set()
        for job in others:
            job.join()
        return self.tally

    # --- callers

    def _serve(self, number: int) -> None:
        choose = random.Random(self.seed * 1000 + number)
        for _ in range(self.calls):
            which = choose.randrange(len(self.subjects))
            self._call(which, choose)

    def _call(self, which: int, choose: random.Random) -> None:
        subject = self.subjects[which]
        size = choose.choice([*subject.expected] if choose.random() < self.rare else subject.known)
        dtype = choose.choice(subject.dtypes[1:]) if choose.random() < self.rare else subject.dtypes[0]
        rows = torch.tensor(choose.sample(range(POOL), choose.choice([1, 1, 2, 5, POOL])))
        expected = subject.expected[size]
        inputs = _cast(take(expected.inputs, rows), dtype)
        kind = choose.choice(["predict", "predict", "call", "disabled"])
        told = f"{subject.name}, {kind}" if dtype == subject.dtypes[0] else f"{subject.name}, {dtype}"
        self.tally.count(told, lambda: self._right(which, kind, inputs, expected, rows))

    def _right(self, which: int, kind: str, inputs: Inputs, expected: Expected, rows: Tensor) -> bool:
        branched = self.subjects[which].branched
        if kind == "disabled":
            with branched.exits_disabled():
                output = branched.predict(inputs)
            return bool((output.exit_index == 2).all()) and _close(output.logits, expected.original[rows])
        before = tuple(self.points[which])
        if kind == "predict":
            found = branched.predict(inputs)
            logits, output = found.logits, found
        else:
            answer: Any = branched(inputs)
            logits, output = getattr(answer, "logits", answer), None
        resting = before == tuple(self.points[which]) and before[1] % 2 == 0
        points = [before[0]] if resting else range(len(POINTS))
        return any(self._matches(point, logits, output, expected, rows) for point in points)

    @staticmethod
    def _matches(point: int, logits: Tensor, output: ee.ExitOutput | None, expected: Expected, rows: Tensor) -> bool:
        if not _close(logits, expected.logits[point][rows]):
            return False
        if output is None:
            return True
        same = torch.equal(output.exit_index, expected.exits[point][rows])
        return same and torch.equal(output.costs, expected.costs[point])

    # --- concurrent jobs

    def _move_knobs(self) -> None:
        choose = random.Random(self.seed)
        while not self.over.wait(0.01):
            which = choose.randrange(len(self.subjects))
            subject, point = self.subjects[which], choose.randrange(len(POINTS))
            self.points[which][1] += 1
            values = subject.thresholds[point]
            with subject.branched.exits_disabled() if choose.random() < 0.5 else nullcontext():
                subject.branched.operate(None if values is None else OperatingPoint.by_hand(values, "max_prob"))
            self.points[which][0] = point
            self.points[which][1] += 1

    def _own(self) -> None:
        """Switch the first original between train and eval mode."""
        mode = True
        while not self.over.wait(0.002):
            self.subjects[0].branched.backbone.train(mode)
            mode = not mode
        self.subjects[0].branched.backbone.eval()

    def _run_original(self) -> None:
        """Call the other original directly, with known sizes and new ones."""
        choose, subject = random.Random(self.seed + 1), self.subjects[-1]
        while not self.over.is_set():
            expected = subject.expected[choose.choice([*subject.expected])]
            inputs: Any = expected.inputs

            def right(expected: Expected = expected, inputs: Any = inputs) -> bool:
                with torch.no_grad():
                    answer = subject.branched.backbone(**inputs).logits
                # torch.export tells the whole process that it is exporting: transformers then passes masks that it
                # leaves out otherwise, and sums are rounded in another order
                return torch.allclose(answer, expected.original, rtol=0, atol=1e-6)

            self.tally.count("the original alone", right)
            self.over.wait(0.01)

    def _evaluate(self) -> None:
        """Evaluate, which disables exits in its own context, during other calls; check the original's accuracy."""
        subject = self.subjects[0]
        expected = subject.expected[subject.known[0]]
        labels = expected.original.argmax(-1)
        while not self.over.is_set():
            found: list[float] = []

            def right(found: list[float] = found) -> bool:
                result = ee.evaluate(subject.branched, [(expected.inputs, labels)])
                found.append(result.original_accuracy)
                return found == [1.0]

            self.tally.count("evaluate", right)
            self.over.wait(0.05)

    def _augment(self) -> None:
        """Augment two more models at once; each must equal one that is augmented alone."""
        inputs = torch.randn(4, 3, 32, 32)
        depths = (8, 14)
        alone = [_first_weights(ee.augment(CifarResNet(depth).eval(), 1, sample=inputs)) for depth in depths]

        def right(which: int) -> bool:
            model = CifarResNet(depths[which]).eval()
            branched = ee.augment(model, 1, sample=inputs)
            with torch.no_grad():
                same = torch.equal(branched(inputs), model(inputs))
            return same and torch.equal(_first_weights(branched), alone[which])

        while not self.over.is_set():
            jobs = [
                threading.Thread(target=self.tally.count, args=("augment", lambda which=which: right(which)))
                for which in range(len(depths))
            ]
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()
            self.over.wait(5)

    def _serve_async(self) -> None:
        """Calls from asyncio through a thread pool; a task that disables exits does so only for itself."""

        async def one(which: int, choose: random.Random) -> None:
            await asyncio.to_thread(self._call, which, choose)

        async def disabled(which: int) -> None:
            subject = self.subjects[which]
            expected = subject.expected[subject.known[0]]

            def right() -> bool:  # the context is copied to the pool's thread
                output = subject.branched.predict(expected.inputs)
                return bool((output.exit_index == 2).all()) and _close(output.logits, expected.original)

            with subject.branched.exits_disabled():
                await asyncio.to_thread(self.tally.count, "asyncio, disabled", right)

        async def serve() -> None:
            choose = random.Random(self.seed + 2)
            while not self.over.is_set():
                which = choose.randrange(len(self.subjects))
                await asyncio.gather(one(which, choose), disabled(which), one(which, choose))
                await asyncio.sleep(0.02)

        asyncio.run(serve())


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype)
    return {name: value.to(dtype) for name, value in inputs.items()}


def _first_weights(branched: ee.EarlyExitModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in branched.branches.parameters()])


def _close(seen: Tensor, expected: Tensor) -> bool:
    return seen.shape == expected.shape and torch.allclose(seen, expected, rtol=1e-3, atol=1e-3)


def aftermath(subjects: list[Subject]) -> list[str]:
    """Checks afterwards: originals, receipts, flags and training; the failures."""
    broken: list[str] = []
    for subject in subjects:
        branched = subject.branched
        if not branched.receipt().unchanged:
            broken.append(f"{subject.name}: {branched.receipt()}")
        if any(module.training for module in branched.backbone.modules()):
            broken.append(f"{subject.name}: the original is left in train mode")
        expected = subject.expected[subject.known[0]]
        inputs: Any = expected.inputs
        with torch.no_grad():
            answer = branched.backbone(**inputs).logits if isinstance(inputs, dict) else branched.backbone(inputs)
        if not torch.equal(answer, expected.original):
            broken.append(f"{subject.name}: the original's output has changed")
        batch: Any = (
            {**inputs, "labels": answer.argmax(-1)} if isinstance(inputs, dict) else (inputs, answer.argmax(-1))
        )
        before = deepcopy(branched.branches.state_dict())
        ee.train(branched, [batch], ee.TrainConfig(epochs=1, progress=False))
        if all(torch.equal(tensor, before[name]) for name, tensor in branched.branches.state_dict().items()):
            broken.append(f"{subject.name}: the branches do not train")
    return broken


def main() -> None:
    """Print the table; exit with 1 if an output was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=500, help="of each thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two threads, 20 calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threads, calls = (2, 20) if options.smoke else (options.threads, options.calls)
    started = time.perf_counter()
    subjects = [image_subject([*range(32, 80, 4)]), text_subject([*range(8, 32, 2)])]
    traffic = Traffic(subjects, threads, calls, options.seed)
    tally = traffic.run()
    seconds = time.perf_counter() - started
    title = f"{threads} threads x {calls} calls, seed {options.seed}, {seconds:.0f} s, torch {torch.__version__}"
    table = Table(title=title)
    for column in ("call", "made", "wrong, stale or failed"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for kind, made in sorted(tally.calls.items()):
        table.add_row(kind, str(made), str(tally.wrong[kind]))
    table.add_row("all", str(tally.calls.total()), str(tally.wrong.total()), style="bold")
    console = Console()
    console.print(table)
    for line in sorted(set(tally.failures))[:20]:
        console.print(line, markup=False)
    broken = aftermath(subjects)
    console.print(
        "afterwards: " + ("; ".join(broken) or "receipts, originals, flags and training are as they should be")
    )
    if tally.wrong.total() or broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
