"""The grids of GGML's types, and GPTQ on them: what is optimised is what ggml stores, by gguf-py's dequantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.problems import naive_gptq, problem, quantize
from support.tolerance import summed

from quantkit.codes import GgmlGrid, GgmlLinear, QuantizedLinear, kinds
from quantkit.codes.block_types import (
    BLOCK_TYPES,
)
from quantkit.codes.reencode import reencode
from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.quantize.ggml_grid import fit_ggml_grid
from quantkit.quantize.methods import Solved

pytestmark = [pytest.mark.numerics, pytest.mark.fast]

SUPER = tuple(name for name, kind in BLOCK_TYPES.items() if kind.scale_bits)
NAMES = tuple(BLOCK_TYPES)


def spec(name: str, damp: float = 0.1) -> QuantSpec:
    kind = BLOCK_TYPES[name]
    return QuantSpec(bits=kind.bits, group_size=kind.group, sym=not kind.has_minimum, damp=damp, ggml=name)


def on_grid(result: Solved) -> GgmlLinear:
    assert isinstance(result.linear, GgmlLinear)
    return result.linear


def of_columns(grid: GgmlGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, minimum) of every column, float32 [out, in] each."""
    scale, minimum = (part.repeat_interleave(grid.kind.group, dim=1) for part in grid.steps())
    return scale, minimum


def rounded(W: torch.Tensor, grid: GgmlGrid) -> torch.Tensor:
    scale, minimum = of_columns(grid)
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    if grid.levels is not None:
        return grid.levels[(W * inverse)[..., None].sub(grid.levels).abs().argmin(dim=-1)] * scale
    codes = ((W + minimum) * inverse).round().clamp(0, 2**grid.kind.bits - 1)
    return codes * scale - minimum


def stored_values(linear: GgmlLinear) -> torch.Tensor:
    """What ggml reads."""
    return torch.from_numpy(kinds.dequantize(linear.pack(), kinds.Kind[linear.grid.type]))


@pytest.mark.parametrize("name", NAMES)
def test_what_ggml_reads_is_what_was_optimised(name: str) -> None:
    W, H = problem(12, 512, seed=1)
    result = quantize(W, H, spec(name, 0.05))
    linear = on_grid(result)
    # A step, its multiple and a minimum, subtracted: both may be about as large as the largest weight.
    torch.testing.assert_close(stored_values(linear), linear.dequantize(), **summed(4, scale=2 * float(W.abs().max())))
    error = (W - linear.dequantize()).double()
    assert torch.allclose(result.loss, ((error @ H.double()) * error).sum(dim=1), rtol=1e-3)
    assert float(result.loss.sum()) < float(result.rtn_loss.sum())


@pytest.mark.parametrize("name", SUPER)
def test_multiples_stay_within_the_bits_of_their_type(name: str) -> None:
    grid = fit_ggml_grid(problem(12, 512, seed=1)[0], torch.ones(512), name)
    kind = BLOCK_TYPES[name]
    half = 2 ** (kind.scale_bits - 1)
    low, high = (0, 2 * half) if kind.has_minimum else (-half, half)
    for part in (grid.sc, *(() if grid.m is None else (grid.m,))):
        assert part is not None
        assert low <= int(part.min()) <= int(part.max()) < high


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_naive_float64_ones_on_the_frozen_grid(name: str) -> None:
    W, H = problem(16, 256, seed=2, dead=(3, 255))
    linear = on_grid(quantize(W, H, spec(name, 0.01)))
    scale, minimum = (part.double().numpy() for part in of_columns(linear.grid))
    assert (scale != 0).all()
    perm = np.argsort(-np.diag(H.numpy()), kind="stable")
    kind = BLOCK_TYPES[name]
    codes, _ = naive_gptq(W.numpy(), H.numpy(), perm, 0.01, scale, minimum / scale, kind.bits, kind.levels)
    differences = np.abs(codes - linear.codes.numpy().astype(np.int64))
    assert differences.max() <= 1
    assert np.mean(differences > 0) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_better_than_extremes_and_feedback_better_than_the_fit(name: str) -> None:
    W, H = problem(32, 512, seed=3)
    importance = H.diagonal() + 0.01 * H.diagonal().mean()
    grid = fit_ggml_grid(W, importance, name)

    def weighted(values: torch.Tensor) -> float:
        return float(((W - values).square() * importance).sum())

    assert weighted(rounded(W, grid)) < 0.95 * weighted(rounded(W, _of_extremes(W, name)))
    error = (W - rounded(W, grid)).double()
    only_rounded = float(((error @ H.double()) * error).sum())
    assert float(quantize(W, H, spec(name, 0.01)).loss.sum()) < 0.95 * only_rounded


def _of_extremes(W: torch.Tensor, name: str) -> GgmlGrid:
    """Each group's largest weight just held, snapped to the same units."""
    kind = BLOCK_TYPES[name]
    groups = W.reshape(W.shape[0], -1, kind.group)
    if kind.has_minimum:
        low = groups.amin(dim=2)
        low = low if not kind.scale_bits else low.clamp(max=0)
        scale, minimum = (groups.amax(dim=2) - low) / (2**kind.bits - 1), -low
    else:
        scale, minimum = groups.abs().amax(dim=2) / (-kind.levels[0] if kind.levels else kind.zero), None
    if not kind.scale_bits:
        return GgmlGrid(name, scale.half(), None if minimum is None else minimum.half())
    limit = 2**kind.scale_bits - 1 if kind.has_minimum else 2 ** (kind.scale_bits - 1) - 1
    blocks = W.shape[1] // kind.columns

    def snapped(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unit = part.reshape(W.shape[0], blocks, -1).amax(dim=2) / limit
        count = (part / unit.repeat_interleave(part.shape[1] // blocks, 1)).round()
        return unit.half(), count.short()

    d, sc = snapped(scale)
    return GgmlGrid(name, d, sc=sc) if minimum is None else GgmlGrid(name, d, (m := snapped(minimum))[0], sc, m[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-7, 3e4])
def test_constant_rows_are_held(name: str, value: float) -> None:
    W = torch.full((2, 256), value)
    linear = on_grid(quantize(W, torch.eye(256), spec(name, 0.01)))
    assert linear.dequantize().isfinite().all()
    tolerance = abs(value) * 0.07 + 1e-6
    assert float((linear.dequantize() - W).abs().max()) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_without_a_hessian_the_layer_is_rounded(name: str) -> None:
    W, _ = problem(4, 256, seed=5)
    result = quantize(W, torch.zeros(256, 256), spec(name, 0.01))
    assert result.fallback == "rounding"
    assert torch.equal(on_grid(result).dequantize(), rounded(W, on_grid(result).grid))


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_cut_into_its_rows(name: str) -> None:
    W, H = problem(12, 256, seed=6)
    whole = on_grid(quantize(W, H, spec(name)))
    parts = whole.split([5, 7])
    assert [part.shape for part in parts] == [(5, 256), (7, 256)]
    assert np.array_equal(np.concatenate([part.pack() for part in parts]), whole.pack())
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q5_0", "Q8_0"])
def test_symmetric_blocks_are_those_of_a_checkpoint_with_groups_of_a_block(name: str) -> None:
    """One run's codes, whether they go through a GPTQ checkpoint or straight into blocks."""
    W, H = problem(16, 256, seed=7)
    straight = quantize(W, H, spec(name))
    checkpoint = quantize(W, H, spec(name).model_copy(update={"ggml": None}))
    assert isinstance(checkpoint.linear, QuantizedLinear)
    assert np.array_equal(on_grid(straight).pack(), reencode(checkpoint.linear, name))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"])
def test_a_unit_beyond_float16_is_an_error(name: str) -> None:
    W = torch.full((1, 256), 1e9)
    W[0, ::2] = -1e9
    with pytest.raises(NumericError, match="beyond float16"):
        fit_ggml_grid(W, torch.ones(256), name)
