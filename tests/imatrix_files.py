"""Importance matrices of random numbers, in the form that llama-imatrix writes; nothing of quantkit takes part."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def random_imatrix(path: Path, model: Path, leave_out: str = "", zeros: bool = True) -> Path:
    """An entry for every matrix of a file's blocks but one; one expert saw nothing, with `zeros` nor did columns."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array("imatrix.datasets", ["/some/where/text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 32)
    for tensor in gguf.GGUFReader(model).tensors:
        columns, *rest = (int(size) for size in tensor.shape)
        if rest and tensor.name.startswith("blk.") and tensor.name != leave_out:
            experts = rest[1] if len(rest) == 2 else 1
            means = generator.lognormal(size=(experts, columns)).astype(np.float32)
            means[:, ::7] *= not zeros
            counts = np.arange(experts, dtype=np.float32)[:, None] + (experts == 1)
            writer.add_tensor(f"{tensor.name}.in_sum2", means * counts)
            writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
