"""Run a branched model over data: record every exit's answers, or evaluate it as it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from ee_surgery.checks import instance, names
from ee_surgery.errors import ConfigError, DataError
from ee_surgery.model import EarlyExitModel
from ee_surgery.policies.catalogue import POLICIES
from ee_surgery.policies.frontier import Frontier
from ee_surgery.policies.operating import describe
from ee_surgery.policies.policy import ThresholdPolicy
from ee_surgery.policies.records import ExitRecords
from ee_surgery.policies.risk import risk_table
from ee_surgery.share.provenance import CALIBRATION
from ee_surgery.text import visible
from ee_surgery.training.data import Data, loader, place
from ee_surgery.training.labels import IGNORED, ClassMap, Labels, hard
from ee_surgery.training.processes import Processes, Shares


def record(
    branched: EarlyExitModel,
    data: Data,
    *,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> ExitRecords:
    """Run every exit on every sample, nobody leaving, and keep the logits.

    With an accelerator, its processes share the work: call it in all of them. Each ends with all records, in the order
    of the data. Without one, this process does all of it, whatever the others do.

    Args:
        data: held out: neither what trained the branches nor what will be reported. Without labels, the
            original's own answers stand for them. Samples labelled -100 are left out; of class probabilities, the most
            probable class is the label.
        class_map: which class of the model each label of the data is, where they are not the same: a list or dict of
            class numbers, names or WordNet ids.
    Raises:
        DataError: no samples, labels for some batches only, labels that are no classes of the model, or that the
            original surely knows nothing about (see `strangers`).
    """
    instance("branched", branched, EarlyExitModel)
    logits: list[Tensor] = []
    confidence: list[Tensor] = []
    labels: list[Tensor] = []
    processes = _processes(branched, accelerator)
    home = _home(branched)
    known = Labels(branched, class_map)
    for share in Shares(loader(data, batch_size), processes, known):
        answers, original = branched.answers(place(share.inputs, *home))
        found = torch.stack([*(answer.logits for answer in answers), original], 1).float()  # (B, K, C)
        logits.append(processes.rows(found, share.total).transpose(0, 1).cpu())
        units = [answer.confidence for answer in answers if answer.confidence is not None]
        if len(units) == len(answers):
            found = torch.stack(units, 1).float()
            confidence.append(processes.rows(found, share.total).transpose(0, 1).cpu())
        if share.labels is not None:
            labels.append(processes.rows(hard(share.labels).to(home[0]), share.total).cpu())
            known.compare(logits[-1][-1].argmax(-1), labels[-1])
    _all_or_none(len(labels), len(logits))
    known.settle()
    told = torch.cat(labels) if labels else None
    rows = slice(None) if told is None else _labelled(told)
    return ExitRecords(
        exits=tuple(branched.exits),
        logits=torch.cat(logits, 1)[:, rows],
        trunk_macs=branched.trunk_macs,
        branch_macs=branched.branch_macs,
        labels=None if told is None else told[rows],
        confidence=torch.cat(confidence, 1)[:, rows] if confidence else None,
        chained=branched.branches.chained,
    )


def calibrate(
    branched: EarlyExitModel,
    data: Data,
    *,
    policy: str = "search",
    scores: Iterable[str] | None = None,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    class_map: ClassMap | None = None,
) -> Frontier:
    """Find every trade-off between accuracy and cost that the branches can reach; kept on the model.

    Nothing leaves early until `branched.operate(...)` picks one of them.

    Args:
        data: held out: neither what trained the branches nor what will be reported; its labels as for `record`.
        policy: how thresholds are chosen, by its name in `POLICIES`: `search`, or a paper's own way.
        scores: which scores `search` may use; by default `max_prob`, and `learned` where the branches have confidence
            units. More scores find a little more on this data and keep a little less of it on new data.
        accelerator: as for `record`; every process then searches, and finds the same.
        class_map: as for `record`.
    Raises:
        ConfigError: `scores` beside a policy that has its own, an empty list, or a score that needs confidence units.
        UnknownNameError: no such policy or score.
        DataError: as for `record`.
    """
    if scores is not None and policy != "search":
        raise ConfigError(f"The policy {policy!r} has its own score: leave out scores=, or use policy='search'.")
    instance("branched", branched, EarlyExitModel)
    POLICIES[policy]  # a name that is known, before anything runs
    wanted = None if scores is None else _scores(branched, scores)
    records = record(branched, data, batch_size=batch_size, accelerator=accelerator, class_map=class_map)
    if policy != "search":
        frontier = Frontier.trace(records, policy)
    else:
        by_default = ["max_prob", *(["learned"] if records.confidence is not None else [])]
        frontier = Frontier.search(records, wanted or by_default)
    risks = ("disagreement", *(["accuracy_gap"] if records.labels is not None else []))
    branched.provenance.pop(CALIBRATION, None)
    branched.frontier = replace(frontier, risks=tuple(risk_table(records, risk) for risk in risks))
    return branched.frontier


def _scores(branched: EarlyExitModel, scores: Iterable[str]) -> list[str]:
    """Names of scores that these branches have."""
    given = names("scores", scores)
    if not given:
        raise ConfigError("scores= is an empty list: name at least one score, or leave it out.")
    for name in given:
        policy = ThresholdPolicy((0.0,) * len(branched.branches), name)
        policy.check(branched.num_classes, branched.branches.units, branched.branches.chained)
    return given


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

    The result is kept in `branched.provenance["evaluation"]`, with the operating point that it is of: the model card
    states it.

    Args:
        data: its labels as for `record`; samples labelled -100 count nowhere.
        class_map: as for `record`.
    Raises:
        DataError: as for `record`.
    """
    instance("branched", branched, EarlyExitModel)
    found: list[Tensor] = []
    labelled = 0
    processes = _processes(branched, accelerator)
    home = _home(branched)
    known = Labels(branched, class_map)
    for share in Shares(loader(data, batch_size), processes, known):
        x = place(share.inputs, *home)
        output = branched.predict(x)
        with branched.exits_disabled():
            original = branched.predict(x).logits.argmax(-1)
        target = original if share.labels is None else hard(share.labels).to(home[0])
        of_sample = (output.logits.argmax(-1), original, target, output.exit_index, output.macs_fraction)
        found.append(processes.rows(torch.stack([value.float() for value in of_sample], 1), share.total).cpu())
        if share.labels is not None:
            labelled += 1
            known.compare(*found[-1][:, 1:3].long().unbind(1))
    _all_or_none(labelled, len(found))
    known.settle()
    table = torch.cat(found)
    answer, original, target, exit_index, macs = table[_labelled(table[:, 2])].unbind(1)
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


def _all_or_none(labelled: int, batches: int) -> None:
    if not batches:
        raise DataError("No batches: the data that was handed in is empty (or an iterator that was used up).")
    if labelled not in (0, batches):
        raise DataError(f"{labelled} of {batches} batches have labels: give them for all samples or for none.")


def _labelled(labels: Tensor) -> Tensor:
    """The numbers of the samples that count."""
    rows = (labels != IGNORED).nonzero().squeeze(1)
    if not len(rows):
        raise DataError(f"All {len(labels)} samples are labelled {IGNORED}, which is ignored.")
    return rows


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _home(branched: EarlyExitModel) -> tuple[torch.device, torch.dtype]:
    weight = next(branched.branches.parameters())
    return weight.device, weight.dtype


def _processes(branched: EarlyExitModel, accelerator: Accelerator | None) -> Processes:
    """Those that share the work; the model is moved to where this one works."""
    if accelerator is not None:
        instance("accelerator", accelerator, Accelerator)
        branched.to(accelerator.device)
    return Processes(accelerator)
