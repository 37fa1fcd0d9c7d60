"""Exits by search: short trainings of branches at all candidate points say which are worth having."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, product
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from ee_surgery.attach import attach
from ee_surgery.backbone import Sample
from ee_surgery.branches import BranchSpec, resolve
from ee_surgery.errors import BranchError, ConfigError, DataError, ExitPointError
from ee_surgery.graph.points import ExitPoint, ModelGraph, inspect
from ee_surgery.inputs import Inputs, tensors
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import ExitPlan, place
from ee_surgery.policies.records import ExitRecords
from ee_surgery.policies.subset import cheapest_exits
from ee_surgery.runtime.measure import interleave, parts
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.data import Data, batches, loader
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.loop import train as train_branches
from ee_surgery.training.processes import Processes
from ee_surgery.training.record import record

POINTS = 12
"""How many exit points are tried where nobody says."""
TRIED = ("auto", *(BranchSpec("shortcut", options={"budget": budget}) for budget in (0.15, 0.25)))
"""The branches that are tried at each of them where nobody says."""
_STEPS = (100, 300)  # fewest and most that a probe learns for at first, where nobody says
_SHARE = 4  # of the training's steps, a probe takes one in so many
_LONGER = 3  # times as long at most, for those at the points that were chosen
_WIDER = (4, 16)  # times the accepted drop
_ROUNDS = 10


@dataclass(frozen=True)
class Candidate:
    """A branch that was tried at an exit point."""

    exit: str
    branch: BranchSpec
    accuracy: float
    """Of the probe alone, on the held-out data; agreement with the original where that has no labels."""
    cost: float
    """Of a sample that leaves there, the branch counted, by the original's."""
    steps: int
    """How long the probe learned."""
    chosen: bool

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.branch.options.items() if value != "")
        what = f"{self.branch.name} {options} after {self.steps} steps".replace("  ", " ")
        return f"{'*' if self.chosen else ' '} {self.exit:24} {self.accuracy:7.2%} at {self.cost:6.1%}  {what}"


@dataclass(frozen=True)
class ExitSearch:
    """What the search found: a plan and its branches for `attach`, and what they were chosen from."""

    plan: ExitPlan
    """The exits worth training."""
    branches: tuple[BranchSpec, ...]
    """One for each point of the plan."""
    cost: float
    """Expected mean MACs, or time, at the accepted drop by the original's, with branches that learned as little as the
    probes."""
    max_accuracy_drop: float
    candidates: tuple[Candidate, ...]
    """In program order."""
    left_out: tuple[str, ...]
    """Branches that cannot be built at a point, with the reason."""
    records: ExitRecords = field(repr=False)
    """Answers of all probes to the held-out data."""

    def to_dict(self) -> dict[str, Any]:
        """What was tried, as plain data."""
        tried = [
            {**asdict(candidate), "branch": candidate.branch.name, "options": dict(candidate.branch.options)}
            for candidate in self.candidates
        ]
        return {"cost": self.cost, "max_accuracy_drop": self.max_accuracy_drop, "candidates": tried}

    def __str__(self) -> str:
        found = f"{len(self.plan.points)} exits of {len(self.candidates)} candidates are worth training"
        cost = f"{self.cost:.1%} of the cost at an accuracy drop of {100 * self.max_accuracy_drop:g} points"
        lines = [f"{found}; with the probes' own answers {cost}", *map(str, self.candidates)]
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
    cost: Literal["macs", "time"] = "macs",
    config: TrainConfig | None = None,
    probe_steps: int | None = None,
    sample: Sample | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> ExitSearch:
    """Find the exits that are worth training, by what short trainings say: their number, positions and sizes.

    Every branch is tried at every point: those of one kind learn side by side from the same features, for a few
    steps, as many at once as together cost no more than the original.
    Of the answers to held-out data those exits are chosen which cost least at the accepted drop, every branch on the
    way counted (`cheapest_exits`); and those that would be if 4 or 16 times as much were accepted, since probes are
    worse than what they will become. If the training is long, all branches at these points learn anew, up to three
    times as long, before the choice is made: what learns slowly is not judged by its start (successive halving;
    Jamieson and Talwalkar, AISTATS 2016). Train them all, then let `prune_exits` leave out what does not pay.

    Args:
        model: the model, or the graph that `inspect` gave.
        train: what the branches will be trained on.
        held_out: data that neither trained anything nor will be used to choose thresholds; a few thousand samples.
        branch: a branch, or several to choose among at each point: kinds, or sizes of one. By default small ones that
            fit the features (`auto`) and shortcuts of two sizes, where there are any.
        points: how many of the blocks to try, closer together the earlier they are, or names of exit points.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
        most: how many exits at most at one drop.
        cost: what is to be low: MACs, or the time that stages and branches take here, by themselves, for batches such
            as the first of `held_out`.
        config: of the training that will follow; probes learn by it, too, for `probe_steps` steps.
        probe_steps: how long; by default a quarter of that training, but 100 to 300 steps where it has as many, and
            up to 900 in the second round. Where it is given there is one round.
        sample: see `inspect`.
        seed: of the branches' first weights.
        accelerator: as for `train`; of several processes, all find the same.
    Raises:
        ExitPointError: no candidate saves anything at that drop.
        BranchError: no branch can be built anywhere.
        ConfigError: branches that read each other's answers.
        DataError: `train` or `held_out` is an iterator, which can be read once only.
    """
    if cost not in ("macs", "time"):
        raise ConfigError(f"cost must be 'macs' or 'time', got {cost!r}.")
    for name, data in (("train", train), ("held_out", held_out)):
        if isinstance(data, Iterator):
            raise DataError(f"{name} is an iterator, used up after one pass: give a Dataset, a DataLoader or a list.")
    graph = model if isinstance(model, ModelGraph) else inspect(model, sample)
    specs = [BranchSpec.of(b) for b in ([branch] if isinstance(branch, (str, BranchSpec)) else branch)]
    tried = _spread(graph, points) if isinstance(points, int) else list(place(graph, points).points)
    config = config or TrainConfig()
    first, *longer = (probe_steps,) if probe_steps else probe_lengths(config, train)
    precision = config.mixed_precision if accelerator is None else accelerator.mixed_precision
    accelerator = make_accelerator(replace(config, mixed_precision=precision))  # whose trackers hear of no probe
    fitting, left_out = _fitting(graph, tried, specs)
    if not fitting:
        raise BranchError(f"None of {[spec.name for spec in specs]} can be built at any of these points: {left_out}.")
    trials = _Trials(graph, train, held_out, config, cost, seed, accelerator)
    found = trials.learn(fitting, first)
    search = _choose(graph, found, left_out, max_accuracy_drop, most, accelerator)
    for steps in longer:
        again = {point.index for point in search.plan.points}
        found = [probe for probe in found if probe.point.index not in again]
        found += trials.learn([each for each in fitting if each.point.index in again], steps)
        search = _choose(graph, found, left_out, max_accuracy_drop, most, accelerator)
    return search


def prune_exits(branched: EarlyExitModel, records: ExitRecords, max_accuracy_drop: float = 0.01) -> EarlyExitModel:
    """Leave out trained branches that cost more than they save at the accepted accuracy drop.

    Args:
        records: its answers to data that neither trained anything nor will be used to choose thresholds.
        max_accuracy_drop: below the original's accuracy, in [0, 1]; 0.01 is one percentage point.
    Returns:
        The model itself where every branch earns its cost, else a new one on the same original.
    Raises:
        ExitPointError: none of them saves anything.
        DataError: the branches read each other's answers.
    """
    subset = cheapest_exits(records, max_accuracy_drop, most=len(records.exits))
    if not subset.exits:
        raise ExitPointError(
            f"No branch at {branched.exits} saves anything at an accuracy drop of {100 * max_accuracy_drop:g} points: "
            "train longer, accept a larger drop, or take a smaller model."
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
    steps: int

    def candidate(self, chosen: bool) -> Candidate:
        cost = (self.records.trunk_macs[0] + self.records.branch_macs[0]) / self.records.base_macs
        return Candidate(self.point.name, self.branch, self.records.accuracies[0], cost, self.steps, chosen)


@dataclass(frozen=True)
class _Trials:
    """Short trainings on the same data."""

    graph: ModelGraph
    train: Data
    held_out: Data
    config: TrainConfig
    cost: str
    seed: int
    accelerator: Accelerator

    def learn(self, fitting: Sequence[_Fitting], steps: int) -> list[_Probe]:
        """These branches after so many steps."""
        console = Console(quiet=not (self.config.progress and self.accelerator.is_main_process))
        # as many epochs as these steps can need
        limits = {"epochs": steps, "max_steps": steps}
        config = replace(self.config, **limits, checkpoint_dir=None, validation=0.0, progress=False)
        found = []
        for group in _groups(self.graph, fitting):
            names = " and ".join(sorted({each.branch.name for each in group}))
            console.print(f"trying {names} at {len(group)} points, {steps} steps", soft_wrap=True)
            records = self._together(group, config)
            found += [_Probe(each.point, each.branch, records.keep([k]), steps) for k, each in enumerate(group)]
        return found

    def _together(self, group: Sequence[_Fitting], config: TrainConfig) -> ExitRecords:
        plan = ExitPlan(self.graph.backbone.model_id, "search", tuple(each.point for each in group))
        branched = attach(self.graph, plan, [each.branch for each in group], seed=self.seed)
        train_branches(branched, self.train, config, accelerator=self.accelerator)
        records = record(branched, self.held_out, batch_size=config.batch_size, accelerator=self.accelerator)
        if self.cost == "time":
            inputs, _ = next(iter(batches(self.held_out, config.batch_size, self.accelerator.device)))
            records = _in_time(records, branched, inputs)
        return records


def _choose(
    graph: ModelGraph, found: list[_Probe], left_out: list[str], drop: float, most: int, accelerator: Accelerator
) -> ExitSearch:
    """Which of these branches are worth training."""
    found = sorted(found, key=lambda probe: (probe.point.index, probe.records.branch_macs))
    records = _side_by_side([probe.records for probe in found])
    # times differ between processes, records do not
    chosen, cost = Processes(accelerator).of_main(lambda: shortlist(records, drop, most))
    if not chosen:
        raise ExitPointError(
            f"No exit of {len(found)} candidates saves anything in {graph.backbone.model_id} at an accuracy drop of "
            f"{100 * drop:g} points: accept a larger one, let probes learn longer (probe_steps=), or take a smaller "
            f"model. {graph.best_case()}"
        )
    return ExitSearch(
        plan=ExitPlan(graph.backbone.model_id, "search", tuple(found[k].point for k in chosen)),
        branches=tuple(found[k].branch for k in chosen),
        cost=cost,
        max_accuracy_drop=drop,
        candidates=tuple(probe.candidate(k in chosen) for k, probe in enumerate(found)),
        left_out=tuple(left_out),
        records=records,
    )


def shortlist(records: ExitRecords, drop: float, most: int) -> tuple[list[int], float]:
    """The candidates worth training, and what the cheapest of them cost together at the accepted drop.

    Probes are worse than what they will become, the early ones most of all: those that would be chosen if more were
    accepted are trained, too.
    """
    first = cheapest_exits(records, drop, most=most)
    chosen = list(first.exits)
    for wider in _WIDER:
        taken = {records.trunk_macs[k] for k in chosen}
        more = cheapest_exits(records, min(1.0, wider * drop), most=most).exits
        chosen += [k for k in more if records.trunk_macs[k] not in taken]
    return sorted(chosen), first.cost


def probe_lengths(config: TrainConfig, train: Data) -> tuple[int, ...]:
    """A quarter of the training's steps, but at least 100 and at most 300 of them where it has as many.

    Where a quarter is at least twice as many, there is a second round of up to three times as many.
    """
    given = loader(train, config.batch_size)
    steps = config.epochs * len(given) // config.accumulate if isinstance(given, Sized) else None
    whole = min((length for length in (steps, config.max_steps) if length is not None), default=_STEPS[1] * _SHARE)
    first = max(1, min(whole, max(_STEPS[0], min(_STEPS[1], whole // _SHARE))))
    second = min(whole // _SHARE, _LONGER * first)
    return (first, second) if second >= 2 * first else (first,)


def _spread(graph: ModelGraph, count: int) -> list[ExitPoint]:
    """So many of the blocks, closer together the earlier, where most samples leave; all where there are no more."""
    rest = list(place(graph, "all").points)
    targets = [((i + 1) / (count + 1)) ** 2 for i in range(count)] if count < len(rest) else []
    found = [rest.pop(min(range(len(rest)), key=lambda k: abs(rest[k].macs_fraction - t))) for t in targets]
    return sorted(found, key=lambda point: point.index) if targets else rest


def _fitting(
    graph: ModelGraph, points: Sequence[ExitPoint], specs: Sequence[BranchSpec]
) -> tuple[list[_Fitting], list[str]]:
    """Branches that can be built and save something, every choice of their own made; of the others, the reasons."""
    found: list[_Fitting] = []
    left_out: list[str] = []
    for spec, point in product(specs, points):
        try:
            fitted, branch = resolve(spec, point, graph.backbone.num_classes, graph.macs, graph=graph)
        except BranchError as error:
            left_out.append(f"{spec.name} at {point.name}: {error}")
            continue
        macs = branch.prepare(graph, point).macs
        cost = (point.macs + macs) / graph.macs
        if branch.chained:
            raise ConfigError(f"Branch {spec.name!r} reads those before it: it cannot be tried without them.")
        if cost >= 1:
            left_out.append(f"{spec.name} at {point.name}: leaving there costs {cost:.1%} of the MACs")
        elif all((point.name, fitted) != (each.point.name, each.branch) for each in found):
            found.append(_Fitting(point, fitted, macs))
    return found, left_out


def _groups(graph: ModelGraph, fitting: Sequence[_Fitting]) -> list[list[_Fitting]]:
    """Who learns side by side: one at a point, as many as cost no more than the original, whose own training takes as
    much memory."""
    groups: list[list[_Fitting]] = []
    left = 0
    for each in fitting:
        if not groups or each.macs > left or each.point.index <= groups[-1][-1].point.index:
            groups.append([])
            left = graph.macs
        groups[-1].append(each)
        left -= each.macs
    return groups


def _in_time(records: ExitRecords, branched: EarlyExitModel, inputs: Inputs) -> ExitRecords:
    """The same records, nanoseconds a batch in place of MACs."""
    branched.operate(thresholds=2.0)  # above any probability: every branch is asked, and nobody leaves
    main = inputs if isinstance(inputs, Tensor) else next(iter(tensors(inputs).values()))
    times = interleave(parts(branched, inputs), main.device, rounds=_ROUNDS)
    branched.operate(None)
    nanoseconds = {name: round(1e9 * statistics.median(values)) for name, values in times.items()}
    k = len(branched.branches)
    return replace(
        records,
        trunk_macs=tuple(accumulate(nanoseconds[f"stage {i}"] for i in range(k + 1))),
        branch_macs=tuple(nanoseconds[f"branch {i}"] for i in range(k)),
    )


def _side_by_side(records: Sequence[ExitRecords]) -> ExitRecords:
    """As one model with all of these exits would have answered."""
    first = records[0]
    # where it is time, it was taken anew for every group
    trunk = {each.exits[0]: each.trunk_macs[0] for each in reversed(records)}
    rising = accumulate([*(trunk[each.exits[0]] for each in records), first.base_macs], max)
    return ExitRecords(
        exits=tuple(name for each in records for name in each.exits),
        logits=torch.stack([*(each.logits[0] for each in records), first.logits[-1]]),
        trunk_macs=tuple(rising),
        branch_macs=tuple(each.branch_macs[0] for each in records),
        labels=first.labels,
    )
