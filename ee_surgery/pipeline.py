"""The one-liners: the whole pipeline made of its public parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

from accelerate import Accelerator
from torch import nn

from ee_surgery.attach import attach, attach_stored
from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Backbone, Sample
from ee_surgery.backbone.wrappers import unwrapped
from ee_surgery.branches import BranchSpec, known
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop as check_drop
from ee_surgery.checks import count, flag, instance, path
from ee_surgery.data.batches import Data, halves
from ee_surgery.data.labels import ClassMap
from ee_surgery.errors import AdapterError, ConfigError, FingerprintError, SurgeryWarning
from ee_surgery.evaluation.calibrate import calibrate as calibrate_exits
from ee_surgery.evaluation.record import record
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.inspection import inspect, read
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import PLACEMENTS, ExitPlan, check_exits, place
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.presets import PRESETS
from ee_surgery.search.exit_search import TRIED, prune_exits, search_exits
from ee_surgery.share.adapter import AdapterConfig, load_adapter, load_base
from ee_surgery.share.base import make_base
from ee_surgery.share.hub import fetch
from ee_surgery.share.probe import make_inputs
from ee_surgery.share.processor import load_preprocessing, load_processor
from ee_surgery.share.provenance import as_stated
from ee_surgery.text import visible
from ee_surgery.training.config import TrainConfig
from ee_surgery.training.loop import make_accelerator
from ee_surgery.training.loop import train as train_branches


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
    train: Data | None = None,
    calibrate: Data | None = None,
    config: TrainConfig | None = None,
    max_accuracy_drop: float = 0.01,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> EarlyExitModel:
    """Give a pretrained model early exits: inspect -> place -> attach, and train and calibrate where data is given.

    The model itself is not changed and stays usable; until an operating point is set the result answers exactly as
    it does.

    Args:
        model: timm model, transformers classifier of images or texts, or any module from tensors to logits.
        exits: how many, `all`, names of exit points (`inspect` lists them), or a plan; 3 when left out. `auto`: their
            number and places by search, which needs `train=` and `calibrate=`; see below.
        placement: rule for a number of exits: `linear` (the default), `fine`, `pareto`, `gold_ratio`.
        branch: `auto` (the default), a registered name, a `BranchSpec`, or one for each exit; with `exits="auto"`,
            one or several to choose among at each point, by default small ones and shortcuts; see `search_exits`.
        preset: a paper's method, by its name in `PRESETS`: its exits, branches, training and calibration, in place of
            the defaults. What is given beside it wins. Its training is as long as published: shorten it by `config`.
        joint: train the original along, on a copy; needs `train=`; see `train`.
        sample: an example batch (B, ...), or a dict or tuple of several input tensors; needed where the model does not
            say what it takes.
        opaque: names of modules to keep whole; see `inspect`.
        num_classes: for a model without a classification head: how many classes a head shall tell apart, which is
            put on its features and trained with the branches.
        output: which part of the answer the logits are, by index or name, where more than one could be; see `inspect`.
        train: data to train the branches on; see `train`.
        calibrate: held-out data to search thresholds on; see `calibrate`. Different from `train`.
        config: of the training.
        max_accuracy_drop: with `exits="auto"`: the accuracy drop that exits are to be cheapest at; any other can still
            be asked for later.
        seed: of the branches' first weights.
        accelerator: your own, as for `train`: of several processes, each runs its part.
        class_map: which class of the model each label of `train` and `calibrate` is, where they are not the same; see
            `train`.

    With `exits="auto"`, branches at many points learn for a few steps (`search_exits`), those that are chosen are
    trained anew, and what then costs more than it saves is left out (`prune_exits`). Both look at one half of the
    calibration data; thresholds, and what is certified of them, come from the other. `provenance["placement"]` keeps
    what was tried.
    """
    joint, seed = flag("joint", joint), count("seed", seed, low=0)
    max_accuracy_drop = check_drop("max_accuracy_drop", max_accuracy_drop)
    config = None if config is None else instance("config", config, TrainConfig)
    if joint and train is None:
        raise ConfigError("joint=True trains the original along, but there is nothing to train on: give train=.")
    method = None if preset is None else PRESETS[preset]
    searched = isinstance(exits, str) and exits == "auto"
    if exits is not None and not searched and not isinstance(exits, ExitPlan):
        exits = check_exits(exits)  # before the model is read, which may take a minute
    if placement is not None:
        PLACEMENTS[placement]  # a name that is known
    if branch is not None:
        known(branch)
    graph = inspect(model, sample, opaque=opaque, num_classes=num_classes, output=output)
    config = config or (TrainConfig() if method is None else method.config)
    calibrator = "search" if method is None else method.method
    if searched:
        if train is None or calibrate is None or placement is not None:
            raise ConfigError(
                'exits="auto" trains and compares branches at many points: give train= and calibrate=, no placement=.'
            )
        kinds = branch or (TRIED if method is None else method.branch)
        return _by_search(
            graph, kinds, train, calibrate, config, calibrator, joint, max_accuracy_drop, seed, accelerator, class_map
        )
    if isinstance(exits, ExitPlan):
        plan = exits
    elif method is not None and exits is None and placement is None:
        plan = method.plan(graph)
    else:
        rule = placement or ("linear" if method is None else method.placement)
        plan = place(graph, 3 if exits is None else exits, rule)
    if branch is None:
        branch = "auto" if method is None else method.branches(plan.points)
    branched = attach(graph, plan, branch, seed=seed)
    if train is not None:
        report = train_branches(branched, train, config, joint=joint, accelerator=accelerator, class_map=class_map)
        branched = report.model
    if calibrate is not None:
        calibrate_exits(branched, calibrate, method=calibrator, accelerator=accelerator, class_map=class_map)
    return branched


def _by_search(
    graph: ModelGraph,
    kinds: str | BranchSpec | Sequence[str | BranchSpec],
    train: Data,
    held_out: Data,
    config: TrainConfig,
    calibrator: str,
    joint: bool,
    drop: float,
    seed: int,
    accelerator: Accelerator | None,
    class_map: ClassMap | None,
) -> EarlyExitModel:
    """`augment(exits="auto")`: what chooses exits never chooses thresholds."""
    searching, thresholds = halves(held_out, config.batch_size)
    accelerator = accelerator or make_accelerator(config)
    shared = {"accelerator": accelerator, "class_map": class_map}
    size = config.batch_size
    found = search_exits(
        graph,
        train,
        searching,
        branch=kinds,
        config=config,
        seed=seed,
        max_accuracy_drop=drop,
        **shared,
    )
    branched = attach(graph, found.plan, found.branches, seed=seed)
    branched = train_branches(branched, train, config, joint=joint, **shared).model
    records = record(branched, searching, batch_size=size, **shared)
    branched = prune_exits(branched, records, drop)
    left = [name for name in found.plan.names if name not in branched.exits]
    branched.provenance["placement"] = {**found.to_dict(), "left_out": left}
    frontier = calibrate_exits(branched, thresholds, method=calibrator, batch_size=size, **shared)
    if config.progress and accelerator.is_main_process:
        print(found)
        if left:
            print(f"left out after training, they cost more than they save: {', '.join(map(visible, left))}")
        print(_outcome(frontier.at(max_accuracy_drop=drop), records, drop))
    return branched


def _outcome(point: OperatingPoint, records: ExitRecords, drop: float) -> str:
    """Whether exits pay on this model, in two lines."""
    accuracy, cost = records.best_case()
    best = f"best case, leaving at the first right exit: {accuracy:.2%} at {cost:.1%} of the MACs"
    if 1 - point.macs_fraction <= drop:
        end = "not answering some samples would save as much. Take the original, or a smaller model"
        return f"{best}\nno-go: trained, exits save {1 - point.macs_fraction:.1%} at a drop of {drop:.1%}; {end}"
    return f"{best}\ntrained: {point}; whether a smaller model is cheaper, ee.verdict tells"


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
    """Load an adapter onto its base. Whoever wrote it: what is read is bounded and checked, and nothing is executed.

    Args:
        source: a folder written by `save_pretrained`, or a repository on the Hub such as `user/name`.
        model: the base; made by timm or transformers from the id in the adapter, with pretrained weights, when
            left out. Where the folder holds a base of its own, a copy of `model` takes those weights.
        sample: an example input, as for `augment`; needed where random numbers of the right shapes are none.
        output: which part of the base's answer the logits are, as for `augment`; the adapter's own when left out.
        revision: branch, tag or commit of the repository.
        token: to read a private one; by default the one stored by `hf auth login`, or `HF_TOKEN`.
        cache_dir: where downloads are kept.
        local_files_only: take what is in the cache, as `HF_HUB_OFFLINE=1` does.
        other_base: take a base with other weights than the branches were trained on, or one that computes something
            else with them, with a warning; kept in `provenance`. Nothing that was measured holds for it: calibrate
            again.
        own_base: expect an adapter that brings the weights of its base along (`train(joint=True)`): another model than
            the one it is named after. Without it such an adapter loads with a warning.
    Raises:
        HubError: the repository cannot be had.
        AdapterError: a file is missing, damaged or larger than it may be, or the base cannot be made from its id.
        FingerprintError: the base is not the one that the branches were trained on.
    """
    folder = path("source", source, hint="A folder that save_pretrained wrote, or a repository such as user/name.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    local = folder.is_dir()
    if not local:
        folder = fetch(str(source), revision=revision, **hub)
    model = None if model is None else unwrapped(model)
    config, weights, frontier = load_adapter(folder)
    given = model
    if model is None:
        model = make_base(config, folder, **hub)
    if config.own_base:
        if not own_base:
            warnings.warn(
                f"{source} is another model than {config.base.hub_id or config.base.model_id!r}: it brings the weights "
                "of its base along, and these answer. own_base=True says that this is expected.",
                SurgeryWarning,
                stacklevel=2,
            )
        model = model if given is None else deepcopy(model)
        load_base(folder, model, config.files)
    if sample is None:
        sample = make_inputs(config.inputs, config.options)
    if unknown := sorted(set(config.opaque) - {name for name, _ in model.named_modules()}):
        raise AdapterError(f"{folder} keeps modules {unknown[:5]} whole, which {type(model).__name__} does not have.")
    backbone = Backbone(model, sample, config.opaque, config.head_classes, config.output if output is None else output)
    calibrated = frontier is not None or config.operating_point is not None
    name = folder.resolve().name if local else str(source)
    provenance = as_stated(config.provenance, name, calibrated=calibrated)
    if (differ := _difference(config, backbone)) is not None:
        if not other_base:
            raise FingerprintError(" ".join(differ))
        told = f"{differ[0]} other_base=True: what was measured does not hold, calibrate again."
        warnings.warn(told, SurgeryWarning, stacklevel=2)
        provenance.pop("evaluation", None)
        provenance["other_base"] = {"trained_on": config.base.fingerprint, "model_id": config.base.model_id}
    graph = read(backbone, backbone.sample)
    plan = ExitPlan(backbone.model_id, config.placement, _points(graph, config, same=differ is None))
    branched = attach_stored(graph, plan, [exit.branch for exit in config.exits], weights)
    branched.own_base = config.own_base
    branched.provenance = provenance
    branched.preprocessing = load_preprocessing(folder, config.preprocessing) or branched.preprocessing
    branched.processor = load_processor(folder, config.files, backbone)
    branched.frontier = frontier
    branched.operate(config.operating_point)
    return branched


def _points(graph: ModelGraph, config: AdapterConfig, same: bool) -> tuple[ExitPoint, ...]:
    """The exit points of an adapter in this very model.

    Args:
        same: whether the base is the one that the adapter belongs to.
    Raises:
        ExitPointError: there is none of a name.
        AdapterError: features there are of another kind than stated, or exits come twice or out of order.
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


def _difference(config: AdapterConfig, backbone: Backbone) -> tuple[str, str] | None:
    """How a base is not the one that an adapter belongs to, in weights or in what it computes, and what to do."""
    base, identity = config.base, backbone.identity()
    if identity.fingerprint != base.fingerprint:
        return (
            f"These branches belong to {base.model_id} with fingerprint {base.fingerprint}; the model given is "
            f"{identity.model_id} with fingerprint {identity.fingerprint}.",
            "Load the very same weights (same checkpoint, dtype and number of classes).",
        )
    answers = config.probe and config.probe.difference(backbone, config.inputs, config.options)
    if not answers:
        return None
    saved = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    return (
        f"The {identity.model_id} given has the weights of the one that these branches belong to (fingerprint "
        f"{base.fingerprint}), but computes something else: {answers}.",
        "Something that is no tensor differs: an activation, pooling, stride or dilation, an epsilon, the number of "
        f"heads, a hook, or the version of a library (saved with {saved}). Build the base as it was built then.",
    )
