"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

Pure functions: a weight and the Hessian of its inputs in, codes and their loss out. Rows are independent given the
Hessian, so Linears that read the same input are stacked and quantized in one call. Letters are the paper's:

    W   [out, in]   the weight
    H   [in, in]    mean of x x^T over calibration tokens
    U   [in, in]    upper triangular, ``H_damped^-1 = U^T U`` in the order of columns `perm`
    Err [in, out]   errors of quantized columns over U's diagonal
"""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.codes import Codes, contiguous_groups
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import GptqGrid, fit_grid, round_to_nearest
from quantkit.quantize.hessian import HessianAccumulator, InverseFactor, column_order, factorize, row_losses
from quantkit.quantize.kernels import beside, column_loop, placed
from quantkit.quantize.methods import Need, Solved, fit
from quantkit.quantize.rounding import rounded

needs: tuple[Need, ...] = ("weight",)
gathers = HessianAccumulator  # sums for H float32 [in, in]
_BLOCK = 128  # columns; those behind a block get its errors in one matrix product


def solve(tiles: Iterable[torch.Tensor], H: torch.Tensor, spec: QuantSpec) -> list[Solved]:
    """Quantize each W of the tiles so that ``tr((W - Q) H (W - Q)^T)`` is small, with one factor for all.

    Columns that no token activated (H[i, i] = 0) are rounded to the nearest code and influence nothing.

    Args:
        tiles: [out, in] each, any float dtype; finite.
        H: float32 [in, in].
        spec: bits, groups, symmetry or a GGML type; order, damping.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    aside, factor = beside(H.device), None
    solved: list[Solved] = []
    for W in map(torch.Tensor.float, tiles):  # one after another: no more than one may be in memory
        rtn_loss = row_losses(W, round_to_nearest(W, spec), H)
        if not solved:
            with aside:
                factor = factorize(H, column_order(H, spec.act_order != "off"), spec.damp)
        solved.append(_solved(W, H, factor, spec, rtn_loss))
    return solved


class SharedFactor:
    """`solve` of specs that differ in grids alone, on one H: its factor is made once. Losses of plain rounding, which
    it is not asked for, are 0."""

    def __init__(self) -> None:
        self._factor: InverseFactor | None = None
        self._made = False

    def solve(self, tiles: Iterable[torch.Tensor], H: torch.Tensor, spec: QuantSpec) -> list[Solved]:
        """As the function."""
        if not self._made:
            self._factor = factorize(H, column_order(H, spec.act_order != "off"), spec.damp)
            self._made = True
        weights = map(torch.Tensor.float, tiles)
        return [_solved(W, H, self._factor, spec, W.new_zeros(len(W), dtype=torch.float64)) for W in weights]


def _solved(
    W: torch.Tensor, H: torch.Tensor, factor: InverseFactor | None, spec: QuantSpec, rtn_loss: torch.Tensor
) -> Solved:
    if factor is None:  # the layer saw nothing that tells its columns apart
        linear = rounded(W, spec)
        return Solved(linear, row_losses(W, linear, H), rtn_loss, 0.0, "rounding")
    linear, squares = quantize(W, H, factor, spec)
    if factor.fallback:
        loss = row_losses(W, linear, H)
    else:  # with Err, W - Q = Err^T U: its squares are the loss under the damped Hessian, and damping is taken off
        added = factor.damp * H.diagonal().mean().double()
        error = W - linear.dequantize().to(W.device)
        loss = (squares - added * error.square_().sum(dim=1, dtype=torch.float64)).clamp_(min=0)
    return Solved(linear, loss, rtn_loss, factor.damp, factor.fallback)


def quantize(W: torch.Tensor, H: torch.Tensor, factor: InverseFactor, spec: QuantSpec) -> tuple[Codes, torch.Tensor]:
    """Columns from the first of `factor.perm` to the last, each one's error fed into those that follow (algorithm 1).

    With static groups, and on GGML's types, all grids are fitted to the weights as they are, in natural groups. Else
    groups are runs of columns in the order `perm`, and each grid is fitted to weights as updated when its turn comes.

    A column counts in its grid as the damped Hessian's diagonal has it; damped because a whole group may be dead. The
    loss that the recursion sums, 1 / U[k, k]^2 per column, and the geometric mean of both give 4 % smaller layer
    losses, yet 8 % more KL divergence of the model (SmolLM2, 4 bits).

    Returns:
        The codes and their grid, and Err^2 summed over columns, float64 [out].
    """
    U, perm, (rows, columns) = factor.U, factor.perm, W.shape
    importance = H.diagonal() + factor.damp * H.diagonal().mean()
    Wt = W.T.contiguous()[perm]  # columns as contiguous rows
    codes = torch.empty(Wt.shape, dtype=torch.uint8, device=W.device)
    squares = torch.zeros(rows, dtype=torch.float64, device=W.device)
    quantize_columns = column_loop(W.device)

    static = fit(W, importance, spec) if spec.act_order == "static" or spec.ggml is not None else None
    dynamic: list[GptqGrid] = []
    size = columns if static is not None or spec.group_size == -1 else min(spec.group_size, columns)
    for first in range(0, columns, size):
        last = min(first + size, columns)
        if static is not None:
            grid, group = static, placed(static.group, W.device).long()[perm]
        else:  # no block crosses a group: its grid sees every update before it
            grid = fit_grid(Wt[first:last].T, importance[perm[first:last]], -1, spec.bits, spec.sym)
            group = placed(grid.group, W.device).long()
            dynamic.append(grid)
        scale, minimum = (part.T.contiguous() for part in grid.steps())  # [groups, out]
        levels = None if grid.levels is None else grid.levels.to(W.device)
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            own = group[start - first : stop - first]
            block = Wt[start:stop], U[start:stop, start:stop], scale[own], minimum[own]
            Err = quantize_columns(*block, 2**spec.bits - 1, codes[start:stop], levels)
            if stop < columns:
                Wt[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
            squares += Err.square().sum(dim=0)

    if static is None:  # one grid of those of runs of columns in the order `perm`
        group = torch.empty(columns, dtype=torch.int32)
        group[perm.cpu()] = contiguous_groups(columns, spec.group_size)
        scales, zeros = torch.cat([g.scales for g in dynamic], dim=1), torch.cat([g.zeros for g in dynamic], dim=1)
        grid = GptqGrid(scales, zeros, group, spec.bits)
    else:
        grid = static
    natural = torch.empty_like(codes)
    natural[perm] = codes
    return grid.linear(natural.T.contiguous()), squares
