"""The person at the terminal, whom `chat` talks with."""

from __future__ import annotations

import sys

from quantkit.cli import console
from quantkit.errors import visible


class Terminal:
    """A person at a terminal, or what is piped in: there no prompt is shown."""

    def __init__(self, silent: bool, quiet: bool) -> None:
        self._silent, self._quiet = silent, quiet
        self._asks = sys.stdin.isatty()
        if self._asks:
            import readline  # noqa: F401  # gives input() its editing and history

    def hear(self) -> str | None:
        while True:
            try:
                return input("> ") if self._asks else self._line()
            except KeyboardInterrupt:  # at the prompt it drops what was typed
                if not self._asks:
                    raise
                print(file=sys.stderr)
                self.note("/quit ends the conversation")
            except EOFError:
                return None

    def say(self, piece: str) -> None:
        if not self._silent:
            print(visible(piece, lines=True), end="", flush=True)

    def end(self, finish: str) -> None:
        if not self._silent:
            print(flush=True)
        if finish != "eos":
            self.note({"length": "(no more room)", "interrupted": "(interrupted)"}[finish])

    def note(self, text: str) -> None:
        if not self._quiet:
            console.say(text, "dim")

    @staticmethod
    def _line() -> str | None:
        return sys.stdin.readline() or None
