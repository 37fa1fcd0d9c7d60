"""Run an exported file without torch: load it, run it, move the knob, read its frontier. numpy and onnxruntime alone.

from ee_surgery.onnx import OnnxModel

model = OnnxModel("resnet.onnx")
model.operate(max_accuracy_drop=0.01)
answer = model.run(pixels)          # logits, exit_index, score, macs of each sample
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
METADATA = "ee_surgery"
_LIMIT = 4 << 20  # characters of metadata


class OnnxError(ValueError):
    """A file that is none of ours, or a request that it cannot meet."""


class OnnxOutput(NamedTuple):
    """Where each sample left, with what answer, at what cost."""

    logits: np.ndarray
    """(B, C)."""
    exit_index: np.ndarray
    """int64, (B,); the last is the original's own head."""
    score: np.ndarray
    """float32, (B,); NaN at the original's head."""
    macs: np.ndarray
    """int64, (B,): the stages that ran for each sample and every branch it visited."""


@dataclass(frozen=True)
class OnnxPoint:
    """An operating point of the file's frontier."""

    thresholds: tuple[float, ...]
    accuracy: float
    expected_accuracy: float
    macs_fraction: float
    samples: int


class OnnxModel:
    """A file that `branched.export` wrote.

    Args:
        path: the file.
        providers: of onnxruntime, in order; the processor by default.
        threads: of onnxruntime; its own choice by default.
    Raises:
        OnnxError: no such file, or none of ours.
        ImportError: onnxruntime is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # that `thresholds` can be overridden is meant
        if not os.path.isfile(path):
            raise OnnxError(f"No such file: {path}.")
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[*providers])
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise OnnxError(f"onnxruntime cannot load {path}: {error}") from error
        about = _metadata(self.session.get_modelmeta().custom_metadata_map.get(METADATA), path)
        self.about = about
        """The metadata as plain data."""
        self.exits: list[str] = about["exits"]
        """Names of the exits, the original's own head (`original`) last."""
        self.labels: list[str] | None = about["labels"]
        """Class names in order, where they are known."""
        self.preprocessing: dict[str, Any] | None = about["preprocessing"]
        """How pictures are prepared, as `timm.data.create_transform` takes it."""
        self.points = tuple(_point(point) for point in about["points"])
        """The frontier, from cheap to dear; empty where the model was not calibrated."""
        self.thresholds: tuple[float, ...] | None = None
        """In force; None: the file's own."""
        self.inputs = [one.name for one in self.session.get_inputs()]

    def operate(
        self,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> tuple[float, ...] | None:
        """Set when samples leave: exactly one argument; without any, the file's own operating point.

        Args:
            max_accuracy_drop: the cheapest point of the frontier within this drop; 0.01 is one percentage point.
            budget: the most accurate one within this fraction of the original's MACs.
            thresholds: one per branch; inf closes an exit.
        Returns:
            The thresholds in force; None for the file's own.
        Raises:
            OnnxError: several of them, or nothing meets the request.
        """
        given = [value for value in (max_accuracy_drop, budget, thresholds) if value is not None]
        if len(given) > 1:
            raise OnnxError("Give one of max_accuracy_drop=, budget=, thresholds=.")
        if thresholds is not None:
            self.thresholds = self._checked(thresholds)
        elif not given:
            self.thresholds = None
        else:
            self.thresholds = self._chosen(max_accuracy_drop, budget).thresholds
        return self.thresholds

    def _chosen(self, drop: float | None, budget: float | None) -> OnnxPoint:
        if not self.points:
            raise OnnxError("The file has no frontier: calibrate the model before you export it, or give thresholds=.")
        if drop is not None:
            least = self.about["base_accuracy"] - drop
            fits = [point for point in self.points if point.expected_accuracy >= least - 1e-12]
            best = min(fits, key=lambda point: point.macs_fraction, default=None)
        else:
            fits = [point for point in self.points if point.macs_fraction <= budget]
            best = max(fits, key=lambda point: point.expected_accuracy, default=None)
        if best is None:
            low, high = self.points[0], self.points[-1]
            raise OnnxError(
                f"No operating point of the file meets that: its points go from {low.macs_fraction:.1%} of the MACs "
                f"({low.expected_accuracy:.2%} expected) to {high.macs_fraction:.1%} ({high.expected_accuracy:.2%})."
            )
        return best

    def _checked(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        found = tuple(float(tau) for tau in thresholds)
        if len(found) != len(self.exits) - 1 or any(math.isnan(tau) for tau in found):
            raise OnnxError(f"thresholds must be {len(self.exits) - 1} numbers, one per branch; got {thresholds}.")
        return found

    def run(
        self, inputs: np.ndarray | Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None
    ) -> OnnxOutput:
        """Run a batch.

        Args:
            inputs: the original's one input, (B, ...), or several by name.
            thresholds: for this call alone.
        Raises:
            OnnxError: inputs of other names, or onnxruntime's refusal.
        """
        named = dict(inputs) if isinstance(inputs, Mapping) else {self.inputs[0]: inputs}
        taus = self.thresholds if thresholds is None else self._checked(thresholds)
        feeds = named if taus is None else {**named, "thresholds": np.array(taus, np.float32)}
        try:
            logits, exit_index, score = self.session.run(["logits", "exit_index", "score"], feeds)
        except Exception as error:
            raise OnnxError(f"The file cannot run inputs {_shapes(named)}: {error}") from error
        return OnnxOutput(logits, exit_index, score, self._costs(taus)[exit_index])

    def _costs(self, thresholds: Sequence[float] | None) -> np.ndarray:
        """MACs of leaving at each exit: the trunk up to it and every branch visited, closed exits' left out."""
        taus = [float(tau) for tau in (self.about["thresholds"] if thresholds is None else thresholds)]
        opened = [tau < math.inf for tau in taus]
        visits = opened if self.about["closes_alone"] else [any(opened[k:]) for k in range(len(opened))]
        paid = [*accumulate(m * v for m, v in zip(self.about["branch_macs"], visits, strict=True))]
        return np.array([t + p for t, p in zip(self.about["trunk_macs"], [*paid, paid[-1]], strict=True)])


def _metadata(text: str | None, path: object) -> dict[str, Any]:
    """The metadata, checked: a file is data of whoever wrote it."""
    if text is None or len(text) > _LIMIT:
        raise OnnxError(f"{path} was not written by ee_surgery: it has no metadata {METADATA!r}.")
    try:
        about = json.loads(text)
        version = about["format_version"]
        if version != FORMAT_VERSION:
            raise OnnxError(f"{path} is of format {version!r}; this version reads {FORMAT_VERSION}.")
        k = len(about["exits"])
        sizes = {len(about["trunk_macs"]), len(about["branch_macs"]) + 1, len(about["thresholds"]) + 1}
        if k < 2 or sizes != {k} or any(len(point["thresholds"]) != k - 1 for point in about["points"]):
            raise ValueError("its parts do not fit together")
        for name in ("labels", "preprocessing", "closes_alone", "base_accuracy"):
            about[name]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, OnnxError):
            raise
        raise OnnxError(f"{path} has damaged metadata: {error!r}.") from error
    return about


def _point(data: Mapping[str, Any]) -> OnnxPoint:
    numbers = {name: math.nan if data[name] is None else float(data[name]) for name in data if name != "thresholds"}
    taus = tuple(float(tau) for tau in data["thresholds"])
    return OnnxPoint(
        taus, numbers["accuracy"], numbers["expected_accuracy"], numbers["macs_fraction"], int(numbers["samples"])
    )


def _shapes(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{getattr(value, 'dtype', type(value).__name__)} {np.shape(value)}" for name, value in inputs.items()
    }
