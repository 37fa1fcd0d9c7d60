"""One file with the exits inside, on ONNX Runtime or OpenVINO."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ee_surgery.onnx.exported import METADATA, Exported, OnnxError, OnnxOutput
from ee_surgery.onnx.sessions import openvino_model, openvino_version, ort_session

_OUTPUTS = ("logits", "exit_index", "score")
_DEFAULT, _APART = b"\x42\x0athresholds", b"\x42\x0athresholdz"  # the name of the default, as the file has it


class _File(Exported):
    """A file on some engine."""

    inputs: list[str]
    """Names of the inputs, the main one first."""

    def run(
        self, inputs: np.ndarray | Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None
    ) -> OnnxOutput:
        """Run a batch.

        Args:
            inputs: the original's one input, (B, ...), or several by name.
            thresholds: for this call alone.
        Raises:
            OnnxError: inputs of other names, or the engine's refusal.
        """
        named = dict(inputs) if isinstance(inputs, Mapping) else {self.inputs[0]: inputs}
        taus = self.thresholds if thresholds is None else self._checked(thresholds)
        try:
            results = self._results(named, None if taus is None else np.array(taus, np.float32))
        except Exception as error:
            raise OnnxError(f"The file cannot run inputs {_shapes(named)}: {error}") from error
        return self._output(results, taus)

    @abstractmethod
    def _results(self, named: Mapping[str, np.ndarray], thresholds: np.ndarray | None) -> Sequence[np.ndarray]:
        """Logits, exits and scores, at the file's own thresholds by default."""


class OnnxModel(_File):
    """A file that `branched.export` wrote, on ONNX Runtime.

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
        self.session, self.threads = ort_session(path, providers, threads), threads
        self.engine = f"onnxruntime {self.session.get_providers()[0]}"
        """What runs it."""
        super().__init__(self.session.get_modelmeta().custom_metadata_map.get(METADATA), path)
        self.inputs = [one.name for one in self.session.get_inputs()]

    def _results(self, named: Mapping[str, np.ndarray], thresholds: np.ndarray | None) -> Sequence[np.ndarray]:
        return self.session.run([*_OUTPUTS], named if thresholds is None else {**named, "thresholds": thresholds})


class OpenVinoModel(_File):
    """A file that `branched.export` wrote, on OpenVINO: the processor, in float32.

    OpenVINO makes a constant of an input that has a default, so that the default is left out of what it reads.

    Args:
        path: the file; its weights inside it.
        threads: OpenVINO's own choice by default.
    Raises:
        OnnxError: no such file, or none of ours; or OpenVINO before 2026.2, whose `If` gives wrong rows.
        ImportError: openvino is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        if (version := openvino_version()) < (2026, 2):
            raise OnnxError(f"OpenVINO {version[0]}.{version[1]} gives wrong rows of an `If`: use 2026.2.1 or newer.")
        self.model, about = openvino_model(path, threads, lambda raw: raw.replace(_DEFAULT, _APART))
        self.threads = threads
        self.engine = "openvino CPU"
        """What runs it."""
        super().__init__(about, path)
        self.inputs = [one.any_name for one in self.model.inputs if "thresholds" not in one.names]

    def _results(self, named: Mapping[str, np.ndarray], thresholds: np.ndarray | None) -> Sequence[np.ndarray]:
        taus = np.array(self.about["thresholds"], np.float32) if thresholds is None else thresholds
        results = self.model({**named, "thresholds": taus}, share_inputs=True)
        return [results[name] for name in _OUTPUTS]


def _shapes(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{getattr(value, 'dtype', type(value).__name__)} {np.shape(value)}" for name, value in inputs.items()
    }
