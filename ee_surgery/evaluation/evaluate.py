"""Evaluate a branched model with early exit, and its original on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from ee_surgery.checks import instance
from ee_surgery.data.batches import Data, loader, place
from ee_surgery.data.distributed import ShardedBatches
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.data.recording import all_or_none, home, labelled_rows
from ee_surgery.evaluation.record import processes
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.operating_point import describe
from ee_surgery.tables import Tabular, table
from ee_surgery.task import Task
from ee_surgery.text import visible

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Evaluation(Tabular):
    """Results of a branched model on data, run with early exit."""

    accuracy: float
    """In [0, 1]; agreement with the original when there were no labels."""
    original_accuracy: float
    """Accuracy of the original on the same samples; 1.0 if there were no labels."""
    agreement: float
    """How far answers are the original's: the share of the samples given the same class, of several labels of these."""
    macs_fraction: float
    """Mean MACs per sample, including every branch visited, as a fraction of the original's."""
    exits: tuple[str, ...]
    """Names, the original's head (`original`) last."""
    exit_shares: tuple[float, ...]
    exit_accuracies: tuple[float | None, ...]
    """Accuracy on the samples that left at each exit; None if there were none."""
    samples: int
    labelled: bool
    measure: str = "accuracy"
    """What `accuracy` is of this model's task, see `Task.measure`: of several labels, the mean share that is right."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """What else the task measures on labelled data, where it is defined; `original_` and the name: of the original."""

    def rows(self) -> list[dict[str, Any]]:
        """One per exit: its share of the samples, and their accuracy."""
        each = zip(self.exits, self.exit_shares, self.exit_accuracies, strict=True)
        return [{"exit": name, "share": share, "accuracy": accuracy} for name, share, accuracy in each]

    def table(self) -> Table:
        """The exits, under the results of all samples."""
        head, *_ = str(self).splitlines()
        columns: dict[str, Literal["left", "right"]] = {"exit": "left", "share": "right", self.measure: "right"}
        each = zip(self.exits, self.exit_shares, self.exit_accuracies, strict=True)
        rows = [[name, f"{share:.1%}", "-" if right is None else f"{right:.2%}"] for name, share, right in each]
        return table(head.partition("; ")[0], "", columns, rows)

    def __str__(self) -> str:
        what = self.measure if self.labelled else "agreement"
        rows = [
            f"  {visible(name):32} {share:6.1%}  {'-' if accuracy is None else format(accuracy, '.2%')}"
            for name, share, accuracy in zip(self.exits, self.exit_shares, self.exit_accuracies, strict=True)
        ]
        head = (
            f"{what} {self.accuracy:.2%} (original {self.original_accuracy:.2%}, agreement {self.agreement:.2%}) at "
            f"{self.macs_fraction:.1%} of its MACs, {self.samples} samples; share and {what} at each exit:"
        )
        return "\n".join([head, *rows, *(f"  {name}: {value:.4g}" for name, value in self.measures.items())])


def evaluate(
    branched: EarlyExitModel,
    data: Data,
    *,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> Evaluation:
    """Run a branched model, routed, and its original on the same samples; with an accelerator as `record` does.

    The result is kept in `branched.provenance["evaluation"]` with its operating point, for the model card.

    Args:
        data: labels as for `record`; samples labelled -100 are ignored.
        class_map: as for `record`.
    Raises:
        DataError: as for `record`.
    """
    instance("branched", branched, EarlyExitModel)
    task = branched.task
    found: list[Tensor] = []
    tallies: list[tuple[Tensor, Tensor]] = []  # routed, and of the original: for `measures`
    labelled = 0
    working = processes(branched, accelerator)
    where = home(branched.engine)
    known = Labels(branched.engine, class_map)
    for shard in ShardedBatches(loader(data, batch_size), working, known):
        x = place(shard.inputs, *where)
        output = branched.predict(x)
        with branched.exits_disabled():
            original = branched.predict(x).logits
        said = task.labels_from(original)
        target = said if shard.labels is None else task.hard(shard.labels.to(where[0]))
        of_sample = (
            task.outcome(output.logits, target), task.outcome(original, target), task.outcome(output.logits, said),
            ~task.ignored(target), output.exit_index, output.macs_fraction,
        )  # fmt: skip
        found.append(working.rows(torch.stack([value.float() for value in of_sample], 1), shard.total).cpu())
        if shard.labels is not None:
            labelled += 1
            if known.compares:
                known.compare(working.rows(said, shard.total).cpu(), working.rows(target, shard.total).cpu())
            if task.measures:
                both = (task.tally(each, target) for each in (output.logits, original))
                routed, own = (working.rows(each, shard.total).cpu() for each in both)
                tallies.append((routed, own))
    all_or_none(labelled, len(found))
    known.settle()
    result = _summed_up(torch.cat(found), (*branched.exits, "original"), labelled > 0, task, tallies)
    point = None if branched.policy is None else branched.operating_point
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(result).items()}
    for name in ("measure", "measures"):  # of the task; left out where there are none, as before there were tasks
        if not result.measures:
            del plain[name]
    branched.provenance["evaluation"] = {**plain, "operating_point": describe(point)}
    return result


def _summed_up(
    table: Tensor, exits: tuple[str, ...], labelled: bool, task: Task, tallies: Sequence[tuple[Tensor, Tensor]]
) -> Evaluation:
    """What was found, sample by sample, as means.

    Args:
        table: outcome, the original's, agreement, whether it counts, exit and cost of each sample, (N, 6).
        tallies: of the answers, and of the original's, batch by batch; where the task has `measures`.
    """
    rows = labelled_rows(table[:, 3] > 0)
    outcome, base, same, _, exit_index, macs = table[rows].unbind(1)
    left = [exit_index == k for k in range(len(exits))]
    measures: dict[str, float] = {}
    if tallies:
        routed, original = (torch.cat(parts)[rows] for parts in zip(*tallies, strict=True))
        for name, of in task.measures.items():
            measures |= {name: of(routed), f"original_{name}": of(original)}
    return Evaluation(
        accuracy=_mean(outcome),
        original_accuracy=_mean(base),
        agreement=_mean(same),
        macs_fraction=_mean(macs),
        exits=exits,
        exit_shares=tuple(_mean(here) for here in left),
        exit_accuracies=tuple(_mean(outcome[here]) if here.any() else None for here in left),
        samples=len(outcome),
        labelled=labelled,
        measure=task.measure,
        measures={name: value for name, value in measures.items() if math.isfinite(value)},
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
