"""What a model answers with: where its logits are, and of which task they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ee_surgery.errors import CaptureError, ConfigError
from ee_surgery.task import CLASSIFICATION, SEGMENTATION, TASKS, Task, as_task

OutputKey: TypeAlias = int | str | Sequence[int | str]
"""Which part of an answer the logits are: an index, a name, or several of them from the outside in."""

_EMBEDDINGS = ("image_embeds", "text_embeds", "sentence_embedding", "pooler_output")
_FEATURES = ("pooler_output", "last_hidden_state")  # what transformers models without a head answer with
_LOGITS, _MAP = "logits", "out"  # of transformers; of torchvision's segmenters, beside that of a head for training
_NO_LOGITS = ("pool", "hidden", "embed", "feature", "box")  # in the names of what has the shape of logits


@dataclass(frozen=True)
class Step:
    """One step into an answer of several parts."""

    kind: type
    """Of the container."""
    key: int | str
    size: int
    """How many parts it has."""


@dataclass(frozen=True)
class LogitsPlace:
    """The place of the logits in an output; no steps if the output is the logits."""

    steps: tuple[Step, ...] = ()

    def read(self, output: object) -> Tensor | None:
        """The logits of an answer; None where it is of another form."""
        for step in self.steps:
            parts = _parts(output)
            if step.key not in parts:
                return None
            output = parts[step.key]
        return output if isinstance(output, Tensor) else None

    def wrap(self, logits: Tensor) -> Any:
        """Logits as an answer of that form: None stands for the other parts of a tuple, mappings leave them out."""
        answer: Any = logits
        for step in reversed(self.steps):
            fields = getattr(step.kind, "_fields", None)
            if issubclass(step.kind, Mapping):
                answer = step.kind(**{step.key: answer}) if isinstance(step.key, str) else {step.key: answer}
            elif fields:
                answer = step.kind(**{**dict.fromkeys(fields), step.key: answer})
            else:
                items = [answer if i == step.key else None for i in range(step.size)]
                answer = items if issubclass(step.kind, list) else tuple(items)
        return answer


def locate(
    output: object,
    model_id: str,
    rows: int | None = None,
    wanted: OutputKey | None = None,
    features: bool = False,
    classes: int | None = None,
    task: Task | None = None,
) -> LogitsPlace:
    """Where the logits are in what a model answered.

    Args:
        rows: samples that were answered; any number when left out.
        wanted: where the user says that they are.
        task: what they are; where it is not known, vectors are looked for first, then maps.
        features: look for the features that a new head reads instead.
        classes: how many the model's configuration says it has.
    Raises:
        CaptureError: no tensor could be logits, or several could.
        ConfigError: there is no tensor at `wanted`.
    """
    found = dict(_leaves(output))
    listed = ", ".join(f"{_name(steps)} {tuple(tensor.shape)}" for steps, tensor in found.items())
    if wanted is not None:
        keys = [wanted] if isinstance(wanted, (int, str)) else [*wanted]
        for steps in found:
            if _is_at(steps, keys):
                return LogitsPlace(steps)
        raise ConfigError(
            f"output={wanted!r}: {model_id} answers with no tensor there. "
            + (
                f"It answers with {listed}."
                if found and () not in found
                else "It answers with one tensor: leave it out."
            )
        )
    if isinstance(output, Tensor):
        return LogitsPlace()
    if features:
        candidates, what = _features(output, found), "features that a head could read"
    elif task is not None and task.of_features:
        candidates, what = _embeddings(found, rows), "embeddings of shape (B, D)"
    else:
        ranks = (CLASSIFICATION.rank, SEGMENTATION.rank) if task is None else task.ranks or (task.rank,)
        looks = [(_logits(found, rows, classes, rank), f"logits of shape {_SHAPES[rank]}") for rank in ranks]
        candidates, what = next((look for look in looks if look[0]), looks[0])
    if len(candidates) == 1:
        return LogitsPlace(candidates[0])
    if not candidates:
        raise CaptureError(
            f"No {what} in the {type(output).__name__} that {model_id} answers with ({listed or 'no tensors'}). "
            "Say where they are (output=), wrap the model in a module that returns them and pass a sample, or, for a "
            "model without a head, say how many classes a head on its features shall tell apart: num_classes=."
        )
    names = ", ".join(f"{_name(steps)} {tuple(found[steps].shape)}" for steps in candidates)
    raise CaptureError(
        f"{model_id} answers with a {type(output).__name__} in which several tensors could be {what}: {names}. "
        f"Say which: output={_key(candidates[0])!r}, for example."
    )


def pick_task(
    wanted: str | Task | type[Task] | None, model: nn.Module, model_id: str, headless: bool = False
) -> Task | None:
    """The task of a model: what the user says, or what its configuration does; None where neither does.

    Args:
        model: of transformers, whose configuration may say `problem_type`; or any.
        headless: the model has no head, and its configuration says nothing about the new one.
    Raises:
        CaptureError: a regression, and the user does not say that it is something else.
        ConfigError, UnknownNameError: there is no such task.
    """
    if wanted is not None:
        return as_task(wanted)
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    if problem_type is None:
        return None
    found = next((task for task in TASKS.values() if problem_type in task.problem_types), None)
    if found is None and not headless:
        raise CaptureError(
            f"The configuration of {model_id} says problem_type={problem_type!r}: say how large an error still counts "
            "as right, task=ee.Regression(tolerance=). If it is an ordinary classifier, set config.problem_type to "
            "'single_label_classification', or say task=\"classification\"; if each answer goes through a sigmoid, "
            'task="multi_label".'
        )
    return found


def task_of(logits: Tensor) -> Task:
    """The task of a model that does not say one, by the form of its answer: maps (B, C, h, w) are of segmentation."""
    return SEGMENTATION if logits.ndim == SEGMENTATION.rank else CLASSIFICATION


def check_logits(logits: Tensor, rows: int, model: nn.Module, model_id: str, task: Task) -> None:
    """Refuse answers that are not logits of the task: every loss and score takes them so.

    Args:
        logits: what was taken for them, in the answer to `rows` samples.
        model: of timm or transformers, whose configuration may say what they are; or any.
    Raises:
        CaptureError: what they are instead, and the way out.
    """
    task.check(logits, rows, model_id)
    if declared_classes(model) == 0 and not task.of_features:
        raise CaptureError(
            f"{model_id} was built without a classification head (for 0 classes) and answers with features, not logits "
            f"of shape ({rows}, classes): say how many classes a head on them shall tell apart, num_classes=; or that "
            "features are the answer, task=ee.Embedding()."
        )


def declared_classes(model: nn.Module) -> int | None:
    """How many classes a model of timm or transformers was built for, as far as it says."""
    return getattr(model, "num_classes", getattr(getattr(model, "config", None), "num_labels", None))


_SHAPES = {2: "(B, C)", 3: "(B, h, w)", 4: "(B, C, h, w)"}


def _logits(
    found: Mapping[tuple[Step, ...], Tensor], rows: int | None, classes: int | None, rank: int
) -> list[tuple[Step, ...]]:
    named = [steps for steps in found if len(steps) == 1 and steps[0].key == _LOGITS]
    if named:
        return named
    shaped = [steps for steps, tensor in found.items() if tensor.ndim == rank and _of_rows(tensor, rows)]
    # Some classifiers of transformers have their logits under a name of features (PP-LCNet).
    likely = [steps for steps in shaped if not _named_otherwise(steps[-1].key)]
    if rank == SEGMENTATION.rank:
        likely = [steps for steps in likely if steps[-1].key == _MAP] or likely
    return likely or [steps for steps in shaped if found[steps].shape[1] == classes]


def _named_otherwise(key: int | str) -> bool:
    name = str(key).lower()
    return "logit" not in name and any(word in name for word in _NO_LOGITS)


def _features(output: object, found: Mapping[tuple[Step, ...], Tensor]) -> list[tuple[Step, ...]]:
    floats = [steps for steps, tensor in found.items() if tensor.is_floating_point() and tensor.ndim > 1]
    for name in _FEATURES:
        if named := [steps for steps in floats if len(steps) == 1 and steps[0].key == name]:
            return named
    return floats[-1:] if isinstance(output, list) else floats  # maps of several depths end in the deepest


def _embeddings(found: Mapping[tuple[Step, ...], Tensor], rows: int | None) -> list[tuple[Step, ...]]:
    for name in _EMBEDDINGS:
        if named := [steps for steps in found if len(steps) == 1 and steps[0].key == name]:
            return named
    return [steps for steps, tensor in found.items() if tensor.ndim == CLASSIFICATION.rank and _of_rows(tensor, rows)]


def _of_rows(tensor: Tensor, rows: int | None) -> bool:
    return tensor.is_floating_point() and (rows is None or tensor.shape[0] == rows)


def _parts(value: object) -> dict[Any, Any]:
    """The parts of a container by index or name; nothing of anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return {}


def _leaves(value: object, steps: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield steps, value
    parts = _parts(value)
    for key, part in parts.items():
        yield from _leaves(part, (*steps, Step(type(value), key, len(parts))))


def _is_at(steps: tuple[Step, ...], keys: Sequence[int | str]) -> bool:
    """Whether these keys lead there: tuples with names know both, and indices from the end."""
    return len(steps) == len(keys) and all(_is(step, key) for step, key in zip(steps, keys, strict=True))


def _is(step: Step, key: int | str) -> bool:
    fields = getattr(step.kind, "_fields", None)
    if isinstance(key, str) or issubclass(step.kind, Mapping):
        return step.key == key
    index = key + step.size if key < 0 else key
    return step.key == (fields[index] if fields and index < step.size else index)


def _key(steps: tuple[Step, ...]) -> int | str | tuple[int | str, ...]:
    keys = tuple(step.key for step in steps)
    return keys[0] if len(keys) == 1 else keys


def _name(steps: tuple[Step, ...]) -> str:
    return "the answer" if not steps else repr(_key(steps))
