"""Refuse models that return probabilities, judged by the last call of the program, not by values on a sample."""

from __future__ import annotations

from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import op_name
from ee_surgery.task import PROBABILITIES

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
    """Refuse a model that ends in a sigmoid or a softmax: exits need the logits before it.

    Raises:
        CaptureError: it does; says what to do.
    """
    node = program.output
    while op_name(node) in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if op_name(node) in _SIGMOID:
        raise CaptureError(
            f"{model_id} ends in a sigmoid ({op_name(node)}) and returns probabilities: wrap the model in a module "
            "that returns the input of the sigmoid. If several classes may be right, pass task='multi_label' as well."
        )
    if op_name(node) in _SOFTMAX:
        raise CaptureError(f"{model_id} ends in a softmax and returns probabilities: {PROBABILITIES}")
