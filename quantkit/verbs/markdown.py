"""Names and texts of others in Markdown, each quoted for where it stands, so that it is one word of text there."""

from __future__ import annotations

import re

from quantkit.errors import visible


def cell(value: object) -> str:
    """Text in a cell of a table, or in a line: it begins no link, code, HTML or cell of its own."""
    # An underscore between letters, as in most names, means nothing.
    return re.sub(r"([\\`*\[\]<>|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", visible(" ".join(str(value).split())))


def code(value: object) -> str:
    """Text as a code span, in a table too: between more backticks than it holds."""
    text = visible(" ".join(str(value).split())).replace("|", "\\|")
    ticks = fence(text, 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text or ' '}`"


def fence(value: object, least: int = 3) -> str:
    """What opens and closes a block of code that holds this text: more backticks than it has together."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", str(value))), default=0))
