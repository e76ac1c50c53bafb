"""What a GPU does otherwise than a CPU: the column loop as one Triton program for each tile of rows (`columns`),
half-precision products for Hessians (`gram`), the factorization beside other work (`streams`).

Triton is imported when the first kernel is asked for. Where it is missing, or Numba on a CPU, torch does the work
(`plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from quantkit.quantize import loops
from quantkit.quantize.kernels import plain

ColumnLoop = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor]
"""`loops.quantize_columns`, which says what it takes and gives."""


def column_loop(device: torch.device) -> ColumnLoop:
    """The loop over a block's columns for weights on `device`: Triton's, Numba's, or torch's own."""
    if device.type == "cuda" and _has_triton():
        from quantkit.quantize.kernels.columns import quantize_columns

        return quantize_columns
    return loops.quantize_columns if device.type == "cpu" and loops.available() else plain.quantize_columns


def shortfall(device: torch.device) -> str | None:
    """What a run on `device` does without, and what to do about it, in one line; None where nothing is missing."""
    if device.type == "cuda" and not _has_triton():
        return "Triton is missing, so torch quantizes the columns: slower; pip install 'quantkit[gpu]'"
    if device.type == "cpu" and not loops.available():
        return "Numba is missing, so torch quantizes the columns: slower; pip install 'quantkit[cpu]'"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
