"""Untrained branches at the exits of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn

from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Sample, digest_of
from ee_surgery.backbone.refusals import check_weights
from ee_surgery.branches import BranchSpec, known, resolve
from ee_surgery.branches.base import BRANCHES, Branch, build
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.checks import count, instance
from ee_surgery.errors import BranchError, ConfigError, ExitPointError
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.features import Layout
from ee_surgery.graph.inspection import inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import ExitPlan
from ee_surgery.share.provenance import ATTACHED
from ee_surgery.share.weights import Weights
from ee_surgery.task import Task, fits, require


@torch.inference_mode(False)  # weights created in inference mode cannot be trained
def attach(
    model: nn.Module | ModelGraph,
    plan: ExitPlan,
    branch: str | BranchSpec | Sequence[str | BranchSpec] = "auto",
    *,
    sample: Sample | None = None,
    opaque: Sequence[str] = (),
    num_classes: int | None = None,
    output: OutputKey | None = None,
    task: str | Task | type[Task] | None = None,
    seed: int = 0,
) -> EarlyExitModel:
    """Put untrained branches at the exits of a plan. The model itself is not changed and stays usable.

    Args:
        model: the model, or its graph from `inspect` (saves capturing it again).
        branch: `auto`, a registered name or a `BranchSpec`; or one per exit.
        sample: see `inspect`.
        opaque: see `inspect`.
        num_classes: see `inspect`.
        output: see `inspect`.
        task: see `inspect`.
        seed: of the branches' initial weights; the global random state is not changed.
    Raises:
        CaptureError: weights of the model have no data (meta, offloaded).
        ExitPointError: the stages cut at these exits do not reproduce the model on its sample.
        BranchError: a branch does not fit its features, or the number of branches and exits differs.
        ConfigError: a branch that is not for the model's task.
    """
    instance("plan", plan, ExitPlan, hint="place(graph, exits) makes one.")
    seed, given = count("seed", seed, low=0), known(branch)
    if isinstance(model, ModelGraph):
        graph = model
    else:
        graph = inspect(model, sample, opaque=opaque, num_classes=num_classes, output=output, task=task)
    check_weights(graph.backbone.model, graph.backbone.model_id, needed=True)
    if isinstance(branch, (str, BranchSpec)):
        given *= len(plan.points)
    given = [_with_unit(spec, graph.backbone.task) for spec in given]
    for spec in given:
        _check_task(spec, graph)
    if len(given) != len(plan.points):
        raise BranchError(f"{len(given)} branches for {len(plan.points)} exits at {plan.names}.")
    for point in plan.points:
        if graph[point.name].shape != point.shape:
            raise ExitPointError(
                f"The plan has features of shape {point.shape} at {point.name!r}, this model has "
                f"{graph[point.name].shape}: make the plan from this model's own graph."
            )
    with _seeded(seed):
        built = [
            resolve(spec, point, graph.backbone.num_classes, graph.macs, depth, graph)
            for depth, (spec, point) in enumerate(zip(given, plan.points, strict=True))
        ]
        bank = BranchBank([made for _, made in built], _head(graph))
    made = EarlyExitModel(graph, plan, [spec for spec, _ in built], bank)
    made.provenance[ATTACHED] = dict(zip(made.exits, map(digest_of, made.branches), strict=True))
    return made


@torch.inference_mode(False)
def attach_stored(graph: ModelGraph, plan: ExitPlan, specs: Sequence[BranchSpec], weights: Weights) -> EarlyExitModel:
    """Build the branches of an untrusted adapter; sizes are first checked on the meta device, without memory.

    Raises:
        AdapterError: the stored tensors do not match these branches; names the first difference.
        BranchError, ConfigError, UnknownNameError: there is no such branch, or it does not fit its features.
    """
    classes = graph.backbone.num_classes
    branches: list[Branch] = []
    for spec in specs:
        _check_task(spec, graph)
    with _seeded(0):
        for depth, (spec, point) in enumerate(zip(specs, plan.points, strict=True)):
            prefix = f"exits.{depth}."
            if not BRANCHES[spec.name].copies:  # those are no larger than the original
                weights.check(_measured(spec, point, classes, depth, prefix, graph), prefix)
            branches.append(build(spec, point, classes, depth, graph))
            weights.check(_named(branches[-1], prefix), prefix)
        if graph.head is not None:
            spec = _HEAD[graph.head.layout]
            weights.check(_measured(spec, graph.head, classes, 0, "head."), "head.")
        bank = BranchBank(branches, _head(graph))
    weights.fill(bank)
    return EarlyExitModel(graph, plan, specs, bank)


def _with_unit(spec: BranchSpec, task: Task) -> BranchSpec:
    """A branch that says how sure it is, where its answers do not."""
    return spec if task.chooses else replace(spec, confidence=True)


def _check_task(spec: BranchSpec, graph: ModelGraph) -> None:
    """Refuse a branch that cannot give answers of the model's task.

    Raises:
        ConfigError: so it is.
        UnknownNameError: no branch of that name.
    """
    if spec.name == "auto":
        return
    branch, task = BRANCHES[spec.name], graph.backbone.task
    require(f"The branch {spec.name!r}", branch.tasks, task)
    if branch.rank not in (None, task.rank):
        fitting = [name for name, cls in BRANCHES.items() if cls.rank in (None, task.rank) and fits(cls.tasks, task)]
        forms = {2: "vectors (B, C)", 4: "maps (B, C, h, w)"}
        raise ConfigError(
            f"The branch {spec.name!r} answers with {forms[branch.rank]}, and this model with {forms[task.rank]}: use "
            f"one of auto, {', '.join(fitting)}."
        )


def _measured(
    spec: BranchSpec, point: ExitPoint, classes: int, depth: int, prefix: str, graph: ModelGraph | None = None
) -> dict[str, Tensor]:
    """Tensors of a branch on the `meta` device, by name."""
    with torch.device("meta"):
        return _named(build(spec, point, classes, depth, graph), prefix)


def _named(branch: Branch, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in branch.state_dict().items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with GLOBAL_STATE, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every GPU as well
        yield


def _head(graph: ModelGraph) -> Branch | None:
    """A linear head for a model without one."""
    return None if graph.head is None else build(_HEAD[graph.head.layout], graph.head, graph.backbone.num_classes)


_HEAD = {layout: BranchSpec("pool" if layout in ("nchw", "vector") else "token") for layout in get_args(Layout)}
