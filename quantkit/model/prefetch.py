"""Reading ahead: a thread reads the next block's tensors while this one is worked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """One result ahead of whoever takes them in order.

    An error of the thread is raised where its result is taken. `close` waits for the thread, whatever it does.

    Args:
        read: what gives result i; runs in the thread.
        count: how many there are.
    """

    def __init__(self, read: Callable[[int], T], count: int) -> None:
        self._read, self._count = read, count
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quantkit-read-ahead")
        self._pending: tuple[int, Future[T]] | None = None

    def take(self, i: int) -> T:
        """Result i, read ahead or now; reading the one after it begins."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == i:
            found = pending[1].result()
        else:
            if pending is not None:
                pending[1].cancel()
            found = self._read(i)
        if i + 1 < self._count:
            self._pending = (i + 1, self._pool.submit(self._read, i + 1))
        return found

    def close(self) -> None:
        """Drop what was read ahead and end the thread."""
        self._pending = None
        self._pool.shutdown(wait=True, cancel_futures=True)
