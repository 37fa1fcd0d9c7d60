"""The table of a saved adapter."""

from __future__ import annotations

from typing import Literal

from rich.table import Table

from ee_surgery.calibration.frontier import Frontier
from ee_surgery.share.adapter import AdapterConfig
from ee_surgery.tables import table
from ee_surgery.text import visible


def adapter_table(config: AdapterConfig, frontier: Frontier | None) -> Table:
    """Exits of a saved adapter: features, branch, costs, and the accuracy of each exit alone."""
    base, point, total = config.base, config.operating_point, config.base_macs
    stored = "none stored: no sample leaves early" if point is None else f"{visible(point.rule)}, score {point.score}"
    columns: dict[str, Literal["left", "right"]] = {
        "exit": "left", "features": "right", "branch": "left", "MACs up to it": "right", "MACs of the branch": "right"
    }  # fmt: skip
    rows = [
        [
            e.name,
            "x".join(map(str, e.shape)),
            e.branch.name,
            f"{e.trunk_macs / config.base_macs:.1%}",
            f"{e.branch_macs:,}",
        ]
        for e in config.exits
    ]
    rows.append(["original", "", "", "100.0%", ""])
    if frontier is not None:
        columns[f"{frontier.measure} alone" if frontier.labelled else "agreement alone"] = "right"
        for row, accuracy in zip(rows, frontier.exit_accuracies, strict=True):
            row.append(f"{accuracy:.2%}")
    name = f"{visible(base.hub_id or base.model_id)} ({visible(base.library)})"
    return table(
        f"Early exits for {name}, {total / 1e6:,.1f} MMACs",
        f"operating point: {visible(stored)}; fingerprint of the base {visible(base.fingerprint)}",
        columns,
        rows,
    )
