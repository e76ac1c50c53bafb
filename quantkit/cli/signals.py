"""What an interrupt does to a command: the first one ends it in order, the second one at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from quantkit.errors import Interrupted, interrupt_came, note_interrupt
from quantkit.runs.ranks import broken

_SHOW_CURSOR = "\x1b[?25h"
_SOON = 0.02  # seconds


@contextmanager
def heeded(arguments: Sequence[str]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise a KeyboardInterrupt, and whichever comes second end the process with 128 + n.

    Where it would not arrive (an extension's import, a destructor, a callback) it is raised soon after, by SIGALRM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    note_interrupt(False)

    def heed(number: int, frame: FrameType | None) -> None:
        if broken():  # what is left is to tell why
            return
        if interrupt_came():
            _end(number)
        note_interrupt()
        stop(number, frame)

    def stop(_: int, frame: FrameType | None) -> None:
        if _loading(frame):
            soon()
        else:
            raise KeyboardInterrupt

    def soon() -> None:
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    def not_lost(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):  # in a destructor or a callback, which may not raise
            soon()
        else:
            report_unraisable(unraisable)

    # In a chat Ctrl-C stops an answer, time and again. One that is ignored, as in the background, stays so.
    ours = [signal.SIGTERM] if "chat" in arguments[:1] else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.getsignal(number) for number in ours}
    heard = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in heard:
        signal.signal(number, heed)
    alarm = signal.signal(signal.SIGALRM, stop)
    report_unraisable, sys.unraisablehook = sys.unraisablehook, not_lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report_unraisable
        signal.signal(signal.SIGALRM, alarm)
        for number, handler in heard.items():
            signal.signal(number, handler)


def _loading(frame: FrameType | None) -> bool:
    """Whether C code of a module being imported runs: it may print an exception and raise another, or drop it."""
    while frame is not None:
        within = frame.f_globals.get("__name__") == "importlib._bootstrap_external"
        if within and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def farewell(stop: BaseException, arguments: Sequence[str]) -> str:
    """What an interrupted command says: what is left of it, and how to go on."""
    again = [argument for argument in arguments if argument not in ("--resume", "--force")]
    advice = f"go on with: quantkit {shlex.join([*again, '--resume'])}"
    resumes = list(arguments[:1]) in (["gptq"], ["compare"])
    if isinstance(stop, Interrupted) and "generate" in arguments[:1]:
        return f"interrupted; {stop}"
    if isinstance(stop, Interrupted):
        return f"interrupted {stop}; {advice if resumes else 'the same command goes on with it'}"
    if resumes and "--resume" in arguments:  # what an earlier run left may not even have been looked at
        return f"interrupted before anything new was done; {advice}"
    return "interrupted; no unfinished output was left"


def _end(number: int) -> None:
    if sys.stderr.isatty():  # where a bar may have hidden the cursor
        os.write(2, _SHOW_CURSOR.encode())
    os._exit(128 + number)
