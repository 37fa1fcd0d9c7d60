"""The training loop: frozen original, trained branches, one or many processes through Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import random_split

from ee_surgery.branches import ExitLogits
from ee_surgery.branches.base import PreparedBranch
from ee_surgery.checks import flag, instance
from ee_surgery.data.batches import Data, is_samples, loader, place
from ee_surgery.data.distributed import GlobalBatchNorm, Processes, ShardedBatches
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.errors import OUT_OF_MEMORY, ConfigError, DataError, TrainingError
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.task import IGNORED, require
from ee_surgery.training import checkpoint
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.ema import AveragedWeights
from ee_surgery.training.ensemble import ensembles, fit_ensembles
from ee_surgery.training.features import Batch, BranchBatch, FeatureSource, compare, needs_original
from ee_surgery.training.joint import JointModel
from ee_surgery.training.loss import batch_loss, relative_costs, require_labels, take_scale
from ee_surgery.training.objectives import OBJECTIVES
from ee_surgery.training.optimizer import learning_rate, make_optimizer
from ee_surgery.training.precision import resolve_precision
from ee_surgery.training.report import Epoch, TrainReport, describe, start_trackers
from ee_surgery.training.speed import StopWatch

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    class_map: ClassMap | None = None,
    watch: Callable[[EarlyExitModel], bool] | None = None,
) -> TrainReport:
    """Train the branches. The original runs in eval mode without gradients and keeps every bit.

    Branches on a base in float16 or bfloat16 learn in float32, and have the base's type again when training is over.

    Frontier and operating point, which were found with other weights, are dropped with the first step: calibrate
    afterwards. An error or an interruption before it leaves all as it was; a later one leaves the branches with the
    weights of the last step. The model is
    moved to the accelerator's device. With `config.checkpoint_dir`, the same call after a kill goes on where the last
    checkpoint stood and ends in the same weights, bit for bit, as an uninterrupted run on a CPU.

    In a program that `accelerate launch` started as several processes, call it in all of them: each runs its piece of
    every batch, and all end with the same weights, those of one process but for float rounding. How it was trained is
    kept in `report.model.provenance["training"]`.

    Args:
        data: a Dataset of samples, or a DataLoader or iterable of batches; `(inputs, labels)`, dicts, or, with
            `teach="original"`, inputs alone. The same in all processes. Labels are class numbers of any integer
            type, or class probabilities (B, C); of a multi-label model multi-hot, (B, C). Samples labelled -100 count
            nowhere.
        validation: what each exit's accuracy is reported on after every epoch; by default a random
            `config.validation` of a map-style `data`, which then is not trained on.
        accelerator: your own, perhaps with trackers (`log_with=`), which then get loss, learning rate and
            accuracies of every epoch; one is made from `config.mixed_precision` otherwise.
        joint: train the original along, as EENet, EENets, BranchyNet and MSDNet do, on a copy: the model that was
            given keeps every bit, and `report.model` is a new base with branches, saved with its weights. Parameters
            with `requires_grad=False` stay as they are, with the running statistics of their norms; of a model in
            training mode, modules that are in eval mode stay in it.
        class_map: which class of the model each label of the data is, where they are not the same: a list or dict of
            class numbers, names or WordNet ids.
        watch: called after every epoch, in all processes, with the weights that training would end with (averaged, with
            `ema`). Once it returns True, the learning rate decays (`schedule="wsd"`) and training ends, or it ends at
            once (other schedules).
    Raises:
        ConfigError: an objective or a mixing that is not for the model's task; `joint` with answers of the original as
            labels, or an original that is frozen as a whole; an accelerator that splits models up (FSDP, DeepSpeed),
            that accumulates gradients otherwise, or that does not see the other processes.
        ExitPointError: `joint` with an exit that is not where a module ends.
        DataError: batches of unknown form, no labels where they are needed, labels that are no classes of the model or
            that the original surely knows nothing about (see `strangers`), or data that runs out.
        TrainingError: the loss stays non-finite, or is in most steps; or a checkpoint of another run is in the way.
    """
    instance("branched", branched, EarlyExitModel)
    config = TrainConfig() if config is None else instance("config", config, TrainConfig)
    joint = flag("joint", joint)
    if accelerator is not None:
        from accelerate import Accelerator

        instance("accelerator", accelerator, Accelerator)
    before = checkpoint.random_state()
    require(f"The objective {config.objective!r}", OBJECTIVES.property(config.objective, "tasks"), branched.task)
    if joint:
        if config.teach == "original":
            raise ConfigError('teach="original" has a teacher that does not learn: not with joint=True.')
        branched = branched.copy()
    try:
        accelerator = accelerator or make_accelerator(config)
        return _Run(branched, data, config, validation, accelerator, joint, class_map, watch).run()
    finally:
        branched.eval()
        checkpoint.set_random_state(before)


def make_accelerator(config: TrainConfig, **options: Any) -> Accelerator:
    """One with the precision that the settings ask for, and with these options of `Accelerator`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import parse_flag_from_env

    # As Accelerator makes it: without the flag, processes on CPUs would not find each other.
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    precision = resolve_precision(config.mixed_precision, device)  # pyright: ignore[reportArgumentType]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # an earlier training of this process had another precision
    return Accelerator(mixed_precision=precision, **options)


class _Run:
    def __init__(
        self,
        branched: EarlyExitModel,
        data: Data,
        config: TrainConfig,
        validation: Data | None,
        accelerator: Accelerator,
        joint: bool,
        class_map: ClassMap | None,
        watch: Callable[[EarlyExitModel], bool] | None,
    ) -> None:
        self.processes, self.watch = Processes(accelerator), watch
        if accelerator.gradient_accumulation_steps not in (1, config.accumulate):
            raise ConfigError(
                f"The accelerator adds up gradients over {accelerator.gradient_accumulation_steps} batches, "
                f"TrainConfig(accumulate={config.accumulate}) over {config.accumulate}: set both to the same."
            )
        self.branched, self.config, self.accelerator = branched.to(accelerator.device), config, accelerator
        self.dtype = next(branched.branches.parameters()).dtype
        """Of the branches when they run, and of the model's inputs."""
        if validation is None and config.validation and is_samples(data) and isinstance(data, Sized) and len(data) > 1:
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
        labels = Labels(branched.engine, class_map)
        read = _unread if config.teach == "original" else labels
        self.batches = ShardedBatches(batches, self.processes, read)
        self.steps = None if self.batches.length is None else math.ceil(self.batches.length / config.accumulate)
        """Steps per pass over the data."""
        if self.steps is None and config.max_steps is None and config.schedule != "constant":
            raise DataError(
                "The training data has no length: set TrainConfig(max_steps=...), or schedule='constant' and warmup=0."
            )
        lengths = [config.max_steps, None if self.steps is None else config.epochs * self.steps]
        self.total = min((length for length in lengths if length is not None), default=0)
        """Steps of the whole training; 0 if unknown. Fewer once `watch` has had enough."""
        self.precision = accelerator.mixed_precision
        """In force; `auto` may give bfloat16 up."""
        self.last_step = config.max_steps
        """None: epochs alone end it."""
        self.stopwatch = StopWatch(accelerator.device)
        self.validation = None
        if validation is not None:
            self.validation = ShardedBatches(loader(validation, config.batch_size), self.processes, read)
        self.joint, self.class_map = joint, class_map
        identity = branched.adapter_config()
        self.settings = _settings(config, accelerator.mixed_precision, joint, self.total, identity)
        self.processes.agree("original", identity.base.fingerprint)
        self.processes.agree("mixed_precision", accelerator.mixed_precision)  # "auto" looks at each machine
        if self.processes.number > 1:
            start = self.processes.of_main(lambda: {n: t.cpu() for n, t in branched.branches.state_dict().items()})
            branched.branches.load_state_dict(start)
        self.halves = _halves(branched if joint else branched.branches)
        """What learns in float32, for steps are too small for so few digits, and runs in the type beside it."""
        self.labels = labels
        self.costs = relative_costs(branched).to(accelerator.device)
        self.report = TrainReport(tuple(branched.exits), branched)
        self.console = Console(quiet=not self.processes.main)

    def _start(self, ending: ExitStack) -> None:
        """Create learner, optimizer and data source; `ending` restores state, however training ends."""
        ending.callback(self._narrow)
        self._widen()
        branched, joint, config = self.branched, self.joint, self.config
        self.ways = _float_ways(branched) if self.halves and not joint else []
        self.learner: nn.Module = JointModel(branched) if joint else branched.branches
        ending.callback(self.learner.zero_grad)  # gradients take as much memory as what learns
        ending.callback(self._forget_optimizer)
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(config, self.learner.parameters()))
        self.ema = AveragedWeights(self.learner, config.ema)
        takes = torch.float32 if joint and self.halves else self.dtype
        self.source = FeatureSource(
            branched, self.batches, config, self.processes, joint, self.labels, takes, self._frozen_casting, self._say
        )
        ending.callback(self.source.close)

    def _forget_optimizer(self) -> None:
        mine = vars(self).get("optimizer")
        self.accelerator._optimizers = [other for other in self.accelerator._optimizers if other is not mine]

    def run(self) -> TrainReport:
        self.epoch = self.step = self.all_steps = self.taken = self.skipped = self.in_a_row = self.samples = 0
        self.loss_sum = 0.0
        folder = Path(self.config.checkpoint_dir) if self.config.checkpoint_dir else None
        with ExitStack() as ending:
            self._start(ending)
            state = checkpoint.load(folder, self.settings) if folder else None
            if folder and state is not None:
                self._restore(folder, state)
            self.processes.agree(f"checkpoint in {folder}, which all must see,", (self.epoch, self.step))
            self._check_validation(Labels(self.branched.engine, self.class_map))
            start_trackers(self.accelerator, self.settings)
            if self.config.mixed_precision == "auto":
                device, precision = self.accelerator.device.type, self.precision
                self._say(f"mixed_precision='auto' on this {device}: {_NUMBERS.get(precision, precision)}")
            while self.epoch < self.config.epochs and not self._at_the_end():
                self._one_epoch(folder, state)
                state = None
            self._check_skipped()
            self.ema.settle()
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
        started, before = time.perf_counter(), self.samples
        done = self.step * self.config.accumulate
        state = None
        if resumed is not None and done and len(resumed["random"]) == self.processes.number:
            state = resumed["random"][self.processes.index]
        batches = self.source.epoch(self.epoch, done, state)
        self.learner.train()
        with self._bar() as bar:
            task = bar.add_task(
                f"epoch {self.epoch + 1}/{self.config.epochs}", total=self.steps, completed=self.step, loss=math.nan
            )
            while not self._at_the_end() and (group := self._next(batches)):
                with self.stopwatch.timing("step"):
                    self._one_step(group)
                self.step, self.all_steps = self.step + 1, self.all_steps + 1
                bar.update(task, advance=1, loss=self.loss_sum / max(1, self.taken))
                if folder and self.step % self.config.checkpoint_steps == 0:
                    self._save(folder)
        if self.step == 0:
            raise DataError("No batches: the training data is empty.")
        if self.taken == self.skipped == 0:
            raise DataError(f"No sample of the training data has a label: all are {IGNORED}, which is ignored.")
        self.learner.eval()
        mean = self.loss_sum / self.taken if self.taken else math.nan
        speed = self.stopwatch.read(self.samples - before)
        with self._as_it_will_run():
            accuracies = self._validate()
            seconds, cached = time.perf_counter() - started, bool(self.source.keeps)
            epoch = Epoch(self.epoch, mean, accuracies, seconds, self.skipped, speed, cached)
            self.report.epochs.append(epoch)
            self._say(describe(epoch))
            self._look()
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

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        with self.stopwatch.timing("data"):
            return list(islice(batches, self.config.accumulate))

    def _look(self) -> None:
        """Ask `watch` whether this is enough, unless the end is near already."""
        left = self.config.decay if self.config.schedule == "wsd" else 0.0
        if self.watch is None or (self.total and self._progress() > 1 - left):
            return
        before = checkpoint.random_state()
        enough = bool(self.watch(self.branched))
        if self.processes.of_main(lambda: enough):
            self.total = self.last_step = round(self.all_steps / (1 - min(left, 0.99)))
        checkpoint.set_random_state(before)

    def _one_step(self, batches: list[Batch]) -> None:
        """One step on all of these. All processes see the same loss and gradient, and so take or skip it alike."""
        total = sum(batch.counted for batch in batches)
        if total == 0:  # all ignored
            for batch in batches:
                self.source.branch_batch(batch, False)  # where features are kept, they are read again
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self._progress(), self.total)
        self.optimizer.zero_grad()
        before = [buffer.clone() for buffer in self.learner.buffers()]
        good = False
        try:
            good, value = self._gradients(batches, total)
        finally:
            if not good:
                self.optimizer.zero_grad()
                for buffer, old in zip(self.learner.buffers(), before, strict=True):  # a NaN in BatchNorm's would stay
                    buffer.copy_(old)
        if not good:
            self.skipped += 1
            self.in_a_row += 1
            self.console.print(f"step {self.step}: loss {value} or its gradient is not finite; skipped")
            self._distrust_bf16()
            if self.in_a_row >= self.config.patience_nonfinite:
                raise TrainingError(
                    f"The loss was not finite for {self.in_a_row} steps in a row (epoch {self.epoch + 1}, step "
                    f"{self.step}). Lower lr (now {self.config.lr}), check the inputs for NaN, or train in float32."
                )
            return
        self._drop_measured()
        self.optimizer.step()
        self.ema.update()
        self.taken, self.in_a_row, self.samples = self.taken + 1, 0, self.samples + total
        self.loss_sum += value

    def _distrust_bf16(self) -> None:
        """Go on in float32 where `auto` has chosen bfloat16 and gradients are not finite.

        Its range is that of float32, but some CPU kernels leave part of a gradient uninitialized: oneDNN in torch
        2.14 for the weights of a strided convolution that see only padding, on maps of 1 x 1.
        """
        if self.config.mixed_precision == "auto" and self.precision == "bf16" and self.skipped >= _SUSPICIOUS:
            self.precision, self.in_a_row = "no", 0
            self._say(f"{self.skipped} steps were not finite in bfloat16: float32 from here on")

    def _gradients(self, batches: list[Batch], total: int) -> tuple[bool, float]:
        """Compute the gradients of one step; returns whether they are finite, and the loss."""
        value = 0.0
        for batch in batches:
            loss = self._loss(batch) * (batch.counted / total)
            value += loss.item()
            if not math.isfinite(value):
                return False, value
            self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)  # by which it divides
        self.processes.add_up(self.learner.parameters())
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), self.config.clip_grad or math.inf)
        # fp16 overflows now and then; its scaler skips those steps itself
        scaled = self.precision == "fp16"
        return scaled or norm is None or bool(torch.isfinite(torch.as_tensor(norm))), value

    def _loss(self, batch: Batch) -> Tensor:
        """Of the whole batch, in every process; its gradient here is the part of the samples here."""
        with self.stopwatch.timing("original"):
            reads_original = needs_original(self.config, self.branched, self._progress())
            branch_batch = self.source.branch_batch(batch, reads_original)
        require_labels(branch_batch.labels, self.config, self.branched.branches.head is not None)
        labels = None if branch_batch.labels is None else self.processes.rows(branch_batch.labels, branch_batch.total)
        if self.branched.task.scaled and not self.taken:
            answers = self.processes.rows(branch_batch.original, branch_batch.total)
            take_scale(self.branched.branches, self.branched.task, answers, labels, self.config)
        exits, original = self._answers(branch_batch)
        return batch_loss(
            [self._of_all(exit, branch_batch.total) for exit in exits],
            self.processes.rows(original, branch_batch.total),
            labels,
            self.costs,
            self.config,
            new_head=self.branched.branches.head is not None,
            joint=self.joint,
            progress=self._progress(),
            task=self.branched.task,
        )

    def _answers(self, branch_batch: BranchBatch) -> tuple[list[ExitLogits], Tensor]:
        """Logits of the branches, and of the original or a new head, in training."""
        plain = self.processes.number == 1 and branch_batch.total > 1
        one_batch = nullcontext() if plain else GlobalBatchNorm(self.processes, branch_batch.own, branch_batch.total)
        with self._casting(), one_batch:
            if self.joint:
                assert branch_batch.inputs is not None
                return self.learner(self.branched.engine.backbone.arguments(branch_batch.inputs))
            features = branch_batch.features
            if self.halves:
                features = [tuple(place(tensor, None, torch.float32) for tensor in read) for read in features]  # pyright: ignore[reportArgumentType]
            return self.branched.branches.split(self.learner(features), branch_batch.original)

    def _casting(self) -> AbstractContextManager[object]:
        """Autocast in the precision that is in force."""
        return nullcontext() if self.precision == "no" else self.accelerator.autocast()

    def _frozen_casting(self) -> AbstractContextManager[object]:
        """Autocast of the frozen original: in bfloat16, unless what it answers are numbers to be met."""
        task = self.branched.task
        casts = self.precision == "bf16" and task.chooses and not task.of_features
        return self._casting() if casts else nullcontext()

    def _of_all(self, exit: ExitLogits, total: int) -> ExitLogits:
        """The answers of an exit to the samples of all processes, in float32; what it hands on is not kept."""
        logits, confidence, _ = exit
        if confidence is not None:
            confidence = self.processes.rows(confidence.float(), total)
        return ExitLogits(self.processes.rows(logits.float(), total), confidence)

    def _drop_measured(self) -> None:
        """Thresholds, and what was measured, were of the weights before."""
        self.branched.state.forget_measured()

    def _say(self, line: str) -> None:
        if self.config.progress:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _progress(self) -> float:
        """Fraction of the training that is done; 0 if its length is unknown."""
        return self.all_steps / self.total if self.total else 0.0

    def _at_the_end(self) -> bool:
        return self.last_step is not None and self.all_steps >= self.last_step

    def _fit_ensembles(self) -> None:
        """On the validation split where there is one: answers to what the branches learned from are too sure."""
        log_p: list[Tensor] = []
        truth: list[Tensor] = []
        seen, task = 0, self.branched.task
        for shard in self.batches if self.validation is None else self.validation:
            answers, original = self.branched.engine.answers(place(shard.inputs, self.accelerator.device, self.dtype))
            own = answers[-1].log_probs
            assert own is not None
            labels = self.processes.rows(
                task.labels_from(original) if shard.labels is None else shard.labels.to(own.device), shard.total
            )
            counts = ~task.ignored(labels)
            log_p.append(self.processes.rows(own.float(), shard.total)[counts])
            truth.append(labels[counts])
            seen += len(truth[-1])
            if seen >= _ENSEMBLE_SAMPLES:
                break
        fit_ensembles(self.branched.branches, torch.cat(log_p), torch.cat(truth), self.config.ensemble_epochs)

    def _widen(self) -> None:
        for tensor, _ in self.halves:
            tensor.data = tensor.data.float()

    def _narrow(self) -> None:
        """Give back the base's types; an interruption waits until all have them."""
        held: BaseException | None = None
        for tensor, dtype in self.halves:
            try:
                tensor.data = tensor.data.to(dtype)
            except BaseException as error:  # noqa: PERF203 (once per training)
                held, tensor.data = error, tensor.data.to(dtype)
        if held is not None:
            raise held

    @contextmanager
    def _as_it_will_run(self) -> Iterator[None]:
        """The weights that training would end with now, averaged and in the base's type, for a while."""
        changes = self.ema.mean is not None or self.halves
        own = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()} if changes else None
        try:
            self.ema.settle()
            self._narrow()
            yield
        finally:
            self._widen()
            if own is not None:
                self.learner.load_state_dict(own)

    def _check_skipped(self) -> None:
        skipped = sum(epoch.skipped for epoch in self.report.epochs)
        if 2 * skipped > self.all_steps:
            raise TrainingError(
                f"{skipped} of {self.all_steps} steps were skipped, as their loss or gradient was not finite: the "
                f"branches have learned next to nothing. Lower lr (now {self.config.lr}), check the inputs for NaN and "
                "infinity, or train without mixed_precision."
            )

    def _check_validation(self, labels: Labels) -> None:
        """Check the first labels of the validation data now, not after the first epoch."""
        if self.validation is None or isinstance(self.validation.batches, Iterator):
            return
        before = checkpoint.random_state()
        for shard in self.validation:
            if shard.labels is None or not labels.curious:
                break
            inputs = place(shard.inputs, self.accelerator.device, self.dtype)
            if not self.joint:
                compare(self.branched, shard._replace(inputs=inputs), labels, self.processes)
        checkpoint.set_random_state(before)

    def _validate(self) -> tuple[float, ...]:
        if self.validation is None:
            return ()
        task = self.branched.task
        sums = torch.zeros(len(self.branched.exits) + 2, device=self.accelerator.device)  # outcomes; samples
        for shard in self.validation:
            logits = self.branched.all_exits(place(shard.inputs, self.accelerator.device, self.dtype))
            truth = task.labels_from(logits[-1]) if shard.labels is None else task.hard(shard.labels).to(logits.device)
            counts = ~task.ignored(truth)
            outcomes = torch.stack([task.outcome(row, truth) for row in logits]) * counts
            sums[:-1] += outcomes[:, : shard.own].sum(1)
            sums[-1] += counts[: shard.own].sum()
        *right, seen = self.processes.total(sums).tolist()
        return tuple(count / seen for count in right) if seen else ()

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
            "epochs", "views", "accumulate", "seed",
        )  # fmt: skip
        return {
            **{name: getattr(self.config, name) for name in told},
            "joint": self.joint,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "losses": [epoch.loss for epoch in self.report.epochs],
            "seconds": sum(epoch.seconds for epoch in self.report.epochs),
            "processes": self.processes.number,
            "device": self.accelerator.device.type,
            "mixed_precision": self.precision,
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
                "average": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "random": random,
            },
        )

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Resume from a checkpoint; if it does not fit, change nothing."""
        before = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()}
        try:
            self._take(state)
        except BaseException as error:
            self.learner.load_state_dict(before)
            if not isinstance(error, Exception) or isinstance(error, OUT_OF_MEMORY):
                raise
            raise checkpoint.refused(folder, f"{type(error).__name__}: {' '.join(str(error).split())}.") from error
        self._drop_measured()

    def _take(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.ema.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])
        self.report.epochs.extend(map(Epoch.from_dict, state["history"]))
        if not all(found.keys() >= checkpoint.random_state().keys() for found in state["random"]):
            raise KeyError("random")


def _halves(module: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Parameters and buffers in half precision, each with its dtype."""
    found = [*module.parameters(), *module.buffers()]
    return [(tensor, tensor.dtype) for tensor in found if tensor.dtype in (torch.float16, torch.bfloat16)]


def _float_ways(branched: EarlyExitModel) -> list[PreparedBranch]:
    """What shortcuts need to run in float32 behind a base in half precision: their code was written for its types."""
    mine = branched.engine.backbone
    if not any(branch.copies for branch in branched.branches):
        return []
    sample = place(mine.sample, None, torch.float32)  # pyright: ignore[reportArgumentType]
    graph = inspect(deepcopy(branched.backbone).float(), sample, opaque=mine.opaque)
    pairs = zip(branched.branches, branched.exits, strict=True)
    return [branch.prepare(graph, graph[name]) for branch, name in pairs if branch.copies]


def _unread(labels: Tensor, rows: int) -> None:
    """What is made of labels where the original's answers stand for them."""


def _settings(config: TrainConfig, precision: str, joint: bool, steps: int, identity: AdapterConfig) -> dict[str, Any]:
    """Settings that must not change when resuming; the number of processes may."""
    settings = {**asdict(config), "mixed_precision": precision}  # not "auto", which another machine answers otherwise
    for free in ("checkpoint_dir", "checkpoint_steps", "progress", "num_workers", "cache_gb"):
        settings.pop(free)
    for listed in ("exit_weights", "milestones"):
        settings[listed] = str(settings[listed])
    exits = [f"{exit.name}: {exit.branch}" for exit in identity.exits]
    return {**settings, "joint": joint, "fingerprint": identity.base.fingerprint, "exits": exits, "steps": steps}


_ENSEMBLE_SAMPLES = 10_000  # tens of parameters per head need no more
_SUSPICIOUS = 3  # skipped steps of an epoch after which `auto` trusts bfloat16 no longer
_NUMBERS = {"no": "float32", "bf16": "bfloat16"}
_COUNTERS = (
    "epoch", "step", "all_steps", "total", "last_step", "taken", "skipped", "in_a_row", "samples", "loss_sum",
    "precision",
)  # fmt: skip
