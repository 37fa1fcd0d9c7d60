"""Names of what is registered, for messages that must not wait for torch; a test keeps them what they say."""

from __future__ import annotations

from typing import Literal, TypeAlias

AlarmAction: TypeAlias = Literal["warn", "tighten", "disable"]
EffortName: TypeAlias = Literal["quick", "standard", "best"]
Precision: TypeAlias = Literal["int8", "int8_reduced"]
TrainPrecision: TypeAlias = Literal["no", "bf16", "fp16", "auto"]
BRANCHES = (
    "ztw",
    "conv",
    "conv2",
    "conv3",
    "eenet",
    "msd",
    "branchy",
    "strided",
    "dense",
    "pool",
    "bnpool",
    "plain",
    "sdn",
    "mlp",
    "token",
    "residual",
    "shortcut",
)
CALIBRATORS = (
    "search",
    "stopping",
    "shared",
    "most_confident",
    "scaled",
    "learned",
    "patience",
    "entropy",
    "cascade",
    "classwise",
    "geometric",
    "eenet",
)
ENGINES = (
    "eager",
    "compile",
    "onnx",
    "openvino",
)
PLACEMENTS = (
    "linear",
    "fine",
    "pareto",
    "gold_ratio",
)
PRESETS = (
    "pteenet",
    "eenet",
    "cascade",
    "eenets",
    "sdn",
    "ztw",
    "branchynet",
    "msdnet",
)
