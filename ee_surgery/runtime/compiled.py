"""Routed runs under torch.compile: one program per stage, its branch and its score; compaction stays between them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.branches.base import PreparedBranch
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.errors import OUT_OF_MEMORY, ConfigError, SurgeryWarning
from ee_surgery.graph.backends.base import BoundWeights
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.segments import compact
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import FittedScore, ScoreOf
from ee_surgery.runtime.asking import AskBranch, AskEnd
from ee_surgery.runtime.compilation import SIZES, Compilation, Part, size_class
from ee_surgery.runtime.program import Program
from ee_surgery.runtime.router import Altered, ExitOutput, InFlight, Leaving, Observer, Router
from ee_surgery.runtime.verify import close
from ee_surgery.task import Task

_COMPILER = "torch.compile needs a C++ compiler: install g++ (apt-get install g++), or name yours in CXX."
_SCORES_KEPT = 4  # compiled parts are kept for so many kinds of scores in turn


class CompiledRouter(Router):
    """A router that runs a stage and asks its branch by one program.

    Args:
        parts: of each stage.
        arguments: as of `Router`.
    """

    def __init__(self, parts: Sequence[Part], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parts = parts
        self.score = ScoreOf(self.policy.score, self.policy.task)
        self.pads = parts[0].compilation.pads(self._unasked.device)
        self._prepared: set[int] = set()

    def __call__(self, inputs: Sequence[Tensor], batch: int, observers: Sequence[Observer] = ()) -> ExitOutput:
        """As `Router`; the first batch of one, of few and of many samples compile what is not compiled yet."""
        self.prepare(inputs, batch)
        if inputs[0].is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return super().__call__(inputs, batch, observers)

    def prepare(self, inputs: Sequence[Tensor], batch: int) -> None:
        """Compile what batches of up to this many samples run; `inputs` hold as many."""
        for size in SIZES:
            if size <= batch and size not in self._prepared:
                with GLOBAL_STATE:
                    self._prepare(inputs, size, batch)

    def visit(
        self, k: int, flight: InFlight, observe: Observer | None = None
    ) -> tuple[Leaving | None, InFlight | None]:
        """As `Router`; what a CUDA graph gave is copied, for its next run writes to the same memory."""
        if not self._unasked.is_cuda:
            return super().visit(k, flight, observe)
        torch.compiler.cudagraph_mark_step_begin()
        leaving, staying = super().visit(k, flight, observe)
        if leaving is not None:
            leaving = leaving._replace(logits=leaving.logits.clone())
        return leaving, None if staying is None else staying.cloned()

    def _advance(self, k: int, flight: InFlight) -> InFlight:
        if self.parts[k].eager:
            return super()._advance(k, flight._replace(asked=()))
        if not self.program.unchanged[k]():
            raise Altered
        rows = self.parts[k].rows(flight)
        padded = 1 << (rows - 1).bit_length()  # the next power of two
        if not self.pads or padded == rows:
            return self.parts[k].run(flight, self.score)
        repeated = torch.arange(padded, device=self._unasked.device).clamp_max_(rows - 1)
        behind = self.parts[k].run(flight.keep(repeated, self.axes[k]), self.score)
        if k == self.last:
            kept = behind._replace(live=tuple(tensor[:rows] for tensor in behind.live))
        else:
            kept = behind.keep(repeated[:rows], self.axes[k + 1])
        return kept._replace(rows=flight.rows, asked=tuple(tensor[:rows] for tensor in behind.asked))

    def _ask(self, k: int, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, InFlight]:
        if not flight.asked:
            return super()._ask(k, flight)
        logits, score, compared = flight.asked
        return logits, score, self.policy.reached(k, compared), flight._replace(asked=())

    def _end(self, flight: InFlight) -> Tensor:
        return flight.asked[0] if flight.asked else super()._end(flight)

    def _one(self, inputs: Sequence[Tensor]) -> ExitOutput:
        flight = self.start(inputs)
        for k in range(self.last):
            if self.branches[k] is not None:
                if flight.asked:
                    logits, score, compared = flight.asked
                    leaves = self.policy.reached(k, compared.item())  # in Python: a launch fewer, which counts here
                else:
                    logits, score, leaves, flight = super()._ask(k, flight)
                if leaves:
                    return self._left(logits, k, score)
            flight = self._advance(k + 1, flight)
        return self._left(self._end(flight), self.last, self._unasked.clone())

    def _left(self, logits: Tensor, k: int, score: Tensor) -> ExitOutput:
        logits = self.task.enlarge(logits, self.program.answer)
        if logits.is_cuda:  # the next run of a CUDA graph writes to the same memory
            logits, score = logits.clone(), score.clone()
        return ExitOutput(logits, self._index[k].clone(), score, self.costs, self.original_macs)

    def _prepare(self, inputs: Sequence[Tensor], size: int, batch: int) -> None:
        """Compile parts that are not yet, by running them on samples of which none leaves, and compare with eager mode.

        Raises:
            ConfigError: no part can be compiled, or there is no C++ compiler.
        """
        if size < size_class(batch):  # survivors may be that few
            inputs = compact(inputs, self.axes[0], torch.arange(size, device=inputs[0].device))
        flight, cause = InFlight(tuple(inputs)), ""
        for k, part in enumerate(self.parts):
            if all(size in later.prepared for later in self.parts[k:]):
                break
            expected = _cloned(Router._advance(self, k, _cloned(flight)))
            behind, logits = expected, None
            if k == self.last:
                logits = Router._end(self, _cloned(expected))
            elif self.branches[k] is not None:
                logits, *_, behind = Router._ask(self, k, _cloned(expected))
            while not part.eager and (why := self._differs(k, _cloned(flight), expected.live, logits)):
                cause = why
                warnings.warn(f"{part.place} runs eagerly: {cause}", SurgeryWarning, stacklevel=6)
                part.without()
            part.prepared.add(size)
            flight = behind._replace(live=expected.live)
        if all(part.eager for part in self.parts):
            raise ConfigError(f"torch.compile compiles no part of this model: {cause}")
        self._prepared.add(size)

    def _differs(self, k: int, flight: InFlight, live: Sequence[Tensor], logits: Tensor | None) -> str:
        """Why a part does not run as eager mode does; nothing where it does."""
        try:
            found = self._advance(k, flight)
        except (Altered, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            chain = [error, *_causes(error)]
            if any(type(cause).__name__ == "InvalidCxxCompiler" for cause in chain):
                raise ConfigError(_COMPILER) from error
            return f"{type(error).__name__}: {' '.join(str(error).split()[:60])}"
        pairs = [*zip(live, found.live, strict=True)]
        if logits is not None and found.asked:
            pairs.append((logits, found.asked[0]))
        wrong = [a for a, b in pairs if a.is_floating_point() and not close(a.nan_to_num(), b.nan_to_num())]
        return "compiled, it gives other numbers." if wrong else ""


def _cloned(flight: InFlight) -> InFlight:
    """With live tensors of its own: stages may write to theirs."""
    return flight._replace(live=tuple(tensor.clone() for tensor in flight.live))


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (error := error.__cause__ or error.__context__) is not None:  # pyright: ignore[reportAssignmentType]
        yield error


def alike(score: str | FittedScore) -> Hashable:
    """What scores have in common that one program serves: everything but the values of their tensors."""
    return score if isinstance(score, str) else (score.kind, *map(_alike, score.to_dict().values()))


def _alike(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, FittedScore):
        return alike(value)
    return tuple(map(_alike, value)) if isinstance(value, tuple) else repr(value)


class Parts:
    """The compiled parts of one program, made when they are first needed.

    Args:
        prepared: of each branch, for this program.
        model, task: of the original.
    """

    def __init__(
        self, program: Program, prepared: Sequence[PreparedBranch], branches: BranchBank, model: nn.Module, task: Task
    ) -> None:
        self.program, self.prepared, self.branches, self.model, self.task = program, prepared, branches, model, task
        self._known: OrderedDict[Hashable, dict[tuple[int, bool], Part]] = OrderedDict()

    def of(self, policy: ThresholdPolicy, compilation: Compilation) -> list[Part]:
        """Those that a policy runs: shared by all that differ in thresholds, or in what a score has fitted."""
        key = compilation, alike(policy.score), policy.fallback
        group = self._known.setdefault(key, {})
        self._known.move_to_end(key)
        if len(self._known) > _SCORES_KEPT:
            self._known.popitem(last=False)
        visits = [*policy.visits(self.branches.chained), False]
        for k, asked in enumerate(visits):
            if (k, asked) not in group:
                group[k, asked] = self._part(k, asked, policy, compilation)
        return [group[each] for each in enumerate(visits)]

    @property
    def frozen_bytes(self) -> int:
        """Of all that are kept."""
        return sum(part.frozen_bytes for group in self._known.values() for part in group.values())

    def clear(self) -> None:
        """Let go of all of them."""
        self._known.clear()

    def _part(self, k: int, asked: bool, policy: ThresholdPolicy, compilation: Compilation) -> Part:
        ask: AskBranch | AskEnd | None = None
        if k == len(self.branches):
            ask = AskEnd(self.program.head, self.branches.head, self.task)
        elif asked:
            branch, best = self.branches[k].traceable(self.prepared[k]), policy.fallback == "most_confident"
            read, shape = self.program.readers[k], self.program.answer
            ask = AskBranch(branch, read, k, self.branches.chained, self.task, shape, best)
        segment = self.program.segments[k]
        weights = BoundWeights(segment.weights.values(), lambda name: self.model)
        names = [*(point.name for point in self.program.points), "the end"]
        place = f"The stage up to {names[k]}" + (" and its branch" if asked else "")
        return Part(segment, weights, ask, compilation, place)
