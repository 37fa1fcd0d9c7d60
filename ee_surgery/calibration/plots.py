"""The plot of a frontier."""

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
    from matplotlib.figure import Figure


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SurgeryError("Plots need matplotlib: pip install 'ee-surgery[plot]'.") from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    low = min(p.expected_accuracy for p in points)
    axes.step(
        [p.macs_fraction for p in points],
        [p.expected_accuracy * 100 for p in points],
        where="post",
        color="tab:blue",
        label="early exit",
        zorder=3,
    )
    axes.plot(1, base_accuracy * 100, "k*", markersize=12, label="original", zorder=4)
    axes.axhline(base_accuracy * 100, color="k", linewidth=0.6, linestyle=":")
    axes.plot([m for _, m, _ in exits], [a * 100 for *_, a in exits], "o", color="tab:orange", label="each exit alone")
    for name, macs, accuracy in exits:
        label = axes.annotate(
            visible(name, 60), (macs, accuracy * 100), textcoords="offset points", xytext=(5, -10), fontsize=7
        )
        label.set(parse_math=False, usetex=False)  # names are not formulas
    axes.set_xlabel("mean MACs per sample / MACs of the original (branches included)")
    axes.set_ylabel(f"{what} (%)")
    axes.set_title(f"calibrated on {points[0].samples} held-out samples", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0, 100 * min([low, *(a for *_, a in exits)]) - 3))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    if path is not None:
        kind = Path(path).suffix.lower().removeprefix(".") or "png"
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise ConfigError(f"The suffix of {path} is not a supported image format. Use one of {sorted(known)}.")
        picture = io.BytesIO()  # matplotlib's own errors on a full disk are unclear
        figure.savefig(picture, dpi=150, format=kind)
        with atomic_write(path) as partial:
            partial.write_bytes(picture.getbuffer())
    return figure
