"""GGML's blocks, by the dequantizer of gguf-py: every type's layout, and GPTQ codes in them without rounding again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.codes import QuantizedLinear, contiguous_groups, kinds
from quantkit.codes.block_types import (
    BLOCK_TYPES,
    BlockType,
    pack_blocks,
    pack_super_blocks,
)
from quantkit.codes.packing import pack
from quantkit.codes.reencode import (
    Reencoding,
    expected_reencodings,
    q4_0_rows,
    reencode,
    reencodings,
)

pytestmark = pytest.mark.fast


def dequantize(name: str, rows: np.ndarray) -> np.ndarray:
    return kinds.dequantize(rows, kinds.Kind[name])


def spread(values: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(values.astype(np.float32), times, axis=1)


def counted(kind: BlockType, codes: np.ndarray) -> np.ndarray:
    return np.array(kind.levels, dtype=np.float32)[codes] if kind.levels else codes.astype(np.float32)


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if not kind.scale_bits])
def test_blocks_hold_what_gguf_reads(name: str) -> None:
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(0)
    codes = rng.integers(0, 2**kind.bits, (5, 3 * kind.group)).astype(np.uint8)
    d, m = rng.normal(size=(2, 5, 3)).astype(np.float16)
    rows = pack_blocks(name, codes, d, m if kind.has_minimum else None)
    steps = counted(kind, codes) - (0 if kind.has_minimum else kind.zero)
    expected = spread(d, kind.group) * steps + (spread(m, kind.group) if kind.has_minimum else 0)
    assert np.array_equal(dequantize(name, rows), expected)


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if kind.scale_bits])
def test_super_blocks_hold_what_gguf_reads(name: str) -> None:
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(1)
    codes = rng.integers(0, 2**kind.bits, (5, 512)).astype(np.uint8)
    d, dmin = rng.normal(size=(2, 5, 2)).astype(np.float16)
    half, count = 2 ** (kind.scale_bits - 1), 512 // kind.group
    if kind.has_minimum:
        sc, m = rng.integers(0, 2 * half, (2, 5, count)).astype(np.int16)
        rows = pack_super_blocks(name, codes, d, sc, dmin, m)
        minimum = spread(dmin, 256) * spread(m, kind.group)
        expected = spread(d, 256) * spread(sc, kind.group) * codes - minimum
    else:
        sc = rng.integers(-half, half, (5, count)).astype(np.int16)
        rows = pack_super_blocks(name, codes, d, sc)
        steps = counted(kind, codes) - kind.zero
        expected = spread(d, 256) * spread(sc, kind.group) * steps
    assert np.array_equal(dequantize(name, rows), expected)


def random_linear(bits: int, sym: bool, group_size: int, columns: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (6, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(6, groups, generator=generator) * 0.01).half()
    zeros = torch.full((6, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(1, 2**bits, (6, groups), generator=generator, dtype=torch.uint8)
    return QuantizedLinear(codes, scales, zeros, contiguous_groups(columns, group_size), bits)


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(2, 8),
    sym=st.booleans(),
    group_size=st.sampled_from([32, 64, 96, 128, 256, 512, -1]),
    blocks=st.integers(1, 24),
    seed=st.integers(0, 2**16),
)
def test_codes_are_kept(bits: int, sym: bool, group_size: int, blocks: int, seed: int) -> None:
    """Exact types give every weight as it was; bounded ones but for the minimum, which float16 rounds by 2^-11."""
    linear = random_linear(bits, sym, group_size, 32 * blocks, seed)
    weight = linear.dequantize().numpy()
    step = np.abs(linear.scales.float().numpy())[:, linear.group.long().numpy()]
    assert {found.type for found in expected_reencodings(bits, linear.zeros, linear.group)} <= {
        found.type for found in reencodings(linear)
    }
    for found in reencodings(linear):
        values = dequantize(found.type, reencode(linear, found.type))
        if found.fidelity == "exact":
            assert np.array_equal(values, weight), found
        else:
            most = 2.0**-11 * int(linear.zeros.max()) * (1 + 1e-3)
            assert (np.abs(values - weight) <= most * step).all(), found


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "first"),
    [
        (4, True, 128, Reencoding("Q4_0", "exact")),
        (8, True, 32, Reencoding("Q8_0", "exact")),
        (5, True, 64, Reencoding("Q5_0", "exact")),
        (4, False, 64, Reencoding("Q4_1", "bounded")),
        (5, False, 32, Reencoding("Q5_1", "bounded")),
        (4, False, 256, Reencoding("Q4_K", "exact")),
        (4, False, -1, Reencoding("Q4_K", "exact")),
        (2, False, -1, Reencoding("Q2_K", "exact")),
        (2, True, 64, Reencoding("Q2_0", "exact")),
        (2, True, 32, Reencoding("Q4_0", "exact")),
        (3, True, 256, Reencoding("Q3_K", "exact")),
        (3, False, 32, Reencoding("Q4_0", "exact")),
    ],
)
def test_the_smallest_type_comes_first(bits: int, sym: bool, group_size: int, first: Reencoding) -> None:
    assert next(reencodings(random_linear(bits, sym, group_size, 512, 3))) == first


def test_scattered_groups_have_no_type() -> None:
    linear = random_linear(4, True, 32, 128, 0)
    scattered = QuantizedLinear(linear.codes, linear.scales, linear.zeros, torch.arange(128, dtype=torch.int32) % 4, 4)
    assert not list(reencodings(scattered))


def test_a_short_last_group_of_whole_blocks_is_fine() -> None:
    """576 is 4.5 groups of 128."""
    linear = random_linear(4, True, 128, 576, 0)
    assert next(reencodings(linear)) == Reencoding("Q4_0", "exact")
    assert np.array_equal(dequantize("Q4_0", reencode(linear, "Q4_0")), linear.dequantize().numpy())


@given(group_size=st.sampled_from([32, 64, 96, -1]), columns=st.integers(1, 12), rows=st.integers(1, 6))
def test_packed_words_become_the_blocks_that_their_codes_make(group_size: int, columns: int, rows: int) -> None:
    linear = random_linear(4, True, group_size, 32 * columns, rows + columns)
    some = QuantizedLinear(linear.codes[:rows], linear.scales[:rows], linear.zeros[:rows], linear.group, 4)
    found = q4_0_rows(pack(some.codes.T, 4), some.scales.T.contiguous(), some.group)
    assert np.array_equal(found, reencode(some, "Q4_0"))
