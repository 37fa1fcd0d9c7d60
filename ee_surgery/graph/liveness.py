"""Which tensors are live at each position of a program, and whether samples can leave there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr
from torch import Tensor, fx

from ee_surgery.graph.batch_axes import Axis, find_axes
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import op_name


@dataclass(frozen=True, eq=False)
class Liveness:
    """Data dependence and storage of a captured program.

    Storage matters, not only names: a view shares its base, and an in-place call writes to every node that
    shares the storage. Nodes are therefore grouped by the node that first made their storage (`root`).
    """

    data_dependent: set[fx.Node]
    """Nodes whose value depends on the input's data: these are passed across a cut. Values that depend only on the
    batch size or on parameters are recomputed after it."""
    root: dict[fx.Node, fx.Node]
    """Node -> the node that first made its storage."""
    needed: set[fx.Node]
    """Nodes that the logits depend on, including in-place writes."""
    last_use: dict[fx.Node, int]
    """Index of the last needed call that reads a node; the logits are read after the end."""
    axis: dict[fx.Node, Axis | str | None]
    """Batch axis of each `data_dependent` node: see `find_axes`."""


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call changes in place."""
    return [arg for arg, info in _aliased(node) if info.is_write]


def _aliased(node: fx.Node) -> Iterator[tuple[fx.Node, torch._C._AliasInfo]]:  # pyright: ignore[reportAttributeAccessIssue]
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    for i, argument in enumerate(target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        # alias_info marks arguments that the output may share storage with, or that are written to
        if argument.alias_info is not None:
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, fx.Node):
                    yield item, argument.alias_info


def analyse(capture: Capture) -> Liveness:
    """Group nodes by storage, and find what depends on the input and what the logits need."""
    root: dict[fx.Node, fx.Node] = {}
    for node in capture.nodes:
        shared = [arg for arg, _ in _aliased(node)]
        # trap: the parts of a split are views too, but getitem has no schema that says so
        if not shared and op_name(node) == "getitem":
            shared = [arg for arg in node.all_input_nodes[:1] if arg in root and _is_multiple(arg)]
        root[node] = root.get(shared[0], shared[0]) if shared else node
    data_dependent = _carried(capture, root)
    needed = backward_slice(capture, root, [capture.output])
    last_use: dict[fx.Node, int] = {capture.output: len(capture.nodes)}
    for i, node in enumerate(capture.nodes):
        if node in needed:
            for arg in node.all_input_nodes:
                last_use[arg] = max(last_use.get(arg, -1), i)
    return Liveness(data_dependent, root, needed, last_use, find_axes(capture, data_dependent))


def is_size(node: fx.Node, batch: Expr) -> bool:
    """True for an integer that is determined by the batch size alone."""
    value = node.meta.get("val")
    return isinstance(value, int) or (isinstance(value, torch.SymInt) and _symbols(value) <= {batch})


def _depends_on_data(node: fx.Node, batch: Expr) -> bool:
    """False for numbers determined by the batch size alone; x.max().item() depends on data."""
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return not _symbols(value) <= {batch}
    return isinstance(value, (Tensor, list, tuple))


def _symbols(value: Any) -> set[Any]:
    return set(value.node.expr.free_symbols)


def _is_multiple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def _carried(capture: Capture, root: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    data_dependent = set(capture.inputs.values())
    tainted: set[fx.Node] = set()  # storages that some call wrote input data into
    while True:  # until a fixed point: a late in-place write makes earlier views of that storage data-dependent too
        before = len(data_dependent)
        for node in capture.nodes:
            if not _depends_on_data(node, capture.batch):
                continue
            if root[node] in tainted or any(arg in data_dependent for arg in node.all_input_nodes):
                data_dependent.add(node)
                tainted.update(root.get(arg, arg) for arg in writes(node))
        if len(data_dependent) == before:
            return data_dependent


def backward_slice(
    capture: Capture,
    root: dict[fx.Node, fx.Node],
    outputs: Iterable[fx.Node],
    done: Set[fx.Node] = frozenset(),
    stop: int | None = None,
) -> set[fx.Node]:
    """The calls before index `stop` that `outputs` need, given that those in `done` are already computed.

    A call that only writes in place is needed if the storage it writes to is.
    """
    wanted = set(outputs)
    storages = {root.get(node, node) for node in wanted}
    kept: set[fx.Node] = set()
    for node in reversed(capture.nodes[:stop]):  # consumers first, so one pass is enough
        if node in done:
            continue
        if node in wanted or any(root.get(arg, arg) in storages for arg in writes(node)):
            kept.add(node)
            wanted.update(node.all_input_nodes)
            storages.update(root.get(arg, arg) for arg in node.all_input_nodes)
    return kept


def live_out(capture: Capture, liveness: Liveness) -> list[list[fx.Node]]:
    """For each position i (after call i): the input-dependent values made up to i and read after it."""
    live: list[fx.Node] = [node for node in capture.inputs.values() if node in liveness.last_use]
    result = []
    for i, node in enumerate(capture.nodes):
        made = [node] if node in liveness.data_dependent and node in liveness.needed else []
        live = [held for held in (*live, *made) if liveness.last_use.get(held, -1) > i]
        result.append(live)
    return result
