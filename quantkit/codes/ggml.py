"""GGML's block types: codes and scales into the bytes that llama.cpp reads.

Layouts: ggml-common.h of llama.cpp. 32 weights make a block of the older types; a K-quant's super-block has 256, cut
into sub-blocks whose scales are small integers times the super-block's float16. gguf-py's dequantizer is the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Of the dtypes that docstrings give: numpy's stubs make a signed array of `uint8 & int`, so they cannot be spelled out.
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BlockType:
    """A block type of 32 weights.

    Attributes:
        bits: of a code.
        has_minimum: value d * q + m; without it d * (q - 2**(bits - 1)).
    """

    bits: int
    has_minimum: bool

    @property
    def columns(self) -> int:
        """Weights of a block."""
        return BLOCK

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return BLOCK


@dataclass(frozen=True)
class SuperBlockType:
    """A K-quant: super-blocks of 256 weights in sub-blocks.

    Attributes:
        bits: of a code.
        sub_block: weights that share a scale.
        scale_bits: of a sub-block's scale.
        has_minimum: value d * sc * q - dmin * m, sc and m without a sign; without it d * sc * (q - 2**(bits - 1)),
            sc with a sign.
    """

    bits: int
    sub_block: int
    scale_bits: int
    has_minimum: bool

    @property
    def columns(self) -> int:
        """Weights of a super-block."""
        return SUPER_BLOCK

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.sub_block


BLOCK = 32
SUPER_BLOCK = 256
BLOCK_TYPES = {
    "Q4_0": BlockType(4, False),
    "Q4_1": BlockType(4, True),
    "Q5_0": BlockType(5, False),
    "Q5_1": BlockType(5, True),
    "Q8_0": BlockType(8, False),
}
SUPER_BLOCK_TYPES = {
    "Q2_K": SuperBlockType(2, 16, 4, True),
    "Q3_K": SuperBlockType(3, 16, 6, False),
    "Q4_K": SuperBlockType(4, 32, 6, True),
    "Q5_K": SuperBlockType(5, 32, 6, True),
    "Q6_K": SuperBlockType(6, 16, 8, False),
}


def type_of(name: str) -> BlockType | SuperBlockType:
    """What a type is made of, by GGML's name. Raises KeyError."""
    return BLOCK_TYPES.get(name) or SUPER_BLOCK_TYPES[name]


def pack_blocks(name: str, codes: Array, d: Array, m: Array | None = None) -> Array:
    """Rows of a 32-weight type.

    Args:
        name: a key of `BLOCK_TYPES`.
        codes: uint8 [rows, columns]; columns a multiple of 32.
        d, m: float16 [rows, columns / 32]; m for types with a minimum only.

    Returns:
        uint8 [rows, bytes].
    """
    kind = BLOCK_TYPES[name]
    assert (m is not None) == kind.has_minimum
    q = _blocks(codes, BLOCK)
    head = [_as_bytes(d), *([] if m is None else [_as_bytes(m)])]
    if kind.bits == 8:
        return _rows([*head, q ^ 0x80])  # 0..255 with zero 128, as int8
    fifth = [np.packbits(q >> 4, axis=-1, bitorder="little")] if kind.bits == 5 else []
    return _rows([*head, *fifth, _nibbles(q & 15, 16)])


def pack_super_blocks(
    name: str, codes: Array, d: Array, sc: Array, dmin: Array | None = None, m: Array | None = None
) -> Array:
    """Rows of a K-quant.

    Args:
        name: a key of `SUPER_BLOCK_TYPES`.
        codes: uint8 [rows, columns]; columns a multiple of 256.
        d: float16 [rows, columns / 256].
        sc: int16 [rows, columns / sub_block], what the sub-block's scale is in units of d.
        dmin, m: as d and sc, for types with a minimum only.

    Returns:
        uint8 [rows, bytes].
    """
    kind = SUPER_BLOCK_TYPES[name]
    q = _blocks(codes, SUPER_BLOCK)
    scales = _blocks(sc, SUPER_BLOCK // kind.sub_block)
    if name == "Q6_K":
        return _rows([_nibbles(q & 15, 64), _pairs(q >> 4), scales.astype(np.int8).view(np.uint8), _as_bytes(d)])
    if name == "Q3_K":
        return _rows(
            [_bit_planes(q >> 2), _pairs(q & 3), _six_bit_scales((scales + 32).astype(np.uint8)), _as_bytes(d)]
        )
    assert dmin is not None and m is not None
    sc8, m8 = scales.astype(np.uint8), _blocks(m, SUPER_BLOCK // kind.sub_block).astype(np.uint8)
    if name == "Q2_K":
        return _rows([sc8 | m8 << 4, _pairs(q), _as_bytes(d), _as_bytes(dmin)])
    fifth = [_bit_planes(q >> 4)] if name == "Q5_K" else []
    return _rows([_as_bytes(d), _as_bytes(dmin), _scales_and_minima(sc8, m8), *fifth, _nibbles(q & 15, 32)])


def _blocks(values: Array, size: int) -> Array:
    rows, columns = values.shape
    assert columns % size == 0
    blocks: Array = values.reshape(rows, columns // size, size)
    return blocks


def _as_bytes(d: Array) -> Array:
    return np.ascontiguousarray(d.astype("<f2"))[..., None].view(np.uint8)


def _rows(parts: list[Array]) -> Array:
    joined = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(joined.reshape(joined.shape[0], -1))


def _nibbles(q: Array, half: int) -> Array:
    """Four bits each: of every 2 * half, element j is the low nibble of byte j and element j + half the high one."""
    runs = q.reshape(*q.shape[:2], -1, 2, half)
    joined: Array = runs[..., 0, :] | runs[..., 1, :] << 4
    return joined.reshape(*q.shape[:2], -1)


def _pairs(q: Array) -> Array:
    """Two bits each: of every 128, elements l, l + 32, l + 64, l + 96 share byte l."""
    return _merge(q.reshape(*q.shape[:2], 2, 4, 32), 2).reshape(*q.shape[:2], -1)


def _bit_planes(bits: Array) -> Array:
    """One bit each: element 32 * plane + l is bit `plane` of byte l."""
    return _merge(bits.reshape(*bits.shape[:2], 8, 32), 1)


def _six_bit_scales(sc: Array) -> Array:
    """Q3_K's sixteen scales 0..63 in twelve bytes: low nibbles of j and j + 8, then four high pairs a byte."""
    low = (sc[..., :8] & 15) | (sc[..., 8:] & 15) << 4
    high = _merge((sc >> 4).reshape(*sc.shape[:2], 4, 4), 2)
    return np.concatenate([low, high], axis=-1)


def _scales_and_minima(sc: Array, m: Array) -> Array:
    """Q4_K's and Q5_K's eight scales and minima of six bits in twelve bytes."""
    first = (sc[..., :4] & 63) | (sc[..., 4:] >> 4) << 6
    second = (m[..., :4] & 63) | (m[..., 4:] >> 4) << 6
    third = (sc[..., 4:] & 15) | (m[..., 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=-1)


def _merge(values: Array, bits: int) -> Array:
    """Fields along the second last axis into one byte, the first lowest."""
    shifts = np.arange(values.shape[-2], dtype=np.uint8)[:, None] * bits
    merged: Array = np.bitwise_or.reduce(values << shifts.astype(np.uint8), axis=-2)
    return merged
