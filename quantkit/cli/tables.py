"""Tables as lines of text, as wide as the terminal: names stay, numbers are never cut."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size

from quantkit.errors import visible
from quantkit.report import Column, Table, common_start

_BETWEEN = "  "
_LEAST = 8  # columns that a name or a text keeps


def lines_of(table: Table, width: int | None) -> Iterator[str]:
    """A table's lines.

    What does not fit in is made narrower, in this order: text is wrapped, names lose what all begin with, columns are
    left out by their rank, names are folded.

    Args:
        width: of the terminal; None where there is none, and everything is shown in one line.
    """
    rows = [[visible(cell) for cell in row] for row in table.rows]
    columns = list(table.columns)
    room = None if width is None else max(width - table.indent, _LEAST)
    start = common_start([row[0] for row in rows]) if table.short else ""
    if start and room is not None and _excess(columns, rows, table.heads, room) > 0:
        rows = [[row[0].removeprefix(start), *row[1:]] for row in rows]
        yield f"{' ' * table.indent}names without their common beginning, {start}"
    while room is not None and any(column.drop for column in columns):
        if _excess(columns, rows, table.heads, room) <= 0:
            break
        last = max(range(len(columns)), key=lambda number: columns[number].drop)
        columns, rows = [*columns[:last], *columns[last + 1 :]], [[*row[:last], *row[last + 1 :]] for row in rows]
    widths = _widths(columns, rows, table.heads)
    if room is not None:
        flexible = next((number for number, column in enumerate(columns) if column.wraps), 0)
        wide = widths[flexible]
        widths[flexible] = min(wide, max(wide - _total(widths) + room, _LEAST))
    for row in [[visible(column.head) for column in columns], ["─" * wide for wide in widths]] if table.heads else []:
        yield from _laid_out(row, columns, widths, table.indent)
    for row in rows:
        yield from _laid_out(row, columns, widths, table.indent)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], heads: bool) -> list[int]:
    """What every column would take."""
    return [
        max([cell_len(visible(column.head)) if heads else 0, *(cell_len(row[number]) for row in rows)])
        for number, column in enumerate(columns)
    ]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_BETWEEN) * (len(widths) - 1)


def _excess(columns: Sequence[Column], rows: Sequence[Sequence[str]], heads: bool, room: int) -> int:
    """By how much a table is too wide, with its text wrapped."""
    widths = _widths(columns, rows, heads)
    least = [min(wide, _LEAST) if column.wraps else wide for column, wide in zip(columns, widths, strict=True)]
    return _total(least) - room


def _laid_out(row: Sequence[str], columns: Sequence[Column], widths: Sequence[int], indent: int) -> Iterator[str]:
    """A row's lines, more than one where a cell is wider than its column."""
    cells = [
        _wrapped(text, wide, at_words=column.wraps) for text, column, wide in zip(row, columns, widths, strict=True)
    ]
    for number in range(max(map(len, cells))):
        parts = [
            _placed(cell[number] if number < len(cell) else "", column, wide)
            for cell, column, wide in zip(cells, columns, widths, strict=True)
        ]
        yield (" " * indent + _BETWEEN.join(parts)).rstrip()


def _wrapped(text: str, width: int, at_words: bool) -> list[str]:
    """A cell's text in pieces of at most this width: nothing of it is lost."""
    if cell_len(text) <= width:
        return [text]
    if at_words and cell_len(text) == len(text):
        return textwrap.wrap(text, width, break_on_hyphens=False)
    pieces, free = [""], width
    for letter in text:
        free -= cell_len(letter)
        if free < 0:
            pieces.append("")
            free = width - cell_len(letter)
        pieces[-1] += letter
    return pieces


def _placed(text: str, column: Column, width: int) -> str:
    free = width - cell_len(text)
    if column.justify == "left":
        return set_cell_size(text, width) if free > 0 else text
    before = free if column.justify == "right" else free // 2
    return " " * before + text + " " * (free - before)
