"""Audited requests of an engine: taken out of shared batches, and handed over in the order of admission."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import torch

from ee_surgery.monitoring.followed import MOST_BYTES
from ee_surgery.runtime.router import InFlight, Leaving, Observer
from ee_surgery.serving.lanes import Owner, Request

log = logging.getLogger("ee_surgery.serving")


class AuditQueue:
    """Audited requests in the order in which they came; of the worker alone.

    A request whose samples left early is answered before one that came earlier and has samples that stay. Were it
    settled first, losses would be bet on in an order that depends on them, which is no fair bet: so it waits.

    The audited batch itself runs in the worker, between two batches of requests, once the answers of the last one are
    out. It holds requests up for no longer than one batch of `Audit(waiting=)` samples takes the original. In a thread
    of its own it would compete with the worker for the same cores, or the same stream of a GPU: requests would wait for
    it as long, and nothing would keep audits from falling behind.
    """

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def enter(self, request: Request) -> None:
        """A request that was admitted after all that are in."""
        if request.watched is None:
            return
        if sum(each.watched.bytes for each in self._requests if each.watched) > MOST_BYTES:
            request.watched = None  # behind one that takes long: a decision before it runs, so that bets stay fair
            return
        self._requests.append(request)

    def hand_over(self) -> bool:
        """Give the audit all requests that no earlier one keeps waiting; whether there were any."""
        found = False
        while self._requests and self._requests[0].settled:
            watched, found = self._requests.popleft().watched, True
            try:
                if watched is not None:
                    watched.hand_over()
            except Exception:  # the answers are out; an alarm that warnings make an error is raised already
                log.exception("The audit of a served request failed")
        return found


def observer(owners: Sequence[Owner]) -> Observer | None:
    """What tells requests of their chosen samples in one shared batch; None where no request has any.

    Args:
        owners: of the samples of the batch.
    """
    if all(request.watched is None for request, _ in owners):
        return None

    def observe(k: int, arrived: InFlight, leaving: Leaving | None, staying: InFlight | None) -> None:
        if leaving is None:
            return
        places = range(len(owners)) if leaving.rows is None else leaving.rows.tolist()
        found: dict[Request, list[int]] = {}
        for at, place in enumerate(places):
            request, row = owners[place]
            if request.watched is not None and row in request.watched.chosen:
                found.setdefault(request, []).append(at)
        for request, index in found.items():
            if request.watched is not None:
                request.watched.take(k, arrived, leaving, torch.tensor(index, device=leaving.logits.device))

    return observe
