"""`augment` and `from_pretrained`: the whole pipeline, built from public functions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ee_surgery.attachment import attach, attach_stored
from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Sample
from ee_surgery.branches import BRANCHES, BranchSpec, known
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop as check_drop
from ee_surgery.checks import choice, count, flag, instance, optional, positive
from ee_surgery.data.batches import Data, loader, unpack
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import AdapterError, CaptureError, ConfigError, DataError, UnknownNameError
from ee_surgery.evaluation.calibrate import calibrate as calibrate_exits
from ee_surgery.evaluation.record import record
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.inspection import inspect, read
from ee_surgery.model import EarlyExitModel
from ee_surgery.names import EffortName
from ee_surgery.placement import PLACEMENTS, ExitPlan, check_exits, place
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.presets import PRESETS, Preset
from ee_surgery.search.effort import DECIDED, Setting, affordable, fit, make_setting, note
from ee_surgery.search.exit_search import TRIED, Cost, prune_exits, search_exits
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.share.save_load import load
from ee_surgery.task import Task
from ee_surgery.text import visible
from ee_surgery.training.checkpoint import random_state, set_random_state
from ee_surgery.training.config import TrainConfig, changed_settings
from ee_surgery.training.loop import train as train_branches

if TYPE_CHECKING:
    from accelerate import Accelerator


def augment(
    model: nn.Module,
    exits: int | str | Sequence[str] | ExitPlan | None = None,
    placement: str | None = None,
    branch: str | BranchSpec | Sequence[str | BranchSpec] | None = None,
    *,
    preset: str | None = None,
    joint: bool = False,
    sample: Sample | None = None,
    opaque: Sequence[str] = (),
    num_classes: int | None = None,
    output: OutputKey | None = None,
    task: str | Task | type[Task] | None = None,
    train: Data | None = None,
    calibrate: Data | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    max_accuracy_drop: float = 0.01,
    cost: Cost = "macs",
    effort: EffortName | None = None,
    time_budget: float | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> EarlyExitModel:
    """Add early exits to a pretrained model: inspect -> place -> attach, then train and calibrate if data is given.

    The model itself is not changed and stays usable; without an operating point the result gives exactly its output.

    With `train=` and `calibrate=` alone, everything else follows from model and data: short training runs show which
    branches pay off at which exits, the best are trained while the cost at the accepted drop falls on held-out data,
    and those that cost more than they save are left out. One half of the calibration data serves for that; thresholds
    and certificates come from the other. `provenance["placement"]` and `["effort"]` keep what was found.

    Args:
        model: timm model, transformers classifier of images or texts, or any module from tensors to logits.
        exits: number (default 3), `all`, names of exit points (`inspect` lists them), or a plan; `auto`: number and
            positions by search, the default with data alone.
        placement: rule if `exits` is a number: `linear` (the default), `fine`, `pareto`, `gold_ratio`.
        branch: `auto` (the default), a registered name, a `BranchSpec`, or one per exit; with `exits="auto"`, one or
            several to choose from at each point, by default small ones and shortcuts; see `search_exits`.
        preset: a published method, by its name in `PRESETS`: its exits, branches, training and calibrator replace the
            defaults; other arguments override them. Training is as long as published: shorten it with `config`.
        joint: also train the original, on a copy; needs `train=`; see `train`.
        sample: an example batch (B, ...), or a dict or tuple of several input tensors; by default pictures of the size
            of the training data's, else of the model's own. Needed if neither is there.
        opaque: names of modules to keep whole; see `inspect`.
        num_classes: for a model without a classification head: number of classes of a new head on its features,
            trained with the branches.
        output: which part of the output the logits are, by index or name, if more than one could be; see `inspect`.
        task: `classification` (one right class), `multi_label`, or one of your own in `TASKS`; by default, that of the
            transformers configuration; see `inspect`.
        train: data to train the branches on; see `train`.
        calibrate: held-out data to search thresholds on; see `calibrate`. Different from `train`.
        config: of the training. Without an effort, training takes as many epochs as it says. A dict changes single
            settings of those that effort, preset or defaults choose: `{"lr": 1e-3}`.
        max_accuracy_drop: at which a search minimizes the cost; `operate` may later ask for any other.
        cost: what a search minimizes, MACs or time; see `search_exits`. With time, the frontier has latencies.
        effort: how much a search tries, and how long training may take, with exits that are given too: `quick`,
            `standard` (the default with data alone) or `best`; see `EFFORTS`.
        time_budget: minutes for search and training, instead of an effort or as a limit to one.
        seed: of the branches' initial weights.
        accelerator: your own, as for `train`; each process runs its shard.
        class_map: the model's class for each label of `train` and `calibrate`, if they differ; see `train`.
    Raises:
        ConfigError: arguments that exclude each other, or a search without data.
        CaptureError, BranchError, ExitPointError, DataError, TrainingError: as of the single steps.
    """
    joint, seed = flag("joint", joint), count("seed", seed, low=0)
    max_accuracy_drop = check_drop("max_accuracy_drop", max_accuracy_drop)
    effort = optional(partial(choice, known=get_args(EffortName)))("effort", effort)
    time_budget = optional(positive)("time_budget", time_budget)
    changes = changed_settings(config) if isinstance(config, Mapping) else {}
    config = None if config is None or isinstance(config, Mapping) else instance("config", config, TrainConfig)
    by_effort = effort is not None or time_budget is not None
    if joint and train is None:
        raise ConfigError("joint=True also trains the original, but there is no training data: give train=.")
    method = None if preset is None else PRESETS[preset]
    if method is not None and by_effort:
        raise ConfigError(f"The preset {preset!r} has its own training: leave out effort= and time_budget=.")
    searched = isinstance(exits, str) and exits == "auto"
    if exits is not None and not searched and not isinstance(exits, ExitPlan):
        exits = check_exits(exits)  # before capturing the model, which may take a minute
    if placement is not None:
        PLACEMENTS[placement]  # raises for an unknown name
    if branch is not None:
        known(branch)
    if searched and placement is not None:
        raise ConfigError('exits="auto" searches for places: leave out placement=.')
    if (searched or by_effort) and (train is None or calibrate is None):
        raise ConfigError(
            'exits="auto", effort= and time_budget= train and compare branches: give train= and calibrate=.'
        )
    options = {"opaque": opaque, "num_classes": num_classes, "output": output, "task": task}
    graph = _inspected(model, sample, train, options)
    calibrator = "search" if method is None else method.method
    decided = [name for name in DECIDED if name in changes]
    if by_effort and decided:
        raise ConfigError(f"How long to train follows from the effort: leave out {decided} in config=.")
    simple = all(given is None for given in (exits, placement, branch, preset, config)) and not decided
    if train is not None and calibrate is not None and (searched or by_effort or simple):
        options = {"drop": max_accuracy_drop, "cost": cost, "seed": seed, "class_map": class_map, "changes": changes}
        setting, thresholds = make_setting(graph, train, calibrate, config, accelerator, **options)
        if by_effort or (config is None and method is None and not decided):
            name = effort or ("standard" if time_budget is None else affordable(graph, time_budget))
            plan = None if searched or (exits is None and placement is None) else _plan(graph, exits, placement, method)
            branched = fit(setting, name, plan=plan, branches=branch, config=config, joint=joint, minutes=time_budget)
        else:
            config = config or replace(TrainConfig() if method is None else method.config, **changes)
            branched = _by_search(setting, branch or (TRIED if method is None else method.branch), config, joint)
        return _calibrated(setting, branched, thresholds, calibrator)
    config = config or replace(TrainConfig() if method is None else method.config, **changes)
    plan = _plan(graph, exits, placement, method)
    if branch is None:
        branch = "auto" if method is None else method.branches(plan.points)
    branched = attach(graph, plan, branch, seed=seed)
    if train is not None:
        report = train_branches(branched, train, config, joint=joint, accelerator=accelerator, class_map=class_map)
        branched = report.model
    if calibrate is not None:
        calibrate_exits(branched, calibrate, method=calibrator, accelerator=accelerator, class_map=class_map)
    return branched


def _inspected(model: nn.Module, sample: Sample | None, train: Data | None, options: dict[str, Any]) -> ModelGraph:
    """The graph for inputs of the training data's size, where that is pictures the model takes, else of its own."""
    if sample is None and train is not None and (like := _pictures_like(train)) is not None:
        with suppress(CaptureError, DataError):
            return inspect(model, like, **options)
    return inspect(model, sample, **options)


def _pictures_like(data: Data) -> Tensor | None:
    """Random pictures of the size of the first ones of the data; None where it has none, or can be read only once."""
    if isinstance(data, Iterator):
        return None
    before = random_state()
    first = next(iter(loader(data, 1)), None)
    set_random_state(before)
    inputs = None if first is None else unpack(first)[0]
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        return None
    return torch.randn(4, *inputs.shape[1:], generator=torch.Generator().manual_seed(0))


def _plan(
    graph: ModelGraph, exits: int | str | Sequence[str] | ExitPlan | None, placement: str | None, method: Preset | None
) -> ExitPlan:
    """The exits that were asked for; else those of a preset, or three."""
    if isinstance(exits, ExitPlan):
        return exits
    if method is not None and exits is None and placement is None:
        return method.plan(graph)
    rule = placement or ("linear" if method is None else method.placement)
    return place(graph, 3 if exits is None else exits, rule)


def _by_search(
    setting: Setting, kinds: str | BranchSpec | Sequence[str | BranchSpec], config: TrainConfig, joint: bool
) -> EarlyExitModel:
    """Exits by a search, trained as `config` says."""
    found = search_exits(
        setting.graph,
        setting.train,
        setting.searching,
        branch=kinds,
        config=config,
        seed=setting.seed,
        max_accuracy_drop=setting.drop,
        cost=setting.cost,
        **setting.shared,
    )
    setting.say(str(found))
    branched = attach(setting.graph, found.plan, found.branches, seed=setting.seed)
    branched = train_branches(branched, setting.train, config, joint=joint, **setting.shared).model
    branched = prune_exits(branched, setting.record(branched), setting.drop)
    note(setting, branched, found.plan, found)
    return branched


def _calibrated(setting: Setting, branched: EarlyExitModel, data: Data, method: str) -> EarlyExitModel:
    """With thresholds from data that has chosen no exits."""
    profile, size = setting.profile(branched), setting.batch_size
    frontier = calibrate_exits(branched, data, method=method, batch_size=size, profile=profile, **setting.shared)
    records = record(branched, setting.searching, batch_size=size, **setting.shared)
    setting.say(_outcome(frontier.at(max_accuracy_drop=setting.drop), records, setting.drop))
    return branched


def _outcome(point: OperatingPoint, records: ExitRecords, drop: float) -> str:
    """Whether exits pay off on this model, in two lines."""
    accuracy, cost = records.best_case()
    best = f"best case, leaving at the first correct exit: {accuracy:.2%} at {cost:.1%} of the MACs"
    if 1 - point.macs_fraction <= drop:
        end = "giving no prediction for some samples would save as much. Use the original, or a smaller model"
        return f"{best}\nno-go: trained, exits save {1 - point.macs_fraction:.1%} at a drop of {drop:.1%}; {end}"
    return f"{best}\ntrained: {point}; ee.verdict compares it with a smaller model"


def from_pretrained(
    source: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    sample: Sample | None = None,
    output: OutputKey | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    other_base: bool = False,
    own_base: bool = False,
) -> EarlyExitModel:
    """Load an adapter onto its base. Adapters are untrusted: data is bounded and checked, and nothing is executed.

    Args:
        source: a folder written by `save_pretrained`, or a repository on the Hub such as `user/name`.
        model: the base; by default created by timm or transformers from the id in the adapter, with pretrained
            weights. If the folder has its own base weights, they are loaded into a copy of `model`.
        sample: an example input, as for `augment`; needed if random inputs of the right shapes are not valid.
        output: which part of the base's output the logits are, as for `augment`; by default as stored.
        revision: branch, tag or commit of the repository.
        token: for a private repository; by default the one stored by `hf auth login`, or `HF_TOKEN`.
        cache_dir: where downloads are kept.
        local_files_only: use only the cache, as with `HF_HUB_OFFLINE=1`.
        other_base: accept a base with other weights than the branches were trained on, or one that computes something
            different with them, with a warning; recorded in `provenance`. No measurement holds for it: calibrate again.
        own_base: expect an adapter with its own base weights (`train(joint=True)`), which differ from the published
            model. Without it, such an adapter loads with a warning.
    Raises:
        HubError: the repository cannot be downloaded.
        AdapterError: a file is missing, damaged or too large, or the base cannot be created from its id.
        FingerprintError: the base is not the one that the branches were trained on.
    """
    found = load(
        source,
        model,
        sample=sample,
        output=output,
        revision=revision,
        other_base=other_base,
        own_base=own_base,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = found.config
    _check_branches(config)
    graph = read(found.backbone)
    plan = ExitPlan(found.backbone.model_id, config.placement, _points(graph, config, same=found.same))
    branched = attach_stored(graph, plan, [exit.branch for exit in config.exits], found.weights)
    branched.state = found.state
    branched.operate(config.operating_point)
    return branched


def _check_branches(config: AdapterConfig) -> None:
    """Refuse branches that are not registered here, naming the package that has them.

    Raises:
        UnknownNameError: one is not known.
    """
    packages = config.provenance.get("packages")
    for name in dict.fromkeys(exit.branch.name for exit in config.exits):
        if name in BRANCHES:
            continue
        package = packages.get(name) if isinstance(packages, Mapping) else None
        says = "Adapters hold no code: import the module that registers it, then load again."
        if isinstance(package, str):
            says = f"It says that they come from the package {visible(package, 80)!r}: install that if you trust it."
        raise UnknownNameError(f"The adapter has branches {visible(name, 80)!r}, which are not registered here. {says}")


def _points(graph: ModelGraph, config: AdapterConfig, same: bool) -> tuple[ExitPoint, ...]:
    """The exit points of an adapter in this model.

    Args:
        same: whether the base is the adapter's own.
    Raises:
        ExitPointError: an exit point does not exist.
        AdapterError: its features differ from those stated, or exits are repeated or out of order.
    """
    points = tuple(graph[exit.name] for exit in config.exits)
    for stored, point in zip(config.exits, points, strict=True):
        if same and (stored.shape, stored.layout) != (point.shape, point.layout):
            raise AdapterError(
                f"The adapter states features of shape {stored.shape} ({stored.layout}) at {stored.name!r}; this model "
                f"has {point.shape} ({point.layout}) there for the same input."
            )
    if any(a.index >= b.index for a, b in pairwise(points)):
        raise AdapterError(f"The exits of the adapter are not in the order of the model: {[p.name for p in points]}.")
    return points
