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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np

FORMAT_VERSION = 1
METADATA = "ee_surgery"
ROUTER = "router.json"
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
    latency_ms: float = math.nan
    """Mean milliseconds of a batch, where the model was calibrated with a profile."""

    def __str__(self) -> str:
        time = "" if math.isnan(self.latency_ms) else f", {self.latency_ms:.2f} ms per batch"
        return f"{self.macs_fraction:.1%} of the MACs ({self.expected_accuracy:.2%} expected{time})"


class _Exported:
    """What a file and a folder of stages have in common: the metadata and the knob."""

    def __init__(self, text: str | None, path: object) -> None:
        self.about = about = _metadata(text, path)
        """The metadata as plain data."""
        self.exits: list[str] = about["exits"]
        """Names of the exits, the original's own head (`original`) last."""
        self.labels: list[str] | None = about["labels"]
        """Class names in order, where they are known."""
        self.preprocessing: dict[str, Any] | None = about["preprocessing"]
        """How pictures are prepared, as `timm.data.create_transform` takes it."""
        self.points: tuple[OnnxPoint, ...] = about["points"]
        """The frontier, from cheap to dear; empty where the model was not calibrated."""
        self.thresholds: tuple[float, ...] | None = None
        """In force; None: those that the model was exported with."""

    def operate(
        self,
        *,
        max_accuracy_drop: float | None = None,
        budget: float | None = None,
        latency_ms: float | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> tuple[float, ...] | None:
        """Set when samples leave: exactly one argument; without any, the file's own operating point.

        Args:
            max_accuracy_drop: the cheapest point of the frontier within this drop; 0.01 is one percentage point.
            budget: the most accurate one within this fraction of the original's MACs.
            latency_ms: the most accurate one within this mean time of a batch.
            thresholds: one per branch; inf closes an exit.
        Returns:
            The thresholds in force; None for the file's own.
        Raises:
            OnnxError: several of them, or nothing meets the request.
        """
        given = [value for value in (max_accuracy_drop, budget, latency_ms, thresholds) if value is not None]
        if len(given) > 1:
            raise OnnxError("Give one of max_accuracy_drop=, budget=, latency_ms=, thresholds=.")
        if thresholds is not None:
            self.thresholds = self._checked(thresholds)
        elif not given:
            self.thresholds = None
        else:
            self.thresholds = self._chosen(max_accuracy_drop, budget, latency_ms).thresholds
        return self.thresholds

    def _chosen(self, drop: float | None, budget: float | None, latency_ms: float | None) -> OnnxPoint:
        if not self.points:
            raise OnnxError("The file has no frontier: calibrate the model before you export it, or give thresholds=.")
        if latency_ms is not None and math.isnan(self.points[0].latency_ms):
            raise OnnxError("The file has no times: calibrate the model with a profile before you export it.")
        if drop is not None:  # points are ordered from the cheapest
            least = self.about["base_accuracy"] - drop - 1e-12
            best = next((point for point in self.points if point.expected_accuracy >= least), None)
        else:
            most, cost = (budget, "macs_fraction") if latency_ms is None else (latency_ms, "latency_ms")
            fits = [point for point in self.points if getattr(point, cost) <= most]
            best = max(fits, key=lambda point: point.expected_accuracy, default=None)
        if best is None:
            low, high = self.points[0], self.points[-1]
            raise OnnxError(f"No operating point of the file meets that: its points go from {low} to {high}.")
        return best

    def _checked(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        found = tuple(float(tau) for tau in thresholds)
        if len(found) != len(self.exits) - 1 or any(math.isnan(tau) for tau in found):
            raise OnnxError(f"thresholds must be {len(self.exits) - 1} numbers, one per branch; got {thresholds}.")
        return found

    def _visits(self, thresholds: Sequence[float]) -> list[bool]:
        """Which branches run: those of open exits, and where later ones read what they hand on, those before."""
        opened = [tau < math.inf for tau in thresholds]
        return opened if self.about["closes_alone"] else [any(opened[k:]) for k in range(len(opened))]

    def _output(self, results: Sequence[np.ndarray], thresholds: Sequence[float] | None) -> OnnxOutput:
        """Logits, exits and scores with their costs."""
        logits, exit_index, score = results
        return OnnxOutput(logits, exit_index, score, self._costs(thresholds)[exit_index])

    def _costs(self, thresholds: Sequence[float] | None) -> np.ndarray:
        """MACs of leaving at each exit: the trunk up to it and every branch visited, closed exits' left out."""
        visits = self._visits(self.about["thresholds"] if thresholds is None else thresholds)
        paid = [*accumulate(m * v for m, v in zip(self.about["branch_macs"], visits, strict=True))]
        return np.array([t + p for t, p in zip(self.about["trunk_macs"], [*paid, paid[-1]], strict=True)])


class OnnxModel(_Exported):
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
        self.session, self.threads = _session(path, providers, threads), threads
        self.engine = f"onnxruntime {self.session.get_providers()[0]}"
        """What runs it."""
        super().__init__(self.session.get_modelmeta().custom_metadata_map.get(METADATA), path)
        self.inputs = [one.name for one in self.session.get_inputs()]
        """Names of the inputs, the main one first."""

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
            results = self.session.run(["logits", "exit_index", "score"], feeds)
        except Exception as error:
            raise OnnxError(f"The file cannot run inputs {_shapes(named)}: {error}") from error
        return self._output(results, taus)


Runner: TypeAlias = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""A stage on some engine: its inputs in order, to its outputs in order."""


class StagedModel(_Exported):
    """A folder that `branched.export(folder, layout="stages")` wrote: stages for engines without `If`, routed in numpy.

    Args:
        folder: with `router.json`.
        load: makes a stage from its file, by default with onnxruntime; docs/deploy.md has one for OpenVINO.
    Raises:
        OnnxError: no such folder, or none of ours.
    """

    def __init__(self, folder: str | os.PathLike[str], load: Callable[[str], Runner] | None = None) -> None:
        path = os.path.join(folder, ROUTER)
        if not os.path.isfile(path):  # a fifo would wait for ever
            raise OnnxError(f"No such file: {path}.")
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_LIMIT + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise OnnxError(f"Cannot read {path}: {error}") from error
        super().__init__(text, path)
        if not self.about.keys() >= {"inputs", "batch_dim", "axes", "unset"}:
            raise OnnxError(f"{path} has damaged metadata: it does not say how its stages are joined.")
        self.inputs: list[str] = self.about["inputs"]
        """Names of the inputs, the main one first."""
        self.engine, self.threads = "onnxruntime" if load is None else "another engine", 0
        make = _on_onnxruntime if load is None else load
        count = len(self.exits) - 1
        self._stages = [make(os.path.join(folder, f"stage_{k}.onnx")) for k in range(count + 1)]
        self._branches = [make(os.path.join(folder, f"branch_{k}.onnx")) for k in range(count)]

    def run(
        self, inputs: np.ndarray | Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None
    ) -> OnnxOutput:
        """Run a batch; see `OnnxModel.run`."""
        live = [inputs[name] for name in self.inputs] if isinstance(inputs, Mapping) else [inputs]
        taus = self.thresholds if thresholds is None else self._checked(thresholds)
        taus = self.about["thresholds"] if taus is None else taus
        rows = np.arange(live[0].shape[self.about["batch_dim"]])
        results: list[np.ndarray] = []
        # between exits: the state of the score, log-probabilities of a chain, and last the best answer so far
        carried = [np.full((len(rows), classes), np.nan, kind) for classes, kind in self.about["unset"]]
        best = len(carried)
        for k, seen in enumerate(self._visits(taus)):
            live = [*self._stages[k](live)]
            if not seen:
                continue
            logits, score, sound, *carried = self._branches[k]([*live, *carried])
            results = _written(results, rows, (logits, np.full(len(rows), k), score))
            stays = np.flatnonzero(~(sound >= np.float32(taus[k])))
            if not len(stays):
                return self._output(results, taus)
            if len(stays) < len(rows):
                live = [_taken(array, stays, axis) for array, axis in zip(live, self.about["axes"][k], strict=True)]
                carried, rows = [array[stays] for array in carried], rows[stays]
        (logits,) = self._stages[-1]([*live, *carried[len(carried) - best :]])
        last = (logits, np.full(len(rows), len(self.exits) - 1), np.full(len(rows), np.nan, np.float32))
        results = _written(results, rows, last)
        return self._output(results, taus)


def _written(before: Sequence[np.ndarray], rows: np.ndarray, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Answers of the samples in flight over those of all; samples that stay are written over again later."""
    if not before:
        return [np.array(value) for value in values]
    for old, new in zip(before, values, strict=True):
        old[rows] = new
    return [*before]


def _taken(array: np.ndarray, keep: np.ndarray, axis: Sequence[int] | None) -> np.ndarray:
    """The samples `keep` of a live tensor whose dimension `dim` counts before x B x after."""
    if axis is None:
        return array
    dim, before, after = axis
    if before * after == 1:
        return array.take(keep, dim)
    shape = array.shape
    apart = array.reshape(*shape[:dim], before, -1, after, *shape[dim + 1 :])
    return apart.take(keep, dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])


def _session(path: str | os.PathLike[str], providers: Sequence[str], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # that `thresholds` can be overridden is meant
    if not os.path.isfile(path):
        raise OnnxError(f"No such file: {path}.")
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=[*providers])
    except Exception as error:  # onnxruntime's own errors derive from Exception alone
        raise OnnxError(f"onnxruntime cannot load {path}: {error}") from error


def _on_onnxruntime(path: str) -> Runner:
    session = _session(path, ("CPUExecutionProvider",), 0)
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _metadata(text: str | None, path: object) -> dict[str, Any]:
    """The metadata, checked: a file may come from anyone."""
    if text is None or len(text) > _LIMIT:
        raise OnnxError(f"{path} was not written by ee_surgery: it has no metadata {METADATA!r}.")
    try:
        about = json.loads(text)
        if (version := about["format_version"]) != FORMAT_VERSION:
            raise OnnxError(f"{path} is of format {version!r:.20}; this version reads {FORMAT_VERSION}.")
        points = tuple(map(_point, about["points"]))
        costs = {name: [*map(int, about[name])] for name in ("trunk_macs", "branch_macs")}
        known = {"points": points, "thresholds": tuple(map(float, about["thresholds"])), **costs}
        missing = {"labels", "preprocessing", "closes_alone", "base_accuracy"} - about.keys()
        k = len(about["exits"])
        sizes = {len(costs["trunk_macs"]), len(costs["branch_macs"]) + 1, len(known["thresholds"]) + 1}
        if missing or k < 2 or sizes != {k} or any(len(point.thresholds) != k - 1 for point in points):
            raise ValueError("its parts do not fit together, or some are missing")
    except OnnxError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise OnnxError(f"{path} has damaged metadata: {repr(error)[:200]}.") from error
    return {**about, **known}


def _point(data: Mapping[str, Any]) -> OnnxPoint:
    names = ("accuracy", "expected_accuracy", "macs_fraction", "latency_ms")
    numbers = {name: math.nan if data.get(name) is None else float(data[name]) for name in names}
    return OnnxPoint(tuple(float(tau) for tau in data["thresholds"]), samples=int(data["samples"]), **numbers)


def _shapes(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{getattr(value, 'dtype', type(value).__name__)} {np.shape(value)}" for name, value in inputs.items()
    }
