"""An importance matrix in llama.cpp's GGUF form: per tensor the sums of squared inputs, and over how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFWriter

from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.imatrix.read import COUNTS, SUMS, Array
from quantkit.containers.readback import ReadBack


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
    tensors: dict[str, Array] = {}
    for name, entry in sorted(entries.items()):
        single = len(entry.sums) == 1  # which ggml stores without the dimension of 1
        tensors[name + SUMS] = entry.sums[0] if single else entry.sums
        tensors[name + COUNTS] = entry.counts[0] if single else entry.counts
    read_back = ReadBack()
    for name, values in tensors.items():
        file.add_tensor(name, values)
        read_back.wrote(path, name, values)
    try:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
    finally:
        file.close()
    stored = GgufFile(path)
    read_back.compare(lambda _, name: [stored.values(name)])
