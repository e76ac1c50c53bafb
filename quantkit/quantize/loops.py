"""The two loops of GPTQ that no matrix product can hold, compiled for the CPU by Numba (extra ``cpu``).

torch's own operations on one column of a weight cost more to start than to run, and the grid search reads each weight
six times a candidate from memory. Here a tile of rows stays in the cache for a whole block of columns, and a candidate
reads a weight once. Rows are independent, so threads share them out and the result is the same for any number of
threads. Measured: docs/speed.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from quantkit.late import torch

_ROWS = 256  # of a tile: with 128 columns of weights, errors, scales and minima half a megabyte, a core's cache


@cache
def has_numba() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None


def quantize_columns(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    top: int,
    codes: torch.Tensor,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize columns one after another, each one's error fed into those that follow (GPTQ, algorithm 1, inner loop).

    Args:
        W: float32 [columns, out], a block of the transposed weight.
        U: float32 [columns, columns], the block of the inverse Hessian's factor on the diagonal.
        scale, minimum: float32 [columns, out]; a code q stands for ``scale * q - minimum``.
        top: largest code.
        codes: uint8 [columns, out], written.
        levels: float32 [top + 1], ascending, where a code q stands for ``scale * levels[q] - minimum``.

    Returns:
        errors float32 [columns, out] over the factor's diagonal: columns behind the block change by these times their
        rows of the factor.
    """
    errors = torch.empty(W.shape)
    table = torch.empty(0) if levels is None else levels
    arrays = [tensor.contiguous().numpy() for tensor in (W, U, scale, minimum, table)]
    _over_rows(_compiled()[0], W.shape[1], *arrays, np.float32(top), codes.numpy(), errors.numpy())
    return errors


def weighted_errors(
    W: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> torch.Tensor:
    """``sum_i importance_i (w_i - s (q_i - z))^2`` with the nearest codes q, float32 [candidates, groups, out].

    Args:
        W: float32 [groups, size, out].
        importance: float32 [groups, size].
        scales, zeros: float32 [candidates, groups, out].
        top: largest code.
    """
    found = torch.empty(scales.shape)
    arrays = [tensor.contiguous().numpy() for tensor in (W, importance, scales, zeros)]
    _over_rows(_compiled()[1], W.shape[2], *arrays, np.float32(top), found.numpy())
    return found


def least_squares(
    W: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over a group of importance times step times weight, and times step squared, for steps ``q - z``: their
    quotient is the best scale for these codes. As `weighted_errors`, of one candidate: all are [groups, out].
    """
    cross, power = torch.empty(scale.shape), torch.empty(scale.shape)
    arrays = [tensor.contiguous().numpy() for tensor in (W, importance, scale, zero)]
    _over_rows(_compiled()[2], W.shape[2], *arrays, np.float32(top), cross.numpy(), power.numpy())
    return cross, power


def _over_rows(loop: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Run a loop over all rows, a share for each of torch's threads."""
    threads = torch.get_num_threads()
    share = -(-rows // threads)
    share += -share % 16  # whole cache lines
    spans = [(start, min(start + share, rows)) for start in range(0, rows, share)]
    if len(spans) == 1:
        loop(*arguments, 0, rows)
    else:
        list(_pool(threads).map(lambda span: loop(*arguments, *span), spans))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantkit-rows")


@cache
def _compiled() -> tuple[Any, Any, Any]:
    """The loops as machine code, kept on disk between runs. Products and sums may be fused, nothing is reordered."""
    import numba

    compiled = numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
    return compiled(_quantize_columns), compiled(_weighted_errors), compiled(_least_squares)


# -- compiled: loops over plain arrays, rows innermost so that they become vector instructions -------------------------


def _quantize_columns(
    W: Any, U: Any, scale: Any, minimum: Any, levels: Any, top: Any, codes: Any, errors: Any, first: int, last: int
) -> None:
    columns = W.shape[0]
    left, value, place = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    for start in range(first, last, _ROWS):
        stop = min(start + _ROWS, last)
        rows = stop - start
        for j in range(columns):
            w, m, s = W[j, start:stop], minimum[j, start:stop], scale[j, start:stop]
            q, e = codes[j, start:stop], errors[j, start:stop]
            for r in range(rows):
                left[r] = w[r] + m[r]
            k = 0
            while k + 4 <= j:  # four at a time: one pass over `left` for four errors
                u0, u1, u2, u3 = U[k, j], U[k + 1, j], U[k + 2, j], U[k + 3, j]
                e0, e1 = errors[k, start:stop], errors[k + 1, start:stop]
                e2, e3 = errors[k + 2, start:stop], errors[k + 3, start:stop]
                for r in range(rows):
                    left[r] -= u0 * e0[r] + u1 * e1[r] + u2 * e2[r] + u3 * e3[r]
                k += 4
            while k < j:
                u0, e0 = U[k, j], errors[k, start:stop]
                for r in range(rows):
                    left[r] -= u0 * e0[r]
                k += 1
            inverse = np.float32(1) / U[j, j]
            if levels.size:
                for r in range(rows):
                    place[r] = left[r] / s[r] if s[r] != 0 else np.float32(0)
                    value[r], q[r] = levels[0], 0
                for i in range(1, levels.size):
                    between = (levels[i - 1] + levels[i]) * np.float32(0.5)
                    for r in range(rows):
                        above = place[r] > between
                        value[r] = levels[i] if above else value[r]
                        q[r] += np.uint8(above)
                for r in range(rows):
                    e[r] = (left[r] - value[r] * s[r]) * inverse
                continue
            for r in range(rows):
                code = np.rint(left[r] / s[r]) if s[r] != 0 else np.float32(0)
                code = min(max(code, np.float32(0)), top)
                q[r] = np.uint8(code)
                e[r] = (left[r] - code * s[r]) * inverse


def _weighted_errors(
    W: Any, importance: Any, scales: Any, zeros: Any, top: Any, found: Any, first: int, last: int
) -> None:
    groups, size, _ = W.shape
    inverse, lowest, highest = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    for g in range(groups):
        for start in range(first, last, _ROWS):
            stop = min(start + _ROWS, last)
            rows = stop - start
            for c in range(scales.shape[0]):
                s, z, total = scales[c, g, start:stop], zeros[c, g, start:stop], found[c, g, start:stop]
                for r in range(rows):
                    inverse[r] = np.float32(1) / s[r]
                    lowest[r], highest[r] = -z[r], top - z[r]
                    total[r] = 0
                for i in range(size):
                    w, h = W[g, i, start:stop], importance[g, i]
                    for r in range(rows):
                        step = min(max(np.rint(w[r] * inverse[r]), lowest[r]), highest[r])
                        error = w[r] - s[r] * step
                        total[r] += h * (error * error)


def _least_squares(
    W: Any, importance: Any, scale: Any, zero: Any, top: Any, cross: Any, power: Any, first: int, last: int
) -> None:
    groups, size, _ = W.shape
    for g in range(groups):
        for start in range(first, last, _ROWS):
            stop = min(start + _ROWS, last)
            s, z = scale[g, start:stop], zero[g, start:stop]
            product, square = cross[g, start:stop], power[g, start:stop]
            inverse = np.float32(1) / s
            product[:] = 0
            square[:] = 0
            for i in range(size):
                w, h = W[g, i, start:stop], importance[g, i]
                for r in range(stop - start):
                    step = min(max(np.rint(w[r] * inverse[r]), -z[r]), top - z[r])
                    product[r] += h * step * w[r]
                    square[r] += h * step * step
