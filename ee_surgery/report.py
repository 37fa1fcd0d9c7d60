"""Tables for the terminal and the plot of the frontier."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from ee_surgery.errors import ConfigError, SurgeryError
from ee_surgery.files import atomic_write
from ee_surgery.graph.points import ModelGraph
from ee_surgery.graph.shortcut import shortest
from ee_surgery.policies.frontier import Frontier
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.text import plain, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def graph_table(graph: ModelGraph, everything: bool = False) -> Table:
    """Exit points of a model: those that end a block, or every position with the reasons of the illegal ones."""
    rows = sorted([*graph.points, *graph.illegal], key=lambda p: p.index) if everything else graph.blocks
    shortcuts = shortest(graph)
    cells = [
        [p.name, _shape(p.shape), p.layout if p.legal else "", str(p.live), f"{p.macs_fraction:.1%}",
         f"{shortcuts[p.name]:.1%}" if p.name in shortcuts else "", p.reason]
        for p in rows
    ]  # fmt: skip
    name = visible(graph.backbone.model_id)
    return _table(
        f"{name}: {graph.macs / 1e6:,.1f} MMACs, {len(graph.points)} legal exit points",
        _caption(graph, everything),
        {"exit point": "left", "features": "right", "layout": "left", "live": "right", "MACs": "right",
         "shortcut from": "right", "": "left"},
        cells,
    )  # fmt: skip


def _table(
    title: str, caption: str, columns: dict[str, Literal["left", "right"]], rows: Iterable[Sequence[str]]
) -> Table:
    """A table of text in which rich finds no markup, whatever the names in it are."""
    table = Table(title=plain(title, "table.title"), caption=plain(caption, "table.caption") if caption else None)
    for name, justify in columns.items():
        table.add_column(plain(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(plain(visible(text, 1000)) for text in row))
    return table


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _caption(graph: ModelGraph, everything: bool) -> str:
    lines = [] if everything else [f"{len(graph.points) - len(graph.blocks)} more inside blocks, "
                                   f"{len(graph.illegal)} illegal positions"]  # fmt: skip
    if graph.uncounted:
        lines.append("not counted: " + ", ".join(f"{visible(name)} x{n}" for name, n in graph.uncounted.most_common()))
    return "; ".join(lines)


def frontier_table(frontier: Frontier) -> Table:
    """The operating points at some round accuracy drops."""
    what = "accuracy" if frontier.labelled else "agreement"
    rows = [
        [
            f"{p.accuracy:.2%}",
            f"{p.expected_accuracy:.2%}",
            f"{100 * (frontier.base_accuracy - p.expected_accuracy):.2f}",
            f"{p.macs_fraction:.1%}",
            str(p.score),
            " ".join(f"{share:4.0%}" for share in p.exit_shares),
        ]
        for p in frontier.milestones()
    ]
    exits = ", ".join(map(visible, frontier.exits))
    names = (what, "expected", "drop, points", "MACs", "score", "share leaving at each exit")
    return _table(
        f"Frontier on {frontier.points[0].samples} held-out samples; original: {what} {frontier.base_accuracy:.2%}",
        f"expected: less the luck in choosing thresholds; exits: {exits}",
        dict.fromkeys(names, "right"),
        rows,
    )


def adapter_table(config: AdapterConfig, frontier: Frontier | None) -> Table:
    """Exits of a saved adapter: what each reads, its branch, its costs, and how often it is right alone."""
    base, point = config.base, config.operating_point
    stored = "none stored: nothing leaves early" if point is None else f"{visible(point.rule)}, score {point.score}"
    columns: dict[str, Literal["left", "right"]] = {
        "exit": "left", "features": "right", "branch": "left", "MACs up to it": "right", "MACs of the branch": "right"
    }  # fmt: skip
    rows = [
        [e.name, _shape(e.shape), e.branch.name, f"{e.trunk_macs / config.base_macs:.1%}", f"{e.branch_macs:,}"]
        for e in config.exits
    ]
    rows.append(["original", "", "", "100.0%", ""])
    if frontier is not None:
        columns["accuracy alone" if frontier.labelled else "agreement alone"] = "right"
        for row, accuracy in zip(rows, frontier.exit_accuracies, strict=True):
            row.append(f"{accuracy:.2%}")
    name = f"{visible(base.hub_id or base.model_id)} ({visible(base.library)})"
    return _table(
        f"Early exits for {name}, {config.base_macs / 1e6:,.1f} MMACs",
        f"operating point: {visible(stored)}; fingerprint of the base {visible(base.fingerprint)}",
        columns,
        rows,
    )


def plot_frontier(frontier: Frontier, path: str | os.PathLike[str] | None = None) -> Figure:
    """Accuracy against mean MACs: the frontier, the original, and each exit alone.

    Args:
        path: write the picture there (by its suffix; a PNG where it has none), whole or not at all.
    Raises:
        SurgeryError: matplotlib is not installed.
        ConfigError: pictures of that kind cannot be written.
        WriteError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError("Plots need matplotlib: pip install 'ee-surgery[plot]'.") from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    what = "accuracy" if frontier.labelled else "agreement with the original"
    low = min(p.expected_accuracy for p in frontier.points)
    axes.step(
        [p.macs_fraction for p in frontier.points],
        [p.expected_accuracy * 100 for p in frontier.points],
        where="post",
        color="tab:blue",
        label="early exit",
        zorder=3,
    )
    axes.plot(1, frontier.base_accuracy * 100, "k*", markersize=12, label="original", zorder=4)
    axes.axhline(frontier.base_accuracy * 100, color="k", linewidth=0.6, linestyle=":")
    exits = list(zip(frontier.exits, frontier.exit_macs, frontier.exit_accuracies, strict=True))[:-1]
    axes.plot([m for _, m, _ in exits], [a * 100 for *_, a in exits], "o", color="tab:orange", label="one exit for all")
    for name, macs, accuracy in exits:
        label = axes.annotate(
            visible(name, 60), (macs, accuracy * 100), textcoords="offset points", xytext=(5, -10), fontsize=7
        )
        label.set(parse_math=False, usetex=False)  # a name is no formula
    axes.set_xlabel("mean MACs of a sample / MACs of the original (branches included)")
    axes.set_ylabel(f"{what} (%)")
    axes.set_title(f"calibrated on {frontier.points[0].samples} held-out samples", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0, 100 * min([low, *(a for *_, a in exits)]) - 3))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    if path is not None:
        kind = Path(path).suffix.lower().removeprefix(".") or "png"
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise ConfigError(f"{path} names no kind of picture that can be written: end it in one of {sorted(known)}.")
        picture = io.BytesIO()  # matplotlib itself fails in its own ways where a disk is full
        figure.savefig(picture, dpi=150, format=kind)
        with atomic_write(path) as partial:
            partial.write_bytes(picture.getbuffer())
    return figure
