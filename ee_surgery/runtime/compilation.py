"""How routed runs are compiled, and one compiled part: a stage with its branch and score.

A part has a program for a batch of one, which the compiler specialises, and one or two whose batch is a symbol.
Measured on a CPU, a symbolic batch is as fast as a fixed one, so that nothing is padded there. A CUDA graph is of one
size: batches are padded to powers of two, so that there are few.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ee_surgery.checks import flag, optional
from ee_surgery.errors import ConfigError
from ee_surgery.graph.backends.base import BoundWeights
from ee_surgery.graph.backends.graph_module import BoundStage
from ee_surgery.graph.segments import Segment
from ee_surgery.policies.scores import ScoreOf
from ee_surgery.registry import suggest
from ee_surgery.runtime.asking import AskBranch, AskEnd, Carried
from ee_surgery.runtime.router import InFlight

SIZES = (1, 2, 16)
"""The smallest batches of programs of their own: compilers specialise 1, and torch picks convolutions by 16 or more."""
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record them
_ONE_GRAPH = "Each part is one graph with a symbolic batch: leave it out."


@dataclass(frozen=True, eq=False)
class Compilation:
    """How to compile: options of torch.compile.

    Args:
        options: `backend`, `mode`, `options`, and whatever else torch.compile takes.
        freeze: make constants of all weights, packed for the processor, with BatchNorm folded into convolutions.
        pad: pad the samples in flight to the next power of two, so that a part runs at few sizes; None: with CUDA
            graphs alone.
    Raises:
        ConfigError: torch.compile does not take them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    freeze: bool = False
    pad: bool | None = None

    def __post_init__(self) -> None:
        flag("freeze", self.freeze)
        optional(flag)("pad", self.pad)
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

    def pads(self, device: torch.device) -> bool:
        """Whether batches on this device are padded."""
        graphs = device.type == "cuda" and self.options.get("mode") in _CUDA_GRAPHS
        return graphs if self.pad is None else self.pad

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
        self._compiled: set[tuple[int, bool]] = set()
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
        size = size_class(self.rows(flight))
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
        program, known = self._programs[size > 1], (size, torch.is_inference_mode_enabled())
        if known in self._compiled:
            out, asked, carried = program(live, carried, score)
        else:
            frozen = [(tensor, tensor._version) for tensor in self._tensors()] if self.compilation.freeze else []
            with self.compilation.compiling():
                out, asked, carried = program(live, carried, score)
            self._compiled.add(known)
            self._frozen = frozen
        log_probs, best = (tensors[0] if tensors else None for tensors in (carried.log_probs, carried.best))
        return InFlight(out, flight.rows, carried.state, log_probs, best, asked)

    def rows(self, flight: InFlight) -> int:
        """Samples in flight at its input."""
        index, dim, times = self._batch_source
        return flight.live[index].shape[dim] // times

    def without(self) -> None:
        """Leave what is asked to eager mode; of a stage alone, all of it."""
        self.eager, self.ask = self.ask is None, None
        del self._weights[1:]
        self._renew()
        self.prepared.clear()

    @property
    def frozen_bytes(self) -> int:
        """Size of the weights that its programs have copies of, at most: a copy for each of `SIZES` in use."""
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
