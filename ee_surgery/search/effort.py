"""How much work finds exits and trains their branches: one word, or minutes, in place of settings."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ee_surgery.attachment import attach
from ee_surgery.branches import BranchSpec
from ee_surgery.calibration.profile import Profile
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.data.batches import Data, halves, is_samples, loader, unpack
from ee_surgery.data.distributed import Processes
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import ExitPointError
from ee_surgery.evaluation.record import record
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.model import EarlyExitModel
from ee_surgery.names import EffortName
from ee_surgery.placement import ExitPlan, place
from ee_surgery.search.exit_search import Cost, ExitSearch, prune_exits, search_exits, timed
from ee_surgery.search.exit_subset import cheapest_exits
from ee_surgery.text import visible
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.loop import train as train_branches
from ee_surgery.training.report import TrainReport

if TYPE_CHECKING:
    from accelerate import Accelerator


def _kinds(*budgets: float) -> tuple[str | BranchSpec, ...]:
    """Small branches that fit the features, and shortcuts of these sizes."""
    return ("auto", *(BranchSpec("shortcut", options={"budget": budget}) for budget in budgets))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What is tried, and how long branches are trained at most."""

    points: int
    """Exit points to try."""
    branches: tuple[str | BranchSpec, ...]
    """To try at each."""
    probe_steps: int
    """Training steps of what is tried."""
    load: float
    """Most that a training step may cost, as a fraction of one of the original; see `search_exits`."""
    epochs: int
    """Most passes over the training data."""
    steps: tuple[int, int]
    """But at least, with little data, and at most, with much, so many steps."""
    patience: int
    """Epochs without gain after which training ends."""


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(
        points=4, branches=_kinds(0.02, 0.12), probe_steps=50, load=0.3, epochs=4, steps=(200, 2_000), patience=2
    ),
    "standard": Effort(
        points=6, branches=_kinds(0.02, 0.12, 0.2, 0.3), probe_steps=80, load=0.4, epochs=16, steps=(600, 20_000),
        patience=3,
    ),
    "best": Effort(
        points=10, branches=_kinds(0.02, 0.12, 0.2, 0.3), probe_steps=200, load=0.6, epochs=40, steps=(2_000, 100_000),
        patience=6,
    ),
}  # fmt: skip
DECIDED = ("epochs", "max_steps", "schedule", "decay")
"""Settings that follow from the effort."""
_GAIN = 0.01  # what an epoch must save of the cost to count
_APART = 50  # steps between two looks at the frontier, at least
_MEMORISED = 0.02  # how much better the original is on what it was trained on, where it has memorised that
_SEEN = 1_000  # training samples to find that out
_TIMED = 8  # steps
_DECAY = 0.25
_PASSES = 4  # of the longest training over each augmented view of the data, where features can be kept
_SEARCH_SHARE = 0.2  # of a time budget


def affordable(graph: ModelGraph, minutes: float, batch_size: int = 128) -> EffortName:
    """The largest effort whose search takes at most a fifth of this time, by a run of the original."""
    batch = graph.backbone.own_batch()
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            graph.backbone(batch.arguments)
            seconds.append(time.perf_counter() - started)
    step = 3 * batch_size * min(seconds) / batch.size  # forwards and backwards through as much as the original
    for name in ("best", "standard"):
        effort = EFFORTS[name]
        sizes = [spec.options["budget"] for spec in effort.branches if isinstance(spec, BranchSpec)]
        if effort.points * effort.probe_steps * sum(map(float, sizes)) * step <= _SEARCH_SHARE * 60 * minutes:
            return name
    return "quick"


@dataclass
class Findings:
    """What was found on the way, as plain data for the adapter and its card."""

    effort: str
    original_on_training_data: float | None = None
    original_held_out: float | None = None
    memorised: bool | None = None
    """Whether the original has memorised the training data; then there is nothing to distill beyond the labels."""
    cost_after_each_look: list[float] = field(default_factory=list)
    """Expected cost at the accepted drop, on held-out data, as a fraction of the original's."""
    epochs: int = 0
    ended: str = ""
    search_minutes: float = 0.0
    training_minutes: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What all steps share."""

    graph: ModelGraph
    train: Data
    searching: Data
    """Held out; chooses exits and ends the training, but no thresholds."""
    drop: float
    cost: Cost
    seed: int
    batch_size: int
    accelerator: Accelerator
    class_map: ClassMap | None
    changes: Mapping[str, Any]
    """Settings that the user wants, where the others are chosen here."""
    say: Callable[[str], None]

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments of every verb."""
        return {"accelerator": self.accelerator, "class_map": self.class_map}

    def profile(self, branched: EarlyExitModel) -> Profile | None:
        """By which cost is counted, the same in all processes; None for MACs."""
        return Processes(self.accelerator).of_main(lambda: timed(branched, self.cost, self.searching, self.batch_size))

    def record(self, branched: EarlyExitModel) -> ExitRecords:
        """All exits on the held-out data, in the cost that counts."""
        records = record(branched, self.searching, batch_size=self.batch_size, **self.shared)
        profile = self.profile(branched)
        return records if profile is None else profile.in_time(records)


def fit(
    setting: Setting,
    name: EffortName,
    *,
    plan: ExitPlan | None,
    branches: str | BranchSpec | Sequence[str | BranchSpec] | None,
    config: TrainConfig | None,
    joint: bool,
    minutes: float | None,
) -> EarlyExitModel:
    """Find exits unless they are given, train their branches while that pays, and leave out those that do not.

    Args:
        plan: exits that were asked for.
        branches: that were asked for: one or one per exit of the plan, or those to try.
        config: settings that the user wants; epochs, steps, schedule and average are decided here.
        minutes: for all of it.
    """
    effort, found, started = EFFORTS[name], Findings(name), time.perf_counter()
    ours = config is None and "views" not in setting.changes
    config = config or _config(setting)
    searched = None
    if plan is None:
        searched = _search(setting, effort, branches, config)
        plan = searched.plan if searched else place(setting.graph, 3, clip=True)
        single = branches if isinstance(branches, (str, BranchSpec)) else None
        branches = searched.branches if searched else single
    branched = attach(setting.graph, plan, branches or "auto", seed=setting.seed)
    config = _distilled(setting, branched, config, found)
    found.search_minutes = (time.perf_counter() - started) / 60
    left = None if minutes is None else minutes - found.search_minutes
    views = max(2, effort.epochs // _PASSES) if ours and not joint else None
    config = _length(setting, branched, effort, config, joint, left, views)
    watch = Patience(setting, effort.patience, _steps(setting, effort, config)[1] or _APART, found)
    report = train_branches(branched, setting.train, config, joint=joint, watch=watch, **setting.shared)
    branched = report.model
    _finish(found, report, config, effort)
    kept = _prune(setting, branched)
    note(setting, kept, plan, searched)
    kept.provenance["effort"] = vars(found)
    return kept


def note(setting: Setting, kept: EarlyExitModel, plan: ExitPlan, searched: ExitSearch | None) -> None:
    """Keep, and say, which exits were tried and left out."""
    left_out = [name for name in plan.names if name not in kept.exits]
    if left_out:
        setting.say(f"left out, since they cost more than they save: {', '.join(map(visible, left_out))}")
    if searched is not None:
        kept.provenance["placement"] = {**searched.to_dict(), "left_out": left_out}


def _config(setting: Setting) -> TrainConfig:
    """Settings that fit the model and the data."""
    data = setting.train
    samples = len(data) if is_samples(data) and isinstance(data, Sized) else math.inf
    _, labels = next(unpack(batch) for batch in loader(data, 1))
    tokens = any(point.layout in ("tokens", "sequence") for point in setting.graph)
    chosen = TrainConfig(
        batch_size=64 if samples < 5_000 else 128,
        lr=1e-3 if tokens else 3e-3,
        weight_decay=5e-3,
        teach="labels" if labels is not None else "original",
        mixed_precision="auto",
        validation=0.0,
        seed=setting.seed,
    )
    return replace(chosen, **setting.changes)


def _search(
    setting: Setting,
    effort: Effort,
    branches: str | BranchSpec | Sequence[str | BranchSpec] | None,
    config: TrainConfig,
) -> ExitSearch | None:
    """The exits worth training; None where none of those tried saves anything yet."""
    try:
        found = search_exits(
            setting.graph,
            setting.train,
            setting.searching,
            branch=branches or effort.branches,
            points=effort.points,
            max_accuracy_drop=setting.drop,
            cost=setting.cost,
            config=config,
            probe_steps=effort.probe_steps,
            load=effort.load,
            horizon=_steps(setting, effort, config)[0],
            seed=setting.seed,
            **setting.shared,
        )
    except ExitPointError as error:
        setting.say(f"{error} Exits at the default places are trained all the same.")
        return None
    setting.say(str(found))
    return found


def _distilled(setting: Setting, branched: EarlyExitModel, config: TrainConfig, found: Findings) -> TrainConfig:
    """Distill only where the original's answers say more than the labels: not on data that it has memorised."""
    if config.teach == "original" or setting.graph.backbone.task.of_features:
        return config  # an embedding is always learned from the original's
    few = math.ceil(_SEEN / config.batch_size)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(setting.seed)
        seen = [*itertools.islice(loader(setting.train, config.batch_size, shuffle=True), few)]
    both = seen, setting.searching
    records = [record(branched, data, batch_size=setting.batch_size, **setting.shared) for data in both]
    trained, held_out = (each.base_accuracy for each in records)
    found.original_on_training_data, found.original_held_out = trained, held_out
    found.memorised = trained - held_out > _MEMORISED
    teachers = "labels alone teach" if found.memorised else "labels and original teach"
    setting.say(f"original: {trained:.2%} on training data, {held_out:.2%} held out; {teachers}")
    return replace(config, distill=0.0) if found.memorised else config


def _steps(setting: Setting, effort: Effort, config: TrainConfig) -> tuple[int, int | None]:
    """Most steps of the training, and steps per pass over the data, if it has a length."""
    batches = loader(setting.train, config.batch_size)
    per_epoch = math.ceil(len(batches) / config.accumulate) if isinstance(batches, Sized) else None
    least, most = effort.steps
    return most if per_epoch is None else min(most, max(effort.epochs * per_epoch, least)), per_epoch


def _length(
    setting: Setting,
    branched: EarlyExitModel,
    effort: Effort,
    config: TrainConfig,
    joint: bool,
    minutes: float | None,
    views: int | None,
) -> TrainConfig:
    """How long to train at most, with an estimate of the time, by some steps.

    Args:
        views: number of augmented passes, if keeping their features is faster than running the original; None for the
            config's.
    """
    steps, per_epoch = _steps(setting, effort, config)
    views = views or config.views
    short = {"epochs": _TIMED + (views or 0), "max_steps": _TIMED, "views": views}
    trial = replace(config, **short, progress=False, checkpoint_dir=None, validation=0.0)
    tried = train_branches(branched.copy(), setting.train, trial, joint=joint, **setting.shared).epochs[-1]
    tried = Processes(setting.accelerator).of_main(lambda: tried)  # all decide by the same numbers
    speed, cached = tried.speed, tried.cached
    assert speed is not None
    if cached:
        config = replace(config, views=views)
    seconds = speed.seconds_per_step
    later = seconds * max(0.01, 1 - speed.data - speed.original) if cached else seconds
    computed = (views or 0) * (per_epoch or 0) if cached else 0
    if minutes is not None:
        first = min(computed, int(60 * minutes / seconds))
        steps = max(1, min(steps, first + int((60 * minutes - first * seconds) / later)))
    whole = min(steps, computed) * seconds + max(0, steps - computed) * later
    setting.say(
        f"training up to {steps:,} steps of {seconds:.2f} s, {whole / 60:.0f} min; it ends once {effort.patience} "
        "epochs gain nothing"
    )
    epochs = steps if per_epoch is None else math.ceil(steps / per_epoch)
    return replace(config, epochs=epochs, max_steps=steps, schedule="wsd", decay=_DECAY, ema=config.ema or 0.99)


class Patience:
    """Ends a training once the expected cost at the accepted drop, on held-out data, has stopped falling.

    Args:
        patience: looks without gain.
        per_epoch: steps.
    """

    def __init__(self, setting: Setting, patience: int, per_epoch: int, found: Findings) -> None:
        self.setting, self.patience, self.found = setting, patience, found
        self.every = math.ceil(_APART / per_epoch)
        self.epochs = 0

    def __call__(self, branched: EarlyExitModel) -> bool:
        self.epochs += 1
        if self.epochs % self.every:
            return False
        cost = cheapest_exits(self.setting.record(branched), self.setting.drop, most=len(branched.exits)).cost
        costs = self.found.cost_after_each_look
        costs.append(cost)
        what = "MACs" if self.setting.cost == "macs" else "time"
        self.setting.say(f"  {cost:.1%} of the {what} at a drop of {100 * self.setting.drop:g} points, held out")
        before, last = costs[: -self.patience], costs[-self.patience :]
        return bool(before) and min(before) < 1 and min(last) > (1 - _GAIN) * min(before)


def _finish(found: Findings, report: TrainReport, config: TrainConfig, effort: Effort) -> None:
    found.epochs = len(report.epochs)
    found.training_minutes = sum(epoch.seconds for epoch in report.epochs) / 60
    early = found.epochs < config.epochs
    found.ended = f"{effort.patience} epochs gained nothing" if early else "its longest length was reached"


def _prune(setting: Setting, branched: EarlyExitModel) -> EarlyExitModel:
    try:
        return prune_exits(branched, setting.record(branched), setting.drop)
    except ExitPointError as error:
        setting.say(f"no-go: {error}")
        return branched


def make_setting(
    graph: ModelGraph,
    train: Data,
    held_out: Data,
    config: TrainConfig | None,
    accelerator: Accelerator | None,
    **options: Any,
) -> tuple[Setting, Data]:
    """With one half of the held-out data, an accelerator, and lines for the main process; and the other half.

    Raises:
        DataError: the held-out data can be read only once, or gives other samples when read again.
    """
    size = 128 if config is None else config.batch_size
    searching, thresholds = halves(held_out, size)
    wanted = config or replace(TrainConfig(mixed_precision="auto"), **options["changes"])
    accelerator = accelerator or make_accelerator(wanted)
    console = Console(quiet=not (wanted.progress and accelerator.is_main_process))

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    made = Setting(graph, train, searching, batch_size=size, accelerator=accelerator, say=say, **options)
    return made, thresholds
