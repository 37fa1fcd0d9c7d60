"""Answers of every exit on held-out data, whatever gives them, as records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs
from ee_surgery.calibration.records import AGREEMENT, CERTAINTY, ExitRecords
from ee_surgery.data.batches import Data, loader, place
from ee_surgery.data.distributed import Processes, ShardedBatches
from ee_surgery.data.labels import Labels
from ee_surgery.errors import DataError
from ee_surgery.policies.policy import certainty
from ee_surgery.policies.scores import ScoreOf, scores_of, sound
from ee_surgery.runtime.engine import Engine
from ee_surgery.task import IGNORED, Task


class Answers(NamedTuple):
    """The answers of all exits to one batch."""

    logits: Sequence[Tensor]
    """K tensors (B, C, ...), the original's last; maps of branches may be coarser than its."""
    confidence: Tensor | None
    """Logits of the confidence units, (B, K-1); None where not every branch has one."""


Ask: TypeAlias = Callable[[Inputs], Answers]


def ask_engine(engine: Engine) -> Ask:
    """The answers of a model's exits and of its original."""

    def ask(inputs: Inputs) -> Answers:
        answers, original = engine.answers(inputs)
        logits = [*(answer.logits.float() for answer in answers), original.float()]
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
    working, task, where = working or Processes(None), engine.backbone.task, home(engine)
    kept: dict[str, list[Tensor]] = {}
    labelled = batches = 0
    for shard in ShardedBatches(loader(data, batch_size), working, known):
        found, units = ask(place(shard.inputs, *where))
        target = None if shard.labels is None else task.hard(shard.labels).to(where[0])
        if task.keeps_logits:
            columns = {"logits": torch.stack([*found], 1)} | ({} if target is None else {"labels": target})
        else:
            columns = summaries(found, target, units, task)
        if units is not None:
            columns["confidence"] = units
        batches += 1
        for name, column in columns.items():
            kept.setdefault(name, []).append(working.rows(column, shard.total).cpu())
        if shard.labels is not None:
            labelled += 1
            if task.keeps_logits:
                known.compare(task.labels_from(kept["logits"][-1][:, -1]), kept["labels"][-1])
    all_or_none(labelled, batches)
    known.settle()
    whole = {name: torch.cat(columns) for name, columns in kept.items()}
    rows = slice(None)
    if labelled:
        rows = labelled_rows(~task.ignored(whole["labels"]) if task.keeps_logits else whole.pop("counts") > 0)
    labels = whole.pop("labels", None)
    of_exits = {name: column[rows].transpose(0, 1) for name, column in whole.items()}
    own = {name: of_exits.pop(name, None) for name in ("logits", "confidence", "outcomes", "tallies")}
    return ExitRecords(
        exits=tuple(engine.plan.names),
        trunk_macs=engine.trunk_macs,
        branch_macs=engine.branch_macs,
        labels=None if labels is None else labels[rows],
        labelled=labelled > 0,
        chained=engine.branches.chained,
        task=task,
        recorded=of_exits,
        **own,  # pyright: ignore[reportArgumentType]
    )


def summaries(
    logits: Sequence[Tensor], target: Tensor | None, confidence: Tensor | None, task: Task
) -> dict[str, Tensor]:
    """What records keep of a batch in place of logits, each with the batch first.

    Scores are worked out as a routed run does, on the grids of the branches.

    Args:
        logits: of the K exits, the original's last.
        target: labels; the original's answers where there are none.
        confidence: see `Answers`.
    """
    original = logits[-1]
    truth = task.labels_from(original) if target is None else target
    whole = [task.enlarge(each, original.shape[1:]) for each in logits]
    columns = {
        "outcomes": torch.stack([task.outcome(each, truth) for each in whole], 1),
        CERTAINTY: torch.stack([certainty(each, task) for each in whole], 1),
        AGREEMENT: torch.stack([1 - task.disagreement(each, original) for each in whole], 1),
    }
    if target is not None:
        columns["counts"] = (~task.ignored(target)).int()
        if task.measures:
            columns["tallies"] = torch.stack([task.tally(each, target) for each in whole], 1)
    for name in scores_of(task, confidence is not None):
        score, state, rows = ScoreOf(name, task), (), []
        for k, answer in enumerate(logits[:-1]):
            value, state = score(answer, None if confidence is None else confidence[:, k], state, k)
            rows.append(torch.nan_to_num(sound(value, answer), nan=-torch.inf))
        columns[name] = torch.stack(rows, 1)
    return columns


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
