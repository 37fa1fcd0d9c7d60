"""How sure an exit is of its answer. Every score grows with confidence.

A score takes one exit's logits (B, C), its confidence logit (B,) or None, and the state it carried from the exit
before (a tuple of tensors with the batch first, empty at the first exit). It gives the score (B,) and the new state.
A named score has nothing to fit; a `FittedScore` holds what a calibrator fitted on records.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ee_surgery.checks import instance
from ee_surgery.errors import ConfigError
from ee_surgery.registry import Registry

State: TypeAlias = tuple[Tensor, ...]


class Score(Protocol):
    """Signature of a score."""

    def __call__(self, logits: Tensor, confidence: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Score one exit."""
        ...


SCORES: Registry[Score] = Registry("score", stateful=None, counts_exits=False)
"""Name -> score.

Properties: `stateful=True` for one that hands a state on, whose closed exits must run all the same (found by asking it
once where it is not stated); `counts_exits=True` for one whose values are numbers of exits, not shares in [0, 1].
"""


class FittedScore(ABC):
    """A score with parameters: a frozen dataclass of plain values and tensors, so that it can be saved.

    One object serves all exits of one model; subclasses register in `FITTED_SCORES`.
    """

    kind: ClassVar[str]

    @property
    def stateful(self) -> bool:
        """Whether it needs the answers of the exits before, closed ones included."""
        return False

    @abstractmethod
    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int
    ) -> tuple[Tensor, State]:
        """Score one exit, counted from 0."""

    def to(self, device: torch.device) -> FittedScore:
        """The same score, its tensors on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Its kind and fields; tensors as they are."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # pyright: ignore[reportArgumentType]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FittedScore:
        """What `to_dict` gave; lists, which JSON makes of tuples, are tuples again."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name != "kind"}
        return FITTED_SCORES[data["kind"]](**values)

    def __repr__(self) -> str:  # tensors are nothing to look at
        return self.kind


F = TypeVar("F", bound=type[FittedScore])
FITTED_SCORES: Registry[type[FittedScore]] = Registry("fitted score")
"""Kind -> class."""


def fitted(kind: str) -> Callable[[F], F]:
    """Decorator that files a dataclass under `kind` in `FITTED_SCORES`."""

    def add(cls: F) -> F:
        cls.kind = kind
        FITTED_SCORES.register(kind)(cls)
        return cls

    return add


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor | FittedScore) else value


class ScoreOf:
    """A score of either sort, by name or fitted, behind one call: for routed runs and for replays.

    Raises:
        ConfigError: it is neither.
        UnknownNameError: no score of that name.
    """

    def __init__(self, score: str | FittedScore) -> None:
        instance("score", score, (str, FittedScore), hint=f"Names: {', '.join(SCORES)}.")
        self.named = SCORES[score] if isinstance(score, str) else None
        self.score = score
        self.stateful = score.stateful if isinstance(score, FittedScore) else _stateful(score)
        """Whether it needs every exit's answer, closed exits included."""

    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int
    ) -> tuple[Tensor, State]:
        """Score one exit, counted from 0: in float32, whatever the model computes in.

        A confidence that is not finite is handed on as NaN, so that no score makes a number of it.

        Raises:
            ConfigError: it hands a state on but does not say that it is stateful.
        """
        logits = precise(logits)
        if confidence is not None:
            confidence = precise(confidence)
            confidence = confidence + (confidence - confidence)  # infinity less itself is NaN
        if self.named is not None:
            score, state = self.named(logits, confidence, state)
        else:
            score, state = self.score(logits, confidence, state, exit_index)  # pyright: ignore[reportCallIssue]
        if state and not self.stateful:
            raise ConfigError(
                f"The score {self.score!r} keeps a state, but is not `stateful`: closed exits would be missing from "
                "it. Register it with stateful=True, or override the property `stateful` of a fitted score."
            )
        return score, state


def precise(logits: Tensor) -> Tensor:
    """Logits in the one precision that scores are computed in: float32, that of records, whatever the model's own is.

    A float64 score on the far side of a threshold from its float32 record would leave elsewhere than replayed; in
    float16 the sum over 20,000 classes overflows.
    """
    return logits.float()


def sound(score: Tensor, logits: Tensor) -> Tensor:
    """The score (B,), NaN where it or one of the logits (B, C) is not finite: NaN reaches no threshold, not even -inf.

    One sum over the classes tells; where it overflows in float32, that is no answer either.
    """
    total = precise(logits).sum(-1) + score
    return score + (total - total)


def _stateful(name: str) -> bool:
    """Whether a named score hands a state on: as stated where it was registered, else found by asking it."""
    stated = SCORES.property(name, "stateful")
    return _hands_state_on(SCORES[name]) if stated is None else bool(stated)


@lru_cache(maxsize=256)
def _hands_state_on(score: Score) -> bool:
    """Ask a score once; one that cannot be asked counts as if it handed a state on."""
    try:
        return bool(score(torch.eye(2, 16), torch.zeros(2), ())[1])
    except Exception:
        return True


@SCORES.register("max_prob", stateful=False)
def max_prob(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Largest softmax probability, in [1/C, 1]. Source: cascaded inference (arXiv:1805.10982)."""
    return torch.softmax(logits, -1).amax(-1), ()


@SCORES.register("margin", stateful=False)
def margin(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Difference between the two largest softmax probabilities, in [0, 1]."""
    top = torch.softmax(logits, -1).topk(2, -1).values
    return top[..., 0] - top[..., 1], ()


@SCORES.register("entropy", stateful=False)
def entropy(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """1 - H(p) / log C, in [0, 1]: 1 for a certain answer. BranchyNet (arXiv:1709.01686) thresholds H itself."""
    log_p = torch.log_softmax(logits, -1)
    # 0 * -inf is 0 here: a class that is ruled out carries no entropy
    h = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    return 1 - h / math.log(logits.shape[-1]), ()


@SCORES.register("learned", stateful=False)
def learned(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Sigmoid of the branch's confidence unit, in [0, 1]. Source: EENets (arXiv:2409.05336), PTEENet."""
    if confidence is None:
        raise ConfigError(
            "The score 'learned' needs branches with a confidence unit: BranchSpec(..., confidence=True)."
        )
    return torch.sigmoid(confidence), ()


@SCORES.register("patience", stateful=True, counts_exits=True)
def patience(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """How many exits before this one gave the same class without a break. Source: PABEE (arXiv:2006.04152)."""
    answer = logits.argmax(-1)
    if not state:
        streak = torch.zeros(answer.shape, dtype=torch.float32, device=answer.device)
    else:
        before, streak = state
        streak = torch.where(answer == before, streak + 1, torch.zeros_like(streak))
    return streak, (answer, streak)
