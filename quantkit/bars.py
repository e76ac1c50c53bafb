"""Bars and lines on stderr: what the command line shows of long work, and library calls with `progress=True`."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitWarning, shortened, visible
from quantkit.progress import Advance, Progress, Silent, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Drawing

_LINE_SECONDS = 15.0
_BESIDE_BAR = 64  # of a line's columns: what a phase is called, count and times
_LONGEST_LINE = 8000  # characters of a note or an error
_LONGEST_WORD = 1000  # of what has no space in it, such as a path
_PACKAGE = str(Path(__file__).parent)


# rich is imported for what it draws: help and a wrong option are to be there at once.


@cache
def log() -> Console:
    """Standard error."""
    return console(stderr=True)


def console(stderr: bool) -> Console:
    """A terminal, or what stands for one."""
    from rich.console import Console

    # No emoji: rich would turn ":x:" in a path into a picture.
    return Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


def shown(text: str) -> str:
    """A line as it may be shown: what files bring along is made visible in it, and shortened where it has no end."""
    words = re.sub(r"\S{200,}", lambda found: shortened(found[0], _LONGEST_WORD), text)
    return visible(shortened(words, _LONGEST_LINE))


def at_words(line: str, width: int) -> str:
    """A line that is wider than this broken at spaces, so that no number is cut.

    One with a word that is wider than that, as a path may be, is left to the terminal: it is copied whole.
    """
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= width or max(map(len, line.split()), default=0) > width - len(indent):
        return line
    return textwrap.fill(line, width, subsequent_indent=indent, expand_tabs=False, break_on_hyphens=False)


def say(text: str, style: str = "", broken: bool = False) -> None:
    """A line on stderr, on a terminal in a colour or style; `broken`: at words, where no command to copy is in it."""
    text = shown(text)
    if broken and sys.stderr.isatty():
        text = at_words(text, log().width)
    if sys.stderr.isatty() or "FORCE_COLOR" in os.environ:
        log().print(text, markup=False, style=style)
    else:
        print(text, file=sys.stderr)


class Bars:
    """A bar with the time left per phase on a terminal; elsewhere a line when a phase ends, and now and then within.
    Notes and warnings are said once, however many models or steps they hold of.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Drawing | None = None
        self._task: Any = None
        self._detail = ""
        self._said: set[str] = set()

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
            self._once(text)

    def warn(self, text: str) -> None:
        self._once(f"warning: {text}", "yellow")

    def _once(self, text: str, style: str = "") -> None:
        if text not in self._said:
            self._said.add(text)
            say(text, style, broken=True)

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
                bar.update(task, detail="", total=clock.end())
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
        say(f"{name}: {clock.done}/{clock.end()} in {time.monotonic() - clock.start:.1f} s")
        self._detail = ""


class Clock:
    """The time that a phase has left, from the steps that are done; between steps it runs down."""

    def __init__(self, total: int) -> None:
        self._total, self.done = total, 0
        self.start = self._last = time.monotonic()

    def advance(self, steps: int) -> None:
        self.done, self._last = self.done + steps, time.monotonic()

    def end(self) -> int:
        """How many steps it was in all: fewer than were thought where they were enough."""
        self._total = self.done or self._total
        return self._total

    def __str__(self) -> str:
        if not self.done:
            return ""
        left = (self._last - self.start) / self.done * (self._total - self.done)
        return f"{duration(max(0.0, left - (time.monotonic() - self._last)))} left"


class Warned(Silent):
    """What library calls report to where nothing else is asked for: warnings go to Python's own `warnings`."""

    def warn(self, text: str) -> None:
        frame, level = sys._getframe(1), 2
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):  # the line that called the library
            frame, level = frame.f_back, level + 1  # type: ignore[assignment]
        warnings.warn(visible(text), QuantkitWarning, stacklevel=level)


def listening(progress: Progress | bool | None) -> Progress:
    """Who hears of a library call: True: bars and lines on stderr; False: warnings alone."""
    if isinstance(progress, bool) or progress is None:
        return Bars(quiet=False) if progress else Warned()
    return progress


class Worded:
    """Passes everything on, with the words of messages changed."""

    def __init__(self, to: Progress, words: Callable[[str], str]) -> None:
        self._to, self._words = to, words
        self.phase, self.detail = to.phase, to.detail

    def note(self, text: str) -> None:
        self._to.note(self._words(text))

    def warn(self, text: str) -> None:
        self._to.warn(self._words(text))
