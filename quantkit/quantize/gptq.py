"""GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

Pure functions: a weight and the Hessian of its inputs in, codes and their loss out. Rows are independent given the
Hessian, so Linears that read the same input are stacked and quantized in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from quantkit.codes import (
    Codes,
    GgmlLinear,
    QuantizedLinear,
    contiguous_groups,
    grouped,
)
from quantkit.codes.ggml_linear import GgmlGrid
from quantkit.options import QuantSpec
from quantkit.quantize import loops
from quantkit.quantize.ggml_grid import fit_ggml_grid
from quantkit.quantize.grid import fit_grid, minmax_grid
from quantkit.quantize.hessian import (
    InverseFactor,
    blocks_of_columns,
    column_order,
    factorize,
)
from quantkit.quantize.kernels import column_kernel
from quantkit.quantize.kernels.streams import Beside

Fallback = Literal["", "eigenvalues", "rounding"]
_BLOCK = 128


@dataclass(frozen=True)
class GptqResult:
    """What `quantize` found for a stack of rows.

    Attributes:
        linear: codes and grid; on a GGML type's grid where the spec names one.
        loss: float64 [out], ``(w - q) H (w - q)^T`` per row: mean squared error of that output over the tokens. Summed
            by the recursion itself, which damps H: what damping added is taken off again.
        rtn_loss: float64 [out], the same for plain rounding (min-max grid of the same bits and groups).
        damp: fraction of the mean diagonal that was added; 0 where the layer was only rounded.
        fallback: "" or what had to be done instead of plain GPTQ.
    """

    linear: Codes
    loss: torch.Tensor
    rtn_loss: torch.Tensor
    damp: float
    fallback: Fallback


def quantize(W: torch.Tensor, H: torch.Tensor, spec: QuantSpec) -> GptqResult:
    """Quantize W so that ``tr((W - Q) H (W - Q)^T)`` is small.

    Args:
        W: [out, in], any float dtype; finite.
        H: float32 [in, in], mean of x x^T over calibration tokens.
        spec: bits, groups, symmetry or a GGML type; order, damping.

    Columns that no token activated (H[i, i] = 0) are rounded to the nearest code and influence nothing.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    return quantize_tiles([W], H, spec)[0]


def quantize_tiles(tiles: Sequence[torch.Tensor], H: torch.Tensor, spec: QuantSpec) -> list[GptqResult]:
    """`quantize` of several stacks of rows that read the same input, each by itself, with one factor for all."""
    beside = Beside(H.device)
    tiles = [W.float() for W in tiles]
    rtn = [round_to_nearest(W, spec) for W in tiles]
    rtn_loss = [row_losses(W, linear, H) for W, linear in zip(tiles, rtn, strict=True)]
    with beside:
        factor = factorize(H, column_order(H, spec.act_order != "off"), spec.damp)
    rounded = zip(tiles, rtn, rtn_loss, strict=True)
    return [_with_factor(W, H, factor, spec, linear, loss) for W, linear, loss in rounded]


def _with_factor(
    W: torch.Tensor,
    H: torch.Tensor,
    factor: InverseFactor | None,
    spec: QuantSpec,
    rtn: QuantizedLinear,
    rtn_loss: torch.Tensor,
) -> GptqResult:
    linear: Codes
    squares: torch.Tensor
    if factor is None:
        # A grid fitted without a Hessian: the layer saw nothing that tells its columns apart.
        linear = rtn if spec.ggml is None else _rounded_on_ggml_grid(W, spec.ggml)
        return GptqResult(linear, row_losses(W, linear, H), rtn_loss, 0.0, "rounding")
    importance = column_importance(H, factor.damp)
    if spec.ggml is not None:
        linear, squares = _on_ggml_grid(W, factor, fit_ggml_grid(W, importance, spec.ggml))
    elif spec.act_order == "static":
        linear, squares = _static(W, factor, importance, spec)
    else:
        linear, squares = _grouped_on_the_way(W, factor, importance, spec)
    if factor.fallback:
        return GptqResult(linear, row_losses(W, linear, H), rtn_loss, factor.damp, "eigenvalues")
    return GptqResult(linear, _without_damping(squares, W, linear, H, factor.damp), rtn_loss, factor.damp, "")


def _without_damping(
    squares: torch.Tensor, W: torch.Tensor, linear: Codes, H: torch.Tensor, damp: float
) -> torch.Tensor:
    """`row_losses` from what GPTQ's recursion summed, float64 [out]: with the errors e over the factor's diagonal
    ``w - q = e U``, so their squares are the loss under the damped Hessian."""
    error = W - linear.dequantize().to(W.device)
    added = damp * H.diagonal().mean().double()
    return (squares - added * error.square_().sum(dim=1, dtype=torch.float64)).clamp_(min=0)


def column_importance(H: torch.Tensor, damp: float) -> torch.Tensor:
    """Weight of each column's squared error in the grid search, float32 [in]: the damped Hessian diagonal.

    Damped because a whole group may be dead. The loss that GPTQ's recursion sums, 1 / U[k, k]^2 per column, and the
    geometric mean of both give 4 % smaller layer losses, yet 8 % more KL divergence of the model (SmolLM2, 4 bits).
    """
    return H.diagonal() + damp * H.diagonal().mean()


def round_to_nearest(W: torch.Tensor, spec: QuantSpec) -> QuantizedLinear:
    """Plain rounding (RTN) of W [out, in] on a min-max grid."""
    W = W.float()
    grid = minmax_grid(W, spec.group_size, spec.bits, spec.sym)
    group = contiguous_groups(W.shape[1], spec.group_size)
    codes = W.clone(memory_format=torch.contiguous_format)
    for columns, groups in grouped(codes, group):
        columns.div_(grid.scales[:, groups, None].float()).add_(grid.zeros[:, groups, None].float())
    codes = codes.round_().clamp_(0, 2**spec.bits - 1)
    return QuantizedLinear(codes.to(torch.uint8), grid.scales, grid.zeros, group, spec.bits)


def row_losses(W: torch.Tensor, linear: Codes, H: torch.Tensor) -> torch.Tensor:
    """``(w - q) H (w - q)^T`` per row, float64 [out]. H is symmetric: products with its upper block triangle do."""
    error = W - linear.dequantize().to(W.device)
    losses = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
    for start, stop in blocks_of_columns(W.shape[1]):
        left = error[:, start:stop]
        twice = (left @ H[start:stop, start:]).mul_(error[:, start:])
        twice[:, : stop - start] *= 0.5  # the diagonal block counts once, what lies right of it stands for both sides
        losses += twice.sum(dim=1)
    return losses * 2


def _static(
    W: torch.Tensor, factor: InverseFactor, importance: torch.Tensor, spec: QuantSpec
) -> tuple[QuantizedLinear, torch.Tensor]:
    """All grids from the original weights in natural groups, then columns in the order of `factor.perm`."""
    grid = fit_grid(W, importance, spec.group_size, spec.bits, spec.sym)
    group = contiguous_groups(W.shape[1], spec.group_size)
    scale = grid.scales.float()
    loop = _on_frozen_grid(W, factor, scale, scale * grid.zeros.float(), group, spec.bits)
    return QuantizedLinear(loop.codes(), grid.scales, grid.zeros, group, spec.bits), loop.squares


def _on_ggml_grid(W: torch.Tensor, factor: InverseFactor, grid: GgmlGrid) -> tuple[GgmlLinear, torch.Tensor]:
    """As `_static`, on the grid of a GGML type: scales frozen as the file stores them."""
    group = contiguous_groups(W.shape[1], grid.kind.group)
    loop = _on_frozen_grid(W, factor, *grid.steps_of_groups(), group, grid.kind.bits)
    return GgmlLinear(loop.codes(), grid), loop.squares


def _rounded_on_ggml_grid(W: torch.Tensor, name: str) -> GgmlLinear:
    """Plain rounding on a fitted grid, every column counting the same."""
    grid = fit_ggml_grid(W, torch.ones_like(W[0]), name)
    scale, minimum = grid.steps()
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    codes = ((W + minimum) * inverse).round_().clamp_(0, 2**grid.kind.bits - 1)
    return GgmlLinear(codes.to(torch.uint8), grid)


def _on_frozen_grid(
    W: torch.Tensor,
    factor: InverseFactor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    group: torch.Tensor,
    bits: int,
) -> _ColumnLoop:
    """All columns, in the order `factor.perm`, on the grid ``scale * q - minimum`` of every group."""
    loop = _ColumnLoop(W, factor, bits)
    scale, minimum = scale.T.contiguous(), minimum.T.contiguous()
    ordered = group.to(W.device).long()[factor.perm]
    for start in range(0, W.shape[1], _BLOCK):
        groups = ordered[start : start + _BLOCK]
        loop.block(start, start + len(groups), scale[groups], minimum[groups])
    return loop


def _grouped_on_the_way(
    W: torch.Tensor, factor: InverseFactor, importance: torch.Tensor, spec: QuantSpec
) -> tuple[QuantizedLinear, torch.Tensor]:
    """Groups are runs of columns in the order of `factor.perm`; each grid is fitted to weights as updated so far."""
    columns = W.shape[1]
    size = columns if spec.group_size == -1 else min(spec.group_size, columns)
    loop = _ColumnLoop(W, factor, spec.bits)
    grids = []
    for first in range(0, columns, size):
        last = min(first + size, columns)
        grid = fit_grid(loop.Wt[first:last].T, importance[factor.perm[first:last]], -1, spec.bits, spec.sym)
        grids.append(grid)
        scale = grid.scales.float().T
        minimum = scale * grid.zeros.float().T
        for start in range(first, last, _BLOCK):  # no block crosses a group: its grid saw every update before it
            stop = min(start + _BLOCK, last)
            loop.block(start, stop, scale.expand(stop - start, -1), minimum.expand(stop - start, -1))
    group = torch.empty(columns, dtype=torch.int32)
    group[factor.perm.cpu()] = contiguous_groups(columns, spec.group_size)
    scales, zeros = torch.cat([g.scales for g in grids], dim=1), torch.cat([g.zeros for g in grids], dim=1)
    return QuantizedLinear(loop.codes(), scales, zeros, group, spec.bits), loop.squares


class _ColumnLoop:
    """Quantizes columns from the first to the last, feeding each one's error into those that follow.

    Everything is kept transposed, columns as contiguous rows in the order of the factor; columns behind a block get
    the block's errors in one matrix product.

    Attributes:
        squares: float64 [out], each row's squared errors over the factor's diagonal, summed so far.
    """

    def __init__(self, W: torch.Tensor, factor: InverseFactor, bits: int) -> None:
        self.Wt = W.T.contiguous()[factor.perm]
        self.squares = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
        self._codes = torch.empty(self.Wt.shape, dtype=torch.uint8, device=W.device)
        self._factor = factor
        self._top = 2**bits - 1
        self._kernel = column_kernel(W.device)

    def block(self, start: int, stop: int, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        """Quantize columns start..stop on the grid ``scale * q - minimum``, both [stop - start, out]."""
        U, W = self._factor.U, self.Wt[start:stop]
        diagonal, codes = U[start:stop, start:stop], self._codes[start:stop]
        if self._kernel is not None:
            errors = self._kernel(W, diagonal, scale, minimum, self._top, codes)
        elif loops.serve(W):
            errors = loops.quantize_columns(W, diagonal, scale, minimum, self._top, codes)
        else:
            errors = _quantize_columns(W, diagonal, scale, minimum, self._top, codes)
        if stop < self.Wt.shape[0]:
            self.Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        self.squares += errors.square().sum(dim=0)

    def codes(self) -> torch.Tensor:
        """Codes of all columns in their natural order, uint8 [out, in]."""
        codes = torch.empty_like(self._codes)
        codes[self._factor.perm] = self._codes
        return codes.T.contiguous()


def _quantize_columns(
    W: torch.Tensor, U: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: int, codes: torch.Tensor
) -> torch.Tensor:
    """`loops.quantize_columns` in torch's own operations, on any device.

    A column gathers the errors of the block's earlier columns when it is reached (one matrix-vector product) rather
    than every column being updated after each one.
    """
    Ut, diagonal = U.T.contiguous(), U.diagonal().tolist()
    scale = scale.contiguous()
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    shifted = W + minimum
    errors, found = torch.empty_like(scale), torch.empty_like(scale)
    for j in range(W.shape[0]):
        w = shifted[j]
        if j:
            w = torch.addmv(w, errors[:j].T, Ut[j, :j], alpha=-1)
        q = torch.mul(w, inverse[j], out=found[j]).round_().clamp_(0, top)
        torch.addcmul(w, q, scale[j], value=-1, out=errors[j]).div_(diagonal[j])
    codes.copy_(found)
    return errors
