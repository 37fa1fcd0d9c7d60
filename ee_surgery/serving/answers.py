"""Answers of a model as JSON has them, one entry per sample."""

from __future__ import annotations

import math
from typing import Any

from ee_surgery.errors import ConfigError
from ee_surgery.model import EarlyExitModel
from ee_surgery.runtime.router import ExitOutput
from ee_surgery.task import fits


def check_answers(branched: EarlyExitModel) -> None:
    """Whether `described` knows the answers of a model.

    Raises:
        ConfigError: they are maps.
    """
    if len(branched.engine.answer) > 1:
        raise ConfigError(
            "Answers that are maps are too large for JSON: put an ee.Engine into an application of your own, and "
            "encode them as pictures."
        )


def described(branched: EarlyExitModel, output: ExitOutput) -> list[dict[str, Any]]:
    """One entry per sample: what it says, the exit, the score there (null at the original's head), and the cost.

    Of classes the `class`, its `label` (null where the model has no names) and its `probability`; of several labels the
    lists of them; else the `value`, numbers.
    """
    names = (*branched.exits, "original")
    return [
        {**said, "exit": names[k], "score": _finite(score), "macs_fraction": fraction}
        for said, k, score, fraction in zip(
            _said(branched, output), output.exit_index.tolist(), output.score.tolist(), output.macs_fraction.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def _said(branched: EarlyExitModel, output: ExitOutput) -> list[dict[str, Any]]:
    task, logits = branched.task, output.logits.float()
    labels = branched.engine.backbone.label_names or []

    def name(k: int) -> str | None:
        return labels[k] if k < len(labels) else None

    if task.class_numbers:
        rows = zip(task.labels_from(logits).tolist(), task.certainty(logits).tolist(), strict=True)
        return [{"class": k, "label": name(k), "probability": _finite(p)} for k, p in rows]
    if fits(("multi_label",), task):
        rows = zip(task.labels_from(logits).bool(), task.probabilities(logits)[..., 1], strict=True)
        each = [(present.nonzero().squeeze(1).tolist(), chance[present].tolist()) for present, chance in rows]
        return [
            {"classes": ks, "labels": [name(k) for k in ks], "probabilities": [*map(_finite, ps)]} for ks, ps in each
        ]
    return [{"value": [*map(_finite, row)]} for row in logits.tolist()]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
