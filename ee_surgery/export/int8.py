"""An export in 8-bit integers: onnxruntime's static quantizer on every piece, and thresholds chosen anew."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from ee_surgery.backbone.inputs import Batch, Inputs, tensors
from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.records import ExitRecords
from ee_surgery.calibration.search import search
from ee_surgery.data.batches import Data, batches, rereadable
from ee_surgery.data.labels import ClassMap, Labels
from ee_surgery.data.recording import Answers, Ask, ask_engine, home, recorded
from ee_surgery.errors import CaptureError, ConfigError
from ee_surgery.export.parts import Piece, pieces
from ee_surgery.onnx import OnnxModel, StagedModel
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.policies.policy import NEVER
from ee_surgery.policies.scores import FittedScore, ScoreOf
from ee_surgery.runtime.engine import Engine

_RANGES = 256
"""Samples that the ranges of activations come from; thresholds are chosen on all."""
_BATCH = 32
_OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"]
_HALF = 0.5


class Int8:
    """What makes one export 8-bit: a quantizer of its pieces, and operating points for the result.

    Args:
        point: in force: the quantized file gets thresholds that lose as much accuracy against its own original.
        data: held out, as for `calibrate`.
        reduced: weights in 7 bits, with which no processor overflows.
    Raises:
        ConfigError: a score or branches that look back: their answers cannot be recorded one exit at a time.
        DataError: as for `record`; or the data can be read only once.
    """

    def __init__(
        self, engine: Engine, point: OperatingPoint, data: Data, class_map: ClassMap | None, reduced: bool = False
    ) -> None:
        self.engine, self.point, self.policy = engine, point, point.policy_for(engine.backbone.task)
        if engine.branches.chained or ScoreOf(point.score, engine.backbone.task).stateful:
            raise ConfigError(
                "quantize='int8' needs exits that decide one by one: neither chained branches nor a score that looks "
                "back, such as 'patience'. Pick another operating point, or export in float."
            )
        self.data, self.class_map, self.reduced = rereadable(data), class_map, reduced
        self.float = recorded(engine, data, Labels(engine, class_map), ask_engine(engine), batch_size=_BATCH)
        self.inputs: list[Batch] = []
        for inputs, _ in batches(data, _BATCH, *home(engine)):
            self.inputs.append(engine.backbone.batch(inputs))
            if sum(batch.size for batch in self.inputs) >= _RANGES:
                break

    def quantize(self, model: ModelProto, piece: Piece) -> ModelProto:
        """The piece with 8-bit operators, weights per channel.

        Raises:
            CaptureError: onnxruntime cannot quantize it.
        """
        reader = _Reader([info.name for info in model.graph.input], self._given(piece.name))
        with tempfile.TemporaryDirectory() as folder:
            given, prepared, quantized = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "quantized"))
            onnx.save_model(model, given)
            try:
                quant_pre_process(given, prepared, skip_symbolic_shape=True)
                quantize_static(
                    prepared, quantized, reader, op_types_to_quantize=_OPERATORS, per_channel=True,
                    reduce_range=self.reduced, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    nodes_to_exclude=_beside_logits(onnx.load(prepared)) if piece.name.startswith("branch") else [],
                    extra_options={"MatMulConstBOnly": True},
                )  # fmt: skip
            except Exception as error:
                message = f"onnxruntime cannot quantize {piece.name}: {type(error).__name__}: {error}"
                raise CaptureError(message) from error
            return onnx.load(quantized)

    def _given(self, name: str) -> Iterator[list[np.ndarray]]:
        """What a piece is given as the samples run through the model."""
        for batch in self.inputs:
            piece = next(one for one in pieces(self.engine, self.policy, batch) if one.name == name)
            # NaN stands for no answer yet; ranges of it are wanted by none, and the quantizer does not take it
            yield [np.nan_to_num(tensor.cpu().numpy()) for tensor in piece.inputs]

    def calibrated(self, file: OnnxModel | StagedModel) -> tuple[Frontier, OperatingPoint, float]:
        """The quantized file's own frontier, its operating point, and how often its original agrees with the float one.

        Raises:
            CaptureError: they agree on less than half of the samples.
        """
        records = file_records(self.engine, file, self.data, self.point.score, self.class_map)
        task, ours, theirs = self.engine.backbone.task, records.recorded_logits()[-1], self.float.recorded_logits()[-1]
        agreement = task.outcome(ours, task.labels_from(theirs)).mean().item()
        if agreement < _HALF:
            raise CaptureError(
                f"The 8-bit original agrees with the float one on only {agreement:.1%} of the samples: this "
                "model needs float. Nothing was written."
            )
        frontier = Frontier.of(records, search(records, self.point.score, fallbacks=(self.point.fallback,)))
        if all(tau == NEVER for tau in self.point.thresholds):
            return frontier, self.point, agreement
        lost = self.float.base_accuracy - self.float.replay(self.policy).outcome.mean().item()
        return frontier, frontier.at(max_accuracy_drop=max(lost, 0.0)), agreement


def file_records(
    engine: Engine,
    file: OnnxModel | StagedModel,
    data: Data,
    score: str | FittedScore,
    class_map: ClassMap | None = None,
) -> ExitRecords:
    """The answers of a file's exits as records, with the file's own values of its score."""
    known = Labels(engine, class_map)
    known.compares = False  # that is a question of the original in float
    records = recorded(engine, data, known, _ask(engine, file), batch_size=_BATCH)
    scores = records.confidence
    assert scores is not None
    records = replace(records, confidence=scores.logit(1e-7) if score == "learned" else None)
    records.keep_scores(score, scores)
    return records


def _ask(engine: Engine, file: OnnxModel | StagedModel) -> Ask:
    """The answers and scores of a file's exits: one run for each, with that exit alone open."""
    count = len(file.exits) - 1

    def ask(inputs: Inputs) -> Answers:
        named = tensors(engine.backbone.batch(inputs).arguments)
        given = {name: tensor.cpu().numpy() for name, tensor in named.items()}
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        for k in range(count + 1):
            output = file.run(given, [-NEVER if j == k else NEVER for j in range(count)])
            answer = torch.from_numpy(output.logits).float()
            logits.append(answer.masked_fill(torch.from_numpy(output.exit_index != k)[:, None], torch.nan))
            scores.append(torch.from_numpy(output.score))
        return Answers(logits, torch.stack(scores[:-1], 1))

    return ask


def _beside_logits(branch: ModelProto) -> list[str]:
    """Names of the nodes that work out the score, which stays in float: those that the logits do not come from."""
    wanted, beside = {branch.graph.output[0].name}, []
    for node in reversed(branch.graph.node):  # sorted, as ONNX demands
        if wanted.isdisjoint(node.output):
            beside.append(node.name)
        else:
            wanted.update(node.input)
    return beside


class _Reader(CalibrationDataReader):
    """Batches by the names of a piece's inputs, for onnxruntime."""

    def __init__(self, names: list[str], given: Iterator[list[np.ndarray]]) -> None:
        self.names, self.given = names, given

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next batch, until there is none."""
        arrays = next(self.given, None)
        return None if arrays is None else dict(zip(self.names, arrays, strict=True))
