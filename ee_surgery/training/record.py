"""Run a branched model over data: record every exit's answers, or evaluate it as it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ee_surgery.errors import ConfigError, DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.records import ExitRecords
from ee_surgery.policies.risk import risk_table
from ee_surgery.training.data import Data, batches


def record(branched: EarlyExitModel, data: Data, *, batch_size: int = 128) -> ExitRecords:
    """Run every exit on every sample, nobody leaving, and keep the logits.

    Args:
        data: held out: neither what trained the branches nor what will be reported. Without labels, the
            original's own answers stand for them.
    Raises:
        DataError: no samples, or labels for some batches only.
    """
    logits: list[Tensor] = []
    confidence: list[Tensor] = []
    labels: list[Tensor] = []
    for x, y in batches(data, batch_size, *_home(branched)):
        answers, original = branched.answers(x)
        logits.append(torch.stack([*(answer.logits for answer in answers), original]).float().cpu())
        units = [answer.confidence for answer in answers if answer.confidence is not None]
        if len(units) == len(answers):
            confidence.append(torch.stack(units).float().cpu())
        if y is not None:
            labels.append(y.cpu())
    if not logits:
        raise DataError("No batches: the data that was handed in is empty (or an iterator that was used up).")
    if labels and len(labels) != len(logits):
        raise DataError(f"{len(labels)} of {len(logits)} batches have labels: give them for all samples or for none.")
    return ExitRecords(
        exits=tuple(branched.exits),
        logits=torch.cat(logits, 1),
        trunk_macs=branched.trunk_macs,
        branch_macs=branched.branch_macs,
        labels=torch.cat(labels) if labels else None,
        confidence=torch.cat(confidence, 1) if confidence else None,
        chained=branched.branches.chained,
    )


def calibrate(
    branched: EarlyExitModel,
    data: Data,
    *,
    policy: str = "search",
    scores: Iterable[str] | None = None,
    batch_size: int = 128,
) -> Frontier:
    """Find every trade-off between accuracy and cost that the branches can reach; kept on the model.

    Nothing leaves early until `branched.operate(...)` picks one of them.

    Args:
        data: held out: neither what trained the branches nor what will be reported.
        policy: how thresholds are chosen, by its name in `POLICIES`: `search`, or a paper's own way.
        scores: which scores `search` may use; by default `max_prob`, and `learned` where the branches have confidence
            units. More scores find a little more on this data and keep a little less of it on new data.
    Raises:
        ConfigError: `scores` beside a policy that has its own.
    """
    if scores is not None and policy != "search":
        raise ConfigError(f"The policy {policy!r} has its own score: leave out scores=, or use policy='search'.")
    records = record(branched, data, batch_size=batch_size)
    if policy != "search":
        frontier = Frontier.trace(records, policy)
    else:
        if scores is None:
            scores = ["max_prob", *(["learned"] if records.confidence is not None else [])]
        frontier = Frontier.search(records, scores)
    risks = ("disagreement", *(["accuracy_gap"] if records.labels is not None else []))
    branched.frontier = replace(frontier, risks=tuple(risk_table(records, risk) for risk in risks))
    return branched.frontier


@dataclass(frozen=True)
class Evaluation:
    """What a branched model does on data, by running it as it stands: samples really leave."""

    accuracy: float
    """In [0, 1]; agreement with the original when there were no labels."""
    original_accuracy: float
    """Of the original on the same samples; 1.0 when there were no labels."""
    agreement: float
    """Share of the samples given the same class as by the original."""
    macs_fraction: float
    """Mean MACs, branches visited included, by the original's."""
    exits: tuple[str, ...]
    """Names, the original's head (`original`) last."""
    exit_shares: tuple[float, ...]
    exit_accuracies: tuple[float | None, ...]
    """Of the samples that left at each exit; None where none did."""
    samples: int
    labelled: bool

    def __str__(self) -> str:
        what = "accuracy" if self.labelled else "agreement"
        rows = [
            f"  {name:32} {share:6.1%}  {'-' if accuracy is None else format(accuracy, '.2%')}"
            for name, share, accuracy in zip(self.exits, self.exit_shares, self.exit_accuracies, strict=True)
        ]
        head = (
            f"{what} {self.accuracy:.2%} (original {self.original_accuracy:.2%}, same class {self.agreement:.2%}) at "
            f"{self.macs_fraction:.1%} of its MACs, {self.samples} samples; share and {what} at each exit:"
        )
        return "\n".join([head, *rows])


def evaluate(branched: EarlyExitModel, data: Data, *, batch_size: int = 128) -> Evaluation:
    """Run a branched model, routed, and its original on the same samples.

    Raises:
        DataError: the data is empty.
    """
    right: list[Tensor] = []
    base: list[Tensor] = []
    same: list[Tensor] = []
    where: list[Tensor] = []
    macs: list[Tensor] = []
    labelled = True
    for x, y in batches(data, batch_size, *_home(branched)):
        output = branched.predict(x)
        with branched.exits_disabled():
            original = branched.predict(x).logits.argmax(-1)
        answer = output.logits.argmax(-1)
        labelled &= y is not None
        target = original if y is None else y
        for rows, value in [(right, answer == target), (base, original == target), (same, answer == original),
                            (where, output.exit_index), (macs, output.macs_fraction)]:  # fmt: skip
            rows.append(value.cpu())
    if not right:
        raise DataError("No batches: the data that was handed in is empty (or an iterator that was used up).")
    correct, exit_index = torch.cat(right), torch.cat(where)
    names = (*branched.exits, "original")
    left = [exit_index == k for k in range(len(names))]
    return Evaluation(
        accuracy=_mean(correct),
        original_accuracy=_mean(torch.cat(base)),
        agreement=_mean(torch.cat(same)),
        macs_fraction=_mean(torch.cat(macs)),
        exits=names,
        exit_shares=tuple(_mean(rows) for rows in left),
        exit_accuracies=tuple(_mean(correct[rows]) if rows.any() else None for rows in left),
        samples=len(correct),
        labelled=labelled,
    )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _home(branched: EarlyExitModel) -> tuple[torch.device, torch.dtype]:
    weight = next(branched.branches.parameters())
    return weight.device, weight.dtype
