"""Plots of frontiers."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ee_surgery.errors import ConfigError, SurgeryError
from ee_surgery.files import atomic_write
from ee_surgery.policies.operating_point import OperatingPoint
from ee_surgery.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def plot_frontier(
    points: Sequence[OperatingPoint],
    exits: Sequence[tuple[str, float, float]],
    base_accuracy: float,
    what: str,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """Accuracy against mean MACs: the operating points, the original, and each exit alone; see `Frontier.plot`.

    Args:
        exits: name, MACs fraction and accuracy of each exit alone.
        what: label of the accuracy axis.
    """
    figure = blank_figure()
    axes = figure.subplots()
    low = min(p.expected_accuracy for p in points)
    draw_steps(axes, points, "early exit")
    axes.plot(1, base_accuracy * 100, "k*", markersize=12, label="original", zorder=4)
    axes.axhline(base_accuracy * 100, color="k", linewidth=0.6, linestyle=":")
    axes.plot([m for _, m, _ in exits], [a * 100 for *_, a in exits], "o", color="tab:orange", label="each exit alone")
    for name, macs, accuracy in exits:
        label = axes.annotate(
            visible(name, 60), (macs, accuracy * 100), textcoords="offset points", xytext=(5, -10), fontsize=7
        )
        label.set(parse_math=False, usetex=False)  # names are not formulas
    label_axes(axes, what)
    axes.set_title(f"calibrated on {points[0].samples} held-out samples", fontsize=9)
    axes.set_ylim(bottom=max(0, 100 * min([low, *(a for *_, a in exits)]) - 3))
    axes.legend(loc="lower right")
    write_figure(figure, path)
    return figure


def blank_figure() -> Figure:
    """Of the usual size.

    Raises:
        SurgeryError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError("Plots need matplotlib: pip install 'ee-surgery[plot]'.") from error
    return Figure(figsize=(6.4, 4.2), layout="constrained")


def draw_steps(axes: Axes, points: Sequence[OperatingPoint], label: str) -> list[Line2D]:
    """Expected accuracy against mean MACs of operating points, the cheapest first."""
    macs, accuracies = zip(*((p.macs_fraction, p.expected_accuracy * 100) for p in points), strict=True)
    return axes.step(macs, accuracies, where="post", label=label, zorder=3)


def label_axes(axes: Axes, what: str) -> None:
    """Of a plot of `what` against MACs."""
    axes.set_xlabel("mean MACs per sample / MACs of the original (branches included)")
    axes.set_ylabel(f"{what} (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def write_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write it, atomically; format by suffix, PNG without one.

    Raises:
        ConfigError: the image format is not supported.
        WriteError: the file cannot be written.
    """
    if path is not None:
        kind = Path(path).suffix.lower().removeprefix(".") or "png"
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise ConfigError(f"The suffix of {path} is not a supported image format. Use one of {sorted(known)}.")
        picture = io.BytesIO()  # matplotlib's own errors on a full disk are unclear
        figure.savefig(picture, dpi=150, format=kind)
        with atomic_write(path) as partial:
            partial.write_bytes(picture.getbuffer())
