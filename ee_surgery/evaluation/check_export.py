"""Check an exported file against its model, on data."""

from __future__ import annotations

import os
from pathlib import Path

from ee_surgery.checks import instance
from ee_surgery.data.batches import Data, batches
from ee_surgery.errors import DataError
from ee_surgery.export.verify import ExportCheck, compare
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER


def check_export(
    path: str | os.PathLike[str], branched: EarlyExitModel, data: Data, *, batch_size: int = 64
) -> ExportCheck:
    """Run an export and the model that it was made from on the same data, at the operating point in force.

    Args:
        path: what `branched.export` wrote: the file, or the folder of stages.
        data: as for `evaluate`; labels are not used.
    Raises:
        DataError: no samples.
        OnnxError: the file cannot be read.
    """
    instance("branched", branched, EarlyExitModel)
    file = StagedModel(path) if Path(path).is_dir() else OnnxModel(path)
    point = branched.operating_point or OperatingPoint.by_hand(
        NEVER, branched.task.default_score, len(branched.branches)
    )
    policy, weight = point.policy_for(branched.task), next(branched.branches.parameters())
    found = ExportCheck(0, 0, 0, 0.0)
    for inputs, _ in batches(data, batch_size, weight.device, weight.dtype):
        found = found.plus(compare(file, branched.engine, policy, branched.engine.backbone.batch(inputs)))
    if not found.samples:
        raise DataError("No samples: the data is empty.")
    return found
