"""Run an exported file without torch: load it, run it, move the knob, read its frontier. numpy and onnxruntime alone.

from ee_surgery.onnx import OnnxModel

model = OnnxModel("resnet.onnx")
model.operate(max_accuracy_drop=0.01)
answer = model.run(pixels)          # logits, exit_index, score, macs of each sample
"""

from ee_surgery.onnx.exported import FORMAT_VERSION, METADATA, ROUTER, OnnxError, OnnxOutput, OnnxPoint
from ee_surgery.onnx.one_file import OnnxModel, OpenVinoModel
from ee_surgery.onnx.sessions import Runner, on_onnxruntime, on_openvino
from ee_surgery.onnx.staged import StagedModel

__all__ = [
    "FORMAT_VERSION",
    "METADATA",
    "ROUTER",
    "OnnxError",
    "OnnxModel",
    "OnnxOutput",
    "OnnxPoint",
    "OpenVinoModel",
    "Runner",
    "StagedModel",
    "on_onnxruntime",
    "on_openvino",
]
