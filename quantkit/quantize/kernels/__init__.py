"""What a GPU does otherwise than a CPU: the column loop as one Triton program for each tile of rows (`columns`), the
factorization beside other work. Half-precision products for Hessians are in `hessian`.

Triton is imported when the first kernel is asked for. Where it is missing, or Numba on a CPU, torch does the work
(`plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from types import TracebackType

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
    return loops.quantize_columns if device.type == "cpu" and loops.has_numba() else plain.quantize_columns


def shortfall(device: torch.device) -> str | None:
    """What a run on `device` does without, and what to do about it, in one line; None where nothing is missing."""
    if device.type == "cuda" and not _has_triton():
        return "Triton is missing, so torch quantizes the columns: slower; pip install 'quantkit[gpu]'"
    if device.type == "cpu" and not loops.has_numba():
        return "Numba is missing, so torch quantizes the columns: slower; pip install 'quantkit[cpu]'"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Beside:
    """A ``with`` block whose work runs beside what the current stream still has to do; on a CPU, in turn.

    Make it where the block's inputs are ready, queue what is to run beside it, then enter it. The block waits for what
    was queued before it was made, and whatever is queued after the block waits for the block. A host that waits for a
    result inside the block does not wait for the work beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._ready = torch.cuda.current_stream(device).record_event()

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            # Memory of earlier blocks comes back to this stream only after its last use: what used it was queued
            # on the other stream before `_ready`.
            side = _side_stream(self._device)
            side.wait_event(self._ready)
            self._inside: AbstractContextManager[None] = torch.cuda.stream(side)
            self._inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self._inside.__exit__(kind, error, trace)
            torch.cuda.current_stream(self._device).wait_stream(_side_stream(self._device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one: memory belongs to the stream that it was taken on."""
    return torch.cuda.Stream(device)
