"""Scores of the confidence of an exit. Every score grows with confidence.

A score takes one exit's logits (B, C), its confidence logit (B,) or None, and the state it carried from the exit
before (a tuple of tensors with the batch first, empty at the first exit). It gives the score (B,) and the new state.
A named score has nothing to fit; a `FittedScore` holds what a calibrator fitted on records.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ee_surgery.checks import instance
from ee_surgery.errors import ConfigError
from ee_surgery.registry import Registry
from ee_surgery.task import CHOICES, CLASSIFICATION, Task, TaskNames, fits, require

State: TypeAlias = tuple[Tensor, ...]


class Score(Protocol):
    """Signature of a score."""

    def __call__(self, logits: Tensor, confidence: Tensor | None, state: State) -> tuple[Tensor, State]:
        """Score one exit."""
        ...


SCORES: Registry[Score] = Registry(
    "score", "ee_surgery.scores", stateful=None, counts_exits=False, tasks=("classification",)
)
"""Name -> score.

Properties: `stateful=True` for one that hands a state on, whose closed exits must run all the same (found by asking it
once where it is not stated); `counts_exits=True` for one whose values are numbers of exits, not shares in [0, 1];
`tasks=None` for one that is for answers of any task, which is handed the model's if it has a parameter `task`, or the
names of some.
"""


class FittedScore(ABC):
    """A score with parameters: a frozen dataclass of plain values and tensors, so that it can be saved.

    One object serves all exits of one model; subclasses register in `FITTED_SCORES`.
    """

    kind: ClassVar[str]
    tasks: ClassVar[TaskNames] = ("classification",)
    """The tasks that it is for; None: all, and then it is handed the model's if `__call__` has a parameter `task`."""

    stateful: ClassVar[bool] = False
    """Whether it needs the answers of the exits before, closed ones included."""

    @abstractmethod
    def __call__(
        self, logits: Tensor, confidence: Tensor | None, state: State, exit_index: int
    ) -> tuple[Tensor, State]:
        """Score one exit, counted from 0."""

    @property
    def of_scores(self) -> tuple[str, ...]:
        """Names of the scores that it can be worked out from alone, see `from_scores`; none where it needs logits."""
        return ()

    def from_scores(self, scores: Sequence[Tensor]) -> Tensor:
        """The score of every branch, (K - 1, N), from those of `of_scores`, one such tensor each."""
        raise NotImplementedError(f"The score {self!r} is worked out from logits.")

    def to(self, device: torch.device) -> FittedScore:
        """The same score, its tensors on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # pyright: ignore[reportArgumentType]

    def to_dict(self) -> dict[str, Any]:
        """Its kind and fields, tensors unchanged."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}  # pyright: ignore[reportArgumentType]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FittedScore:
        """The inverse of `to_dict`; lists, which JSON has instead of tuples, become tuples."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name != "kind"}
        return FITTED_SCORES[data["kind"]](**values)

    def __repr__(self) -> str:  # tensors are not worth printing
        return self.kind


F = TypeVar("F", bound=type[FittedScore])
FITTED_SCORES: Registry[type[FittedScore]] = Registry("fitted score", "ee_surgery.fitted_scores")
"""Kind -> class."""


def fitted(kind: str) -> Callable[[F], F]:
    """Decorator that registers a dataclass under `kind` in `FITTED_SCORES`."""

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

    Args:
        task: what the answers are; handed to scores that have a parameter `task`. None where that is not known yet:
            whether the score is for it is not checked, and it is called as for one right class.
    Raises:
        ConfigError: it is neither, or not for the task.
        UnknownNameError: no score of that name.
    """

    def __init__(self, score: str | FittedScore, task: Task | None = None) -> None:
        instance("score", score, (str, FittedScore), hint=f"Names: {', '.join(SCORES)}.")
        self.named = SCORES[score] if isinstance(score, str) else None
        self.score = score
        if task is not None:
            tasks = SCORES.property(score, "tasks") if isinstance(score, str) else score.tasks
            require(f"The score {score!r}", tasks, task)
        own = score if isinstance(score, FittedScore) else SCORES[score]
        self._call: Any = for_task(own, task or CLASSIFICATION)
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
            confidence = confidence + (confidence - confidence)  # infinity minus infinity is NaN
        if self.named is not None:
            score, state = self._call(logits, confidence, state)
        else:
            score, state = self._call(logits, confidence, state, exit_index)
        if state and not self.stateful:
            raise ConfigError(
                f"The score {self.score!r} keeps a state, but is not `stateful`: closed exits would be missing from "
                "it. Register it with stateful=True, or set stateful = True in the class of a fitted score."
            )
        return score, state


def precise(logits: Tensor) -> Tensor:
    """Logits in the one precision that scores are computed in: float32, that of records, whatever the model's own is.

    A float64 score on the far side of a threshold from its float32 record would leave elsewhere than replayed; in
    float16 the sum over 20,000 classes overflows.
    """
    return logits.float()


def sound(score: Tensor, logits: Tensor) -> Tensor:
    """The score (B,), NaN where it or one of the logits (B, ...) is not finite: NaN reaches no threshold, even -inf.

    One sum over all logits of a sample tells; where it overflows in float32, that is no answer either.
    """
    total = precise(logits).sum([*range(1, logits.ndim)]) + score
    return score + (total - total)


def for_task(score: Callable[..., Any], task: Task) -> Callable[..., Any]:
    """The score, its parameter `task` filled in where it has one."""
    call = type(score).__call__ if isinstance(score, FittedScore) else score
    return partial(score, task=task) if _takes_task(call) else score


@lru_cache(maxsize=256)
def _takes_task(score: Callable[..., Any]) -> bool:
    return "task" in inspect.signature(score).parameters


def scores_of(task: Task, units: bool) -> list[str]:
    """Names of the scores for a task.

    Args:
        units: whether the branches have confidence units, which `learned` needs.
    """
    return [name for name in SCORES if fits(SCORES.property(name, "tasks"), task) and (units or name != "learned")]


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


@SCORES.register("max_prob", stateful=False, tasks=CHOICES)
def max_prob(
    logits: Tensor, confidence: Tensor | None = None, state: State = (), task: Task = CLASSIFICATION
) -> tuple[Tensor, State]:
    """Largest probability, in [1/C, 1]; of several choices, the mean. Source: cascaded inference (arXiv:1805.10982)."""
    return task.certainty(logits), ()


@SCORES.register("margin", stateful=False, tasks=CHOICES)
def margin(
    logits: Tensor, confidence: Tensor | None = None, state: State = (), task: Task = CLASSIFICATION
) -> tuple[Tensor, State]:
    """Difference between the two largest probabilities, in [0, 1]; of several choices, that of the least sure one."""
    top = task.probabilities(logits).topk(2, -1).values
    return task.weakest(top[..., 0] - top[..., 1]), ()


@SCORES.register("entropy", stateful=False, tasks=CHOICES)
def entropy(
    logits: Tensor, confidence: Tensor | None = None, state: State = (), task: Task = CLASSIFICATION
) -> tuple[Tensor, State]:
    """1 - H(p) / log C, in [0, 1]: 1 for a certain answer; of several choices, the mean.

    BranchyNet (arXiv:1709.01686) thresholds H itself.
    """
    log_p = task.log_probabilities(logits)
    # 0 * -inf is 0 here: a class that is ruled out carries no entropy
    h = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    return task.reduce(1 - h / math.log(log_p.shape[-1])), ()


@SCORES.register("learned", stateful=False, tasks=None)
def learned(logits: Tensor, confidence: Tensor | None = None, state: State = ()) -> tuple[Tensor, State]:
    """Sigmoid of the branch's confidence unit, in [0, 1]. Source: EENets (arXiv:2409.05336), PTEENet."""
    if confidence is None:
        raise ConfigError(
            "The score 'learned' needs branches with a confidence unit: BranchSpec(..., confidence=True)."
        )
    return torch.sigmoid(confidence), ()


@SCORES.register("patience", stateful=True, counts_exits=True, tasks=None)
def patience(
    logits: Tensor, confidence: Tensor | None = None, state: State = (), task: Task = CLASSIFICATION
) -> tuple[Tensor, State]:
    """How many exits before this one gave the same answer without a break. Source: PABEE (arXiv:2006.04152)."""
    answer = task.labels_from(logits)
    if not state:
        # shape, as len() would fix the batch in an export
        streak = torch.zeros(answer.shape[0], dtype=torch.float32, device=answer.device)
    else:
        before, streak = state
        streak = torch.where(task.same(answer, before), streak + 1, torch.zeros_like(streak))
    return streak, (answer, streak)
