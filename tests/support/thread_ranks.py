"""Ranks that are threads: enough to try every number of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from quantkit.runs.ranks import Ranks

T = TypeVar("T")


class Threads(Ranks):
    """One of them."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def gather(self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait()
        parts = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait()
        return parts

    def exchange(self, data: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(data.clone())

    def add(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.exchange(tensor)).sum(0))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self.exchange(tensor)[source])


def together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What every rank found."""
    barrier = threading.Barrier(size, timeout=60)
    board: dict[int, Any] = {}
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]
