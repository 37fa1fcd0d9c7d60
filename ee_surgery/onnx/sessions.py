"""ONNX Runtime and OpenVINO, on the processor unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ee_surgery.onnx.exported import METADATA, OnnxError

Runner: TypeAlias = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""A graph on some engine: its inputs in order, to its outputs in order."""


def ort_session(path: str | os.PathLike[str], providers: Sequence[str], threads: int) -> Any:
    """A file on ONNX Runtime; `threads` 0 leaves their number to it.

    Raises:
        OnnxError: no such file, or ONNX Runtime cannot load it.
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # that `thresholds` can be overridden is meant
    _existing(path)
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=[*providers])
    except Exception as error:  # onnxruntime's own errors derive from Exception alone
        raise OnnxError(f"onnxruntime cannot load {path}: {error}") from error


def openvino_model(
    path: str | os.PathLike[str], threads: int, edit: Callable[[bytes], bytes] | None = None
) -> tuple[Any, str | None]:
    """A file that OpenVINO compiled for the processor, in float32, and our metadata; `threads` 0: its own choice.

    Args:
        edit: of the file's bytes, before they are compiled.
    Raises:
        OnnxError: no such file, or OpenVINO cannot load it.
        ImportError: openvino is not installed.
    """
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}  # by default it rounds to bfloat16
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    _existing(path)
    try:
        core = openvino.Core()
        model = core.read_model(os.fspath(path)) if edit is None else core.read_model(edit(_bytes(path)))
        about = model.rt_info["framework"][METADATA].value if model.has_rt_info(["framework", METADATA]) else None
        return core.compile_model(model, "CPU", options), about
    except RuntimeError as error:
        raise OnnxError(f"OpenVINO cannot load {path}: {error}") from error


def openvino_version() -> tuple[int, int]:
    """Year and release of the OpenVINO that is installed."""
    import openvino

    year, release = openvino.__version__.split(".")[:2]
    return int(year), int(release)


def on_onnxruntime(path: str, threads: int = 0) -> Runner:
    """A stage on ONNX Runtime; `threads` 0 leaves their number to it."""
    session = ort_session(path, ("CPUExecutionProvider",), threads)
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def on_openvino(path: str, threads: int = 0) -> Runner:
    """A stage on OpenVINO, in float32; `threads` 0 leaves their number to it. Its next call overwrites what it gave."""
    model, _ = openvino_model(path, threads)
    return lambda inputs: [*model(list(inputs), share_inputs=True, share_outputs=True).values()]


def _existing(path: str | os.PathLike[str]) -> None:
    if not os.path.isfile(path):  # a fifo would wait for ever
        raise OnnxError(f"No such file: {path}.")


def _bytes(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()
