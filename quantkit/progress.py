"""Events out of the library. Library code reports here and never prints; the command line draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Receives what long work reports."""

    def phase(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Enter a phase of `total` steps; the returned function advances it by that many steps."""

    def note(self, text: str) -> None:
        """Say something a user should know, one line."""

    def warn(self, text: str) -> None:
        """Say something that a user should act on, one line."""

    def detail(self, text: str) -> None:
        """Replace the short text beside the running bar, such as the layer in hand and its error."""


class Silent:
    """Discards everything: the default of library functions."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def detail(self, text: str) -> None:
        pass


SILENT = Silent()


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes in powers of ten, as the Hub shows them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with what it counts, which is one or several."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def significant(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with this many significant digits, written out where it is of ordinary size."""
    plus = "+" if sign else ""
    text = f"{value:{plus}#.{digits}g}".removesuffix(".")
    if "e" not in text or not 1e-6 <= abs(value) < 1e15:
        return text
    return f"{value:{plus}.0f}" if "e+" in text else f"{value:{plus}.{digits - 1 - int(text.partition('e')[2])}f}"


def number(value: float) -> str:
    """Four decimals; of what is smaller than that shows, two digits."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else significant(value, 2)


def spread(error: float | None) -> str:
    """A standard error behind its number; nothing where it is not known."""
    return "" if error is None else f" ± {number(error)}"


def per_cent(share: float, error: float | None = None) -> str:
    """A share with one decimal, and with its standard error, of which a digit is always seen."""
    if error is None:
        return f"{100 * share:.1f} %"
    off = 100 * error
    return f"{100 * share:.1f} ± {f'{off:.1f}' if off == 0 or off >= 0.05 else significant(off, 1)} %"
