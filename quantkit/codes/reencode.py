"""Codes of a GPTQ run as GGML blocks, without rounding again.

A GGML block's scale takes the group's as it is: groups are made of whole blocks. What may differ is the zero: types
without a minimum fix it, so codes are shifted; types with one keep it as a float16 product, or in units of the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from quantkit.codes import QuantizedLinear
from quantkit.codes.block_types import BLOCK, BLOCK_TYPES, Array, pack_blocks, pack_super_blocks
from quantkit.late import torch

_NIBBLE, _LOW_NIBBLES = np.uint64(4), np.uint64(0x0F0F0F0F0F0F0F0F)


@dataclass(frozen=True)
class Reencoding:
    """A type that holds a Linear's codes.

    Attributes:
        type: GGML's name.
        fidelity: "exact", every weight is the same number; or "bounded", the group's minimum is rounded once to
            float16, so weights of 4 bits are off by at most 0.8 % of a step, those of 5 by 1.6 %.
    """

    type: str
    fidelity: Literal["exact", "bounded"]


def reencodings(linear: QuantizedLinear) -> Iterator[Reencoding]:
    """Types that take the codes of `linear` as they are, the smallest first. None for scattered groups."""
    steps = linear.codes.short() - linear.zeros.short()[:, linear.group.long()]
    yield from _types(
        linear.bits, int(steps.min()), int(steps.max()), int(linear.zeros.max()), _group_run(linear.group)
    )


def expected_reencodings(bits: int, zeros: torch.Tensor, group: torch.Tensor) -> Iterator[Reencoding]:
    """As `reencodings`, whatever the codes are: zeros uint8 [out, groups], group int32 [in]."""
    low, high = (int(end) for end in torch.aminmax(zeros))
    yield from _types(bits, -high, 2**bits - 1 - low, high, _group_run(group))


def _types(bits: int, low: int, high: int, zero: int, run: int) -> Iterator[Reencoding]:
    """Types for steps (code - zero) of low..high, zeros up to `zero`, and runs of columns of one group."""
    for name, kind in BLOCK_TYPES.items():
        if run % kind.columns or kind.levels:
            continue
        half = 2 ** (kind.bits - 1)
        if not kind.has_minimum:
            if -half <= low and high < half:
                yield Reencoding(name, "exact")
        elif bits <= kind.bits and (not kind.scale_bits or zero < 2**kind.scale_bits):
            yield Reencoding(name, "exact" if kind.scale_bits else "bounded")


def reencode(linear: QuantizedLinear, name: str) -> Array:
    """Rows of the type `name`, one of `reencodings(linear)`.

    Returns:
        uint8 [out, bytes].
    """
    codes, group = linear.codes.numpy(), linear.group.long().numpy()
    scales, zeros = linear.scales.numpy(), linear.zeros.numpy()
    kind = BLOCK_TYPES[name]
    d, z = (part[:, group[:: kind.columns]] for part in (scales, zeros))  # of each block: it lies within a group
    if not kind.has_minimum and (zeros != 2 ** (kind.bits - 1)).any():
        codes = (codes.astype(np.int16) - zeros[:, group] + 2 ** (kind.bits - 1)).astype(np.uint8)
    if not kind.scale_bits:
        m = -d.astype(np.float32) * z if kind.has_minimum else None
        return pack_blocks(name, codes, d, None if m is None else m.astype(np.float16))
    sub_blocks = kind.columns // kind.group
    ones = np.ones((d.shape[0], d.shape[1] * sub_blocks), dtype=np.int16)
    if not kind.has_minimum:
        return pack_super_blocks(name, codes, d, ones)
    return pack_super_blocks(name, codes, d, ones, d, np.repeat(z, sub_blocks, axis=1).astype(np.int16))


def q4_0_rows(words: torch.Tensor, scales: torch.Tensor, group: torch.Tensor) -> Array:
    """Rows of Q4_0 from GPTQ's packed words of 4 bits, with all zeros 8: as `reencode` makes them, five times as fast,
    for no code is taken out of its word.

    Args:
        words: int32 [in / 8, out]. Nibble j of a word is column j of its eight.
        scales: float16 [groups, out].
        group: int32 [in], in runs of whole blocks.

    Returns:
        uint8 [out, bytes]. Byte j of a block holds column j in its low nibble, column j + 16 in its high one.
    """
    rows = words.shape[1]
    halves = words.T.contiguous().numpy().view("<u8").reshape(rows, -1, 2)  # of each block its columns 0..15, 16..31
    first, second = halves[..., 0], halves[..., 1]
    # Byte k of either half has columns 2 k and 2 k + 1.
    even = first & _LOW_NIBBLES | (second & _LOW_NIBBLES) << _NIBBLE
    odd = first >> _NIBBLE & _LOW_NIBBLES | second & ~_LOW_NIBBLES
    pairs = odd.view(np.uint8).astype("<u2") << 8 | even.view(np.uint8)
    blocks = np.empty((rows, even.shape[1], 9), dtype="<u2")
    blocks[..., 0] = scales.T[:, group[::BLOCK].long()].numpy().view("<u2")
    blocks[..., 1:] = pairs.reshape(rows, -1, 8)
    return blocks.view(np.uint8).reshape(rows, -1)


def _group_run(group: torch.Tensor) -> int:
    """The largest size that all runs of columns of one group are multiples of; 1 where groups are scattered."""
    edges = (group[1:] != group[:-1]).nonzero().flatten() + 1
    return int(np.gcd.reduce([*edges.tolist(), group.numel()]))
