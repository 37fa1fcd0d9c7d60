"""Safe display of untrusted text in terminals, rich, Markdown and plots.

Names, notes and settings of an adapter, and module names of a base, are untrusted. They are stored unchanged and
sanitized here for display:

    visible     one line for a terminal, a log, a YAML value or a plot
    paragraph   a message of several lines that contains such names
    plain       the same for rich, without markup
    markdown    Markdown that renders as text: simple words as they are, anything else as a code span
    cell        the same for a table cell
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LINE, MESSAGE = 200, 4000
"""Most characters displayed: of a name or value, and of a message."""
# Printable by category but invisible: fillers, joiners and selectors.
_BLANK = frozenset(
    chr(code)
    for first, last in ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800),
                        (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
)  # fmt: skip
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Letters and digits joined by single spaces and punctuation without meaning in Markdown, and the same in parentheses
# at the end. No dot before a letter: it could be a link.
_SOME = r"[A-Za-z0-9]+(?:(?:[,:;]? |[_,%=+-])[A-Za-z0-9]+|\.[0-9]+)*%?"
_WORDS = re.compile(rf"{_SOME}(?: \({_SOME}\))?")


def visible(value: object, limit: int = LINE) -> str:
    """One line of bounded length without hidden characters or terminal control.

    Control and format characters (escape sequences, line separators, text direction, zero width), lone surrogates and
    unassigned characters are escaped as in Python: `\\x1b`, `\\u202e`.

    >>> visible("layer" + chr(27) + "[31m" + chr(10))
    'layer\\\\x1b[31m\\\\n'
    """
    text = str(value)
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    return _shortened("".join(map(_shown, _shortened(text, limit))), limit)


def paragraph(value: object, limit: int = MESSAGE) -> str:
    """`visible` line by line, keeping line breaks and tabs."""
    text = _shortened(str(value).replace("\r\n", "\n"), limit)
    return _shortened("".join(c if c in "\n\t" else _shown(c) for c in text), limit)


def plain(value: object, style: str = "", limit: int = MESSAGE) -> Text:
    """`paragraph` for rich, without markup."""
    from rich.text import Text  # needed only for printing

    return Text(paragraph(value, limit), style=style)


def markdown(value: object, limit: int = LINE) -> str:
    """Markdown for a paragraph, list item or heading that every renderer shows as text.

    Simple words stay as they are. Anything else becomes a code span, where CommonMark, GitHub and the Hub ignore links,
    images, tags, mentions and emphasis.

    >>> markdown("ViT base (224)"), markdown("<img src=x>")
    ('ViT base (224)', '`<img src=x>`')
    """
    text = visible(value, limit)
    return text if _WORDS.fullmatch(text) else code(text, limit)


def code(value: object, limit: int = LINE) -> str:
    """`visible` as a Markdown code span; empty for blank text."""
    text = visible(value, limit)
    if not text.strip():
        return ""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if {text[0], text[-1]} & {"`", " "} else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def cell(text: str) -> str:
    """Markdown for one table cell, with pipes escaped."""
    # Renderers disagree on `\\|`. A pipe after a backslash becomes `\x7c`.
    return re.sub(r"(?<=\\)\|", "x7c", text).replace("|", "\\|")


def _shown(char: str) -> str:
    if char.isprintable() and char not in _BLANK:
        return char
    if unicodedata.category(char) == "Zs":
        return " "
    if char in _SHORT:
        return _SHORT[char]
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _shortened(text: str, limit: int) -> str:
    """The beginning and the end, where messages say what to do."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 5]} ... {text[-end:]}"
