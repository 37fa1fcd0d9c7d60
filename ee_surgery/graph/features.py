"""The features of a branch: which of the live tensors it reads, and their layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, fx

from ee_surgery.backbone.base import Backbone
from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.liveness import Liveness
from ee_surgery.graph.nodes import VIEWS, op_name

Layout: TypeAlias = Literal["nchw", "nhwc", "tokens", "sequence", "vector"]


@dataclass(frozen=True)
class Features:
    """The tensor a branch reads."""

    node: str
    shape: tuple[int, ...]
    """Shape of one sample, without the batch."""
    layout: Layout
    """`tokens` are the patches of an image, `sequence` the tokens of a text: any length, possibly padded."""
    prefix_tokens: int
    """Tokens before the others (class token, registers); 0 for other layouts."""
    axis: Axis
    channels_first: bool
    """In a folded tensor: whether channels come before positions."""
    mask: fx.Node | None
    """The input that distinguishes tokens from padding."""

    def reader(self, crossing: Sequence[fx.Node]) -> ReadFeatures:
        """How to read them from the live tensors at a cut."""
        names = [node.name for node in crossing]
        mask = None if self.mask is None else names.index(self.mask.name)
        return ReadFeatures(names.index(self.node), self.axis, self.channels_first, mask)


NOTHING = Features("", (), "vector", 0, Axis(0), False, None)


@dataclass(frozen=True)
class ReadFeatures:
    """Reads a branch's arguments from the live tensors at its exit."""

    index: int
    axis: Axis
    channels_first: bool
    mask: int | None

    def __call__(self, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Features (B, *shape), and their mask (B, tokens) if there is one."""
        tensor = live[self.index]
        if self.axis.folded:  # (before * B * after, ...) -> (B, tokens, channels)
            parts, dim = self.axis.split(tensor)  # (before, B, after, ...)
            parts = parts.movedim(dim, 0)  # (B, before, after, ...)
            tensor = (parts.movedim(3, -1) if self.channels_first else parts).flatten(1, -2)
        elif self.axis.dim:
            tensor = tensor.movedim(self.axis.dim, 0)
        return (tensor,) if self.mask is None else (tensor, live[self.mask])


Read: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""The live tensors at an exit to what its branch takes."""


@dataclass(frozen=True)
class ReadAllLive:
    """Reads all live tensors at an exit, `count` of them, unchanged."""

    count: int

    def __call__(self, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs of a branch that is cut from the graph."""
        return tuple(live[: self.count])


def choose(
    program: Capture, liveness: Liveness, crossing: list[fx.Node], paths: list[str], backbone: Backbone
) -> Features | None:
    """Choose the live tensor that a branch reads: the last one made by the module that ends here.

    That is the deepest representation at that point: with several streams the coarsest map (HRNet), with a map and a
    class token the one that the block computed. A tensor whose batch is still folded with windows is used only if there
    is no other. Only floating-point tensors are features; masks and indices are not.

    Returns:
        None if no tensor is a map, tokens or a vector.
    """
    made = set(paths)
    found: list[tuple[bool, bool, Features]] = []
    for node in crossing:
        axis = liveness.axis[node]
        features = describe(node, axis, program, backbone) if isinstance(axis, Axis) else None
        if features is not None:
            inside = not made.isdisjoint(program.owners.get(node, ()))
            found.append((inside, not features.axis.folded, features))
    if not found:
        return None
    best = max(rank[:2] for rank in found)  # made inside the module first, then not folded; of equals the last
    return [features for *rank, features in found if tuple(rank) == best][-1]


def describe(node: fx.Node, axis: Axis, program: Capture, backbone: Backbone) -> Features | None:
    """A live tensor as features; None for what is no map, tokens or a vector of numbers."""
    value = node.meta["val"]
    if not value.is_floating_point():
        return None
    sizes = [int(size) for i, size in enumerate(value.shape) if i != axis.dim]
    first = len(sizes) == 3 and _channel_axis(node) == 1
    if axis.folded:
        if axis.dim != 0 or not sizes:
            return None
        channels = sizes.pop(0 if first else -1)
        tokens = axis.before * axis.after * math.prod(sizes)
        return Features(node.name, (tokens, channels), "tokens", 0, axis, first, None)
    shape = tuple(sizes)
    if len(shape) == 1:
        return Features(node.name, shape, "vector", 0, axis, False, None)
    if len(shape) == 2:
        layout: Layout = "sequence" if backbone.reads_tokens else "tokens"
        prefix = min(1, shape[0] - 1) if layout == "sequence" else _prefix(shape[0], backbone.prefix_tokens)
        return Features(node.name, shape, layout, prefix, axis, False, _mask(program, shape[0]))
    if len(shape) == 3:
        return Features(node.name, shape, "nchw" if first else "nhwc", 0, axis, False, None)
    return None


def _mask(program: Capture, tokens: int) -> fx.Node | None:
    """The attention mask for this number of tokens."""
    for name, node in program.inputs.items():
        if name.endswith("attention_mask") and node.meta["val"].ndim == 2 and node.meta["val"].shape[1] == tokens:
            return node
    return None


def _prefix(tokens: int, prefix: int) -> int:
    """Prefix tokens present here: before the class token is added there are only patches, usually a square number."""
    if prefix >= tokens:
        return 0
    bare = math.isqrt(tokens) ** 2 == tokens and math.isqrt(tokens - prefix) ** 2 != tokens - prefix
    return 0 if bare else prefix


_FIRST = {"conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"}
_LAST = {"layer_norm", "linear", "rms_norm"}


def _channel_axis(node: fx.Node) -> int:
    """1 or -1: the channel dimension, from the nearest call with known channels, across calls that keep the shape."""
    shape = node.meta["val"].shape
    queue, seen = [node], {node}  # breadth-first over users and inputs
    while queue:
        here = queue.pop(0)
        for near in (*here.users, *here.all_input_nodes, here):
            value = near.meta.get("val")
            if near.op != "call_function" or not isinstance(value, Tensor):
                continue
            name = op_name(near)
            if name in _LAST and value.ndim > 2:
                return -1
            if name in _FIRST and value.ndim == len(shape):
                return 1
            # (B, H, W, C) viewed as (B, H * W, C) still has channels last
            viewed = VIEWS & {name, op_name(here)}
            if near not in seen and (value.shape == shape or (viewed and value.shape[-1] == shape[-1])):
                seen.add(near)
                queue.append(near)
    return 1
