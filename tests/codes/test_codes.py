"""Packing: round trips, literal words, and the zeros of a v1 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.streamed import open_writer

from quantkit import codes as codes_of
from quantkit.codes import (
    GgmlGrid,
    GgmlLinear,
    QuantizedLinear,
    contiguous_groups,
    put_together,
    take_apart_packed,
)
from quantkit.codes.packing import PACKABLE_BITS, pack, pack_rows, packing_multiple, unpack, unpack_rows
from quantkit.containers.gptq.read import GptqSource
from quantkit.options import QuantSpec

pytestmark = pytest.mark.fast


def int32(word: int) -> int:
    """The int32 whose bits are those of `word`."""
    return word - 2**32 if word >= 2**31 else word


def words_of(codes: list[int], bits: int) -> list[int]:
    """Codes as one number, little end first, cut into 32-bit words: what the layout means, in plain integers."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return [int32((number >> shift) & 0xFFFFFFFF) for shift in range(0, bits * len(codes), 32)]


@st.composite
def matrices(draw: Any) -> tuple[int, int, torch.Tensor]:
    bits, axis = draw(st.sampled_from(PACKABLE_BITS)), draw(st.sampled_from((0, 1)))
    n, m = draw(st.integers(1, 4)) * packing_multiple(bits), draw(st.integers(1, 9))
    codes = draw(st.binary(min_size=n * m, max_size=n * m))
    matrix = torch.frombuffer(bytearray(codes), dtype=torch.uint8).reshape(n, m) & (2**bits - 1)
    return bits, axis, matrix if axis == 0 else matrix.T


@settings(deadline=None, max_examples=200)
@given(matrices())
def test_unpack_undoes_pack(case: tuple[int, int, torch.Tensor]) -> None:
    bits, axis, codes = case
    words = pack(codes, bits, axis)
    packed = list(codes.shape)
    packed[axis] = packed[axis] * bits // 32
    assert words.dtype == torch.int32
    assert list(words.shape) == packed
    assert torch.equal(unpack(words, bits, axis), codes)


@settings(deadline=None, max_examples=100)
@given(matrices())
def test_words_are_the_codes_little_end_first(case: tuple[int, int, torch.Tensor]) -> None:
    bits, axis, codes = case
    lines = codes.T.tolist() if axis == 0 else codes.tolist()
    words = pack(codes, bits, axis)
    assert (words.T if axis == 0 else words).tolist() == [words_of(line, bits) for line in lines]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 70), st.booleans(), st.data())
def test_rows_are_streams_of_any_bits(bits: int, rows: int, columns: int, turned: bool, data: Any) -> None:
    """Of any length, in whichever order they lie in memory; what a last word has beyond them is 0."""
    content = data.draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    codes = torch.tensor(list(content), dtype=torch.uint8).reshape(rows, columns) & (2**bits - 1)
    before = codes.clone()
    words = pack_rows(codes.T.contiguous().T if turned else codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [words_of(line, bits) for line in codes.tolist()]
    assert torch.equal(unpack_rows(words, bits, columns), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_of_more_than_a_tile(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 300_001), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, bits)
    assert torch.equal(words, torch.cat([pack_rows(row[None], bits) for row in codes]))
    assert torch.equal(unpack_rows(words, bits, codes.shape[1]), codes)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(PACKABLE_BITS), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=24, max_size=24))
def test_pack_undoes_unpack(bits: int, words: list[int]) -> None:
    """Every word is the pack of some codes: no bit is lost or read twice."""
    matrix = torch.tensor(words, dtype=torch.int32).reshape(12, 2)
    assert torch.equal(pack(unpack(matrix, bits), bits), matrix)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (2, [2] * 16, [0xAAAAAAAA]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
        (4, [15, 0, 0, 0, 0, 0, 0, 8], [0x8000000F]),
        (4, [1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0], [0x00000001, 0x00000020]),
        (8, [1, 2, 3, 255], [0xFF030201]),
        # Octal 76543210 is 0xFAC688; four of them are 96 bits.
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        # The two codes that straddle words: 10 (two bits below, one above) and 21 (one below, two above).
        (3, [7 if i == 10 else 0 for i in range(32)], [0xC0000000, 0x00000001, 0]),
        (3, [7 if i == 21 else 0 for i in range(32)], [0, 0x80000000, 0x00000003]),
        (3, [0] * 31 + [4], [0, 0, 0x80000000]),
    ],
)
def test_literal_words(bits: int, codes: list[int], words: list[int]) -> None:
    expected = [int32(word) for word in words]
    line = torch.tensor(codes, dtype=torch.uint8)
    assert pack(line[:, None], bits).flatten().tolist() == expected
    assert pack(line[None], bits, axis=1).flatten().tolist() == expected
    assert unpack(torch.tensor(expected, dtype=torch.int32)[:, None], bits).flatten().tolist() == codes


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16])
def test_widths_without_a_layout_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"not {bits}$"):
        pack(torch.zeros(32, 1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"not {bits}$"):
        unpack(torch.zeros(3, 1, dtype=torch.int32), bits)


@pytest.mark.parametrize(("bits", "n"), [(2, 8), (3, 16), (3, 33), (4, 12), (8, 6)])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_that_do_not_fill_words_are_refused(bits: int, n: int, axis: int) -> None:
    codes = torch.zeros(n, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"multiple of {packing_multiple(bits)} codes, not {n}"):
        pack(codes if axis == 0 else codes.T, bits, axis)


def test_three_bit_words_come_in_threes() -> None:
    with pytest.raises(ValueError, match="units of 3 words, not 4"):
        unpack(torch.zeros(4, 1, dtype=torch.int32), 3)


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"),
    [(8, 4, [0, 0, 0, 0, 1, 1, 1, 1]), (6, 4, [0, 0, 0, 0, 1, 1]), (3, -1, [0, 0, 0]), (3, 8, [0, 0, 0])],
)
def test_contiguous_groups(columns: int, group_size: int, groups: list[int]) -> None:
    group = contiguous_groups(columns, group_size)
    assert group.dtype == torch.int32
    assert group.tolist() == groups


def test_dequantize_follows_the_formula() -> None:
    linear = QuantizedLinear(
        codes=torch.tensor([[0, 15, 3, 4]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, -0.25]], dtype=torch.float16),
        zeros=torch.tensor([[8, 3]], dtype=torch.uint8),
        group=torch.tensor([0, 1, 1, 0], dtype=torch.int32),
        bits=4,
    )
    assert linear.dequantize().tolist() == [[-4.0, -3.0, 0.0, -2.0]]
    first, second = QuantizedLinear(
        linear.codes.repeat(3, 1), linear.scales.repeat(3, 1), linear.zeros.repeat(3, 1), linear.group, 4
    ).split([1, 2])
    assert (first.shape, second.shape) == ((1, 4), (2, 4))
    assert torch.equal(second.dequantize(), linear.dequantize().repeat(2, 1))


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_v1_zeros_of_every_value_survive_at_every_position(bits: int, make_model: MakeModel, tmp_path: Path) -> None:
    """v1 stores zero - 1; a field that borrowed from its neighbour would corrupt it."""
    writer, plan = open_writer(tmp_path, make_model("llama"), QuantSpec(bits=bits, group_size=16, sym=False))
    per_word, top = packing_multiple(bits), 2**bits - 1
    given, seen, turn = {}, set(), [0] * per_word
    for module, (rows, columns) in ((name, linear.shape) for name, linear in plan.items()):
        zeros = torch.empty(rows, columns // 16, dtype=torch.uint8)
        for row in range(rows):
            position = row % per_word
            for group in range(zeros.shape[1]):
                # Neighbours get different values: each position counts from a start of its own.
                zeros[row, group] = 1 + (turn[position] + 5 * position) % top
                turn[position] += 1
                seen.add((position, int(zeros[row, group])))
        codes = torch.randint(0, top + 1, (rows, columns), dtype=torch.uint8)
        scales = torch.full(zeros.shape, 0.5, dtype=torch.float16)
        given[module] = QuantizedLinear(codes, scales, zeros, contiguous_groups(columns, 16), bits)
    assert seen == {(position, value) for position in range(per_word) for value in range(1, top + 1)}

    with writer:
        for module, linear in given.items():
            writer.add_linear(module, linear)
        writer.add_others()
        writer.finish()
    reader = GptqSource(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        for module, linear in given.items():
            assert torch.equal(reader.read_codes(module).zeros, linear.zeros)
            fields = (linear.zeros.int() - 1).T.tolist()
            assert stored.get_tensor(f"{module}.qzeros").tolist() == [words_of(line, bits) for line in fields]


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_lands_is_words(bits: int) -> None:
    """A file of quantkit's own has codes of `bits` bits each, and gives them back."""
    codes = torch.randint(0, 2**bits, (6, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    scales, zeros = torch.ones(6, 3, dtype=torch.float16), torch.full((6, 3), 1, dtype=torch.uint8)
    linear = QuantizedLinear(codes, scales, zeros, contiguous_groups(70, 32), bits)
    tensors, fields = take_apart_packed(linear)
    assert tensors["words"].shape == (6, -(-70 * bits // 32))
    assert "codes" not in tensors
    back = put_together(tensors, json.loads(json.dumps(fields)))
    assert isinstance(back, QuantizedLinear)
    assert torch.equal(back.codes, codes)
    assert all(torch.equal(getattr(back, name), getattr(linear, name)) for name in ("scales", "zeros", "group"))


def test_what_lands_of_a_ggml_type_is_words() -> None:
    codes = torch.randint(0, 32, (6, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = torch.ones(6, 2, dtype=torch.float16)
    tensors, fields = take_apart_packed(GgmlLinear(codes, GgmlGrid("Q5_1", half, half)))
    assert tensors["words"].shape == (6, 10)
    back = put_together(tensors, json.loads(json.dumps(fields)))
    assert isinstance(back, GgmlLinear)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.grid.d, half)


def test_codes_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the block's file and for the output."""
    packed: list[int] = []
    monkeypatch.setattr(codes_of, "pack_rows", lambda codes, bits: packed.append(bits) or pack_rows(codes, bits))
    codes, ones = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1, dtype=torch.uint8)
    linear = QuantizedLinear(codes, ones.half(), ones, contiguous_groups(32, -1), 4)
    take_apart_packed(linear)
    assert linear.words.shape == (8, 4)
    assert packed == [4]
