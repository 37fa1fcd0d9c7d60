"""Record the logits of every exit on held-out data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import instance
from ee_surgery.data.batches import Data, loader, place
from ee_surgery.data.distributed import Processes, ShardedBatches
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.errors import DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.task import IGNORED

if TYPE_CHECKING:
    from accelerate import Accelerator


def record(
    branched: EarlyExitModel,
    data: Data,
    *,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> ExitRecords:
    """Run every exit on every sample, without exiting, and record the outputs.

    With an accelerator, its processes share the work: call it in all of them. Each ends with all records, in the order
    of the data. Without one, this process does all of it.

    Args:
        data: held out: neither what trained the branches nor what will be reported. Without labels, the
            original's own answers stand for them. Samples labelled -100 are left out; of class probabilities, the most
            probable class is the label.
        class_map: which class of the model each label of the data is, where they are not the same: a list or dict of
            class numbers, names or WordNet ids.
    Raises:
        DataError: no samples, labels for some batches only, labels that are no classes of the model, or that the
            original clearly knows nothing about (see `strangers`).
    """
    instance("branched", branched, EarlyExitModel)
    logits: list[Tensor] = []
    confidence: list[Tensor] = []
    labels: list[Tensor] = []
    working, task = processes(branched, accelerator), branched.task
    where = home(branched)
    known = Labels(branched, class_map)
    for shard in ShardedBatches(loader(data, batch_size), working, known):
        answers, original = branched.engine.answers(place(shard.inputs, *where))
        found = torch.stack([*(answer.logits for answer in answers), original], 1).float()  # (B, K, C)
        logits.append(working.rows(found, shard.total).transpose(0, 1).cpu())
        units = [answer.confidence for answer in answers if answer.confidence is not None]
        if len(units) == len(answers):
            found = torch.stack(units, 1).float()
            confidence.append(working.rows(found, shard.total).transpose(0, 1).cpu())
        if shard.labels is not None:
            labels.append(working.rows(task.hard(shard.labels).to(where[0]), shard.total).cpu())
            known.compare(task.labels_from(logits[-1][-1]), labels[-1])
    all_or_none(len(labels), len(logits))
    known.settle()
    told = torch.cat(labels) if labels else None
    rows = slice(None) if told is None else labelled_rows(~task.ignored(told))
    return ExitRecords(
        exits=tuple(branched.exits),
        logits=torch.cat(logits, 1)[:, rows],
        trunk_macs=branched.trunk_macs,
        branch_macs=branched.branch_macs,
        labels=None if told is None else told[rows],
        confidence=torch.cat(confidence, 1)[:, rows] if confidence else None,
        chained=branched.branches.chained,
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


def home(branched: EarlyExitModel) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for inputs."""
    weight = next(branched.branches.parameters())
    return weight.device, weight.dtype


def processes(branched: EarlyExitModel, accelerator: Accelerator | None) -> Processes:
    """The processes of an accelerator; moves the model to this process's device."""
    if accelerator is not None:
        from accelerate import Accelerator

        instance("accelerator", accelerator, Accelerator)
        branched.to(accelerator.device)
    return Processes(accelerator)
