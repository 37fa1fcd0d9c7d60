"""A folder of stages, routed in numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ee_surgery.onnx.exported import METADATA_LIMIT, ROUTER, Exported, OnnxError, OnnxOutput
from ee_surgery.onnx.sessions import Runner, on_onnxruntime


class StagedModel(Exported):
    """A folder that `branched.export(folder, layout="stages")` wrote: stages for engines without `If`, routed in numpy.

    Args:
        folder: with `router.json`.
        load: makes a stage from its file: `on_onnxruntime`, `on_openvino`, or your own.
    Raises:
        OnnxError: no such folder, or none of ours.
    """

    def __init__(self, folder: str | os.PathLike[str], load: Callable[[str], Runner] | None = None) -> None:
        path = os.path.join(folder, ROUTER)
        if not os.path.isfile(path):  # a fifo would wait for ever
            raise OnnxError(f"No such file: {path}.")
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(METADATA_LIMIT + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise OnnxError(f"Cannot read {path}: {error}") from error
        super().__init__(text, path)
        if not self.about.keys() >= {"inputs", "batch_dim", "axes", "unset"}:
            raise OnnxError(f"{path} has damaged metadata: it does not say how its stages are joined.")
        # older versions wrote the number of classes in place of a shape
        self._unset = [([shape] if isinstance(shape, int) else shape, kind) for shape, kind in self.about["unset"]]
        self.inputs: list[str] = self.about["inputs"]
        """Names of the inputs, the main one first."""
        self.engine, self.threads = "onnxruntime" if load is None else "another engine", 0
        make = on_onnxruntime if load is None else load
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
        carried = [np.full((len(rows), *shape), np.nan, kind) for shape, kind in self._unset]
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
