"""Text of other people where it is shown: one door for terminals, rich, Markdown and plots.

Names, notes and settings of an adapter, and module names of a base, are data of whoever published them. They stay what
they are inside; what prints or renders them asks here first:

    visible     one line for a terminal, a log, a YAML value or a plot
    paragraph   our own message of several lines, with such names in it
    plain       the same for rich, which reads no markup in it
    markdown    Markdown that can only be text: simple words as they are, anything else as a code span
    cell        that for a cell of a table
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LINE, MESSAGE = 200, 4000
"""How many characters are shown at most: of a name or value, and of a message."""
# Printable by their category, but with nothing to see: fillers, joiners and selectors.
_BLANK = frozenset(
    chr(code)
    for first, last in ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800),
                        (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
)  # fmt: skip
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Letters and digits joined by single spaces and marks that Markdown reads nothing into, and the same in parentheses at
# the end. No dot before a letter: links.
_SOME = r"[A-Za-z0-9]+(?:(?:[,:;]? |[_,%=+-])[A-Za-z0-9]+|\.[0-9]+)*%?"
_WORDS = re.compile(rf"{_SOME}(?: \({_SOME}\))?")


def visible(value: object, limit: int = LINE) -> str:
    """One line of bounded length in which nothing is hidden and nothing steers a terminal.

    Control and format characters (escape sequences, line separators, text direction, zero width), lone surrogates and
    characters without a meaning yet are written as Python would write them: `\\x1b`, `\\u202e`.

    >>> visible("layer" + chr(27) + "[31m" + chr(10))
    'layer\\\\x1b[31m\\\\n'
    """
    text = str(value)
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    return _shortened("".join(map(_shown, _shortened(text, limit))), limit)


def paragraph(value: object, limit: int = MESSAGE) -> str:
    """`visible` line by line, for a message of ours: its line breaks and tabs are kept."""
    text = _shortened(str(value).replace("\r\n", "\n"), limit)
    return _shortened("".join(c if c in "\n\t" else _shown(c) for c in text), limit)


def plain(value: object, style: str = "", limit: int = MESSAGE) -> Text:
    """`paragraph` for rich, which finds no markup in it."""
    from rich.text import Text  # only what prints needs it

    return Text(paragraph(value, limit), style=style)


def markdown(value: object, limit: int = LINE) -> str:
    """Markdown for a paragraph, list item or heading, which no renderer can take for more than text.

    Simple words stay as they are. Anything else becomes a code span: there, links, images, tags, mentions and emphasis
    mean nothing to CommonMark, GitHub or the Hub.

    >>> markdown("ViT base (224)"), markdown("<img src=x>")
    ('ViT base (224)', '`<img src=x>`')
    """
    text = visible(value, limit)
    return text if _WORDS.fullmatch(text) else code(text, limit)


def code(value: object, limit: int = LINE) -> str:
    """`visible` as a Markdown code span; nothing for blank text."""
    text = visible(value, limit)
    if not text.strip():
        return ""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if {text[0], text[-1]} & {"`", " "} else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def cell(text: str) -> str:
    """Markdown in one cell of a table: its pipes do not end it."""
    # Renderers do not agree on what `\\|` is. A pipe behind a backslash becomes `\x7c`, which is how it is written.
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
    """Its beginning and its end, where our messages say what to do."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 5]} ... {text[-end:]}"
