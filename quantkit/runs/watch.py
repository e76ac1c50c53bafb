"""Whether the other processes of a run are still there, and what is said when one is not.

A collective of torch.distributed waits for a process that hangs until its timeout, and tells of one that died in
words of its own, in every process that is left. Here every process counts up a heartbeat in the store that all met
at, from a thread: slow work is told apart from no work. Whoever fails leaves a note there; one process reports it.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from quantkit.errors import QuantkitError, describe
from quantkit.progress import Progress

_BEAT = 1.0
_COMING = 300.0  # a process may take so long to come
_STALE = 20.0  # without a beat: gone, or cut off
_SURELY_STALE = 5.0  # the same once something is known to be wrong
_STUCK = 15.0  # for a main thread to notice that the run has failed
_HEARING = 10.0  # for the notes of those that leave
_LINGER = 2.0
_MISSES = 3  # beats that the store did not take
_SENT = (signal.SIGINT, signal.SIGTERM)  # by launchers and people
_STORE_GONE = "the place where the processes met is gone"


class Store(Protocol):
    """What is asked of torch.distributed's store. Each thread has its own connection: an answer may not come."""

    def set(self, key: str, value: str, /) -> None:
        """Have a value under a key."""

    def get(self, key: str, /) -> bytes:
        """A key's value; waits for it."""

    def add(self, key: str, count: int, /) -> int:
        """Add to a key's number, which is 0 at first, and return the sum."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of the keys are there."""


class RankError(QuantkitError):
    """Another process of the run failed. `silent`: somebody else tells of it."""

    def __init__(self, text: str, *, silent: bool = False, exit_code: int = 1) -> None:
        super().__init__(text)
        self.silent, self.exit_code = silent, exit_code


class Watch:
    """The heartbeats and last notes of a run's processes, seen from one of them.

    Args:
        connect: to the store that all processes share.
        rank, size: of this process, and of how many.
        remedy: what to do after a process was lost.
        progress: gets the last line of a process that is stuck.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int, remedy: str, progress: Progress) -> None:
        self._store, self._rank, self._size = connect(), rank, size
        self._remedy, self._progress = remedy, progress
        self._failing = ""
        self._heard = time.monotonic()
        self._waits = self._parting = self._woken = False
        self._turn = 0
        self._stopped = threading.Event()
        self._can_interrupt = threading.current_thread() is threading.main_thread()
        self._store.set(f"host/{rank}", socket.gethostname())
        self._store.add(f"beat/{rank}", 1)  # from here on its silence counts
        own = connect()
        for work in (lambda: self._pulse(own), self._guard):
            threading.Thread(target=work, daemon=True).start()

    # -- while all goes well -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RankError where the run has failed."""
        if self._failing:
            ignore_signals()
            raise RankError(self._failing, silent=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The main thread asks `check` by itself: it needs no interrupt."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def turn(self) -> None:
        """Hold all ranks until the first one comes here too, however long it takes."""
        self._turn += 1
        key, nap = f"turn/{self._turn}", 1e-3
        with self.waiting():
            try:
                if self._rank == 0:
                    self._store.set(key, "")
                while not self._store.check([key]):
                    self.check()
                    time.sleep(nap)
                    nap = min(2 * nap, 0.05)
            except RuntimeError as error:
                ignore_signals()
                raise RankError(_STORE_GONE, silent=True) from error

    def called(self, rank: int) -> str:
        """A rank with its machine's name."""
        host = ""
        with suppress(RuntimeError):
            host = f" on {self._store.get(f'host/{rank}').decode()}" if self._store.check([f"host/{rank}"]) else ""
        return f"rank {rank}{host}"

    def stop(self) -> None:
        self._stopped.set()

    # -- the two threads ---------------------------------------------------------------------------------------------

    def _pulse(self, store: Store) -> None:
        """Beat, and look at others' beats: the first rank at everyone's, the others at the first one's."""
        beats = {rank: (0, time.monotonic()) for rank in (range(1, self._size) if self._rank == 0 else (0,))}
        missed, last = 0, time.monotonic()
        while not self._stopped.wait(_BEAT):
            try:
                store.add(f"beat/{self._rank}", 1)
                now = time.monotonic()
                slept, last = now - last > _STALE / 2, now  # this process was stopped: others' silence means nothing
                for rank, (count, since) in beats.items():
                    found = store.add(f"beat/{rank}", 0)
                    if found != count or slept:
                        beats[rank] = (found, now)
                    elif now - since > (_STALE if found else _COMING):
                        store.set("failing", "")
                        self._failing = f"rank {rank} no longer answers"
                if store.check(["failing"]):
                    self._failing = self._failing or "another process failed"
            except RuntimeError:
                missed += 1  # once may be the store's own timeout, after this process was stopped for long
                if missed == _MISSES:
                    self._failing = self._failing or _STORE_GONE
                    return
                continue
            self._heard, missed = now, 0

    def _guard(self) -> None:
        """Wake the main thread when the run has failed; end the process where it does not wake. Asks no other process:
        a connection that was cut may hold whoever asks."""
        last, since = time.monotonic(), 0.0
        while not self._stopped.wait(_BEAT):
            now = time.monotonic()
            slept, last = now - last > _STALE / 2, now
            if slept:
                self._heard, since = now, since and now
            if now - self._heard > _STALE:
                self._failing = self._failing or "the other processes cannot be reached"
            if not self._failing:
                continue
            since = since or now
            if not (self._waits or self._parting or self._woken) and self._can_interrupt:
                self._woken = True
                _thread.interrupt_main()
            if now - since > _STUCK + (_HEARING + _LINGER if self._parting else 0):
                self._progress.warn(f"{self._failing}; {self._remedy}")
                os._exit(1)

    # -- when something failed ---------------------------------------------------------------------------------------

    def part(self, error: BaseException) -> BaseException:
        """Leave a note of why this process stops, read the others', and return what is to be told here: `error` itself
        where it is what happened, a RankError otherwise."""
        ignore_signals()
        self._parting = True
        lost = isinstance(error, RankError) or (isinstance(error, KeyboardInterrupt) and self._woken)
        kind = "lost" if lost else "error" if isinstance(error, Exception) else "interrupt"
        note: dict[str, Any] = {"kind": kind, "text": describe(error), "code": getattr(error, "exit_code", 1)}
        try:
            self._store.set(f"left/{self._rank}", json.dumps(note))
            self._store.set("failing", "")
            # The lowest rank that is there tells.
            lower = (rank for rank in range(self._rank) if self._left(rank, time.monotonic() + _STUCK) is not None)
            told_by = next(lower, self._rank)
            if told_by != self._rank:
                self._store.set(f"bye/{self._rank}", "")
                time.sleep(_LINGER / 2)  # a launcher sends SIGTERM to the others as soon as one has ended
                return RankError(f"rank {told_by} says why", silent=True, exit_code=note["code"])
            verdict = self._verdict(error, note)
            self._linger()
        except RuntimeError:  # the store: the launcher, or the first rank, took it along
            if note["kind"] == "error":
                return error
            return RankError(f"rank 0 or its launcher is gone; {self._remedy}", silent=self._rank > 1)
        finally:
            self.stop()
        return verdict

    def _verdict(self, error: BaseException, note: dict[str, Any]) -> BaseException:
        """What happened: an error before a lost process, a lost process before an interrupt."""
        until = time.monotonic() + _HEARING
        notes: dict[int, dict[str, Any] | None] = {}
        for rank in range(self._size):
            found = note if rank == self._rank else self._left(rank, until)
            notes[rank] = found
            if found is not None and found["kind"] == "error":
                if rank == self._rank:
                    return error
                return RankError(f"{self.called(rank)}: {found['text']}", exit_code=found["code"])
        gone = [rank for rank, found in notes.items() if found is None]
        if gone:
            names = ", ".join(map(self.called, gone))
            verb = "is" if len(gone) == 1 else "are"
            return RankError(f"{names} {verb} gone: killed, out of memory, or cut off; {self._remedy}")
        if note["kind"] == "interrupt":
            return error
        stopped = [self.called(rank) for rank, found in notes.items() if found and found["kind"] == "interrupt"]
        what = f"{', '.join(stopped)} interrupted" if stopped else "the connection between the processes broke"
        return RankError(f"{what}; {self._remedy}")

    def _left(self, rank: int, until: float) -> dict[str, Any] | None:
        """A rank's last note; None where its heart no longer beats, or at the end of the time."""
        beats, since = self._store.add(f"beat/{rank}", 0), time.monotonic()
        while time.monotonic() < until and time.monotonic() - since < _SURELY_STALE:
            if self._store.check([f"left/{rank}"]):
                found: dict[str, Any] = json.loads(self._store.get(f"left/{rank}"))
                return found
            time.sleep(0.05)
            if (now := self._store.add(f"beat/{rank}", 0)) != beats:
                beats, since = now, time.monotonic()
        return None

    def _linger(self) -> None:
        """Stay, with the store that may be in this process, until the others have heard."""
        until = time.monotonic() + _LINGER
        others = [rank for rank in range(self._size) if rank != self._rank]
        while time.monotonic() < until:
            if all(self._store.check([f"bye/{rank}"]) for rank in others):
                return
            time.sleep(0.05)


def ignore_signals() -> None:
    """From here on this process ends by itself: a launcher that saw another one die sends SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in _SENT:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_put_back() -> Iterator[None]:
    """Undo `ignore_signals` at the end."""
    before = {number: signal.getsignal(number) for number in _SENT}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that is not Python's cannot be
                    signal.signal(number, handler)
