"""Feedback between output rows: what one row's error does to the model's output, the rows after it make up for.

To second order the divergence that an error E [out, in] of one Linear makes is ``1/2 sum_t (g[t]^T E x[t])^2``, g the
gradient at its output (`blocks.fisher`). With the two factors taken for independent that is ``1/2 tr(A E H E^T)`` with
``A = sum g g^T`` over rows beside H over columns (YAQA, arXiv 2505.22988, section 3). GPTQ takes A for diagonal, then
rows are independent. With the whole of it, rows that are still to be quantized take on what is best for those that are,
just as columns do: whatever H is, that is ``-(A_rr)^-1 A_rb E_b`` for the error E_b of rows b, since H is the same on
both sides.

Rows are taken in blocks, in natural order; within a block they count as independent.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.codes import Codes, stacked
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.quantize.gptq import quantize
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.hessian import InverseFactor, column_order, factorize, row_losses
from quantkit.quantize.methods import Solved
from quantkit.quantize.rounding import rounded

_ROWS, _GPU_ROWS = 16, 128  # of a block; on a GPU each pass over the columns takes the same time for many rows
_DAMP = 0.1  # of A's mean diagonal


def solve(
    weights: Sequence[torch.Tensor], products: Sequence[torch.Tensor | None], H: torch.Tensor, spec: QuantSpec
) -> Solved:
    """Quantize Linears that read the same input so that each one's ``tr(A (W - Q) H (W - Q)^T)`` is small.

    Args:
        weights: W [out, in] each, any float dtype; finite.
        products: A [out, out] of each, float32, up to a factor; None: its rows are independent.
        H: float32 [in, in].
        spec: bits, groups, symmetry or a GGML type; order, damping.

    Returns:
        The stack of all, losses as of `gptq.solve`.

    Raises:
        NumericError: a group's scale is beyond float16.
    """
    factor = factorize(H, column_order(H, spec.act_order != "off"), spec.damp)
    whole = torch.cat([W.float() for W in weights])
    if factor is None:  # the layer saw nothing that tells its columns apart
        linear = rounded(whole, spec)
    else:
        tiles = torch.split(whole, [len(W) for W in weights])
        linear = stacked([_fed(W, A, H, factor, spec) for W, A in zip(tiles, products, strict=True)])
    losses = row_losses(whole, linear, H), row_losses(whole, round_to_nearest(whole, spec), H)
    return Solved(linear, *losses, *((0.0, "rounding") if factor is None else (factor.damp, factor.fallback)))


def _fed(W: torch.Tensor, A: torch.Tensor | None, H: torch.Tensor, factor: InverseFactor, spec: QuantSpec) -> Codes:
    """Codes of one Linear W float32 [out, in], which stays as it is."""
    rows = None if A is None else factorize(A.to(W.device), torch.arange(len(W), device=W.device), _DAMP)
    if rows is None:
        return quantize(W, H, factor, spec)[0]
    U, step, found = rows.U, _ROWS if W.device.type == "cpu" else _GPU_ROWS, []
    W = W.clone()
    for start in range(0, len(W), step):
        stop = min(start + step, len(W))
        linear, _ = quantize(W[start:stop], H, factor, spec)
        found.append(linear)
        if stop < len(W):
            error = W[start:stop] - linear.dequantize().to(W.device)
            own = torch.linalg.solve_triangular(U[start:stop, start:stop].T, error, upper=False)
            W[stop:].addmm_(U[start:stop, stop:].T, own, alpha=-1)
    return stacked(found)
