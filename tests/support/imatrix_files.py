"""Importance matrices of random numbers, in the form that llama-imatrix writes; nothing of quantkit takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from conftest import MakeModel


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


# A window of 8, so that layers with a sliding window are told from others, but for Phi-3, which llama.cpp gives none;
# the router's choices are normalized, as GGUF files of this architecture mean.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
    "gemma2": ("gemma2", {"sliding_window": 8, "tied": True}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": None}),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 256}),
}


def tiny(make_model: MakeModel, case: str) -> Path:
    family, config = CASES[case]
    return make_model(family, dtype="float32", **config)
