"""The numerics of GPTQ, against a naive float64 GPTQ and against arithmetic done by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.problems import naive_gptq, problem, quantize
from support.tolerance import assert_mean_product

from quantkit.codes import QuantizedLinear, contiguous_groups
from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import fit_grid, minmax_grid, round_to_nearest
from quantkit.quantize.hessian import HessianAccumulator, column_order, factorize, row_losses

pytestmark = [pytest.mark.numerics, pytest.mark.fast]


def exact_loss(W: torch.Tensor, linear: QuantizedLinear, H: torch.Tensor) -> np.ndarray:
    group = linear.group.long()
    q = (linear.codes.double() - linear.zeros.double()[:, group]) * linear.scales.double()[:, group]
    error = (W.double() - q).numpy()
    return np.einsum("oi,ij,oj->o", error, H.double().numpy(), error)


def weighted_error(w: torch.Tensor, h: torch.Tensor, scale: float, zero: int, bits: int) -> float:
    """Least weighted error of one group on a grid, by trying every code for every weight."""
    values = scale * (torch.arange(2**bits).double() - zero)
    distance = (w.double()[:, None] - values).square().amin(dim=1)
    return float((distance * h.double()).sum())


# -- GPTQ against the naive one --------------------------------------------------------------------------------------

# One block and several, groups inside blocks and across them, short last groups, one group wider than the row.
SHAPES = [(64, 32), (72, 32), (200, 128), (136, -1), (300, 24), (40, 128), (264, 160)]


@pytest.mark.parametrize("columns_and_group", SHAPES, ids=str)
@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False), (8, True)])
def test_codes_are_the_naive_float64_ones(
    columns_and_group: tuple[int, int], act_order: str, bits: int, sym: bool
) -> None:
    columns, group_size = columns_and_group
    W, H = problem(24, columns, seed=columns + bits, dead=(3, columns - 1))
    spec = QuantSpec(bits=bits, group_size=group_size, sym=sym, act_order=act_order, damp=0.01)
    result = quantize(W, H, spec)
    linear = result.linear
    assert (result.fallback, result.damp) == ("", 0.01)

    natural = np.arange(columns)
    perm = natural if act_order == "off" else np.argsort(-np.diag(H.numpy()), kind="stable")
    size = columns if group_size == -1 else group_size
    group = np.empty(columns, dtype=np.int64)
    group[perm if act_order == "dynamic" else natural] = natural // size
    assert np.array_equal(linear.group.numpy(), group)

    scale, zero = linear.scales.double().numpy()[:, group], linear.zeros.double().numpy()[:, group]
    codes, _ = naive_gptq(W.numpy(), H.numpy(), perm, 0.01, scale, zero, bits)
    # A weight halfway between two codes may fall to the other side in float32, and move others of its row a little;
    # how many do depends on the order of sums, so on the number of threads. Finer codes have more halves to fall from.
    differences = np.abs(codes - linear.codes.numpy().astype(np.int64))
    assert differences.max() <= 1
    assert np.mean(differences > 0) < (0.01 if bits == 8 else 0.002)
    oracle = QuantizedLinear(torch.from_numpy(codes).to(torch.uint8), linear.scales, linear.zeros, linear.group, bits)
    assert float(result.loss.sum()) == pytest.approx(exact_loss(W, oracle, H).sum(), rel=4e-3 if bits == 8 else 1e-3)


@pytest.mark.parametrize("act_order", ["dynamic", "off"])
@pytest.mark.parametrize(("columns", "group_size"), [(200, 32), (328, 160)])
def test_grids_on_the_way_are_fitted_to_the_weights_as_updated(act_order: str, columns: int, group_size: int) -> None:
    """Not to weights that miss the updates of the block in hand."""
    W, H = problem(24, columns, seed=5)
    spec = QuantSpec(bits=3, group_size=group_size, act_order=act_order)
    linear = quantize(W, H, spec).linear
    perm = column_order(H, act_order != "off").numpy()
    group = linear.group.numpy()
    scale, zero = linear.scales.double().numpy()[:, group], linear.zeros.double().numpy()[:, group]
    factor = factorize(H, torch.from_numpy(perm), spec.damp)
    assert factor is not None
    importance = H.diagonal() + factor.damp * H.diagonal().mean()
    for number in range(1, linear.scales.shape[1]):
        members = perm[number * group_size : (number + 1) * group_size]
        before = perm[: number * group_size]
        # The weights when the group's first column comes: the earlier columns' updates, none of its own.
        updated = W.double().numpy().copy()
        damped = H.double().numpy() + spec.damp * float(H.diagonal().mean()) * np.eye(columns)
        rest = perm[number * group_size :]
        quantized = scale[:, before] * (linear.codes.numpy()[:, before] - zero[:, before])
        # Given the earlier columns' codes, GPTQ leaves the rest at the minimum of the damped loss.
        error = updated[:, before] - quantized
        updated[:, rest] += error @ damped[np.ix_(before, rest)] @ np.linalg.inv(damped[np.ix_(rest, rest)])
        fitted = fit_grid(torch.from_numpy(updated[:, members]).float(), importance[members], -1, 3, True)
        same = fitted.scales[:, 0] == linear.scales[:, number]
        assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
def test_dead_columns_are_rounded_and_influence_nothing(act_order: str) -> None:
    dead = (0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 70)  # 8..15 are a whole group
    W, H = problem(16, 72, dead=dead)
    spec = QuantSpec(bits=4, group_size=8, act_order=act_order)
    linear = quantize(W, H, spec).linear
    scale, zero = linear.scales.float()[:, linear.group.long()], linear.zeros.float()[:, linear.group.long()]
    nearest = torch.round(W / scale + zero).clamp(0, 15)
    assert torch.equal(linear.codes[:, list(dead)].float(), nearest[:, list(dead)])
    # In a group of their own dead columns do not even share a grid: other weights there leave the rest alone.
    other = W.clone()
    other[:, 8:16] *= -0.5
    if act_order != "dynamic":
        changed = (quantize(other, H, spec).linear.codes != linear.codes).any(dim=0).nonzero().flatten().tolist()
        assert set(changed) <= set(range(8, 16))
        assert changed


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
def test_loss_is_below_plain_roundings(bits: int, sym: bool, act_order: str) -> None:
    W, H = problem(32, 96, seed=bits)
    result = quantize(W, H, QuantSpec(bits=bits, group_size=32, sym=sym, act_order=act_order))
    assert float(result.loss.sum()) < 0.8 * float(result.rtn_loss.sum())


@pytest.mark.parametrize("sym", [True, False])
def test_reported_losses_are_those_of_the_codes(sym: bool) -> None:
    W, H = problem(16, 72)
    spec = QuantSpec(bits=3, group_size=32, sym=sym)
    result = quantize(W, H, spec)
    np.testing.assert_allclose(result.loss.numpy(), exact_loss(W, result.linear, H), rtol=1e-4)
    np.testing.assert_allclose(result.rtn_loss.numpy(), exact_loss(W, round_to_nearest(W, spec), H), rtol=1e-4)
    assert result.loss.dtype == torch.float64


@pytest.mark.parametrize("tokens", [2000, 24])
@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
def test_a_loss_is_of_the_hessian_without_its_damping(act_order: str, tokens: int) -> None:
    """With fewer tokens than columns most of what the recursion sums is damping."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=generator) * torch.logspace(-2, 1, 96)
    W, H = torch.randn(20, 96, generator=generator), x.T @ x / tokens
    result = quantize(W, H, QuantSpec(bits=4, group_size=32, act_order=act_order))
    assert not result.fallback
    np.testing.assert_allclose(result.loss.numpy(), exact_loss(W, result.linear, H), rtol=1e-3)
    dead = quantize(W, torch.diag(torch.arange(96.0) % 2), QuantSpec(bits=4, group_size=32, act_order=act_order))
    assert float(dead.loss.min()) >= 0


@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(128, -1), (264, 64)])
def test_rows_are_independent(act_order: str, sym: bool, columns: int, group_size: int) -> None:
    W, H = problem(77, columns, seed=9)
    spec = QuantSpec(bits=4, group_size=group_size, sym=sym, act_order=act_order)
    parts = [quantize(part, H, spec).linear for part in W.split([13, 64])]
    codes = torch.cat([part.codes for part in parts])
    scales, zeros = torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts])
    whole = quantize(W, H, spec).linear
    if columns == 128 or act_order == "static":  # grids do not come after a matrix product
        assert torch.equal(whole.scales, scales)
        assert torch.equal(whole.zeros, zeros)
    if columns == 128:
        assert torch.equal(whole.codes, codes)
    else:
        # Between blocks the matrix product rounds differently for another number of rows, so ties may differ.
        assert float((whole.codes != codes).float().mean()) < 0.002


@pytest.mark.parametrize("act_order", ["static", "off"])
def test_equal_calls_give_equal_bits(act_order: str) -> None:
    W, H = problem(33, 200)
    spec = QuantSpec(bits=4, group_size=64, act_order=act_order)
    first, again = quantize(W, H, spec), quantize(W.clone(), H.clone(), spec)
    assert torch.equal(first.linear.codes, again.linear.codes)
    assert torch.equal(first.linear.scales, again.linear.scales)
    assert torch.equal(first.loss, again.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_other_dtypes_are_taken_at_their_value(dtype: torch.dtype) -> None:
    W, H = problem(8, 64)
    spec = QuantSpec(bits=4, group_size=32)
    assert torch.equal(quantize(W.to(dtype), H, spec).linear.codes, quantize(W.to(dtype).float(), H, spec).linear.codes)


# -- plain rounding and grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_plain_rounding_is_nearest_on_the_stored_scales(bits: int, sym: bool) -> None:
    W, _ = problem(16, 72, seed=bits)
    linear = round_to_nearest(W, QuantSpec(bits=bits, group_size=32, sym=sym))
    group = linear.group.long()
    scale, zero = linear.scales.double()[:, group], linear.zeros.double()[:, group]
    values = scale[..., None] * (torch.arange(2**bits).double() - zero[..., None])
    distance = (W.double()[..., None] - values).abs()
    chosen = distance.gather(2, linear.codes.long()[..., None])[..., 0]
    assert bool((chosen <= distance.amin(dim=-1) * (1 + 1e-5) + 1e-9).all())
    assert int(linear.zeros.min()) >= 1
    if sym:
        assert set(linear.zeros.flatten().tolist()) == {2 ** (bits - 1)}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_search_is_never_worse_than_min_and_max(bits: int, sym: bool) -> None:
    W, H = problem(48, 72, seed=100 + bits)
    h = H.diagonal()
    found, plain = fit_grid(W, h, 32, bits, sym), minmax_grid(W, 32, bits, sym)
    errors = torch.zeros(2, *found.scales.shape, dtype=torch.float64)
    for which, grid in enumerate((found, plain)):
        for row in range(W.shape[0]):
            for g, part in enumerate((slice(0, 32), slice(32, 64), slice(64, 72))):
                scale, zero = float(grid.scales[row, g]), int(grid.zeros[row, g])
                errors[which, row, g] = weighted_error(W[row, part], h[part], scale, zero, bits)
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
    assert float(errors[0].sum()) < 0.97 * float(errors[1].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_longer_side_of_a_symmetric_grid_goes_to_the_extreme(bits: int) -> None:
    """Steps of 1 / half hold all these weights exactly, if code 0, which reaches furthest, stands for +1."""
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    W = torch.randint(1 - half, half, (20, 32), generator=generator) / half
    W[:, 5] = 1.0
    up, down = fit_grid(W, torch.ones(32), -1, bits, True), fit_grid(-W, torch.ones(32), -1, bits, True)
    assert up.scales.flatten().tolist() == [-1 / half] * 20
    assert down.scales.flatten().tolist() == [1 / half] * 20
    assert quantize(W, torch.eye(32), QuantSpec(bits=bits, group_size=-1)).loss.tolist() == [0.0] * 20


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-9, 1e-30])
def test_groups_of_nothing_dequantize_to_nothing(sym: bool, value: float) -> None:
    W, H = problem(4, 64)
    W[:, :32] = value
    spec = QuantSpec(bits=4, group_size=32, sym=sym, act_order="static")
    for linear in (quantize(W, H, spec).linear, round_to_nearest(W, spec)):
        assert bool((linear.scales != 0).all())
        assert bool((linear.dequantize()[:, :32].abs() <= 2.0**-20).all())
    # With nothing before it in the order, a group of zeros stays zero exactly.
    alone = quantize(torch.full((4, 32), value), H[:32, :32], spec).linear
    assert float(alone.dequantize().abs().max()) == 0.0


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_a_scale_beyond_float16_is_refused(sym: bool, act_order: str, size: float) -> None:
    W, H = problem(4, 64)
    W[2, 40] = size
    with pytest.raises(NumericError, match="beyond float16"):
        quantize(W, H, QuantSpec(bits=4, group_size=32, sym=sym, act_order=act_order))


@pytest.mark.parametrize("sym", [True, False])
def test_a_scale_beyond_float16_is_refused_where_a_layer_is_only_rounded(sym: bool) -> None:
    W, H = problem(4, 64)
    W[2, 40] = 1e7
    with pytest.raises(NumericError, match="beyond float16"):
        quantize(W, torch.zeros_like(H), QuantSpec(bits=4, group_size=32, sym=sym))


def test_large_weights_that_fit_are_quantized() -> None:
    W, H = problem(4, 64)
    linear = quantize(1e5 * W, H, QuantSpec(bits=4, group_size=32)).linear
    assert bool(torch.isfinite(linear.dequantize()).all())
    assert float((linear.dequantize() - 1e5 * W).norm() / (1e5 * W).norm()) < 0.3


# -- the Hessian and its factor --------------------------------------------------------------------------------------


def check_inverse(U: torch.Tensor, damped: np.ndarray) -> None:
    U64 = U.double().numpy()
    assert np.array_equal(U64, np.triu(U64))
    np.testing.assert_allclose(U64.T @ U64 @ damped, np.eye(len(damped)), atol=2e-3)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 5, 64, 130])
def test_factor_is_of_the_damped_inverse(columns: int, act_order: bool) -> None:
    _, H = problem(1, columns)
    factor = factorize(H, column_order(H, act_order), 0.05)
    assert factor is not None
    assert (factor.damp, factor.fallback) == (0.05, "")
    damped = H.double().numpy() + 0.05 * float(H.double().diagonal().mean()) * np.eye(columns)
    perm = factor.perm.numpy()
    assert sorted(perm.tolist()) == list(range(columns))
    if act_order:
        assert bool((H.diagonal()[factor.perm].diff() <= 0).all())
    check_inverse(factor.U, damped[np.ix_(perm, perm)])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_damping_rises_until_there_is_a_factor(size: float) -> None:
    H = size * torch.tensor([[1.0, 1.3], [1.3, 1.0]])  # smallest eigenvalue -0.3 of the mean diagonal
    factor = factorize(H, torch.arange(2), 0.05)
    assert factor is not None
    assert factor.damp == pytest.approx(0.4)
    assert factor.fallback == ""
    check_inverse(factor.U, H.double().numpy() + 0.4 * size * np.eye(2))


def test_eigenvalues_are_repaired_where_damping_is_not_enough() -> None:
    H = torch.tensor([[1.0, 10.0], [10.0, 1.0]])  # eigenvalues 11 and -9
    factor = factorize(H, torch.arange(2), 0.05)
    assert factor is not None
    assert (factor.fallback, factor.damp) == ("eigenvalues", 0.05)
    # -9 lifted to 0.05: the mean and half the difference of 11 and 0.05.
    check_inverse(factor.U, np.array([[5.525, 5.475], [5.475, 5.525]]))

    W = torch.tensor([[0.3, -0.7], [0.9, 0.1]])
    assert quantize(W, H, QuantSpec(bits=4, group_size=-1)).fallback == "eigenvalues"


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_without_a_usable_hessian_the_layer_is_rounded_and_says_so(broken: float) -> None:
    W, H = problem(8, 64)
    H = torch.full_like(H, broken)
    assert factorize(H, torch.arange(64), 0.05) is None
    spec = QuantSpec(bits=4, group_size=32)
    result = quantize(W, H, spec)
    assert (result.fallback, result.damp) == ("rounding", 0.0)
    assert torch.equal(result.linear.codes, round_to_nearest(W, spec).codes)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 64, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_hessian_is_the_mean_outer_product(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    accumulator = HessianAccumulator(columns, torch.device("cpu"))
    batches = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 9, columns), (1, 5, columns))]
    batches.append(torch.randn(7, columns, generator=generator).to(dtype))
    for batch in batches:
        accumulator.add(batch)
    H = accumulator.finish("layer")
    X = torch.cat([batch.reshape(-1, columns) for batch in batches])
    assert accumulator.tokens == len(X) == 30
    assert H.dtype == torch.float32
    assert torch.equal(H, H.T)
    assert_mean_product(H, X)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("column", [0, 6])
def test_an_activation_that_is_not_finite_names_its_layer(value: float, column: int) -> None:
    accumulator = HessianAccumulator(7, torch.device("cpu"))
    x = torch.ones(3, 7)
    x[1, column] = value
    accumulator.add(x)
    accumulator.add(torch.ones(3, 7))
    with pytest.raises(NumericError, match=r"^model\.layers\.3\.mlp\.down_proj: .*not finite"):
        accumulator.finish("model.layers.3.mlp.down_proj")


def test_row_losses_of_exact_weights_are_zero() -> None:
    linear = QuantizedLinear(
        torch.randint(0, 16, (3, 8), dtype=torch.uint8),
        torch.full((3, 1), 0.5, dtype=torch.float16),
        torch.full((3, 1), 8, dtype=torch.uint8),
        contiguous_groups(8, -1),
        4,
    )
    _, H = problem(1, 8)
    assert row_losses(linear.dequantize(), linear, H).tolist() == [0.0, 0.0, 0.0]
    shifted = linear.dequantize()
    shifted[1, 2] += 0.25
    assert row_losses(shifted, linear, H).tolist() == pytest.approx([0.0, 0.0625 * float(H[2, 2]), 0.0])
