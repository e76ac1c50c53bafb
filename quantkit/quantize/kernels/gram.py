"""Products of activations for a Hessian: half-precision operands, a float32 sum."""

from __future__ import annotations

from functools import cache

import torch


def operand(x: torch.Tensor) -> torch.Tensor:
    """`x` as `add_product` takes it here: itself where its dtype's products add up in float32, else as float32."""
    return x if _adds_up_in_float32(x.dtype, x.device) else x.float()


def add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """``total += x^T y`` for operands from `operand`.

    A product of two bfloat16 or float16 numbers is exact in float32, so half-precision operands lose nothing against
    the same numbers cast to float32 but the order of the sum; they take a sixteenth of the time on a tensor core.

    Args:
        total: float32 [m, n]; rows may be strided.
        x: float32, bfloat16 or float16 [tokens, m].
        y: [tokens, n], as x.
    """
    if x.dtype == torch.float32:
        total.addmm_(x.T, y)
    else:
        torch.addmm(total, x.T, y, out_dtype=torch.float32, out=total)


@cache
def _adds_up_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of `dtype` to a float32 sum in place: on CUDA since 2.8 or 2.9, tried once."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32
    total, x = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        add_product(total, x, x)
    except (RuntimeError, TypeError):  # no such kernel on this device; no such argument in this torch
        return False
    return True
