"""Batches side by side: each worker is a thread that runs whole forwards with its share of torch's threads.

A forward of one batch at a time hands every operation out to all cores and waits for the slowest, and does what lies
between operations on one core. Forwards that share nothing need not wait: SmolLM2's took 0.79 to 0.86 of the time on
2 cores (docs/speed.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import chain, zip_longest
from typing import Generic, TypeVar, Union

from quantkit.codes import StoredCodes
from quantkit.late import torch
from quantkit.runs.ranks import share_of

T = TypeVar("T")
Stored = Union["torch.Tensor", StoredCodes]

BATCH_TOKENS = 1024  # on a CPU, where workers run side by side, larger batches are no faster
_GPU_BATCH_TOKENS = 16384  # launches take as long for a small batch, and a GPU waits for them
_GPU_BATCHES = 16  # for processes to share, before batches grow
MOST = 8  # workers; a power of two; each holds the tensors of a forward


class Workers:
    """Threads that share the items 0, 1, 2 ... of a list, each a run of them, in order and always in the same thread.

    One worker is the caller's thread itself. A context manager, which ends the threads.

    Args:
        shares: each one's items, one run after another.

    Attributes:
        count: how many work at a time.
    """

    def __init__(self, shares: Sequence[range]) -> None:
        self._shares, self.count = list(shares), len(shares)
        self._pools: list[ThreadPoolExecutor] = []
        if len(shares) < 2:
            return
        threads = torch.get_num_threads()
        each = max(1, threads // len(shares))
        for _ in shares:
            self._pools.append(ThreadPoolExecutor(1, "quantkit-worker"))
            # The first question gives a new thread everybody's number of threads for its operations; then its own.
            self._pools[-1].submit(torch.get_num_threads).result()
            self._pools[-1].submit(torch.set_num_threads, each).result()
        torch.set_num_threads(threads)  # a thread that begins later takes the number that was set last

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def map(self, task: Callable[[int], T]) -> list[T]:
        """The results of all items, in order.

        The error of the first item that has one is raised, when no worker is at work any more; so is an interrupt.
        """
        return self.together(task, self._shares)

    def each(self, task: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """(item, its result) of all items, not in order: each worker goes on when what the others made was taken."""
        for items in self.rounds():
            yield from zip(chain.from_iterable(items), self.together(task, items), strict=True)

    def rounds(self) -> Iterator[list[list[int]]]:
        """Of each worker its next item, if it has one; until all have had their turn."""
        for step in zip_longest(*self._shares):
            yield [[i] if i is not None else [] for i in step]

    def together(self, task: Callable[[int], T], shares: Sequence[Sequence[int]]) -> list[T]:
        """As `map`, of some of the items, by worker."""
        if not self._pools:
            return [task(i) for share in shares for i in share]
        inference = torch.is_inference_mode_enabled()  # each thread has its own

        def run(i: int) -> T:
            with torch.inference_mode(inference):
                return task(i)

        futures: list[Future[T]] = []
        try:
            for pool, share in zip(self._pools, shares, strict=True):
                futures += [pool.submit(run, i) for i in share]
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
            futures.clear()  # an error's traceback holds this frame, and would hold all results


def batch_windows(device: torch.device, windows: int, seq_len: int) -> int:
    """How many of so many windows are run as one batch."""
    most = BATCH_TOKENS
    if device.type != "cpu":
        most = min(_GPU_BATCH_TOKENS, max(BATCH_TOKENS, windows * seq_len // _GPU_BATCHES))
    return max(1, most // seq_len)


def worker_count(device: torch.device, items: int) -> int:
    """How many workers pay: a power of two that torch's threads can be dealt out to evenly; one on a GPU."""
    if device.type != "cpu":
        return 1
    return max(1, min(math.gcd(MOST, torch.get_num_threads()), items))


def even_shares(items: int, workers: int) -> list[range]:
    """Items for so many workers, fewer where there are not as many items."""
    return [share for k in range(workers) if (share := share_of(items, k, workers))]


def uploaded(
    stored: dict[str, Stored], device: torch.device, user: torch.cuda.Stream | None = None
) -> dict[str, Stored]:
    """The tensors and codes on `device`, for the thread that read them, which waits for the copies, and nobody else.

    Each goes through pinned memory, from which the GPU copies by itself. Nothing happens where the device is a CPU.
    `user` is the stream that they are used on, and those before them were.
    """
    if device.type != "cuda":
        return stored
    stream = _copying(device)

    def sent(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.contiguous().pin_memory()
        arrived = torch.empty_like(pinned, device=device)
        # The memory may be what an earlier block's tensor had: its last use was queued before it was let go.
        stream.wait_stream(torch.cuda.default_stream(device) if user is None else user)
        return arrived.copy_(pinned, non_blocking=True)

    with torch.cuda.stream(stream):
        for name in list(stored):
            one = stored.pop(name)
            stored[name] = sent(one) if isinstance(one, torch.Tensor) else one.placed(sent)
    stream.synchronize()
    return stored


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
