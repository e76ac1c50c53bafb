"""A GGUF file, or several that make one model, written tensor by tensor.

Header, keys and the table of tensors are gguf-py's. Where each tensor lies follows from the shapes, so tensors and
single experts may come in any order and no more than one of them is in memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from quantkit.errors import OutputError, UsageError
from quantkit.sources.gguf_file import GgufFile
from quantkit.writers.gguf.tensors import Array, GgufTensor

Typed = tuple[GgufTensor, GGMLQuantizationType]


def packed_bytes(tensor: GgufTensor, kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor's data.

    Raises:
        UsageError: its rows are no whole number of blocks of this type.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise UsageError(f"{tensor.name} has {tensor.shape[-1]} columns; {kind.name} needs a multiple of {block}")
    return math.prod(tensor.shape) // block * size


class GgufWriter:
    """Writes the planned tensors, each exactly once.

    Order of use: `write` for every source of every tensor, `finish`. Files have their final names from the start, so
    they must lie where nobody takes them for finished (`quantkit.workdir.staged_files`).

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
            keys: all further keys (`quantkit.writers.gguf.header`).
            tensors: in the file's order, each with the type that its data will have.
            split_max_bytes: the most bytes of tensors that a part holds, where they are more than one; 0 for one file.

        Raises:
            UsageError: a tensor's rows are no whole number of blocks of its type.
        """
        total = sum(packed_bytes(tensor, kind) for tensor, kind in tensors)
        # With a limit that is not reached gguf-py logs a warning.
        self._file = GGUFWriter(path, architecture, split_max_size=split_max_bytes if total > split_max_bytes else 0)
        for key, value in keys.items():
            _add(self._file, key, value)
        for tensor, kind in tensors:
            assert kind == GGMLQuantizationType.F32 or not tensor.always_f32, tensor.name
            # The dtype says that the shape counts values, not bytes.
            self._file.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), packed_bytes(tensor, kind), raw_dtype=kind
            )
        self._file.add_size_label(gguf.size_label(*self._file.get_total_parameter_count()))
        self.paths = self._file.format_shard_names(path)
        self._tensors = {tensor.name: (tensor, kind) for tensor, kind in tensors}
        self._parts = {source: (tensor, i) for tensor, _ in tensors for i, source in enumerate(tensor.sources)}
        self._pending = set(self._parts)
        self._checksums: dict[tuple[str, int], int] = {}
        try:
            self._file.write_header_to_file()
            self._file.write_kv_data_to_file()
            self._file.write_ti_data_to_file()
            self._place = self._places()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

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
        self._write(tensor, part, data if order is None else data[order])

    def finish(self) -> None:
        """Write the computed tensors, close the files, read them back.

        Raises:
            OutputError: a tensor was never written, or others were read back than were written.
        """
        for tensor, _ in self._tensors.values():
            if not tensor.sources:
                self._write(tensor, 0, np.array(tensor.computed, dtype=np.float32))
        if self._pending:
            raise OutputError(f"{len(self._pending)} planned tensors were not written, such as {min(self._pending)}")
        self._file.close()
        self._read_back()

    def _places(self) -> dict[str, tuple[int, int]]:
        """File and offset of every tensor; the files get their final size."""
        places = {}
        assert self._file.fout is not None
        for number, (file, infos) in enumerate(zip(self._file.fout, self._file.tensors, strict=True)):
            at = GGUFWriter.ggml_pad(file.tell(), self._file.data_alignment)
            for name, info in infos.items():
                places[name] = (number, at)
                at += GGUFWriter.ggml_pad(info.nbytes, self._file.data_alignment)
            file.truncate(at)
        return places

    def _write(self, tensor: GgufTensor, part: int, data: Array) -> None:
        kind = self._tensors[tensor.name][1]
        share = packed_bytes(tensor, kind) // max(len(tensor.sources), 1)
        floats = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        assert data.dtype in (np.uint8, floats.get(kind, np.uint8)), (tensor.name, data.dtype)
        assert data.nbytes == share, (tensor.name, data.shape)
        number, start = self._place[tensor.name]
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        assert self._file.fout is not None
        self._file.fout[number].seek(start + part * share)
        self._file.fout[number].write(content)
        self._checksums[tensor.name, part] = zlib.crc32(content)

    def _read_back(self) -> None:
        stored = [GgufFile(path) for path in self.paths]
        for (name, part), checksum in self._checksums.items():
            path = self.paths[self._place[name][0]]
            found = stored[self._place[name][0]].tensors[name]
            share = found.bytes // max(len(self._tensors[name][0].sources), 1)
            with path.open("rb") as file:
                file.seek(found.offset + part * share)
                if zlib.crc32(file.read(share)) != checksum:
                    raise OutputError(f"{name}: other data was read back than was written; the disk may be failing")


def _add(file: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        file.add_bool(key, value)
    elif isinstance(value, int):
        file.add_uint32(key, value)
    elif isinstance(value, float):
        file.add_float32(key, value)
    elif isinstance(value, str):
        file.add_string(key, value)
    else:
        file.add_array(key, value)
