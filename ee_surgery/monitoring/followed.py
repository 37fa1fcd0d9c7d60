"""Samples that left and are followed to the end, several at a time: off the way of the answers, in full batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ee_surgery.graph.segments import compact
from ee_surgery.runtime.router import Altered, InFlight, Leaving, Router
from ee_surgery.task import Task

MOST_BYTES = 256 << 20
"""Of live tensors that wait; more are run at once."""


class Setting(NamedTuple):
    """What the numbers of a run depend on beside its program."""

    autocast: bool
    dtype: torch.dtype
    inference: bool

    @classmethod
    def now(cls, device: torch.device) -> Setting:
        """Of this thread."""
        kind = device.type
        return cls(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_inference_mode_enabled())


class Group(NamedTuple):
    """Samples of one run that left at one exit."""

    router: Router
    exit_index: int
    live: tuple[Tensor, ...]
    """At their exit, copies."""
    answers: Tensor
    """What they were answered, (n, C, ...)."""
    scores: list[float]
    """At their exit; none at the original's head."""
    setting: Setting
    """Of the run."""

    @classmethod
    def of(cls, router: Router, k: int, arrived: InFlight, leaving: Leaving, index: Tensor) -> Group:
        """The samples `index`, int64 (n,), of those that leave; before the next stage runs, which may write to them."""
        places = index if leaving.places is None else leaving.places[index]
        answers = leaving.logits.index_select(0, index)
        scores = [] if leaving.score is None else leaving.score[index].tolist()
        live: tuple[Tensor, ...] = ()
        if k < router.last:
            axes = router.axes[k + 1]
            live = tuple(
                tensor.clone() if axis is None else tensor
                for tensor, axis in zip(compact(arrived.live, axes, places), axes, strict=True)
            )
        elif router.keeps_best:  # their answer may be another exit's; else it is the original's own
            live = tuple(tensor.index_select(0, places) for tensor in arrived.live)
        return cls(router, k, live, answers, scores, Setting.now(answers.device))

    @property
    def macs(self) -> int:
        """Of the stages that they have not run, all samples."""
        trunk = self.router.program.trunk_macs
        return (trunk[-1] - trunk[self.exit_index]) * len(self.answers) if self.live else 0


@dataclass
class Waiting:
    """Audited samples in the order of their runs, those that reached the end included: all are settled together.

    A sample that left early has a higher risk than one that reached the end. Were those settled first whose loss is
    known, evidence would be looked at when some of a run's losses are in and others not, which is no order of bets.
    """

    groups: list[Group] = field(default_factory=list)
    born: float = 0.0
    """When the first of them came, by the clock."""

    def add(self, group: Group, now: float) -> None:
        """One group more."""
        if not self.groups:
            self.born = now
        self.groups.append(group)

    @property
    def shared(self) -> bool:
        """Whether some hold what all samples of their run share, and no others may join."""
        return any(None in axes for group in self.groups if group.live for axes in group.router.axes)

    @property
    def left(self) -> int:
        """How many of the samples have stages to run."""
        return sum(len(group.answers) for group in self.groups if group.live)

    @property
    def bytes(self) -> int:
        """Of their live tensors."""
        return sum(tensor.nbytes for group in self.groups for tensor in group.live)

    def losses(self, task: Task, kind: str) -> Iterator[tuple[Group, list[float]]]:
        """Each group, with the losses of its samples; groups of an original that was changed since are left out.

        Args:
            kind: `disagreement` or `outcome`.
        """
        programs: dict[tuple[int, Setting], list[Group]] = {}
        for group in self.groups:
            programs.setdefault((id(group.router.program), group.setting), []).append(group)
        for groups in programs.values():
            groups.sort(key=lambda group: group.exit_index)
            behind = [group for group in groups if group.live]
            try:
                found = _losses(behind, task, kind) if behind else []
            except Altered:
                continue
            for group in groups:
                size = len(group.answers)
                own, found = (found[:size], found[size:]) if group.live else ([0.0] * size, found)
                yield group, own


def _losses(groups: list[Group], task: Task, kind: str) -> list[float]:
    """Of the samples of all groups, which are in the order of their exits."""
    waiting: dict[int, list[tuple[Tensor, ...]]] = {}
    for group in groups:
        waiting.setdefault(group.exit_index, []).append(group.live)
    device, setting = groups[0].answers.device, groups[0].setting
    with (
        torch.inference_mode(setting.inference),
        torch.no_grad(),
        torch.autocast(device.type, setting.dtype, setting.autocast),
    ):
        original = groups[0].router.follow(waiting)
        return loss(task, torch.cat([group.answers for group in groups]), original, kind)


def loss(task: Task, answers: Tensor, original: Tensor, kind: str) -> list[float]:
    """How far answers are from the original's, (n,) in [0, 1]; 1 where that cannot be said."""
    if kind == "disagreement":
        return (~task.agrees(original, answers)).double().tolist()
    return unkept(task.outcome(answers, task.labels_from(original)))


def unkept(outcomes: Tensor) -> list[float]:
    """What outcomes, (n,), lack to 1."""
    return (1 - outcomes.double().nan_to_num(nan=0.0)).clamp(0, 1).tolist()
