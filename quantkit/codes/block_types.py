"""GGML's block types: codes and scales into the bytes that llama.cpp reads.

Layouts: ggml-common.h of llama.cpp. 32 weights make a block of older types, 64 one of Q2_0; a super-block, of K-quants
and IQ4_XS, has 256, cut into sub-blocks whose scales are small integers times the super-block's float16.
`kinds.dequantize` is the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Of the dtypes that docstrings give: numpy's stubs make a signed array of `uint8 & int`, so they cannot be spelled out.
Array = npt.NDArray[Any]


BLOCK, SUPER_BLOCK = 32, 256


@dataclass(frozen=True)
class BlockType:
    """A type of blocks of 32 or 64 weights, or one of super-blocks of 256 weights in sub-blocks.

    Attributes:
        bits: of a code.
        has_minimum: value d * q + m; without it d * (q - 2**(bits - 1)). Of a K-quant d * sc * q - dmin * m, sc and m
            without a sign; without it d * sc * (q - 2**(bits - 1)), sc with a sign.
        group: weights that share a scale: of a block, of a super-block's sub-block.
        scale_bits: of a sub-block's scale; 0 where there are no super-blocks.
        levels: of a table, ascending: code q is ``levels[q]`` times the scale. Empty: codes are whole steps.
    """

    bits: int
    has_minimum: bool
    group: int = BLOCK
    scale_bits: int = 0
    levels: tuple[int, ...] = ()

    @property
    def zero(self) -> int:
        """What is taken off a code of a type without a minimum."""
        return 0 if self.levels else 2 ** (self.bits - 1)

    @property
    def columns(self) -> int:
        """Weights of a block or super-block."""
        return SUPER_BLOCK if self.scale_bits else self.group


_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

BLOCK_TYPES = {
    "Q2_0": BlockType(2, False, 64),
    "Q2_K": BlockType(2, True, 16, 4),
    "Q3_K": BlockType(3, False, 16, 6),
    "IQ4_XS": BlockType(4, False, 32, 6, _IQ4_LEVELS),
    "Q4_0": BlockType(4, False),
    "IQ4_NL": BlockType(4, False, levels=_IQ4_LEVELS),
    "Q4_K": BlockType(4, True, 32, 6),
    "Q4_1": BlockType(4, True),
    "Q5_0": BlockType(5, False),
    "Q5_K": BlockType(5, True, 32, 6),
    "Q5_1": BlockType(5, True),
    "Q6_K": BlockType(6, False, 16, 8),
    "Q8_0": BlockType(8, False),
}
"""By GGML's name, from the smallest to the largest; of equal sizes the simpler block first."""


def pack_blocks(name: str, codes: Array, d: Array, m: Array | None = None) -> Array:
    """Rows of a type without super-blocks. Q2_0 stores ``d * (q - 1)``: it gets both mirrored, -d and 3 - q.

    Args:
        name: of a type without super-blocks in `BLOCK_TYPES`.
        codes: uint8 [rows, columns]; columns a multiple of the block.
        d, m: float16 [rows, columns / block]; m for types with a minimum only.

    Returns:
        uint8 [rows, bytes].
    """
    kind = BLOCK_TYPES[name]
    assert (m is not None) == kind.has_minimum
    q = _blocks(codes, kind.columns)
    if name == "Q2_0":
        return _rows([_as_bytes(-d), _merge((3 - q).reshape(*q.shape[:2], 16, 4).swapaxes(2, 3), 2)])
    head = [_as_bytes(d), *([] if m is None else [_as_bytes(m)])]
    if kind.bits == 8:
        return _rows([*head, q ^ 0x80])  # 0..255 with zero 128, as int8
    fifth = [np.packbits(q >> 4, axis=-1, bitorder="little")] if kind.bits == 5 else []
    return _rows([*head, *fifth, _nibbles(q & 15, 16)])


def pack_super_blocks(
    name: str, codes: Array, d: Array, sc: Array, dmin: Array | None = None, m: Array | None = None
) -> Array:
    """Rows of a type of super-blocks.

    Args:
        name: of such a type in `BLOCK_TYPES`.
        codes: uint8 [rows, columns]; columns a multiple of 256.
        d: float16 [rows, columns / 256].
        sc: int16 [rows, columns / sub_block], what the sub-block's scale is in units of d.
        dmin, m: as d and sc, for types with a minimum only.

    Returns:
        uint8 [rows, bytes].
    """
    subs = SUPER_BLOCK // BLOCK_TYPES[name].group
    q, scales = _blocks(codes, SUPER_BLOCK), _blocks(sc, subs)
    if name == "Q6_K":
        return _rows([_nibbles(q & 15, 64), _pairs(q >> 4), scales.astype(np.int8).view(np.uint8), _as_bytes(d)])
    if name == "IQ4_XS":
        # Eight scales of six bits: their high pairs in two bytes, their low nibbles in four.
        sixths = (scales + 32).astype(np.uint8)
        high = _merge((sixths >> 4).reshape(*sixths.shape[:2], 2, 4).swapaxes(2, 3), 2)
        low = _merge((sixths & 15).reshape(*sixths.shape[:2], 4, 2).swapaxes(2, 3), 4)
        return _rows([_as_bytes(d), high, low, _nibbles(q, 16)])
    if name == "Q3_K":
        # Sixteen scales 0..63 in twelve bytes: low nibbles of j and j + 8, then four high pairs a byte.
        sixths = (scales + 32).astype(np.uint8)
        high = _merge((sixths >> 4).reshape(*sixths.shape[:2], 4, 4), 2)
        return _rows([_bit_planes(q >> 2), _pairs(q & 3), _nibbles(sixths & 15, 8), high, _as_bytes(d)])
    assert dmin is not None and m is not None
    sc8, m8 = scales.astype(np.uint8), _blocks(m, subs).astype(np.uint8)
    if name == "Q2_K":
        return _rows([sc8 | m8 << 4, _pairs(q), _as_bytes(d), _as_bytes(dmin)])
    # Eight scales and minima of six bits in twelve bytes.
    six = [(part[..., :4] & 63) | (part[..., 4:] >> 4) << 6 for part in (sc8, m8)]
    six.append((sc8[..., 4:] & 15) | (m8[..., 4:] & 15) << 4)
    fifth = [_bit_planes(q >> 4)] if name == "Q5_K" else []
    return _rows([_as_bytes(d), _as_bytes(dmin), *six, *fifth, _nibbles(q & 15, 32)])


def _blocks(values: Array, size: int) -> Array:
    assert values.shape[1] % size == 0
    return values.reshape(len(values), -1, size)


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


def _merge(values: Array, bits: int) -> Array:
    """Fields along the second last axis into one byte, the first lowest."""
    shifts = np.arange(values.shape[-2], dtype=np.uint8)[:, None] * bits
    merged: Array = np.bitwise_or.reduce(values << shifts.astype(np.uint8), axis=-2)
    return merged
