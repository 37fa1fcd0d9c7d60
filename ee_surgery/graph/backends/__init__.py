"""Backends: what makes a `Segment` run. In the graph's room, because shortcut branches run segments too."""

from ee_surgery.graph.backends import graph_module, python  # noqa: F401  (they register themselves)
from ee_surgery.graph.backends.base import BACKENDS, Backend, BoundWeights, Run

__all__ = ["BACKENDS", "Backend", "BoundWeights", "Run"]
