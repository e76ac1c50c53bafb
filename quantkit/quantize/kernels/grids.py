"""The search for the grids of GPTQ checkpoints as one Triton program for each group and tile of rows.

In torch's own operations a candidate is five passes over the weights. Here a program reads its weights once and keeps
them in registers while all candidates are tried and the best is refined, so that 4 bytes a weight are read, and 5 a
group written.

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before that, the kernel runs on the CPU.
"""

# Triton reads a kernel's arguments from its source: types written there would be taken for its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WEIGHTS = 4096  # of a tile: with 4 warps 32 a thread
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum is rounded to whole numbers, half to even, as torch.round.
_TO_WHOLE = tl.constexpr(12582912.0)
_SMALLEST = tl.constexpr(2.0**-24)
_LEAST_POWER = tl.constexpr(1e-30)


def search_grids(
    W: torch.Tensor, importance: torch.Tensor, size: int, fractions: torch.Tensor, bits: int, sym: bool, refits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of least weighted squared error, as `quantkit.quantize.search` does.

    Operation for operation what is done there in torch, but for the order of sums over a group: of two candidates whose
    errors are equal up to their last bits the other one may be taken.

    Args:
        W: float32 [out, in], of any strides; `in` is a multiple of `size`.
        importance: float32 [in].
        size: columns of a group, few enough to be held in registers: 1024.
        fractions: float32 [candidates] of the scale at which a group's largest weight is just held; those of symmetric
            grids of both signs, those of others each with the zero rounded down and up.
        bits: of a code.
        sym: zeros are ``2**(bits - 1)``.
        refits: times that the best scale is refined by least squares on its codes.

    Returns:
        float32 [out, groups] each: scales rounded to float16, 0 where no candidate has a finite error; zeros.
    """
    rows, columns = W.shape
    assert columns % size == 0
    importance = importance.contiguous()
    scales = torch.empty((rows, columns // size), dtype=torch.float32, device=W.device)
    zeros = torch.empty_like(scales)
    held = max(16, triton.next_power_of_2(size))
    tile = max(1, _WEIGHTS // held)
    with torch.cuda.device_of(W):  # Triton launches on the current GPU, whichever has the tensors
        _search_tile[(triton.cdiv(rows, tile), columns // size)](
            W,
            importance,
            fractions,
            scales,
            zeros,
            rows,
            size,
            columns // size,
            W.stride(0),
            W.stride(1),
            float(2**bits - 1),
            float(2 ** (bits - 1)),
            CANDIDATES=len(fractions),
            REFITS=refits,
            SYM=sym,
            SIZE=held,
            ROWS=tile,
            **_OPTIONS,
        )
    return scales, zeros


@triton.jit
def _stored(scale):
    """Rounded to float16, never to zero."""
    rounded = scale.to(tl.float16).to(tl.float32)
    return tl.where(rounded == 0, tl.where(scale < 0, -_SMALLEST, _SMALLEST), rounded)


@triton.jit
def _steps(w, scale, zero, top):
    """Signed whole steps ``q - zero`` of w [SIZE, ROWS]."""
    x = w * tl.div_rn(1.0, scale)[None, :]
    x = tl.minimum(tl.maximum(x, -zero[None, :]), (top - zero)[None, :])
    return (x + _TO_WHOLE) - _TO_WHOLE


@triton.jit
def _error(w, h, scale, zero, top):
    """Weighted squared error of each row."""
    difference = w - _steps(w, scale, zero, top) * scale[None, :]
    return tl.sum(h[:, None] * (difference * difference), axis=0)


@triton.jit
def _better(w, h, top, scale, zero, found_scale, found_zero, found_error):
    """The best so far and one candidate more; a NaN is never less."""
    error = _error(w, h, scale, zero, top)
    less = error < found_error
    return (
        tl.where(less, scale, found_scale),
        tl.where(less, zero, found_zero),
        tl.where(less, error, found_error),
    )


@triton.jit(do_not_specialize=["size", "groups"])  # short last groups are no kernel of their own
def _search_tile(
    W,
    H,
    Fractions,
    Scales,
    Zeros,
    rows,
    size,
    groups,
    row_stride,
    column_stride,
    top,
    half,
    CANDIDATES: tl.constexpr,
    REFITS: tl.constexpr,
    SYM: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One group of a tile of rows: w [SIZE, ROWS] stays in registers."""
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_group = tl.arange(0, SIZE)
    column = group.to(tl.int64) * size + inside_group
    in_rows, in_group = row < rows, inside_group < size
    inside = in_group[:, None] & in_rows[None, :]
    w = tl.load(W + row[None, :] * row_stride + column[:, None] * column_stride, mask=inside, other=0.0)
    h = tl.load(H + column, mask=in_group, other=0.0)

    zero = tl.zeros([ROWS], tl.float32) + half
    scale = tl.zeros([ROWS], tl.float32)
    error = tl.zeros([ROWS], tl.float32) + float("inf")
    if SYM:
        peak = tl.div_rn(tl.max(tl.abs(w), axis=0), half)
        for k in range(CANDIDATES):
            tried = _stored(tl.load(Fractions + k) * peak)
            scale, zero, error = _better(w, h, top, tried, zero, scale, zero, error)
    else:
        low = tl.minimum(tl.min(w, axis=0), 0.0)  # what is masked out is 0
        high = tl.maximum(tl.max(w, axis=0), 0.0)
        for k in range(CANDIDATES):
            fraction = tl.load(Fractions + k)
            tried = _stored(tl.div_rn((high - low) * fraction, top))
            exact = tl.div_rn(-low * fraction, tried)
            lower = tl.minimum(tl.maximum(tl.floor(exact), 1.0), top)
            upper = tl.minimum(tl.maximum(tl.ceil(exact), 1.0), top)
            scale, zero, error = _better(w, h, top, tried, lower, scale, zero, error)
            scale, zero, error = _better(w, h, top, tried, upper, scale, zero, error)
    for _ in tl.static_range(REFITS):
        steps = _steps(w, scale, zero, top)
        weighted = steps * h[:, None]
        cross = tl.sum(weighted * w, axis=0)
        power = tl.sum(weighted * steps, axis=0)
        fitted = tl.where(power > 0, tl.div_rn(cross, tl.maximum(power, _LEAST_POWER)), scale)
        scale, zero, error = _better(w, h, top, _stored(fitted), zero, scale, zero, error)
    place = row * groups + group
    tl.store(Scales + place, scale, mask=in_rows)
    tl.store(Zeros + place, zero, mask=in_rows)
