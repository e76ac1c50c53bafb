"""The compiled loops against torch's own operations: same results, whatever the shape and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.problems import quantize
from support.tolerance import rounding, summed

from quantkit.codes.block_types import BLOCK_TYPES
from quantkit.options import QuantSpec
from quantkit.quantize import loops, search
from quantkit.quantize.hessian import HessianAccumulator, column_order, factorize
from quantkit.quantize.kernels import plain_columns
from quantkit.quantize.levels import midpoints, nearest_levels

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.fast,
    pytest.mark.skipif(not loops.has_numba(), reason="Numba is not installed (pip install 'quantkit[cpu]')"),
]

SHAPES = [(1, 1), (3, 17), (128, 300), (31, 257), (128, 1000)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def block(columns: int, rows: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(W, U, scale, minimum, top) of a block; one column is dead, one scale is zero, some scales are negative."""
    generator = torch.Generator().manual_seed(columns * rows + bits)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs[:, columns // 2] = 0
    H = inputs.T @ inputs / len(inputs)
    factor = factorize(H, column_order(H, True), 0.01)
    U = torch.eye(columns) if factor is None else factor.U
    top = 2**bits - 1
    scale = torch.rand(columns, rows, generator=generator) * 0.2 + 0.05
    scale[:, :: max(1, rows // 3)] *= -1
    scale[columns - 1, rows - 1] = 0
    W = torch.randn(columns, rows, generator=generator)
    return W, U, scale, scale * 2 ** (bits - 1), top


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_columns_are_quantized_as_torch_does(columns: int, rows: int, bits: int) -> None:
    """Codes may differ only where a weight lies on a tie but for the last bits of a sum."""
    W, U, scale, minimum, top = block(columns, rows, bits)
    codes, expected = (torch.full(W.shape, 99, dtype=torch.uint8) for _ in range(2))
    errors = loops.quantize_columns(W, U, scale, minimum, top, codes)
    expected_errors = plain_columns(W, U, scale, minimum, top, expected)
    assert int(codes.max()) <= top
    assert float((codes == expected).float().mean()) > 0.999
    same = (codes == expected).all(dim=0)  # of a row that went another way all later columns differ
    # Errors solve U^T E = W + minimum - codes * scale. What rounding changes in either side goes through the inverse
    # (Higham, Accuracy and Stability of Numerical Algorithms, theorem 8.5).
    summands = U.T.abs() @ expected_errors.abs() + W.abs() + minimum.abs() + (codes * scale).abs()
    size = torch.linalg.inv(U.T).abs() @ summands
    ours, theirs = (errors / size)[:, same], (expected_errors / size)[:, same]
    torch.testing.assert_close(ours, theirs, **summed(columns + 3, scale=1))


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_nearest_levels_of_a_table_are_found_as_torch_finds_them(columns: int, rows: int) -> None:
    W, U, scale, _, top = block(columns, rows, 4)
    scale, minimum = scale / 16, torch.zeros_like(scale)
    levels = torch.tensor(BLOCK_TYPES["IQ4_NL"].levels, dtype=torch.float32)
    codes, expected = (torch.full(W.shape, 99, dtype=torch.uint8) for _ in range(2))
    errors = loops.quantize_columns(W, U, scale, minimum, top, codes, levels)
    expected_errors = plain_columns(W, U, scale, minimum, top, expected, levels)
    assert float((codes == expected).float().mean()) > 0.999
    same = (codes == expected).all(dim=0)
    summands = U.T.abs() @ expected_errors.abs() + W.abs() + (levels[codes.int()] * scale).abs()
    size = torch.linalg.inv(U.T).abs() @ summands
    ours, theirs = (errors / size)[:, same], (expected_errors / size)[:, same]
    torch.testing.assert_close(ours, theirs, **summed(columns + 3, scale=1))


def test_both_searches_take_the_lower_of_two_levels_as_near() -> None:
    """Exactly halfway too, and beyond the ends; of a single column there is no sum that could differ."""
    levels = BLOCK_TYPES["IQ4_NL"].levels
    table = torch.tensor(levels, dtype=torch.float32)
    x = torch.cat([midpoints(table), torch.arange(-1100, 1100) / 8, torch.tensor([-1e6, 0.0, 1e6])])
    one = torch.ones(1, len(x))
    expected = (x[:, None] - table).abs().argmin(dim=1)
    for loop in (loops.quantize_columns, plain_columns):
        codes = torch.empty(1, len(x), dtype=torch.uint8)
        errors = loop(x[None], torch.ones(1, 1), one, torch.zeros_like(one), 15, codes, table)
        assert torch.equal(codes[0].long(), expected)
        assert torch.equal(errors[0], x - table[expected])
    assert torch.equal(nearest_levels(x.clone(), levels), table[expected])


def test_errors_are_fed_into_later_columns() -> None:
    """Against the plain algorithm in float64: each column alone would give other codes."""
    W, U, scale, minimum, top = block(128, 300, 3)
    left, expected = W.double(), torch.empty(W.shape, dtype=torch.uint8)
    for j in range(len(W)):
        step = torch.where(scale[j] == 0, 1.0, scale[j]).double()
        q = ((left[j] + minimum[j]) / step).round().clamp(0, top) * (scale[j] != 0)
        expected[j] = q.to(torch.uint8)
        error = (left[j] + minimum[j] - q * scale[j]) / U[j, j]
        left[j + 1 :] -= U[j, j + 1 :, None] * error
    codes = torch.empty_like(expected)
    loops.quantize_columns(W, U, scale, minimum, top, codes)
    assert float((codes == expected).float().mean()) > 0.999
    alone = ((W + minimum) / scale).round().clamp(0, top)
    assert float((codes == alone).float().mean()) < 0.9


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (17, 5), (64, 300), (576, 257)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_of_the_grid_search_are_torchs(size: int, rows: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(size + rows)
    W, importance = torch.randn(3, size, rows, generator=generator), torch.rand(3, size, generator=generator)
    scales = torch.randn(5, 3, rows, generator=generator) * 0.1
    zeros = torch.randint(1, 2**bits, scales.shape, generator=generator).float()
    top, reference = 2**bits - 1, search._TorchSums(W)
    found = loops.weighted_errors(W, importance, scales, zeros, top)
    expected = reference.weighted_errors(W, importance, scales, zeros, top)
    # A sum of squares of one sign, each rounded four times; but an error is what is left of a weight and a value of the
    # grid, and the rounding of that value may be large beside it.
    values = torch.stack([reference._round(W, *of, top) * of[0][:, None] for of in zip(scales, zeros, strict=True)])
    left = ((W - values) * values).abs()
    allowed = rounding(size + 4) * expected + rounding(2) * (importance[..., None] * left).sum(dim=2)
    assert bool(((found - expected).abs() <= allowed).all())
    pair = loops.least_squares(W, importance, scales[0], zeros[0], top)
    for sums, wanted in zip(pair, reference.least_squares(W, importance, scales[0], zeros[0], top), strict=True):
        torch.testing.assert_close(sums, wanted, **summed(size + 2))  # of one sign: a step has its weight's and scale's


@pytest.mark.parametrize("rows", [1, 16, 100, 1000])
def test_the_result_does_not_depend_on_the_number_of_threads(rows: int, threads: None) -> None:
    found = []
    W, U, scale, minimum, top = block(64, rows, 4)  # made by matrix products, which do
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        codes = torch.empty(W.shape, dtype=torch.uint8)
        errors = loops.quantize_columns(W, U, scale, minimum, top, codes)
        sums = loops.weighted_errors(W[None], torch.ones(1, 64), scale[:1, None], minimum[:1, None], top)
        found.append((codes, errors, sums))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, group_size=32),
        QuantSpec(bits=3, group_size=48, sym=False),
        QuantSpec(bits=4, group_size=32, act_order="dynamic"),
        QuantSpec(bits=4, group_size=32, sym=True, ggml="Q4_0"),
        QuantSpec(bits=4, group_size=32, sym=True, ggml="IQ4_NL"),
    ],
    ids=["static", "asymmetric, short group", "dynamic", "Q4_0", "IQ4_NL"],
)
def test_without_numba_torch_gives_the_same_codes(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(80, 160, generator=generator) * 0.05
    hessian = HessianAccumulator(160, torch.device("cpu"))
    hessian.add(torch.randn(640, 160, generator=generator) @ torch.randn(160, 160, generator=generator))
    H = hessian.finish("layer")
    compiled = quantize(W, H, spec)
    monkeypatch.setattr(loops, "has_numba", lambda: False)
    slower = quantize(W, H, spec)
    assert float((compiled.linear.codes == slower.linear.codes).float().mean()) > 0.995
    torch.testing.assert_close(compiled.loss.sum(), slower.loss.sum(), rtol=1e-2, atol=0)
