"""A GGUF file, or several that make one model, written tensor by tensor.

Where each tensor lies follows from the shapes, so tensors and single experts may come in any order and no more than one
of them is in memory. What comes before them (version 3) is to the byte what gguf-py writes, which packs every word of a
vocabulary by calls of its own: a third of a second for SmolLM2's, where a file of this size is copied in as long.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
from gguf import GGUFValueType

from quantkit.codes.kinds import SIZES, Kind
from quantkit.containers.gguf.file import MAGIC, Array, FileBytes
from quantkit.containers.gguf.tensors import GgufTensor
from quantkit.containers.hf.write import parts_of
from quantkit.containers.readback import ByTurns, ReadBack
from quantkit.errors import OutputError, UsageError

TypedTensor = tuple[GgufTensor, Kind]

_PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16}
_ALIGNMENT = 32  # what every tensor's place is a multiple of
_VERSION = 3
_TYPES: dict[type, tuple[GGUFValueType, str]] = {
    bool: (GGUFValueType.BOOL, "?"),
    int: (GGUFValueType.UINT32, "<u4"),
    float: (GGUFValueType.FLOAT32, "<f4"),
    np.uint16: (GGUFValueType.UINT16, "<u2"),
    np.int32: (GGUFValueType.INT32, "<i4"),
}
_TYPES_IN_LISTS = {**_TYPES, int: _TYPES[np.int32]}
_INT, _LONG = struct.Struct("<I"), struct.Struct("<Q")


def packed_bytes(tensor: GgufTensor, kind: Kind) -> int:
    """Bytes of a tensor's data.

    Raises:
        UsageError: its rows are no whole number of blocks of this type.
    """
    block, size = SIZES[kind]
    if tensor.shape[-1] % block:
        raise UsageError(f"{tensor.name} has {tensor.shape[-1]} columns; {kind.name} needs a multiple of {block}")
    return math.prod(tensor.shape) // block * size


class PlacedWriter:
    """Files of which each tensor has its place from the start; what was written is read back.

    They have their final names from the start too, so they must lie where nobody takes them for finished
    (`quantkit.runs.outputs.staged_files`).
    """

    def __init__(self, pending: Iterable[str]) -> None:
        self._pending = set(pending)
        self._read_back = ReadBack()
        self._spans: dict[tuple[Path, str], tuple[int, int]] = {}
        self._files = ByTurns()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def finish(self) -> None:
        """Close the files, read them back.

        Raises:
            OutputError: a planned tensor was never written, or other data was read back than was written.
        """
        if self._pending:
            raise OutputError(f"{len(self._pending)} planned tensors were not written, such as {min(self._pending)}")
        self._close()
        self._read_back.compare(lambda path, name: FileBytes(path).pieces(*self._spans[path, name]))

    def _write(self, path: Path, at: int, name: str, *content: bytes | memoryview) -> None:
        self._files.write(path, at, content)
        self._read_back.wrote(path, name, *content)
        self._spans[path, name] = at, at + sum(map(len, content))

    def _close(self) -> None:
        self._files.close()


def part_names(path: Path, tensors: Sequence[TypedTensor], split_max_bytes: int = 0) -> list[str]:
    """What the files are called that `GgufWriter` writes: the file's own name, or those of its parts."""
    return _names(path, len(_parts(tensors, split_max_bytes)))


def _names(path: Path, count: int) -> list[str]:
    return [path.name] if count == 1 else [f"{path.stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def _parts(tensors: Sequence[TypedTensor], split_max_bytes: int) -> list[list[TypedTensor]]:
    return parts_of(tensors, lambda typed: packed_bytes(*typed), split_max_bytes)


def head_bytes(architecture: str, keys: Mapping[str, Any], tensors: Sequence[TypedTensor]) -> int:
    """What a file of one part has beside the tensors' data, padding included."""
    table = [(tensor.name, tensor.shape, kind, packed_bytes(tensor, kind)) for tensor, kind in tensors]
    padding = sum(_padded(size) - size for _, _, _, size in table)
    return _padded(len(_head(_first_keys(architecture, keys, tensors), table))) + padding


def _first_keys(architecture: str, keys: Mapping[str, Any], tensors: Sequence[TypedTensor]) -> dict[str, Any]:
    """Keys of a file's first part."""
    return {"general.architecture": architecture, **keys, "general.size_label": _size_label(tensors)}


class GgufWriter(PlacedWriter):
    """Writes the planned tensors, each exactly once.

    Order of use: `write` for every source of every tensor, `finish`.

    Attributes:
        paths: the files, in order: `path`, or its parts (``NAME-00001-of-00003.gguf``).
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        keys: Mapping[str, Any],
        tensors: Sequence[TypedTensor],
        split_max_bytes: int = 0,
    ) -> None:
        """Open the files and write all but the tensors' data.

        Args:
            path: the file; parts lie beside it.
            architecture: general.architecture.
            keys: all further keys (`quantkit.containers.gguf.file_keys`).
            tensors: in the file's order, each with the type that its data will have.
            split_max_bytes: the most bytes of tensors that a part holds, where they are more than one; 0 for one file.

        Raises:
            UsageError: a tensor's rows are no whole number of blocks of its type.
        """
        parts = _parts(tensors, split_max_bytes)
        self.paths = [path.with_name(name) for name in _names(path, len(parts))]
        self._tensors = {tensor.name: (tensor, kind) for tensor, kind in tensors}
        self._parts: dict[str, list[tuple[GgufTensor, int]]] = {}
        for tensor, _ in tensors:
            for i, source in enumerate(tensor.sources):
                self._parts.setdefault(source, []).append((tensor, i))
        super().__init__(f"{source} of {tensor.name}" for source, made in self._parts.items() for tensor, _ in made)
        self._place: dict[str, tuple[int, int]] = {}
        first = _first_keys(architecture, keys, tensors)
        try:
            for number, part in enumerate(parts):
                self._open_part(number, first if number == 0 else {}, part, len(parts))
        except BaseException:
            self._close()
            raise

    def write(self, source: str, data: Array, name: str | None = None) -> None:
        """Write what a published tensor became; its place in a stack, and the order of its rows there, is seen to.

        Args:
            source: published name.
            name: of the file's tensor, where several are made of the published one; None for all of them.
            data: rows in their published order: uint8 [rows, bytes of a row], or float32 or float16 values where that
                is the tensor's type.
        """
        for tensor, part in self._parts[source]:
            if name in (None, tensor.name):
                self._pending.remove(f"{source} of {tensor.name}")
                self._write_rows(tensor, part, tensor.ordered(data))

    def finish(self) -> None:
        """Write the computed tensors, close the files, read them back. Raises OutputError."""
        for tensor, _ in self._tensors.values():
            if not tensor.sources:
                self._write_rows(tensor, 0, np.array(tensor.computed, dtype=np.float32))
        super().finish()

    def _open_part(self, number: int, keys: Mapping[str, Any], tensors: Sequence[TypedTensor], parts: int) -> None:
        """Write a part's head, and give its file the final size."""
        table = [(tensor.name, tensor.shape, kind, packed_bytes(tensor, kind)) for tensor, kind in tensors]
        of_parts = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(parts),
            "split.tensors.count": np.int32(len(self._tensors)),
        }
        head = _head({**keys, **(of_parts if parts > 1 else {})}, table)
        at = _padded(len(head))
        for name, _, _, size in table:
            self._place[name] = number, at
            at += _padded(size)
        self.paths[number].write_bytes(b"")
        os.truncate(self.paths[number], at)
        self._write(self.paths[number], 0, "its head", head)

    def _write_rows(self, tensor: GgufTensor, part: int, data: Array) -> None:
        kind = self._tensors[tensor.name][1]
        share = packed_bytes(tensor, kind) // max(len(tensor.sources), 1)
        assert data.dtype in (np.uint8, _PLAIN.get(kind, np.uint8)), (tensor.name, data.dtype)
        assert data.nbytes == share, (tensor.name, data.shape)
        number, start = self._place[tensor.name]
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        name = tensor.name if len(tensor.sources) < 2 else f"{tensor.name}, part {part}"
        self._write(self.paths[number], start + part * share, name, content)


def _size_label(tensors: Sequence[TypedTensor]) -> str:
    """How many parameters, as models are called by: "135M", or of experts "8x7B"."""
    shapes = {tensor.name: tensor.shape for tensor, _ in tensors}
    experts = [shape for name, shape in shapes.items() if "_exps." in name]
    total = sum(map(math.prod, shapes.values()))
    of_one = sum(math.prod(shape[1:]) for shape in experts)
    shared = total - sum(map(math.prod, experts))
    count = sum(shape[0] for shape in experts) // len(experts) if experts else 0
    label: str = gguf.size_label(total, shared, of_one, count)
    return label


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _head(keys: Mapping[str, Any], table: Sequence[tuple[str, tuple[int, ...], Kind, int]]) -> bytes:
    """What comes before the tensors, which begin at the next multiple of the alignment, in the table's order.

    Args:
        keys: an int is written as uint32, a float as float32, numbers of numpy as what they are, a list by what its
            first value is (an int: int32). Without empty texts and lists, which the format has no use for.
        table: of each tensor its name, its shape as numpy has it, its type, its bytes.

    Raises:
        struct.error: a negative int.
    """
    said = {key: value for key, value in keys.items() if not (isinstance(value, str | list) and not value)}
    parts = [MAGIC, _INT.pack(_VERSION), _LONG.pack(len(table)), _LONG.pack(len(said))]
    for key, value in said.items():
        parts += [_strings([key]), _value(value)]
    offset = 0
    for name, shape, kind, size in table:
        parts += [_strings([name]), _INT.pack(len(shape)), *map(_LONG.pack, shape[::-1]), _INT.pack(kind)]
        parts.append(_LONG.pack(offset))
        offset += _padded(size)
    return b"".join(parts)


def _value(value: Any) -> bytes:
    """A value's type, and the value; of a list the type and number of what is in it."""
    values = value if isinstance(value, list) else [value]
    assert len(set(map(type, values))) == 1, set(map(type, values))
    if isinstance(values[0], str):
        kind, packed = GGUFValueType.STRING, _strings(values)
    else:
        kind, dtype = (_TYPES if values is not value else _TYPES_IN_LISTS)[type(values[0])]
        packed = np.array(values, dtype=dtype).tobytes()
    if values is not value:
        return _INT.pack(kind) + packed
    return _INT.pack(GGUFValueType.ARRAY) + _INT.pack(kind) + _LONG.pack(len(values)) + packed


def _strings(values: list[str]) -> bytes:
    """Texts one after the other, each after its length."""
    encoded = [value.encode() for value in values]
    lengths = map(_LONG.pack, map(len, encoded))
    return b"".join(chain.from_iterable(zip(lengths, encoded, strict=True)))
