"""Several frontiers in one figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.calibration.plots import blank_figure, draw_steps, label_axes, write_figure
from ee_surgery.checks import instance
from ee_surgery.errors import ConfigError
from ee_surgery.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(frontiers: Mapping[str, Frontier] | Sequence[Frontier], path: str | os.PathLike[str] | None = None) -> Figure:
    """Several frontiers in one figure: expected accuracy against mean MACs, with the original of each as a star.

    MACs are fractions of each frontier's own original.

    Args:
        frontiers: by name, or in order.
        path: as for `Frontier.plot`.
    Raises:
        ConfigError: no frontier, or some measure other things than others (accuracy, agreement).
        SurgeryError: matplotlib is not installed.
        WriteError: the file cannot be written.
    """
    if not isinstance(frontiers, Mapping):
        frontiers = {f"frontier {number}": frontier for number, frontier in enumerate(frontiers, start=1)}
    for name, frontier in frontiers.items():
        instance(f"frontiers[{name!r}]", frontier, Frontier)
    measures = sorted({frontier.what for frontier in frontiers.values()})
    if len(measures) != 1:
        seen = f"these measure {' and '.join(measures)}" if measures else "there is none"
        raise ConfigError(f"Frontiers are plotted together if they measure the same: {seen}.")
    figure = blank_figure()
    axes = figure.subplots()
    for name, frontier in frontiers.items():
        (line,) = draw_steps(axes, frontier.points, visible(name, 60))
        axes.plot(1, frontier.base_accuracy * 100, "*", color=line.get_color(), markersize=12)
    label_axes(axes, measures[0])
    for text in axes.legend(loc="lower right").get_texts():
        text.set(parse_math=False)  # names are not formulas
    write_figure(figure, path)
    return figure
