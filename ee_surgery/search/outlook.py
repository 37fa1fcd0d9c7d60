"""What branches will be worth once they are trained, judged by a short training."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ee_surgery.calibration.records import ExitRecords

_HALVINGS = 12
_MOST = 10.0


def power(share: float) -> float:
    """By which power of the training steps what a branch lacks shrinks: the larger it is, the more it can learn.

    Read off early branches of the CIFAR ResNet-56, from 80 steps to thousands, so a rough guide: 0.22 for a strided one
    of 0.5 % of the MACs, which lacked 56 points and then 24; about 0.41 for a shortcut of a tenth, 36 and then 4.4;
    about 0.45 for one of a fifth, 22 and then 2.2.

    Args:
        share: MACs of the branch, as a fraction of the original's.
    """
    return min(max(0.217 + 0.062 * math.log(max(share, 1e-6) / 0.005), 0.1), 0.45)


def as_trained(records: ExitRecords, steps: int, horizon: int) -> ExitRecords:
    """Records as they may be after a longer training: what a branch lacks of the original's accuracy has shrunk.

    At most tenfold. Logits are moved towards the original's, by as much as gives that accuracy, so that what was easy
    becomes right first.

    Args:
        steps: of the training so far.
        horizon: of the whole training.
    """
    logits, longer = records.recorded_logits(), max(1.0, horizon / steps)
    original, base = logits[-1], records.base_accuracy
    rows = []
    for row, accuracy, macs in zip(logits[:-1], records.accuracies, records.branch_macs, strict=False):
        lacks = (base - accuracy) / min(_MOST, longer ** power(macs / records.base_macs))
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
