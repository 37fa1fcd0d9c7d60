"""Metrics of the exits per epoch: `compute_metrics` for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.checks import accuracy_drop, optional
from ee_surgery.errors import DataError
from ee_surgery.model import EarlyExitModel

_SEARCHED = 10_000  # most samples for the threshold search, which then takes seconds


def exit_metrics(model: Any, *, max_accuracy_drop: float | None = 0.01) -> ExitMetrics:
    """Metrics of all exits: `Trainer(model, ..., compute_metrics=exit_metrics(model))`.

    Without an operating point, as during training: `accuracy_exit_0` and so on in program order, `accuracy_original`,
    `accuracy_exits`, the mean over the branches, and `macs_saved`: the fraction of the original's MACs that the best
    thresholds save within `max_accuracy_drop` of its accuracy. The thresholds are searched and evaluated on the same
    samples, so it is optimistic: good for comparing epochs, not for reporting. All are larger-is-better, as
    `metric_for_best_model` expects. With an operating point: `accuracy` of the routed predictions.

    Samples with a negative label are left out. With `batch_eval_metrics`, batches are collected.

    Args:
        model: the evaluated model, as passed to Trainer, or the `EarlyExitModel` in it.
        max_accuracy_drop: in [0, 1]; 0.01 is one percentage point. None: no search, and no `macs_saved`.
    Raises:
        ConfigError: an invalid drop.
    """
    max_accuracy_drop = optional(accuracy_drop)("max_accuracy_drop", max_accuracy_drop)
    return ExitMetrics(getattr(model, "branched", model), max_accuracy_drop)


class ExitMetrics:
    """The result of `exit_metrics`: a `compute_metrics` for Trainer."""

    def __init__(self, branched: EarlyExitModel, max_accuracy_drop: float | None) -> None:
        self.branched = branched
        self.max_accuracy_drop = max_accuracy_drop
        self._collected: list[tuple[Tensor, Tensor]] = []

    def __call__(self, evaluated: Any, compute_result: bool = True) -> dict[str, float]:
        """Metrics of an `EvalPrediction`; empty while `compute_result` is False.

        Raises:
            DataError: predictions other than this model's, such as ones changed by `preprocess_logits_for_metrics`.
        """
        self._collected.append((self._logits(evaluated.predictions), self._labels(evaluated.label_ids)))
        if not compute_result:
            return {}
        logits, labels = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
        self._collected.clear()
        known = (labels >= 0).reshape(len(labels), -1).all(1)
        if not known.any():
            raise DataError("None of the evaluated samples has a label.")
        return self._metrics(logits[known], labels[known])

    def _logits(self, predictions: Any) -> Tensor:
        """Logits (N, K, C) of all exits, or (N, C) of routed predictions."""
        found = predictions[1] if isinstance(predictions, (tuple, list)) and len(predictions) == 2 else predictions
        classes, exits = self.branched.num_classes, len(self.branched.exits) + 1
        shape = getattr(found, "shape", ())
        if tuple(shape[1:]) not in {(exits, classes), (classes,)}:
            raise DataError(
                f"Predictions of shape {tuple(shape)} are neither logits of {classes} classes nor those of {exits} "
                "exits: leave out preprocess_logits_for_metrics and ignore_keys."
            )
        return torch.as_tensor(found).detach().cpu().float()

    def _labels(self, given: Any) -> Tensor:
        """In the form of `Task.labels_from`: class numbers (N,), also of labels as probabilities (N, C)."""
        return self.branched.task.hard(torch.as_tensor(given).cpu())

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        if logits.ndim == 2:
            return {"accuracy": self.branched.task.outcome(logits, labels).double().mean().item()}
        branched = self.branched
        records = ExitRecords(
            exits=tuple(branched.exits),
            logits=logits.transpose(0, 1),
            trunk_macs=branched.trunk_macs,
            branch_macs=branched.branch_macs,
            labels=labels,
            chained=branched.branches.chained,
            task=branched.task,
        )
        *exits, original = records.accuracies
        found = {f"accuracy_exit_{k}": accuracy for k, accuracy in enumerate(exits)}
        found |= {"accuracy_exits": sum(exits) / len(exits), "accuracy_original": original}
        if self.max_accuracy_drop is not None:
            some = torch.linspace(0, len(labels) - 1, min(len(labels), _SEARCHED)).long()
            point = Frontier.search(records.take(some)).at(max_accuracy_drop=self.max_accuracy_drop)
            found["macs_saved"] = 1 - point.macs_fraction
        return found
