"""What branches will be worth once they are trained, judged by a short training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords

_COPIED, _FRESH = 0.4, 0.2  # powers of the steps by which what a branch lacks shrinks: copied blocks, and small heads
_HEAD = 0.02  # of the original's MACs: a copy that costs less has no blocks
_HALVINGS = 12
_MOST = 10.0


def as_trained(records: ExitRecords, steps: int, horizon: int, copied: Sequence[bool]) -> ExitRecords:
    """Records as they may be after a longer training: what a branch lacks of the original's accuracy has shrunk.

    By a power of the steps, at most tenfold. The powers are rough, of one network, the CIFAR ResNet-56; what a search
    expects is an order of candidates and no forecast. Logits are moved towards the original's, by as much as gives that
    accuracy, so that what was easy becomes right first.

    Args:
        steps: of the training so far.
        horizon: of the whole training.
        copied: for each branch, whether it is made of parts of the original.
    """
    longer, base = max(1.0, horizon / steps), records.base_accuracy
    powers = (
        _COPIED if copy and macs > _HEAD * records.base_macs else _FRESH
        for macs, copy in zip(records.branch_macs, copied, strict=True)
    )
    shrunk = [1 / min(_MOST, longer**power) for power in powers]
    if records.logits is None:
        kept = torch.tensor([*shrunk, 1.0])[:, None]
        lacking = (records.outcomes[-1] - records.outcomes).clamp_min(0) * (1 - kept)
        return replace(records, outcomes=records.outcomes + lacking, tallies=None)
    logits, original = records.logits, records.logits[-1]
    rows = []
    for row, accuracy, share in zip(logits[:-1], records.accuracies, shrunk, strict=False):
        lacks = (base - accuracy) * share
        rows.append(_moved(records, row, original, base - lacks) if lacks > 0 else row)
    return replace(records, logits=torch.stack([*rows, original]))


def _moved(records: ExitRecords, logits: Tensor, original: Tensor, accuracy: float) -> Tensor:
    """Logits (N, C) between these and the original's, of this accuracy."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = records.task.outcome(torch.lerp(logits, original, middle), records.target).double().mean().item()
        low, high = (middle, high) if found < accuracy else (low, middle)
    return torch.lerp(logits, original, high)
