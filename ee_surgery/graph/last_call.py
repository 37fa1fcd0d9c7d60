"""What the last call of a program makes of the logits: probabilities are refused, whatever numbers a sample gives."""

from __future__ import annotations

from ee_surgery.backbone.answers import LATER, PROBABILITIES
from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import op_name

_SIGMOID = frozenset({"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "log_sigmoid", "log_sigmoid_forward"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
# Change neither the numbers nor which of them is largest.
_THROUGH = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "slice", "select", "alias", "clone",
        "contiguous", "detach", "to", "_to_copy", "clamp", "getitem",
    }
)  # fmt: skip


def refuse_probabilities(program: Capture, model_id: str) -> None:
    """Refuse a model that ends in a sigmoid or a softmax: exits work on logits of a softmax over classes.

    Raises:
        CaptureError: it does, with the way out.
    """
    node = program.output
    while op_name(node) in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if op_name(node) in _SIGMOID:
        raise CaptureError(
            f"{model_id} ends in a sigmoid ({op_name(node)}): each class on its own, not a softmax over classes. "
            f"{LATER} If exactly one class is right, wrap the model in a module that answers with what goes into the "
            "sigmoid."
        )
    if op_name(node) in _SOFTMAX:
        raise CaptureError(f"{model_id} ends in a softmax, and answers with probabilities: {PROBABILITIES}")
