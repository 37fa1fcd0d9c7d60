"""What the last call of a program makes of the logits: probabilities are refused, whatever numbers a sample gives."""

from __future__ import annotations

from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import op_name
from ee_surgery.task import PROBABILITIES

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
    """Refuse a model that ends in a sigmoid or a softmax: exits work on the logits that go into it.

    Raises:
        CaptureError: it does, with the way out.
    """
    node = program.output
    while op_name(node) in _THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if op_name(node) in _SIGMOID:
        raise CaptureError(
            f"{model_id} ends in a sigmoid ({op_name(node)}), and answers with probabilities: wrap the model in a "
            "module that answers with what goes into the sigmoid. If several classes may be right, each on its own, say "
            "task='multi_label' as well."
        )
    if op_name(node) in _SOFTMAX:
        raise CaptureError(f"{model_id} ends in a softmax, and answers with probabilities: {PROBABILITIES}")
