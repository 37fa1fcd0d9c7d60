"""Loading adapters that are damaged or written by an attacker: outcomes, counted.

    python -m benchmarks.hostile                        # 10,000 folders
    python -m benchmarks.hostile --folders 500 --seed 1

Each folder is a good adapter with one mutation of `benchmarks.mutations`: an accident (bits, digits, blocks, edits by
hand, with the digests left as they were) or an attack (whose digests fit again). It is loaded, shown and listed for a
push in a process of its own. Accidents must be refused with an error of this package, or change nothing; attacks may
also make another valid adapter, as any author may, but have to be bounded in time and memory all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import platform
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ee_surgery as ee
from benchmarks.mutations import ACCIDENTS, ATTACKS, mutate
from ee_surgery.share.adapter import load_adapter, own_files, without_tensors
from ee_surgery.share.card import update_card
from ee_surgery.share.tables import adapter_table
from recipes.networks import CifarResNet

HANG, GROWTH, MESSAGE = 5.0, 200.0, 3000  # seconds of work, MB, characters
_PATIENCE = 60.0  # seconds of waiting, on a machine that may be busy
OUTCOMES = ("refused", "same", "another", "other answers", "error of others", "hang", "memory", "long message")
FAULTS = OUTCOMES[3:]


@dataclass(frozen=True)
class Outcome:
    """The outcome for one folder."""

    kind: str
    """One of `OUTCOMES`."""
    mutation: str
    detail: str
    seconds: float
    megabytes: float
    """By how much memory grew."""


@dataclass(frozen=True)
class Subject:
    """A good adapter, and how to load it."""

    make: Callable[[], nn.Module | None]
    """The base that its user passes; None to have it made by its name."""
    folder: Path
    x: Tensor
    own_base: bool = False


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8).eval()


def _vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    config.num_labels = 10
    return transformers.ViTForImageClassification(config).eval()


def _nothing() -> None:
    return None


def make_subjects(root: Path) -> dict[str, Subject]:
    """Adapters of every kind: thresholds, a fitted scheduler, shortcuts, own base weights, an image processor."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    config = ee.TrainConfig(epochs=1, batch_size=16, validation=0, progress=False)
    made: dict[str, ee.EarlyExitModel] = {
        "thresholds": ee.augment(_resnet(), 2, sample=x[:2], branch="strided"),
        "scheduler": ee.augment(_resnet(), 2, sample=x[:2], branch="conv"),
        "shortcut": ee.augment(_resnet(), 2, sample=x[:2], branch=ee.BranchSpec("shortcut", options={"budget": 0.7})),
        "processor": ee.augment(_vit(), 2),
    }
    base = timm.create_model("test_resnet", num_classes=10)
    big = torch.randn(16, 3, 64, 64)
    own = ee.augment(base, 2, sample=big[:2], joint=True, train=[(big, y[:16])], config=config)
    subjects = {}
    for name, branched in {**made, "own base": own}.items():
        pixels = big if name == "own base" else x
        method = "eenet" if name == "scheduler" else "search"
        with torch.no_grad():
            answered = branched.backbone(pixels)
            answered = getattr(answered, "logits", answered).argmax(1)
        labels = torch.where(torch.rand(len(pixels)) < 0.8, answered, y[: len(pixels)])  # something to trade off
        frontier = ee.calibrate(branched, [(pixels, labels)], method=method)
        branched.operate(frontier[len(frontier) // 2])
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}) if name == "processor" else None
        folder = branched.save_pretrained(root / name.replace(" ", "_"), processor=processor)
        makers = {"processor": _vit, "own base": _nothing}
        subjects[name] = Subject(makers.get(name, _resnet), folder, pixels[:8], own_base=name == "own base")
    return subjects


def answers(branched: ee.EarlyExitModel, x: Tensor) -> str:
    """A digest of everything a loaded adapter gives: logits, exits, costs, frontier, preprocessing."""
    found = branched.predict(x)
    frontier = None if branched.frontier is None else without_tensors(branched.frontier.to_dict(), {})
    tensors = [found.logits, found.exit_index, found.score, found.macs]
    plain = [branched.exits, frontier, str(branched.operating_point), branched.preprocessing, branched.trunk_macs]
    plain += [branched.branch_macs, str(branched.processor), sorted(branched.provenance)]
    raw = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(raw + repr(plain).encode()).hexdigest()


def use(subject: Subject, folder: Path, card: bool) -> str:
    """Load a folder, show it, list it for a push, optionally rewrite its card; the digest of its outputs."""
    model = subject.make()
    branched = ee.from_pretrained(folder, model, own_base=subject.own_base, local_files_only=True)
    detail = answers(branched, subject.x)
    config, _, frontier = load_adapter(folder)
    Console(file=io.StringIO(), width=120).print(adapter_table(config, frontier), str(branched.operating_point))
    own_files(folder)
    if card:
        update_card(folder, license="mit")
    return detail


def judge(subject: Subject, expected: str, folder: Path, mutation: str, accident: bool, detail: str) -> Outcome:
    """Use a mutated folder, and classify the outcome."""
    _reset_peak()
    before, start = _peak(), time.process_time()
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = use(subject, folder, card=len(detail) % 10 == 0) == expected
        kind = "same" if same else "other answers" if accident else "another"
    except ee.SurgeryError as error:
        kind, message = "refused", str(error)
    except Exception as error:
        kind, message = "error of others", f"{type(error).__name__}: {str(error)[:300]}"
    seconds, megabytes = time.process_time() - start, _peak() - before
    if seconds > HANG:
        kind = "hang"
    elif megabytes > GROWTH:
        kind = "memory"
    elif len(message) > MESSAGE:
        kind = "long message"
    return Outcome(kind, mutation, f"{detail} -> {message[:300]}", seconds, megabytes)


def _reset_peak() -> None:
    with suppress(OSError):  # elsewhere the peak of the whole process stands for it
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """The most memory that was resident, in MB."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- processes


def _serve(connection: Connection, subjects: dict[str, Subject], root: Path) -> None:
    torch.set_num_threads(1)
    expected = {name: use(subject, subject.folder, card=False) for name, subject in subjects.items()}
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        name = list(subjects)[int(hashlib.sha256(seed.encode()).hexdigest(), 16) % len(subjects)]
        with tempfile.TemporaryDirectory(dir=root) as folder:
            mutated = mutate(subjects[name].folder, Path(folder) / "adapter", seed)
            connection.send(f"{name}, {mutated[0]}: {mutated[2]}")
            outcome = judge(subjects[name], expected[name], Path(folder) / "adapter", *mutated)
        if outcome.kind in FAULTS:
            print(outcome, flush=True)
        connection.send(outcome)


def run(folders: int, seed: int, workers: int = 1) -> list[Outcome]:
    """Judge many folders in processes of their own, which are replaced when they hang or die."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(workers) as pool:
        subjects = make_subjects(Path(root))

        def work(first: int) -> None:
            seeds = [f"{seed}:{number}" for number in range(first, folders, workers)]
            for outcome in _judged(seeds, subjects, Path(root)):
                outcomes.append(outcome)
                if len(outcomes) % 500 == 0:
                    print(f"{len(outcomes):,} of {folders:,}: {dict(Counter(o.kind for o in outcomes))}", flush=True)

        list(pool.map(work, range(workers)))
    return outcomes


def _judged(seeds: list[str], subjects: dict[str, Subject], root: Path) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    left = iter(seeds)
    seed = next(left, None)
    while seed is not None:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, subjects, root), daemon=True)
        process.start()
        there.close()
        here.recv()
        while seed is not None:
            here.send(seed)
            seed, detail = next(left, None), ""
            try:
                detail = here.recv()
                if not here.poll(_PATIENCE):
                    raise TimeoutError
                yield here.recv()
            except (EOFError, TimeoutError) as error:
                yield Outcome(
                    "hang", detail.partition(", ")[2].partition(":")[0], f"{detail} {error!r}", _PATIENCE, 0.0
                )
                break
        process.kill()


def table(outcomes: list[Outcome], seed: int) -> Table:
    """Outcomes of accidents and attacks."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    shown = Table(title=f"{len(outcomes):,} mutated adapter folders, seed {seed}; {versions}")
    shown.add_column("mutation")
    for kind in OUTCOMES:
        shown.add_column(kind, justify="right")
    shown.add_column("slowest s", justify="right")
    shown.add_column("most MB", justify="right")
    for what, mutations in {"accidents": ACCIDENTS, "attacks": ATTACKS}.items():
        names = [mutation.__name__ for mutation in mutations]
        for name in (*names, what):
            found = [o for o in outcomes if o.mutation == name or (name == what and o.mutation in names)]
            counts = Counter(outcome.kind for outcome in found)
            slowest, most = (max((getattr(o, key) for o in found), default=0.0) for key in ("seconds", "megabytes"))
            cells = [f"{counts[kind]:,}" for kind in OUTCOMES]
            shown.add_row(name, *cells, f"{slowest:.1f}", f"{most:.0f}", end_section=name == what)
    return shown


def main() -> None:
    """Print the table, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given: Any = parser.parse_args()
    outcomes = run(given.folders, given.seed, given.workers)
    console = Console(width=170)
    for outcome in outcomes:
        if outcome.kind in FAULTS:
            console.print(f"{outcome.kind}: {outcome.mutation}: {outcome.detail!r} "
                          f"({outcome.seconds:.1f} s, {outcome.megabytes:.0f} MB)", markup=False)  # fmt: skip
    console.print(table(outcomes, given.seed))


if __name__ == "__main__":
    main()
