"""The GGUF container, versions 2 and 3: keys, and tensors that stay on disk until they are asked for.

gguf's own reader makes several arrays of every string, which takes half a minute for a vocabulary of 262144 tokens;
this one reads it in a second. Tensor types and dequantizers are gguf's (`codes.kinds`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.codes.kinds import SIZES, Kind, dequantize
from quantkit.containers.hf.header import read_into
from quantkit.errors import SourceError

Array = npt.NDArray[Any]
Blocks = tuple[Kind, npt.NDArray[np.uint8]]
"""A tensor as it is stored: its type, and the bytes of its rows."""

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
# Bytes of a name, as llama.cpp has them for tensors; a longer one is a broken file. Keys are quoted in errors.
_LONGEST_NAME, _LONGEST_KEY = 63, 1024
_LARGEST_ALIGNMENT = 2**31
# Bytes that the shortest of each takes: a count of more of them than the file has room for is not believed.
_LEAST_STRING, _LEAST_KEY, _LEAST_TENSOR = 8, 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# value types of the format by their number
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "|b1")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_KINDS = {int(kind): kind for kind in SIZES}
# Repacked forms of 2024; what is packed so is made when a file is loaded now.
_REMOVED = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
_NUMBERS = 128  # a larger number is damage and no newer type
_PLAIN = {Kind.F32: "<f4", Kind.F16: "<f2"}
_WINDOW = 1 << 16
_PIECE = 1 << 20


class FileBytes:
    """The bytes of one file, counted from 0, read as they are asked for.

    Nothing is mapped: a mapping counts where address space is limited.

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
        found: Array = np.empty(stop - start, dtype=np.uint8)
        read_into(self.path, start, found.data)
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


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor; `offset` counts bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: Kind
    offset: int
    bytes: int


class GgufFile:
    """One file, its header read.

    Attributes:
        path: the file.
        keys: its metadata: numbers, strings, booleans, and lists of them.
        tensors: what it holds, by name, with shapes in numpy's order ([out, in]).

    Raises:
        SourceError: broken, cut short or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._bytes = FileBytes(path)
            self._read_header()
        except (ValueError, KeyError, IndexError, OverflowError, struct.error, OSError) as error:
            raise self._broken(error) from error

    def blocks(self, name: str, expert: int | None = None, rows: slice = slice(None)) -> Blocks:
        """Type and bytes of a tensor, uint8 [rows, bytes of a row]; a vector is one row.

        With `expert`, those of one part of a stack: of what lies at that place along the first dimension. With `rows`
        only these of it.

        Raises:
            SourceError: the file cannot be read, or has become shorter.
        """
        tensor = self.tensors[name]
        start, size, count = tensor.offset, tensor.bytes, math.prod(tensor.shape[:-1])
        if expert is not None:
            size, count = size // tensor.shape[0], count // tensor.shape[0]
            start += expert * size
        first, last, _ = rows.indices(count)
        row = size // count
        try:
            found = self._bytes.read(start + first * row, start + last * row)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot read {name}: {error}") from error
        return tensor.kind, found.reshape(last - first, row)

    def values(self, name: str, expert: int | None = None, rows: slice = slice(None)) -> Array:
        """A tensor's values, those of one part of a stack or of some rows, dequantized to float32 where it is stored as
        blocks.

        Raises:
            SourceError: gguf has no dequantizer for its type, or the file cannot be read.
        """
        kind, packed = self.blocks(name, expert, rows)
        shape = self.tensors[name].shape
        shape = shape if expert is None else shape[1:]
        if rows != slice(None):
            shape = (len(packed), *shape[1:])
        if kind in _PLAIN:
            return packed.reshape(-1).view(_PLAIN[kind]).reshape(shape)
        try:
            with np.errstate(all="ignore"):  # of scales that are not finite, which whoever takes the values looks for
                values: Array = dequantize(packed, kind).reshape(shape)
        except NotImplementedError as error:
            raise SourceError(f"{self.path}: {kind.name} of {name} has no dequantizer") from error
        return values

    def _broken(self, why: object) -> SourceError:
        return SourceError(f"{self.path}: broken or cut short GGUF file ({why}); download it again")

    def _read_header(self) -> None:
        self._at = 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise SourceError(f"{self.path}: GGUF version {version} cannot be read, only 2 and 3; convert it again")
        tensors, keys = self._number("<u8"), self._number("<u8")
        if tensors * _LEAST_TENSOR + keys * _LEAST_KEY > self._bytes.size - self._at:
            raise ValueError(f"it has no room for {keys} keys and {tensors} tensors")
        for _ in range(keys):
            name = self._name("a key", _LONGEST_KEY)
            if name in self.keys:
                raise ValueError(f"it holds key {name} twice")
            kind = self._number("<u4")
            if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
                raise ValueError(f"the value of {name} is of type {kind}, which the format has not")
            self.keys[name] = self._value(kind, name)
        found: dict[str, StoredTensor] = {}
        for _ in range(tensors):
            name, tensor = self._tensor()
            if name in found:
                raise ValueError(f"it holds {name} twice")
            found[name] = tensor
        self._place(found)

    def _place(self, found: dict[str, StoredTensor]) -> None:
        """Count the tensors' offsets from the start of the file, and check that each has a place of its own."""
        alignment = self.keys.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {str(alignment)[:20]}, no power of two")
        start = self._at + -self._at % alignment
        for name, tensor in found.items():
            if tensor.offset % alignment:
                raise ValueError(f"the offset of {name} is no multiple of {alignment}")
            self.tensors[name] = replace(tensor, offset=start + tensor.offset)
            if start + tensor.offset + tensor.bytes > self._bytes.size:
                raise ValueError(f"it ends before the end of {name}")
        inside = sorted(self.tensors.items(), key=lambda item: item[1].offset)
        for (one, tensor), (next_, after) in pairwise(inside):
            if tensor.offset + tensor.bytes > after.offset:
                raise ValueError(f"{one} and {next_} overlap")

    def _tensor(self) -> tuple[str, StoredTensor]:
        name = self._name("a tensor's name", _LONGEST_NAME)
        dimensions = self._number("<u4")
        if not 0 < dimensions <= _DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        number = self._number("<u4")
        if number in _REMOVED:
            raise SourceError(
                f"{self.path}: {name} is of type {_REMOVED[number]}, which llama.cpp has removed: it holds the "
                f"blocks of {_REMOVED[number][:-4]} in another order; take the {_REMOVED[number][:-4]} file instead"
            )
        if max(_KINDS) < number < _NUMBERS:
            raise SourceError(
                f"{self.path}: {name} is of type {number}, which the installed gguf package does not know; try "
                "pip install --upgrade gguf"
            )
        if number not in _KINDS:
            raise ValueError(f"{name} is of type {number}, which is not known")
        size = bytes_of(name, shape, _KINDS[number])
        return name, StoredTensor(shape, _KINDS[number], self._number("<u8"), size)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        kind, length = self._number("<u4"), self._number("<u8")
        if kind == _ARRAY:  # which nobody writes, and which could be nested without end
            raise ValueError(f"{key} is an array of arrays")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()
        if kind != _STRING:
            raise ValueError(f"the values of {key} are of type {kind}, which the format has not")
        if length * _LEAST_STRING > self._bytes.size - self._at:
            raise ValueError(f"it has no room for the {length} strings of {key}")
        return self._strings(length)

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has hundreds of thousands: a loop without calls reads them in a tenth of a second."""
        strings, at = [], self._at
        header, base = self._bytes.window(at, 0)
        for _ in range(count):
            if at + 8 - base > len(header):
                header, base = self._bytes.window(at, 8)
            stop = at + 8 + int.from_bytes(header[at - base : at + 8 - base], "little")
            if stop - base > len(header):
                header, base = self._bytes.window(at, stop - at)
            strings.append(str(header[at + 8 - base : stop - base], "utf-8", "replace"))
            at = stop
        self._at = at
        return strings

    def _name(self, what: str, longest: int) -> str:
        """What a key or a tensor is called; errors quote it, so it must be one short line."""
        length = self._number("<u8")
        if length > longest:
            raise ValueError(f"{what} of {length} bytes")
        return self._as_name(what, self._take(length))

    def _as_name(self, what: str, raw: bytes) -> str:
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        if not name.isprintable() or not name:
            raise ValueError(f"{what} is no text: {raw[:32]!r}")
        return name

    def _number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _take(self, size: int) -> bytes:
        """The next bytes of the header."""
        header, base = self._bytes.window(self._at, size)
        start = self._at
        self._at += size
        return header[start - base : self._at - base]


def bytes_of(name: str, shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor. Raises ValueError where it has no values, or its rows are no whole number of blocks."""
    block, size = SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"{name} of shape {list(shape)} cannot be {kind.name}")
    return math.prod(shape) // block * size


def read_keys(path: Path) -> Mapping[str, Any]:
    """The metadata of one file. Raises SourceError."""
    return GgufFile(path).keys
