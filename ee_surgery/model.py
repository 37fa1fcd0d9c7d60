"""EarlyExitModel: a pretrained model with branches and an adjustable operating point."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.backbone.base import Output
from ee_surgery.backbone.inputs import Arguments, Inputs
from ee_surgery.branches import BranchSpec
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.calibration.choosing import UNSAID, chosen
from ee_surgery.checks import instance, names
from ee_surgery.errors import BranchError, ConfigError, DataError, ExitPointError, OperatingPointError
from ee_surgery.export.served import ServedModel
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.inspection import inspect, read
from ee_surgery.placement import ExitPlan, place
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import FittedScore
from ee_surgery.runtime.engine import Engine
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.share.state import AdapterState
from ee_surgery.task import Task
from ee_surgery.text import visible

_SHAPES_THE_ANSWER = frozenset({"labels", "return_dict", "output_attentions", "output_hidden_states"})


class EarlyExitModel(ServedModel):
    """A pretrained model with branches. Built by `attach`, `augment` or `from_pretrained`.

    The original is held by reference: `.to(device)` moves it along, and nothing here ever changes its parameters,
    its buffers or its training flags. Until an operating point is set, the output is the original's own.
    """

    def __init__(
        self, graph: ModelGraph, plan: ExitPlan, specs: Sequence[BranchSpec], branches: BranchBank,
        backend: str = "python",
    ) -> None:  # fmt: skip
        super().__init__()
        self.add_module("original", graph.backbone.model)  # its name in the state_dict; `backbone` everywhere else
        self.plan = plan
        self.specs = tuple(specs)
        self.branches = branches
        self.sample: Arguments = graph.backbone.sample
        """Inputs of the size it was augmented with: four samples, by name."""
        self.num_classes = graph.backbone.num_classes
        """How many classes it tells apart."""
        self.state = AdapterState(preprocessing=graph.backbone.preprocessing)
        """What travels with the branches; see `AdapterState`."""
        self._before = graph.backbone.digests()
        weights = next(graph.backbone.model.parameters(), None)
        if weights is not None:
            self.branches.to(weights.device, weights.dtype if weights.is_floating_point() else None)
        self.engine = Engine(graph, plan, branches, backend)
        """What runs it: programs by input signature, the backend of their stages, observers of routed runs."""
        self.trunk_macs, self.branch_macs = self.engine.trunk_macs, self.engine.branch_macs
        """MACs of the original up to each exit and in whole, and of each branch; one sample of that size."""
        self.train(False)

    # --- what it is

    @property
    def backbone(self) -> nn.Module:
        """The original object."""
        return self.engine.backbone.model

    @property
    def exits(self) -> list[str]:
        """Names of the exit points, in program order; the original's own head comes after them."""
        return self.plan.names

    @property
    def task(self) -> Task:
        """What its answers are."""
        return self.engine.backbone.task

    def __repr__(self) -> str:
        whole, untrained = self.trunk_macs[-1], self.untrained
        each = zip(self.exits, self.specs, self.trunk_macs, self.branch_macs, strict=False)
        lines = [
            f"  {visible(name):32} {trunk / whole:6.1%} + {branch / whole:5.1%}  {visible(spec.name)}"
            f"{', untrained' if name in untrained else ''}"
            for name, spec, trunk, branch in each
        ]
        known = "" if self.frontier is None else f"; frontier of {len(self.frontier)} points"
        point = "no operating point: no sample leaves early" if self.operating_point is None else self.operating_point
        head = f"{type(self).__name__} of {visible(self.engine.backbone.model_id)}, {whole / 1e6:,.1f} MMACs; exits:"
        return "\n".join([head, *lines, f"  {point}{known}"])

    @torch.inference_mode(False)  # weights that are copied in inference mode can never learn
    def copy(self) -> EarlyExitModel:
        """An independent model: a copy of the original with copies of the branches, and all of the state."""
        mine = self.engine.backbone
        classes = mine.num_classes if mine.headless else None
        known = {"opaque": mine.opaque, "num_classes": classes, "output": mine.output, "task": mine.task}
        graph = inspect(deepcopy(self.backbone), mine.sample, **known)
        points = tuple(graph[name] for name in self.exits)
        return self._alike(graph, points, self.specs, deepcopy(self.branches), self.state.copy())

    def with_exits(self, exits: Sequence[str]) -> EarlyExitModel:
        """A model on the same original that has some of these branches only, the very same ones.

        No sample leaves early yet: frontier, operating point and evaluation held for all of the exits. The rest of the
        state goes along.

        Raises:
            ExitPointError: no exit of that name, or none at all.
            BranchError: the branches read each other's answers.
        """
        if self.branches.chained:
            raise BranchError("These branches read each other's answers: none of them can do without the others.")
        graph = read(self.engine.backbone)
        points = place(graph, names("exits", exits, ExitPointError)).points
        missing = [point.name for point in points if point.name not in self.exits]
        if missing:
            raise ExitPointError(f"No exits at {missing}, only at {self.exits}.")
        kept = [self.exits.index(point.name) for point in points]
        bank = BranchBank([self.branches[k] for k in kept], self.branches.head)
        other = self._alike(graph, points, [self.specs[k] for k in kept], bank, self.state.unmeasured())
        other._before = self._before
        return other

    def _alike(
        self, graph: ModelGraph, points: tuple[ExitPoint, ...], specs: Sequence[BranchSpec], branches: BranchBank,
        state: AdapterState,
    ) -> EarlyExitModel:  # fmt: skip
        """Another model that runs in the same way."""
        plan = ExitPlan(self.plan.model_id, self.plan.rule, points)
        other = EarlyExitModel(graph, plan, specs, branches, self.engine.backend)
        other.state, other.engine.observers = state, self.engine.observers
        other.engine.compilation = self.engine.compilation
        return other

    # --- when to leave

    def operate(
        self,
        point: OperatingPoint | None = UNSAID,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        latency_ms: float | None = None,
        risk: tuple[float, float] | None = None,
        risk_of: str | None = None,
        thresholds: Sequence[float] | float | None = None,
        score: str | FittedScore | None = None,
    ) -> OperatingPoint | None:
        """Set when samples leave. Takes microseconds: nothing is captured, trained or searched again.

        Args:
            point: an operating point, e.g. of `frontier`; `operate(None)` alone: never leave early.
            max_accuracy_drop: the cheapest point of the frontier within this drop; 0.01 is one percentage point.
            budget: the most accurate one within this fraction of the original's MACs.
            latency_ms: the most accurate one within this mean time of a batch, where a profile was calibrated with.
            risk: (eps, delta): the cheapest one certified to differ from the original on at most a share eps of new
                samples, with confidence 1 - delta. The certificate is on the point.
            risk_of: `disagreement` (when left out), or `accuracy_gap` where the calibration data had labels.
            thresholds: one per branch, or one for all; their accuracy is unknown then. inf closes an exit.
            score: what thresholds are compared with; `max_prob` when left out, `learned` where answers are no
                choices.
        Returns:
            The operating point now in force; None for never.
        Raises:
            OperatingPointError: none or more than one of them, one of the wrong kind or outside its range, no frontier
                yet, or none of its points meets the request. The operating point stays what it was.
            UnknownNameError: no such score.
            ConfigError: the score needs confidence units that the branches do not have.
        """
        wanted = {"max_accuracy_drop": max_accuracy_drop, "budget": budget, "latency_ms": latency_ms, "risk": risk}
        score = self.task.default_score if score is None and thresholds is not None else score
        by_hand = {"thresholds": thresholds, "score": score}
        found = chosen(self.frontier, len(self.branches), point, **wanted, risk_of=risk_of, **by_hand)
        if latency_ms is not None and self.frontier is not None and self.frontier.profile is not None:
            self.frontier.profile.check_device(next(self.branches.parameters()).device)
        return self._set(found)

    def _set(self, point: OperatingPoint | None) -> OperatingPoint | None:
        if point is not None:
            hint = "Numbers go by name: thresholds=, max_accuracy_drop= or budget=."
            policy = instance("point", point, OperatingPoint, OperatingPointError, hint).policy_for(self.task)
            policy.check(self.num_classes, self.branches.units, self.branches.chained)
        self.state.operating_point = point
        return point

    @property
    def operating_point(self) -> OperatingPoint | None:
        """The operating point that was set last; None for never leaving."""
        return self.state.operating_point

    @property
    def policy(self) -> ThresholdPolicy | None:
        """The policy in force here; None when nothing leaves early."""
        point = self.state.operating_point  # read once: another thread may move the knob meanwhile
        return None if point is None or point.policy.closed or self.engine.is_disabled else point.policy_for(self.task)

    def exits_disabled(self) -> AbstractContextManager[None]:
        """Run the original, bit for bit, in this thread or asyncio task only.

        Work that is handed to other threads meanwhile keeps its exits, unless the context is handed on, as
        `asyncio.to_thread` does.
        """
        return self.engine.disabled()

    def unload(self) -> nn.Module:
        """The original object. Nothing was ever put on it, so there is nothing to remove."""
        return self.backbone

    # --- running

    def forward(self, *inputs: Inputs, **named: Any) -> Output:
        """What the original answers with, of the same type; easy samples leave early where an operating point says so.

        Args:
            inputs: what the original takes: a tensor of shape (B, ...), or a dict of them.
            named: or keywords such as `pixel_values=`, `input_ids=`, `attention_mask=`.
        """
        if torch.compiler.is_dynamo_compiling():  # is_compiling is also true while another thread exports
            run: Any = torch.compiler.disable(self._traced)
            return run(*inputs, **named)
        backbone, policy = self.engine.backbone, self.policy
        if policy is None and self.branches.head is None:
            return backbone(backbone.arguments(*inputs, **named))
        batch = backbone.batch(*inputs, **named)
        shaping = sorted(_SHAPES_THE_ANSWER.intersection(batch.arguments))
        if shaping:
            raise DataError(f"An early exit answers with logits alone: leave out {shaping}, or call `.backbone`.")
        return backbone.answer(self.engine.run(batch, policy).logits)

    def _traced(self, *inputs: Inputs, **named: Any) -> Output:
        if self.engine.compilation is None:
            raise ConfigError(
                "torch.compile cannot follow samples that leave: call branched.compile(), which takes its options and "
                "works in place, and use the model itself."
            )
        return self(*inputs, **named)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What transformers' Trainer asks a model first. It would train the original, so it is refused here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "transformers' Trainer takes the wrapped model, whose parameters are the branches: "
            "Trainer(EarlyExitForImageClassification.of(branched), ...), from ee_surgery.integrations.transformers, or "
            "the class of its task. Or call ee.train(branched, data)."
        )

    def predict(self, *inputs: Inputs, **named: Any) -> ExitOutput:
        """Run with early exit; logits, exit taken, score there and MACs of every sample.

        Args:
            inputs: as for a call; a new batch size costs nothing, a new image size, text length, dtype or device is
                captured on first use and kept.
            named: as for a call.
        """
        return self.engine.run(self.engine.backbone.batch(*inputs, **named), self.policy)

    def all_exits(self, *inputs: Inputs, **named: Any) -> Tensor:
        """Logits of every exit for every sample, (K, B, C, ...), the original's last; no sample leaves."""
        answers, logits = self.engine.answers(*inputs, **named)
        own = [self.task.enlarge(answer.logits, logits.shape[1:]) for answer in answers]
        return torch.stack([*own, logits])

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Put the branches in train or eval mode. The original stays as it is, and always runs in eval mode."""
        self.training = mode
        self.branches.train(mode)
        return self
