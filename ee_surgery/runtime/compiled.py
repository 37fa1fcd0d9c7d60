"""Routed runs under torch.compile: one graph per stage, its branch and its score; compaction stays between them.

Each part has a program for a batch of one, which the compiler specialises, and one or two whose batch is a symbol.
Measured on a CPU, a symbolic batch is as fast as a fixed one, so that nothing is padded.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.branches.base import PreparedBranch
from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.checks import flag
from ee_surgery.errors import OUT_OF_MEMORY, ConfigError, SurgeryWarning
from ee_surgery.graph.backends.base import BoundWeights
from ee_surgery.graph.backends.graph_module import BoundStage
from ee_surgery.graph.capture import GLOBAL_STATE
from ee_surgery.graph.segments import Segment, compact
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.scores import FittedScore, ScoreOf
from ee_surgery.registry import suggest
from ee_surgery.runtime.asking import AskBranch, AskEnd, Carried
from ee_surgery.runtime.program import Program
from ee_surgery.runtime.router import Altered, ExitOutput, InFlight, Observer, Router
from ee_surgery.runtime.verify import close
from ee_surgery.task import Task

_COMPILER = "torch.compile needs a C++ compiler: install g++ (apt-get install g++), or name yours in CXX."
SIZES = (1, 2, 16)
"""The smallest batches of programs of their own: compilers specialise 1, and torch picks convolutions by 16 or more."""
_SCORES_KEPT = 4  # compiled parts are kept for so many kinds of scores in turn
_ONE_GRAPH = "Each part is one graph with a symbolic batch: leave it out."


@dataclass(frozen=True, eq=False)
class Compilation:
    """How to compile: options of torch.compile.

    Args:
        options: `backend`, `mode`, `options`, and whatever else torch.compile takes.
        freeze: make constants of all weights, packed for the processor, with BatchNorm folded into convolutions.
    Raises:
        ConfigError: torch.compile does not take them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    freeze: bool = False

    def __post_init__(self) -> None:
        flag("freeze", self.freeze)
        known = [*inspect.signature(torch.compile).parameters][1:]
        for name, value in self.options.items():
            if name not in known:
                raise ConfigError(f"torch.compile has no option {name!r}. {suggest(name, known)}")
            if (name == "dynamic" and value is False) or (name == "fullgraph" and value is not True):
                raise ConfigError(f"{name}={value!r} is not possible with early exits. {_ONE_GRAPH}")
        if self.freeze and self.options.get("backend", "inductor") != "inductor":
            raise ConfigError(f"freeze=True is for the backend 'inductor', not {self.options['backend']!r}.")
        try:
            self.apply(lambda: None)
        except Exception as error:
            raise ConfigError(f"torch.compile does not take {dict(self.options)}: {error}") from error

    def apply(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Hand a function to torch.compile, by a code object of its own: programs are kept, and counted, by code."""
        code, self_ = function.__code__.replace(), getattr(function, "__self__", None)
        own = FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
        given = {**self.options, "fullgraph": True, "dynamic": None}
        return torch.compile(own if self_ is None else MethodType(own, self_), **given)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What has to be in force while something is compiled."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of the compilers, about our code and torch's
            if self.freeze:
                from torch._inductor import config  # takes a second

                stack.enter_context(config.patch(freezing=True))
            yield


def size_class(batch: int) -> int:
    """Which of `SIZES` serves a batch."""
    return max(size for size in SIZES if size <= batch)


class Part(nn.Module):
    """A stage, and what is asked behind it, as one graph over weights that are inputs.

    Args:
        ask: None where the exit behind it is closed.
        place: where it is, for messages.
    """

    def __init__(
        self, segment: Segment, weights: BoundWeights, ask: AskBranch | AskEnd | None, compilation: Compilation,
        place: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stage, self.ask = BoundStage(segment, weights), ask
        self.place, self.compilation = place, compilation
        self.eager = False
        """Whether it could not be compiled."""
        self.prepared: set[int] = set()
        """For which of `SIZES` it was compared with eager mode."""
        self._axes, self._batch_source = segment.axes, segment.batch_source
        self._bound = [module for module in self.modules() if isinstance(module, BoundStage)]
        self._weights = [weights]
        if ask is not None:
            own = [name for name, _ in [*ask.named_parameters(), *ask.named_buffers()]]
            self._weights.append(BoundWeights(own, lambda name: ask))
        self._compiled: set[int] = set()
        self._frozen: list[tuple[Tensor, int]] = []
        self._renew()
        self._mark = torch._dynamo.mark_dynamic

    def forward(
        self, live: Sequence[Tensor], carried: Carried, score: ScoreOf
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Carried]:
        """Live tensors of the next cut; what was asked there; what is carried on."""
        out = self.stage(*live)
        if isinstance(self.ask, AskEnd):
            return out, (self.ask(out, carried.best),), carried
        if self.ask is None:
            return out, (), carried
        asked, carried = self.ask(out, carried, score)
        return out, asked, carried

    def run(self, flight: InFlight, score: ScoreOf) -> InFlight:
        """Run the program for one sample, or that for any other number."""
        for stage in self._bound:
            stage.bind()
        self._thaw()
        index, dim, times = self._batch_source
        size = size_class(flight.live[index].shape[dim] // times)
        # In one layout, and never the caller's own tensors: these get marks.
        live = [tensor.detach().contiguous() for tensor in flight.live]
        log_probs, best = (() if tensor is None else (tensor,) for tensor in (flight.log_probs, flight.best))
        carried = Carried(flight.state, log_probs, best)
        if size > 1:
            for tensor, axis in zip(live, self._axes, strict=True):
                if axis is not None:
                    self._mark(tensor, axis.dim)
            for tensor in carried.tensors:
                self._mark(tensor, 0)
        program = self._programs[size > 1]
        if size in self._compiled:
            out, asked, carried = program(live, carried, score)
        else:
            with self.compilation.compiling():
                out, asked, carried = program(live, carried, score)
            self._compiled.add(size)
            self._frozen = [(t, t._version) for t in self._tensors()] if self.compilation.freeze else []
        log_probs, best = (tensors[0] if tensors else None for tensors in (carried.log_probs, carried.best))
        return InFlight(out, flight.rows, carried.state, log_probs, best, asked)

    def without(self) -> None:
        """Leave what is asked to eager mode; of a stage alone, all of it."""
        self.eager, self.ask = self.ask is None, None
        del self._weights[1:]
        self._renew()
        self.prepared.clear()

    @property
    def frozen_bytes(self) -> int:
        """Size of the weights that its programs have copies of, at most: one copy for each of `SIZES` in use."""
        return len(self._compiled) * sum(tensor.nbytes for tensor, _ in self._frozen)

    def _tensors(self) -> list[Tensor]:
        return [tensor for weights in self._weights for tensor in weights() if tensor is not None]

    def _thaw(self) -> None:
        """Drop copies of weights that are others now."""
        if not self._frozen:
            return
        now = self._tensors()
        same = [a is b and a._version == version for a, (b, version) in zip(now, self._frozen, strict=False)]
        if len(now) != len(self._frozen) or not all(same):
            self._renew()

    def _renew(self) -> None:
        """Compile again when needed."""
        self._programs = [self.compilation.apply(self.forward) for _ in range(2)]  # for one sample, and for more
        self._compiled.clear()
        self._frozen = []


class CompiledRouter(Router):
    """A router that runs a stage and asks its branch by one program.

    Args:
        parts: of each stage.
        otherwise: as for `Router`.
    """

    def __init__(self, parts: Sequence[Part], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.parts = parts
        self.score = ScoreOf(self.policy.score, self.policy.task)
        self._prepared: set[int] = set()

    def __call__(self, inputs: Sequence[Tensor], batch: int, observers: Sequence[Observer] = ()) -> ExitOutput:
        """As `Router`; the first batch of one, of few and of many samples compile what is not compiled yet."""
        for size in SIZES:
            if size <= batch and size not in self._prepared:
                with GLOBAL_STATE:
                    self._prepare(inputs, size, batch)
        if inputs[0].is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return super().__call__(inputs, batch, observers)

    def _advance(self, k: int, flight: InFlight) -> InFlight:
        if self.parts[k].eager:
            return super()._advance(k, flight)
        if not self.program.unchanged[k]():
            raise Altered
        return self.parts[k].run(flight, self.score)

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
                logits, score, leaves, flight = self._ask(k, flight)
                if leaves.item():
                    return self._left(logits, k, score)
            flight = self._advance(k + 1, flight)
        return self._left(self._end(flight), self.last, self._unasked.clone())

    def _left(self, logits: Tensor, k: int, score: Tensor) -> ExitOutput:
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
            ask = AskBranch(branch, self.program.readers[k], k, self.branches.chained, self.task, best)
        segment = self.program.segments[k]
        weights = BoundWeights(segment.weights.values(), lambda name: self.model)
        names = [*(point.name for point in self.program.points), "the end"]
        return Part(
            segment, weights, ask, compilation, f"The stage up to {names[k]}" + (" and its branch" if asked else "")
        )
