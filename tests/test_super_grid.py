"""The K-quants' grids, and GPTQ on them: what is optimised is what ggml stores, by gguf-py's dequantizer."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from test_quant import naive_gptq, problem

from quantkit.codes.ggml import SUPER_BLOCK_TYPES, pack_super_blocks
from quantkit.errors import NumericError
from quantkit.quant.gptq import SuperResult, quantize_on_super_grid
from quantkit.quant.super_grid import SuperGrid, fit_super_grid

NAMES = tuple(SUPER_BLOCK_TYPES)


def rounded(W: torch.Tensor, grid: SuperGrid) -> torch.Tensor:
    scale, minimum = grid.steps()
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    codes = ((W + minimum) * inverse).round().clamp(0, 2**grid.kind.bits - 1)
    return codes * scale - minimum


def stored_values(result: SuperResult, name: str) -> torch.Tensor:
    """What ggml reads."""
    grid = result.grid
    minimum = () if grid.dmin is None or grid.m is None else (grid.dmin.numpy(), grid.m.numpy())
    rows = pack_super_blocks(name, result.codes.numpy(), grid.d.numpy(), grid.sc.numpy(), *minimum)
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", NAMES)
def test_what_ggml_reads_is_what_was_optimised(name: str) -> None:
    W, H = problem(12, 512, seed=1)
    result = quantize_on_super_grid(W, H, name, 0.05)
    torch.testing.assert_close(stored_values(result, name), result.dequantize(), rtol=1e-6, atol=1e-7)
    error = (W - result.dequantize()).double()
    assert torch.allclose(result.loss, ((error @ H.double()) * error).sum(dim=1), rtol=1e-3)
    kind = SUPER_BLOCK_TYPES[name]
    low, high = (
        (0, 2**kind.scale_bits) if kind.has_minimum else (-(2 ** (kind.scale_bits - 1)), 2 ** (kind.scale_bits - 1))
    )
    for part in (result.grid.sc, *(() if result.grid.m is None else (result.grid.m,))):
        assert low <= int(part.min()) <= int(part.max()) < high


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_naive_float64_ones_on_the_frozen_grid(name: str) -> None:
    W, H = problem(16, 256, seed=2, dead=(3, 255))
    result = quantize_on_super_grid(W, H, name, 0.01)
    scale, minimum = (part.double().numpy() for part in result.grid.steps())
    assert (scale != 0).all()
    perm = np.argsort(-np.diag(H.numpy()), kind="stable")
    codes, _ = naive_gptq(W.numpy(), H.numpy(), perm, 0.01, scale, minimum / scale, SUPER_BLOCK_TYPES[name].bits)
    differences = np.abs(codes - result.codes.numpy().astype(np.int64))
    assert differences.max() <= 1
    assert np.mean(differences > 0) < 0.005


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_better_than_extremes_and_feedback_better_than_the_fit(name: str) -> None:
    """Extremes: each sub-block's largest weight just held, snapped to the same units."""
    W, H = problem(32, 512, seed=3)
    importance = H.diagonal() + 0.01 * H.diagonal().mean()
    grid = fit_super_grid(W, importance, name)
    kind = SUPER_BLOCK_TYPES[name]
    groups = W.reshape(32, -1, kind.sub_block)
    if kind.has_minimum:
        low = groups.amin(dim=2).clamp(max=0)
        scale, minimum = (groups.amax(dim=2) - low) / (2**kind.bits - 1), -low
        limit = 2**kind.scale_bits - 1
        units = [part.reshape(32, 2, -1).amax(dim=2) / limit for part in (scale, minimum)]
        count = scale.shape[1] // 2
        wide = [unit.repeat_interleave(count, 1) for unit in units]
        sc, m = (scale / wide[0]).round(), (minimum / wide[1]).round()
        textbook = SuperGrid(units[0].half(), sc.short(), units[1].half(), m.short(), kind)
    else:
        scale = groups.abs().amax(dim=2) / 2 ** (kind.bits - 1)
        limit = 2 ** (kind.scale_bits - 1)
        unit = scale.reshape(32, 2, -1).amax(dim=2) / (limit - 1)
        sc = (scale / unit.repeat_interleave(scale.shape[1] // 2, 1)).round()
        textbook = SuperGrid(unit.half(), sc.short(), None, None, kind)

    def weighted(values: torch.Tensor) -> float:
        return float(((W - values).square() * importance).sum())

    assert weighted(rounded(W, grid)) < 0.95 * weighted(rounded(W, textbook))
    error = (W - rounded(W, grid)).double()
    only_rounded = float(((error @ H.double()) * error).sum())
    assert float(quantize_on_super_grid(W, H, name, 0.01).loss.sum()) < 0.95 * only_rounded


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-7, 3e4])
def test_constant_rows_are_held(name: str, value: float) -> None:
    W = torch.full((2, 256), value)
    result = quantize_on_super_grid(W, torch.eye(256), name, 0.01)
    assert result.dequantize().isfinite().all()
    tolerance = abs(value) * 0.07 + 1e-6
    assert float((result.dequantize() - W).abs().max()) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_without_a_hessian_the_layer_is_rounded(name: str) -> None:
    W, _ = problem(4, 256, seed=5)
    result = quantize_on_super_grid(W, torch.zeros(256, 256), name, 0.01)
    assert result.fallback == "rounding"
    assert torch.equal(result.dequantize(), rounded(W, result.grid))


def test_a_unit_beyond_float16_is_an_error() -> None:
    W = torch.full((1, 256), 1e9)
    W[0, ::2] = -1e9
    with pytest.raises(NumericError, match="beyond float16"):
        fit_super_grid(W, torch.ones(256), "Q2_K")
