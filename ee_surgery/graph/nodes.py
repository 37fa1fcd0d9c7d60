"""What a call of a captured program is, by the name of its operator."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
"""Calls that give the same numbers in the same order another shape."""


def op_name(node: fx.Node) -> str:
    """Name of the operator that a node calls, without namespace and overload: `view`, `add_`, `getitem`.

    Empty for nodes that call nothing: inputs, weights and the output.
    """
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target)).partition(".")[0]
