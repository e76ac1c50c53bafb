"""Packing of small unsigned integers into int32 words: a stream of bits, the first code lowest, little end first.

GPTQ checkpoints (AutoGPTQ 0.7.1, ``qlinear_cuda.py``) have such streams along the columns, of bits that fill units of
whole words; compressed-tensors and MLX have them along the rows, of any bits. A code may straddle two words.
"""

from __future__ import annotations

from quantkit.late import torch

PACKABLE_BITS = (2, 3, 4, 8)
_CODES_A_TILE = 1 << 20  # packed at a time: they stay in the cache
_GPU_TILE = 1 << 26  # there a launch takes as long as a million codes


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
    columns = codes.shape[1]
    tiles = []
    most = _CODES_A_TILE if codes.device.type == "cpu" else _GPU_TILE
    for tile in torch.split(codes, max(1, most // (columns or 1))):
        whole = tile.new_zeros(len(tile), columns + -columns % 32)
        whole[:, :columns] = tile
        eights = _closed(whole.view(torch.int64), bits)
        if bits == 4:  # a cast takes half as long as picking octets
            words = eights.to(torch.int32)
        else:
            words = eights.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1).contiguous().view(torch.int32)
        tiles.append(words[:, : words_for(columns, bits)])
    return torch.cat(tiles)


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo `pack_rows`: int32 [n, words_for(columns, bits)] -> uint8 [n, columns]."""
    octets = words.contiguous().view(torch.uint8)  # of each word the lowest first
    if 8 % bits == 0:
        fields = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, dim=2).flatten(1)[:, :columns]
    tiles = []
    for tile in torch.split(octets, max(1, _CODES_A_TILE // (columns or 1))):
        whole = torch.nn.functional.pad(tile, (0, -tile.shape[1] % bits)).unflatten(1, (-1, bits))
        eights = torch.nn.functional.pad(whole, (0, 8 - bits)).view(torch.int64)
        tiles.append(_opened(eights, bits).view(torch.uint8).flatten(1)[:, :columns])
    return torch.cat(tiles)


def _closed(eights: torch.Tensor, bits: int) -> torch.Tensor:
    """Eight codes, an octet of an int64 each, as its lowest ``8 * bits`` bits; in place. In three steps: neighbours
    move together, then pairs of them, then fours."""
    for lane, held in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        lower = eights & _every(2 * lane, held)
        eights.bitwise_xor_(lower).bitwise_right_shift_(lane - held).bitwise_or_(lower)
    return eights


def _opened(eights: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `_closed`, in place."""
    for lane, held in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        lower = eights & _every(2 * lane, held)
        eights.bitwise_xor_(lower).bitwise_left_shift_(lane - held).bitwise_or_(lower)
    return eights


def _every(lane: int, held: int) -> int:
    """The lowest `held` bits of each `lane` bits of an int64."""
    return sum((1 << held) - 1 << at for at in range(0, 64, lane))
