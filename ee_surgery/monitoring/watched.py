"""One request under an audit: its chosen samples are taken where they leave, in its own run or in shared batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ee_surgery.monitoring.followed import Group
from ee_surgery.runtime.router import InFlight, Leaving, Router


class Watched:
    """The chosen samples of one request; called, it observes a run of that request alone.

    Args:
        router: that runs them.
        size: samples of the request.
        chosen: which of them, rising.
        add: takes their groups once all samples of the request have left.
    """

    def __init__(self, router: Router, size: int, chosen: Sequence[int], add: Callable[[list[Group]], None]) -> None:
        self.router, self.size, self.chosen = router, size, frozenset(chosen)
        self.groups: list[Group] = []
        self._add = add
        self._mask: Tensor | None = None

    def __call__(self, k: int, arrived: InFlight, leaving: Leaving | None, staying: InFlight | None) -> None:
        self.observe(k, arrived, leaving, staying)
        if staying is None:
            self.hand_over()

    def observe(self, k: int, arrived: InFlight, leaving: Leaving | None, staying: InFlight | None) -> None:
        """A step of a run of the whole request, as an `Observer`."""
        if leaving is None:
            return
        if self._mask is None:
            self._mask = torch.zeros(self.size, dtype=torch.bool)
            self._mask[[*self.chosen]] = True
            self._mask = self._mask.to(leaving.logits.device)
        mine = self._mask if leaving.rows is None else self._mask[leaving.rows]
        self.take(k, arrived, leaving, mine.nonzero().squeeze(1))

    def take(self, k: int, arrived: InFlight, leaving: Leaving, index: Tensor) -> None:
        """Some of the chosen samples leave at exit k.

        Args:
            k: the exit.
            arrived: samples of any requests that reached it.
            leaving: those of them that leave.
            index: which of those are this request's and chosen, int64 (n,).
        """
        if len(index):
            self.groups.append(Group.of(self.router, k, arrived, leaving, index))

    def again(self, router: Router, size: int) -> Callable[..., None]:
        """The request runs anew, by this router: what was taken so far does not count."""
        self.router, self.groups = router, []
        return self.observe

    @property
    def bytes(self) -> int:
        """Of the live tensors that it holds."""
        return sum(tensor.nbytes for group in self.groups for tensor in group.live)

    def hand_over(self) -> None:
        """All samples have left: to the audit, in the order in which one run of the request gives them."""
        self._add(sorted(self.groups, key=lambda group: group.exit_index))
        self.groups = []

    def drop(self) -> None:
        """The request gets no answer: none of its samples has a loss."""
        self.groups = []
