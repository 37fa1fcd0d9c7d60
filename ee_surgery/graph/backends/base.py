"""What a backend is, and how the weights of a segment are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import TypeAlias

from torch import Tensor, nn

from ee_surgery.graph.segments import Segment
from ee_surgery.registry import Registry


class BoundWeights:
    """The parameters and buffers of a segment, looked up by name at each call.

    `Module.to` replaces buffers, `load_state_dict(assign=True)` replaces parameters too: the modules' own tables are
    kept here, never tensors.

    Args:
        names: in the model, in the segment's order.
        find: the module that has the tensor of a name; `lambda name: model` for an original.
    """

    def __init__(self, names: Iterable[str], find: Callable[[str], nn.Module]) -> None:
        self.tables: list[dict[str, Tensor | None]] = []
        self.keys: list[str] = []
        for name in names:
            path, _, key = name.rpartition(".")
            module = find(name).get_submodule(path)
            self.tables.append(module._parameters if key in module._parameters else module._buffers)  # pyright: ignore[reportArgumentType]
            self.keys.append(key)

    def __call__(self) -> list[Tensor | None]:
        """The tensors there now, in the order of the names."""
        return [*map(getitem, self.tables, self.keys)]


Run: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""Live tensors in, live tensors out (the logits at the end), each with the batch in its own dimension."""
Backend: TypeAlias = Callable[[Segment, BoundWeights], Run]
"""Makes a segment run. It keeps no tensor of `weights` from one call to the next without looking whether it is still
the one in force; whatever it gives for one batch size, it gives for every other."""
BACKENDS: Registry[Backend] = Registry("backend", "ee_surgery.backends")


def bind(backend: str, segment: Segment, find: Callable[[str], nn.Module]) -> Run:
    """Make a segment run by a registered backend, over the tensors of the modules that `find` names.

    Raises:
        UnknownNameError: no such backend.
    """
    return BACKENDS[backend](segment, BoundWeights(segment.weights.values(), find))
