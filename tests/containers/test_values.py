"""What is among a tensor's values, seen in their bits: NaN and infinity, and what float16 makes zeros of."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Recorder

from quantkit.containers import values
from quantkit.containers.values import Underflow, all_finite

pytestmark = pytest.mark.fast

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", KINDS)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_TILE", 5)
    info = torch.finfo(dtype)
    rows = [[info.max, -info.max, info.tiny], [0.0, -0.0, info.smallest_normal / 2], [1.0, -1.0, 3.0]]
    sound = torch.tensor(rows, dtype=dtype)
    assert all_finite(sound)
    assert all_finite(sound.T)
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        for at in range(9):
            spoiled = sound.clone()
            spoiled.view(-1)[at] = value
            assert not all_finite(spoiled), (value, at)
            assert not all_finite(spoiled.T)


def test_nothing_and_whole_numbers_are_finite() -> None:
    assert all_finite(torch.empty(0, 4, dtype=torch.float16))
    assert all_finite(torch.tensor([2**62, -1]))


@pytest.mark.parametrize("dtype", KINDS[1:])
@pytest.mark.parametrize("lost", [0, 1, 2, 9])
def test_what_becomes_zero_is_counted(
    dtype: torch.dtype, lost: int, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 1 % of what was not 0, over all that is seen of a tensor; 2^-25 becomes 0, what is above does not."""
    monkeypatch.setattr(values, "_TILE", 64)
    whole = torch.full((200,), 2.0**-25 * 1.01, dtype=dtype)
    whole[::2] = 0
    whole[1 : 2 * lost : 2] = -(2.0**-25)
    whole[0] = -0.0
    seen = Underflow()
    for part in whole.split(70):
        seen.see("w", part)
    seen.warn(recorder, "do otherwise")
    if lost < 2:
        assert not recorder.warnings
    else:
        assert recorder.warnings[0].startswith(f"float16 makes zeros of {lost} % of the values of w,")


def test_where_float16_holds_what_there_is_nothing_is_counted(recorder: Recorder) -> None:
    seen = Underflow()
    seen.see("half", torch.full((4,), 2.0**-24, dtype=torch.float16))
    seen.see("wide", torch.full((4,), 1e-9), torch.bfloat16)
    seen.warn(recorder, "")
    assert not recorder.warnings
