"""The GGUF container, versions 2 and 3: keys, and tensors that stay on disk until they are asked for.

gguf's own reader makes several arrays of every string, which takes half a minute for a vocabulary of 262144 tokens;
this one reads it in a second. Tensor types and dequantizers are gguf's.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantkit.errors import SourceError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# value types of the format by their number
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PLAIN = {gguf.GGMLQuantizationType.F32: "<f4", gguf.GGMLQuantizationType.F16: "<f2"}


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor; `offset` counts bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
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
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
            self._read_header()
        except (ValueError, KeyError, IndexError, OverflowError, struct.error, OSError) as error:
            raise self._broken(error) from error

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's values, dequantized to float32 where it is stored as blocks.

        Raises:
            SourceError: gguf has no dequantizer for its type.
        """
        tensor = self.tensors[name]
        stored = self._bytes[tensor.offset : tensor.offset + tensor.bytes]
        if tensor.kind in _PLAIN:
            return np.array(stored.view(_PLAIN[tensor.kind]).reshape(tensor.shape))
        rows = stored.reshape(*tensor.shape[:-1], -1)
        try:
            values: np.ndarray[Any, Any] = gguf.quants.dequantize(rows, tensor.kind)
        except NotImplementedError as error:
            raise SourceError(f"{self.path}: {tensor.kind.name} of {name} has no dequantizer") from error
        return values

    def _broken(self, why: object) -> SourceError:
        return SourceError(f"{self.path}: broken or cut short GGUF file ({why}); download it again")

    def _read_header(self) -> None:
        self._at = 0
        self._header = self._bytes.data
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise SourceError(f"{self.path}: GGUF version {version} cannot be read, only 2 and 3; convert it again")
        tensors, keys = self._number("<u8"), self._number("<u8")
        for _ in range(keys):
            name = self._string()
            self.keys[name] = self._value(self._number("<u4"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.keys.get("general.alignment", _ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        for name, tensor in found:
            placed = GgufTensor(tensor.shape, tensor.kind, start + tensor.offset, tensor.bytes)
            if placed.offset + placed.bytes > len(self._bytes):
                raise ValueError(f"it ends before the end of {name}")
            if name in self.tensors:
                raise ValueError(f"it holds {name} twice")
            self.tensors[name] = placed

    def _tensor(self) -> tuple[str, GgufTensor]:
        name = self._string()
        shape = tuple(self._number("<u8") for _ in range(self._number("<u4")))[::-1]
        kind = gguf.GGMLQuantizationType(self._number("<u4"))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} of shape {list(shape)} cannot be {kind.name}")
        return name, GgufTensor(shape, kind, self._number("<u8"), math.prod(shape) // block * size)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        kind, length = self._number("<u4"), self._number("<u8")
        if kind == _ARRAY:  # which nobody writes, and which could be nested without end
            raise ValueError("it holds an array of arrays")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()
        return [self._value(kind) for _ in range(length)]

    def _string(self) -> str:
        return self._take(self._number("<u8")).decode("utf-8", errors="replace")

    def _number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self._take(kind.itemsize), kind)[0].item()

    def _take(self, size: int) -> bytes:
        """The next bytes of the header."""
        if self._at + size > len(self._bytes):
            raise ValueError("it ends within its header")
        self._at += size
        return self._header[self._at - size : self._at].tobytes()
