"""Exit points: the positions of a program where a sample may leave, with their cost and the reason where it may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from ee_surgery.answers import OutputKey
from ee_surgery.backbone import Backbone, Sample
from ee_surgery.errors import CaptureError, ExitPointError
from ee_surgery.graph.capture import Capture, capture
from ee_surgery.graph.cost import count
from ee_surgery.graph.features import NOTHING, Features, Layout, choose
from ee_surgery.graph.last_call import refuse_probabilities
from ee_surgery.graph.liveness import Liveness, analyse, live_after
from ee_surgery.inputs import Arguments
from ee_surgery.registry import suggest
from ee_surgery.text import plain, visible


@dataclass(frozen=True)
class ExitPoint:
    """A position behind a module call, and what a branch would find there."""

    name: str
    """Path of the module that ends here; the shortest where several nested ones do."""
    aliases: tuple[str, ...]
    """The longer paths that end at the same position."""
    index: int
    """Position in the program: behind call number `index`."""
    node: str
    """The graph node a branch reads."""
    shape: tuple[int, ...]
    """Of the features of one sample, without the batch."""
    layout: Layout
    prefix_tokens: int
    """Tokens in front of the patches (class token, registers); 0 for other layouts."""
    live: int
    """How many tensors cross the position; all of them lose a sample that leaves."""
    macs: int
    """Of the original up to here, one sample."""
    macs_fraction: float
    legal: bool
    reason: str
    """Why no sample can leave here; empty where one can."""
    block: bool
    """Ends a block of the network, where the fewest tensors cross: what placement rules choose from."""


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A model read as a graph: its exit points and its cost. `print` it, or `rich.print` it for a table."""

    backbone: Backbone
    capture: Capture
    liveness: Liveness
    points: list[ExitPoint]
    """Legal exit points in program order."""
    illegal: list[ExitPoint]
    macs: int
    """Of one sample through the whole model."""
    uncounted: Counter[str]
    """Calls that may carry multiply-adds but have no formula, with how often they occur."""
    head: ExitPoint | None
    """Where a model without a head of its own ends: what the head that is put there reads."""
    live: list[list[fx.Node]]
    """Behind each call of the program, what was made up to there from the inputs and is read later."""
    call_macs: list[int]
    """MACs of each call, one sample."""
    _features: dict[int, Features]

    @property
    def blocks(self) -> list[ExitPoint]:
        """The legal points that end a block."""
        return [point for point in self.points if point.block]

    def __getitem__(self, name: str) -> ExitPoint:
        """The legal exit point of that name or alias.

        Raises:
            ExitPointError: there is none; says why, or which names are close.
        """
        for point in self.points:
            if name == point.name or name in point.aliases:
                return point
        for point in self.illegal:
            if name == point.name or name in point.aliases:
                raise ExitPointError(f"No sample can leave {self.backbone.model_id} at {name!r}: {point.reason}.")
        known = [n for point in self.points for n in (point.name, *point.aliases)]
        region = _AUTOCAST if _has_autocast(self.capture) else ""
        raise ExitPointError(f"No exit point {name!r} in {self.backbone.model_id}. {suggest(name, known)}{region}")

    def __iter__(self) -> Iterator[ExitPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def features(self, point: ExitPoint) -> Features:
        """What a branch at a legal point reads."""
        return self._features[point.index]

    def best_case(self) -> str:
        """The best that exits could do on this model: a bound from the graph alone, before any training."""
        early = [point for point in self.blocks if 0 < point.macs_fraction < 1]
        if not early:
            return "No block ends before the whole cost is spent: early exit cannot save anything here."
        third = min(early, key=lambda point: abs(point.macs_fraction - 1 / 3))
        saved = 0.5 * (1 - third.macs_fraction)
        return (
            f"Blocks end between {early[0].macs_fraction:.1%} and {early[-1].macs_fraction:.1%} of the MACs. "
            f"If half of the samples left at {visible(third.name)} ({third.macs_fraction:.1%}), "
            f"{saved:.0%} of the MACs would be saved, less the branches' own."
        )

    def __str__(self) -> str:
        lines = [
            f"{visible(self.backbone.model_id)}: {self.macs / 1e6:.2f} MMACs, {len(self.points)} legal exit points"
        ]
        lines += [
            f"  {visible(p.name):40} {p.layout:6} {'x'.join(map(str, p.shape)):16} live {p.live}  "
            f"{p.macs_fraction:6.1%}"
            for p in self.blocks
        ]
        return "\n".join([*lines, self.best_case()])

    def __rich_console__(self, console: object, options: object):
        # report.py is further down the data flow; only a terminal that prints the graph needs it
        from ee_surgery.report import graph_table

        yield graph_table(self)
        yield plain(self.best_case())


_AUTOCAST = (
    " Part of its forward runs in a torch.autocast region, which is read as one call: nothing leaves inside. Take the "
    "region out of the forward and put torch.autocast around the calls of the model, for the same answers."
)


def _has_autocast(program: Capture) -> bool:
    return any(getattr(node.target, "__name__", "") == "wrap_with_autocast" for node in program.nodes)


def inspect(
    model: nn.Module | Backbone,
    sample: Sample | None = None,
    *,
    opaque: Sequence[str] = (),
    num_classes: int | None = None,
    output: OutputKey | None = None,
) -> ModelGraph:
    """Read a model as a graph and find where samples may leave it. The model is not changed.

    Args:
        model: timm model, transformers classifier of images or texts, or any module from tensors to logits.
        sample: an example batch (B, ...), a dict of several input tensors, or a tuple of them by position; needed
            where the model does not say what it takes.
        opaque: names of modules to keep whole, see `Backbone`: the way out where torch.export cannot read one.
        num_classes: for a model that answers with features: how many classes a new head shall tell apart.
        output: which part of the answer the logits are, by index or name, where more than one could be; see `Backbone`.
    Raises:
        CaptureError: the model cannot be exported with a symbolic batch.
        DataError: no sample given and none can be derived.
    """
    backbone = model if isinstance(model, Backbone) else Backbone(model, sample, opaque, num_classes, output)
    return read(backbone, backbone.sample)


def read(backbone: Backbone, arguments: Arguments) -> ModelGraph:
    """The graph of a backbone for inputs of the shape, dtype and device of these, at least two samples."""
    program = capture(backbone, arguments)
    if not backbone.headless:
        refuse_probabilities(program, backbone.model_id)
    liveness = analyse(program)
    macs, uncounted = count(program, liveness.needed)
    live = live_after(program, liveness)
    points, features = _points(program, liveness, live, macs, backbone)
    legal = [point for point in points if point.legal]
    if not legal and _has_autocast(program):
        raise CaptureError(f"{backbone.model_id} has no exit points.{_AUTOCAST}")
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
        raise CaptureError(f"{backbone.model_id} answers with neither a map, tokens nor a vector for a head to read.")
    end = len(program.nodes) - 1
    return _point(["head"], end, features, live=1, macs=macs, total=macs), features


def _points(
    program: Capture, liveness: Liveness, live: list[list[fx.Node]], macs: list[int], backbone: Backbone
) -> tuple[list[ExitPoint], dict[int, Features]]:
    ends = _module_ends(program, liveness)
    narrow = _narrow([len(nodes) for nodes in live])
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
        block = narrow[index] and any(not _interior(path, backbone.model, names) for path in found)
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
        if node in liveness.carried and node in liveness.needed:
            last.update(dict.fromkeys(program.owners[node], i))
    ends: dict[int, list[str]] = {}
    final = program.position.get(program.output, len(program.nodes))
    for path, i in last.items():
        # The parts of a split belong together: the position is behind the last of them.
        while i + 1 < len(program.nodes) and getattr(program.nodes[i + 1].target, "__name__", "") == "getitem":
            i += 1
        if i < final:
            ends.setdefault(i, []).append(path)
    return ends


def _narrow(live: list[int]) -> list[bool]:
    """Positions where few tensors cross: the valleys of their number, and where it is no higher than at the last one.

    The second matters where a network of several streams folds them together at its end (HRNet).
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


def _interior(path: str, model: nn.Module, ends: set[str]) -> bool:
    """True when `path` lies inside an element of a container that has an end of its own."""
    parts = path.partition("@")[0].split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[: depth - 1]))
        if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and ".".join(parts[:depth]) in ends:
            element = parent.get_submodule(parts[depth - 1])
            if not isinstance(element, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and not _holds_blocks(element):
                return True
    return False


def _holds_blocks(module: nn.Module) -> bool:
    """A stage rather than a block: one of its children is a sequence of modules that have children themselves."""
    return any(
        isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and any(next(element.children(), None) is not None for element in child.children())
        for child in module.children()
    )
