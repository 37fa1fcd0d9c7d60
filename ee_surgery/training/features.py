"""What branches learn from, batch by batch: loaded, augmented, run through the frozen original, or kept from before."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.data.batches import count, place
from ee_surgery.data.distributed import Processes, Shard, ShardedBatches
from ee_surgery.data.labels import Labels, hard, ignored
from ee_surgery.errors import TrainingError
from ee_surgery.files import atomic_write, explained
from ee_surgery.model import EarlyExitModel
from ee_surgery.training.checkpoint import random_state, set_random_state
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.mixup import Mixing
from ee_surgery.training.objectives import OBJECTIVES

_APART = 1_000_003  # between the seeds of two processes: more than there are epochs
_FASTER = 0.5  # reading back has to take at most this shard of the time that computing takes


@dataclass(frozen=True)
class BranchBatch:
    """What one batch has to teach."""

    inputs: Inputs | None
    """As the original takes them; None where they were not kept."""
    features: list[tuple[Tensor, ...]]
    """What every branch reads; none where the original learns too and has to run with gradients."""
    original: Tensor
    """Logits of the original, zeros where the loss does not read them, (B, C)."""
    labels: Tensor | None
    total: int
    """Samples of the batch in all processes."""
    own: int


@dataclass(frozen=True)
class Batch:
    """A batch to be turned into a branch_batch."""

    shard: Shard | None
    """None where its features are kept."""
    path: Path | None
    """Where they are, or may be put; None where batches do not come again."""
    counted: int
    """Samples of it in all processes that are not ignored."""


class FeatureSource:
    """The batches of each epoch.

    With `views`, only so many passes over the data differ; the first then comes again, with the same crops and the same
    partners in CutMix. What the original makes of them is kept on disk where that is faster than running it, in a
    folder that is removed at the end.

    Args:
        joint: the original learns too: nothing is run through it here.
        labels: holds the first labels against what the original answers.
        dtype: what the model takes.
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
        say: Callable[[str], None],
    ) -> None:
        self.branched, self.batches, self.config, self.processes = branched, batches, config, processes
        self.joint, self.labels, self.say = joint, labels, say
        self.home = next(branched.branches.parameters()).device, dtype
        self.mixing = Mixing(config, branched.num_classes)
        self.keeps: bool | None = None if config.views and not joint and config.epochs > config.views else False
        """Whether features are kept; None until the first batch tells."""
        self.folder: Path | None = None
        self.complete: dict[int, list[int]] = {}
        """Passes of which all batches are kept: how many samples of each count."""

    def close(self) -> None:
        """Remove what was kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- which batches

    def epoch(self, number: int, done: int, resumed: dict[str, Any] | None) -> Iterator[Batch]:
        """The batches of one epoch, from batch `done` on, each to be handed to `branch_batch`.

        Args:
            resumed: the random state that a checkpoint found there.
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
        set_seed(self.config.seed + view)
        shards = iter(self.batches)
        self._seed(view)  # else all processes would crop and drop alike
        # Loaded and thrown away, not skipped: whatever randomness their transforms use is used up again.
        skipped = islice(shards, done) if not self.config.views else islice(self._mixed(shards, number), done)
        if sum(1 for _ in skipped) < done:
            raise TrainingError(f"The checkpoint stands at batch {done} of an epoch, but the data ends before.")
        if not self.config.views:
            if resumed is not None:
                set_random_state(resumed)
            yield from (Batch(shard, None, self._counted(shard)) for shard in self._mixed(shards, number))
            return
        # What the data draws must not depend on what dropout draws, which differs from pass to pass.
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
            set_seed(self.config.seed + number + _APART * self.processes.index)

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
        return int(self.processes.total((~ignored(shard.labels))[: shard.own].sum()))

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

    # --- what they teach

    def branch_batch(self, batch: Batch, reads_original: bool) -> BranchBatch:
        """What a batch has to teach.

        Args:
            reads_original: whether the loss of this step does; where no step's does, what lies behind the last exit
                need not run.
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
            features, original = self.branched.features(shard.inputs)
        else:
            features = self.branched.features_alone(shard.inputs)
            original = torch.zeros(count(shard.inputs), self.branched.num_classes, device=self.home[0])
        return BranchBatch(None, features, original, shard.labels, shard.total, shard.own)

    def _worth(self, shard: Shard, branch_batch: BranchBatch, whole: bool, path: Path) -> bool:
        """Measure on one batch whether reading features back is quicker than running the original, and they fit."""
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
        told = f"{1e3 * loaded:.1f} ms a batch to read, {1e3 * computed:.1f} ms to compute"
        if loaded > _FASTER * computed:
            self.say(f"features are not kept: {told}")
        elif size > min(self.config.cache_gb, free / 2):
            self.say(
                f"features are not kept: {size:.1f} GB, with cache_gb={self.config.cache_gb:g} and {free:.0f} GB free"
            )
        else:
            self.say(f"features of {self.config.views} passes are kept, {size:.1f} GB: {told}")
            return True
        with _on_disk(path.parent):
            path.unlink()
        return False


def compare(branched: EarlyExitModel, shard: Shard, labels: Labels, processes: Processes) -> None:
    """Hold the labels of a batch against the original's answers, in all processes at once.

    Raises:
        DataError: the original surely knows nothing about them.
    """
    if shard.labels is None:
        return
    with branched.exits_disabled():
        answers = branched.predict(shard.inputs).logits.argmax(-1)
    labels.compare(
        processes.rows(answers, shard.total), processes.rows(hard(shard.labels).to(answers.device), shard.total)
    )


def needs_original(config: TrainConfig, branched: EarlyExitModel, progress: float = 1.0) -> bool:
    """Whether the loss reads the original's answers, or what a new head reads, at this shard of the training."""
    distills = config.distill > 0 and progress >= config.distill_from
    labels_alone = config.teach == "labels" and not OBJECTIVES.property(config.objective, "reads_original")
    return branched.branches.head is not None or distills or not labels_alone


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Turn what a disk makes libraries raise inside into an error that helps."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"Features cannot be kept in {path}: {explained(error)} With TrainConfig(cache_gb=0) none are kept, and "
            "training gives the same weights."
        ) from error


def _save(branch_batch: BranchBatch, path: Path) -> None:
    """Whole or not at all."""
    found = {f"{i} {j}": tensor for i, read in enumerate(branch_batch.features) for j, tensor in enumerate(read)}
    found["original"] = branch_batch.original
    if branch_batch.labels is not None:
        found["labels"] = branch_batch.labels
    # the order in memory decides which kernels run, and so the last bits
    last = [name for name, tensor in found.items() if tensor.ndim == 4 and not tensor.is_contiguous()]
    about = {"total": branch_batch.total, "own": branch_batch.own, "channels_last": last}
    with _on_disk(path.parent), atomic_write(path, durable=False) as partial:  # no other run reads it
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial, {"batch": json.dumps(about)})


def _load(path: Path, device: torch.device) -> BranchBatch:
    with _on_disk(path.parent), safe_open(path, framework="pt", device=str(device)) as file:  # memory-mapped
        about = json.loads(file.metadata()["batch"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in about["channels_last"]:
        found[name] = found[name].contiguous(memory_format=torch.channels_last)
    original, labels = found.pop("original"), found.pop("labels", None)
    features: dict[int, list[Tensor]] = {}
    for name in sorted(found, key=lambda name: [int(part) for part in name.split()]):
        features.setdefault(int(name.split()[0]), []).append(found[name])
    return BranchBatch(
        None, [tuple(read) for read in features.values()], original, labels, about["total"], about["own"]
    )
