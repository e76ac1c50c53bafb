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
