"""Bad input of every kind to every public entry point: a clear error of ours, at once, and nothing changed.

A hazard is a name, what to try, the error that has to come, and a part of its message that names what was wrong.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from typer.testing import CliRunner

import ee_surgery as ee
from ee_surgery.calibration.records import replay_point
from ee_surgery.calibration.search import search
from ee_surgery.cli import app
from ee_surgery.evaluation.bench import measure
from ee_surgery.policies.policy import certainty

NAN, INF = math.nan, math.inf
Config, Spec = ee.TrainConfig, ee.BranchSpec
CONFIG, DATA, POINT, EXIT = ee.ConfigError, ee.DataError, ee.OperatingPointError, ee.ExitPointError
BRANCH, NAME, CAPTURE, ADAPTER = ee.BranchError, ee.UnknownNameError, ee.CaptureError, ee.AdapterError


class Hazard(NamedTuple):
    """Bad input, and what has to come of it."""

    name: str
    how: Callable[[], object]
    error: type[ee.SurgeryError]
    says: str


def net(classes: int = 4) -> nn.Sequential:
    """A small network over pictures of 8 pixels, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    ).eval()  # fmt: skip


class _World:
    """What hazards are tried on, made once."""

    sample = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    @cached_property
    def graph(self) -> ee.ModelGraph:
        return ee.inspect(net(), self.sample)

    @cached_property
    def plan(self) -> ee.ExitPlan:
        return ee.place(self.graph, ["2", "4"])

    @cached_property
    def model(self) -> ee.EarlyExitModel:
        """Calibrated, with an operating point."""
        branched = ee.attach(self.graph, self.plan, "pool")
        ee.calibrate(branched, self.data)
        branched.operate(thresholds=[0.9, 0.8])
        ee.evaluate(branched, self.data)
        return branched

    @cached_property
    def fresh(self) -> ee.EarlyExitModel:
        """Neither trained nor calibrated, with confidence units."""
        return ee.attach(self.graph, self.plan, Spec("pool", confidence=True))

    @cached_property
    def data(self) -> TensorDataset:
        """Labelled as the network itself answers, but for a few."""
        pictures = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        labels = self.graph.backbone.logits(self.graph.backbone(pictures)).argmax(-1).detach()
        labels[::8] = 3
        return TensorDataset(pictures, labels)

    @cached_property
    def records(self) -> ee.ExitRecords:
        return ee.record(self.model, self.data)

    @cached_property
    def bare(self) -> ee.ExitRecords:
        """Records without labels."""
        return replace(self.records, labels=None)

    @cached_property
    def frontier(self) -> ee.Frontier:
        assert self.model.frontier is not None
        return self.model.frontier

    def labelled(self, labels: Any) -> list[tuple[Tensor, Any]]:
        """One batch of eight pictures with these labels."""
        return [(self.data.tensors[0][:8], labels)]

    def state(self) -> list[object]:
        """What no bad input may change."""
        found: list[object] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        for branched in (self.model, self.fresh):
            found += [branched.operating_point, id(branched.frontier), repr(branched.provenance)]
            found += [[module.training for module in branched.modules()]]
            found += [[(name, hash(t.numpy().tobytes())) for name, t in branched.state_dict().items()]]
            found += [[(p.requires_grad, p.grad is None) for p in branched.parameters()]]
        return found


W = _World()
QUICK = Config(epochs=1, batch_size=16, progress=False, validation=0)
ARRAY, TENSOR, LONG = np.zeros(3), torch.zeros(3), "x" * 5000
NOT_COUNTS = ("5", 0, -1, 1.5, NAN, INF, True, [3], TENSOR, 2**70)
NOT_SHARES = ("0.5", -0.1, 1.1, NAN, INF, True, [0.5], ARRAY)
NOT_POSITIVE = ("1", 0, -1.0, NAN, INF, False, (1,), 1j)
NOT_FLAGS = ("yes", 1, 0.0, None, [])


def _label(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{type(value).__name__}{tuple(value.shape)}"
    text = value.__name__ if isinstance(value, type) else repr(value)
    return text if len(text) < 40 else f"{text[:40]}..."


def each(
    what: str, values: Any, how: Callable[[Any], object], error: type[ee.SurgeryError], says: str
) -> Iterator[Hazard]:
    """One hazard for each of several bad values."""
    for value in values:
        yield Hazard(f"{what}={_label(value)}", partial(how, value), error, says)


# --- settings


def config_hazards() -> Iterator[Hazard]:
    fields = {
        **dict.fromkeys(("epochs", "batch_size", "accumulate"), (*NOT_COUNTS, None)),
        **dict.fromkeys(("checkpoint_steps", "patience_nonfinite"), ("5", 0, 1.5, NAN, None)),
        **dict.fromkeys(("max_steps", "views"), ("5", 0, -3, 2.5, INF, True)),
        **dict.fromkeys(("num_workers", "ensemble_epochs", "seed"), ("0", -1, 0.5, NAN, None, False)),
        **dict.fromkeys(("distill", "mix_share"), (*NOT_SHARES, None)),
        **dict.fromkeys(("distill_from", "warmup"), ("0.5", -0.1, 1.1, NAN, None)),
        "survivor": ("0.5", -0.1, 2, NAN, True),
        "milestones": (0.5, "half", (0.5, 2), (0.5, NAN), ("0.5",), None, torch.zeros(2, 2)),
        **dict.fromkeys(("lr", "temperature"), (*NOT_POSITIVE, None)),
        **dict.fromkeys(("weight_decay", "cutmix", "mixup", "cache_gb", "cost_weight"), ("0", -1, NAN, INF, None)),
        **dict.fromkeys(("momentum", "ema", "validation"), ("0.9", -0.1, 1, 1.5, NAN, None)),
        "clip_grad": ("1", -1, 0, NAN, INF, True),
        "objective": ("sum_cd", None, 3, ["kd"], ""),
        "exit_weights": ("rising", None, 1.0, (1, -1), (1, NAN), ("1", "2"), (INF, 1)),
        "teach": ("label", None, True),
        "optimizer": ("adamW", None, torch.optim.Adam),
        "schedule": ("cosin", None, 1),
        "mixed_precision": ("bfloat16", None, torch.bfloat16, True),
        "checkpoint_dir": (3, "", True),
        "progress": NOT_FLAGS,
    }  # fmt: skip
    for name, values in fields.items():
        for value in values:
            known = name == "objective" and value == "sum_cd"
            error = NAME if known else CONFIG
            how = partial(lambda name, value: Config(**{name: value}), name, value)
            yield Hazard(f"TrainConfig({name}={_label(value)})", how, error, "'sum_ce'" if known else name)


# --- models, samples, places


def model_hazards() -> Iterator[Hazard]:
    whole = partial(ee.inspect, sample=W.sample)
    models = ("resnet18", None, nn.Linear, 5, timm, {"a": net()}, [net()], W.sample, lambda x: x)
    yield from each("inspect(model)", models, whole, CONFIG, "model must be a torch.nn.Module")
    yield from each("augment(model)", ("resnet18", None, nn.Sequential), ee.augment, CONFIG, "model must be")
    yield from each("attach(model)", ("resnet18", None), lambda m: ee.attach(m, W.plan), CONFIG, "model must")
    inspect = partial(ee.inspect, net())
    samples = ("x", 5, [W.sample], np.zeros((2, 3, 8, 8)), {"x": 3}, {}, {"pixels": W.sample})
    yield from each("inspect(sample)", samples, inspect, DATA, "input tensors")
    yield from each("sample.shape", (torch.zeros(0, 3, 8, 8), torch.zeros(3), torch.zeros(())), inspect,
                    DATA, "batch dimension")  # fmt: skip
    yield from each("sample.size", (torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 1, 1)), inspect,
                    DATA, "does not accept a sample of shape")  # fmt: skip
    yield Hazard("sample: bytes", lambda: inspect(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), DATA, "x.float() / 255")
    yield Hazard("sample: none", inspect, DATA, "sample=torch.randn")

    def having(name: str) -> Callable[[Any], object]:
        return lambda value: ee.inspect(net(), W.sample, **{name: value})

    classes = (0, 1, -3, 2.5, "10", True, NAN, [10])
    yield from each("num_classes", classes, having("num_classes"), CONFIG, "num_classes must be")
    yield from each("opaque", ("nope", ["0", "9"], ["00"]), having("opaque"), CONFIG, "has no module")
    yield from each("opaque", (3, [3], None, ""), having("opaque"), CONFIG, "opaque")
    yield from each("output", ("logits", 1, [0, "x"]), having("output"), CONFIG, "no tensor there")
    yield from each("output", (1.5, {}, [], [None], True), having("output"), CONFIG, "output")
    yield Hazard("meta device", lambda: ee.augment(net().to("meta"), 1, sample=W.sample), CAPTURE, "meta")
    scripted = partial(torch.jit.trace, net(), W.sample)
    yield Hazard("TorchScript", lambda: ee.augment(scripted(), 1, sample=W.sample), CAPTURE, "TorchScript")


def place_hazards() -> Iterator[Hazard]:
    def exits(value: Any) -> object:
        return ee.place(W.graph, value)

    def augmented(value: Any) -> object:
        return ee.augment(net(), value, sample=W.sample)

    counts = (True, 2.5, 0, -1, NAN, INF, [1, 2], None, {"2": 1}, b"2", [["2"]], np.array([1, 2]), TENSOR)
    yield from each("place(exits)", counts, exits, EXIT, "exits")
    yield from each("place(exits)", (50, np.int64(50)), exits, EXIT, "no room")
    yield from each("place(exits)", ("layer1", ["2", "nope"]), exits, EXIT, "No exit point")
    yield from each("place(exits)", (["2", "2"],), exits, EXIT, "twice")
    yield from each("place(exits)", ([], ()), exits, EXIT, "is empty")
    yield from each("augment(exits)", (True, 2.5, [1, 2]), augmented, EXIT, "")
    yield from each("place(rule)", ("linaer", None, 3, ["linear"]), lambda r: ee.place(W.graph, 2, r),
                    NAME, "placement rule")  # fmt: skip
    yield Hazard("rule: near", lambda: ee.place(W.graph, 2, "linaer"), NAME, "'linear'")
    yield from each("place(clip)", NOT_FLAGS, lambda c: ee.place(W.graph, 2, clip=c), CONFIG, "clip")
    yield from each("place(graph)", (None, "resnet18", net()), ee.place, CONFIG, "graph must be")
    yield from each("attach(plan)", (None, 3, ["2"], "2"), lambda p: ee.attach(W.graph, p), CONFIG, "plan")
    for name in ("augment", "attach"):
        how = partial(ee.augment, net(), ["2"], sample=W.sample) if name == "augment" else None
        make = how or (lambda **kwargs: ee.attach(W.graph, W.plan, **kwargs))
        yield from each(f"{name}(seed)", ("0", -1, 1.5, None, NAN), lambda s, make=make: make(seed=s),
                        CONFIG, "seed")  # fmt: skip
    yield Hazard("plan of another model", lambda: ee.attach(net(), _other_plan(), sample=W.sample), EXIT,
                 "own graph")  # fmt: skip


def _other_plan() -> ee.ExitPlan:
    return ee.ExitPlan("other", "explicit", (replace(W.plan.points[0], shape=(5, 8, 8)),))


def branch_hazards() -> Iterator[Hazard]:
    def branch(value: Any) -> object:
        return ee.attach(W.graph, W.plan, value)

    yield from each("branch", (None, 3, ["pool", None], [3, 3], nn.Linear, {"pool": 1}), branch, CONFIG, "branch")
    yield from each("branch", ("pol", "no such", Spec("pools")), branch, NAME, "branch")
    yield from each("branch", ([], ["pool"], ["pool"] * 3), branch, BRANCH, "branches for 2 exits")
    yield from each("BranchSpec(name)", (None, 3, "", ["pool"]), Spec, CONFIG, "name must be text")
    yield from each("confidence", NOT_FLAGS, lambda c: Spec("pool", confidence=c), CONFIG, "confidence")
    yield from each("options", ([1], "hidden=3", {3: 3}), lambda o: Spec("mlp", options=o), CONFIG, "options")
    yield from each("option", (None, NAN, INF, [3], TENSOR), lambda o: Spec("mlp", options={"hidden": o}),
                    CONFIG, "option hidden")  # fmt: skip
    bad: dict[str, dict[str, tuple[Any, ...]]] = {
        "mlp": {"hidden": (-5, 0, 1.5, "64", True, 10**12), "cells": (-1, "2"), "norm": ("yes", 1), "preact": (2,)},
        "token": {"hidden": (-1, "x", 10**12)},
        "bnpool": {"relu": ("no",)},
        "conv": {"depth": (0, -1, 1.5, 10**9, "two")},
        "eenet": {"narrow": (-2, 0.5, "x")},
        "msd": {"width": (-8, 0, 10**9)},
        "branchy": {"width": (0, -1), "depth": (-1, 10**6)},
        "strided": {"width": (-4, 10**9), "depth": (0, 10**6)},
        "residual": {"budget": (0, -0.1, "a tenth"), "width": (-3,), "depth": (0,), "depthwise": ("no",)},
        "shortcut": {"budget": (0, -1, "all")},
        "ztw": {"ensemble": ("no", 3)},
    }  # fmt: skip
    for name, options in bad.items():
        for option, values in options.items():
            yield from each(f"{name}({option})", values,
                            lambda v, name=name, option=option: branch(Spec(name, options={option: v})),
                            CONFIG, option)  # fmt: skip
    for name in ("pool", "mlp", "conv2", "residual", "shortcut", "auto"):
        yield Hazard(f"{name}(widht=3)", partial(branch, Spec(name, options={"widht": 3})), CONFIG, "widht")
    yield Hazard("shortcut(blocks)", partial(branch, Spec("shortcut", options={"blocks": "99"})), BRANCH, "'99'")


def preset_hazards() -> Iterator[Hazard]:
    def augment(**kwargs: Any) -> object:
        return ee.augment(net(), sample=W.sample, **kwargs)

    yield from each("preset", ("eenets2", "SDN", 3, ["sdn"]), lambda p: augment(preset=p), NAME, "preset")
    yield from each("joint", ("yes", 1, None), lambda j: augment(joint=j), CONFIG, "joint")
    yield Hazard("joint without data", lambda: augment(joint=True), CONFIG, "train=")
    yield Hazard("auto without data", lambda: augment(exits="auto"), CONFIG, "calibrate=")
    yield from each("augment(config)", ("fast", 3), lambda c: augment(config=c), CONFIG, "config")
    yield from each("effort", ("hard", 3, ["quick"]), lambda e: augment(effort=e), CONFIG, "effort")
    yield from each("time_budget", ("1h", 0, -1, NAN, True), lambda b: augment(time_budget=b), CONFIG, "time_budget")
    yield from each("augment(drop)", ("1%", -0.1, 2, NAN, True), lambda d: augment(max_accuracy_drop=d),
                    CONFIG, "one percentage point")  # fmt: skip
    vectors = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for name in ("conv2", "sdn", "msd", "branchy", "residual", "eenet", "strided"):
        how = partial(ee.augment, vectors, ["1"], branch=name, sample=torch.randn(2, 4))
        yield Hazard(f"{name} on vectors", how, BRANCH, "needs a feature map")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    yield from each("preset without room", ("sdn", "ztw", "pteenet"),
                    lambda p: ee.augment(flat, preset=p, sample=torch.randn(2, 3, 2, 2)),
                    EXIT, "")  # fmt: skip
    for registry in (ee.BRANCHES, ee.SCORES, ee.PLACEMENTS, ee.CALIBRATORS, ee.PRESETS, ee.OBJECTIVES, ee.RISKS,
                     ee.FITTED_SCORES):  # fmt: skip
        first = next(iter(registry))
        near = partial(registry.__getitem__, first[:-1] + "_")
        yield Hazard(f"{registry.kind}: near", near, NAME, registry.kind)
        yield Hazard(f"{registry.kind}: list", partial(registry.__getitem__, [first]), NAME, registry.kind)
        taken = partial(lambda registry, first: registry.register(first)(None), registry, first)
        yield Hazard(f"{registry.kind}: twice", taken, CONFIG, "already registered")
        yield Hazard(f"{registry.kind}: no name", partial(registry.register, None), CONFIG, "non-empty string")


# --- when to leave


def operate_hazards() -> Iterator[Hazard]:
    def asked(name: str) -> Callable[[Any], object]:
        return lambda value: W.model.operate(**{name: value})

    yield from each("operate", (0.5, "0.9", 1, [0.5, 0.5], {}, True), lambda p: W.model.operate(p), POINT, "point must")
    yield Hazard("operate()", lambda: W.model.operate(), POINT, "exactly one")
    taus = ("0.5", NAN, True, [0.5, None], [0.5, "x"], ["0.5", "0.5"], [NAN, 0.5], {0.5}, 1j, torch.zeros(2, 2))
    yield from each("thresholds", taus, asked("thresholds"), POINT, "thresholds")
    yield from each("thresholds", ([0.5], [0.5] * 3, [], TENSOR), asked("thresholds"), POINT, "one per branch")
    yield Hazard("thresholds=None", lambda: W.model.operate(thresholds=None), POINT, "operate(None)")
    yield from each("max_accuracy_drop", ("1%", -0.01, 1.5, NAN, INF, True, [0.01]), asked("max_accuracy_drop"),
                    POINT, "max_accuracy_drop must be")  # fmt: skip
    yield from each("budget", ("half", 0, -1, NAN, INF, True, [0.5]), asked("budget"), POINT, "budget must be")
    yield Hazard("budget too small", lambda: W.model.operate(budget=1e-6), POINT, "cheapest costs")
    risks = (0.01, "1%", (0.01,), (0.01, 0.05, 0.1), (0, 0.05), (0.01, 1), (NAN, 0.05), (True, 0.05), 5, {}, ("a", "b"))
    yield from each("risk", risks, asked("risk"), POINT, "risk")
    for other in ("agreement", 3, ""):
        how = partial(W_operate, risk=(0.1, 0.05), risk_of=other)
        yield Hazard(f"risk_of={other!r}", how, POINT, "risk")
    yield Hazard("risk_of alone", lambda: W.model.operate(risk_of="disagreement"), POINT, "risk=")
    yield Hazard("score alone", lambda: W.model.operate(score="entropy"), POINT, "thresholds=")
    yield Hazard("score with a budget", lambda: W.model.operate(score="entropy", budget=0.9), POINT, "thresholds=")
    yield from each("score", ("maxprob", "Entropy", "softmax"), lambda s: W.model.operate(thresholds=0.5, score=s),
                    NAME, "No score")  # fmt: skip
    yield from each("score", (3, ["max_prob"], torch.softmax), lambda s: W.model.operate(thresholds=0.5, score=s),
                    CONFIG, "score must be")  # fmt: skip
    yield Hazard("score without units", lambda: W.model.operate(thresholds=0.5, score="learned"), CONFIG, "unit")
    yield Hazard("score of other classes", lambda: W.model.operate(ee.OperatingPoint.by_hand(0.0, _other_score(), 2)),
                 POINT, "another model")  # fmt: skip
    yield Hazard("two requests", lambda: W.model.operate(budget=0.5, max_accuracy_drop=0.1), POINT, "exactly one")
    yield Hazard("no frontier", lambda: W.fresh.operate(budget=0.5), POINT, "ee.calibrate")
    yield Hazard("at() of nothing", lambda: W.frontier.at(), POINT, "exactly one")
    for name in ("operate", "frontier"):
        yield from each(f"{name}: drop and array", (np.array([0.01, 0.02]), TENSOR),
                        lambda v, name=name: (W.model.operate if name == "operate" else W.frontier.at)(
                            max_accuracy_drop=v), POINT, "max_accuracy_drop")  # fmt: skip


def W_operate(**request: Any) -> object:
    return W.model.operate(**request)


def _other_score() -> ee.FittedScore:
    """Fitted for a model of other exits and classes."""
    taus = torch.zeros(1, 7)
    return ee.FITTED_SCORES["classwise"](taus)  # pyright: ignore[reportCallIssue]


def policy_hazards() -> Iterator[Hazard]:
    policy = ee.ThresholdPolicy
    taus = (None, 0.5, "ab", (0.5, None), (0.5, NAN), ("0.5",), (True,), torch.zeros(2, 2), {0.5})
    yield from each("ThresholdPolicy(thresholds)", taus, policy, CONFIG, "thresholds")
    yield from each("fallback", ("lest", None, 1), lambda f: policy((0.5,), fallback=f), CONFIG, "fallback")
    yield from each("score", (None, 1, max), lambda s: policy((0.5,), s), CONFIG, "score")
    yield Hazard("score: near", lambda: policy((0.5,), "max_prop"), NAME, "'max_prob'")
    yield from each("replay", (policy((0.5,)), policy((0.5,) * 3)), lambda p: W.records.replay(p), CONFIG, "")
    yield from each("replay", (None, 0.5), lambda p: W.records.replay(p), CONFIG, "policy must be")
    yield Hazard("a score that hides its state", lambda: W.records.replay(policy((0.5, 0.5), _Forgetful())),
                 CONFIG, "stateful")  # fmt: skip


class _Forgetful(ee.FittedScore):
    """Hands a state on, but does not say so."""

    kind = "forgetful"

    def __call__(self, logits: Tensor, confidence: Any, state: Any, exit_index: int) -> tuple[Tensor, Any]:
        return logits.amax(-1), (logits,)


def records_hazards() -> Iterator[Hazard]:
    logits, labels = torch.randn(3, 5, 4), torch.zeros(5, dtype=torch.long)

    def records(**changes: Any) -> object:
        good: dict[str, Any] = {"exits": ("a", "b"), "logits": logits, "trunk_macs": (1, 2, 3), "branch_macs": (1, 1)}
        return ee.ExitRecords(**{**good, **changes})

    def having(name: str) -> Callable[[Any], object]:
        return lambda value: records(**{name: value})

    bad: dict[str, tuple[Any, ...]] = {
        "logits": (None, [1], np.zeros((3, 5, 4)), logits[0], logits.long(), torch.zeros(3, 5, 1)),
        "labels": (labels[:, None], labels.float(), labels.bool(), [0] * 5, torch.tensor(1), labels - 1, labels + 4),
        "confidence": (torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(5), [0.0], 3),
        "exits": (3, None, (1, 2), ("a", "")),
        "trunk_macs": (None, 3, ("1", "2", "3"), (3, 2, 1), (0, 0, 0), (1, 2, NAN), (1, 2, INF), (-1, 2, 3)),
        "branch_macs": (None, (NAN, 1), (-1, 1), ("a", "b")),
        "chained": (None, "no"),
    }
    for name, values in bad.items():
        yield from each(f"ExitRecords({name})", values, having(name), DATA, name)
    fit = {"exits": (("a",), ("a", "b", "c")), "trunk_macs": ((1, 2), (1, 2, 3, 4)), "branch_macs": ((1,), ()),
           "labels": (labels[:4],), "logits": (logits[:2],)}  # fmt: skip
    for name, values in fit.items():
        yield from each(f"ExitRecords({name}) beside the others", values, having(name), DATA, "fit together")
    yield Hazard("records of nothing", partial(records, logits=torch.zeros(3, 0, 4)), DATA, "no samples")
    yield from each("take", ([0, 1], torch.zeros(2), torch.tensor([99]), torch.tensor(1)), lambda r: W.records.take(r),
                    DATA, "rows")  # fmt: skip
    yield from each("keep", ([1, 0], [5], [0, 0]), lambda k: W.records.keep(k), DATA, "rising")
    for name in ("max_porb", None, 3):
        yield Hazard(f"scores({name!r})", partial(lambda n: W.records.scores(n), name),
                     NAME if name == "max_porb" else CONFIG, "score")  # fmt: skip


def calibrator_hazards() -> Iterator[Hazard]:
    drops = ("1%", -0.01, 1.01, NAN, INF, None, True)
    for call in (ee.accuracy_drop_rule, ee.class_thresholds, ee.realised_drop, ee.cheapest_exits):
        yield from each(f"{call.__name__}(drop)", drops, lambda d, call=call: call(W.records, d), CONFIG, "drop")
    budgets = ("half", 0, -1, NAN, INF, None, True)
    for call in (ee.geometric_budget, ee.eenet_scheduler):
        yield from each(f"{call.__name__}(budget)", budgets, lambda b, call=call: call(W.records, b), CONFIG,
                        "budget")  # fmt: skip
        how = partial(lambda call: call(W.records, 1e-9), call)
        yield Hazard(f"{call.__name__} out of reach", how, POINT, "cheapest possible")
    calls: dict[str, Callable[[Any], object]] = {
        "accuracy_drop_rule": lambda r: ee.accuracy_drop_rule(r, 0.1),
        "class_thresholds": lambda r: ee.class_thresholds(r, 0.1),
        "realised_drop": lambda r: ee.realised_drop(r, 0.1),
        "cheapest_exits": ee.cheapest_exits,
        "geometric_budget": lambda r: ee.geometric_budget(r, 0.9),
        "eenet_scheduler": lambda r: ee.eenet_scheduler(r, 0.9),
        "scale_temperatures": ee.scale_temperatures,
        "risk_control": lambda r: ee.risk_control(r, 0.1),
        "Frontier.search": ee.Frontier.search,
        "Frontier.trace": ee.Frontier.trace,
        "search": search,
        "replay_point": lambda r: replay_point(r, ee.ThresholdPolicy((0.5, 0.5)), "mine"),
    }  # fmt: skip
    for name, call in calls.items():
        yield from each(f"{name}(records)", (None, "records.safetensors"), call, CONFIG, "records must be")

    def scheduler(name: str) -> Callable[[Any], object]:
        return lambda value: ee.eenet_scheduler(W.records, 0.9, **{name: value})

    yield from each("eenet(latency_ms)", ([1.0], [3, 2, 1], "123", [1, NAN, 2], 5.0, [0, 1, 2]),
                    scheduler("latency_ms"), CONFIG, "latency_ms")  # fmt: skip
    yield from each("eenet(steps)", (0, -1, 2.5, "9"), scheduler("steps"), CONFIG, "steps")
    yield from each("eenet(rates)", ([], [0], [NAN], 1e-3, "fast"), scheduler("rates"), CONFIG, "rates")
    yield from each("eenet(seed)", (-1, "x", 0.5), scheduler("seed"), CONFIG, "seed")
    yield from each("min_tail", ("x", -1, 2, NAN), lambda m: ee.accuracy_drop_rule(W.records, 0.1, min_tail=m),
                    CONFIG, "min_tail")  # fmt: skip
    yield from each("class min_tail", ("x", 0, 2.5), lambda m: ee.class_thresholds(W.records, 0.1, m),
                    CONFIG, "min_tail")  # fmt: skip
    yield from each("most", (0, "6", 1.5), lambda m: ee.cheapest_exits(W.records, most=m), CONFIG, "most")
    yield from each("prices", (0, 1, "64"), lambda p: search(W.records, prices=p), CONFIG, "prices")
    yield from each("fallbacks", (["lost"], 3), lambda f: search(W.records, fallbacks=f), CONFIG, "fallbacks")
    yield from each("trace", ("serach", 3), lambda p: ee.Frontier.trace(W.records, p), NAME, "calibrator")
    yield from each("Frontier.search(scores)", (3, [3], b"x"), lambda s: ee.Frontier.search(W.records, s),
                    CONFIG, "scores")  # fmt: skip
    yield from each("temperatures(score)", (3, None), lambda s: ee.scale_temperatures(W.records, s), CONFIG,
                    "score")  # fmt: skip
    for call in (ee.accuracy_drop_rule, ee.realised_drop, ee.geometric_budget):
        how = partial(lambda call: call(W.records, 0.9, score="margins"), call)
        yield Hazard(f"{call.__name__}(score)", how, NAME, "'margin'")
    yield Hazard("scores of units", lambda: ee.Frontier.search(W.records, ["learned"]), CONFIG, "unit")


def risk_hazards() -> Iterator[Hazard]:
    levels = ("1%", 0, 1, -0.1, NAN, INF, None, True, (0.01, 0.05))
    yield from each("eps", levels, lambda e: ee.risk_control(W.records, e), CONFIG, "eps must be")
    yield from each("delta", levels, lambda d: ee.risk_control(W.records, 0.1, d), CONFIG, "delta must be")

    def control(name: str) -> Callable[[Any], object]:
        return lambda value: ee.risk_control(W.records, 0.2, **{name: value})

    yield from each("risk", ("disagreemnt", None, 3), control("risk"), NAME, "risk")
    yield from each("method", ("ltt", "ltt-paired", 3), control("method"), CONFIG, "Method")
    yield from each("per_exit", NOT_FLAGS, control("per_exit"), CONFIG, "per_exit")
    yield from each("risk score", ("maxprob", 3), control("score"), NAME, "score")
    yield from each("risk seed", (-1, "x", None, 0.5), control("seed"), CONFIG, "seed")
    yield Hazard("risk without labels", lambda: ee.risk_control(W.bare, 0.2, risk="accuracy_gap"), DATA, "labels")
    check = ee.check_certificate
    yield from each("check_certificate", (None, "promise"), lambda c: check(c, W.records), CONFIG, "certificate")


# --- data


class _Broken(Dataset[Any]):
    """Samples of different sizes, or no tensors at all."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def data_hazards() -> Iterator[Hazard]:
    verbs: dict[str, Callable[[Any], object]] = {
        "train": lambda data: ee.train(W.model, data, QUICK),
        "calibrate": lambda data: ee.calibrate(W.model, data),
        "evaluate": lambda data: ee.evaluate(W.model, data),
        "record": lambda data: ee.record(W.model, data),
    }
    picture = Image.new("RGB", (8, 8))
    x, y = torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    odd = _Broken((torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 9), 0))
    unlike = [(x, y), x]
    none = (None, 5, "pictures/", Path("pictures"), b"x", {"x": x}, net(), nn.Linear, lambda: x, 0.5)
    empty = ([], TensorDataset(x[:0], y[:0]), _Stream(), iter([]), DataLoader(TensorDataset(x[:0], y[:0])))
    forms = (
        [5],
        ["ab"],
        [(x, y, y)],
        [{"labels": y}],
        [(picture, 0)],
        [x.numpy()],
        [(x, [0] * 8)],
        [None],
        [(x, y[:3])],
    )
    for verb, call in verbs.items():
        yield from each(f"{verb}(data)", none, call, DATA, "data must be")
        for number, data in enumerate(empty):
            says = "no length" if verb == "train" and number in (2, 3) else "No "
            yield Hazard(f"{verb}: empty {number}", partial(call, data), DATA, says)
        for number, data in enumerate(forms):
            yield Hazard(f"{verb}: form {number}", partial(call, data), DATA, "batch")
        yield Hazard(f"{verb}: PIL", partial(call, _Broken((picture, 0), (picture, 1))), DATA, "transform")
        yield Hazard(f"{verb}: sizes", partial(call, odd), DATA, "one size")
        labels = {
            "out of range": (y + 4, "4 to 4"), "negative": (y - 1, "-1 to -1"), "from one": (y + 1 + 3, "4"),
            "floats": (y.float(), "labels.long()"), "flags": (y.bool(), "class numbers"),
            "two columns": (torch.zeros(8, 2).long(), "shape (8, 2)"), "all ignored": (y - 100, "ignored"),
            "three dimensions": (y[:, None, None], "shape"), "rows of sum 2": (torch.full((8, 4), 0.5), "sum 2"),
            "probabilities of NaN": (torch.full((8, 4), NAN), "probabilities"), "too few": (y[:5], "5 labels"),
            "one number": (torch.tensor(3), "single number"), "complex": (y + 1j, "complex"),
        }  # fmt: skip
        for what, (bad, says) in labels.items():
            how = partial(lambda call, bad: call(W.labelled(bad)), call, bad)
            yield Hazard(f"{verb}: labels, {what}", how, DATA, says)
        if verb != "train":
            yield Hazard(f"{verb}: half labelled", partial(call, unlike), DATA, "for all samples or for none")
        sizes = [(torch.zeros(4, 5, 8, 8), y[:4])]
        yield Hazard(f"{verb}: channels", partial(call, sizes), CAPTURE, "5 channels, not 3")
        flat = [(torch.zeros(4, 3, 64), y[:4])]
        yield Hazard(f"{verb}: dimensions", partial(call, flat), CAPTURE, "3 dimensions, not 4")
        pixels = [(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), y[:4])]
        yield Hazard(f"{verb}: bytes", partial(call, pixels), CAPTURE, "uint8")
    yield Hazard("train: no labels", lambda: ee.train(W.model, [x], QUICK), DATA, "no labels")
    yield Hazard("train: one pass of two", lambda: ee.train(W.model, iter([(x, y)]), replace(QUICK, epochs=2)),
                 DATA, "used up")  # fmt: skip
    yield Hazard("train: no length", lambda: ee.train(W.model, _Stream(), QUICK), DATA, "")
    yield from each("unlabelled", (None, 5, "x", {"x": x}), ee.unlabelled, DATA, "data must be")
    maps = ("cat", 3, [], [0, 1, 2, 9], ["cat"], {"a": 0}, {0: "dog"}, [0, None, 1, 2])
    yield from each("class_map", maps, lambda m: ee.record(W.model, W.data, class_map=m), CONFIG, "class_map")


def verb_hazards() -> Iterator[Hazard]:
    others = (None, "adapter", net())
    calls: dict[str, Callable[[Any], object]] = {
        "train": lambda m: ee.train(m, W.data, QUICK),
        "calibrate": lambda m: ee.calibrate(m, W.data),
        "evaluate": lambda m: ee.evaluate(m, W.data),
        "record": lambda m: ee.record(m, W.data),
        "measure": lambda m: measure(m, W.sample),
        "verdict": lambda m: ee.verdict(m, W.data, {"small": (0.5, 0.5)}),
        "prune_exits": lambda m: ee.prune_exits(m, W.records),
    }
    for name, call in calls.items():
        yield from each(f"{name}(branched)", others, call, CONFIG, "branched must be")
    sizes = ("8", 0, -1, 1.5, None, True)
    sized: dict[str, Callable[[Any], object]] = {
        "calibrate": lambda b: ee.calibrate(W.model, W.data, batch_size=b),
        "evaluate": lambda b: ee.evaluate(W.model, W.data, batch_size=b),
        "record": lambda b: ee.record(W.model, W.data, batch_size=b),
        "measure": lambda b: measure(W.model, W.sample, batch_size=b),
        "batches": lambda b: next(ee.batches(W.data, b)),
    }
    for name, call in sized.items():
        yield from each(f"{name}(batch_size)", sizes, call, CONFIG, "batch_size")
    yield from each("calibrate(method)", ("serach", None, 3), lambda p: ee.calibrate(W.model, W.data, method=p),
                    NAME, "calibrator")  # fmt: skip
    yield from each("calibrate(scores)", (3, [3], [], [None]), lambda s: ee.calibrate(W.model, W.data, scores=s),
                    CONFIG, "scores")  # fmt: skip
    unknown = ("maxprob", ["entropy", "x"])
    yield from each("calibrate(scores)", unknown, lambda s: ee.calibrate(W.model, W.data, scores=s), NAME, "score")
    yield Hazard("calibrate: units", lambda: ee.calibrate(W.model, W.data, scores="learned"), CONFIG, "unit")
    yield Hazard("calibrate: two ways", lambda: ee.calibrate(W.model, W.data, method="cascade", scores=["margin"]),
                 CONFIG, "own score")  # fmt: skip
    yield from each("train(config)", ({"epochs": 1}, "fast", 3, Config), lambda c: ee.train(W.model, W.data, c),
                    CONFIG, "config must be")  # fmt: skip
    yield from each("train(joint)", ("yes", 1, None), lambda j: ee.train(W.model, W.data, QUICK, joint=j),
                    CONFIG, "joint")  # fmt: skip
    for name, call in {"train": partial(lambda a: ee.train(W.model, W.data, QUICK, accelerator=a)),
                       "record": lambda a: ee.record(W.model, W.data, accelerator=a)}.items():  # fmt: skip
        yield from each(f"{name}(accelerator)", ("cuda", 3), call, CONFIG, "accelerator")
    yield from each("train(validation)", (5, "held out", {"x": 1}),
                    lambda v: ee.train(W.model, W.data, QUICK, validation=v), DATA, "data must be")  # fmt: skip
    yield Hazard("objective without units", lambda: ee.train(W.model, W.data, replace(QUICK, objective="cumulative")),
                 CONFIG, "unit")  # fmt: skip
    yield Hazard("weights of other exits", lambda: ee.train(W.model, W.data, replace(
        QUICK, objective="weighted_ce", exit_weights=(1.0,) * 5)), CONFIG, "exit_weights")  # fmt: skip
    yield Hazard("frozen original alone", lambda: ee.train(W.model, W.data, replace(QUICK, objective="final_only")),
                 CONFIG, "joint=True")  # fmt: skip
    yield from each("measure(inputs)", (None, [W.sample], "x", {}, np.zeros(3)), lambda i: measure(W.model, i),
                    DATA, "inputs must be")  # fmt: skip
    yield from each("measure(rounds)", (0, "9", 1.5), lambda r: measure(W.model, W.sample, rounds=r), CONFIG,
                    "rounds")  # fmt: skip
    yield from each("measure(warmup)", (-1, "2", NAN), lambda w: measure(W.model, W.sample, warmup=w), CONFIG,
                    "warmup")  # fmt: skip
    yield Hazard("measure: too few", lambda: measure(W.model, W.sample, batch_size=9), DATA, "a batch of 9")
    smaller = (
        [],
        "small",
        {"small": 0.5},
        {"small": (0.5,)},
        {"small": (2, 0.5)},
        {"small": ("a", "b")},
        {"small": None},
    )
    yield from each("verdict", smaller, lambda a: ee.verdict(W.model, W.data, a), CONFIG, "alternatives")
    yield Hazard("verdict: not calibrated", lambda: ee.verdict(W.fresh, W.data, {}), POINT, "calibrate")
    yield from each("prune_exits(drop)", ("1%", 2, NAN), lambda d: ee.prune_exits(W.model, W.records, d),
                    CONFIG, "max_accuracy_drop")  # fmt: skip
    yield Hazard("prune by other records", lambda: ee.prune_exits(W.model, W.records.keep([0])), DATA, "exits")

    def searching(name: str) -> Callable[[Any], object]:
        return lambda value: ee.search_exits(W.graph, W.data, W.data, **{name: value})

    for name, values in {
        "cost": ("flops", None), "max_accuracy_drop": ("1%", 2, NAN), "most": (0, "six"), "points": (0, True, 1.5),
        "probe_steps": (0, "many", 1.5), "seed": (-1, "x"), "branch": (None, 3, [None]),
    }.items():  # fmt: skip
        error = EXIT if name == "points" else CONFIG
        for value in values:
            wrong = CONFIG if name == "points" and value != True else error  # noqa: E712
            yield Hazard(f"search_exits({name}={value!r})", partial(searching(name), value), wrong,
                         "exits" if wrong is EXIT else name)  # fmt: skip


def running_hazards() -> Iterator[Hazard]:
    calls: dict[str, Callable[..., object]] = {
        "call": lambda *a, **k: W.model(*a, **k),
        "predict": lambda *a, **k: W.model.predict(*a, **k),
        "all_exits": lambda *a, **k: W.model.all_exits(*a, **k),
    }
    x = W.sample
    for name, call in calls.items():
        yield from each(f"{name}(inputs)", (None, 5, "x", [x], x.numpy(), {}), call, DATA, "takes input tensors")
        yield Hazard(f"{name}()", call, DATA, "takes input tensors")
        yield Hazard(f"{name}(x, x)", partial(call, x, x), DATA, "got 2 of them")
        yield Hazard(f"{name}(pixels=)", partial(call, pixels=x), DATA, "pixels")
        yield Hazard(f"{name}: bytes", partial(call, x.byte()), CAPTURE, "uint8")
        yield Hazard(f"{name}: double", partial(call, x.double()), CAPTURE, "float64, not torch.float32")
        yield Hazard(f"{name}: half", partial(call, x.half()), CAPTURE, "float16, not torch.float32")
        yield Hazard(
            f"{name}: channels last", partial(call, x.permute(0, 2, 3, 1)), CAPTURE, "channels must come before"
        )
        yield Hazard(f"{name}: one picture", partial(call, x[0]), CAPTURE, "unsqueeze(0)")
        yield Hazard(f"{name}: video", partial(call, x[None]), CAPTURE, "flatten(0, 1)")
        yield Hazard(f"{name}: meta", partial(call, x.to("meta")), CAPTURE, "meta")
    yield from each("with_exits", (3, None, [3], []), lambda e: W.model.with_exits(e), EXIT, "exits")
    yield from each("with_exits", (["6"], ["5"]), lambda e: W.model.with_exits(e), EXIT, "")


# --- sharing, the command line


def sharing_hazards() -> Iterator[Hazard]:
    folders = (None, 3, "", True, ["a"], "a\0b")
    yield from each("save_pretrained", folders, lambda f: W.model.save_pretrained(f), CONFIG, "folder must be")
    yield from each("from_pretrained", folders, lambda f: ee.from_pretrained(f), CONFIG, "source must be")
    yield from each("push_to_hub", (None, 3, ""), lambda r: W.model.push_to_hub(r), CONFIG, "repo_id")
    yield Hazard("from_pretrained: missing", lambda: ee.from_pretrained("no/such/folder/here"), ee.HubError, "no/such")
    yield Hazard("from_pretrained: file", lambda: ee.from_pretrained(__file__), ee.HubError, "not a folder")
    yield Hazard("from_pretrained: empty", lambda: ee.from_pretrained(_folder("empty")), ADAPTER, "")
    yield Hazard("save_pretrained: file", lambda: W.model.save_pretrained(__file__), ADAPTER, "")
    yield from each("from_pretrained(model)", ("resnet18", nn.Linear, 3), lambda m: ee.from_pretrained(_adapter(), m),
                    CONFIG, "model must be")  # fmt: skip
    yield Hazard("from_pretrained: another", lambda: ee.from_pretrained(_adapter(), net(5)), ee.FingerprintError, "")
    yield Hazard("from_pretrained: no base", lambda: ee.from_pretrained(_adapter()), ADAPTER, "model=")
    cards = {"licence": "mit", "license": 3, "datasets": [3], "tags": "\n", "eval_task": "x"}
    for name, value in cards.items():
        how = partial(lambda name, value: W.model.save_pretrained(_folder("card"), **{name: value}), name, value)
        yield Hazard(f"card({name})", how, CONFIG, name)
    yield from each("records.load", (__file__, "/no/such/file"), ee.ExitRecords.load, DATA, "exit records")
    yield from each("Frontier.from_dict", ({}, {"format_version": 99}, {"format_version": 1}), ee.Frontier.from_dict,
                    DATA, "frontier")  # fmt: skip


_TEMPORARY = tempfile.TemporaryDirectory(prefix="hazards")  # removed with it


def _root() -> Path:
    return Path(_TEMPORARY.name)


def _folder(name: str) -> Path:
    folder = _root() / name
    folder.mkdir(exist_ok=True)
    return folder


@cache
def _adapter() -> Path:
    return W.model.save_pretrained(_folder("adapter"))


@cache
def _pictures(kind: str) -> str:
    """A folder of pictures in two classes, one of them damaged where it is said."""
    for name in ("0", "1"):
        folder = _folder(kind) / name
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (160, 160)).save(folder / "0.png")
    if kind == "damaged":
        (_folder(kind) / "1" / "0.png").write_bytes(b"no picture")
    return str(_folder(kind))


CLI: dict[str, tuple[str, str]] = {
    "inspect no_such_model": ("DataError", "timm.list_models"),
    "inspect {here}/a_file": ("DataError", "Cannot create"),
    "augment test_resnet --random-weights --out {here}/x --exits 2.5": ("ExitPointError", "'2.5'"),
    "augment test_resnet --random-weights --out {here}/x --exits 0": ("ExitPointError", "exits must be"),
    "augment test_resnet --random-weights --out {here}/x --exits -1": ("ExitPointError", "exits must be"),
    "augment test_resnet --random-weights --out {here}/x --exits nope": ("ExitPointError", "'nope'"),
    "augment test_resnet --random-weights --out {here}/x --placement liner": ("UnknownNameError", "'linear'"),
    "augment test_resnet --random-weights --out {here}/x --branch pol": ("UnknownNameError", "'pool'"),
    "augment test_resnet --out {here}/x --preset sdm": ("UnknownNameError", "'sdn'"),
    "augment test_resnet --out {here}/x --epochs 0": ("ConfigError", "epochs must be"),
    "augment test_resnet --out {here}/x --batch-size -1": ("ConfigError", "batch_size must be"),
    "augment test_resnet --out {here}/a_file": ("ConfigError", "is a file"),
    "augment test_resnet --random-weights --out {here}/x --max-accuracy-drop 2": ("ConfigError", "max_accuracy_drop"),
    "augment test_resnet --random-weights --out {here}/x --exits auto": ("ConfigError", "calibrate="),
    "augment test_resnet --random-weights --out {here}/x --train {here}/nothing": ("DataError", "no images"),
    "augment test_resnet --random-weights --out {here}/x --train {here}/a_file": ("DataError", "no images"),
    "augment test_resnet --checkpoint {here}/none.pt --out {here}/x": ("DataError", "Cannot create"),
    "augment test_resnet --random-weights --out {here}/x --train {damaged} --unlabelled": ("DataError", "0.png"),
    "calibrate {here}/nothing --data {here}": ("HubError", "nothing"),
    "calibrate {here}/a_file --data {here}": ("HubError", "a_file"),
    "calibrate {adapter} --data {good} --budget nan": ("ConfigError", "--budget"),
    "calibrate {adapter} --data {good} --max-accuracy-drop 5": ("ConfigError", "--max-accuracy-drop"),
    "calibrate {adapter} --data {good} --max-accuracy-drop 0.1 --budget 0.5": ("ConfigError", "not both"),
    "evaluate {adapter} --data {good} --budget -1": ("ConfigError", "--budget"),
    "evaluate {adapter} --data {good}": ("AdapterError", "model="),
    "bench {adapter} --data {good} --threads 0": ("ConfigError", "--threads"),
    "bench {adapter} --data {good} --samples 0": ("ConfigError", "--samples"),
    "bench {adapter} --data {good} --batch-size 0": ("ConfigError", "--batch-size"),
    "card {here}/nothing": ("AdapterError", "nothing"),
    "card {adapter} --eval-task x": ("ConfigError", "eval_dataset"),
    "push {here}/nothing user/name": ("AdapterError", "nothing"),
    "pull no-such-name --out {here}": ("ConfigError", "already exists"),
}


TABLE = [
    hazard
    for group in (
        config_hazards, model_hazards, place_hazards, branch_hazards, preset_hazards, operate_hazards, policy_hazards,
        records_hazards, calibrator_hazards, risk_hazards, data_hazards, verb_hazards, running_hazards, sharing_hazards,
    )
    for hazard in group()
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hazard", TABLE, ids=[hazard.name for hazard in TABLE])
def test_bad_input_gets_a_clear_error_of_ours_and_changes_nothing(hazard: Hazard) -> None:
    before = W.state()
    with pytest.raises(ee.SurgeryError) as caught:
        hazard.how()
    assert isinstance(caught.value, hazard.error), f"{type(caught.value).__name__}: {caught.value}"
    assert hazard.says in str(caught.value)
    assert str(caught.value).strip()
    assert len(str(caught.value)) < 1500
    assert W.state() == before


@pytest.mark.parametrize("line", CLI)
def test_the_command_line_says_what_was_wrong_in_one_sentence(line: str) -> None:
    (_root() / "a_file").write_text("nothing of a model")
    here = {"here": _root(), "adapter": _adapter(), "good": _pictures("good"), "damaged": _pictures("damaged")}
    files = sorted(path.relative_to(_root()) for path in _root().rglob("*"))
    result = CliRunner().invoke(app, line.format(**here).split(), env={"COLUMNS": "500"})
    error, says = CLI[line]
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert error in result.output
    assert says in result.output
    assert "Traceback" not in result.output
    left = sorted(path.relative_to(_root()) for path in _root().rglob("*"))
    assert [path for path in left if path not in files and path.parts[0] != "x.training"] == []


# --- what is taken


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5), Fraction(1, 2)], ids=_label
)
def test_a_number_is_a_number_of_whatever_library(value: Any) -> None:
    for name in ("distill", "ema", "lr", "weight_decay", "momentum", "validation", "survivor", "clip_grad", "cutmix"):
        found = getattr(Config(**{name: value}), name)
        assert type(found) is float
        assert found == 0.5
    assert Config(milestones=[value]).milestones == (0.5,)
    assert Config(exit_weights=[value, 1]).exit_weights == (0.5, 1)
    assert ee.ThresholdPolicy((value, INF)).thresholds == (0.5, INF)
    point = W.fresh.operate(thresholds=value)
    assert point is not None
    assert point.thresholds == (0.5, 0.5)
    assert W.fresh.operate(None) is None
    assert W.frontier.at(max_accuracy_drop=value) is W.frontier.at(max_accuracy_drop=0.5)
    assert W.frontier.at(budget=value + value) is W.frontier.at(budget=1)
    assert ee.risk_control(W.records, value, value).certificate == ee.risk_control(W.records, 0.5, 0.5).certificate


@pytest.mark.parametrize("value", [2, 2.0, np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)], ids=_label)
def test_a_whole_number_is_one_of_whatever_library(value: Any) -> None:
    for name in ("epochs", "max_steps", "batch_size", "views", "num_workers", "seed", "accumulate"):
        found = getattr(Config(**{name: value}), name)
        assert type(found) is int
        assert found == 2
    assert ee.place(W.graph, value).names == ee.place(W.graph, 2).names
    assert len(next(ee.batches(W.data, value))[0]) == 2
    assert ee.attach(W.graph, W.plan, Spec("mlp", options={"hidden": value})).branches[0].classifier.in_features == 2


@pytest.mark.parametrize("given", [[0.5, INF], (0.5, INF), np.array([0.5, INF]), torch.tensor([0.5, INF])], ids=type)
def test_thresholds_come_in_any_list(given: Any) -> None:
    point = W.fresh.operate(thresholds=given)
    assert point is not None
    assert point.thresholds == (0.5, INF)
    assert all(type(value) is float for value in point.thresholds)
    W.fresh.operate(None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_training_learns_the_same_wherever_gradients_are_off(mode: Callable[[], Any]) -> None:
    def trained() -> ee.EarlyExitModel:
        branched = ee.attach(W.graph, W.plan, "pool")
        with mode():
            ee.train(branched, W.data, QUICK)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        return branched

    found, start = trained().branches.state_dict(), ee.attach(W.graph, W.plan, "pool").branches
    plain = ee.attach(W.graph, W.plan, "pool")
    ee.train(plain, W.data, QUICK)
    assert all(torch.equal(tensor, plain.branches.state_dict()[name]) for name, tensor in found.items())
    assert not all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in found.items())


def test_training_that_fails_after_its_first_step_leaves_no_stale_thresholds() -> None:
    branched = ee.attach(W.graph, W.plan, "pool")
    ee.calibrate(branched, W.data)
    branched.operate(thresholds=0.5)
    x, y = W.data.tensors
    with pytest.raises(DATA, match="4 to 4"):
        ee.train(branched, [(x[:8], y[:8]), (x[8:16], y[8:16] * 0 + 4)], QUICK)
    assert branched.frontier is None
    assert branched.operating_point is None


# --- what is not finite never leaves


class _Poisoned(ee.Branch):
    """Answers, by the first number of the features, with NaN or infinity in a logit or in its confidence."""

    def __init__(self, point: ee.ExitPoint, num_classes: int, confidence: bool = False) -> None:
        super().__init__(point, num_classes, confidence, point.shape[0])

    def vector(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return features.mean((2, 3))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> ee.ExitLogits:
        answer = super().forward(features)
        kind, logits = _kind(features), 100 * answer.logits
        for number, bad in enumerate((NAN, INF, -INF)):
            logits[kind == number, 1] = bad
        confidence = answer.confidence
        if confidence is not None:
            confidence = torch.sin(features.sum((1, 2, 3)))
            for number, bad in enumerate((NAN, INF, -INF), 3):
                confidence[kind == number] = bad
        return ee.ExitLogits(logits, confidence)


def _kind(features: Tensor) -> Tensor:
    """0 to 2: logits that are not finite; 3 to 5: such a confidence; others: none."""
    return (features.sum((1, 2, 3)) * 10).long() % 9


@pytest.fixture(scope="module")
def poisoned() -> Iterator[ee.EarlyExitModel]:
    ee.BRANCHES.register("poisoned")(_Poisoned)
    try:
        yield ee.attach(W.graph, W.plan, Spec("poisoned", confidence=True))
    finally:
        del ee.BRANCHES._items["poisoned"]


@pytest.mark.parametrize("fallback", ["last", "most_confident"])
@pytest.mark.parametrize("tau", [-INF, -1e30, 0.0, 0.5])
@pytest.mark.parametrize("score", ["max_prob", "margin", "entropy", "learned", "patience"])
def test_what_is_not_finite_never_leaves_routed_as_replayed(
    poisoned: ee.EarlyExitModel, score: str, tau: float, fallback: Any
) -> None:
    pictures = W.data.tensors[0]
    records = ee.record(poisoned, ee.unlabelled(W.data))
    point = replace(ee.OperatingPoint.by_hand((tau, tau), score), fallback=fallback)
    poisoned.operate(point)
    replay = records.replay(point.policy)
    features = poisoned.engine.features_alone(pictures)
    reads = (0, 1, 2, 3, 4, 5) if score == "learned" else (0, 1, 2)
    for k, (read, *_) in enumerate(features):
        bad = torch.isin(_kind(read), torch.tensor(reads))
        assert bad.any()
        assert not (replay.exit_index[bad] == k).any()
    assert (replay.exit_index < 2).any()
    for size in (64, 7, 1):
        found = [poisoned.predict(batch) for batch in pictures.split(size)]
        assert torch.equal(torch.cat([out.exit_index for out in found]), replay.exit_index)
        answers = torch.cat([out.logits for out in found])
        wanted = records.logits[replay.answer_index, torch.arange(64)]
        torch.testing.assert_close(answers, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


class _Wild(ee.FittedScore):
    """The first logit, whatever it is."""

    kind = "wild"

    def __call__(self, logits: Tensor, confidence: Any, state: Any, exit_index: int) -> tuple[Tensor, Any]:
        return logits[:, 0] * 3e38, ()


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, -1.0, 30.0, NAN, INF, -INF])] * 3), min_size=2, max_size=12),
    st.sampled_from([-INF, -1e38, 0.0, 1e38, INF]),
    st.sampled_from(["max_prob", "margin", "entropy", "wild"]),
)
@settings(max_examples=100)
def test_a_score_that_is_not_finite_never_leaves(rows: list[tuple[float, ...]], tau: float, score: str) -> None:
    logits = torch.tensor(rows)[None].repeat(2, 1, 1)
    records = ee.ExitRecords(("a",), logits, (1, 2), (1,))
    policy = ee.ThresholdPolicy((tau,), _Wild() if score == "wild" else score)
    leaves = policy.decide(0, logits[0], None, ()).leaves
    assert torch.equal(leaves, records.replay(policy).exit_index == 0)
    assert leaves.tolist() == [policy.decide_one(0, row[None], None, ())[0] for row in logits[0]]
    for row, left in zip(rows, leaves.tolist(), strict=True):
        value = (torch.tensor(row[0]) * 3e38).item() if score == "wild" else 0.0
        if not all(map(math.isfinite, row)) or not math.isfinite(value):
            assert not left
        elif tau == -INF:
            assert left


def test_twenty_thousand_classes_in_float16_are_as_certain_as_in_float32() -> None:
    logits = torch.full((4, 20_000), 9.0)  # the sum overflows float16
    logits[:, 5] = torch.tensor([10.0, 15.0, 20.0, 25.0])
    for score in ("max_prob", "margin", "entropy"):
        policy = ee.ThresholdPolicy((0.5,), score)
        half, full = (policy.decide(0, z, None, ()) for z in (logits.half(), logits))
        torch.testing.assert_close(half.score, full.score)
        assert half.score.dtype == torch.float32
        assert half.leaves.tolist() == full.leaves.tolist() == [False, False, True, True]
        assert [policy.decide_one(0, z[None], None, ())[0] for z in logits.half()] == half.leaves.tolist()
    assert torch.equal(certainty(logits.half()), certainty(logits))


def test_trying_an_operating_point_costs_less_than_a_call() -> None:
    started = time.perf_counter()
    for _ in range(20):
        W.fresh.operate(thresholds=0.5, score="learned")
    assert (time.perf_counter() - started) / 20 < 0.02
    W.fresh.operate(None)
