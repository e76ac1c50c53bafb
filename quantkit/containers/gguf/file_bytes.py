"""A file's bytes, read as they are asked for. Nothing is mapped: a mapping counts where address space is limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_WINDOW = 1 << 16
_PIECE = 1 << 20


class FileBytes:
    """The bytes of one file, counted from 0.

    Attributes:
        path: the file.
        size: how many bytes it has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._window, self._start = b"", 0

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """uint8 [stop - start], memory of its own; any number of threads may read at once.

        Raises:
            OSError: the disk fails, or the file has become shorter.
        """
        found: npt.NDArray[Any] = np.empty(stop - start, dtype=np.uint8)
        rest = found.data
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while rest and (count := file.readinto(rest)):  # at most 2 GB at once
                rest = rest[count:]
        if rest:
            raise OSError("the file has become shorter")
        return found

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """The same bytes one piece after the other, each valid until the next one; fewer where the file has become
        shorter. Raises OSError.
        """
        piece = memoryview(bytearray(min(_PIECE, stop - start)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < stop and (count := file.readinto(piece[: stop - start])):
                yield piece[:count]
                start += count

    def window(self, start: int, size: int) -> tuple[bytes, int]:
        """At least `size` bytes from `start`, and where the first of them is in the file: for a header's small parts.

        Raises:
            ValueError: the file ends before.
        """
        if start + size > self.size:
            raise ValueError("it ends within its header")
        if not self._start <= start <= start + size <= self._start + len(self._window):
            stop = min(max(start + size, start + _WINDOW), self.size)
            self._window, self._start = self.read(start, stop).tobytes(), start
        return self._window, self._start
