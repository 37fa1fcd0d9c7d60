"""A folder of stages, routed in numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ee_surgery.onnx.exported import METADATA_LIMIT, ROUTER, Exported, OnnxError, OnnxOutput
from ee_surgery.onnx.sessions import Runner, on_onnxruntime


class Samples(NamedTuple):
    """The samples of a batch that have not left, in front of a stage."""

    rows: np.ndarray
    """Which of the batch they are, int64 (b,)."""
    live: Sequence[np.ndarray]
    """What the stage reads."""
    carried: Sequence[np.ndarray]
    """From branch to branch: the state of the score, log-probabilities of a chain, and last the best answer so far."""


class Leaving(NamedTuple):
    """The samples that leave at one exit, with their answers."""

    rows: np.ndarray
    """int64, (n,)."""
    logits: np.ndarray
    """(n, C)."""
    score: np.ndarray
    """float32, (n,); NaN at the original's head."""


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
        own = self.about["batch_dim"]
        self.input_dims: list[int | None] = self.about.get("input_dims", [own] * len(self.inputs))  # new in 0.2
        """Where each input holds its batch; None for one that all samples share."""
        first = [None if dim is None else (dim, 1, 1) for dim in self.input_dims]
        self._axes = [first, *self.about["axes"]]  # in front of each stage
        count = len(self.exits) - 1
        self._stages = [make(os.path.join(folder, f"stage_{k}.onnx")) for k in range(count + 1)]
        self._branches = [make(os.path.join(folder, f"branch_{k}.onnx")) for k in range(count)]

    def run(
        self, inputs: np.ndarray | Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None
    ) -> OnnxOutput:
        """Run a batch; see `OnnxModel.run`."""
        taus = self.in_force if thresholds is None else self._checked(thresholds)
        samples: Samples | None = self.start(inputs)
        batch, left = len(samples.rows), []
        for k in range(len(self.exits)):
            leaving, samples = self.visit(k, samples, taus)
            if leaving is not None:
                left.append((k, leaving))
            if samples is None:
                break
        return self.collect(left, batch, taus)

    # --- a run, stage by stage: samples can wait between two, for those of other batches

    def start(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> Samples:
        """A batch in front of the first stage."""
        live = [inputs[name] for name in self.inputs] if isinstance(inputs, Mapping) else [inputs]
        rows = np.arange(live[0].shape[self.about["batch_dim"]])
        return Samples(rows, live, [np.full((len(rows), *shape), np.nan, kind) for shape, kind in self._unset])

    def visit(self, k: int, samples: Samples, thresholds: Sequence[float]) -> tuple[Leaving | None, Samples | None]:
        """Run stage k and ask the branch behind it.

        Returns:
            Those that leave at exit k, and those that are in front of stage k + 1 now. At the last, all leave.
        """
        rows, live, carried = samples
        if k == len(self._branches):
            (logits,) = self._stages[k]([*live, *carried[len(carried) - len(self._unset) :]])
            return Leaving(rows, logits, np.full(len(rows), np.nan, np.float32)), None
        live = self._stages[k](live)
        if not self.visits(thresholds)[k]:
            return None, Samples(rows, live, carried)
        logits, score, sound, *carried = self._branches[k]([*live, *carried])
        leaves = sound >= np.float32(thresholds[k])
        if leaves.all():
            return Leaving(rows, np.array(logits), np.array(score)), None  # engines may write there again
        staying = Samples(rows, live, carried)
        if not leaves.any():
            return None, staying
        return Leaving(rows[leaves], logits[leaves], score[leaves]), self.take(k + 1, staying, np.flatnonzero(~leaves))

    def take(self, k: int, samples: Samples, keep: np.ndarray) -> Samples:
        """The samples `keep` (int64 indices) of those in front of stage k."""
        live = [_taken(array, keep, axis) for array, axis in zip(samples.live, self._axes[k], strict=True)]
        return Samples(samples.rows[keep], live, [array[keep] for array in samples.carried])

    def join(self, k: int, several: Sequence[Samples]) -> Samples:
        """Samples of several batches in front of stage k, one after the other, counted anew."""
        columns = zip(self._axes[k], *(samples.live for samples in several), strict=True)
        live = [_joined(arrays, axis) for axis, *arrays in columns]
        carried = [np.concatenate(arrays) for arrays in zip(*(samples.carried for samples in several), strict=True)]
        return Samples(np.arange(sum(len(samples.rows) for samples in several)), live, carried)

    def collect(self, left: Sequence[tuple[int, Leaving]], batch: int, thresholds: Sequence[float]) -> OnnxOutput:
        """The answers to a batch, from all that left of it, each with its exit."""
        first = left[0][1]
        logits = np.empty((batch, *first.logits.shape[1:]), first.logits.dtype)
        exit_index, score = np.empty(batch, np.int64), np.empty(batch, first.score.dtype)
        for k, leaving in left:
            logits[leaving.rows], exit_index[leaving.rows], score[leaving.rows] = leaving.logits, k, leaving.score
        return self._output((logits, exit_index, score), thresholds)


def _taken(array: np.ndarray, keep: np.ndarray, axis: Sequence[int] | None) -> np.ndarray:
    """The samples `keep` of a live tensor whose dimension `dim` counts before x B x after."""
    if axis is None:
        return array
    apart, dim = _apart(array, axis)
    return _folded(apart.take(keep, dim), array, axis)


def _joined(arrays: Sequence[np.ndarray], axis: Sequence[int] | None) -> np.ndarray:
    """The samples of several such tensors."""
    if axis is None:
        return arrays[0]
    parts = [_apart(array, axis)[0] for array in arrays]
    return _folded(np.concatenate(parts, _apart(arrays[0], axis)[1]), arrays[0], axis)


def _apart(array: np.ndarray, axis: Sequence[int]) -> tuple[np.ndarray, int]:
    """With the batch in a dimension of its own, and which one that is."""
    dim, before, after = axis
    if before * after == 1:
        return array, dim
    shape = array.shape
    return array.reshape(*shape[:dim], before, -1, after, *shape[dim + 1 :]), dim + 1


def _folded(apart: np.ndarray, like: np.ndarray, axis: Sequence[int]) -> np.ndarray:
    """Folded as it was in `like`, whatever the batch."""
    dim = axis[0]
    return apart if apart.ndim == like.ndim else apart.reshape(*like.shape[:dim], -1, *like.shape[dim + 1 :])
