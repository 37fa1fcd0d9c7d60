"""Exit points: positions of a program where samples may leave, with cost, or the reason why they cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import fx

from ee_surgery.backbone.base import Backbone
from ee_surgery.errors import ExitPointError
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.features import Features, Layout
from ee_surgery.graph.liveness import Liveness
from ee_surgery.graph.nodes import op_name
from ee_surgery.registry import suggest
from ee_surgery.tables import Tabular, table
from ee_surgery.text import plain, visible


@dataclass(frozen=True)
class ExitPoint:
    """A position after a module call, and the features of a branch there."""

    name: str
    """Path of the module that ends here; the shortest of several nested ones."""
    aliases: tuple[str, ...]
    """The longer paths that end at the same position."""
    index: int
    """Position in the program: after call number `index`."""
    node: str
    """The graph node a branch reads."""
    shape: tuple[int, ...]
    """Shape of the features of one sample, without the batch."""
    layout: Layout
    prefix_tokens: int
    """Tokens before the patches (class token, registers); 0 for other layouts."""
    live: int
    """Number of live tensors at the position; a sample that leaves is removed from all of them."""
    macs: int
    """MACs of the original up to here, for one sample."""
    macs_fraction: float
    legal: bool
    reason: str
    """Why samples cannot leave here; empty if they can."""
    block: bool
    """Whether it ends a block, where few tensors are live; placement rules choose among these."""


@dataclass(frozen=True, eq=False)
class ModelGraph(Tabular):
    """A captured model: its exit points and its cost. `print` it, or `rich.print` it for a table."""

    backbone: Backbone
    capture: Capture
    liveness: Liveness
    points: list[ExitPoint]
    """Legal exit points in program order."""
    illegal: list[ExitPoint]
    macs: int
    """MACs of the whole model for one sample."""
    uncounted: Counter[str]
    """Calls that may do multiply-adds but have no cost formula, with their number."""
    head: ExitPoint | None
    """The end of a model without a head: the features of the new head."""
    live: list[list[fx.Node]]
    """Live tensors after each call of the program."""
    call_macs: list[int]
    """MACs of each call for one sample."""
    _features: dict[int, Features]
    shortcuts: dict[str, float] = field(default_factory=dict)
    """Per block, the cost of the shortest path from its end to the logits, as a fraction of the MACs."""

    @property
    def blocks(self) -> list[ExitPoint]:
        """The legal points that end a block."""
        return [point for point in self.points if point.block]

    def __getitem__(self, name: str) -> ExitPoint:
        """The legal exit point of that name or alias.

        Raises:
            ExitPointError: there is none; gives the reason, or close names.
        """
        for point in self.points:
            if name == point.name or name in point.aliases:
                return point
        for point in self.illegal:
            if name == point.name or name in point.aliases:
                raise ExitPointError(f"Samples cannot leave {self.backbone.model_id} at {name!r}: {point.reason}.")
        known = [n for point in self.points for n in (point.name, *point.aliases)]
        region = AUTOCAST if has_autocast(self.capture) else ""
        raise ExitPointError(f"No exit point {name!r} in {self.backbone.model_id}. {suggest(name, known)}{region}")

    def __iter__(self) -> Iterator[ExitPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def features(self, point: ExitPoint) -> Features:
        """The features of a branch at a legal point."""
        return self._features[point.index]

    def best_case(self) -> str:
        """The best possible saving on this model: a bound from the graph alone, before any training."""
        early = [point for point in self.blocks if 0 < point.macs_fraction < 1]
        if not early:
            return "No block ends before the full cost: early exit cannot save anything here."
        third = min(early, key=lambda point: abs(point.macs_fraction - 1 / 3))
        saved = 0.5 * (1 - third.macs_fraction)
        return (
            f"Blocks end between {early[0].macs_fraction:.1%} and {early[-1].macs_fraction:.1%} of the MACs. "
            f"If half of the samples left at {visible(third.name)} ({third.macs_fraction:.1%}), "
            f"{saved:.0%} of the MACs would be saved, minus those of the branches."
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

    def rows(self) -> list[dict[str, Any]]:
        """Every position in program order, legal or not: what a branch would read there, and what it costs."""
        return [
            {
                "exit": p.name,
                "block": p.block,
                "legal": p.legal,
                "reason": p.reason,
                "layout": p.layout,
                "shape": "x".join(map(str, p.shape)),
                "live": p.live,
                "macs": p.macs,
                "macs_fraction": p.macs_fraction,
                "shortcut_from": self.shortcuts.get(p.name),
            }
            for p in sorted([*self.points, *self.illegal], key=lambda p: p.index)
        ]

    def table(self, everything: bool = False) -> Table:
        """Exit points that end a block, or every position with the reasons for illegal ones."""
        rows = sorted([*self.points, *self.illegal], key=lambda p: p.index) if everything else self.blocks
        hidden = f"{len(self.points) - len(self.blocks)} more inside blocks, {len(self.illegal)} illegal positions"
        uncounted = ", ".join(f"{visible(name)} x{n}" for name, n in self.uncounted.most_common())
        caption = [*([] if everything else [hidden]), *([f"not counted: {uncounted}"] if uncounted else [])]
        cells = [
            [p.name, "x".join(map(str, p.shape)), p.layout if p.legal else "", str(p.live), f"{p.macs_fraction:.1%}",
             f"{self.shortcuts[p.name]:.1%}" if p.name in self.shortcuts else "", p.reason]
            for p in rows
        ]  # fmt: skip
        return table(
            f"{visible(self.backbone.model_id)}: {self.macs / 1e6:,.1f} MMACs, {len(self.points)} legal exit points",
            "; ".join(caption),
            {"exit point": "left", "features": "right", "layout": "left", "live": "right", "MACs": "right",
             "shortcut from": "right", "": "left"},
            cells,
        )  # fmt: skip

    def __rich_console__(self, console: object, options: object) -> Iterator[RenderableType]:
        yield self.table()
        yield plain(self.best_case())


AUTOCAST = (
    " Part of its forward runs in a torch.autocast region, which is captured as one call: samples cannot leave inside. "
    "Remove the region from the forward and put torch.autocast around the calls of the model, for the same results."
)


def has_autocast(program: Capture) -> bool:
    """Whether part of the forward runs in a torch.autocast region."""
    return any(op_name(node) == "wrap_with_autocast" for node in program.nodes)
