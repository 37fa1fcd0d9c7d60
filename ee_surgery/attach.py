"""Untrained branches at the exits of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from ee_surgery.answers import OutputKey
from ee_surgery.backbone import Sample
from ee_surgery.branches import BranchSpec, known, resolve
from ee_surgery.branches.bank import BranchBank
from ee_surgery.branches.base import build
from ee_surgery.checks import count, instance
from ee_surgery.errors import BranchError, ExitPointError
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.features import Layout
from ee_surgery.graph.points import ModelGraph, inspect
from ee_surgery.model import EarlyExitModel
from ee_surgery.placement import ExitPlan
from ee_surgery.refusals import check_weights


@torch.inference_mode(False)  # weights that are made in inference mode can never learn
def attach(
    model: nn.Module | ModelGraph,
    plan: ExitPlan,
    branch: str | BranchSpec | Sequence[str | BranchSpec] = "auto",
    *,
    sample: Sample | None = None,
    opaque: Sequence[str] = (),
    num_classes: int | None = None,
    output: OutputKey | None = None,
    seed: int = 0,
) -> EarlyExitModel:
    """Put untrained branches at the exits of a plan. The model itself is not changed and stays usable.

    Args:
        model: the model, or the graph that `inspect` gave (spares capturing it again).
        branch: `auto`, a registered name or a `BranchSpec`; or one for each exit.
        sample: see `inspect`.
        opaque: see `inspect`.
        num_classes: see `inspect`.
        output: see `inspect`.
        seed: of the branches' first weights; the global random state is left alone.
    Raises:
        CaptureError: weights of the model have no data (meta, offloaded).
        ExitPointError: the stages cut at these exits do not reproduce the model on its sample.
        BranchError: a branch does not fit its features, or their number is not that of the exits.
    """
    instance("plan", plan, ExitPlan, hint="place(graph, exits) makes one.")
    seed, given = count("seed", seed, low=0), known(branch)
    if isinstance(model, ModelGraph):
        graph = model
    else:
        graph = inspect(model, sample, opaque=opaque, num_classes=num_classes, output=output)
    check_weights(graph.backbone.model, graph.backbone.model_id, needed=True)
    if isinstance(branch, (str, BranchSpec)):
        given *= len(plan.points)
    if len(given) != len(plan.points):
        raise BranchError(f"{len(given)} branches for {len(plan.points)} exits at {plan.names}.")
    for point in plan.points:
        if graph[point.name].shape != point.shape:
            raise ExitPointError(
                f"The plan has features of shape {point.shape} at {point.name!r}, this model "
                f"{graph[point.name].shape}: make the plan from this model's own graph."
            )
    with GLOBAL_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = [
            resolve(spec, point, graph.backbone.num_classes, graph.macs, depth, graph)
            for depth, (spec, point) in enumerate(zip(given, plan.points, strict=True))
        ]
        head = None if graph.head is None else build(_HEAD[graph.head.layout], graph.head, graph.backbone.num_classes)
    bank = BranchBank([made for _, made in built], head)
    return EarlyExitModel(graph, plan, [spec for spec, _ in built], bank)


# A linear layer on what the model gives: what it was made for.
_HEAD = {layout: BranchSpec("pool" if layout in ("nchw", "vector") else "token") for layout in get_args(Layout)}
