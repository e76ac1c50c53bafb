"""The arithmetic of calibration forwards on a CPU: bfloat16 where the processor has it and is faster by it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.blocks.open import DTYPES
from quantkit.blocks.stream import ModelStream
from quantkit.late import dtype_of, torch

_FLAGS = {"amx_bf16", "avx512_bf16"}  # of processors that multiply bfloat16
_GAIN = 1.5  # times float32's rate: less is lost again where hidden states are cast
_PRODUCT = (512, 1024, 1024)  # tokens, in, out: some milliseconds
_TRIES = 7


def calibration_dtype(stream: ModelStream, linears: Iterable[str], before: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a run's calibration forwards where none is asked for.

    On a CPU it is float32, or bfloat16 where that is faster and no weight to quantize is stored in more. It decides
    the inputs that Hessians are taken over; codes are made of the weights as stored.

    Args:
        stream: opened with `auto`.
        linears: published names of what is quantized.
        before: what decided the run that is gone on with, maybe on another machine.
    """
    if stream.device.type != "cpu":
        return stream.dtype
    compute = before.get("compute")
    known = str(compute.get("dtype")) if isinstance(compute, dict) else ""
    if known in DTYPES:
        return dtype_of(known)
    full = any(stream.weights.tensors[f"{name}.weight"].stored_as in ("F64", "F32") for name in linears)
    return torch.float32 if full or not bfloat16_pays() else torch.bfloat16


@cache
def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are much faster here; measured once, and only where the processor has them.

    The flag alone does not say: some processors with AVX-512's run them at half of float32's rate.
    """
    if not _FLAGS & _processor_flags():
        return False
    tokens, columns, rows = _PRODUCT
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(_TRIES + 1):  # in turns, for others may use the machine; the first also compiles
        for dtype in best:
            x, weight = torch.ones(tokens, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] > _GAIN * best[torch.bfloat16]


def _processor_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says that the processor has; of other systems nothing is known."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
