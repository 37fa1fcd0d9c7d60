"""All feature maps that cross an exit: what a branch reads that answers with a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ee_surgery.graph.batch_axes import Axis
from ee_surgery.graph.exit_points import ExitPoint, ModelGraph
from ee_surgery.graph.features import Features, ReadFeatures, describe

_MOST = 6  # maps that are read: a decoder of many stages keeps more alive than a small branch can use


@dataclass(frozen=True)
class FeatureMap:
    """A live tensor with two spatial dimensions, or tokens that form a grid."""

    features: Features
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels = self.features.shape[0] if self.features.layout == "nchw" else self.features.shape[-1]
        return channels, *self.size


@dataclass(frozen=True)
class ReadMaps:
    """Reads maps (B, C, h, w) from the live tensors at an exit."""

    readers: tuple[ReadFeatures, ...]
    maps: tuple[FeatureMap, ...]

    def __call__(self, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs of a branch that answers with a map."""
        return tuple([_nchw(read(live)[0], each) for read, each in zip(self.readers, self.maps, strict=True)])


def feature_maps(graph: ModelGraph, point: ExitPoint) -> list[FeatureMap]:
    """The maps among the live tensors at an exit, in program order; of many, those computed last."""
    found = []
    for node in graph.live[point.index]:
        axis = graph.liveness.axis[node]
        if not isinstance(axis, Axis) or axis.folded:
            continue
        features = describe(node, axis, graph.capture, graph.backbone)
        size = None if features is None else _size(features, graph)
        if features is not None and size is not None and min(size) > 1:
            found.append(FeatureMap(features, size))
    return found[-_MOST:]


def read_maps(graph: ModelGraph, point: ExitPoint, crossing: Sequence[fx.Node]) -> ReadMaps:
    """How to read them from what crosses the cut."""
    maps = tuple(feature_maps(graph, point))
    names = [node.name for node in crossing]
    readers = (
        ReadFeatures(names.index(m.features.node), m.features.axis, m.features.channels_first, None) for m in maps
    )
    return ReadMaps(tuple(readers), maps)


def picture_size(graph: ModelGraph) -> tuple[int, int]:
    """Height and width of the pictures that the graph was read for."""
    shape = next(iter(graph.capture.inputs.values())).meta["val"].shape
    return int(shape[-2]), int(shape[-1])


def _size(features: Features, graph: ModelGraph) -> tuple[int, int] | None:
    """Height and width; of tokens, those in the proportions of the picture; None where there are none."""
    if features.layout == "nchw":
        return features.shape[1], features.shape[2]
    if features.layout == "nhwc":
        return features.shape[0], features.shape[1]
    if features.layout != "tokens":
        return None
    height, width = picture_size(graph)
    for prefix in dict.fromkeys((features.prefix_tokens, 0)):
        tokens = features.shape[0] - prefix
        rows = round((tokens * height / width) ** 0.5)
        if rows > 0 and tokens % rows == 0 and abs(rows * width - tokens // rows * height) < max(height, width):
            return rows, tokens // rows
    return None


def _nchw(tensor: Tensor, map: FeatureMap) -> Tensor:
    if map.features.layout == "nchw":
        return tensor
    if map.features.layout == "nhwc":
        return tensor.permute(0, 3, 1, 2)
    height, width = map.size
    return tensor[:, tensor.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
