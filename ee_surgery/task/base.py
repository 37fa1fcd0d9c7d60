"""What every kind of answer says about itself, and the registry of those kinds.

A task reads the logits (B, C, ...) of one exit or of the original. To add one, derive from `Task` (or from a member
that is near), fill in the five abstract methods, and register the class:

    @TASKS.register("ordinal")
    class Ordinal(Classification): ...

    ee.augment(model, task="ordinal")

One with parameters is a frozen dataclass whose fields are plain values or tensors, with defaults; adapters and records
store them.

What only some tasks can use (a branch, a score, a calibrator, a loss) names them in `tasks`, see `require`; scores,
losses and risks that say nothing are for one right class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.errors import CaptureError, ConfigError, DataError
from ee_surgery.registry import Registry

IGNORED = -100
"""Label of an ignored sample: `ignore_index` of `torch.nn.functional.cross_entropy`."""

TaskNames: TypeAlias = tuple[str, ...] | None
"""Names of the tasks that something is for, their descendants included; None: for all."""
CHOICES = ("choices",)
"""In place of names: for all tasks that choose, see `Task.chooses`."""


class Task(ABC):
    """One kind of answer: B samples, C numbers each, or maps of them. It never changes.

    Most answers are one or several *choices*, each among some *options*: one choice among C classes, or C choices
    between yes and no. `log_probabilities` says how likely each option is, and scores are worked out from that.
    """

    name: ClassVar[str] = ""
    """Its name in `TASKS`; set by registering it."""
    measure: ClassVar[str] = "accuracy"
    """What reports call the mean outcome on labelled data; a fraction in [0, 1]."""
    measures: ClassVar[Mapping[str, Callable[[Tensor], float]]] = {}
    """More to report of a whole labelled data set: name -> function of the tallies of all samples, (N, T)."""
    chooses: ClassVar[bool] = True
    """Whether answers are choices, whose probabilities say how sure they are. Of numbers nothing says so: branches
    learn it, with a confidence unit."""
    scaled: ClassVar[bool] = False
    """Whether answers have a scale of their own, which branches take over before they learn; see `values`."""
    whole: ClassVar[bool] = False
    """Whether each outcome is 0 or 1, which exact tests of counts rely on."""
    class_numbers: ClassVar[bool] = False
    """Whether a label is one class number (B,): then a class map applies, and labels are compared with the original's
    answers to find those that are not its classes."""
    least: ClassVar[int] = 1
    """The smallest C that makes sense."""
    problem_types: ClassVar[tuple[str, ...]] = ()
    """`config.problem_type` of the transformers models that answer like this."""
    states: ClassVar[str | None] = None
    """The one that an adapter states where its base does not; None: a softmax over the classes, if any."""
    hub_tags: ClassVar[Mapping[str, str]] = {"image": "image-classification", "text": "text-classification"}
    """`pipeline_tag` on the Hub, by what the model reads."""
    decided: ClassVar[str] = "output.logits"
    """Code that shows what an `output` says: for model cards."""
    class_dim: ClassVar[int] = 1
    """The dimension of the logits that holds classes."""
    rank: ClassVar[int] = 2
    """How many dimensions the logits of branches have."""
    ranks: ClassVar[tuple[int, ...]] = ()
    """How many the original's may have, the likeliest first; none: as those of branches."""
    of_features: ClassVar[bool] = False
    """Whether its answers are features, as of a model without a head."""
    keeps_logits: ClassVar[bool] = True
    """Whether records hold logits. Of maps, scores and outcomes are worked out at once, and the logits let go."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        mine, others = self.options(), other.options()  # pyright: ignore[reportAttributeAccessIssue]
        return all(_equal(value, others[name]) for name, value in mine.items())

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        shown = (f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v!r}" for k, v in self.options().items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def kinds(cls) -> set[str]:
        """Its name, and those of the tasks that it derives from; `choices` among them if it chooses."""
        names = {vars(base)["name"] for base in cls.__mro__ if vars(base).get("name")}
        return names | set(CHOICES) if cls.chooses else names

    def options(self) -> dict[str, Any]:
        """Its parameters by name: plain values and tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)} if is_dataclass(self) else {}

    @property
    def default_score(self) -> str:
        """The score where none is asked for."""
        return "max_prob" if self.chooses else "learned"

    def of(self, logits: Tensor) -> Task:
        """The task of a model that answers so: itself, or a near one for answers of that form."""
        return self

    def width(self, logits: Tensor) -> int:
        """C: how many numbers each answer of a branch has, by an answer of the original."""
        return int(logits.shape[1])

    def classes(self, width: int) -> int:
        """How many classes labels can name, of answers of this width."""
        return width

    # --- what every task says

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probability of each option: (B, C) for one choice; (B, choices, options) for several."""

    @abstractmethod
    def labels_from(self, logits: Tensor) -> Tensor:
        """What the logits say, in the form of checked labels: the labels of data that has none. (B, ...)."""

    @abstractmethod
    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels of a batch, checked, in the one form that all other methods take, and which it leaves as it is.

        Args:
            classes: C.
            rows: B.
        Raises:
            DataError: they are no labels of this task; what was seen is named.
        """

    @abstractmethod
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample, (B,)."""

    @abstractmethod
    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Refuse what is no answer of this task.

        Args:
            logits: what a model answered to `rows` samples.
        Raises:
            CaptureError: what it is instead, and the way out.
        """

    # --- what follows from it

    def outcome(self, logits: Tensor, target: Tensor) -> Tensor:
        """What each answer is worth, (B,) in [0, 1]: the share of choices made as the labels say."""
        return _share(self.labels_from(logits) == self.hard(target).to(logits.device))

    def agrees(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether two answers say the same, bool (B,)."""
        return self.same(self.labels_from(a), self.labels_from(b))

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether two results of `labels_from` are the same, bool (B,)."""
        return (a == b) if a.ndim == 1 else (a == b).flatten(1).all(1)

    def hard(self, target: Tensor) -> Tensor:
        """Checked labels as `labels_from` would give them: of probabilities, the most probable."""
        return target

    def ignored(self, target: Tensor) -> Tensor:
        """Which samples count nowhere, of checked labels, bool (B,)."""
        return (target == IGNORED) if target.ndim == 1 else (target == IGNORED).flatten(1).all(1)

    def mean_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of the samples that are not ignored, a scalar."""
        counts = ~self.ignored(target)
        return self.loss(logits[counts], target[counts]).mean()

    def divergence(self, logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """KL divergence from a teacher's answer, mean over the choices, (B,); both softened by a temperature."""
        own, wanted = (self.log_probabilities(each / temperature) for each in (logits, teacher))
        return self.reduce(F.kl_div(own, wanted, log_target=True, reduction="none").sum(-1))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each option, shape as `log_probabilities`."""
        return self.log_probabilities(logits).exp()

    def certainty(self, logits: Tensor) -> Tensor:
        """How sure an answer is, (B,) in [0, 1]: the probability of the most likely option, mean over the choices; 0
        where answers are no choices."""
        if not self.chooses:
            return logits.new_zeros(logits.shape[0])
        return self.reduce(self.probabilities(logits).amax(-1))

    def reduce(self, choices: Tensor) -> Tensor:
        """A number for each choice to one for each sample: (B, ...) -> (B,), the mean."""
        return choices if choices.ndim == 1 else choices.flatten(1).mean(1)

    def weakest(self, choices: Tensor) -> Tensor:
        """The same, the smallest: an answer is as sure as its least sure choice."""
        return choices if choices.ndim == 1 else choices.flatten(1).amin(1)

    def disagreement(self, a: Tensor, b: Tensor) -> Tensor:
        """How much two answers differ, (B,) in [0, 1]: 0 where they are the same, else 1."""
        return (~self.agrees(a, b)).float()

    def tally(self, logits: Tensor, target: Tensor) -> Tensor:
        """What the `measures` of a data set need to know of each sample, (B, T)."""
        raise NotImplementedError(f"The task {self.name!r} has no measures of a whole data set.")

    def enlarge(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """A branch's answer in the form of the original's, which is of this shape for one sample."""
        return logits

    def values(self, answers: Tensor) -> Tensor:
        """Answers or labels as rows of C numbers, (N, C), without those that count nowhere."""
        rows = answers if answers.ndim == 2 else answers.movedim(1, -1).flatten(0, -2)
        return rows[torch.isfinite(rows).all(1)]

    def blank(self, rows: int, classes: int) -> Tensor:
        """An answer of zeros, to try a score on."""
        return torch.zeros(rows, classes)

    def finite(self, logits: Tensor) -> Tensor:
        """Where all logits are finite, bool (B,)."""
        return torch.isfinite(logits).flatten(1).all(1)

    def empty(self, like: Tensor, rows: int) -> Tensor:
        """Room for the answers to so many samples, of the kind of `like`."""
        return like.new_empty((rows, *like.shape[1:]))


Made = TypeVar("Made", bound=type[Task])


class Tasks(Registry[Task]):
    """Holds one object of each class that is registered, and tells the class its name."""

    def register(self, name: str, **properties: object) -> Callable[[Made], Made]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decorator of a class derived from `Task`."""
        add = super().register(name, **properties)

        def named(cls: Made) -> Made:
            if not (isinstance(cls, type) and issubclass(cls, Task)):
                raise ConfigError(f"A task is a class derived from ee_surgery.Task, not {cls!r}.")
            cls.name = name
            add(cls())
            return cls

        return named


TASKS = Tasks("task")
"""Name -> task."""


# --- which task, and who fits it


def as_task(task: str | Task | type[Task]) -> Task:
    """A task by its name, class or object.

    Raises:
        ConfigError: it is none of these, or its class is not registered.
        UnknownNameError: no task of that name.
    """
    if isinstance(task, str):
        return TASKS[task]
    found = task() if isinstance(task, type) and issubclass(task, Task) else task
    if not isinstance(found, Task) or type(TASKS.get(found.name)) is not type(found):
        raise ConfigError(
            f"task must be a name in TASKS ({', '.join(TASKS)}) or a class registered there, got {task!r}."
        )
    return found


def stored_task(name: str, options: Mapping[str, Any]) -> Task:
    """A task by its name and its `options`.

    Raises:
        ConfigError: it has no such options, or they make no sense.
        UnknownNameError: no task of that name.
    """
    cls = type(TASKS[name])
    if unknown := sorted(options.keys() - TASKS[name].options().keys()):
        raise ConfigError(f"The task {name!r} has no option {unknown[0]!r}.")
    return cls(**options)


def fits(tasks: TaskNames, task: Task) -> bool:
    """Whether something that is for `tasks` can be used with a task."""
    return tasks is None or not task.kinds().isdisjoint(tasks)


def require(what: str, tasks: TaskNames, task: Task) -> None:
    """Refuse what is not for a task.

    Args:
        what: as errors call it.
    Raises:
        ConfigError: it is for others.
    """
    if not fits(tasks, task):
        known = " or ".join(map(repr, tasks or ()))
        made = "for answers that are choices" if tasks == CHOICES else f"for the task {known}"
        raise ConfigError(f"{what} is made {made}, and this model's task is {task.name!r}: choose another.")


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b.to(a.device)).all())
    return type(a) is type(b) and a == b


def _share(right: Tensor) -> Tensor:
    return right.float() if right.ndim == 1 else right.float().flatten(1).mean(1)


def check_vectors(logits: Tensor, rows: int, model_id: str) -> None:
    """Refuse what is no tensor (B, C).

    Raises:
        CaptureError: what it is instead.
    """
    if logits.ndim != 2 or logits.shape[0] != rows or not logits.is_floating_point():
        raise CaptureError(
            f"{model_id} answers with a tensor of shape {tuple(logits.shape)} and type {logits.dtype}, not logits of "
            f"shape ({rows}, classes). Build it with a classification head, or say how many classes a head on these "
            "features shall tell apart: num_classes=. Features are answers too: task=ee.Embedding(); and numbers, with "
            "task=ee.Regression(tolerance=). Detectors and generators answer with lists of no fixed shape."
        )


def one_a_sample(target: Tensor, rows: int) -> None:
    """Refuse labels that are not one for each of the inputs."""
    if target.ndim == 0 or len(target) != rows:
        raise DataError(f"{rows} inputs but labels of shape {tuple(target.shape)} in one batch.")
