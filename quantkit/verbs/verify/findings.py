"""What a verification found: problems, each one line that says what to do, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import QuantkitError, first_line

_NAMED = 3


class Findings:
    """Collects what is wrong with one model; nothing that a check meets stops the others.

    Attributes:
        root: absolute path of the folder; it is left out of what libraries raise.
        problems: what is wrong, as keys: in the order of finding, each once.
        notes: what a user may want to know, as keys.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def problem(self, text: str) -> None:
        """Note a fault: what it is of, what it is, what to do."""
        self.problems[text] = None

    def note(self, text: str) -> None:
        """Note what is no fault."""
        self.notes[text] = None

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Whatever is raised inside becomes a problem: damaged files make libraries raise anything."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except QuantkitError as error:
            self.problem(self._without_root(str(error)))
        except BaseException as error:  # a panic of a Rust library is no Exception
            reason = self._without_root(first_line(error))
            self.problem(f"{what}: {reason} ({type(error).__name__}); download it again")

    def _without_root(self, text: str) -> str:
        return text.replace("\n", " ").replace(f"{self.root}/", "").replace(str(self.root), self.root.name)


def listed(names: Sequence[str]) -> str:
    """A few of many names, for one line."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
