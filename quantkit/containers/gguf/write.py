"""A GGUF file, or several that make one model, written tensor by tensor.

Where each tensor lies follows from the shapes, so tensors and single experts may come in any order and no more than one
of them is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from quantkit.containers.gguf.file import FileBytes
from quantkit.containers.gguf.head import pack_head, padded
from quantkit.containers.gguf.tensors import Array, GgufTensor
from quantkit.containers.readback import ReadBack
from quantkit.errors import OutputError, UsageError

Typed = tuple[GgufTensor, GGMLQuantizationType]

_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def packed_bytes(tensor: GgufTensor, kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor's data.

    Raises:
        UsageError: its rows are no whole number of blocks of this type.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise UsageError(f"{tensor.name} has {tensor.shape[-1]} columns; {kind.name} needs a multiple of {block}")
    return math.prod(tensor.shape) // block * size


def part_names(path: Path, tensors: Sequence[Typed], split_max_bytes: int = 0) -> list[str]:
    """What the files are called that `GgufWriter` writes: the file's own name, or those of its parts."""
    count = len(_parts(tensors, split_max_bytes))
    return [path.name] if count == 1 else [f"{path.stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


class GgufWriter:
    """Writes the planned tensors, each exactly once.

    Order of use: `write` for every source of every tensor, `finish`. Files have their final names from the start, so
    they must lie where nobody takes them for finished (`quantkit.runs.outputs.staged_files`).

    Attributes:
        paths: the files, in order: `path`, or its parts (``NAME-00001-of-00003.gguf``).
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        keys: Mapping[str, Any],
        tensors: Sequence[Typed],
        split_max_bytes: int = 0,
    ) -> None:
        """Open the files and write all but the tensors' data.

        Args:
            path: the file; parts lie beside it.
            architecture: general.architecture.
            keys: all further keys (`quantkit.containers.gguf.header`).
            tensors: in the file's order, each with the type that its data will have.
            split_max_bytes: the most bytes of tensors that a part holds, where they are more than one; 0 for one file.

        Raises:
            UsageError: a tensor's rows are no whole number of blocks of its type.
        """
        parts = _parts(tensors, split_max_bytes)
        self.paths = [path.with_name(name) for name in part_names(path, tensors, split_max_bytes)]
        self._tensors = {tensor.name: (tensor, kind) for tensor, kind in tensors}
        self._parts = {source: (tensor, i) for tensor, _ in tensors for i, source in enumerate(tensor.sources)}
        self._pending = set(self._parts)
        self._place: dict[str, tuple[int, int]] = {}
        self._read_back = ReadBack()
        self._spans: dict[tuple[Path, str], tuple[int, int]] = {}
        self._files: list[BinaryIO] = []
        first = {"general.architecture": architecture, **keys, "general.size_label": _size_label(tensors)}
        try:
            for number, part in enumerate(parts):
                self._files.append(self.paths[number].open("wb"))
                self._open_part(number, first if number == 0 else {}, part, len(parts))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, source: str, data: Array) -> None:
        """Write what a published tensor became; its place in a stack, and the order of its rows there, is seen to.

        Args:
            source: published name.
            data: rows in their published order: uint8 [rows, bytes of a row], or float32 or float16 values where that
                is the tensor's type.
        """
        self._pending.remove(source)
        tensor, part = self._parts[source]
        order = tensor.row_order()
        self._write_rows(tensor, part, data if order is None else data[order])

    def finish(self) -> None:
        """Write the computed tensors, close the files, read them back.

        Raises:
            OutputError: a tensor was never written, or others were read back than were written.
        """
        for tensor, _ in self._tensors.values():
            if not tensor.sources:
                self._write_rows(tensor, 0, np.array(tensor.computed, dtype=np.float32))
        if self._pending:
            raise OutputError(f"{len(self._pending)} planned tensors were not written, such as {min(self._pending)}")
        self._close()
        files = {path: FileBytes(path) for path in self.paths}
        self._read_back.compare(lambda path, name: files[path].pieces(*self._spans[path, name]))

    def _open_part(self, number: int, keys: Mapping[str, Any], tensors: Sequence[Typed], parts: int) -> None:
        """Write a part's head, and give its file the final size."""
        table = [(tensor.name, tensor.shape, kind, packed_bytes(tensor, kind)) for tensor, kind in tensors]
        of_parts = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(parts),
            "split.tensors.count": np.int32(len(self._tensors)),
        }
        head = pack_head({**keys, **(of_parts if parts > 1 else {})}, table)
        at = padded(len(head))
        for name, _, _, size in table:
            self._place[name] = number, at
            at += padded(size)
        self._files[number].truncate(at)
        self._write(number, 0, head, "its head")

    def _write_rows(self, tensor: GgufTensor, part: int, data: Array) -> None:
        kind = self._tensors[tensor.name][1]
        share = packed_bytes(tensor, kind) // max(len(tensor.sources), 1)
        assert data.dtype in (np.uint8, _PLAIN.get(kind, np.uint8)), (tensor.name, data.dtype)
        assert data.nbytes == share, (tensor.name, data.shape)
        number, start = self._place[tensor.name]
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        name = tensor.name if len(tensor.sources) < 2 else f"{tensor.name}, part {part}"
        self._write(number, start + part * share, content, name)

    def _write(self, number: int, at: int, content: bytes | memoryview, name: str) -> None:
        self._files[number].seek(at)
        self._files[number].write(content)
        self._read_back.wrote(self.paths[number], name, content)
        self._spans[self.paths[number], name] = at, at + len(content)

    def _close(self) -> None:
        for file in self._files:
            file.close()


def _parts(tensors: Sequence[Typed], most: int) -> list[list[Typed]]:
    """The tensors of each file, of at most so many bytes where they are more than one; 0 for a single file."""
    parts: list[list[Typed]] = [[]]
    size = 0
    for tensor, kind in tensors:
        own = packed_bytes(tensor, kind)
        if most and parts[-1] and size + own > most:
            parts.append([])
            size = 0
        parts[-1].append((tensor, kind))
        size += own
    return parts


def _size_label(tensors: Sequence[Typed]) -> str:
    """How many parameters, as models are called by: "135M", or of experts "8x7B"."""
    shapes = {tensor.name: tensor.shape for tensor, _ in tensors}
    experts = [shape for name, shape in shapes.items() if "_exps." in name]
    total = sum(map(math.prod, shapes.values()))
    of_one = sum(math.prod(shape[1:]) for shape in experts)
    shared = total - sum(map(math.prod, experts))
    count = sum(shape[0] for shape in experts) // len(experts) if experts else 0
    label: str = gguf.size_label(total, shared, of_one, count)
    return label
