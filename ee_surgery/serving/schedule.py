"""Which stage runs next: the deepest one with samples, unless it pays to let them wait for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ee_surgery.calibration.profile import Profile
from ee_surgery.serving.lanes import Lane


class Choice(NamedTuple):
    """What to run."""

    lane: Lane
    stage: int


class Times:
    """Seconds of batches, by a profile: what scheduling reckons with."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._known: dict[tuple[bool, ...], tuple[np.ndarray, np.ndarray]] = {}

    def seconds(self, lane: Lane, k: int, samples: float) -> float:
        """Of so many samples in stage k and its branch."""
        visits, scale = lane.route.visits, lane.route.scale
        if visits is None:
            return 0.0
        if visits not in self._known:
            rows = self.profile.stage_ms(visits) / 1e3
            self._known[visits] = np.array((0, *self.profile.sizes), float), np.vstack([np.zeros(rows.shape[1]), rows])
        sizes, rows = self._known[visits]
        return scale * float(np.interp(samples, sizes, rows[:, k]))


def choose(lanes: Sequence[Lane], times: Times | None, now: float) -> Choice | None:
    """What to run next; None where nothing waits.

    The deepest stage of all lanes goes first, of equals the one whose samples have waited longest; offline lanes run
    where no other has work. A stage lets a shallower one of its lane go first where `waits` says so.
    """
    for offline in (False, True):
        busy = [lane for lane in lanes if lane.offline is offline and lane.deepest >= 0]
        waiting = sum(sum(lane.counts) for lane in busy)
        found = [(k, lane) for lane in busy for k, count in enumerate(lane.counts) if count]
        found.sort(key=lambda pair: (-pair[0], pair[1].queues[pair[0]][0].since))
        for k, lane in found:
            if not waits(lane, k, waiting, times, now):
                return Choice(lane, k)
    return None


def waits(lane: Lane, k: int, waiting: int, times: Times | None, now: float) -> bool:
    """Whether the samples in front of stage k should wait for those that a shallower stage lets through.

    Never for a full batch, nor where nothing shallower has samples. Offline, always then: only throughput counts.
    Else by a profile: running both at once has to save all the samples that wait in the engine more time than it costs
    those that are asked to; and no deadline may be in reach of that delay, nor may any sample wait for longer than the
    whole network takes. Without a profile, no stage waits.

    Args:
        waiting: samples that wait in the engine.
    """
    count = lane.counts[k]
    before = next((j for j in reversed(range(k)) if lane.counts[j]), None)
    if before is None or count >= lane.most:
        return False
    if lane.offline or times is None:
        return lane.offline
    coming, delay = float(min(lane.counts[before], lane.most)), 0.0
    for j in range(before, k):
        delay += times.seconds(lane, j, coming)
        coming *= lane.stay_share(j)
    rest = max(count + coming - lane.most, 0.0)
    both = times.seconds(lane, k, min(count + coming, lane.most)) + times.seconds(lane, k, rest)
    saved = times.seconds(lane, k, count) + times.seconds(lane, k, coming) - both
    if saved * waiting <= delay * count:
        return False
    whole = sum(times.seconds(lane, j, lane.most) for j in range(len(lane.counts)))
    to_go = sum(times.seconds(lane, j, lane.most) for j in range(k, len(lane.counts)))
    queue = lane.queues[k]
    deadline = min(request.deadline for parcel in queue for request, _ in parcel.owners)
    return now + delay + to_go < deadline and now + delay - queue[0].since <= whole
