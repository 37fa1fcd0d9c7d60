"""Does an exported file answer as the model does? Exits and logits compared on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ee_surgery.backbone.inputs import Batch, tensors
from ee_surgery.errors import CaptureError
from ee_surgery.onnx import OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER, ThresholdPolicy
from ee_surgery.runtime.engine import Engine

_TIE = 1e-5
"""Engines round differently: a sample whose score is this close to a threshold may leave at either exit."""
_CLOSE = 1e-3  # of logits, as a fraction of the largest


class ExportCheck(NamedTuple):
    """How far an exported file is from the model that it was made from."""

    samples: int
    exits: int
    """Samples that leave at another exit, without ties."""
    ties: int
    """Samples whose score is within 1e-5 of a threshold: engines round differently."""
    logits: float
    """Largest difference of a logit where exits agree, as a fraction of the largest logit."""

    def plus(self, other: ExportCheck) -> ExportCheck:
        """Both together."""
        return ExportCheck(
            self.samples + other.samples,
            self.exits + other.exits,
            self.ties + other.ties,
            max(self.logits, other.logits),
        )


def verify(file: OnnxModel | StagedModel, engine: Engine, point: OperatingPoint) -> None:
    """Compare file and model on the sample: all samples leave at each exit, about half of them, none.

    Raises:
        CaptureError: they differ.
    """
    count, sample, policy = len(engine.branches), engine.backbone.own_batch(), point.policy_for(engine.backbone.task)
    middle: list[float] = []
    for k in range(count):
        opened = replace(policy, thresholds=(NEVER,) * k + (-NEVER,) * (count - k))
        middle.append(float(engine.run(sample, opened).score.nan_to_num(0).median()))
    for thresholds in ((-NEVER,) * count, (*(NEVER,) * (count - 1), -NEVER), tuple(middle), (NEVER,) * count):
        for size in (1, 2, 7):
            batch = sample.select([row % 4 for row in range(size)])
            found = compare(file, engine, replace(policy, thresholds=thresholds), batch)
            if found.exits or found.logits > _CLOSE:
                raise CaptureError(
                    f"The exported file does not answer as the model does: in a batch of {size} at thresholds "
                    f"{thresholds}, {found.exits} samples leave elsewhere, and logits differ by {found.logits:.2g} "
                    "of the largest. Nothing was written."
                )


def compare(file: OnnxModel | StagedModel, engine: Engine, policy: ThresholdPolicy, batch: Batch) -> ExportCheck:
    """File and model on one batch, at the thresholds of a policy."""
    own, low, high = (
        engine.run(batch, replace(policy, thresholds=tuple(tau + shift for tau in policy.thresholds)))
        for shift in (0.0, -_TIE, _TIE)
    )
    given = {name: tensor.cpu().numpy() for name, tensor in tensors(batch.arguments).items()}
    theirs = file.run(given, thresholds=policy.thresholds)
    tie = (low.exit_index != high.exit_index).cpu().numpy()
    index, logits = own.exit_index.cpu().numpy(), own.logits.float().cpu().numpy()
    same = index == theirs.exit_index
    apart = np.abs(logits - theirs.logits)[same]
    apart, largest = apart[np.isfinite(apart)], float(np.abs(logits[np.isfinite(logits)]).max(initial=1.0))
    return ExportCheck(len(index), int((~same & ~tie).sum()), int(tie.sum()), float(apart.max(initial=0.0)) / largest)
