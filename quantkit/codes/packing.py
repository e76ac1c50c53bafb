"""Packing of small unsigned integers into int32 words: a stream of bits, the first code lowest, little end first.

GPTQ checkpoints (AutoGPTQ 0.7.1, ``qlinear_cuda.py``) have such streams along the columns, of bits that fill units of
whole words; compressed-tensors and MLX have them along the rows, of any bits. A code may straddle two words.
"""

from __future__ import annotations

from quantkit.late import torch

PACKABLE_BITS = (2, 3, 4, 8)
_CODES_A_TILE = 1 << 22  # packed at a time, through eight bytes a code


def packing_multiple(bits: int) -> int:
    """How many codes an axis must be a multiple of to be packed: 16, 32, 8 or 4 for 2, 3, 4 or 8 bits."""
    if bits not in PACKABLE_BITS:
        raise ValueError(f"GPTQ checkpoints pack 2, 3, 4 or 8 bits, not {bits}")
    return 32 if bits == 3 else 32 // bits


def pack(codes: torch.Tensor, bits: int, axis: int = 0) -> torch.Tensor:
    """Pack along an axis, as GPTQ checkpoints have it.

    Args:
        codes: uint8 [n, m], each below 2**bits; n (m for axis 1) a multiple of `packing_multiple(bits)`.
        bits: 2, 3, 4 or 8.
        axis: 0 or 1.

    Returns:
        int32 [n * bits / 32, m], or [n, m * bits / 32] for axis 1, on the device of `codes`.

    Raises:
        ValueError: bits that the layout has no form for, or n that does not fill whole words.
    """
    if axis == 0:
        return pack(codes.T, bits, axis=1).T.contiguous()
    multiple = packing_multiple(bits)
    if codes.shape[1] % multiple:
        raise ValueError(f"{bits}-bit packing needs a multiple of {multiple} codes, not {codes.shape[1]}")
    return pack_rows(codes, bits)


def unpack(words: torch.Tensor, bits: int, axis: int = 0) -> torch.Tensor:
    """Undo `pack`: int32 [w, m] -> uint8 [w * 32 / bits, m] (for axis 1 [w, m * 32 / bits]), maybe a view.

    Raises:
        ValueError: bits that the layout has no form for, or for 3 bits a number of words that is no multiple of 3.
    """
    if axis == 0:
        return unpack(words.T, bits, axis=1).T
    per_unit = packing_multiple(bits) * bits // 32
    count = words.shape[1]
    if count % per_unit:
        raise ValueError(f"{bits}-bit codes come in units of {per_unit} words, not {count}")
    return unpack_rows(words, bits, count * 32 // bits)


def words_for(codes: int, bits: int) -> int:
    """How many words so many codes take, the last one maybe in part."""
    return -(-codes * bits // 32)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row as a stream of its own: uint8 [n, m], each below 2**bits (1 to 8) -> int32 [n, words_for(m, bits)]."""
    rows, columns = codes.shape
    step = max(1, _CODES_A_TILE // (columns or 1))
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    tiles = []
    for tile in torch.split(codes, step):
        whole = torch.nn.functional.pad(tile, (0, -columns % 32))
        eights = (whole.reshape(len(tile), -1, 8).to(torch.int64) << shifts).sum(dim=2, keepdim=True)
        octets = eights.view(torch.uint8)[..., :bits].reshape(len(tile), -1)  # the first `bits` of eight bytes
        tiles.append(octets.view(torch.int32)[:, : words_for(columns, bits)])
    return torch.cat(tiles) if rows else codes.new_zeros(0, words_for(columns, bits), dtype=torch.int32)


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo `pack_rows`: int32 [n, words_for(columns, bits)] -> uint8 [n, columns]."""
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8).reshape(rows, -1)  # of each word the lowest first
    if 8 % bits == 0:
        fields = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=2).reshape(rows, -1)[:, :columns]
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    tiles = []
    for tile in torch.split(octets, max(1, _CODES_A_TILE // (columns or 1))):
        whole = torch.nn.functional.pad(tile, (0, -tile.shape[1] % bits)).reshape(len(tile), -1, bits)
        eights = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64)
        eight_codes = (eights >> shifts) & (2**bits - 1)
        tiles.append(eight_codes.to(torch.uint8).reshape(len(tile), -1)[:, :columns])
    return torch.cat(tiles) if rows else octets.new_zeros(0, columns)
