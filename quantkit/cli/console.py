"""How the command line shows things: results on stdout; bars and lines on stderr are in `quantkit.bars`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from quantkit.bars import Bars as Bars
from quantkit.bars import at_words, console
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


def _print(line: str, style: str = "") -> None:
    """A line of results: on a terminal broken at words."""
    line = visible(line)
    results().print(at_words(line, results().width) if results().is_terminal else line, markup=False, style=style)


def show(lines: Iterable[Shown]) -> None:
    """What a report says, on stdout."""
    from quantkit.cli.tables import lines_of
    from quantkit.report import Line, Rule, Table, Text

    for line in lines:
        match line:
            case str():
                _print(line)
            case Line():
                _print(line.text, line.style)
            case Text():
                results().print(visible(line.text, lines=True), markup=False)
            case Rule():
                results().rule(visible(line.title), align="left")
            case Table():
                width = results().width if results().is_terminal else None
                for text in lines_of(line, width):
                    results().print(text, markup=False)
