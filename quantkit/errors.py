"""Exceptions of quantkit, and how any exception is told.

Each message is one or two lines: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from quantkit.progress import size


class QuantkitError(Exception):
    """The work failed. The command line exits with 1."""

    exit_code = 1


class UsageError(QuantkitError):
    """The request itself was wrong: an option, a combination, a path. The command line exits with 2."""

    exit_code = 2


class QuantkitWarning(UserWarning):
    """What a user of a library call should act on: category of its warnings."""


class SourceError(QuantkitError):
    """A model could not be read, or is not what its config says."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation text could not be read, rendered or is too short."""


class NumericError(QuantkitError):
    """A weight, an activation or a scale is not a finite number that the format can hold."""


NOT_FINITE = "logits are not finite; try --dtype float32, or let `quantkit verify` look for a damaged weight"
"""What is wrong with a model, after "its"."""


class OutputError(QuantkitError):
    """The output could not be written."""


class MissingPackageError(QuantkitError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package}: pip install 'quantkit[{extra}]'")


class Interrupted(KeyboardInterrupt):
    """An interrupt that did not cost the work done so far; says how far that went, and what goes on with it."""


def describe(error: BaseException) -> str:
    """An error in a line or two, as the command line shows it."""
    if isinstance(error, QuantkitError):
        return str(error)
    return _out_of_memory(error) or f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


_DRIVING = (*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
UNSEEN = (*_DRIVING, *range(0xD800, 0xE000))
"""Codes of control and bidirectional characters, which may drive a terminal, and of halves of surrogate pairs, which no
stream takes."""
_UNSEEN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in UNSEEN}
_LAID_OUT = {code: shown for code, shown in _UNSEEN.items() if chr(code) not in "\n\t"}


def visible(text: str, lines: bool = False) -> str:
    """Text of files and of others as it may reach a terminal: control and bidirectional characters written out.

    Args:
        text: what is to be shown.
        lines: leave line ends and tabs, for text of several lines; without it one line stays one line.
    """
    return text.translate(_LAID_OUT if lines else _UNSEEN)


def shortened(text: str, most: int = 200) -> str:
    """A value as a line quotes it: without its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def meant(word: str, words: Iterable[str]) -> str:
    """The word that was probably meant, as the end of a line; nothing where none is near."""
    by_letters = {known.lower(): known for known in sorted(words)}
    near = get_close_matches(word.lower(), by_letters, 1)
    return f"; did you mean {by_letters[near[0]]}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for a one-line report; the last where the first announces a list."""
    lines = str(error).strip().split("\n")
    return lines[-1 if lines[0].rstrip().endswith(":") else 0].strip() or type(error).__name__


def yaml_fault(error: Exception) -> str:
    """What is wrong with a text that is no YAML, and where in it."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    return " ".join(str(error).split())


def _out_of_memory(error: BaseException) -> str:
    """A line where the system or torch had no memory to give; "" for other errors.

    On a CPU torch says it by a RuntimeError with the name of its allocator, on a GPU by a class of its own (not named
    here, where torch need not be imported yet), C++ libraries by the name of C++'s error.
    """
    said = f"{type(error).__name__}: {error}"
    if not (isinstance(error, MemoryError) or re.search(r"^OutOfMemoryError|CPUAllocator|bad_alloc", said)):
        return ""
    asked = re.search(r"tried to allocate (\d+) bytes", said)
    what = f"where {size(int(asked[1]))} more were asked for" if asked else "here"
    return f"memory ran out {what}; free some, or name less as --memory (gptq, imatrix, perplexity, compare)"


# -- whether this process was asked to stop ----------------------------------------------------------------------------
#
# A signal becomes a KeyboardInterrupt wherever the main thread happens to be; inside a library's C code it may come out
# as some other exception (torch: "could not determine the shape of object type"). Who handles an error asks here.

_interrupt_came = False


def note_interrupt(came: bool = True) -> None:
    """Remember that a signal came; with False, that none has yet."""
    global _interrupt_came
    _interrupt_came = came


def interrupt_came() -> bool:
    """Whether a signal came."""
    return _interrupt_came
