"""Training batches for the branches: loaded, augmented, and run through the frozen original or read from a cache."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.data.batches import count, place
from ee_surgery.data.distributed import Processes, Shard, ShardedBatches
from ee_surgery.data.labels import Labels
from ee_surgery.errors import TrainingError
from ee_surgery.files import atomic_write, explained
from ee_surgery.model import EarlyExitModel
from ee_surgery.training.checkpoint import random_state, set_random_state
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.mixup import Mixing
from ee_surgery.training.objectives import OBJECTIVES

_APART = 1_000_003  # distance between the seeds of two processes: larger than any number of epochs
_FASTER = 0.5  # reading back must take at most this fraction of the time to compute


@dataclass(frozen=True)
class BranchBatch:
    """Features and targets of one batch."""

    inputs: Inputs | None
    """Inputs of the original; None unless `joint`."""
    features: list[tuple[Tensor, ...]]
    """Inputs of each branch; empty with `joint`, where the original runs with gradients."""
    original: Tensor
    """Logits of the original, (B, C); zeros if the loss does not use them."""
    labels: Tensor | None
    total: int
    """Samples of the batch in all processes."""
    own: int


@dataclass(frozen=True)
class Batch:
    """A batch before its features are computed or loaded."""

    shard: Shard | None
    """None if its features are cached."""
    path: Path | None
    """Cache file of its features; None if batches are not repeated."""
    counted: int
    """Samples in all processes that are not ignored."""


class FeatureSource:
    """The batches of each epoch.

    With `views`, there are that many distinct augmented passes; later epochs repeat them, with the same crops and the
    same CutMix partners. The original's features are cached on disk if that is faster than running it, in a folder that
    is removed at the end.

    Args:
        joint: the original is trained too, so it is not run here.
        labels: compares the first labels with the original's predictions.
        dtype: of the model's inputs.
        casting: the autocast that the original runs under.
        say: prints a line.
    """

    def __init__(
        self,
        branched: EarlyExitModel,
        batches: ShardedBatches,
        config: TrainConfig,
        processes: Processes,
        joint: bool,
        labels: Labels,
        dtype: torch.dtype,
        casting: Callable[[], AbstractContextManager[object]],
        say: Callable[[str], None],
    ) -> None:
        self.branched, self.batches, self.config, self.processes = branched, batches, config, processes
        self.joint, self.labels, self.casting, self.say = joint, labels, casting, say
        self.home = next(branched.branches.parameters()).device, dtype
        self.mixing = Mixing(config, branched.num_classes, branched.task)
        self.keeps: bool | None = None if config.views and not joint and config.epochs > config.views else False
        """Whether features are cached; None until measured on the first batch."""
        self.folder: Path | None = None
        self.complete: dict[int, list[int]] = {}
        """Fully cached passes -> number of counted samples per batch."""

    def close(self) -> None:
        """Remove the cache."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- which batches

    def epoch(self, number: int, done: int, resumed: dict[str, Any] | None) -> Iterator[Batch]:
        """The batches of one epoch, from batch `done` on, each for `branch_batch`.

        Args:
            resumed: the random state stored in a checkpoint at that batch.
        """
        view = number % self.config.views if self.config.views else number
        if view in self.complete:
            self._seed(number)
            if resumed is not None:
                set_random_state(resumed)
            yield from (
                Batch(None, self._path(view, i), n) for i, n in islice(enumerate(self.complete[view]), done, None)
            )
            return
        _set_seed(self.config.seed + view)
        shards = iter(self.batches)
        self._seed(view)  # otherwise all processes would draw the same crops and dropout masks
        # Loaded and discarded, not skipped: their transforms must draw the same random numbers again.
        skipped = islice(shards, done) if not self.config.views else islice(self._mixed(shards, number), done)
        if sum(1 for _ in skipped) < done:
            raise TrainingError(f"The checkpoint is at batch {done} of an epoch, but the data has fewer.")
        if not self.config.views:
            if resumed is not None:
                set_random_state(resumed)
            yield from (Batch(shard, None, self._counted(shard)) for shard in self._mixed(shards, number))
            return
        # Random numbers of the data must not depend on those of dropout, which differ between passes.
        data, totals = random_state(), []
        self._seed(number)
        if resumed is not None:
            set_random_state(resumed)
        mixed = self._mixed(shards, number)
        while True:
            learning = random_state()
            set_random_state(data)
            shard = next(mixed, None)
            data = random_state()
            set_random_state(learning)
            if shard is None:
                break
            path = None if self.keeps is False else self._path(view, done + len(totals))
            totals.append(self._counted(shard))
            yield Batch(shard, path, totals[-1])
        if self.keeps and done == 0:
            self.complete[view] = totals

    def _seed(self, number: int) -> None:
        if self.processes.index or self.config.views:
            _set_seed(self.config.seed + number + _APART * self.processes.index)

    def _mixed(self, shards: Iterator[Shard], number: int) -> Iterator[Shard]:
        for shard in shards:
            shard = shard._replace(inputs=place(shard.inputs, *self.home))
            if number == 0 and not self.joint and self.labels.curious:
                compare(self.branched, shard, self.labels, self.processes)
            inputs, labels = self.mixing(shard.inputs, shard.labels)
            yield shard._replace(inputs=inputs, labels=None if labels is None else labels.to(self.home[0]))
        if number == 0:
            self.labels.settle()

    def _counted(self, shard: Shard) -> int:
        if shard.labels is None:
            return shard.total
        return int(self.processes.total((~self.branched.task.ignored(shard.labels))[: shard.own].sum()))

    def _path(self, view: int, number: int) -> Path:
        if self.folder is None:
            with _on_disk(Path(self.config.checkpoint_dir or tempfile.gettempdir())):
                if self.config.checkpoint_dir is None:
                    self.folder = Path(tempfile.mkdtemp(prefix="features-"))
                else:
                    self.folder = Path(self.config.checkpoint_dir) / f"features-{self.processes.index}"
                    shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
                    self.folder.mkdir(parents=True)
        return self.folder / f"{view}-{number}.safetensors"

    # --- features and targets

    def branch_batch(self, batch: Batch, reads_original: bool) -> BranchBatch:
        """Features and targets of a batch.

        Args:
            reads_original: whether the loss of this step uses the original's logits; if no step's does, nothing after
                the last exit has to run.
        """
        if batch.shard is None:
            assert batch.path is not None
            return _load(batch.path, self.home[0])
        shard = batch.shard
        if self.joint:
            none = torch.zeros(count(shard.inputs), self.branched.num_classes, device=self.home[0])
            return BranchBatch(shard.inputs, [], none, shard.labels, shard.total, shard.own)
        if batch.path is None:
            return self._run(shard, reads_original)
        whole = needs_original(self.config, self.branched)
        branch_batch = self._run(shard, whole)
        if self.keeps is None:
            self.keeps = self._worth(shard, branch_batch, whole, batch.path)
        if self.keeps:
            _save(branch_batch, batch.path)
        return branch_batch

    def _run(self, shard: Shard, reads_original: bool) -> BranchBatch:
        if reads_original:
            with self.casting():
                features, original = self.branched.engine.features(shard.inputs)
            original = self._uncast(original)
        else:
            with self.casting():
                features = self.branched.engine.features_alone(shard.inputs)
            original = torch.zeros(count(shard.inputs), self.branched.num_classes, device=self.home[0])
        features = [tuple(map(self._uncast, read)) for read in features]
        return BranchBatch(None, features, original, shard.labels, shard.total, shard.own)

    def _uncast(self, tensor: Tensor) -> Tensor:
        """Numbers in the type of the model's inputs, whatever it was run in."""
        return tensor.to(self.home[1]) if tensor.is_floating_point() else tensor

    def _worth(self, shard: Shard, branch_batch: BranchBatch, whole: bool, path: Path) -> bool:
        """Measure on one batch whether caching is faster than running the original, and whether the features fit."""
        started = time.perf_counter()
        self._run(shard, whole)
        computed = time.perf_counter() - started
        _save(branch_batch, path)
        started = time.perf_counter()
        _load(path, self.home[0])
        loaded = time.perf_counter() - started
        number = self.batches.length
        with _on_disk(path.parent):
            free = shutil.disk_usage(path.parent).free / 1e9
            size = math.inf if number is None else path.stat().st_size * number * (self.config.views or 1) / 1e9
        times = f"{1e3 * loaded:.1f} ms per batch to read, {1e3 * computed:.1f} ms to compute"
        if loaded > _FASTER * computed:
            self.say(f"features are not cached: {times}")
        elif size > min(self.config.cache_gb, free / 2):
            self.say(
                f"features are not cached: {size:.1f} GB, with cache_gb={self.config.cache_gb:g} and {free:.0f} GB free"
            )
        else:
            self.say(f"features of {self.config.views} passes are cached, {size:.1f} GB: {times}")
            return True
        with _on_disk(path.parent):
            path.unlink()
        return False


def compare(branched: EarlyExitModel, shard: Shard, labels: Labels, processes: Processes) -> None:
    """Compare the labels of a batch with the original's predictions, over all processes.

    Raises:
        DataError: the labels clearly are not the original's classes.
    """
    if shard.labels is None:
        return
    task = branched.task
    with branched.exits_disabled():
        answers = task.labels_from(branched.predict(shard.inputs).logits)
    truth = task.hard(shard.labels).to(answers.device)
    labels.compare(processes.rows(answers, shard.total), processes.rows(truth, shard.total))


def needs_original(config: TrainConfig, branched: EarlyExitModel, progress: float = 1.0) -> bool:
    """Whether the loss uses the original's logits, or a new head its features, at this fraction of the training."""
    distills = config.distill > 0 and progress >= config.distill_from
    labels_alone = config.teach == "labels" and not OBJECTIVES.property(config.objective, "reads_original")
    return branched.branches.head is not None or distills or not labels_alone


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Turn disk errors raised inside into an error that helps."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"Features cannot be cached in {path}: {explained(error)} With TrainConfig(cache_gb=0) none are cached, "
            "and training gives the same weights."
        ) from error


def _save(branch_batch: BranchBatch, path: Path) -> None:
    """Write a cache file atomically."""
    found = {f"{i} {j}": tensor for i, read in enumerate(branch_batch.features) for j, tensor in enumerate(read)}
    found["original"] = branch_batch.original
    if branch_batch.labels is not None:
        found["labels"] = branch_batch.labels
    # the memory format decides which kernels run, and so the last bits of the results
    last = [name for name, tensor in found.items() if tensor.ndim == 4 and not tensor.is_contiguous()]
    same: dict[str, str] = {}
    written: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    for name, tensor in found.items():  # several branches may read one tensor, such as a mask: written once
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and first.setdefault(key, name) != name:
            same[name] = first[key]
        else:
            written[name] = tensor.clone(memory_format=torch.contiguous_format)
    about = {"total": branch_batch.total, "own": branch_batch.own, "channels_last": last, "same": same}
    with _on_disk(path.parent), atomic_write(path, durable=False) as partial:  # need not survive a power loss
        save_file(written, partial, {"batch": json.dumps(about)})


def _load(path: Path, device: torch.device) -> BranchBatch:
    with _on_disk(path.parent), safe_open(path, framework="pt", device=str(device)) as file:  # memory-mapped
        about = json.loads(file.metadata()["batch"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    found.update({name: found[first] for name, first in about["same"].items()})
    for name in about["channels_last"]:
        found[name] = found[name].contiguous(memory_format=torch.channels_last)
    original, labels = found.pop("original"), found.pop("labels", None)
    features: dict[int, list[Tensor]] = {}
    for name in sorted(found, key=lambda name: [int(part) for part in name.split()]):
        features.setdefault(int(name.split()[0]), []).append(found[name])
    return BranchBatch(
        None, [tuple(read) for read in features.values()], original, labels, about["total"], about["own"]
    )


def _set_seed(seed: int) -> None:
    """Seed Python, numpy and torch on all devices."""
    from accelerate.utils import set_seed

    set_seed(seed)
