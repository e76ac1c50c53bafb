"""Importance matrices: the mean square of every column of each Linear's input, by the tensor's name in a GGUF file.

llama.cpp's tools write them in a GGUF file, per tensor the sums of squared inputs and over how many tokens, and wrote a
plain binary form (``.dat``) before that, which many published ones still have. Both are read to the numbers that
llama-quantize makes of them; the first is written.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from quantkit.codes.kinds import Kind
from quantkit.containers.gguf.file import MAGIC, GgufFile
from quantkit.containers.readback import ReadBack
from quantkit.errors import SourceError, UsageError

Array = npt.NDArray[np.float32]

# What follows a tensor's name in the names of the two tensors that a GGUF file has for it.
_SUMS, _COUNTS = ".in_sum2", ".counts"


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


@dataclass(frozen=True)
class Entry:
    """What one tensor's Linears read; of a stack of experts each has a row.

    Attributes:
        sums: float32 [experts or 1, columns], squares summed over tokens.
        counts: float32 [experts or 1, 1], the tokens.
    """

    sums: Array
    counts: Array

    @classmethod
    def empty(cls, experts: int, columns: int) -> Entry:
        """An entry that saw nothing yet."""
        return cls(np.zeros((experts, columns), dtype=np.float32), np.zeros((experts, 1), dtype=np.float32))

    @property
    def bytes(self) -> int:
        """Of both tensors' data."""
        return self.sums.nbytes + self.counts.nbytes


def write_imatrix(
    path: Path,
    entries: Mapping[str, Entry],
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
    provenance: Mapping[str, str],
) -> None:
    """Write the file and read it back; equal arguments give equal bytes.

    Args:
        path: where nobody takes it for finished yet (`quantkit.runs.outputs.staged_files`).
        entries: by the tensor's name in a GGUF file.
        datasets: names of the calibration data, without local paths.
        chunks, chunk_size: windows of text, and tokens in each.
        provenance: further keys.

    Raises:
        OutputError: other data was read back than was written.
    """
    file = GGUFWriter(path, arch="")  # which leaves general.architecture out, as llama.cpp's files have none
    file.add_type(gguf.GGUFType.IMATRIX)
    file.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    file.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, chunks)
    file.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, chunk_size)
    for key, value in provenance.items():
        file.add_string(key, value)
    read_back = ReadBack()
    for name, entry in sorted(entries.items()):
        for part, both in ((_SUMS, entry.sums), (_COUNTS, entry.counts)):
            values = both[0] if len(both) == 1 else both  # ggml stores no dimension of 1
            file.add_tensor(name + part, values)
            read_back.wrote(path, name + part, values)
    try:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
    finally:
        file.close()
    stored = GgufFile(path)
    read_back.compare(lambda _, name: [stored.values(name)])


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
        tensor.removesuffix(s) for tensor in file.tensors for s in (_SUMS, _COUNTS) if tensor.endswith(s)
    )
    if not names:
        raise SourceError(f"{path}: an importance matrix without entries; make it again")
    return Imatrix(path, tuple(datasets), chunks, {name: _mean(file, name) for name in names})


def _mean(file: GgufFile, name: str) -> Array:
    """float32 [experts or 1, columns] of the entry `name`."""
    parts = []
    for suffix in (_SUMS, _COUNTS):
        tensor = file.tensors.get(name + suffix)
        if tensor is None or tensor.kind != Kind.F32 or not tensor.bytes:
            raise SourceError(f"{file.path}: broken importance matrix: {name}{suffix} is missing, empty or not float32")
        parts.append(_checked(file.values(name + suffix).reshape(-1), file.path, name))
    sums, counts = parts
    if sums.size % counts.size:
        raise SourceError(f"{file.path}: {name} has {sums.size} sums for {counts.size} counts")
    counts = np.floor(counts + np.float32(0.5))[:, None]
    means: Array = np.ones((counts.size, sums.size // counts.size), dtype=np.float32)
    np.divide(sums.reshape(means.shape), counts, out=means, where=counts > 0)
    return means


def _checked(values: Array, path: Path, name: str) -> Array:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise SourceError(f"{path}: the entry {name} has a value that is negative or not finite; make the file again")
    return values


class _Dat:
    """The older form: int32 count of entries, then each one's name, calls and mean squares times calls."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        self._at = 0
        self._entries: dict[str, Array] = {}

    def read(self) -> Imatrix:
        for _ in range(self._int("entries")):
            name = self._text(self._int("characters of a name"))
            if name in self._entries:
                raise self._broken(f"it holds {name} twice")
            calls, length = self._int(), self._int(f"values of {name}")
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

    def _int(self, counted: str = "") -> int:
        value: int = struct.unpack("<i", self._take(4))[0]
        if counted and value < 1:
            raise self._broken(f"{value} {counted}")
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
