"""The training loop: frozen original, learning branches, Accelerate around them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split

from ee_surgery.branches import ExitLogits
from ee_surgery.errors import ConfigError, DataError, TrainingError
from ee_surgery.inputs import Inputs
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.records import exit_costs
from ee_surgery.training import checkpoint
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.data import Data, is_samples, loader, place, unpack
from ee_surgery.training.data import count as size
from ee_surgery.training.ensemble import ensembles, fit_ensembles
from ee_surgery.training.joint import JointModel
from ee_surgery.training.objectives import OBJECTIVES, Answers, kd


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data gave."""

    epoch: int
    loss: float
    """Mean over the steps that were taken; NaN when none was."""
    accuracies: tuple[float, ...]
    """Of each branch and the original on the validation split; empty without one."""
    seconds: float
    skipped: int
    """Steps left out because their loss or gradient was not finite."""


@dataclass(frozen=True)
class TrainReport:
    """What training did."""

    exits: tuple[str, ...]
    model: EarlyExitModel = field(repr=False)
    """What was trained: the model that was given, or with `joint=True` a new one."""
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def accuracies(self) -> dict[str, float]:
        """Last validation accuracy by exit, the original's head as `original`."""
        last = self.epochs[-1].accuracies if self.epochs else ()
        return dict(zip((*self.exits, "original"), last)) if last else {}  # noqa: B905 (same length by construction)

    def __str__(self) -> str:
        return "\n".join(describe(epoch) for epoch in self.epochs)


def describe(epoch: Epoch) -> str:
    """One line about an epoch."""
    accuracies = " ".join(f"{accuracy:.2%}" for accuracy in epoch.accuracies)
    skipped = f", {epoch.skipped} steps skipped" if epoch.skipped else ""
    shown = f", validation accuracy by exit {accuracies}" if accuracies else ""
    return f"epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}{shown}, {epoch.seconds:.0f} s{skipped}"


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

    The model is moved to the accelerator's device. With `config.checkpoint_dir`, the same call after a kill goes on
    where the last checkpoint stood and ends in the same weights, bit for bit, as an uninterrupted run on a CPU.

    Args:
        data: a Dataset of samples, or a DataLoader or iterable of batches; `(inputs, labels)`, dicts, or, with
            `teach="original"`, inputs alone.
        validation: what each exit's accuracy is reported on after every epoch; by default a random
            `config.validation` of a map-style `data`, which then is not trained on.
        accelerator: your own; one is made from `config.mixed_precision` otherwise.
        joint: train the original along, as EENet, EENets, BranchyNet and MSDNet do, on a copy: the model that was
            given keeps every bit, and `report.model` is a new base with branches, saved with its weights.
    Raises:
        ConfigError: `joint` with answers of the original as labels.
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
    try:
        return _Run(branched, data, config, validation, accelerator or _accelerator(config), joint).run()
    finally:
        branched.eval()
        checkpoint.set_random_state(before)


def _accelerator(config: TrainConfig) -> Accelerator:
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
        self.branched, self.config, self.accelerator = branched.to(accelerator.device), config, accelerator
        self.objective = OBJECTIVES[config.objective]
        self.dtype = next(branched.branches.parameters()).dtype
        if validation is None and config.validation and is_samples(data) and isinstance(data, Sized):
            held = max(1, round(len(data) * config.validation))
            parts = [len(data) - held, held]
            data, validation = random_split(data, parts, torch.Generator().manual_seed(config.seed))  # pyright: ignore[reportArgumentType]
        batches = loader(data, config.batch_size, shuffle=True, num_workers=config.num_workers)
        if iter(batches) is batches and config.epochs > 1:
            raise DataError(
                f"The training data is an iterator, used up after one pass, but epochs={config.epochs}. "
                "Pass a Dataset, a DataLoader or a list of batches."
            )
        if not isinstance(batches, Sized) and config.schedule != "constant":
            raise DataError('The training data has no length: set TrainConfig(schedule="constant", warmup=0).')
        self.joint = joint
        self.learner: nn.Module = JointModel(branched) if joint else branched.branches
        self.prepared: nn.Module
        self.prepared, self.optimizer = accelerator.prepare(self.learner, self._optimizer())
        self.batches: Iterable[Any] = accelerator.prepare(batches) if isinstance(batches, DataLoader) else batches
        self.total = config.epochs * len(self.batches) if isinstance(self.batches, Sized) else 0
        self.validation = None if validation is None else loader(validation, config.batch_size)
        visits = [True] * len(branched.branches)
        costs = exit_costs(branched.trunk_macs, branched.branch_macs, visits)
        self.costs = torch.tensor([*costs[:-1], costs[-1]], device=accelerator.device) / costs[-1]
        self.report = TrainReport(tuple(branched.exits), branched)
        self.console = Console()

    def run(self) -> TrainReport:
        self.epoch = self.step = self.taken = self.skipped = self.in_a_row = 0
        self.loss_sum = 0.0
        folder = Path(self.config.checkpoint_dir) if self.config.checkpoint_dir else None
        state = checkpoint.load(folder, self._settings()) if folder else None
        if state is not None:
            self._restore(state)
        while self.epoch < self.config.epochs:
            self._one_epoch(folder, state)
            state = None
        if self.joint:
            self.branched.rebase()
            self._say(
                "trained on a copy: report.model is a new base, saved with its weights; the one given is as it was"
            )
        if self.config.ensemble_epochs and ensembles(self.branched.branches):
            self._fit_ensembles()
        self.accelerator.wait_for_everyone()
        return self.report

    def _one_epoch(self, folder: Path | None, resumed: dict[str, Any] | None) -> None:
        started = time.perf_counter()
        set_seed(self.config.seed + self.epoch)
        iterator = iter(self.batches)
        done = self.step
        # Loaded and thrown away, not skipped: whatever randomness their transforms use is used up again.
        if sum(1 for _ in islice(iterator, done)) < done:
            raise TrainingError(f"The checkpoint stands at step {done} of an epoch, but the data ends before.")
        if resumed is not None and done:
            checkpoint.set_random_state(resumed["random"])
        self.learner.train()
        with self._bar() as bar:
            total = len(self.batches) if isinstance(self.batches, Sized) else None
            task = bar.add_task(f"epoch {self.epoch + 1}/{self.config.epochs}", total=total, completed=done)
            for batch in iterator:
                self._one_step(batch)
                self.step += 1
                bar.update(task, advance=1, loss=self.loss_sum / max(1, self.taken))
                if folder and self.step % self.config.checkpoint_steps == 0:
                    self._save(folder)
        if self.step == 0:
            raise DataError("No batches: the training data is empty.")
        self.learner.eval()
        mean = self.loss_sum / self.taken if self.taken else math.nan
        accuracies = self._validate()
        epoch = Epoch(self.epoch, mean, accuracies, time.perf_counter() - started, self.skipped)
        self.report.epochs.append(epoch)
        self._say(describe(epoch))
        self.epoch, self.step, self.taken, self.skipped, self.loss_sum = self.epoch + 1, 0, 0, 0, 0.0
        if folder:
            self._save(folder)

    def _one_step(self, batch: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad()
        loss = self._loss(batch)
        good = bool(self.accelerator.gather(torch.isfinite(loss.detach())[None]).all())  # pyright: ignore[reportAttributeAccessIssue]
        if good:
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), self.config.clip_grad or math.inf)
            # fp16 overflows now and then; its scaler skips those steps itself
            good = self.config.mixed_precision == "fp16" or norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if not good:
            self.optimizer.zero_grad()
            self.skipped += 1
            self.in_a_row += 1
            self.console.print(f"step {self.step}: loss {loss.item()} or its gradient is not finite; skipped")
            if self.in_a_row >= self.config.patience_nonfinite:
                raise TrainingError(
                    f"The loss was not finite for {self.in_a_row} steps in a row (epoch {self.epoch + 1}, step "
                    f"{self.step}). Lower lr (now {self.config.lr}), check the inputs for NaN, or train in float32."
                )
            return
        self.optimizer.step()
        self.taken, self.in_a_row = self.taken + 1, 0
        self.loss_sum += loss.item()

    def _loss(self, batch: Any) -> Tensor:
        config = self.config
        inputs, labels = unpack(batch)
        exits, original = self._answers(place(inputs, self.accelerator.device, self.dtype))
        headless = self.branched.branches.head is not None
        if headless and (labels is None or config.teach == "original"):
            raise DataError("The model has no head of its own to learn from: its new head needs labels.")
        if config.teach == "original":
            labels = original.argmax(-1)
        elif config.objective == "kd" and not headless:
            labels = original.argmax(-1)  # not read
        elif labels is None:
            raise DataError('The batches have no labels. Use TrainConfig(teach="original") to learn without.')
        labels = labels.to(self.accelerator.device)
        classes = self.branched.branches[0].classifier.out_features
        if labels.ndim == 1 and (labels.dtype.is_floating_point or not 0 <= int(labels.max()) < classes):
            raise DataError(
                f"Labels must be class numbers below {classes} (or probabilities of shape (B, C)); got "
                f"{labels.dtype} up to {labels.max().item()}."
            )
        exits = [exit._replace(logits=exit.logits.float()) for exit in exits]
        teacher = original.float() if self.joint else original.detach().float()
        answers = Answers(exits, teacher, labels, self.costs, self._progress())
        own = F.cross_entropy(original.float(), labels) if headless else 0.0
        if config.objective == "kd" or config.distill == 1:
            return own + kd(answers, config)
        loss = own + self.objective(answers, config)
        if config.distill == 0 or answers.progress < config.distill_from:
            return loss
        return (1 - config.distill) * loss + config.distill * kd(answers, config)

    def _answers(self, inputs: Inputs) -> tuple[list[ExitLogits], Tensor]:
        """What the branches, and the original or a new head, answer in training."""
        if self.joint:
            with self.accelerator.autocast():
                return self.prepared(self.branched.normal(inputs))
        features, original = self.branched.features(inputs)
        with self.accelerator.autocast():
            return self.branched.split(self.prepared(features), original)

    def _say(self, line: str) -> None:
        if self.config.progress and self.accelerator.is_main_process:
            self.console.print(line, highlight=False)

    def _progress(self) -> float:
        """Share of the training that is done; 0 where its length is not known."""
        return (self.epoch * (self.total // self.config.epochs) + self.step) / self.total if self.total else 0.0

    def _fit_ensembles(self) -> None:
        """On the validation split where there is one: answers to what the branches learned from are too sure."""
        log_p: list[Tensor] = []
        truth: list[Tensor] = []
        count = 0
        for batch in self.batches if self.validation is None else self.validation:
            inputs, labels = unpack(batch)
            answers, original = self.branched.answers(place(inputs, self.accelerator.device, self.dtype))
            own = answers[-1].handed
            assert own is not None
            if labels is None or self.config.teach == "original":
                labels = original.argmax(-1)
            gathered = self.accelerator.gather((own.float(), labels.to(own.device)))
            log_p.append(gathered[0])
            truth.append(gathered[1])
            count += len(gathered[0])
            if count >= _ENSEMBLE_SAMPLES:
                break
        fit_ensembles(self.branched.branches, torch.cat(log_p), torch.cat(truth), self.config.ensemble_epochs)

    def _rate(self) -> float:
        config = self.config
        if not self.total:
            return config.lr
        at = self._progress()
        rise = min(1.0, (at + 1 / self.total) / config.warmup) if config.warmup else 1.0
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * at)),
            "linear": 1 - at,
            "step": 0.1 ** sum(at >= share for share in config.milestones),
            "constant": 1.0,
        }[config.schedule]
        return config.lr * rise * shape

    def _optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config, list(self.learner.parameters())
        # norms and biases are not decayed, as usual
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        return (torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW)(groups, lr=config.lr)

    def _validate(self) -> tuple[float, ...]:
        if self.validation is None:
            return ()
        right = torch.zeros(len(self.branched.exits) + 1, dtype=torch.float64)
        count = 0
        for batch in self.validation:
            inputs, labels = unpack(batch)
            answers = self.branched.all_exits(place(inputs, self.accelerator.device, self.dtype)).argmax(-1)
            truth = answers[-1] if labels is None or self.config.teach == "original" else labels.to(answers.device)
            right += (answers == truth).sum(1).cpu()
            count += size(inputs)
        return tuple((right / max(1, count)).tolist())

    def _bar(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        shown = self.config.progress and self.console.is_terminal and self.accelerator.is_main_process
        return Progress(
            *columns,
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=self.console,
            transient=True,
            disable=not shown,
        )

    # --- checkpoints

    def _settings(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation."""
        config = asdict(self.config)
        for free in ("checkpoint_dir", "checkpoint_steps", "progress", "num_workers"):
            config.pop(free)
        for listed in ("exit_weights", "milestones"):
            config[listed] = str(config[listed])
        identity = self.branched.adapter_config()
        exits = [f"{exit.name}: {exit.branch}" for exit in identity.exits]
        return {
            **config,
            "joint": self.joint,
            "fingerprint": identity.base.fingerprint,
            "exits": exits,
            "steps": self.total,
        }

    def _save(self, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        counters = {name: getattr(self, name) for name in _COUNTERS}
        checkpoint.save(
            folder,
            {
                "settings": self._settings(),
                "counters": counters,
                "history": [asdict(epoch) for epoch in self.report.epochs],
                "learner": self.learner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "random": checkpoint.random_state(),
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.report.epochs.extend(Epoch(**{**e, "accuracies": tuple(e["accuracies"])}) for e in state["history"])


_ENSEMBLE_SAMPLES = 10_000  # tens of parameters a head need no more
_COUNTERS = ("epoch", "step", "taken", "skipped", "in_a_row", "loss_sum")
