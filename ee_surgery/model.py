"""EarlyExitModel: a pretrained model with branches, and a knob for when to leave."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ee_surgery.backbone.base import Output
from ee_surgery.backbone.inputs import Arguments, Inputs, batch_size, tensors
from ee_surgery.branches import BranchSpec
from ee_surgery.branches.base import ExitLogits
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.checks import instance, names, path, word
from ee_surgery.errors import BranchError, DataError, ExitPointError, OperatingPointError
from ee_surgery.graph.exit_points import ModelGraph
from ee_surgery.graph.inspection import inspect, read
from ee_surgery.placement import ExitPlan, place
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import FittedScore
from ee_surgery.receipt import Receipt
from ee_surgery.runtime.engine import Engine, eval_mode
from ee_surgery.runtime.program import Program
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.share.adapter import AdapterConfig, change_adapter, save_adapter
from ee_surgery.share.card import CardInfo, save_card
from ee_surgery.share.hub import push_folder
from ee_surgery.share.probe import Probe
from ee_surgery.share.processor import find_processor, picture_transform, processor_settings, save_processor

_UNSAID: Any = object()  # beside None, which means never leaving
_GOES_WITH = {"score": "thresholds", "risk_of": "risk"}
_SHAPES_THE_ANSWER = frozenset({"labels", "return_dict", "output_attentions", "output_hidden_states"})


class EarlyExitModel(nn.Module):
    """A pretrained model with branches. Built by `attach`, `augment` or `from_pretrained`.

    The original is held by reference: `.to(device)` moves it along, and nothing here ever changes its parameters,
    its buffers or its training flags. Until an operating point is set, the output is the original's own.
    """

    def __init__(self, graph: ModelGraph, plan: ExitPlan, specs: Sequence[BranchSpec], branches: BranchBank) -> None:
        super().__init__()
        self._backbone = graph.backbone
        self.original = graph.backbone.model
        self.plan = plan
        self.specs = tuple(specs)
        self.branches = branches
        self.own_base = False
        """Whether the original is a copy that was trained, and so is saved along."""
        self.provenance: dict[str, Any] = {}
        """Where the branches come from, as plain data, saved along: `training`, `evaluation`, `other_base`, `card`."""
        self.preprocessing: dict[str, Any] | None = self._backbone.preprocessing
        """What `timm.data.create_transform` takes to prepare pictures, where timm knows the original; saved along."""
        self.processor: Any = None
        """The image processor or tokenizer of transformers that was saved along, or will be."""
        self.frontier: Frontier | None = None
        self._setting: tuple[OperatingPoint | None, ThresholdPolicy | None] = (None, None)  # read and set at once
        self._before = graph.backbone.digests()
        weights = next(graph.backbone.model.parameters(), None)
        if weights is not None:
            self.branches.to(weights.device, weights.dtype if weights.is_floating_point() else None)
        self._engine = Engine(graph, plan, branches)
        self.trunk_macs = self._engine.trunk_macs
        """MACs of the original up to each exit and in whole, one sample of the size it was augmented with."""
        self.branch_macs = self._engine.branch_macs
        """MACs of each branch, one sample of that size."""
        self.train(False)

    # --- what it is

    @property
    def backbone(self) -> nn.Module:
        """The original object."""
        return self.original

    @property
    def exits(self) -> list[str]:
        """Names of the exit points, in program order; the original's own head comes after them."""
        return self.plan.names

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart."""
        return self._backbone.num_classes

    def receipt(self) -> Receipt:
        """Compare the original with when it was augmented: SHA-256 of every parameter and buffer, and its function."""
        return Receipt(self._before, self._backbone.digests(), tuple(self._backbone.altered), self.own_base)

    @property
    def sample(self) -> Arguments:
        """Inputs of the size it was augmented with: four samples, by name."""
        return self._backbone.sample

    def normal(self, *inputs: Inputs, **named: Any) -> Arguments:
        """Inputs in their normal form: by the original's names, the main one first."""
        return self._backbone.arguments(*inputs, **named)

    @torch.inference_mode(False)  # weights that are copied in inference mode can never learn
    def copy(self) -> EarlyExitModel:
        """An independent model: a copy of the original with copies of the branches."""
        mine = self._backbone
        classes = mine.num_classes if mine.headless else None
        known = {"opaque": mine.opaque, "num_classes": classes, "output": mine.output}
        graph = inspect(deepcopy(self.original), mine.sample, **known)
        plan = ExitPlan(self.plan.model_id, self.plan.rule, tuple(graph[name] for name in self.exits))
        other = EarlyExitModel(graph, plan, self.specs, deepcopy(self.branches))
        other.preprocessing, other.processor = self.preprocessing, self.processor
        return other

    def with_exits(self, exits: Sequence[str]) -> EarlyExitModel:
        """A model on the same original that has some of these branches only, the very same ones; never leaving yet.

        Raises:
            ExitPointError: no exit of that name, or none at all.
            BranchError: the branches read each other's answers.
        """
        if self.branches.chained:
            raise BranchError("These branches read each other's answers: none of them can do without the others.")
        graph = read(self._backbone, self.sample)
        points = place(graph, names("exits", exits, ExitPointError)).points
        missing = [point.name for point in points if point.name not in self.exits]
        if missing:
            raise ExitPointError(f"No exits at {missing}, only at {self.exits}.")
        kept = [self.exits.index(point.name) for point in points]
        plan = ExitPlan(self.plan.model_id, self.plan.rule, points)
        bank = BranchBank([self.branches[k] for k in kept], self.branches.head)
        other = EarlyExitModel(graph, plan, [self.specs[k] for k in kept], bank)
        for name in ("own_base", "preprocessing", "processor", "_before"):
            setattr(other, name, getattr(self, name))
        other.provenance = {name: value for name, value in self.provenance.items() if name != "evaluation"}
        return other

    def rebase(self) -> None:
        """Declare the weights that the original has now a base of its own: receipts start here, and saves hold them.

        For a copy whose original was trained, `train(..., joint=True)`; never for an original that is shared.
        """
        self._before, self.own_base = self._backbone.digests(), True
        self._backbone.accept()

    # --- when to leave

    def operate(
        self,
        point: OperatingPoint | None = _UNSAID,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
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
            risk: (eps, delta): the cheapest one certified to differ from the original on at most a share eps of new
                samples, with confidence 1 - delta. The certificate is on the point.
            risk_of: `disagreement` (when left out), or `accuracy_gap` where the calibration data had labels.
            thresholds: one a branch, or one for all; nothing is known about their accuracy then. inf closes an exit.
            score: what thresholds are compared with; `max_prob` when left out.
        Returns:
            The operating point now in force; None for never.
        Raises:
            OperatingPointError: none or more than one of them, one of the wrong kind or outside its range, no frontier
                yet, or none of its points meets the request. The operating point stays what it was.
            UnknownNameError: no such score.
            ConfigError: the score needs confidence units that the branches do not have.
        """
        given = {
            "max_accuracy_drop": max_accuracy_drop,
            "budget": budget,
            "risk": risk,
            "thresholds": thresholds,
            "point": point,
        }
        asked = [name for name, value in given.items() if value is not None and value is not _UNSAID]
        if len(asked) > 1 or (not asked and point is _UNSAID):
            raise OperatingPointError(
                f"Give exactly one of max_accuracy_drop=, budget=, risk=, thresholds=; got {asked or 'none'}. "
                "operate(None): never leave early."
            )
        for name, value, owner in (("score", score, thresholds), ("risk_of", risk_of, risk)):
            if value is not None and owner is None:
                raise OperatingPointError(f"{name}= goes with {_GOES_WITH[name]}=, which was not given.")
        if thresholds is not None:
            return self._set(
                OperatingPoint.by_hand(thresholds, "max_prob" if score is None else score, len(self.branches))
            )
        if max_accuracy_drop is not None or budget is not None or risk is not None:
            if self.frontier is None:
                raise OperatingPointError("No frontier to choose from: run ee.calibrate(branched, held_out) first.")
            wanted = {"max_accuracy_drop": max_accuracy_drop, "budget": budget, "risk": risk}
            point = self.frontier.at(**wanted, risk_of="disagreement" if risk_of is None else risk_of)
        return self._set(point)

    def _set(self, point: OperatingPoint | None) -> OperatingPoint | None:
        policy = None
        if point is not None:
            hint = "Numbers go by name: thresholds=, max_accuracy_drop= or budget=."
            policy = instance("point", point, OperatingPoint, OperatingPointError, hint).policy
            policy.check(self.num_classes, self.branches.units, self.branches.chained)
        self._setting = point, None if policy is None or policy.closed else policy
        return point

    @property
    def operating_point(self) -> OperatingPoint | None:
        """The operating point that was set last; None for never leaving."""
        return self._setting[0]

    @property
    def policy(self) -> ThresholdPolicy | None:
        """The policy in force here; None when nothing leaves early."""
        return None if self._engine.is_disabled else self._setting[1]

    def exits_disabled(self) -> AbstractContextManager[None]:
        """The original to the bit, for a while, in this thread or asyncio task alone.

        Work that is handed to other threads meanwhile keeps its exits, unless the context is handed on, as
        `asyncio.to_thread` does.
        """
        return self._engine.disabled()

    def unload(self) -> nn.Module:
        """The original object. Nothing was ever put on it, so there is nothing to remove."""
        return self.original

    # --- running

    def forward(self, *inputs: Inputs, **named: Any) -> Output:
        """What the original answers with, of the same type; easy samples leave early where an operating point says so.

        Args:
            inputs: what the original takes: a tensor of shape (B, ...), or a dict of them.
            named: or keywords such as `pixel_values=`, `input_ids=`, `attention_mask=`.
        """
        arguments = self._backbone.arguments(*inputs, **named)
        policy = self.policy
        if policy is None and self.branches.head is None:
            return self._backbone(arguments)
        shaping = sorted(_SHAPES_THE_ANSWER.intersection(arguments))
        if shaping:
            raise DataError(f"An early exit answers with logits alone: leave out {shaping}, or call `.backbone`.")
        return self._backbone.answer(self._engine.run(arguments, policy).logits)

    def predict(self, *inputs: Inputs, **named: Any) -> ExitOutput:
        """Run with early exit; logits, exit taken, score there and MACs of every sample.

        Args:
            inputs: as for a call; a new batch size costs nothing, a new image size, text length, dtype or device is
                captured on first use and kept.
            named: as for a call.
        """
        return self._engine.run(self._backbone.arguments(*inputs, **named), self.policy)

    def all_exits(self, *inputs: Inputs, **named: Any) -> Tensor:
        """Logits of every exit for every sample, (K, B, C), the original's last; no sample leaves."""
        answers, logits = self.answers(*inputs, **named)
        return torch.stack([*(answer.logits for answer in answers), logits])

    def answers(self, *inputs: Inputs, **named: Any) -> tuple[list[ExitLogits], Tensor]:
        """The answer of every branch, and the original's logits (B, C), without gradients, in eval mode."""
        features, logits = self.features(*inputs, **named)
        with torch.no_grad(), eval_mode(list(self.branches.modules())):
            return self.split(self.branches(features), logits)

    def logits_of(self, arguments: Arguments) -> Tensor:
        """Logits of the original's own forward in whatever mode it is, with gradients: for training it."""
        return self._backbone.logits(self._backbone.call(arguments))

    def split(self, answers: list[ExitLogits], original: Tensor) -> tuple[list[ExitLogits], Tensor]:
        """What the bank answers, as the branches' answers and the last logits: the original's, or a new head's."""
        return (answers, original) if self.branches.head is None else (answers[:-1], answers[-1].logits)

    def features(self, *inputs: Inputs, **named: Any) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """What every branch reads, its features (B, *shape) first, and the original's answer; without gradients."""
        program, values, _ = self.prepare(*inputs, **named)
        found, original = program.run(values)
        assert original is not None
        return found, original

    def features_alone(self, *inputs: Inputs, **named: Any) -> list[tuple[Tensor, ...]]:
        """`features` without the original's answer, for which all behind the last exit would have to run."""
        program, values, _ = self.prepare(*inputs, **named)
        return program.run(values, whole=False)[0]

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Put the branches in train or eval mode. The original stays as it is, and always runs in eval mode."""
        self.training = mode
        self.branches.train(mode)
        return self

    def transform(self, is_training: bool = False) -> Callable[[Image.Image], Tensor]:
        """From a PIL picture to the pixels (3, H, W) that the original takes: what a dataset is given as transform.

        For a timm model its `timm.data` transforms as the adapter states them; for one of transformers its image
        processor, the saved one or else the one under its name.

        Args:
            is_training: with timm's random crops and flips.
        Raises:
            DataError: nothing says how its pictures are prepared, or augmented.
        """
        own = {"preprocessing": self.preprocessing, "processor": self.processor}
        return picture_transform(self._backbone, **own, is_training=is_training)

    def program(self, *inputs: Inputs, **named: Any) -> Program:
        """The stages that inputs like these (shape, dtype, device; any batch size) run through."""
        return self.prepare(*inputs, **named)[0]

    def prepare(self, *inputs: Inputs, **named: Any) -> tuple[Program, tuple[Tensor, ...], int]:
        """The program for these inputs, the tensors its first stage takes, and how many samples they hold."""
        arguments = self._backbone.arguments(*inputs, **named)
        dims = self._backbone.dims(arguments)
        entry = self._engine.entry(arguments, dims)
        return entry.program, tuple(tensors(arguments).values()), batch_size(arguments, dims)

    # --- sharing

    def adapter_config(self) -> AdapterConfig:
        """Everything about the branches that is not a tensor."""
        return AdapterConfig.of(
            identity=self._backbone.identity(self._before),
            inputs=self._backbone.sample,
            opaque=self._backbone.opaque,
            head_classes=self.num_classes if self._backbone.headless else None,
            output=self._backbone.output,
            points=self.plan.points,
            specs=self.specs,
            rule=self.plan.rule,
            trunk_macs=self.trunk_macs,
            branch_macs=self.branch_macs,
            operating_point=self.operating_point,
            label_names=self._backbone.label_names,
            own_base=self.own_base,
            preprocessing=processor_settings(self.processor) or self.preprocessing,
            provenance=self.provenance,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, processor: Any = None, **card: Any) -> Path:
        """Write the adapter folder: branches, plan, operating points and a model card; never the original's weights.

        Only a base of its own, which `train(..., joint=True)` made, is stored along. All files change at once or not at
        all. An adapter that is there already is replaced. Of several processes, the main one alone writes.

        Args:
            processor: the original's image processor or tokenizer in transformers, saved along so that `pipeline`
                finds it. Left out, the image processor comes from the local cache, where the original was loaded by
                its name; where it is not there, `pipeline` has to be given one. timm models need none.
            card: what the model card shall say beyond the folder's own data, kept for the next save: `license`,
                `datasets`, `language`, `tags`, `pipeline_tag`, `repo_id`, and of the data that `evaluate` was given
                `eval_dataset`, `eval_name`, `eval_split`, `eval_task`; see `CardInfo`.
        Raises:
            ConfigError: a card keyword that is unknown, or no text.
            AdapterError: the folder holds a model that is not an adapter of ours, or cannot be written.
        """
        folder = path("folder", folder)
        if _beside_the_main_process():
            return folder
        self.processor = self.processor if processor is None else processor
        config = self.adapter_config()
        about = CardInfo.stored(config, card).to_dict()
        self.provenance.pop("card", None)
        self.provenance |= {"card": about} if about else {}
        receipt = self.receipt()
        # Of an original that was changed, the fingerprint is of before: what it computes now would not fit.
        probe = Probe.of(self._backbone, config.inputs, config.options) if receipt.unchanged else None
        config = replace(config, provenance={**self.provenance, "receipt": str(receipt)}, probe=probe)
        base = self.original if self.own_base else None
        with change_adapter(folder) as change:
            save_adapter(change, config, self.branches.state_dict(), self.frontier, base)
            save_processor(change, self.processor or find_processor(self._backbone, cached=True), self._backbone)
            save_card(change, config, self.frontier, str(receipt), CardInfo.stored(config, {}))
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str = "Upload early exits",
        create_pr: bool = False,
        **card: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; see `push_folder`.

        The image processor of a transformers base goes along, downloaded where it is not in the cache.

        Returns:
            Where to look at the commit, or at the pull request; nothing in processes beside the main one, which alone
            uploads.
        Raises:
            AdapterError: the repository holds another model, which the adapter would make unreadable.
            HubError: no such user, no right to write, no connection; the repository holds what it held before.
        """
        word("repo_id", repo_id, hint="Such as user/name.")
        if _beside_the_main_process():
            return ""
        hub = {"private": private, "token": token, "revision": revision, "message": message, "create_pr": create_pr}
        self.processor = self.processor or find_processor(self._backbone, cached=False)
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder, **{"repo_id": repo_id, **card}), repo_id, **hub)


def _beside_the_main_process() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
