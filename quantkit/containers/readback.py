"""Files of a model are written by turns, and read back before they take their place: a disk fails without a word."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import OutputError


class ByTurns:
    """Writes to files that are there already, of which one is open at a time: a process may not have many open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def write(self, path: Path, at: int, content: Iterable[bytes | memoryview]) -> None:
        """Write content, one part after the other, at a place in a file."""
        if self._file is None or self._path != path:
            self.close()
            self._path, self._file = path, path.open("r+b")
        self._file.seek(at)
        self._file.writelines(content)

    def close(self) -> None:
        """Close the file that is open; another write opens its own again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class ReadBack:
    """Size and checksum of everything that a writer wrote.

    Use: `wrote` for every tensor, and `compare` when the files are closed.
    """

    def __init__(self) -> None:
        self._written: dict[tuple[Path, str], tuple[int, int]] = {}

    def wrote(self, path: Path, name: str, *content: Any) -> None:
        """Note what a reader is to find under a name in a file, in contiguous buffers one after the other."""
        self._written[path, name] = _sum(content)

    def compare(
        self, read: Callable[[Path, str], Iterable[Any]], advance: Callable[[int], None] = lambda done: None
    ) -> None:
        """Read everything once and compare.

        Args:
            read: what a file holds under a name, in pieces of any size.
            advance: is told of each that was compared.

        Raises:
            OutputError: names the first that holds something else.
        """
        for (path, name), written in self._written.items():
            if _sum(read(path, name)) != written:
                raise OutputError(
                    f"{path.name}: {name}: other data was read back than was written; the disk may be failing"
                )
            advance(1)


def _sum(pieces: Iterable[Any]) -> tuple[int, int]:
    size = checksum = 0
    for piece in pieces:
        size += memoryview(piece).nbytes
        checksum = zlib.crc32(piece, checksum)
    return size, checksum
