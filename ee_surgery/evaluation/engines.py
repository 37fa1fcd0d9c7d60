"""Engines that a model can be served with, each running the original and its exits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ee_surgery.backbone.inputs import Inputs, tensors
from ee_surgery.data.batches import count
from ee_surgery.errors import SurgeryError
from ee_surgery.model import EarlyExitModel
from ee_surgery.onnx import OnnxModel, OpenVinoModel, Runner, on_onnxruntime, on_openvino
from ee_surgery.registry import Registry
from ee_surgery.runtime.compilation import Compilation

Call: TypeAlias = Callable[[Inputs], object]


class Served(NamedTuple):
    """A model on one engine."""

    original: Call
    exits: Call
    """At the operating point in force."""


ENGINES: Registry[Callable[[EarlyExitModel, Path], Served]] = Registry("engine", "ee_surgery.engines")
"""Name -> function of a branched model and a folder for files; it runs on as many threads as torch has."""


@ENGINES.register("eager")
def eager(branched: EarlyExitModel, folder: Path) -> Served:
    """PyTorch, operator by operator."""
    return Served(_called(branched), branched)


@ENGINES.register("compile")
def compiled(branched: EarlyExitModel, folder: Path) -> Served:
    """torch.compile, as `branched.compile()` was told or by default; the original has a program per batch size."""
    copied, plain = branched.copy(), _called(branched)
    copied.engine.compilation = how = branched.engine.compilation or Compilation()
    programs: dict[int, Call] = {}

    def original(batch: Inputs) -> object:
        size = count(batch)
        if size not in programs:
            programs[size] = how.apply(plain)
            with how.compiling():
                return programs[size](batch)
        return programs[size](batch)

    return Served(original, copied)


@ENGINES.register("onnx")
def onnxruntime(branched: EarlyExitModel, folder: Path) -> Served:
    """ONNX Runtime on the processor: one file with the exits inside."""
    file = OnnxModel(_exported(branched, folder), threads=torch.get_num_threads())
    return Served(_original(branched, folder, on_onnxruntime), lambda batch: file.run(_arrays(branched, batch)))


@ENGINES.register("openvino")
def openvino(branched: EarlyExitModel, folder: Path) -> Served:
    """OpenVINO on the processor, in float32: one file with the exits inside."""
    file = OpenVinoModel(_exported(branched, folder), threads=torch.get_num_threads())
    return Served(_original(branched, folder, on_openvino), lambda batch: file.run(_arrays(branched, batch)))


def served(branched: EarlyExitModel, name: str, folder: Path) -> Served:
    """The model on an engine.

    Raises:
        UnknownNameError: no such engine.
        SurgeryError: it is not installed.
    """
    make = ENGINES[name]
    try:
        return make(branched, folder)
    except ImportError as error:
        raise SurgeryError(f"The engine {name!r} is not installed: {error}.") from error


def _called(branched: EarlyExitModel) -> Call:
    model = branched.engine.backbone.state().model  # in eval mode, without our checks at every call
    return lambda batch: model(batch) if isinstance(batch, Tensor) else model(**batch)


def _exported(branched: EarlyExitModel, folder: Path) -> Path:
    path = folder / "exits.onnx"
    return path if path.exists() else branched.export(path)  # several engines take the same file


def _original(branched: EarlyExitModel, folder: Path, load: Callable[..., Runner]) -> Call:
    from ee_surgery.export.writers import write_original  # needs onnx

    path = folder / "original.onnx"
    if not path.exists():
        write_original(branched.engine, path)
    run, names = load(str(path), threads=torch.get_num_threads()), branched.engine.backbone.own_batch().arguments

    def original(batch: Inputs) -> object:
        arrays = _arrays(branched, batch)
        return run([arrays[name] for name in names if name in arrays])

    return original


def _arrays(branched: EarlyExitModel, batch: Inputs) -> dict[str, np.ndarray]:
    named = {branched.engine.backbone.input_names[0]: batch} if isinstance(batch, Tensor) else batch
    return {name: tensor.cpu().numpy() for name, tensor in tensors(named).items()}
