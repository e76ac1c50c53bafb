"""How the command line shows things: bars and lines on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from quantkit.errors import UNSEEN, shortened, visible
from quantkit.progress import Advance, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from quantkit.report import Shown

_LINE_SECONDS = 15.0
_BESIDE_BAR = 64  # of a line's columns: what a phase is called, count and times
_LONGEST_LINE = 8000  # characters of a note or an error
_LONGEST_WORD = 1000  # of what has no space in it, such as a path


# rich is imported for what it draws: help and a wrong option are to be there at once.


@cache
def results() -> Console:
    """Standard output."""
    return _console(stderr=False)


@cache
def log() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    # No emoji: rich would turn ":x:" in a path into a picture.
    return Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


def shown(text: str) -> str:
    """A line as it may be shown: what files bring along is made visible in it, and shortened where it has no end."""
    words = re.sub(r"\S{200,}", lambda found: shortened(found[0], _LONGEST_WORD), text)
    return visible(shortened(words, _LONGEST_LINE))


def say(text: str, style: str = "") -> None:
    """A line on stderr, on a terminal in a colour or style."""
    text = shown(text)
    if sys.stderr.isatty() or "FORCE_COLOR" in os.environ:
        log().print(text, markup=False, style=style)
    else:
        print(text, file=sys.stderr)


class Bars:
    """A bar with the time left per phase on a terminal; elsewhere a line when a phase ends, and now and then within."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._detail = ""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        if self._quiet:
            yield lambda steps: None
        elif log().is_terminal:
            with self._drawn(name, total) as advance:
                yield advance
        else:
            with self._written(name, total) as advance:
                yield advance

    def note(self, text: str) -> None:
        if not self._quiet:
            say(text)

    def warn(self, text: str) -> None:
        say(f"warning: {text}", "yellow")

    def detail(self, text: str) -> None:
        self._detail = text = visible(text)
        if self._bar is not None:
            self._bar.update(self._task, detail=text)

    @contextmanager
    def _drawn(self, name: str, total: int) -> Iterator[Advance]:
        """The bar. On a narrow terminal the detail gives way, then the bar; never the count or the time left."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        clock = Clock(total)
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(max(8, min(40, log().width - _BESIDE_BAR))),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[clock]}", style="cyan", table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
        )
        shown = shortened(visible(name), max(12, log().width // 4))
        with Progress(*columns, console=log(), expand=True) as bar:
            task = bar.add_task(shown, total=total, detail="", clock=clock)
            self._bar, self._task = bar, task

            def advance(steps: int) -> None:
                clock.advance(steps)
                bar.advance(task, steps)

            try:
                yield advance
                bar.update(task, detail="")
            finally:
                self._bar = None

    @contextmanager
    def _written(self, name: str, total: int) -> Iterator[Advance]:
        clock = Clock(total)
        last = clock.start

        def advance(steps: int) -> None:
            nonlocal last
            clock.advance(steps)
            now = time.monotonic()
            if clock.done and now - last > _LINE_SECONDS:
                last = now
                say(f"{name}: {clock.done}/{total}, {clock}  {self._detail}")

        yield advance
        say(f"{name}: {clock.done}/{total} in {time.monotonic() - clock.start:.1f} s")
        self._detail = ""


class Clock:
    """The time that a phase has left, from the steps that are done; between steps it runs down."""

    def __init__(self, total: int) -> None:
        self._total, self.done = total, 0
        self.start = self._last = time.monotonic()

    def advance(self, steps: int) -> None:
        self.done, self._last = self.done + steps, time.monotonic()

    def __str__(self) -> str:
        if not self.done:
            return ""
        left = (self._last - self.start) / self.done * (self._total - self.done)
        return f"{duration(max(0.0, left - (time.monotonic() - self._last)))} left"


_UNSEEN_IN_JSON = {code: f"\\u{code:04x}" for code in UNSEEN}  # those below 0x20 json.dumps escapes itself


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    written = json.dumps(content, ensure_ascii=False, allow_nan=False)
    print(written.translate(_UNSEEN_IN_JSON))


def show(lines: Iterable[Shown]) -> None:
    """What a report says, on stdout."""
    from quantkit.cli.tables import lines_of
    from quantkit.report import Line, Rule, Table

    for line in lines:
        match line:
            case str():
                results().print(visible(line, lines=True), markup=False)
            case Line():
                results().print(visible(line.text, lines=True), markup=False, style=line.style)
            case Rule():
                results().rule(visible(line.title), align="left")
            case Table():
                width = results().width if results().is_terminal else None
                for text in lines_of(line, width):
                    results().print(text, markup=False)
