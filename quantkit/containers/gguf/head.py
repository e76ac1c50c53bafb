"""The bytes that come before a GGUF file's tensors, version 3: counts, keys, the table of tensors.

To the byte what gguf-py writes, which packs every word of a vocabulary by calls of its own: a third of a second for
SmolLM2's, where a file of this size is copied in as long.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from quantkit.containers.gguf.file import MAGIC

ALIGNMENT = 32
"""What every tensor's place is a multiple of."""

Row = tuple[str, tuple[int, ...], GGMLQuantizationType, int]
"""A tensor in the table: its name, its shape as numpy has it, its type, its bytes."""

_VERSION = 3
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
_TYPES_IN_LISTS = {**_TYPES, int: GGUFValueType.INT32}
_DTYPES = {
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
}
_INT, _LONG = struct.Struct("<I"), struct.Struct("<Q")


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return size + -size % ALIGNMENT


def pack_head(keys: Mapping[str, Any], table: Sequence[Row]) -> bytes:
    """The head of a file; its tensors begin at the next multiple of the alignment, in the table's order.

    Args:
        keys: an int is written as uint32, a float as float32, numbers of numpy as what they are, a list by what its
            first value is (an int: int32). Without empty texts and lists, which the format has no use for.
        table: the tensors.

    Raises:
        struct.error: a negative int.
    """
    said = {key: value for key, value in keys.items() if not (isinstance(value, str | list) and not value)}
    parts = [MAGIC, _INT.pack(_VERSION), _LONG.pack(len(table)), _LONG.pack(len(said))]
    for key, value in said.items():
        parts += [_strings([key]), _value(value)]
    offset = 0
    for name, shape, kind, size in table:
        dimensions = shape[::-1]
        parts += [_strings([name]), _INT.pack(len(shape)), *map(_LONG.pack, dimensions), _INT.pack(kind)]
        parts.append(_LONG.pack(offset))
        offset += padded(size)
    return b"".join(parts)


def _value(value: Any) -> bytes:
    """A value's type, and the value."""
    if isinstance(value, str):
        return _INT.pack(GGUFValueType.STRING) + _strings([value])
    if isinstance(value, list):
        return _INT.pack(GGUFValueType.ARRAY) + _list(value)
    if isinstance(value, np.uint16 | np.int32):
        kind = GGUFValueType.UINT16 if isinstance(value, np.uint16) else GGUFValueType.INT32
        return _INT.pack(kind) + np.array(value, dtype=_DTYPES[kind]).tobytes()
    kind = _TYPES[type(value)]
    return _INT.pack(kind) + np.array(value, dtype=_DTYPES[kind]).tobytes()


def _list(values: list[Any]) -> bytes:
    kinds = set(map(type, values))
    assert len(kinds) == 1, kinds
    count = _LONG.pack(len(values))
    if isinstance(values[0], str):
        return _INT.pack(GGUFValueType.STRING) + count + _strings(values)
    kind = _TYPES_IN_LISTS[type(values[0])]
    return _INT.pack(kind) + count + np.array(values, dtype=_DTYPES[kind]).tobytes()


def _strings(values: list[str]) -> bytes:
    """Texts one after the other, each after its length."""
    encoded = [value.encode() for value in values]
    lengths = map(_LONG.pack, map(len, encoded))
    return b"".join(chain.from_iterable(zip(lengths, encoded, strict=True)))
