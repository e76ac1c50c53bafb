"""Packing of small unsigned integers into int32 words, as GPTQ checkpoints store them.

Layouts: AutoGPTQ 0.7.1, ``qlinear_cuda.py``. 2, 4 and 8 bits fill a word little end first; 3 bits put 32 codes into
three words, two of the codes straddling a boundary.
"""

from __future__ import annotations

from quantkit.late import torch

# For 3 bits, per word: (code, shift of the code inside the word); a negative shift drops the code's low bits, which
# stand at the top of the word before.
_THREE_BIT_WORDS = [[(j, at) for j in range(32) if -3 < (at := 3 * j - start) < 32] for start in (0, 32, 64)]

PACKABLE_BITS = (2, 3, 4, 8)


def packing_multiple(bits: int) -> int:
    """How many codes an axis must be a multiple of to be packed: 16, 32, 8 or 4 for 2, 3, 4 or 8 bits."""
    if bits not in PACKABLE_BITS:
        raise ValueError(f"GPTQ checkpoints pack 2, 3, 4 or 8 bits, not {bits}")
    return 32 if bits == 3 else 32 // bits


def pack(codes: torch.Tensor, bits: int, axis: int = 0) -> torch.Tensor:
    """Pack along an axis.

    Args:
        codes: uint8 [n, m], each below 2**bits; n (m for axis 1) a multiple of `packing_multiple(bits)`.
        bits: 2, 3, 4 or 8.
        axis: 0 or 1.

    Returns:
        int32 [n * bits / 32, m], or [n, m * bits / 32] for axis 1, on the device of `codes`.

    Raises:
        ValueError: bits that the layout has no form for, or n that does not fill whole words.
    """
    if axis == 1:
        return pack(codes.T, bits).T.contiguous()
    n, m = codes.shape
    multiple = packing_multiple(bits)
    if n % multiple:
        raise ValueError(f"{bits}-bit packing needs a multiple of {multiple} codes, not {n}")
    grouped = codes.reshape(n // multiple, multiple, m).to(torch.int64)
    if bits == 3:
        words = grouped.new_zeros(n // 32, 3, m)
        for index, word in enumerate(_THREE_BIT_WORDS):
            for code, shift in word:
                words[:, index] |= grouped[:, code] << shift if shift >= 0 else grouped[:, code] >> -shift
        words &= 0xFFFFFFFF  # bits above the 32nd belong to the next word
    else:
        shifts = torch.arange(multiple, device=codes.device) * bits
        words = (grouped << shifts[None, :, None]).sum(dim=1, keepdim=True)
    words = words.reshape(n * bits // 32, m)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # of the same 32 bits


def unpack(words: torch.Tensor, bits: int, axis: int = 0) -> torch.Tensor:
    """Undo `pack`: int32 [w, m] -> uint8 [w * 32 / bits, m] (for axis 1 [w, m * 32 / bits]), maybe a view.

    Raises:
        ValueError: bits that the layout has no form for, or for 3 bits a number of words that is no multiple of 3.
    """
    if axis == 0:
        return unpack(words.T, bits, axis=1).T
    per_unit = packing_multiple(bits) * bits // 32
    m, w = words.shape
    if w % per_unit:
        raise ValueError(f"{bits}-bit codes come in units of {per_unit} words, not {w}")
    if bits == 3:
        units = (words.T.to(torch.int64) & 0xFFFFFFFF).reshape(w // per_unit, per_unit, m)
        codes = units.new_zeros(len(units), 32, m)
        for index, word in enumerate(_THREE_BIT_WORDS):
            for code, shift in word:
                part = units[:, index] >> shift if shift >= 0 else units[:, index] << -shift
                codes[:, code] |= part & 7 if shift >= 0 else part & 7 & ~((1 << -shift) - 1)
        return codes.reshape(w * 32 // bits, m).to(torch.uint8).T
    octets = words.reshape(-1).view(torch.uint8).reshape(m, w * 4)  # of each word the lowest first
    fields = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=2).reshape(m, w * 32 // bits)
