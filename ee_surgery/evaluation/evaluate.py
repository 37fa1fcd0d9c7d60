"""Evaluate a branched model with early exit, and its original on the same samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ee_surgery.checks import instance
from ee_surgery.data.batches import Data, loader, place
from ee_surgery.data.distributed import ShardedBatches
from ee_surgery.data.labels import ClassMap, Labels, hard
from ee_surgery.evaluation.record import all_or_none, home, labelled_rows, processes
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.operating_point import describe
from ee_surgery.text import visible


@dataclass(frozen=True)
class Evaluation:
    """Results of a branched model on data, run with early exit."""

    accuracy: float
    """In [0, 1]; agreement with the original when there were no labels."""
    original_accuracy: float
    """Accuracy of the original on the same samples; 1.0 if there were no labels."""
    agreement: float
    """Share of the samples given the same class as by the original."""
    macs_fraction: float
    """Mean MACs per sample, including every branch visited, as a fraction of the original's."""
    exits: tuple[str, ...]
    """Names, the original's head (`original`) last."""
    exit_shares: tuple[float, ...]
    exit_accuracies: tuple[float | None, ...]
    """Accuracy on the samples that left at each exit; None if there were none."""
    samples: int
    labelled: bool

    def __str__(self) -> str:
        what = "accuracy" if self.labelled else "agreement"
        rows = [
            f"  {visible(name):32} {share:6.1%}  {'-' if accuracy is None else format(accuracy, '.2%')}"
            for name, share, accuracy in zip(self.exits, self.exit_shares, self.exit_accuracies, strict=True)
        ]
        head = (
            f"{what} {self.accuracy:.2%} (original {self.original_accuracy:.2%}, same class {self.agreement:.2%}) at "
            f"{self.macs_fraction:.1%} of its MACs, {self.samples} samples; share and {what} at each exit:"
        )
        return "\n".join([head, *rows])


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
    found: list[Tensor] = []
    labelled = 0
    working = processes(branched, accelerator)
    where = home(branched)
    known = Labels(branched, class_map)
    for shard in ShardedBatches(loader(data, batch_size), working, known):
        x = place(shard.inputs, *where)
        output = branched.predict(x)
        with branched.exits_disabled():
            original = branched.predict(x).logits.argmax(-1)
        target = original if shard.labels is None else hard(shard.labels).to(where[0])
        of_sample = (output.logits.argmax(-1), original, target, output.exit_index, output.macs_fraction)
        found.append(working.rows(torch.stack([value.float() for value in of_sample], 1), shard.total).cpu())
        if shard.labels is not None:
            labelled += 1
            known.compare(*found[-1][:, 1:3].long().unbind(1))
    all_or_none(labelled, len(found))
    known.settle()
    table = torch.cat(found)
    answer, original, target, exit_index, macs = table[labelled_rows(table[:, 2])].unbind(1)
    correct, base, same = answer == target, original == target, answer == original
    exits = (*branched.exits, "original")
    left = [exit_index == k for k in range(len(exits))]
    result = Evaluation(
        accuracy=_mean(correct),
        original_accuracy=_mean(base),
        agreement=_mean(same),
        macs_fraction=_mean(macs),
        exits=exits,
        exit_shares=tuple(_mean(rows) for rows in left),
        exit_accuracies=tuple(_mean(correct[rows]) if rows.any() else None for rows in left),
        samples=len(correct),
        labelled=labelled > 0,
    )
    point = None if branched.policy is None else branched.operating_point
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(result).items()}
    branched.provenance["evaluation"] = {**plain, "operating_point": describe(point)}
    return result


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
