"""Search for exits: short training runs of branches at all candidate points show which ones pay off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from rich.console import Console
from torch import nn

from ee_surgery.attachment import attach
from ee_surgery.backbone.base import Sample
from ee_surgery.branches import BRANCHES, BranchSpec, known, resolve
from ee_surgery.calibration.profile import Profile
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop, choice, count, instance, optional, plain, positive
from ee_surgery.data.batches import Data, batches, loader
from ee_surgery.data.batches import count as rows
from ee_surgery.data.distributed import Processes
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import BranchError, ConfigError, DataError, ExitPointError
from ee_surgery.evaluation.profile import profile
from ee_surgery.evaluation.record import record
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import ExitPlan, place
from ee_surgery.search.exit_subset import cheapest_exits
from ee_surgery.search.outlook import as_trained
from ee_surgery.text import visible
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.loop import train as train_branches

if TYPE_CHECKING:
    from accelerate import Accelerator

POINTS = 12
"""Default number of exit points to try."""
TRIED = ("auto", *(BranchSpec("shortcut", options={"budget": budget}) for budget in (0.15, 0.25)))
"""Default branches to try at each point."""
_STEPS = (100, 300)  # default range of the training steps of a probe
_SHARE = 4  # a probe is trained for 1 / _SHARE of the training's steps
_WIDER = (4, 16)  # times the accepted drop
_LITTLE_WIDER = (2, 4, 8)  # where exits are chosen by what they will be worth
_FEW = 2  # exits that are trained whatever the load
_LIGHT = 40_000_000  # MACs per sample that are always allowed: small networks have no exits that are dear to train
_SECONDS = 5.0  # to time a group of branches
_Counted: TypeAlias = Literal["macs", "time"]
Cost: TypeAlias = _Counted | Callable[[EarlyExitModel], Profile]
"""MACs; time in PyTorch here; or time by a function that profiles a branched model on the engine that will serve."""


@dataclass(frozen=True)
class Candidate:
    """A branch tried at an exit point."""

    exit: str
    branch: BranchSpec
    accuracy: float
    """Of the probe alone, on the held-out data; agreement with the original if that has no labels."""
    cost: float
    """Cost of leaving there, branch included, as a fraction of the original's."""
    chosen: bool

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.branch.options.items() if value != "")
        what = f"{self.branch.name} {options}".strip()
        name = visible(self.exit)
        return f"{'*' if self.chosen else ' '} {name:24} {self.accuracy:7.2%} at {self.cost:6.1%}  {visible(what)}"


@dataclass(frozen=True)
class ExitSearch:
    """Result of the search: a plan and its branches for `attach`, and the candidates."""

    plan: ExitPlan
    """The exits worth training."""
    branches: tuple[BranchSpec, ...]
    """One per point of the plan."""
    cost: float
    """Expected mean MACs, or time, at the accepted drop, as a fraction of the original's: with the probes as branches,
    or after training where a `horizon` was given."""
    max_accuracy_drop: float
    candidates: tuple[Candidate, ...]
    """In program order."""
    left_out: tuple[str, ...]
    """Branches that cannot be built at a point or save nothing there, with the reason."""
    records: ExitRecords = field(repr=False)
    """Records of all probes on the held-out data."""
    horizon: int | None = None

    @property
    def stage(self) -> str:
        """Which branches the cost is of."""
        return "with the probes as branches" if self.horizon is None else "expected after training"

    def to_dict(self) -> dict[str, Any]:
        """The candidates, as plain data."""
        tried = [
            {**asdict(candidate), "branch": candidate.branch.name, "options": dict(candidate.branch.options)}
            for candidate in self.candidates
        ]
        return {"cost": self.cost, "max_accuracy_drop": self.max_accuracy_drop, "candidates": tried}

    def __str__(self) -> str:
        found = f"{len(self.plan.points)} of {len(self.candidates)} candidate exits are worth training"
        cost = f"{self.cost:.1%} of the cost at an accuracy drop of {100 * self.max_accuracy_drop:g} points"
        lines = [f"{found}; {self.stage}, {cost}", *map(str, self.candidates)]
        if self.left_out:
            lines.append(f"  and {len(self.left_out)} that cannot be built there or save nothing, see `left_out`")
        return "\n".join(lines)


def search_exits(
    model: nn.Module | ModelGraph,
    train: Data,
    held_out: Data,
    *,
    branch: str | BranchSpec | Sequence[str | BranchSpec] = TRIED,
    points: int | Sequence[str] = POINTS,
    max_accuracy_drop: float = 0.01,
    most: int = 6,
    load: float | None = None,
    horizon: int | None = None,
    cost: Cost = "macs",
    config: TrainConfig | None = None,
    probe_steps: int | None = None,
    sample: Sample | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> ExitSearch:
    """Find the exits that are worth training, from short training runs: their number, positions and sizes.

    Every branch is tried at every point. Branches of one kind are trained together on the same features for a few
    steps, as many at once as cost no more than the original. On held-out data, the exits with the lowest cost at the
    accepted drop are chosen, counting every branch visited (`cheapest_exits`), and those for 4 and 16 times the drop,
    since probes are worse than fully trained branches. Train them all, then let `prune_exits` leave out those that do
    not pay off. Branches that learn slowly are judged by their start: give them more steps.

    Args:
        model: the model, or the graph that `inspect` gave.
        train: the data that the branches will be trained on.
        held_out: data used neither for training nor to choose thresholds; a few thousand samples.
        branch: a branch, or several to choose from at each point: kinds, or sizes of one kind. By default small ones
            that fit the features (`auto`) and shortcuts of two sizes, if there are any.
        points: number of blocks to try, denser near the input, or names of exit points.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
        most: largest number of exits at one drop.
        load: most that training more than two of the branches takes, as a fraction of training the original: their
            cost, and a third of the original's up to the last of them; 40 million MACs per sample are always allowed.
            None for no limit.
        horizon: steps of the training that will follow: exits are chosen by what probes will be worth then
            (`as_trained`), not by what they are.
        cost: what to minimize: `macs`; `time`, measured in PyTorch on this machine for batches such as the first of
            `held_out`; or a function that makes the profile of a branched model, `ee.profile` of a file exported from
            it for example. It is called once for every group of branches trained together.
        config: of the training that will follow; probes use it too, for `probe_steps` steps.
        probe_steps: by default a quarter of that training, but 100 to 300 steps if it has as many.
        sample: see `inspect`.
        seed: of the branches' initial weights.
        accelerator: as for `train`; all processes get the same result.
        class_map: as for `train`.
    Raises:
        ExitPointError: no candidate saves anything at that drop.
        BranchError: no branch can be built anywhere.
        ConfigError: chained branches.
        DataError: `train` or `held_out` is an iterator, which can be read only once.
    """
    if not callable(cost):
        choice("cost", cost, get_args(_Counted))
    max_accuracy_drop, most = accuracy_drop("max_accuracy_drop", max_accuracy_drop), count("most", most)
    load, horizon = optional(positive)("load", load), optional(count)("horizon", horizon)
    specs = known(branch)
    seed, probe_steps = count("seed", seed, low=0), optional(count)("probe_steps", probe_steps)
    config = instance("config", config or TrainConfig(), TrainConfig)
    _check_repeatable(train=train, held_out=held_out)
    graph = model if isinstance(model, ModelGraph) else inspect(model, sample)
    by_name = plain(points) is None
    tried = list(place(graph, points).points) if by_name else _spread(graph, count("points", points))
    probe_steps = probe_steps or short_training(config, train)
    # enough epochs for these steps
    steps = {"epochs": probe_steps, "max_steps": probe_steps}
    short = replace(config, **steps, checkpoint_dir=None, validation=0.0, progress=False)
    precision = config.mixed_precision if accelerator is None else accelerator.mixed_precision
    accelerator = make_accelerator(replace(config, mixed_precision=precision))  # no trackers: probes are not logged
    console = Console(quiet=not (config.progress and accelerator.is_main_process))
    found: list[_Probe] = []
    left_out: list[str] = []
    for spec in specs:
        for fitting in _groups(graph, _fitting(graph, tried, spec, found, left_out)):
            console.print(f"trying {spec.name} at {len(fitting)} points, {probe_steps} steps", soft_wrap=True)
            found += _try(graph, fitting, train, held_out, short, cost, seed, accelerator, class_map)
    if not found:
        raise BranchError(f"None of {[spec.name for spec in specs]} can be built at any of these points: {left_out}.")
    found.sort(key=lambda probe: (probe.point.index, probe.records.branch_macs))
    records = _side_by_side([probe.records for probe in found])
    copied = [BRANCHES[probe.branch.name].copies for probe in found]
    outlook = records if horizon is None else as_trained(records, probe_steps, horizon, copied)
    widen = _WIDER if horizon is None else _LITTLE_WIDER
    load = load and max(load, _LIGHT / graph.macs)
    processes = Processes(accelerator)  # measured times differ between processes, records do not
    chosen, cost_there = processes.of_main(lambda: shortlist(outlook, max_accuracy_drop, most, load, widen))
    if not chosen:
        raise ExitPointError(
            f"No exit of {len(found)} candidates saves anything in {graph.backbone.model_id} at an accuracy drop of "
            f"{100 * max_accuracy_drop:g} points: accept a larger one, train probes longer (now {probe_steps} "
            f"steps), or use a smaller model. {graph.best_case()}"
        )
    return ExitSearch(
        plan=ExitPlan(graph.backbone.model_id, "search", tuple(found[k].point for k in chosen)),
        branches=tuple(found[k].branch for k in chosen),
        cost=cost_there,
        max_accuracy_drop=max_accuracy_drop,
        candidates=tuple(probe.candidate(k in chosen) for k, probe in enumerate(found)),
        left_out=tuple(left_out),
        records=records,
        horizon=horizon,
    )


def _check_repeatable(**given: Data) -> None:
    """Refuse data that can be read only once.

    Raises:
        DataError: names it.
    """
    for name, data in given.items():
        if isinstance(data, Iterator):
            raise DataError(
                f"{name} is an iterator, which can be read only once: give a Dataset, a DataLoader or a list."
            )


def prune_exits(branched: EarlyExitModel, records: ExitRecords, max_accuracy_drop: float = 0.01) -> EarlyExitModel:
    """Leave out trained branches that cost more than they save at the accepted accuracy drop.

    Args:
        records: of data used neither for training nor to choose thresholds.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
    Returns:
        The model itself if every branch pays off, else a new one on the same original.
    Raises:
        ExitPointError: none of them saves anything.
        DataError: the branches are chained.
    """
    instance("branched", branched, EarlyExitModel)
    if instance("records", records, ExitRecords).exits != tuple(branched.exits):
        raise DataError(f"The records are of exits {list(records.exits)}, the model has {branched.exits}.")
    subset = cheapest_exits(records, max_accuracy_drop, most=len(records.exits))
    if not subset.exits:
        raise ExitPointError(
            f"No branch at {branched.exits} saves anything at an accuracy drop of {100 * max_accuracy_drop:g} points: "
            "train longer, accept a larger drop, or use a smaller model."
        )
    kept = [branched.exits[k] for k in subset.exits]
    return branched if kept == branched.exits else branched.with_exits(kept)


class _Fitting(NamedTuple):
    """A branch to try."""

    point: ExitPoint
    branch: BranchSpec
    macs: int


@dataclass(frozen=True)
class _Probe:
    point: ExitPoint
    branch: BranchSpec
    records: ExitRecords
    """Of this exit alone."""

    def candidate(self, chosen: bool) -> Candidate:
        cost = (self.records.trunk_macs[0] + self.records.branch_macs[0]) / self.records.base_macs
        return Candidate(self.point.name, self.branch, self.records.accuracies[0], cost, chosen)


def _try(
    graph: ModelGraph,
    fitting: Sequence[_Fitting],
    train: Data,
    held_out: Data,
    short: TrainConfig,
    cost: Cost,
    seed: int,
    accelerator: Accelerator,
    class_map: ClassMap | None,
) -> list[_Probe]:
    """Train these branches together for a short time, and record them."""
    plan = ExitPlan(graph.backbone.model_id, "search", tuple(each.point for each in fitting))
    branched = attach(graph, plan, [each.branch for each in fitting], seed=seed)
    train_branches(branched, train, short, accelerator=accelerator, class_map=class_map)
    size = short.batch_size
    records = record(branched, held_out, batch_size=size, accelerator=accelerator, class_map=class_map)
    measured = timed(branched, cost, held_out, size)
    records = records if measured is None else measured.in_time(records)
    return [_Probe(each.point, each.branch, records.keep([k])) for k, each in enumerate(fitting)]


def shortlist(
    records: ExitRecords, drop: float, most: int, load: float | None = None, widen: Sequence[int] = _WIDER
) -> tuple[list[int], float]:
    """The candidates worth training, and the cost of the best subset at the accepted drop.

    Probes are worse than fully trained branches, early ones most of all: the choices for larger drops are trained too,
    as far as the load allows.
    """
    first = cheapest_exits(records, drop, most=most)
    choices = [first.exits, *(cheapest_exits(records, min(1.0, wider * drop), most=most).exits for wider in widen)]
    limit = math.inf if load is None else load * records.base_macs

    def needed(exits: Sequence[int]) -> float:
        # forwards and backwards through the branches, and once forwards up to the last of them
        return sum(records.branch_macs[k] for k in exits) + max(records.trunk_macs[k] for k in exits) / 3

    chosen: list[int] = []
    for k in itertools.chain(*choices):
        taken = {records.trunk_macs[other] for other in chosen}
        if records.trunk_macs[k] not in taken and (len(chosen) < _FEW or needed([*chosen, k]) <= limit):
            chosen.append(k)
    return sorted(chosen), first.cost


def short_training(config: TrainConfig, train: Data) -> int:
    """A quarter of the training's steps, but 100 to 300 if it has as many."""
    given = loader(train, config.batch_size)
    steps = config.epochs * len(given) // config.accumulate if isinstance(given, Sized) else None
    whole = min((length for length in (steps, config.max_steps) if length is not None), default=_STEPS[1] * _SHARE)
    return max(1, min(whole, max(_STEPS[0], min(_STEPS[1], whole // _SHARE))))


def _spread(graph: ModelGraph, count: int) -> list[ExitPoint]:
    """This many blocks, denser near the input, where most samples leave; all blocks if there are no more."""
    rest = list(place(graph, "all").points)
    targets = [((i + 1) / (count + 1)) ** 2 for i in range(count)] if count < len(rest) else []
    found = [rest.pop(min(range(len(rest)), key=lambda k: abs(rest[k].macs_fraction - t))) for t in targets]
    return sorted(found, key=lambda point: point.index) if targets else rest


def _fitting(
    graph: ModelGraph, points: Sequence[ExitPoint], spec: BranchSpec, known: Sequence[_Probe], left_out: list[str]
) -> list[_Fitting]:
    """Points where a branch can be built, saves something and is not a candidate yet, with resolved options."""
    found = []
    for point in points:
        try:
            fitted, branch = resolve(spec, point, graph.backbone.num_classes, graph.macs, graph=graph)
        except BranchError as error:
            left_out.append(f"{spec.name} at {point.name}: {error}")
            continue
        macs = branch.prepare(graph, point).macs
        cost = (point.macs + macs) / graph.macs
        if branch.chained:
            raise ConfigError(f"Branch {spec.name!r} is chained: it cannot be tried without the branches before it.")
        if cost >= 1:
            left_out.append(f"{spec.name} at {point.name}: leaving there costs {cost:.1%} of the MACs")
        elif all((point.name, fitted) != (probe.point.name, probe.branch) for probe in known):
            found.append(_Fitting(point, fitted, macs))
    return found


def _groups(graph: ModelGraph, fitting: Sequence[_Fitting]) -> list[list[_Fitting]]:
    """Branches to train together: as many as cost no more than the original, which bounds the memory needed."""
    groups: list[list[_Fitting]] = []
    left = 0
    for each in fitting:
        if not groups or each.macs > left:
            groups.append([])
            left = graph.macs
        groups[-1].append(each)
        left -= each.macs
    return groups


def timed(branched: EarlyExitModel, cost: Cost, data: Data, batch_size: int) -> Profile | None:
    """The profile of a branched model by which its exits are chosen; None if MACs count."""
    if cost == "macs":
        return None
    if cost == "time":
        inputs, _ = next(iter(batches(data, batch_size)))
        n = rows(inputs)
        return profile(branched, inputs, batch_size=n, sizes=[n], seconds=_SECONDS)
    return instance("the result of cost=", cost(branched), Profile)


def _side_by_side(records: Sequence[ExitRecords]) -> ExitRecords:
    """Merge records as if one model had all of these exits."""
    first = records[0]
    # times were measured separately for every group
    trunk = {each.exits[0]: each.trunk_macs[0] for each in reversed(records)}
    rising = accumulate([*(trunk[each.exits[0]] for each in records), first.base_macs], max)
    units = [each.confidence[0] for each in records if each.confidence is not None]
    shared = {
        "exits": tuple(name for each in records for name in each.exits),
        "trunk_macs": tuple(rising),
        "branch_macs": tuple(each.branch_macs[0] for each in records),
        "confidence": torch.stack(units) if len(units) == len(records) else None,
    }
    if first.logits is not None:
        logits = torch.stack([*(each.recorded_logits()[0] for each in records), first.recorded_logits()[-1]])
        return replace(first, logits=logits, **shared)
    recorded = {
        name: torch.stack([*(each.recorded[name][0] for each in records), *rows[1:]])
        for name, rows in first.recorded.items()
    }
    outcomes = torch.stack([*(each.outcomes[0] for each in records), first.outcomes[-1]])
    return replace(first, outcomes=outcomes, recorded=recorded, tallies=None, **shared)
