"""Whether this process was asked to stop.

A signal becomes a KeyboardInterrupt wherever the main thread happens to be; inside a library's C code it may come out
as some other exception (torch: "could not determine the shape of object type"). Who handles an error asks here.
"""

from __future__ import annotations

_came = False


def note(came: bool = True) -> None:
    """Remember that a signal came; with False, that none has yet."""
    global _came
    _came = came


def came() -> bool:
    """Whether a signal came."""
    return _came
