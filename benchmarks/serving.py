"""`ee.Engine` under load: the same answers, more requests per second at an equal p99, and full late stages offline.

    export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_ARENA_MAX=1
    python -m benchmarks.serving load
    python -m benchmarks.serving pool       throughput of Engine.map, relative to the ideal
    python -m benchmarks.serving equal      8 clients x 500 requests of 1 to 7 pictures of two sizes
    python -m benchmarks.serving http       processor time of a request over HTTP, relative to the Engine alone

Two CIFAR networks with the exits and branches of docs/frontier.md and docs/effort.md. The shares of samples that leave
at each exit, measured there at one point below the original, are forced: the branches are untrained, and thresholds are
set on the very pictures that are served, so that as many leave. What runs is what would run with trained ones. An
adapter that was trained runs at its own operating point instead: --adapter FOLDER.

load: requests of one picture arrive at random (Poisson), at fractions of what each side can do at most. The rate at
which p99 reaches a limit is interpolated, for both sides: `Engine` on the exits, and the same `Engine` on the original,
where it is a dynamic batcher: what waits when it gets free is its next batch. Sides take turns, on the clock of
`Stepped`.
pool: the ideal is what stages and branches take alone in full batches, weighted by the shares of samples that reach
them. Times are of the processor, so that other programs beside it do not count.
http: 8 clients in another process send one PNG of 32 px at a time, which the server decodes and prepares; alone, 8
threads submit prepared tensors.
"""

from __future__ import annotations

import argparse
import io
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.methods import TASKS
from ee_surgery.evaluation.latency import environment
from ee_surgery.graph.backends.base import Run
from ee_surgery.onnx import OnnxOutput
from ee_surgery.serving.schedule import choose
from recipes import data
from recipes.cifar10_resnet56 import network
from recipes.cifar10_shortcuts import EXITS

SIZES = (1, 2, 4, 8, 16)
FRACTIONS = (0.4, 0.55, 0.7, 0.8, 0.9, 0.97)
LIMITS = (0.05, 0.1, 0.2, 0.4)  # seconds
PICTURES = 2000


class Case(NamedTuple):
    """A network, its exits, and the share of samples that leaves at each."""

    make: Callable[[], nn.Module]
    exits: Sequence[str]
    branches: Sequence[str | ee.BranchSpec]
    shares: Sequence[float]


def _shortcut(blocks: str) -> ee.BranchSpec:
    return ee.BranchSpec("shortcut", options={"blocks": blocks})


CASES = {
    "ResNet-56": Case(
        lambda: network(56), [*EXITS], [*map(_shortcut, EXITS.values())], (0.797, 0.134, 0.069)
    ),  # docs/frontier.md
    "ViT": Case(
        lambda: TASKS["vit4"](0, 1).model, ["blocks.0", "blocks.1"], ["token", _shortcut("blocks")], (0.369, 0.631, 0.0)
    ),  # docs/effort.md
}


def pictures(count: int) -> Tensor:
    """Test pictures of CIFAR-10, (count, 3, 32, 32)."""
    _, mean, std = data.weights("cifar10_resnet56")
    return (data.cifar10("test")[0][:count].float() / 255 - mean) / std


def subject(case: Case, x: Tensor, adapter: Path | None) -> ee.EarlyExitModel:
    """The network with exits, at an operating point; without an adapter, with forced exits."""
    if adapter is not None:
        branched = ee.from_pretrained(adapter, case.make())
        if branched.operating_point is None:
            branched.operate(max_accuracy_drop=0.01)
        return branched
    torch.manual_seed(0)
    branched = ee.augment(case.make(), [*case.exits], branch=[*case.branches], sample=torch.zeros(2, 3, 32, 32))
    scores = ee.record(branched, x.split(250)).scores("max_prob")
    branched.operate(thresholds=forced(scores, case.shares))
    return branched


def forced(scores: Tensor, shares: Sequence[float]) -> list[float]:
    """Thresholds that let these shares of the samples leave, each in a wide gap, out of reach of rounding."""
    taus, inside = [], torch.arange(scores.shape[1])
    for row, share in zip(scores.double(), shares, strict=False):
        ranked, rank = row[inside].sort(descending=True).values, round(share * scores.shape[1])
        near = ranked[max(rank - 4, 0) : rank + 4]
        if len(inside) - rank <= 1 or len(near) < 2:
            taus.append(ranked[-1].item() - 1)
        else:
            at = int((near[:-1] - near[1:]).argmax())
            taus.append(near[at : at + 2].mean().item())
        inside = inside[row[inside] < taus[-1]]
    return taus


# --- equal


def equal(case: Case, clients: int, requests: int) -> str:
    """Every answer, compared with that of `predict` for the request alone."""
    x = pictures(256)
    bigger = torch.nn.functional.interpolate(x, size=40, mode="bilinear")
    branched = subject(case, x, None)
    scores = torch.cat([ee.record(branched, [each]).scores("max_prob") for each in (x, bigger)], 1)
    branched.operate(thresholds=forced(scores, case.shares))
    wrong, largest = [], [0.0]

    def client(number: int, engine: ee.Engine) -> None:
        choose = random.Random(number)
        for _ in range(requests):
            rows = choose.sample(range(len(x)), choose.randint(1, 7))
            inputs = choose.choice((x, bigger))[rows]
            found, alone = engine.submit(inputs, wait_s=60).result(), branched.predict(inputs)
            assert not isinstance(found, OnnxOutput)
            same = torch.equal(found.exit_index, alone.exit_index) and torch.equal(found.macs, alone.macs)
            largest.append((found.logits - alone.logits).abs().max().item())
            if not same or not torch.allclose(found.logits, alone.logits, rtol=1e-3, atol=1e-4):
                wrong.append(rows)

    with ee.Engine(branched) as engine:
        threads = [threading.Thread(target=client, args=(number, engine)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    samples = [f"{each.samples} in {each.batches} batches" for each in stats.stages]
    return (
        f"{clients} clients x {requests} requests: {stats.answered} answered, {len(wrong)} unlike predict alone; "
        f"largest difference of a logit {max(largest):.1e}; samples per stage {', '.join(samples)}"
    )


# --- load


class Stepped(ee.Engine):
    """An engine that is worked by hand, on a clock that only its own work moves.

    What it does takes the processor time that it took; while there is nothing to do, the clock jumps to the next
    arrival. So latencies are those of a machine with nothing beside: on a shared one, the 99th percentile is others'.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        self.now = 0.0
        super().__init__(*given, **options, clock=lambda: self.now)

    def _serve(self) -> None:
        """No thread."""

    def latencies(self, x: Tensor, arrivals: Sequence[float]) -> list[float]:
        """Seconds from when each request of one picture came to its answer."""
        start, due, done = self.now, deque(arrivals), list[float]()
        found: list[float] = []
        while due or self._pending:
            began = time.thread_time()
            while due and start + due[0] <= self.now:
                at = start + due.popleft()
                row = len(due) % len(x)
                self.submit(x[row : row + 1]).add_done_callback(lambda _, at=at: done.append(at))
            self._update(self.now)
            choice = choose([*self._lanes.values()], self._times, self.now)
            if choice is not None:
                self._run(*choice)
            self.now += time.thread_time() - began
            if choice is None and due:
                self.now = max(self.now, start + due[0])
            found += [self.now - at for at in done]
            done.clear()
        return found


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals."""
    choose_, found, at = random.Random(seed), [], 0.0
    while (at := at + choose_.expovariate(rate)) < seconds:
        found.append(at)
    return found


def at_limit(rates: Sequence[float], p99: Sequence[float], limit: float) -> float:
    """The rate at which p99 reaches a limit; NaN where it is beyond it at all of them.

    What is met at a higher rate counts as met at lower ones: slow moments of the machine only ever raise a p99.
    """
    rising = np.minimum.accumulate(p99[::-1])[::-1]
    return float(np.interp(limit, rising, rates)) if limit >= rising[0] else float("nan")


def capacity(engine: Stepped, x: Tensor) -> float:
    """Requests per second where there are always some waiting."""
    started = engine.now
    engine.latencies(x, [0.0] * len(x))
    return len(x) / (engine.now - started)


def load(name: str, case: Case, options: argparse.Namespace, console: Console) -> None:
    """The tables of one network."""
    x = pictures(PICTURES if not options.smoke else 40)
    branched = subject(case, x, options.adapter)
    sizes, seconds = [size for size in SIZES if size < options.batch], 0.1 if options.smoke else 15
    profile = ee.profile(branched, x, batch_size=options.batch, sizes=sizes, seconds=seconds)
    plain = branched.copy()
    plain.operate(None)
    how = {"max_batch": options.batch, "max_pending": 1 << 20}
    sides = {
        "original": Stepped(plain, **how),
        "exits": Stepped(branched, **how, profile=profile),
        "exits, no waiting": Stepped(branched, **how),
    }
    torch.set_grad_enabled(False)  # as it is in a worker
    for engine in sides.values():
        engine.latencies(x, [0.0] * 20)
    most = {side: capacity(engine, x[: max(20, len(x) // 2)]) for side, engine in sides.items()}
    p99: dict[str, list[list[float]]] = {side: [[] for _ in FRACTIONS] for side in sides}
    for round_ in range(1 if options.smoke else options.rounds):
        for i, fraction in enumerate(FRACTIONS[:2] if options.smoke else FRACTIONS):
            for side, engine in sides.items():
                found = engine.latencies(x, poisson(fraction * most[side], options.seconds, seed=round_))
                p99[side][i].append(float(np.quantile(found, 0.99)))
    table = Table(box=box.MARKDOWN)
    for head in (f"{name}", "requests/s at most", *(f"{1e3 * limit:.0f} ms" for limit in LIMITS)):
        table.add_column(head, justify="right")
    reached: dict[str, list[float]] = {}
    for side in sides:
        rates = [fraction * most[side] for fraction, seen in zip(FRACTIONS, p99[side], strict=True) if seen]
        tails = [median(seen) for seen in p99[side] if seen]
        reached[side] = [at_limit(rates, tails, limit) for limit in LIMITS]
        table.add_row(side, f"{most[side]:.0f}", *(f"{rate:.0f}" for rate in reached[side]))
        console.print(f"{side}: " + ", ".join(f"{r:.0f}/s {1e3 * t:.0f} ms" for r, t in zip(rates, tails, strict=True)))
    ratios = [b / a for a, b in zip(reached["original"], reached["exits"], strict=True)]
    table.add_row("exits / original", f"{most['exits'] / most['original']:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)


# --- pool


def alone(branched: ee.EarlyExitModel, x: Tensor) -> list[Callable[[], object]]:
    """Each stage with the branch behind it, on the whole of a batch: what no router is in the way of."""
    policy, engine = branched.policy, branched.engine
    assert policy is not None
    batch = engine.backbone.batch(x)
    program, live, calls = engine.entry(batch).program, batch.tensors, []
    visits = (*policy.visits(branched.branches.chained), False)
    for k, stage in enumerate(program.stages):
        behind = stage(*live)

        def call(k: int = k, stage: Run = stage, live: Sequence[Tensor] = live) -> None:
            found = stage(*live)
            if visits[k]:
                branched.branches[k](*program.readers[k](found))

        calls.append(call)
        live = behind
    return calls


def spent(call: Callable[[], object]) -> float:
    """Milliseconds of processor time of this process: others that run beside it do not count."""
    started = time.process_time()
    call()
    return 1e3 * (time.process_time() - started)


def pool(name: str, case: Case, options: argparse.Namespace, console: Console) -> None:
    """Throughput offline."""
    x = pictures(PICTURES if not options.smoke else 80)
    branched = subject(case, x, options.adapter)
    plain = branched.copy()
    plain.operate(None)
    routed = branched.predict(x)
    shares, macs = routed.exit_index.bincount(minlength=len(routed.costs)) / len(x), routed.macs_fraction.mean().item()
    reached = 1 - np.cumsum([0.0, *shares.tolist()[:-1]])
    times: dict[str, list[float]] = {"original": [], "exits": [], "ideal": []}
    with torch.no_grad(), ee.Engine(plain, max_batch=options.batch) as original, ee.Engine(
        branched, max_batch=options.batch
    ) as exits:  # fmt: skip
        stages = alone(branched, x[: options.batch])
        for _ in range(1 if options.smoke else options.rounds):
            parts = [median(spent(stage) for _ in range(1 if options.smoke else 15)) for stage in stages]
            times["ideal"].append(float(reached @ parts) / options.batch)
            for side, engine in (("original", original), ("exits", exits)):
                times[side].append(spent(lambda engine=engine: [*engine.map(x.split(50))]) / len(x))
        filled = ", ".join(f"{each.samples / max(each.batches, 1):.1f}" for each in exits.stats().stages)
    whole, ours, ideal = (median(times[side]) for side in ("original", "exits", "ideal"))
    console.print(
        f"{name}, ms of the processor per picture: {whole:.3f}, exits {ours:.3f} ({whole / ours:.2f}x), "
        f"ideal {ideal:.3f}, {(whole - ours) / (whole - ideal):.1%} of the ideal saving, "
        f"{(1 - ours / whole) / (1 - macs):.1%} of that of the MACs ({macs:.1%}); "
        f"samples per batch {filled} of {options.batch}"
    )


def send(url: str, body: bytes, requests: int) -> None:
    """Requests of one picture, by 8 clients."""
    import httpx

    def client(count: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as connection:
            for _ in range(count):
                kind = {"content-type": "image/png"}
                connection.post("/predict", content=body, headers=kind).raise_for_status()

    with ThreadPoolExecutor(8) as clients:
        assert len([*clients.map(client, [requests // 8] * 8)]) == 8


def http(name: str, case: Case, options: argparse.Namespace, console: Console) -> None:
    """What HTTP costs."""
    import uvicorn
    from PIL import Image

    x, requests = pictures(400), 160 if options.smoke else 2000
    branched, png = subject(case, x, options.adapter), io.BytesIO()
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(png, "PNG")
    branched.preprocessing = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    transform: Any = branched.transform()
    sample = transform(Image.open(png))[None]
    times: dict[str, list[float]] = {"http": [], "alone": []}
    with ee.Engine(branched, max_batch=options.batch) as engine:
        server = uvicorn.Server(uvicorn.Config(ee.serve_app(engine), port=0, log_level="warning", http="h11"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        def ask(_: int) -> None:
            for _ in range(requests // 8):
                engine.submit(sample).result()

        def over_http() -> None:
            other = get_context("spawn").Process(target=send, args=(url, png.getvalue(), requests))
            other.start()
            other.join()
            assert other.exitcode == 0

        with ThreadPoolExecutor(8) as clients:
            for _ in range(1 if options.smoke else options.rounds):
                times["http"].append(spent(over_http) / requests)
                times["alone"].append(spent(lambda: [*clients.map(ask, range(8))]) / requests)
        server.should_exit = True
        thread.join()
    ours, alone = (median(times[side]) for side in ("http", "alone"))
    console.print(
        f"{name}, ms of the processor per request: HTTP {ours:.2f}, the Engine alone {alone:.2f}: {ours / alone:.2f}x"
    )


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("load", "pool", "equal", "http"), default="load")
    parser.add_argument("--only", choices=list(CASES), help="one network")
    parser.add_argument("--batch", type=int, default=32, help="samples per batch, of all sides")
    parser.add_argument("--seconds", type=float, default=8, help="of each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapter", type=Path, help="a trained one of the network named by --only")
    parser.add_argument("--smoke", action="store_true", help="for a moment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    if options.smoke:
        options.seconds, options.only = 0.2, "ResNet-56"
    for name, case in CASES.items():
        if options.only not in (None, name):
            continue
        if options.what == "equal" or options.smoke:
            console.print(equal(CASES["ResNet-56"], *((2, 3) if options.smoke else (8, 500))))
        if options.what == "load" or options.smoke:
            load(name, case, options, console)
        if options.what == "pool" or options.smoke:
            pool(name, case, options, console)
        if options.what == "http" or options.smoke:
            http(name, case, options, console)
        if options.what == "equal":
            break
    console.print(environment(torch.device("cpu")))


if __name__ == "__main__":
    main()
