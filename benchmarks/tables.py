"""Result lines in, Markdown tables out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def results(file: Path) -> list[dict[str, Any]]:
    """The last result of every model."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({row["model"]: row for row in rows}.values())
