"""The training loop: frozen original, learning branches, one or many processes through Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sized
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import random_split

from ee_surgery.branches import ExitLogits
from ee_surgery.errors import ConfigError, DataError, TrainingError
from ee_surgery.model import EarlyExitModel
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.training import checkpoint, track
from ee_surgery.training.averaging import Average
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.data import Data, is_samples, loader, place
from ee_surgery.training.ensemble import ensembles, fit_ensembles
from ee_surgery.training.joint import JointModel
from ee_surgery.training.loss import batch_loss, relative_costs
from ee_surgery.training.optimizer import learning_rate, make_optimizer
from ee_surgery.training.outcome import Epoch, TrainReport, describe
from ee_surgery.training.processes import OneBatch, Processes, Shares
from ee_surgery.training.reader import Batch, Lesson, Reader, needs_original


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    branched: EarlyExitModel,
    data: Data,
    config: TrainConfig | None = None,
    *,
    validation: Data | None = None,
    accelerator: Accelerator | None = None,
    joint: bool = False,
) -> TrainReport:
    """Train the branches. The original runs in eval mode without gradients and keeps every bit.

    Frontier and operating point, which were found with other weights, are dropped: calibrate afterwards. The model is
    moved to the accelerator's device. With `config.checkpoint_dir`, the same call after a kill goes on where the last
    checkpoint stood and ends in the same weights, bit for bit, as an uninterrupted run on a CPU.

    In a program that `accelerate launch` started as several processes, call it in all of them: each runs its piece of
    every batch, and all end with the same weights, those of one process but for float rounding. How it was trained is
    kept in `report.model.provenance["training"]`.

    Args:
        data: a Dataset of samples, or a DataLoader or iterable of batches; `(inputs, labels)`, dicts, or, with
            `teach="original"`, inputs alone. The same in all processes.
        validation: what each exit's accuracy is reported on after every epoch; by default a random
            `config.validation` of a map-style `data`, which then is not trained on.
        accelerator: your own, perhaps with trackers (`log_with=`), which then get loss, learning rate and
            accuracies of every epoch; one is made from `config.mixed_precision` otherwise.
        joint: train the original along, as EENet, EENets, BranchyNet and MSDNet do, on a copy: the model that was
            given keeps every bit, and `report.model` is a new base with branches, saved with its weights.
    Raises:
        ConfigError: `joint` with answers of the original as labels; an accelerator that splits models up (FSDP,
            DeepSpeed), that accumulates gradients otherwise, or that does not see the other processes.
        ExitPointError: `joint` with an exit that is not where a module ends.
        DataError: batches of unknown form, no labels where they are needed, or data that runs out.
        TrainingError: the loss stays non-finite, or a checkpoint of another run is in the way.
    """
    config = config or TrainConfig()
    before = checkpoint.random_state()
    if joint:
        if config.teach == "original":
            raise ConfigError('teach="original" has a teacher that does not learn: not with joint=True.')
        branched = branched.copy()
    # thresholds, and what was measured, were of the weights before
    branched.operate(None)
    branched.frontier = None
    branched.provenance.pop("evaluation", None)
    try:
        return _Run(branched, data, config, validation, accelerator or make_accelerator(config), joint).run()
    finally:
        branched.eval()
        checkpoint.set_random_state(before)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """One with the precision that the settings ask for."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()  # an earlier training of this process had another precision
    return Accelerator(mixed_precision=config.mixed_precision)


class _Run:
    def __init__(
        self,
        branched: EarlyExitModel,
        data: Data,
        config: TrainConfig,
        validation: Data | None,
        accelerator: Accelerator,
        joint: bool,
    ) -> None:
        self.processes = Processes(accelerator)
        if accelerator.gradient_accumulation_steps not in (1, config.accumulate):
            raise ConfigError(
                f"The accelerator adds up gradients over {accelerator.gradient_accumulation_steps} batches, "
                f"TrainConfig(accumulate={config.accumulate}) over {config.accumulate}: set both to the same."
            )
        self.branched, self.config, self.accelerator = branched.to(accelerator.device), config, accelerator
        self.dtype = next(branched.branches.parameters()).dtype
        if validation is None and config.validation and is_samples(data) and isinstance(data, Sized):
            held = max(1, round(len(data) * config.validation))
            parts = [len(data) - held, held]
            data, validation = random_split(data, parts, torch.Generator().manual_seed(config.seed))  # pyright: ignore[reportArgumentType]
        batches = loader(data, config.batch_size, shuffle=True, num_workers=config.num_workers)
        if isinstance(batches, Iterator) and config.epochs > 1:
            raise DataError(
                f"The training data is an iterator, used up after one pass, but epochs={config.epochs}. "
                "Pass a Dataset, a DataLoader or a list of batches."
            )
        self.batch_size = getattr(batches, "batch_size", None)
        self.batches = Shares(batches, self.processes)
        self.steps = None if self.batches.length is None else math.ceil(self.batches.length / config.accumulate)
        """A pass over the data."""
        if self.steps is None and config.max_steps is None and config.schedule != "constant":
            raise DataError(
                "The training data has no length: set TrainConfig(max_steps=...), or schedule='constant' and warmup=0."
            )
        lengths = [config.max_steps, None if self.steps is None else config.epochs * self.steps]
        self.total = min((length for length in lengths if length is not None), default=0)
        """Steps of the whole training; 0 where that is not known."""
        self.validation = None if validation is None else Shares(loader(validation, config.batch_size), self.processes)
        self.joint = joint
        identity = branched.adapter_config()
        self.settings = _settings(config, joint, self.total, identity)
        self.processes.agree("original", identity.base.fingerprint)
        if self.processes.number > 1:
            start = self.processes.of_main(lambda: {n: t.cpu() for n, t in branched.branches.state_dict().items()})
            branched.branches.load_state_dict(start)
        self.learner: nn.Module = JointModel(branched) if joint else branched.branches
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(config, self.learner.parameters()))
        self.average = Average(self.learner, config.ema)
        self.reader = Reader(branched, self.batches, config, self.processes, joint, self._say)
        self.costs = relative_costs(branched).to(accelerator.device)
        self.report = TrainReport(tuple(branched.exits), branched)
        self.console = Console(quiet=not self.processes.main)

    def run(self) -> TrainReport:
        self.epoch = self.step = self.all_steps = self.taken = self.skipped = self.in_a_row = self.samples = 0
        self.loss_sum = 0.0
        folder = Path(self.config.checkpoint_dir) if self.config.checkpoint_dir else None
        state = checkpoint.load(folder, self.settings) if folder else None
        if state is not None:
            self._restore(state)
        self.processes.agree(f"checkpoint in {folder}, which all must see,", (self.epoch, self.step))
        track.start(self.accelerator, self.settings)
        try:
            while self.epoch < self.config.epochs and not self._at_the_end():
                self._one_epoch(folder, state)
                state = None
        finally:
            self.reader.close()
        self.average.settle()
        if self.joint:
            self.branched.rebase()
            self._say(
                "trained on a copy: report.model is a new base, saved with its weights; the one given is as it was"
            )
        if self.config.ensemble_epochs and ensembles(self.branched.branches):
            self._fit_ensembles()
        self.branched.provenance["training"] = self._provenance()
        self.accelerator.wait_for_everyone()
        return self.report

    def _one_epoch(self, folder: Path | None, resumed: dict[str, Any] | None) -> None:
        started = time.perf_counter()
        done = self.step * self.config.accumulate
        state = None
        if resumed is not None and done and len(resumed["random"]) == self.processes.number:
            state = resumed["random"][self.processes.index]
        batches = self.reader.epoch(self.epoch, done, state)
        self.learner.train()
        with self._bar() as bar:
            task = bar.add_task(
                f"epoch {self.epoch + 1}/{self.config.epochs}", total=self.steps, completed=self.step, loss=math.nan
            )
            while not self._at_the_end() and (group := list(islice(batches, self.config.accumulate))):
                self._one_step(group)
                self.step, self.all_steps = self.step + 1, self.all_steps + 1
                bar.update(task, advance=1, loss=self.loss_sum / max(1, self.taken))
                if folder and self.step % self.config.checkpoint_steps == 0:
                    self._save(folder)
        if self.step == 0:
            raise DataError("No batches: the training data is empty.")
        self.learner.eval()
        mean = self.loss_sum / self.taken if self.taken else math.nan
        with self.average.in_place():
            accuracies = self._validate()
        epoch = Epoch(self.epoch, mean, accuracies, time.perf_counter() - started, self.skipped)
        self.report.epochs.append(epoch)
        self._say(describe(epoch))
        self.accelerator.log(
            {
                **({"loss": mean} if self.taken else {}),
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": epoch.seconds,
                "skipped": epoch.skipped,
                **{f"accuracy/{name}": accuracy for name, accuracy in self.report.accuracies.items()},
            },
            step=self.epoch + 1,
        )
        self.epoch, self.step, self.taken, self.skipped, self.loss_sum = self.epoch + 1, 0, 0, 0, 0.0
        if folder:
            self._save(folder)

    def _one_step(self, batches: list[Batch]) -> None:
        """One step on all of these. All processes see the same loss and gradient, and so take or skip it alike."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self._progress(), self.total)
        self.optimizer.zero_grad()
        before = [buffer.clone() for buffer in self.learner.buffers()]
        total = sum(batch.total for batch in batches)
        value, good = 0.0, True
        for batch in batches:
            loss = self._loss(batch) * (batch.total / total)
            value += loss.item()
            good = math.isfinite(value)
            if not good:
                break
            self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)  # by which it divides
        if good:
            self.processes.add_up(self.learner.parameters())
            norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), self.config.clip_grad or math.inf)
            # fp16 overflows now and then; its scaler skips those steps itself
            good = (
                self.accelerator.mixed_precision == "fp16"
                or norm is None
                or bool(torch.isfinite(torch.as_tensor(norm)))
            )
        if not good:
            self.optimizer.zero_grad()
            for buffer, old in zip(self.learner.buffers(), before, strict=True):  # a NaN in BatchNorm's would stay
                buffer.copy_(old)
            self.skipped += 1
            self.in_a_row += 1
            self.console.print(f"step {self.step}: loss {value} or its gradient is not finite; skipped")
            if self.in_a_row >= self.config.patience_nonfinite:
                raise TrainingError(
                    f"The loss was not finite for {self.in_a_row} steps in a row (epoch {self.epoch + 1}, step "
                    f"{self.step}). Lower lr (now {self.config.lr}), check the inputs for NaN, or train in float32."
                )
            return
        self.optimizer.step()
        self.average.update()
        self.taken, self.in_a_row, self.samples = self.taken + 1, 0, self.samples + total
        self.loss_sum += value

    def _loss(self, batch: Batch) -> Tensor:
        """Of the whole batch, in every process; its gradient here is the part of the samples here."""
        lesson = self.reader.lesson(batch, needs_original(self.config, self.branched, self._progress()))
        exits, original = self._answers(lesson)
        return batch_loss(
            [self._of_all(exit, lesson.total) for exit in exits],
            self.processes.rows(original, lesson.total),
            None if lesson.labels is None else self.processes.rows(lesson.labels, lesson.total),
            self.costs,
            self.config,
            new_head=self.branched.branches.head is not None,
            joint=self.joint,
            progress=self._progress(),
        )

    def _answers(self, lesson: Lesson) -> tuple[list[ExitLogits], Tensor]:
        """What the branches, and the original or a new head, answer in training."""
        one_batch = OneBatch(self.processes, lesson.own) if self.processes.number > 1 else nullcontext()
        with self.accelerator.autocast(), one_batch:
            if self.joint:
                assert lesson.inputs is not None
                return self.learner(self.branched.normal(lesson.inputs))
            return self.branched.split(self.learner(lesson.features), lesson.original)

    def _of_all(self, exit: ExitLogits, total: int) -> ExitLogits:
        """The answers of an exit to the samples of all processes, in float32; what it hands on is not kept."""
        logits, confidence, _ = exit
        if confidence is not None:
            confidence = self.processes.rows(confidence.float(), total)
        return ExitLogits(self.processes.rows(logits.float(), total), confidence)

    def _say(self, line: str) -> None:
        if self.config.progress:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _progress(self) -> float:
        """Share of the training that is done; 0 where its length is not known."""
        return self.all_steps / self.total if self.total else 0.0

    def _at_the_end(self) -> bool:
        return self.config.max_steps is not None and self.all_steps >= self.config.max_steps

    def _fit_ensembles(self) -> None:
        """On the validation split where there is one: answers to what the branches learned from are too sure."""
        log_p: list[Tensor] = []
        truth: list[Tensor] = []
        seen = 0
        for share in self.batches if self.validation is None else self.validation:
            answers, original = self.branched.answers(place(share.inputs, self.accelerator.device, self.dtype))
            own = answers[-1].handed
            assert own is not None
            labels = share.labels
            if labels is None or self.config.teach == "original":
                labels = original.argmax(-1)
            log_p.append(self.processes.rows(own.float(), share.total))
            truth.append(self.processes.rows(labels.to(own.device), share.total))
            seen += share.total
            if seen >= _ENSEMBLE_SAMPLES:
                break
        fit_ensembles(self.branched.branches, torch.cat(log_p), torch.cat(truth), self.config.ensemble_epochs)

    def _validate(self) -> tuple[float, ...]:
        if self.validation is None:
            return ()
        counts = torch.zeros(len(self.branched.exits) + 2, dtype=torch.long, device=self.accelerator.device)
        for share in self.validation:
            answers = self.branched.all_exits(place(share.inputs, self.accelerator.device, self.dtype)).argmax(-1)
            labels = None if self.config.teach == "original" else share.labels
            truth = answers[-1] if labels is None else labels.to(answers.device)
            counts[:-1] += (answers == truth)[:, : share.own].sum(1)
            counts[-1] += share.own
        *right, seen = self.processes.total(counts).tolist()
        return tuple(count / max(1, seen) for count in right)

    def _bar(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        shown = self.config.progress and self.console.is_terminal and self.processes.main
        return Progress(
            *columns,
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=self.console,
            transient=True,
            disable=not shown,
        )

    def _provenance(self) -> dict[str, Any]:
        """How it was trained, as plain data."""
        told = (
            "objective", "teach", "distill", "cutmix", "mixup", "ema", "optimizer", "lr", "weight_decay", "schedule",
            "epochs", "accumulate", "seed",
        )  # fmt: skip
        return {
            **{name: getattr(self.config, name) for name in told},
            "joint": self.joint,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "seconds": sum(epoch.seconds for epoch in self.report.epochs),
            "processes": self.processes.number,
            "device": self.accelerator.device.type,
            "mixed_precision": self.accelerator.mixed_precision,
            "versions": {name: version(name) for name in ("ee-surgery", "torch", "timm", "transformers")},
        }

    # --- checkpoints

    def _save(self, folder: Path) -> None:
        random = self.processes.of_each(checkpoint.random_state())
        if not self.processes.main:
            return
        checkpoint.save(
            folder,
            {
                "settings": self.settings,
                "counters": {name: getattr(self, name) for name in _COUNTERS},
                "history": [asdict(epoch) for epoch in self.report.epochs],
                "learner": self.learner.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "random": random,
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.report.epochs.extend(Epoch(**{**e, "accuracies": tuple(e["accuracies"])}) for e in state["history"])


def _settings(config: TrainConfig, joint: bool, steps: int, identity: AdapterConfig) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation; the number of processes may."""
    settings = asdict(config)
    for free in ("checkpoint_dir", "checkpoint_steps", "progress", "num_workers", "cache_gb"):
        settings.pop(free)
    for listed in ("exit_weights", "milestones"):
        settings[listed] = str(settings[listed])
    exits = [f"{exit.name}: {exit.branch}" for exit in identity.exits]
    return {**settings, "joint": joint, "fingerprint": identity.base.fingerprint, "exits": exits, "steps": steps}


_ENSEMBLE_SAMPLES = 10_000  # tens of parameters a head need no more
_COUNTERS = ("epoch", "step", "all_steps", "taken", "skipped", "in_a_row", "samples", "loss_sum")
