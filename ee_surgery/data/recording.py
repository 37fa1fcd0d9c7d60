"""Answers of every exit on held-out data, whatever gives them, as records."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.data.batches import Data, loader, place
from ee_surgery.data.distributed import Processes, ShardedBatches
from ee_surgery.data.labels import Labels
from ee_surgery.errors import DataError
from ee_surgery.runtime.engine import Engine
from ee_surgery.task import IGNORED


class Answers(NamedTuple):
    """The answers of all exits to one batch."""

    logits: Tensor
    """(B, K, C), the original's last."""
    confidence: Tensor | None
    """Logits of the confidence units, (B, K-1); None where not every branch has one."""


Ask: TypeAlias = Callable[[Inputs], Answers]


def ask_engine(engine: Engine) -> Ask:
    """The answers of a model's exits and of its original."""

    def ask(inputs: Inputs) -> Answers:
        answers, original = engine.answers(inputs)
        logits = torch.stack([*(answer.logits for answer in answers), original], 1).float()
        units = [answer.confidence for answer in answers if answer.confidence is not None]
        return Answers(logits, torch.stack(units, 1).float() if len(units) == len(answers) else None)

    return ask


def recorded(
    engine: Engine, data: Data, known: Labels, ask: Ask, *, batch_size: int = 128, working: Processes | None = None
) -> ExitRecords:
    """Ask for the answers to every batch, and record them with the labels.

    Args:
        known: what checks the labels of this data.
        working: the processes that share the work; this one alone by default.
    Raises:
        DataError: as for `ee_surgery.record`.
    """
    logits: list[Tensor] = []
    confidence: list[Tensor] = []
    labels: list[Tensor] = []
    working, task, where = working or Processes(None), engine.backbone.task, home(engine)
    for shard in ShardedBatches(loader(data, batch_size), working, known):
        found, units = ask(place(shard.inputs, *where))
        logits.append(working.rows(found, shard.total).transpose(0, 1).cpu())
        if units is not None:
            confidence.append(working.rows(units, shard.total).transpose(0, 1).cpu())
        if shard.labels is not None:
            labels.append(working.rows(task.hard(shard.labels).to(where[0]), shard.total).cpu())
            known.compare(task.labels_from(logits[-1][-1]), labels[-1])
    all_or_none(len(labels), len(logits))
    known.settle()
    told = torch.cat(labels) if labels else None
    rows = slice(None) if told is None else labelled_rows(~task.ignored(told))
    return ExitRecords(
        exits=tuple(engine.plan.names),
        logits=torch.cat(logits, 1)[:, rows],
        trunk_macs=engine.trunk_macs,
        branch_macs=engine.branch_macs,
        labels=None if told is None else told[rows],
        confidence=torch.cat(confidence, 1)[:, rows] if confidence else None,
        chained=engine.branches.chained,
        task=task,
    )


def all_or_none(labelled: int, batches: int) -> None:
    """Refuse labels for some batches only, and no batches at all."""
    if not batches:
        raise DataError("No batches: the data is empty (or an iterator that was already used up).")
    if labelled not in (0, batches):
        raise DataError(f"{labelled} of {batches} batches have labels: give them for all samples or for none.")


def labelled_rows(counts: Tensor) -> Tensor:
    """The numbers of the samples that count, of a flag for each."""
    rows = counts.nonzero().squeeze(1)
    if not len(rows):
        raise DataError(f"All {len(counts)} samples are labelled {IGNORED}, which is ignored.")
    return rows


def home(engine: Engine) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for inputs."""
    weight = next(engine.branches.parameters())
    return weight.device, weight.dtype
