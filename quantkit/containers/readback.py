"""Files of a model are written by turns, and read back before they take their place: a disk fails without a word. And
what was not 0 is no 0 in the type that it is written in: float16 holds nothing below 2^-25."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import OutputError
from quantkit.late import torch
from quantkit.progress import Progress

_MOST = 0.01  # of a tensor's values that are not 0
_LEAST = 2.0**-25  # half of float16's smallest number: what is not larger becomes 0


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


class Underflow:
    """Collects the tensors of which float16 makes zeros of more than 1 % of the values that were none."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def see(self, name: str, values: torch.Tensor, held: torch.dtype | None = None) -> None:
        """Count values of a tensor that are to be written as `held` (None: float16), or as codes whose scales are."""
        if held not in (None, torch.float16) or not values.is_floating_point() or values.dtype == torch.float16:
            return
        nonzero = int(torch.count_nonzero(values))
        counts = self._counts.setdefault(name, [0, 0])
        counts[0] += nonzero - int(torch.count_nonzero(values.abs() > _LEAST))
        counts[1] += nonzero

    def warn(self, progress: Progress, remedy: str) -> None:
        """Say it, where there is any: once, with what helps."""
        found = {name: lost / nonzero for name, (lost, nonzero) in self._counts.items() if lost > _MOST * nonzero}
        if found:
            name, share = max(found.items(), key=lambda item: item[1])
            others = f", and of {len(found) - 1} other tensors" if len(found) > 1 else ""
            progress.warn(
                f"float16 makes zeros of {100 * share:.3g} % of the values of {name}{others}, which are below 3e-8 and "
                f"were none; {remedy}"
            )
