"""Before any training: what leaving where would save in time on this machine, and whether exits are worth a try."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from rich.table import Table
from torch import Tensor, nn

from ee_surgery.attachment import attach
from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Sample
from ee_surgery.backbone.inputs import Batch
from ee_surgery.branches import BranchSpec
from ee_surgery.branches.base import summary
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.profile import Profile, processor
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop, count, instance, positive
from ee_surgery.data.batches import Data, loader, place, unpack
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.data.recording import home
from ee_surgery.errors import ConfigError
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import ExitPlan
from ee_surgery.placement import place as place_exits
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.runtime.engine import eval_mode
from ee_surgery.tables import as_text, table
from ee_surgery.task import Task

Answer: TypeAlias = Literal["go", "perhaps", "no-go"]
_FOLDS = 4
_RIDGE = 0.1  # of the mean variance of a feature
_WORTH = 0.1  # of the cost: what exits must save at least
_ROUNDS = (3, 50)


@dataclass(frozen=True)
class Estimate:
    """Times of stages and of untrained branches, and what a linear probe tells where pictures were given."""

    model_id: str
    exits: tuple[str, ...]
    """Where samples could leave; branches there have been timed."""
    macs: tuple[float, ...]
    """Of leaving there, its branch included, as fractions of the original's."""
    profiles: tuple[Profile, ...]
    """One per batch size."""
    original_ms: tuple[float, ...]
    """Of the original's own forward, one per batch size."""
    accuracies: tuple[float, ...] = ()
    """Of a linear probe at each exit, the original last; agreement with it where there are no labels."""
    labelled: bool = False
    probed: int = 0
    """Pictures that the probe read."""
    drop: float = 0.01
    probe_cost: float | None = None
    """Time that the probes would need at that drop, as a fraction of the original's; branches that learn save more."""
    best_cost: float | None = None
    """Time of leaving at the first exit whose probe is right."""

    def time(self, shares: Sequence[float], batch_size: int | None = None) -> float:
        """Mean time as a fraction of the original's, if these shares of the samples leave.

        Args:
            shares: for each exit; the rest goes to the end. Branches where nothing leaves are left out.
            batch_size: one of those timed; the first by default.
        Raises:
            ConfigError: not one share per exit, or another batch size.
        """
        known = [each.batch_size for each in self.profiles]
        given = [positive("a share", share) if share else 0.0 for share in shares]
        if len(given) != len(self.exits) or sum(given) > 1 + 1e-9 or (batch_size or known[0]) not in known:
            raise ConfigError(
                f"time() takes one share for each of {list(self.exits)}, at most 1 together, and a batch size of "
                f"{known}; got {list(shares)} and {batch_size}."
            )
        which = known.index(batch_size or known[0])
        rest = [*given, max(0.0, 1 - sum(given))]
        return self.profiles[which].latency_ms(rest, [share > 0 for share in given]) / self.original_ms[which]

    def break_even(self, exit: int, batch_size: int | None = None) -> float:
        """The share of the samples that has to leave at an exit for its branch to cost no time; above 1: never."""
        low, high = 0.0, 1.0
        if self._one(exit, high, batch_size) > 1:
            return float("inf")
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self._one(exit, middle, batch_size) > 1 else (low, middle)
        return high

    def _one(self, exit: int, share: float, batch_size: int | None) -> float:
        shares = [max(share, 1e-9) if k == exit else 0.0 for k in range(len(self.exits))]
        return self.time(shares, batch_size)

    @property
    def answer(self) -> Answer:
        """Whether exits are worth training."""
        sizes = [each.batch_size for each in self.profiles]
        least = min(self._one(k, 1.0, size) for k in range(len(self.exits)) for size in sizes)
        if least > 1 - _WORTH or (self.best_cost is not None and self.best_cost > 1 - _WORTH / 2):
            return "no-go"
        return "go" if self.probe_cost is not None and self.probe_cost <= 1 - _WORTH else "perhaps"

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        if self.probe_cost is None or self.best_cost is None:
            if self.answer == "no-go":
                return "even if all samples leave at once, less than a tenth of the time is saved"
            return "how many samples leave depends on the pictures: give some, labels are not needed"
        found = (
            f"linear probes alone would need {self.probe_cost:.0%} of the time at a drop of {100 * self.drop:g} points "
            f"({self.probed} pictures), leaving at the first right one {self.best_cost:.0%}"
        )
        return found + ("" if self.answer == "go" else "; branches that learn do better")

    def table(self) -> Table:
        """A row per exit, for rich."""
        columns: dict[str, Literal["left", "right"]] = {"leaving at": "left", "MACs %": "right"}
        for each in self.profiles:
            size = each.batch_size
            columns |= {f"ms, batch {size}": "right", f"half leave: time %, batch {size}": "right"}
            columns |= {f"pays from share %, batch {size}": "right"}
        probes = [f"{100 * accuracy:.1f}" for accuracy in self.accuracies]
        if probes:
            columns["probe %"] = "right"
        rows = []
        for k, name in enumerate(self.exits):
            row = [name, f"{100 * self.macs[k]:.1f}"]
            for each in self.profiles:
                half, pays = self._one(k, 0.5, each.batch_size), self.break_even(k, each.batch_size)
                ms = each.trunk_ms[-1][k] + each.branch_ms[-1][k]
                row += [f"{ms:.1f}", f"{100 * half:.0f}", f"{100 * pays:.0f}" if pays <= 1 else "-"]
            rows.append([*row, *probes[k : k + 1]])
        own = [cell for ms in self.original_ms for cell in (f"{ms:.1f}", "", "")]
        rows.append(["original", "100.0", *own, *probes[-1:]])
        title = f"{self.model_id} on {self.profiles[0].device}, {self.profiles[0].threads} thread(s)"
        return table(title, "", columns, rows)

    def __str__(self) -> str:
        return f"{as_text(self.table())}\n{self.answer}: {self.reason}"


def estimate(
    model: nn.Module | ModelGraph,
    data: Data | None = None,
    *,
    exits: int | str | Sequence[str] | ExitPlan = 4,
    branch: str | BranchSpec | Sequence[str | BranchSpec] = "auto",
    batch_sizes: Sequence[int] = (1, 32),
    samples: int = 512,
    max_accuracy_drop: float = 0.01,
    seconds: float = 20.0,
    sample: Sample | None = None,
    opaque: Sequence[str] = (),
    output: OutputKey | None = None,
    task: str | Task | type[Task] | None = None,
    class_map: ClassMap | None = None,
) -> Estimate:
    """Time a model's stages and untrained branches here and now, and say whether exits are worth training.

    With pictures, a linear probe is fitted in closed form to the original's answers, at each exit, by cross-validation:
    a floor of what branches reach that learn.

    Args:
        model: as for `augment`, or its graph.
        data: a few hundred samples like those it will see, with or without labels; classifiers alone are probed.
        exits: as for `augment`.
        branch: as for `augment`; timed, not trained.
        batch_sizes: to time.
        samples: of the data to read at most.
        max_accuracy_drop: at which the probes' cost is told, in [0, 1]; 0.01 is one percentage point.
        seconds: about how long to time each batch size.
        sample: see `inspect`.
        opaque: see `inspect`.
        output: see `inspect`.
        task: see `inspect`.
        class_map: as for `record`.
    Raises:
        CaptureError, ExitPointError, BranchError: as for `augment`.
        ConfigError: an invalid number.
        DataError: the data is empty, or its labels are not the model's classes.
    """
    drop, samples = accuracy_drop("max_accuracy_drop", max_accuracy_drop), count("samples", samples, low=_FOLDS)
    seconds, sizes = positive("seconds", seconds), [count("batch_sizes", size) for size in batch_sizes]
    graph = (
        model
        if isinstance(model, ModelGraph)
        else inspect(instance("model", model, nn.Module), sample, opaque=opaque, output=output, task=task)
    )
    plan = exits if isinstance(exits, ExitPlan) else place_exits(graph, exits, clip=True)
    branched = attach(graph, plan, branch)
    timed = [_profile(branched, size, seconds) for size in sizes]
    macs = [t + b for t, b in zip(branched.trunk_macs, branched.branch_macs, strict=False)]
    found = Estimate(
        model_id=graph.backbone.model_id,
        exits=tuple(branched.exits),
        macs=tuple(each / branched.trunk_macs[-1] for each in macs),
        profiles=tuple(profile for profile, _ in timed),
        original_ms=tuple(ms for _, ms in timed),
        drop=drop,
    )
    if data is None or not (branched.task.chooses and branched.task.keeps_logits) or graph.head is not None:
        return found
    records = _probed(branched, data, samples, class_map)
    in_time = found.profiles[0].in_time(records)
    point = Frontier.search(in_time).at(max_accuracy_drop=drop)
    return replace(
        found,
        accuracies=tuple(records.accuracies),
        labelled=records.labelled,
        probed=len(records),
        probe_cost=min(1.0, point.macs_fraction),
        best_cost=in_time.best_case()[1],
    )


# --- times


def _profile(branched: EarlyExitModel, size: int, seconds: float) -> tuple[Profile, float]:
    """Times of stages and branches at some numbers of samples in flight, and of the original's own forward."""
    ladder = sorted({1, max(1, size // 4), size})
    timed = [_once(branched, n, seconds / len(ladder)) for n in ladder]
    trunk, branches, original = zip(*timed, strict=True)
    device = next(branched.branches.parameters()).device
    threads = torch.get_num_threads()
    engine = branched.engine.backend
    return Profile(engine, processor(device), threads, size, tuple(ladder), trunk, branches), original[-1]


def _once(branched: EarlyExitModel, n: int, seconds: float) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Milliseconds up to each exit, of each branch with its decision, and of the original, for n samples."""
    backbone, policy = branched.engine.backbone, _never(branched)
    batch = backbone.own_batch()
    batch = batch.select([i % batch.size for i in range(n)])
    router = branched.engine.entry(batch).router(policy)
    rounds: list[tuple[list[float], list[float], float]] = []
    ends = time.perf_counter() + seconds
    with torch.no_grad(), eval_mode(list(branched.branches.modules())):
        while len(rounds) < _ROUNDS[0] + 1 or (len(rounds) < _ROUNDS[1] and time.perf_counter() < ends):
            rounds.append(_pass(branched, router.stages, batch, policy))
    rounds = rounds[1:]  # the first warms up
    stages = [1e3 * statistics.median(each) for each in zip(*(r[0] for r in rounds), strict=True)]
    branches = [1e3 * statistics.median(each) for each in zip(*(r[1] for r in rounds), strict=True)]
    return tuple(accumulate(stages)), tuple(branches), 1e3 * statistics.median(r[2] for r in rounds)


def _never(branched: EarlyExitModel) -> ThresholdPolicy:
    """Asks every branch, and no sample leaves."""
    return ThresholdPolicy((1e30,) * len(branched.exits), branched.task.default_score, task=branched.task)


def _pass(
    branched: EarlyExitModel, stages: Sequence[object], batch: Batch, policy: ThresholdPolicy
) -> tuple[list[float], list[float], float]:
    """Seconds of each stage, of each branch, and of the original, in one go."""
    program = branched.engine.entry(batch).program
    own, asked, live = [], [], tuple(batch.tensors)
    device = live[0].device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    for k, stage in enumerate(stages):
        live = stage(*live)  # pyright: ignore[reportCallIssue]
        ended = now()
        own.append(ended - started)
        if k < len(branched.branches):
            answer = branched.branches[k](*program.readers[k](live))
            policy.decide(k, answer.logits, answer.confidence, ())[1].any().item()
            started = now()
            asked.append(started - ended)
    started = now()
    branched.engine.backbone(batch.arguments)
    return own, asked, now() - started


# --- the linear probe


def _probed(branched: EarlyExitModel, data: Data, samples: int, class_map: ClassMap | None) -> ExitRecords:
    """What linear probes at the exits answer to samples that they were not fitted on."""
    engine, task = branched.engine, branched.task
    known, where = Labels(engine, class_map), home(branched.engine)
    kept: list[list[Tensor]] = [[] for _ in branched.exits]
    answers: list[Tensor] = []
    truth: list[Tensor] = []
    for batch in loader(data, 64):
        inputs, labels = unpack(batch)
        features, original = engine.features(place(inputs, *where))
        for rows, read, point in zip(kept, features, branched.plan.points, strict=True):
            own, *masks = read
            mask = masks[0] if masks else None
            rows.append(summary(own.float(), point.layout, point.prefix_tokens, mask).cpu())
        answers.append(original.float().cpu())
        if labels is not None:
            truth.append(task.hard(known(labels, len(original))).cpu())
        if sum(map(len, answers)) >= samples:
            break
    logits = torch.cat(answers)[:samples]
    probes = [_cross_fitted(torch.cat(rows)[:samples], logits) for rows in kept]
    return ExitRecords(
        exits=tuple(branched.exits),
        logits=torch.stack([*probes, logits]),
        trunk_macs=branched.trunk_macs,
        branch_macs=branched.branch_macs,
        labels=torch.cat(truth)[:samples] if truth else None,
        task=task,
    )


def _cross_fitted(features: Tensor, wanted: Tensor) -> Tensor:
    """Ridge regression of wanted (N, C) on features (N, D); each fold is answered by what the others fitted."""
    n = len(features)
    folds = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tensor_split(min(_FOLDS, n))
    found = torch.empty_like(wanted)
    for held in folds:
        rest = torch.ones(n, dtype=torch.bool)
        rest[held] = False
        x, y = features[rest].double(), wanted[rest].double()
        mean, scale, level = x.mean(0), x.std(0).clamp_min(1e-6), y.mean(0)
        x = (x - mean) / scale
        ridge = _RIDGE * len(x) * torch.eye(len(x), dtype=torch.float64)
        dual = torch.linalg.solve(x @ x.T + ridge, y - level)
        found[held] = (((features[held].double() - mean) / scale) @ (x.T @ dual) + level).float()
    return found
