"""What an answer is: how sure it is, whether it is right, what its labels and its loss are. Everything else asks here.

A task reads the logits (B, C) of one exit or of the original. To add one, derive from `Task` (or from a member that is
near), fill in the five abstract methods, and register the class:

    @TASKS.register("ordinal")
    class Ordinal(Classification): ...

    ee.augment(model, task="ordinal")

What only some tasks can use (a branch, a score, a calibrator, a loss) names them in `tasks`, see `require`; scores,
losses and risks that say nothing are for one right class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.errors import CaptureError, ConfigError, DataError
from ee_surgery.registry import Registry

IGNORED = -100
"""Label of an ignored sample: `ignore_index` of `torch.nn.functional.cross_entropy`."""

TaskNames: TypeAlias = tuple[str, ...] | None
"""Names of the tasks that something is for, their descendants included; None: for all."""


class Task(ABC):
    """One kind of answer, without state: B samples, C numbers each.

    An answer is one or several *choices*, each among some *options*: one choice among C classes, or C choices between
    yes and no. `log_probabilities` says how likely each option is, and scores are worked out from that.
    """

    name: ClassVar[str] = ""
    """Its name in `TASKS`; set by registering it."""
    measure: ClassVar[str] = "accuracy"
    """What reports call the mean outcome on labelled data; a fraction in [0, 1]."""
    measures: ClassVar[Mapping[str, Callable[[Tensor, Tensor], float]]] = {}
    """More to report of a whole data set: name -> function of all logits (N, C) and labels."""
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

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @classmethod
    def kinds(cls) -> set[str]:
        """Its name, and those of the tasks that it derives from."""
        return {vars(base)["name"] for base in cls.__mro__ if vars(base).get("name")}

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
        """How sure an answer is, (B,) in [0, 1]: the probability of the most likely option, mean over the choices."""
        return self.reduce(self.probabilities(logits).amax(-1))

    def reduce(self, choices: Tensor) -> Tensor:
        """A number for each choice to one for each sample: (B, ...) -> (B,), the mean."""
        return choices if choices.ndim == 1 else choices.flatten(1).mean(1)

    def weakest(self, choices: Tensor) -> Tensor:
        """The same, the smallest: an answer is as sure as its least sure choice."""
        return choices if choices.ndim == 1 else choices.flatten(1).amin(1)

    def finite(self, logits: Tensor) -> Tensor:
        """Where all logits are finite, bool (B,)."""
        return torch.isfinite(logits).flatten(1).all(1)

    def empty(self, like: Tensor, rows: int) -> Tensor:
        """Room for the answers to so many samples, of the kind of `like`."""
        return like.new_empty((rows, *like.shape[1:]))


class Tasks(Registry[Task]):
    """Holds one object of each class that is registered, and tells the class its name."""

    def register(self, name: str, **properties: object) -> Callable[[type[Task]], type[Task]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decorator of a class derived from `Task`."""
        add = super().register(name, **properties)

        def named(cls: type[Task]) -> type[Task]:
            if not (isinstance(cls, type) and issubclass(cls, Task)):
                raise ConfigError(f"A task is a class derived from ee_surgery.Task, not {cls!r}.")
            cls.name = name
            add(cls())
            return cls

        return named


TASKS = Tasks("task")
"""Name -> task."""


@TASKS.register("classification")
class Classification(Task):
    """One right class of C: softmax, cross-entropy, accuracy. Labels are class numbers (B,) or probabilities (B, C)."""

    whole = True
    class_numbers = True
    least = 2
    decided = "output.logits.argmax(-1)"
    problem_types = ("single_label_classification",)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(B, C)."""
        return F.log_softmax(logits, -1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C)."""
        return torch.softmax(logits, -1)

    def certainty(self, logits: Tensor) -> Tensor:
        """The largest probability, (B,)."""
        return torch.softmax(logits, -1).amax(-1)  # asked at every exit: two calls less

    def labels_from(self, logits: Tensor) -> Tensor:
        """The class with the largest logit, int64 (B,)."""
        return logits.argmax(-1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, (B,)."""
        return F.cross_entropy(logits, target, reduction="none")

    def mean_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar."""
        return F.cross_entropy(logits, target)

    def hard(self, target: Tensor) -> Tensor:
        """Class numbers, int64 (B,)."""
        return target if target.ndim == 1 else target.argmax(1).masked_fill(self.ignored(target), IGNORED)

    def ignored(self, target: Tensor) -> Tensor:
        """Those labelled -100, and rows of zeros."""
        return target == IGNORED if target.ndim == 1 else target.sum(1) == 0

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels as class numbers, int64 (B,), or as class probabilities, floating (B, C).

        Args:
            target: integers of any width, (B,) or (B, 1); one-hot integers or probabilities (B, C). A sample labelled
                -100, or with a row of zeros, is ignored.
            classes: C.
            rows: B.
        Raises:
            DataError: they are neither; what was seen is named.
        """
        _one_a_sample(target, rows)
        if target.ndim == 2 and target.shape[1] == classes > 1 and not target.is_complex():
            return _distributions(target)
        if target.ndim == 2 and target.shape[1] == 1:
            target = target.squeeze(1)  # (B, 1) beside (B,) answers would compare every sample with every other
        wanted = f"Labels must be class numbers below {classes} (or probabilities of shape (B, C)); got "
        if target.ndim != 1:
            raise DataError(f"{wanted}a tensor of shape {tuple(target.shape)}.")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            seen = f", {target[:3].tolist()} ..." if len(target) else ""
            raise DataError(f"{wanted}{target.dtype}{seen}. Where these are class numbers, give labels.long().")
        target = target.long()
        counted = target[target != IGNORED]
        if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            low, high = int(counted.min()), int(counted.max())
            raise DataError(f"{wanted}{low} to {high}. {_advice(low, high, classes)}")
        return target

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """Logits of a softmax over two classes or more."""
        if logits.shape in ((rows, 1), (rows,)) and logits.is_floating_point():
            raise CaptureError(
                f"{model_id} answers with one number per sample, {tuple(logits.shape)}: a binary head (sigmoid) or a "
                "regression, not a softmax over classes. If a sigmoid makes a probability of it, say "
                'task="multi_label" (the answer must be of shape (B, 1)), or wrap the model in a module that answers '
                "with two classes, [0, z], whose softmax is the sigmoid of z: torch.stack([torch.zeros_like(z), z], 1) "
                "for z (B,). A regression has no confidence to leave by."
            )
        _check_shape(logits, rows, model_id)
        if _are_probabilities(logits):
            raise CaptureError(
                f"{model_id} answers with probabilities (they sum to 1 over the classes), not logits: {PROBABILITIES}"
            )


def mean_average_precision(logits: Tensor, target: Tensor) -> float:
    """Mean over the labels that occur of the average precision of ranking the samples by each; NaN where none occurs.

    Args:
        logits: (N, C).
        target: 0 or 1, (N, C).
    """
    order = logits.argsort(dim=0, descending=True, stable=True)
    ranked, there = logits.gather(0, order), (target > 0.5).double().gather(0, order)
    found = there.cumsum(0)
    precision = found / torch.arange(1, len(logits) + 1, dtype=torch.float64, device=logits.device)[:, None]
    # samples of equal logits have one rank, the last of theirs: their order in the data means nothing
    ends = torch.ones_like(ranked, dtype=torch.bool)
    ends[:-1] = ranked[1:] != ranked[:-1]
    later = torch.where(ends, torch.arange(len(logits), device=logits.device)[:, None], len(logits) - 1)
    precision = precision.gather(0, later.flip(0).cummin(0).values.flip(0))
    occurs = found[-1] > 0
    return ((precision * there).sum(0)[occurs] / found[-1][occurs]).mean().item()


@TASKS.register("multi_label")
class MultiLabel(Task):
    """C labels, each present or not on its own: sigmoid, binary cross-entropy. Labels are multi-hot, (B, C).

    An outcome is the share of the C labels that are decided, at a probability of 0.5, as the sample's labels say.
    """

    measure = "label accuracy"
    decided = "output.logits > 0"
    measures = {"mean_average_precision": mean_average_precision}  # noqa: RUF012
    problem_types = ("multi_label_classification",)
    states = "multi_label_classification"

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of being absent and present, (B, C, 2)."""
        return F.logsigmoid(torch.stack([-logits, logits], -1))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of being absent and present, (B, C, 2)."""
        return torch.sigmoid(torch.stack([-logits, logits], -1))

    def labels_from(self, logits: Tensor) -> Tensor:
        """1 for labels of a probability above 0.5, else 0, floating (B, C)."""
        return (logits > 0).float()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy, mean over the labels, (B,)."""
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean(1)

    def hard(self, target: Tensor) -> Tensor:
        """0, 1, or -100 for ignored samples, floating (B, C)."""
        return torch.where(target == IGNORED, target, (target > 0.5).to(target.dtype))

    def check_target(self, target: Tensor, classes: int, rows: int) -> Tensor:
        """Labels as floating (B, C): 1 where present, 0 where not, or a probability; rows of -100 are ignored.

        Args:
            target: booleans, integers or floating point numbers, (B, C).
            classes: C.
            rows: B.
        Raises:
            DataError: another shape, or other numbers.
        """
        _one_a_sample(target, rows)
        wanted = f"Labels of a multi-label model are multi-hot, of shape (B, {classes}), from 0 (absent) to 1 (present)"
        if target.ndim != 2 or target.shape[1] != classes or target.is_complex():
            raise DataError(f"{wanted}; got {target.dtype} of shape {tuple(target.shape)}.")
        target = target if target.is_floating_point() else target.float()
        target = target if target.dtype in (torch.float32, torch.float64) else target.float()
        good = ((target >= 0) & (target <= 1)).all(1) | self.ignored(target)
        if not bool(good.all()):
            row = target[int((~good).nonzero()[0])]
            raise DataError(f"{wanted}; a row is {row[:5].tolist()} ... A row of {IGNORED} alone is ignored.")
        return target

    def check(self, logits: Tensor, rows: int, model_id: str) -> None:
        """One logit a label, of any number."""
        _check_shape(logits, rows, model_id)


CLASSIFICATION = TASKS["classification"]


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
    if not isinstance(found, Task) or TASKS.get(found.name) != found:
        raise ConfigError(
            f"task must be a name in TASKS ({', '.join(TASKS)}) or a class registered there, got {task!r}."
        )
    return found


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
        raise ConfigError(
            f"{what} is made for the task {known}, and this model's task is {task.name!r}: choose another."
        )


PROBABILITIES = (
    "losses and scores would take the softmax of a softmax. Leave the softmax out, or wrap the model in a module that "
    "answers with the logarithm of its probabilities."
)


def _check_shape(logits: Tensor, rows: int, model_id: str) -> None:
    if logits.ndim != 2 or logits.shape[0] != rows or not logits.is_floating_point():
        raise CaptureError(
            f"{model_id} answers with a tensor of shape {tuple(logits.shape)} and type {logits.dtype}, not logits of "
            f"shape ({rows}, classes). Build it with a classification head, or say how many classes a head on these "
            "features shall tell apart: num_classes=. Detectors, segmenters and generators have no such logits."
        )


def _are_probabilities(logits: Tensor) -> bool:
    if logits.is_meta:
        return False
    numbers = logits.detach().double()
    near = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(((numbers >= 0) & (numbers <= 1)).all() and ((numbers.sum(1) - 1).abs() <= near).all())


def _share(right: Tensor) -> Tensor:
    return right.float() if right.ndim == 1 else right.float().flatten(1).mean(1)


def _one_a_sample(target: Tensor, rows: int) -> None:
    if target.ndim == 0 or len(target) != rows:
        raise DataError(f"{rows} inputs but labels of shape {tuple(target.shape)} in one batch.")


def _distributions(labels: Tensor) -> Tensor:
    """Rows (B, C) as probabilities, or as class numbers where they are integers."""
    total = labels.double().sum(1)
    whole = not labels.is_floating_point()
    one = (total - 1).abs() <= (0 if whole else 1e-2)
    good = torch.isfinite(total) & (one | (total == 0)) & (labels >= 0).all(1)
    if not bool(good.all()):
        row = labels[int((~good).nonzero()[0])]
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} must be one-hot or probabilities, each row summing to 1; a row is "
            f"{row[:5].tolist()} ... with sum {row.sum().item():g}. Several classes for one sample are labels of a "
            'model with task="multi_label".'
        )
    return torch.where(total == 0, IGNORED, labels.long().argmax(1)) if whole else labels.float()


def _advice(low: int, high: int, classes: int) -> str:
    if low == 1 and high == classes:
        return "Numbered from 1? The first class is 0: give labels - 1."
    if low < 0:
        return f"Label samples without a class {IGNORED}: they are ignored."
    return "If these are not the model's classes, map them with class_map=."
