"""Inspect a model: capture it, and find the positions where a sample may leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx, nn

from ee_surgery.backbone.answers import OutputKey
from ee_surgery.backbone.base import Backbone, Sample
from ee_surgery.backbone.inputs import Batch
from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture import Capture, capture
from ee_surgery.graph.cost import count
from ee_surgery.graph.exit_points import AUTOCAST, ExitPoint, ModelGraph, has_autocast
from ee_surgery.graph.features import NOTHING, Features, choose
from ee_surgery.graph.last_call import refuse_probabilities
from ee_surgery.graph.liveness import Liveness, analyse, live_out
from ee_surgery.graph.nodes import op_name
from ee_surgery.graph.shortcut import shortest
from ee_surgery.task import CLASSIFICATION, Task


def inspect(
    model: nn.Module | Backbone,
    sample: Sample | None = None,
    *,
    opaque: Sequence[str] = (),
    num_classes: int | None = None,
    output: OutputKey | None = None,
    task: str | Task | type[Task] | None = None,
) -> ModelGraph:
    """Capture a model as a graph and find where samples may leave. The model is not changed.

    Args:
        model: timm model, transformers classifier of images or texts, or any module from tensors to logits.
        sample: an example batch (B, ...), a dict of several input tensors, or a tuple of them by position; needed
            if the model does not describe its inputs.
        opaque: names of modules to keep whole, for those that torch.export cannot read; see `Backbone`.
        num_classes: for a model that returns features: number of classes of a new head.
        output: which part of the output the logits are, by index or name, if more than one could be; see `Backbone`.
        task: what its answers are: `classification`, `multi_label` or one of your own in `TASKS`; see `Backbone`.
    Raises:
        CaptureError: the model cannot be exported with a symbolic batch.
        DataError: no sample is given and none can be derived.
    """
    backbone = model if isinstance(model, Backbone) else Backbone(model, sample, opaque, num_classes, output, task)
    graph = read(backbone)
    return replace(graph, shortcuts=shortest(graph))


def read(backbone: Backbone, batch: Batch | None = None) -> ModelGraph:
    """The graph of a backbone for inputs like those of a batch of at least two samples; by default, its own sample."""
    program = capture(backbone, batch or backbone.own_batch())
    if not backbone.headless:
        refuse_probabilities(program, backbone.model_id)
    liveness = analyse(program)
    macs, uncounted = count(program, liveness.needed)
    live = live_out(program, liveness)
    points, features = _points(program, liveness, live, macs, backbone)
    legal = [point for point in points if point.legal]
    if not legal and has_autocast(program):
        raise CaptureError(f"{backbone.model_id} has no exit points.{AUTOCAST}")
    illegal = [point for point in points if not point.legal]
    head = _head(program, liveness, backbone, sum(macs)) if backbone.headless else None
    if head is not None:
        features[head[0].index] = head[1]
    return ModelGraph(
        backbone=backbone,
        capture=program,
        liveness=liveness,
        points=legal,
        illegal=illegal,
        macs=sum(macs),
        uncounted=uncounted,
        head=head[0] if head else None,
        live=live,
        call_macs=macs,
        _features=features,
    )


def _head(program: Capture, liveness: Liveness, backbone: Backbone, macs: int) -> tuple[ExitPoint, Features]:
    features = choose(program, liveness, [program.output], [], backbone)
    if features is None:
        raise CaptureError(f"{backbone.model_id} returns neither a map, tokens nor a vector that a head could read.")
    end = len(program.nodes) - 1
    return _point(["head"], end, features, live=1, macs=macs, total=macs), features


def _points(
    program: Capture, liveness: Liveness, live: list[list[fx.Node]], macs: list[int], backbone: Backbone
) -> tuple[list[ExitPoint], dict[int, Features]]:
    ends = _module_ends(program, liveness)
    alive = [len(nodes) for nodes in live]
    narrow, maps, spans = _narrow(alive), backbone.task.rank != CLASSIFICATION.rank, _spans(program)
    total = sum(macs)
    spent = [0]
    for value in macs:
        spent.append(spent[-1] + value)
    names = {name for found in ends.values() for name in found}
    points: list[ExitPoint] = []
    read: dict[int, Features] = {}
    for index, found in sorted(ends.items()):
        crossing = live[index]
        problems = [axis for axis in (liveness.axis[node] for node in crossing) if isinstance(axis, str)]
        if not crossing:
            problems = ["nothing that depends on the input is used after it"]
        features = None if problems else choose(program, liveness, crossing, found, backbone)
        if features is None:
            problems = problems or ["none of the tensors that cross is a map, tokens or a vector of numbers"]
            features = NOTHING
        read[index] = features
        reason = problems[0] if problems else ""
        if not maps:
            block = narrow[index] and any(not _interior(path, backbone.model, names) for path in found)
        else:
            paths = (path for path in found if not _interior(path, backbone.model, names))
            block = any(_between_blocks(path, index, spans, alive) for path in paths)
        points.append(_point(found, index, features, len(crossing), spent[index + 1], total, reason, block))
    return points, read


def _point(
    paths: Sequence[str],
    index: int,
    features: Features,
    live: int,
    macs: int,
    total: int,
    reason: str = "",
    block: bool = False,
) -> ExitPoint:
    name, *aliases = sorted(paths, key=lambda path: (path.count("."), len(path)))
    return ExitPoint(
        name=name,
        aliases=tuple(aliases),
        index=index,
        node=features.node,
        shape=features.shape,
        layout=features.layout,
        prefix_tokens=features.prefix_tokens,
        live=live,
        macs=macs,
        macs_fraction=macs / total if total else 0.0,
        legal=not reason,
        reason=reason,
        block=block,
    )


def _module_ends(program: Capture, liveness: Liveness) -> dict[int, list[str]]:
    last: dict[str, int] = {}
    for i, node in enumerate(program.nodes):
        if node in liveness.data_dependent and node in liveness.needed:
            last.update(dict.fromkeys(program.owners[node], i))
    ends: dict[int, list[str]] = {}
    final = program.position.get(program.output, len(program.nodes))
    for path, i in last.items():
        # The parts of a split belong together: the position is after the last of them.
        while i + 1 < len(program.nodes) and op_name(program.nodes[i + 1]) == "getitem":
            i += 1
        if i < final:
            ends.setdefault(i, []).append(path)
    return ends


def _narrow(live: list[int]) -> list[bool]:
    """Positions with few live tensors: local minima of their number, and positions no higher than the last minimum.

    The latter matters for networks that merge several streams at the end (HRNet).
    """
    valley = [True] * len(live)
    for order in (range(len(live)), range(len(live) - 1, -1, -1)):
        before, low = 0, True  # nothing is live outside the program
        for i in order:
            if before and live[i] != before:
                low = live[i] < before
            before = live[i]
            valley[i] &= low
    result, last = [], 0
    for number, is_valley in zip(live, valley, strict=True):
        last = number if is_valley else last
        result.append(is_valley or number <= last)
    return result


def _spans(program: Capture) -> dict[str, tuple[int, int]]:
    """Of each module path, the first and the last of its calls."""
    spans: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(program.nodes):
        for path in program.owners[node]:
            spans[path] = spans.get(path, (i, i))[0], i
    return spans


_PART = 0.25  # of all calls: more is no block, but what holds blocks, and perhaps a decoder


def _between_blocks(path: str, index: int, spans: Mapping[str, tuple[int, int]], live: Sequence[int]) -> bool:
    """True if no more tensors are live there than at the beginning or at the end of each block around it.

    Where a decoder reads what earlier stages made, tensors stay live from there on, so that their number alone does not
    tell a block's end from its inside.
    """
    parts = path.partition("@")[0].split(".")
    for name in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        first, last = spans.get(name, (0, len(live)))
        if last - first < _PART * len(live) and live[index] > max(live[max(0, first - 1)], live[last]):
            return False
    return True


def _interior(path: str, model: nn.Module, ends: set[str]) -> bool:
    """True if `path` is inside an element of a container, and that element has its own end."""
    parts = path.partition("@")[0].split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[: depth - 1]))
        if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and ".".join(parts[:depth]) in ends:
            element = parent.get_submodule(parts[depth - 1])
            if not isinstance(element, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and not _holds_blocks(element):
                return True
    return False


def _holds_blocks(module: nn.Module) -> bool:
    """True for a stage rather than a block: one of its children is a sequence of modules with children."""
    return any(
        isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and any(next(element.children(), None) is not None for element in child.children())
        for child in module.children()
    )
