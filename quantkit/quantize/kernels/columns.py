"""GPTQ's loop over the columns of a block as one Triton program for each tile of rows.

torch runs this loop as about six launches a column, each far shorter than its launch. Here a program keeps its tile
of the block, weights and the errors they have taken up, in registers from the first column to the last; the block of
the factor is read through the cache, one row a column. What lies behind the block is left to one matrix product.

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before that, the kernel runs on the CPU.
"""

# Triton reads a kernel's arguments from its source: types written there would be taken for its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128  # columns a program can hold
_ROWS = 32  # of a tile; with 4 warps 32 weights a thread: 105 registers on sm_90, nothing spilled
# A fused product is rounded once: codes near a tie would differ from the CPU's.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum is rounded to whole numbers, half to even, as torch.round.
_TO_WHOLE = tl.constexpr(12582912.0)


def quantize_columns(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    top: int,
    codes: torch.Tensor,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize the columns of one block in turn, each one's error fed into the block's later ones.

    The order of every sum is that of GPTQ's algorithm 1, column after column, and no product is fused with its sum:
    the result is, bit for bit, that of::

        W = W + minimum
        for j in range(columns):
            codes[j] = round(W[j] * (1 / scale[j])) within 0 .. top  # 0 where the scale is 0
            Err[j] = (W[j] - codes[j] * scale[j]) / U[j, j]
            W[j + 1:] -= U[j, j + 1:, None] * Err[j]

    Args:
        W: float32 [columns, out], at most 128 columns, each one's rows side by side; not changed.
        U: float32 [columns, columns], upper triangular, of any strides.
        scale, minimum: float32 [columns, out]; code q stands for ``scale * q - minimum``.
        top: the last code, 2**bits - 1.
        codes: uint8 [columns, out], written.
        levels: float32 [top + 1], ascending: code q is the number of midpoints between them that the quotient is
            above, and stands for ``scale * levels[q] - minimum``.

    Returns:
        Err float32 [columns, out]: columns behind the block change by ``-U[block, behind]^T Err``.
    """
    columns, rows = W.shape
    assert columns <= BLOCK and scale.shape == minimum.shape == W.shape
    assert rows == 1 or W.stride(1) == codes.stride(1) == 1
    U, S, M = _last_inside(U), _last_inside(scale), _last_inside(minimum)
    Err = torch.empty((columns, rows), dtype=torch.float32, device=W.device)
    with torch.cuda.device_of(W):  # Triton launches on the current GPU, whichever has the tensors
        _quantize_tile[(triton.cdiv(rows, _ROWS),)](
            W,
            U,
            S,
            M,
            codes,
            Err,
            W if levels is None else levels,
            rows,
            columns,
            W.stride(0),
            U.stride(0),
            S.stride(0),
            M.stride(0),
            codes.stride(0),
            float(top),
            LEVELS=0 if levels is None else len(levels),
            ROWS=_ROWS,
            COLUMNS=max(16, triton.next_power_of_2(columns)),
            **_OPTIONS,
        )
    return Err


def _last_inside(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` with the last dimension's elements side by side; rows that are one (stride 0) stay one."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@triton.jit(do_not_specialize=["columns"])  # else a block of one column is a kernel of its own
def _quantize_tile(
    W,
    U,
    S,
    M,
    Codes,
    Err,
    Levels,
    rows,
    columns,
    w_stride,
    u_stride,
    s_stride,
    m_stride,
    codes_stride,
    top,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile: w [COLUMNS, ROWS] stays in registers. Rows innermost: a thread then divides and rounds few of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows, column < columns
    inside = in_columns[:, None] & in_rows[None, :]
    w = tl.load(W + column[:, None] * w_stride + row[None, :], mask=inside, other=0.0)
    w += tl.load(M + column[:, None] * m_stride + row[None, :], mask=inside, other=0.0)
    # What a column needs is on its way while the one before it is worked.
    s_next = tl.load(S + row, mask=in_rows, other=0.0)
    u_next = tl.load(U + column, mask=in_columns, other=0.0)
    diagonal_next = tl.load(U)
    for j in range(columns):
        s, u, diagonal = s_next, u_next, diagonal_next
        following = tl.minimum(j + 1, columns - 1)
        s_next = tl.load(S + following * s_stride + row, mask=in_rows, other=0.0)
        u_next = tl.load(U + following * u_stride + column, mask=in_columns, other=0.0)
        diagonal_next = tl.load(U + following * (u_stride + 1))
        inverse = tl.where(s == 0, 0.0, tl.div_rn(1.0, tl.where(s == 0, 1.0, s)))
        x = tl.sum(tl.where(column[:, None] == j, w, 0.0), axis=0)  # row j of w
        if LEVELS:
            place, q = x * inverse, tl.zeros([ROWS], tl.float32)
            value = q + tl.load(Levels)
            for i in tl.static_range(1, LEVELS):
                level = tl.load(Levels + i)
                above = place > (tl.load(Levels + i - 1) + level) * 0.5
                q += above.to(tl.float32)
                value = tl.where(above, level, value)
        else:
            q = tl.minimum(tl.maximum(x * inverse, 0.0), top)
            q = (q + _TO_WHOLE) - _TO_WHOLE
            value = q
        error = tl.div_rn(x - value * s, diagonal)
        tl.store(Codes + j * codes_stride + row, q.to(tl.uint8), mask=in_rows)
        tl.store(Err + j * rows + row, error, mask=in_rows)
        w -= u[:, None] * error[None, :]  # columns up to j are not looked at again
