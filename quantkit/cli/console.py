"""How the command line shows things: results on stdout; bars and lines on stderr are in `quantkit.bars`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from quantkit.bars import Bars as Bars
from quantkit.bars import console
from quantkit.bars import log as log
from quantkit.bars import say as say
from quantkit.errors import UNSEEN, visible

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.report import Shown


@cache
def results() -> Console:
    """Standard output."""
    return console(stderr=False)


_UNSEEN_IN_JSON = {code: f"\\u{code:04x}" for code in UNSEEN}  # those below 0x20 json.dumps escapes itself


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    written = json.dumps(content, ensure_ascii=False, allow_nan=False)
    print(written.translate(_UNSEEN_IN_JSON))


def _at_words(line: str) -> str:
    """A line that is wider than the terminal broken at spaces, so that no number is cut.

    One with a word that is wider than that, as a path may be, is left to the terminal: it is copied whole.
    """
    width = results().width if results().is_terminal else len(line)
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= width or max(map(len, line.split()), default=0) > width - len(indent):
        return line
    return textwrap.fill(line, width, subsequent_indent=indent, expand_tabs=False, break_on_hyphens=False)


def show(lines: Iterable[Shown]) -> None:
    """What a report says, on stdout."""
    from quantkit.cli.tables import lines_of
    from quantkit.report import Line, Rule, Table, Text

    for line in lines:
        match line:
            case str():
                results().print(_at_words(visible(line)), markup=False)
            case Line():
                results().print(_at_words(visible(line.text)), markup=False, style=line.style)
            case Text():
                results().print(visible(line.text, lines=True), markup=False)
            case Rule():
                results().rule(visible(line.title), align="left")
            case Table():
                width = results().width if results().is_terminal else None
                for text in lines_of(line, width):
                    results().print(text, markup=False)
