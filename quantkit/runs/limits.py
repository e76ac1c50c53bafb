"""Limits to the time and memory that a program of somebody else takes, such as a model's chat template."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, SourceError
from quantkit.progress import size

TEMPLATE_SECONDS = 20.0
"""For one rendering of a chat template or a card's, which takes milliseconds."""
TEMPLATE_BYTES = 1_000_000_000
"""That one rendering may take beyond what the process has; a text of a hundredth of it is a whole book."""
LONGEST_RENDERED = TEMPLATE_BYTES // 100


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
def memory_limit(most: int, what: str, kind: type[QuantkitError] = SourceError) -> Iterator[None]:
    """Give what runs inside at most so many bytes more than the process has; only where Linux counts them.

    Raises:
        QuantkitError: of this kind, where it asked for more.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError):  # macOS has no such file, and does not keep the limit
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + most
        if before[0] == resource.RLIM_INFINITY or own < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (own, before[1]))
    try:
        yield
    except MemoryError:
        raise kind(f"{what} takes more than {size(most)} of memory, and was stopped") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check_rendered(text: str, given: int) -> str:
    """What a chat template made of so many characters. Raises SourceError where that is far too much."""
    if len(text) > LONGEST_RENDERED + 10 * given:
        raise SourceError(f"the chat template makes {len(text)} characters of {given}; it is damaged")
    return text


@contextmanager
def template_limit() -> Iterator[None]:
    """The limits of one rendering of a chat template, in jinja2's sandbox: its time, its memory, and how large products
    are.

    Raises:
        SourceError: it takes too long, or too much.
    """
    what = "the chat template"
    with _rendering, _checked_products(), memory_limit(TEMPLATE_BYTES, what), time_limit(TEMPLATE_SECONDS, what):
        yield


@contextmanager
def _checked_products() -> Iterator[None]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox: Any = ImmutableSandboxedEnvironment  # the one that transformers takes
    before = sandbox.intercepted_binops, sandbox.call_binop
    sandbox.intercepted_binops, sandbox.call_binop = frozenset({"*", "**"}), _product
    try:
        yield
    finally:
        sandbox.intercepted_binops, sandbox.call_binop = before


def _product(sandbox: Any, _: Any, operator: str, left: Any, right: Any) -> Any:
    """A product or power in a template; a single one of huge numbers may take hours, and nothing can stop it."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MOST_BITS:
            raise OverflowError("a product in it is too large")
    return sandbox.binop_table[operator](left, right)


_MOST_BITS = 1 << 16
_rendering = threading.RLock()
