"""EarlyExitModel: a pretrained model with branches, and a knob for when to leave."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ee_surgery.backbone import Output, eval_mode
from ee_surgery.branches import BranchSpec
from ee_surgery.branches.bank import BranchBank
from ee_surgery.branches.base import ExitLogits, Prepared
from ee_surgery.errors import BranchError, DataError, ExitPointError, OperatingPointError
from ee_surgery.graph.points import ModelGraph, inspect, read
from ee_surgery.inputs import Arguments, Inputs, as_sample, batch_size, key
from ee_surgery.placement import ExitPlan, place
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.receipt import Receipt
from ee_surgery.runtime.program import Program, build_program
from ee_surgery.runtime.routed import ExitOutput, Router
from ee_surgery.runtime.verify import verify
from ee_surgery.share.adapter import AdapterConfig, save_adapter
from ee_surgery.share.card import CardInfo, write_card
from ee_surgery.share.hub import push_folder
from ee_surgery.share.processor import find_processor, picture_transform, save_processor

_PROGRAMS_KEPT = 8  # input shapes, dtypes and devices; each holds a graph, no weights
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
        self.operating_point: OperatingPoint | None = None
        self._policy: ThresholdPolicy | None = None
        self._disabled = False
        self._before = graph.backbone.digests()
        self._programs: OrderedDict[tuple[Hashable, ...], tuple[Program, list[Prepared]]] = OrderedDict()
        # The router of the inputs last seen, by their key: the hot path looks nothing else up.
        self._router: tuple[tuple[Hashable, ...], Router] | None = None
        weights = next(graph.backbone.model.parameters(), None)
        if weights is not None:
            self.branches.to(weights.device, weights.dtype if weights.is_floating_point() else None)
        sample = graph.backbone.sample
        program, prepared = self._compile(graph, sample)
        self._programs[key(sample, graph.backbone.batch_dims)] = program, prepared
        self.trunk_macs = program.trunk_macs
        """MACs of the original up to each exit and in whole, one sample of the size it was augmented with."""
        self.branch_macs = tuple(branch.macs for branch in prepared)
        """MACs of each branch, one sample of that size."""
        self.train(False)

    def __getstate__(self) -> dict[str, object]:
        # Stages are functions over this very original's tables: a copy makes its own on first use.
        return {**self.__dict__, "_programs": OrderedDict(), "_router": None}

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
        """Hash every parameter and buffer of the original again and compare with when it was augmented."""
        return Receipt(self._before, self._backbone.digests())

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
        points = place(graph, list(exits)).points
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

    # --- when to leave

    def operate(
        self,
        point: OperatingPoint | None = None,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        risk: tuple[float, float] | None = None,
        risk_of: str = "disagreement",
        thresholds: Sequence[float] | float | None = None,
        score: str = "max_prob",
    ) -> OperatingPoint | None:
        """Set when samples leave. Takes microseconds: nothing is captured, trained or searched again.

        Args:
            point: an operating point, e.g. of `frontier`; `operate(None)` alone: never leave early.
            max_accuracy_drop: the cheapest point of the frontier within this drop; 0.01 is one percentage point.
            budget: the most accurate one within this fraction of the original's MACs.
            risk: (eps, delta): the cheapest one certified to differ from the original on at most a share eps of new
                samples, with confidence 1 - delta. The certificate is on the point.
            risk_of: `disagreement`, or `accuracy_gap` where the calibration data had labels.
            thresholds: one a branch, or one for all, for `score`; nothing is known about their accuracy then.
        Returns:
            The operating point now in force; None for never.
        Raises:
            OperatingPointError: more than one of them, no frontier yet, or none of its points meets the request.
        """
        given = {
            "max_accuracy_drop": max_accuracy_drop,
            "budget": budget,
            "risk": risk,
            "thresholds": thresholds,
            "point": point,
        }
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) > 1:
            raise OperatingPointError(
                f"Give exactly one of max_accuracy_drop=, budget=, risk=, thresholds=; got {asked}."
            )
        if thresholds is not None:
            values = [thresholds] * len(self.branches) if isinstance(thresholds, (int, float)) else thresholds
            return self._set(OperatingPoint.by_hand(tuple(float(v) for v in values), score))
        if max_accuracy_drop is not None or budget is not None or risk is not None:
            if self.frontier is None:
                raise OperatingPointError("No frontier to choose from: run ee.calibrate(branched, held_out) first.")
            point = self.frontier.at(max_accuracy_drop=max_accuracy_drop, budget=budget, risk=risk, risk_of=risk_of)
        return self._set(point)

    def _set(self, point: OperatingPoint | None) -> OperatingPoint | None:
        policy = None if point is None else point.policy
        if policy is not None and len(policy.thresholds) != len(self.branches):
            raise OperatingPointError(
                f"{len(policy.thresholds)} thresholds for {len(self.branches)} branches at {self.exits}."
            )
        self.operating_point, self._policy, self._router = point, policy, None
        return point

    @property
    def policy(self) -> ThresholdPolicy | None:
        """The policy in force; None when nothing leaves early."""
        return None if self._disabled or self._policy is None or self._policy.closed else self._policy

    @contextmanager
    def exits_disabled(self) -> Iterator[None]:
        """The original to the bit, for a while."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

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
        if self.policy is None and self.branches.head is None:
            return self._backbone(arguments)
        shaping = sorted(_SHAPES_THE_ANSWER.intersection(arguments))
        if shaping:
            raise DataError(f"An early exit answers with logits alone: leave out {shaping}, or call `.backbone`.")
        return self._backbone.answer(self._run(arguments).logits)

    def predict(self, *inputs: Inputs, **named: Any) -> ExitOutput:
        """Run with early exit; logits, exit taken, score there and MACs of every sample.

        Args:
            inputs: as for a call; a new batch size costs nothing, a new image size, text length, dtype or device is
                captured on first use and kept.
            named: as for a call.
        """
        return self._run(self._backbone.arguments(*inputs, **named))

    def _run(self, arguments: Arguments) -> ExitOutput:
        if torch.is_grad_enabled() or self.branches.training:
            with torch.no_grad(), eval_mode(list(self.branches.modules())):
                return self._run(arguments)
        dims = self._backbone.dims(arguments)
        values = _values(arguments)
        batch = values[0].shape[0]
        if batch == 0:
            return self._nobody(values[0].device)
        found = key(arguments, dims)
        if self._router is None or self._router[0] != found or self._disabled:
            program, prepared = self._program(arguments, dims, found)
            policy = self.policy
            if policy is None:
                return self._never(arguments, program)
            branch_macs = [branch.macs for branch in prepared]
            self._router = found, Router(program, list(self.branches), policy, branch_macs, self.branches.head)
        return self._router[1](values, batch)

    def _never(self, arguments: Arguments, program: Program) -> ExitOutput:
        logits = self._backbone.logits(self._backbone(arguments))
        if self.branches.head is not None and program.head is not None:
            logits = self.branches.head(*program.head([logits])).logits
        last = torch.full((len(logits),), len(self.branches), device=logits.device)
        nan = torch.full((len(logits),), torch.nan, device=logits.device)
        costs = torch.tensor(program.trunk_macs, device=logits.device)
        return ExitOutput(logits, last, nan, costs, program.trunk_macs[-1])

    def _nobody(self, device: torch.device) -> ExitOutput:
        """For an empty batch, which many models do not take."""
        dtype = next(self.branches.parameters()).dtype
        logits = torch.empty((0, self.num_classes), dtype=dtype, device=device)
        index, score = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device)
        return ExitOutput(logits, index, score, torch.tensor(self.trunk_macs, device=device), self.trunk_macs[-1])

    def all_exits(self, *inputs: Inputs, **named: Any) -> Tensor:
        """Logits of every exit for every sample, (K, B, C), the original's last; nobody leaves."""
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

    # --- programs, one for inputs of each shape, dtype and device

    def program(self, *inputs: Inputs, **named: Any) -> Program:
        """The stages that inputs like these (shape, dtype, device; any batch size) run through."""
        return self.prepare(*inputs, **named)[0]

    def prepare(self, *inputs: Inputs, **named: Any) -> tuple[Program, tuple[Tensor, ...], int]:
        """The program for these inputs, the tensors its first stage takes, and how many samples they hold."""
        arguments = self._backbone.arguments(*inputs, **named)
        dims = self._backbone.dims(arguments)
        program, _ = self._program(arguments, dims, key(arguments, dims))
        return program, _values(arguments), batch_size(arguments, dims)

    def _program(
        self, arguments: Arguments, dims: Mapping[str, int | None], found: tuple[Hashable, ...]
    ) -> tuple[Program, list[Prepared]]:
        if found not in self._programs:
            sample = as_sample(arguments, dims)
            self._programs[found] = self._compile(read(self._backbone, sample), sample)
            if len(self._programs) > _PROGRAMS_KEPT:
                dropped, _ = self._programs.popitem(last=False)
                if self._router is not None and self._router[0] == dropped:
                    self._router = None
        self._programs.move_to_end(found)
        return self._programs[found]

    def _compile(self, graph: ModelGraph, sample: Arguments) -> tuple[Program, list[Prepared]]:
        head = self.branches.head
        head_macs = 0 if head is None or graph.head is None else head.macs(graph.head.shape)
        program = build_program(graph, self.exits, [branch.reads_all for branch in self.branches], head_macs)
        verify(program, self._backbone, sample)
        return program, [b.prepare(graph, p) for b, p in zip(self.branches, program.points, strict=True)]

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
            preprocessing=self.preprocessing,
            provenance=self.provenance,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, processor: Any = None, **card: Any) -> Path:
        """Write the adapter folder: branches, plan, operating points and a model card; never the original's weights.

        Only a base of its own, which `train(..., joint=True)` made, is stored along. Every file is written whole or
        not at all. A folder that is there already is updated. Of several processes, the main one alone writes.

        Args:
            processor: the original's image processor or tokenizer in transformers, saved along so that `pipeline`
                finds it. Left out, the image processor comes from the local cache, where the original was loaded by
                its name; where it is not there, `pipeline` has to be given one. timm models need none.
            card: what the model card shall say beyond the folder's own data, kept for the next save: `license`,
                `datasets`, `language`, `tags`, `pipeline_tag`, `repo_id`, and of the data that `evaluate` was given
                `eval_dataset`, `eval_name`, `eval_split`, `eval_task`; see `CardInfo`.
        Raises:
            ConfigError: a card keyword that is unknown, or no text.
        """
        if _beside_the_main_process():
            return Path(folder)
        config = self.adapter_config()
        if about := CardInfo.stored(config, card).to_dict():
            self.provenance["card"] = about
        receipt = str(self.receipt())
        config = replace(config, provenance={**self.provenance, "receipt": receipt})
        base = self.original if self.own_base else None
        self.processor = self.processor if processor is None else processor
        save_processor(Path(folder), self.processor or find_processor(self._backbone, cached=True))
        saved = save_adapter(Path(folder), config, self.branches.state_dict(), self.frontier, base)
        write_card(saved, config, self.frontier, receipt)
        return saved

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
            HubError: no such user, no right to write, no connection; the repository holds what it held before.
        """
        if _beside_the_main_process():
            return ""
        hub = {"private": private, "token": token, "revision": revision, "message": message, "create_pr": create_pr}
        self.processor = self.processor or find_processor(self._backbone, cached=False)
        with tempfile.TemporaryDirectory() as folder:
            return push_folder(self.save_pretrained(folder, **{"repo_id": repo_id, **card}), repo_id, **hub)


def _beside_the_main_process() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


def _values(arguments: Arguments) -> tuple[Tensor, ...]:
    return tuple([value for value in arguments.values() if isinstance(value, Tensor)])
