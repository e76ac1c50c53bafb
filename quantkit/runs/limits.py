"""A limit to the time that a program of somebody else takes, such as a model's chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.errors import QuantkitError, SourceError

TEMPLATE_SECONDS = 20.0
"""For one rendering of a chat template, which takes milliseconds."""


class _TooLong(BaseException):
    """Raised within what takes too long, which may catch every Exception."""


@contextmanager
def time_limit(seconds: float, what: str, kind: type[QuantkitError] = SourceError) -> Iterator[None]:
    """Stop what runs inside after so many seconds, in this thread; what runs in C is stopped when that returns.

    Raises:
        QuantkitError: of this kind, where it was stopped.
    """
    thread, lock, done = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()

    def stop() -> None:
        with lock:
            if not done.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
            timer.cancel()
            for _ in range(10):  # one that has been set is raised at a jump back
                pass
    except _TooLong:
        raise kind(f"{what} takes more than {seconds:g} s, and was stopped") from None


@contextmanager
def template_limit() -> Iterator[None]:
    """The limit of one rendering of a chat template. Raises SourceError."""
    with time_limit(TEMPLATE_SECONDS, "the chat template"):
        yield
