"""Tables for the terminal, without rich markup from untrusted names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.table import Table

from ee_surgery.text import plain, visible


def table(
    title: str, caption: str, columns: dict[str, Literal["left", "right"]], rows: Iterable[Sequence[str]]
) -> Table:
    """Text cells under titled columns, justified according to `columns`."""
    table = Table(title=plain(title, "table.title"), caption=plain(caption, "table.caption") if caption else None)
    for name, justify in columns.items():
        table.add_column(plain(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(plain(visible(text, 1000)) for text in row))
    return table
