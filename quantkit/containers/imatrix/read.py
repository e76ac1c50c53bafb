"""Importance matrices: the mean square of every column of each Linear's input, by the tensor's name in a GGUF file.

llama.cpp's tools write them in a GGUF file of sums and counts, and wrote a plain binary form (``.dat``) before that,
which many published ones still have. Both are read to the numbers that llama-quantize makes of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from quantkit.containers.gguf.file import MAGIC, GgufFile
from quantkit.errors import SourceError, UsageError

Array = npt.NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
"""What follows a tensor's name in the names of the two tensors that a GGUF file has for it."""


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        path: the file.
        datasets: what it was calibrated on, in the file's own words.
        chunks: windows of text that it was made from; 0 where the file does not say.
        entries: float32 [experts or 1, columns] by the tensor's name in a GGUF file. The older form keeps the experts
            of a stack one after the other in a single row.
    """

    path: Path
    datasets: tuple[str, ...]
    chunks: int
    entries: Mapping[str, Array]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that it has something to say about."""
        return tuple(self.entries)

    def importance(self, name: str, shape: tuple[int, ...] | None = None) -> Array | None:
        """Mean square of each input column of a tensor: float32 [experts or 1, columns]; None without an entry.

        An expert that saw no token has ones, as in llama-quantize: its columns count alike.

        Args:
            name: the tensor's name in a GGUF file, such as ``blk.0.attn_q.weight``.
            shape: of the tensor, [rows, columns] or [experts, rows, columns]; the result then has its experts apart.

        Raises:
            SourceError: another number of values than the shape asks for.
        """
        found = self.entries.get(name)
        if found is None or shape is None:
            return found
        experts = math.prod(shape[:-2])
        if found.size != experts * shape[-1]:
            raise SourceError(
                f"{self.path}: {found.size} values for {name}, whose shape {list(shape)} needs {experts * shape[-1]}; "
                "it was made for another model"
            )
        return found.reshape(experts, shape[-1])


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix, in the GGUF form or the older ``.dat`` form.

    Raises:
        UsageError: there is no such file.
        SourceError: it is something else, broken or cut short, or an entry holds what no mean square can be.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give an importance matrix (GGUF, or llama.cpp's older .dat)")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _Dat(path).read()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    if file.keys.get("general.type") != gguf.GGUFType.IMATRIX:
        raise SourceError(f"{path}: a GGUF file, but not an importance matrix; `quantkit imatrix` makes one")
    datasets = file.keys.get(gguf.Keys.IMatrix.DATASETS, [])
    chunks = file.keys.get(gguf.Keys.IMatrix.CHUNK_COUNT, 0)
    if not (isinstance(datasets, list) and all(isinstance(name, str) for name in datasets)):
        raise SourceError(f"{path}: broken importance matrix: {gguf.Keys.IMatrix.DATASETS} is no list of names")
    if not isinstance(chunks, int):
        raise SourceError(f"{path}: broken importance matrix: {gguf.Keys.IMatrix.CHUNK_COUNT} is no count")
    names = dict.fromkeys(
        tensor.removesuffix(s) for tensor in file.tensors for s in (SUMS, COUNTS) if tensor.endswith(s)
    )
    if not names:
        raise SourceError(f"{path}: an importance matrix without entries; make it again")
    return Imatrix(path, tuple(datasets), chunks, {name: _mean(file, name) for name in names})


def _mean(file: GgufFile, name: str) -> Array:
    """float32 [experts or 1, columns] of the entry `name`."""
    parts = []
    for suffix in (SUMS, COUNTS):
        tensor = file.tensors.get(name + suffix)
        if tensor is None or tensor.kind != gguf.GGMLQuantizationType.F32 or not tensor.bytes:
            raise SourceError(f"{file.path}: broken importance matrix: {name}{suffix} is missing, empty or not float32")
        parts.append(_checked(file.values(name + suffix).reshape(-1), file.path, name))
    sums, counts = parts
    if sums.size % counts.size:
        raise SourceError(f"{file.path}: {name} has {sums.size} sums for {counts.size} counts")
    counts = np.floor(counts + np.float32(0.5))[:, None]
    means: Array = np.ones((counts.size, sums.size // counts.size), dtype=np.float32)
    np.divide(sums.reshape(means.shape), counts, out=means, where=counts > 0)
    return means


def _checked(values: npt.NDArray[Any], path: Path, name: str) -> Array:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise SourceError(f"{path}: the entry {name} has a value that is negative or not finite; make the file again")
    checked: Array = values
    return checked


class _Dat:
    """The older form: int32 count of entries, then each one's name, calls and mean squares times calls."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        self._at = 0
        self._entries: dict[str, Array] = {}

    def read(self) -> Imatrix:
        for _ in range(self._count("entries")):
            name = self._text(self._count("characters of a name"))
            if name in self._entries:
                raise self._broken(f"it holds {name} twice")
            calls, length = self._int(), self._count(f"values of {name}")
            values = _checked(np.frombuffer(self._take(4 * length), "<f4").astype(np.float32), self._path, name)
            self._entries[name] = values[None] / np.float32(calls if calls > 0 else 1)
        # What follows came later: first the chunks, then the data set.
        chunks = self._int() if self._left() else 0
        length = self._int() if self._left() else 0
        datasets = (self._text(length),) if length > 0 else ()
        if self._left():
            raise self._broken(f"{self._left()} bytes follow its end")
        return Imatrix(self._path, datasets, max(chunks, 0), self._entries)

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._broken("a name is no text") from None

    def _count(self, what: str) -> int:
        value = self._int()
        if value < 1:
            raise self._broken(f"{value} {what}")
        return value

    def _int(self) -> int:
        value: int = struct.unpack("<i", self._take(4))[0]
        return value

    def _take(self, size: int) -> bytes:
        if size > self._left():
            raise self._broken(f"it ends {size - self._left()} bytes early")
        self._at += size
        return bytes(self._bytes[self._at - size : self._at])

    def _left(self) -> int:
        return len(self._bytes) - self._at

    def _broken(self, why: str) -> SourceError:
        if not self._entries:  # the form has no magic number: a file of another kind ends here
            return SourceError(
                f"{self._path}: broken, or no importance matrix ({why}); give GGUF or llama.cpp's older .dat form"
            )
        return SourceError(f"{self._path}: broken or cut short importance matrix ({why}); download or make it again")
