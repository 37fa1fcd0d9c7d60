"""Logits of every exit on held-out data, on which thresholds are chosen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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

FORMAT_VERSION = 1
_SCORES_KEPT = 16  # of one set of records: names, and fitted scores, of which every search makes new ones


def _check_tensors(logits: Tensor, labels: Tensor | None, confidence: Tensor | None) -> None:
    """Whether these can be records; K and N are those of the logits.

    Raises:
        DataError: they cannot; what was seen is named.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point() or logits.shape[2] < 2:
        refuse("logits", "floating point numbers of shape (exits, samples, classes)", logits, DataError)
    k, n, classes = logits.shape
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _WHOLE:
            refuse("labels", f"whole numbers of shape ({n},)", labels, DataError)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            low, high = int(labels.min()), int(labels.max())
            raise DataError(f"labels must be class numbers below {classes}, got {low} to {high}.")
    if confidence is not None and (not isinstance(confidence, Tensor) or tuple(confidence.shape) != (k - 1, n)):
        refuse("confidence", f"numbers of shape {(k - 1, n)}, one for each branch and sample", confidence, DataError)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Replay(NamedTuple):
    """Where each recorded sample would leave, with the results."""

    exit_index: Tensor
    """int64, shape (N,)."""
    answer_index: Tensor
    """Whose answer each sample gets: `exit_index`, unless the policy falls back on the most confident."""
    correct: Tensor
    """bool, shape (N,)."""
    macs: Tensor
    """float64, shape (N,): trunk and every branch visited."""


@dataclass(frozen=True, eq=False)
class ExitRecords:
    """Answers of all K exits (the original's head last) to N held-out samples.

    Without labels, the original's own answer stands for the truth, and accuracy means agreement with it.
    """

    exits: tuple[str, ...]
    """Names of the K - 1 branches' exit points."""
    logits: Tensor
    """float32, shape (K, N, C)."""
    trunk_macs: tuple[int, ...]
    """MACs of the original up to each exit, K numbers; the last is the whole original."""
    branch_macs: tuple[int, ...]
    """MACs of each branch, K - 1 numbers."""
    labels: Tensor | None = None
    """int64, shape (N,)."""
    confidence: Tensor | None = None
    """Confidence logits of the branches, float32, shape (K - 1, N)."""
    chained: bool = False
    """Whether each branch reads the outputs of earlier ones, which then all have to run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", tuple(names("exits", self.exits, DataError)))
        for name in ("trunk_macs", "branch_macs"):
            object.__setattr__(self, name, numbers(name, getattr(self, name), low=0, error=DataError))
        flag("chained", self.chained, DataError)
        _check_tensors(self.logits, self.labels, self.confidence)
        if self.labels is not None:
            object.__setattr__(self, "labels", self.labels.long())
        k, n, _ = self.logits.shape
        sizes = (len(self.exits) + 1, len(self.trunk_macs), len(self.branch_macs) + 1)
        if set(sizes) != {k} or (self.labels is not None and len(self.labels) != n):
            raise DataError(
                f"Records do not fit together: logits {tuple(self.logits.shape)}, {len(self.exits)} exits, "
                f"{len(self.trunk_macs)} trunk and {len(self.branch_macs)} branch costs, "
                f"{None if self.labels is None else len(self.labels)} labels."
            )
        if n == 0:
            raise DataError("Records of no samples: the data is empty.")
        if list(self.trunk_macs) != sorted(self.trunk_macs) or not self.trunk_macs[-1]:
            raise DataError(f"trunk_macs must rise to the cost of the whole original, got {self.trunk_macs}.")

    def __len__(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def target(self) -> Tensor:
        """The labels, or the original's answers where there are none, shape (N,)."""
        return self.labels if self.labels is not None else self.logits[-1].argmax(-1)

    @cached_property
    def correct(self) -> Tensor:
        """bool, shape (K, N)."""
        return self.logits.argmax(-1) == self.target

    @property
    def accuracies(self) -> list[float]:
        """Of each exit alone, in [0, 1]; the original's last."""
        return [row.double().mean().item() for row in self.correct]

    @property
    def base_macs(self) -> int:
        """MACs of the original alone."""
        return self.trunk_macs[-1]

    @property
    def base_accuracy(self) -> float:
        """Of the original."""
        return self.accuracies[-1]

    def scores(self, which: str | FittedScore) -> Tensor:
        """The score of every branch for every sample, (K - 1, N); -inf where it or what it reads is not finite."""
        if which not in self._scores:
            found = self._score(ScoreOf(which))
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
        for k in range(len(self.exits)):
            confidence = None if self.confidence is None else self.confidence[k]
            value, state = score(self.logits[k], confidence, state, k)
            rows.append(torch.nan_to_num(sound(value, self.logits[k]), nan=-torch.inf))
        return torch.stack(rows)

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
        correct = self.correct.gather(0, answer_index[None])[0]
        costs = exit_costs(self.trunk_macs, self.branch_macs, visits)
        return Replay(exit_index, answer_index, correct, torch.tensor(costs, dtype=torch.float64)[exit_index])

    @cached_property
    def certainty(self) -> Tensor:
        """What `most_confident` compares exits by, (K, N): the largest softmax probability; -inf where not finite."""
        return torch.stack([certainty(row) for row in self.logits])

    def best_case(self) -> tuple[float, float]:
        """Accuracy, and mean MACs by the original's, of leaving at the first right exit, every branch on the way paid.

        Samples that no exit gets right leave at the first. No thresholds reach that accuracy for less.
        """
        right = self.correct
        first = torch.where(right.any(0), right.int().argmax(0), 0)
        costs = exit_costs(self.trunk_macs, self.branch_macs, [True] * len(self.exits))
        cost = torch.tensor(costs, dtype=torch.float64)[first].mean().item() / self.base_macs
        return right.any(0).double().mean().item(), cost

    def take(self, rows: Tensor) -> ExitRecords:
        """The records of some samples: indices, shape (M,).

        Raises:
            DataError: it is no list of sample numbers, or an empty one.
        """
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in _WHOLE:
            refuse("rows", "the numbers of samples, shape (M,)", rows, DataError)
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise DataError(f"rows must be below {len(self)}, got {int(rows.min())} to {int(rows.max())}.")
        return ExitRecords(
            self.exits,
            self.logits[:, rows],
            self.trunk_macs,
            self.branch_macs,
            None if self.labels is None else self.labels[rows],
            None if self.confidence is None else self.confidence[:, rows],
            self.chained,
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
        return ExitRecords(
            tuple(self.exits[k] for k in kept),
            self.logits[rows],
            tuple(self.trunk_macs[k] for k in rows),
            tuple(self.branch_macs[k] for k in kept),
            self.labels,
            None if self.confidence is None else self.confidence[kept],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file atomically.

        Raises:
            WriteError: it cannot be written.
        """
        path = Path(path)
        tensors = {"logits": self.logits.contiguous()}
        if self.labels is not None:
            tensors["labels"] = self.labels.contiguous()
        if self.confidence is not None:
            tensors["confidence"] = self.confidence.contiguous()
        plain = {name: getattr(self, name) for name in _STORED}
        meta = {"format_version": str(FORMAT_VERSION), **{key: json.dumps(value) for key, value in plain.items()}}
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
        if meta.get("format_version") != str(FORMAT_VERSION) or "logits" not in tensors:
            raise DataError(f"{path} holds no exit records of format {FORMAT_VERSION}: its metadata is {meta}.")
        try:
            plain = {name: json.loads(meta.get(name, default)) for name, default in _STORED.items()}
        except ValueError as error:
            raise DataError(f"{path} holds damaged exit records: {error}. Record them again.") from error
        return cls(
            logits=tensors["logits"], labels=tensors.get("labels"), confidence=tensors.get("confidence"), **plain
        )


_STORED = {"exits": "", "trunk_macs": "", "branch_macs": "", "chained": "false"}  # and what stands for a missing one


def replay_point(records: ExitRecords, policy: ThresholdPolicy, rule: str) -> OperatingPoint:
    """Replay a policy on records; the operating point with its results."""
    instance("records", records, ExitRecords)
    replay = records.replay(policy)
    n, k = len(records), len(records.exits) + 1
    accuracy = replay.correct.double().mean().item()
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
    """SHA-256 of the logits and labels."""
    digest = hashlib.sha256(repr(tuple(records.logits.shape)).encode())
    for tensor in (records.logits.float(), records.labels):
        if tensor is not None:
            digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()
