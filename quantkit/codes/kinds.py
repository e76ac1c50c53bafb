"""GGML's types and llama.cpp's file types by name and number: gguf-py's, and Q2_0, which llama.cpp b11434 has and
gguf-py 0.19 has not.

A Q2_0 block is a float16 d and 64 codes of two bits, four a byte from the lowest bits up: ``d * (code - 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    Kind = gguf.GGMLQuantizationType
    FileType = gguf.LlamaFileType
else:
    Kind = IntEnum("Kind", {kind.name: int(kind) for kind in gguf.GGMLQuantizationType} | {"Q2_0": 42})
    FileType = IntEnum("FileType", {kind.name: int(kind) for kind in gguf.LlamaFileType} | {"MOSTLY_Q2_0": 41})

Q2_0 = Kind.__members__["Q2_0"]
SIZES: Mapping[Kind, tuple[int, int]] = {
    **{Kind(int(kind)): size for kind, size in gguf.GGML_QUANT_SIZES.items()},
    Q2_0: (64, 18),
}
"""Weights and bytes of a block."""

READABLE = frozenset({*gguf.quants._type_traits, Q2_0})
"""Types whose blocks `dequantize` takes apart."""


def dequantize(packed: npt.NDArray[np.uint8], kind: Kind) -> npt.NDArray[Any]:
    """Values float32 [rows, columns] of blocks uint8 [rows, bytes]. Raises NotImplementedError for other types."""
    if kind != Q2_0:
        return gguf.quants.dequantize(packed, kind)
    blocks = packed.reshape(-1, SIZES[Q2_0][1])
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(len(blocks), -1)
    values = blocks[:, :2].copy().view("<f2").astype(np.float32) * (codes.astype(np.float32) - 1)
    return values.reshape(*packed.shape[:-1], -1)
