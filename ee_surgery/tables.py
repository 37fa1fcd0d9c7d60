"""Tables for the terminal, notebooks, pandas and CSV, without markup from untrusted names."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, RenderableType
from rich.table import Table

from ee_surgery.errors import SurgeryError
from ee_surgery.files import atomic_write
from ee_surgery.text import plain, visible

if TYPE_CHECKING:
    from pandas import DataFrame


class Tabular:
    """What has rows of numbers, and a table of the most important ones to look at."""

    def rows(self) -> list[dict[str, Any]]:
        """Plain data, the same names in each row."""
        raise NotImplementedError

    def table(self) -> Table:
        """For the terminal."""
        raise NotImplementedError

    def to_pandas(self) -> DataFrame:
        """The rows as a data frame.

        Raises:
            SurgeryError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise SurgeryError("Data frames need pandas: pip install pandas.") from error
        return DataFrame(self.rows())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV with a header, atomically.

        Raises:
            WriteError: it cannot be written.
        """
        rows = self.rows()
        with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    def __rich_console__(self, console: object, options: object) -> Iterator[RenderableType]:
        yield self.table()

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html(self.table())


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


def as_text(table: Table, width: int = 160) -> str:
    """The same table as lines of text."""
    console = Console(width=width)
    with console.capture() as written:
        console.print(table)
    return written.get().rstrip()


def html(table: Table) -> str:
    """The same table as HTML; all text is escaped."""
    heads = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    cells = (
        [escape(str(cell)) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)
    )
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    title, caption = (escape(str(text or "")) for text in (table.title, table.caption))
    below = f"<p>{caption}</p>" if caption else ""
    return f"<table><caption>{title}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"
