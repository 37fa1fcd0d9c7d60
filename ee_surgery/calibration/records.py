"""Logits of every exit on held-out data, on which thresholds are chosen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_surgery.checks import flag, instance, names, numbers, refuse
from ee_surgery.errors import ConfigError, DataError
from ee_surgery.files import atomic_write
from ee_surgery.policies.exit_costs import exit_costs
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import ThresholdPolicy, certainty
from ee_surgery.policies.scores import FittedScore, ScoreOf, State, sound
from ee_surgery.tables import Tabular, table
from ee_surgery.task import CLASSIFICATION, Task, as_task, stored_task

FORMAT_VERSION = 2
FIRST_FORMAT = 1
"""Logits of one right class: written where there is nothing else to say, so that older versions read it."""
_SCORES_KEPT = 16  # of one set of records: names, and fitted scores, of which every search makes new ones


def _check_logits(logits: Tensor, task: Task) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        refuse("logits", "floating point numbers of shape (exits, samples, classes)", logits, DataError)
    if logits.shape[2] < task.least:
        wanted = f"floating point numbers of shape (exits, samples, classes), with at least {task.least} classes"
        refuse("logits", wanted, logits, DataError)


def _checked_labels(labels: Tensor, task: Task, n: int, classes: int | None) -> Tensor:
    """Labels in the form that outcomes are worked out from; `classes` is None where no logits tell it.

    Raises:
        DataError: they are no labels of this task; what was seen is named.
    """
    if task.class_numbers:
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _WHOLE:
            refuse("labels", f"whole numbers of shape ({n},)", labels, DataError)
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if classes is not None and not 0 <= low <= high < classes:
            raise DataError(f"labels must be class numbers below {classes}, got {low} to {high}.")
        return labels.long()
    if not isinstance(labels, Tensor) or labels.ndim < 1:
        refuse("labels", f"a tensor of {n} rows", labels, DataError)
    return labels if classes is None else task.hard(task.check_target(labels, task.classes(classes), n))


def _check_rows(name: str, found: object, rows: int, n: int) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != (rows, n):
        refuse(name, f"numbers of shape {(rows, n)}, one for each branch and sample", found, DataError)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Replay(NamedTuple):
    """Where each recorded sample would leave, with the results."""

    exit_index: Tensor
    """int64, shape (N,)."""
    answer_index: Tensor
    """Whose answer each sample gets: `exit_index`, unless the policy falls back on the most confident."""
    outcome: Tensor
    """What each answer is worth, float64 in [0, 1], shape (N,): 1 where it is right."""
    macs: Tensor
    """float64, shape (N,): trunk and every branch visited."""

    @property
    def correct(self) -> Tensor:
        """Whether each answer is wholly right, bool, shape (N,)."""
        return self.outcome == 1


@dataclass(frozen=True, eq=False)
class ExitRecords(Tabular):
    """What all K exits (the original's head last) answered to N held-out samples, and what each answer is worth.

    Without labels, the original's own answer stands for the truth, and accuracy means agreement with it. Thresholds are
    chosen on scores and `outcomes`; logits are there to work out any score, and may be left out (`without_logits`).
    """

    exits: tuple[str, ...]
    """Names of the K - 1 branches' exit points."""
    logits: Tensor | None
    """float32, shape (K, N, C)."""
    trunk_macs: tuple[int, ...]
    """MACs of the original up to each exit, K numbers; the last is the whole original."""
    branch_macs: tuple[int, ...]
    """MACs of each branch, K - 1 numbers."""
    labels: Tensor | None = None
    """In the form of `Task.labels_from`: for one right class int64, shape (N,)."""
    confidence: Tensor | None = None
    """Confidence logits of the branches, float32, shape (K - 1, N)."""
    chained: bool = False
    """Whether each branch reads the outputs of earlier ones, which then all have to run."""
    task: Task = CLASSIFICATION
    """What the answers are; also by its name in `TASKS`."""
    outcomes: Tensor = None  # pyright: ignore[reportAssignmentType]
    """What each answer is worth, float64 in [0, 1], shape (K, N): for one right class, 1 where it is right. Worked out
    from the logits where they are there, whatever is given."""
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    """Scores of the branches, (K - 1, N) each, by name, where there are no logits to work them out from; and, (K, N),
    `certainty`, what `most_confident` compares exits by, and `agreement`, how far each answer is the original's."""
    tallies: Tensor | None = None
    """Where there are labels and no logits, what the measures of a whole data set need of each answer, (K, N, T); see
    `Task.tally`."""
    labelled: bool = False
    """Whether labels said what is right; without logits, the labels themselves are not kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", tuple(names("exits", self.exits, DataError)))
        for name in ("trunk_macs", "branch_macs"):
            object.__setattr__(self, name, numbers(name, getattr(self, name), low=0, error=DataError))
        flag("chained", self.chained, DataError)
        object.__setattr__(self, "task", as_task(self.task))
        if self.logits is None:
            (k, n), classes = self._check_recorded(), None
        else:
            _check_logits(self.logits, self.task)
            k, n, classes = self.logits.shape
        if self.labels is not None:
            object.__setattr__(self, "labels", _checked_labels(self.labels, self.task, n, classes))
        told = self.logits is None and flag("labelled", self.labelled, DataError)
        object.__setattr__(self, "labelled", self.labels is not None or told)
        if self.tallies is not None and (self.tallies.ndim != 3 or tuple(self.tallies.shape[:2]) != (k, n)):
            refuse("tallies", f"numbers of shape {(k, n)} and as many more", self.tallies, DataError)
        if self.confidence is not None:
            _check_rows("confidence", self.confidence, k - 1, n)
        sizes = (len(self.exits) + 1, len(self.trunk_macs), len(self.branch_macs) + 1)
        if set(sizes) != {k} or (self.labels is not None and len(self.labels) != n):
            raise DataError(
                f"Records do not fit together: {k} rows of answers to {n} samples, {len(self.exits)} exits, "
                f"{len(self.trunk_macs)} trunk and {len(self.branch_macs)} branch costs, "
                f"{None if self.labels is None else len(self.labels)} labels."
            )
        if n == 0:
            raise DataError("Records of no samples: the data is empty.")
        if list(self.trunk_macs) != sorted(self.trunk_macs) or not self.trunk_macs[-1]:
            raise DataError(f"trunk_macs must rise to the cost of the whole original, got {self.trunk_macs}.")
        outcomes = self.outcomes
        if self.logits is not None:
            outcomes = torch.stack([self.task.outcome(row, self.target) for row in self.logits])
        object.__setattr__(self, "outcomes", self._checked_outcomes(outcomes, k, n))

    def _check_recorded(self) -> tuple[int, int]:
        """K and N, of records without logits."""
        if not isinstance(self.outcomes, Tensor) or self.outcomes.ndim != 2:
            wanted = "numbers in [0, 1] of shape (exits, samples), as there are no logits"
            refuse("outcomes", wanted, self.outcomes, DataError)
        k, n = self.outcomes.shape
        for name, rows in self.recorded.items():
            _check_rows(f"recorded[{name!r}]", rows, k if name in OF_ALL else k - 1, n)
        return k, n

    def _checked_outcomes(self, outcomes: Tensor, k: int, n: int) -> Tensor:
        """Outcomes (K, N) as float64, fit for means and, where they are whole, for tests of counts.

        Raises:
            DataError: outside [0, 1], or between 0 and 1 where the task says that there is nothing between.
        """
        whole = ((outcomes == 0) | (outcomes == 1)).all() if self.task.whole else True
        if outcomes.shape != (k, n) or not bool(((outcomes >= 0) & (outcomes <= 1)).all()) or not whole:
            wanted = "0 or 1, as it says whole = True" if self.task.whole else "a number in [0, 1]"
            raise DataError(f"An outcome of the task {self.task.name!r} must be {wanted}, one for each sample.")
        return outcomes.double()

    def __len__(self) -> int:
        return self.outcomes.shape[1]

    def recorded_logits(self) -> Tensor:
        """The logits, (K, N, C).

        Raises:
            DataError: these records were made without.
        """
        if self.logits is None:
            known = ", ".join(sorted(self.recorded.keys() - OF_ALL)) or "none"
            raise DataError(
                f"These records hold no logits, which this needs; scores that they hold: {known}. Record again."
            )
        return self.logits

    @property
    def has_probabilities(self) -> bool:
        """Whether probabilities can be worked out: there are logits, and of choices."""
        return self.logits is not None and self.task.chooses

    @cached_property
    def target(self) -> Tensor:
        """The labels, or the original's answers where there are none, (N, ...)."""
        return self.labels if self.labels is not None else self.task.labels_from(self.recorded_logits()[-1])

    @cached_property
    def correct(self) -> Tensor:
        """Whether each answer is wholly right, bool, shape (K, N)."""
        return self.outcomes == 1

    @property
    def accuracies(self) -> list[float]:
        """Mean outcome of each exit alone, in [0, 1]; the original's last."""
        return [row.mean().item() for row in self.outcomes]

    @property
    def base_macs(self) -> int:
        """MACs of the original alone."""
        return self.trunk_macs[-1]

    @property
    def base_accuracy(self) -> float:
        """Of the original."""
        return self.accuracies[-1]

    @property
    def exit_macs(self) -> list[float]:
        """Cost of leaving at each exit as a fraction of the original's MACs, counting only that exit's own branch."""
        early = [trunk + branch for trunk, branch in zip(self.trunk_macs, self.branch_macs, strict=False)]
        return [cost / self.base_macs for cost in (*early, self.base_macs)]

    def rows(self) -> list[dict[str, Any]]:
        """One per sample and exit, K N of them: outcome, agreement with the original and certainty, of one class also
        the answer and the label, and the cost of leaving there with that exit's branch alone."""
        one = self.target.ndim == 1 and self.logits is not None and self.task.chooses
        columns = {"outcome": self.outcomes, "agreement": self.agreement, "certainty": self.certainty}
        if one:
            answers = self.recorded_logits().argmax(-1)
            columns |= {"answer": answers, "label": self.target.expand_as(answers)}
        values, costs = {name: tensor.tolist() for name, tensor in columns.items()}, self.exit_macs
        return [
            {"sample": i, "exit": name, "macs_fraction": costs[k], **{key: all[k][i] for key, all in values.items()}}
            for i in range(len(self))
            for k, name in enumerate((*self.exits, "original"))
        ]

    def table(self) -> Table:
        """Each exit alone: its cost, with its branch, and the mean outcome."""
        what = self.task.measure if self.labelled else "agreement"
        each = zip((*self.exits, "original"), self.exit_macs, self.accuracies, strict=True)
        rows = [[name, f"{cost:.1%}", f"{accuracy:.2%}"] for name, cost, accuracy in each]
        columns: dict[str, Literal["left", "right"]] = {"exit": "left", "MACs": "right", what: "right"}
        return table(f"Each exit alone, {len(self)} samples", "", columns, rows)

    def scores(self, which: str | FittedScore) -> Tensor:
        """The score of every branch for every sample, (K - 1, N); -inf where it or what it reads is not finite.

        Raises:
            ConfigError: it is not for this task.
            DataError: these records hold neither logits nor this score.
        """
        if self.logits is None and isinstance(which, str) and which in self.recorded:
            return self.recorded[which]
        if which not in self._scores:
            if self.logits is None and isinstance(which, FittedScore) and which.of_scores:
                found = which.from_scores([self.recorded[name] for name in which.of_scores])
            else:
                found = self._score(ScoreOf(which, self.task))
            while len(self._scores) >= _SCORES_KEPT:
                del self._scores[next(iter(self._scores))]
            self._scores[which] = found
        return self._scores[which]

    @cached_property
    def _scores(self) -> dict[str | FittedScore, Tensor]:
        return {}

    def _score(self, score: ScoreOf) -> Tensor:
        state: State = ()
        rows: list[Tensor] = []
        logits = self.recorded_logits()
        for k in range(len(self.exits)):
            confidence = None if self.confidence is None else self.confidence[k]
            value, state = score(logits[k], confidence, state, k)
            rows.append(torch.nan_to_num(sound(value, logits[k]), nan=-torch.inf))
        return torch.stack(rows)

    def keep_scores(self, which: str | FittedScore, scores: Tensor) -> None:
        """Scores as another engine worked them out, (K - 1, N): it rounds differently, and thresholds are for it."""
        _check_rows("scores", scores, len(self.exits), len(self))
        self._scores[which] = torch.nan_to_num(scores, nan=-torch.inf)

    def replay(self, policy: ThresholdPolicy) -> Replay:
        """Decide on the records as a routed run would: same exits, nothing recomputed.

        Raises:
            ConfigError: not a policy, or one for a different number of exits.
        """
        instance("policy", policy, ThresholdPolicy)
        if len(policy.thresholds) != len(self.exits):
            raise ConfigError(f"The policy has {len(policy.thresholds)} thresholds, these records {len(self.exits)}.")
        scores, last = self.scores(policy.score), len(self.exits)
        leaves = (scores >= torch.tensor(policy.thresholds, dtype=torch.float32)[:, None]) & (scores > -torch.inf)
        # the first exit that is reached; a row of ones at the end takes the remaining samples
        exit_index = torch.cat([leaves, leaves.new_ones(1, len(self))]).int().argmax(0)
        answer_index = exit_index
        visits = policy.visits(self.chained)
        if policy.fallback == "most_confident":
            seen = torch.tensor([*visits, True])[:, None]
            sure = self.certainty.masked_fill(~seen, -torch.inf)
            surest = sure.argmax(0).masked_fill(sure.amax(0) == -torch.inf, last)
            answer_index = torch.where(exit_index == last, surest, exit_index)
        outcome = self.outcomes.gather(0, answer_index[None])[0]
        costs = exit_costs(self.trunk_macs, self.branch_macs, visits)
        return Replay(exit_index, answer_index, outcome, torch.tensor(costs, dtype=torch.float64)[exit_index])

    @cached_property
    def certainty(self) -> Tensor:
        """What `most_confident` compares exits by, (K, N), see `Task.certainty`; -inf where not finite."""
        if self.logits is None and CERTAINTY in self.recorded:
            return self.recorded[CERTAINTY]
        return torch.stack([certainty(row, self.task) for row in self.recorded_logits()])

    @cached_property
    def agreement(self) -> Tensor:
        """How far each exit's answer is the original's, (K, N) in [0, 1]; see `Task.disagreement`."""
        if self.logits is None and AGREEMENT in self.recorded:
            return self.recorded[AGREEMENT]
        logits = self.recorded_logits()
        return torch.stack([1 - self.task.disagreement(row, logits[-1]) for row in logits])

    def measures(self, answer_index: Tensor | None = None) -> dict[str, float]:
        """What the task measures on whole data sets, where labels and tallies are recorded; else nothing.

        Args:
            answer_index: whose answer each sample gets, (N,), as of a `Replay`; the original's when left out.
        """
        if self.tallies is None:
            return {}
        last = torch.full((len(self),), len(self.exits))
        taken = self.tallies[last if answer_index is None else answer_index, torch.arange(len(self))]
        return {name: of(taken) for name, of in self.task.measures.items()}

    def unlabelled(self) -> ExitRecords:
        """The same records with the original's answers in place of labels: accuracy means agreement with it."""
        if self.logits is not None:
            return replace(self, labels=None)
        return replace(self, labels=None, labelled=False, outcomes=self.agreement, tallies=None)

    def best_case(self) -> tuple[float, float]:
        """Accuracy and mean MACs, as a fraction of the original's, of leaving at the first exit with the best outcome.

        Every branch on the way is counted. Samples that no exit gets right leave at the first. No thresholds reach that
        accuracy for less.
        """
        best, first = self.outcomes.max(0)  # of equal ones the first
        costs = exit_costs(self.trunk_macs, self.branch_macs, [True] * len(self.exits))
        cost = torch.tensor(costs, dtype=torch.float64)[first].mean().item() / self.base_macs
        return best.mean().item(), cost

    def take(self, rows: Tensor) -> ExitRecords:
        """The records of some samples: indices, shape (M,).

        Raises:
            DataError: it is no list of sample numbers, or an empty one.
        """
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in _WHOLE:
            refuse("rows", "the numbers of samples, shape (M,)", rows, DataError)
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise DataError(f"rows must be below {len(self)}, got {int(rows.min())} to {int(rows.max())}.")
        return replace(
            self,
            logits=None if self.logits is None else self.logits[:, rows],
            labels=None if self.labels is None else self.labels[rows],
            confidence=None if self.confidence is None else self.confidence[:, rows],
            outcomes=self.outcomes[:, rows],
            recorded={name: found[:, rows] for name, found in self.recorded.items()},
            tallies=None if self.tallies is None else self.tallies[:, rows],
        )

    def keep(self, exits: Sequence[int]) -> ExitRecords:
        """The records of a model that has some of these exits only: their numbers, in program order.

        Raises:
            DataError: the branches read each other's answers, or the numbers are none of rising exits.
        """
        if self.chained:
            raise DataError("These branches read each other's answers: none of them answers alike without the others.")
        kept = list(exits)
        if kept != sorted(set(kept)) or not all(0 <= k < len(self.exits) for k in kept):
            raise DataError(f"{kept} are no rising numbers of the {len(self.exits)} exits.")
        rows = [*kept, len(self.exits)]
        return replace(
            self,
            exits=tuple(self.exits[k] for k in kept),
            logits=None if self.logits is None else self.logits[rows],
            trunk_macs=tuple(self.trunk_macs[k] for k in rows),
            branch_macs=tuple(self.branch_macs[k] for k in kept),
            confidence=None if self.confidence is None else self.confidence[kept],
            outcomes=self.outcomes[rows],
            recorded={name: found[rows if name in OF_ALL else kept] for name, found in self.recorded.items()},
            tallies=None if self.tallies is None else self.tallies[rows],
        )

    def without_logits(self, scores: Sequence[str] = ()) -> ExitRecords:
        """The same records with these scores in place of the logits: K numbers per sample for any C.

        Searches over these scores find the same thresholds, but for outcomes that are not smoothed by the chance of
        being right; calibrators and risks that read logits are refused.

        Args:
            scores: their names; by default that of the task.
        """
        wanted = names("scores", scores) or [self.task.default_score]
        found = {name: self.scores(name) for name in wanted}
        of_all = {CERTAINTY: self.certainty, AGREEMENT: self.agreement}
        return replace(self, logits=None, recorded={**found, **of_all})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file atomically.

        Raises:
            WriteError: it cannot be written.
        """
        path = Path(path)
        own = ("logits", "labels", "confidence", "tallies")
        tensors = {name: getattr(self, name).contiguous() for name in own if getattr(self, name) is not None}
        plain = {name: getattr(self, name) for name in _STORED}
        version = FIRST_FORMAT
        if self.logits is None or self.task != CLASSIFICATION:
            version, plain = FORMAT_VERSION, {**plain, "task": self.task.name, "labelled": self.labelled}
            options = self.task.options()
            plain["task_options"] = {key: value for key, value in options.items() if not isinstance(value, Tensor)}
            tensors |= {f"{_OPTION}{key}": value for key, value in options.items() if isinstance(value, Tensor)}
            tensors["outcomes"] = self.outcomes.contiguous()
            tensors |= {f"{_RECORDED}{name}": found.contiguous() for name, found in self.recorded.items()}
        meta = {"format_version": str(version), **{key: json.dumps(value) for key, value in plain.items()}}
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata=meta)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitRecords:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise DataError(f"Cannot read exit records from {path}: {error}") from error
        version = meta.get("format_version")
        if version not in (str(FIRST_FORMAT), str(FORMAT_VERSION)) or not tensors.keys() & {"logits", "outcomes"}:
            raise DataError(
                f"{path} holds no exit records of format {FORMAT_VERSION} or older: its metadata is {meta}."
            )
        stored = {**_STORED, "task": json.dumps(CLASSIFICATION.name), "labelled": "false", "task_options": "{}"}
        try:
            plain = {name: json.loads(meta.get(name, default)) for name, default in stored.items()}
        except ValueError as error:
            raise DataError(f"{path} holds damaged exit records: {error}. Record them again.") from error
        recorded = {n.removeprefix(_RECORDED): t for n, t in tensors.items() if n.startswith(_RECORDED)}
        own = {name: tensors.get(name) for name in ("logits", "labels", "confidence", "outcomes", "tallies")}
        options = {n.removeprefix(_OPTION): t for n, t in tensors.items() if n.startswith(_OPTION)}
        task = stored_task(plain.pop("task"), {**plain.pop("task_options"), **options})
        return cls(**own, recorded=recorded, task=task, **plain)  # pyright: ignore[reportArgumentType]


_STORED = {"exits": "", "trunk_macs": "", "branch_macs": "", "chained": "false"}  # and what stands for a missing one
_RECORDED, _OPTION = "score.", "task."
CERTAINTY, AGREEMENT = "certainty", "agreement"
OF_ALL = frozenset({CERTAINTY, AGREEMENT})
"""What is recorded of the original too."""


def replay_point(records: ExitRecords, policy: ThresholdPolicy, rule: str) -> OperatingPoint:
    """Replay a policy on records; the operating point with its results."""
    instance("records", records, ExitRecords)
    replay = records.replay(policy)
    n, k = len(records), len(records.exits) + 1
    accuracy = replay.outcome.mean().item()
    return OperatingPoint(
        thresholds=policy.thresholds,
        score=policy.score,
        fallback=policy.fallback,
        accuracy=accuracy,
        accuracy_drop=records.base_accuracy - accuracy,
        macs_fraction=replay.macs.mean().item() / records.base_macs,
        exit_shares=tuple((torch.bincount(replay.exit_index, minlength=k).double() / n).tolist()),
        samples=n,
        rule=rule,
    )


def fingerprint(records: ExitRecords) -> str:
    """SHA-256 of the logits and labels; of records without logits, of their scores and outcomes."""
    found = [records.recorded[name] for name in sorted(records.recorded)] + [records.outcomes]
    found = found if records.logits is None else [records.logits]
    digest = hashlib.sha256(repr(tuple(found[0].shape)).encode())
    for tensor in (*(each.float() for each in found), records.labels):
        if tensor is not None:
            digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()
