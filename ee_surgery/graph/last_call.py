"""Refuse models that return probabilities, judged by the last call of the program, not by values on a sample."""

from __future__ import annotations

from torch import fx

from ee_surgery.backbone.answers import LATER, PROBABILITIES
from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture import Capture

_SIGMOID = frozenset({"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "log_sigmoid", "log_sigmoid_forward"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
# Calls that do not change which logit is largest.
_THROUGH = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "slice", "select", "alias", "clone",
        "contiguous", "detach", "to", "_to_copy", "clamp", "getitem",
    }
)  # fmt: skip


def refuse_probabilities(program: Capture, model_id: str) -> None:
    """Refuse a model that ends in a sigmoid or a softmax: exits need logits of a softmax over classes.

    Raises:
        CaptureError: it does; says what to do.
    """
    node = program.output
    while _name(node) in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if _name(node) in _SIGMOID:
        raise CaptureError(
            f"{model_id} ends in a sigmoid ({_name(node)}): independent classes, not a softmax over classes. {LATER} "
            "If exactly one class is right, wrap the model in a module that returns the input of the sigmoid."
        )
    if _name(node) in _SOFTMAX:
        raise CaptureError(f"{model_id} ends in a softmax and returns probabilities: {PROBABILITIES}")


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "").partition(".")[0] if node.op == "call_function" else ""
