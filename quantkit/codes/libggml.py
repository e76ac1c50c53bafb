"""Rounding to any GGML type, by ggml itself: the library that the package libggml-python has prebuilt (0.20.2).

Its bytes are those of llama-quantize (b11434) for every type but IQ1_M. There 0.20.2 adds up each way to cut a block in
three for itself, and b11434 takes differences of running sums: where two ways are nearly as good, the rounding of these
sums decides.

ggml ends the process on input that it does not expect, so all of it is checked beforehand.
"""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.codes.block_types import BLOCK_TYPES
from quantkit.codes.kinds import SIZES, Kind
from quantkit.errors import MissingPackageError, NumericError, UsageError
from quantkit.late import torch

KINDS = (
    *(Kind.__members__[name] for name in BLOCK_TYPES),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S),
    *(Kind.IQ3_XXS, Kind.IQ3_S, Kind.TQ1_0, Kind.TQ2_0),
)
"""Types that `round_to_blocks` rounds to."""

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
# Up to these, no product of values and importance overflows inside ggml, whose assertions do not expect it.
_MOST = float(np.finfo(np.float16).max)
_MOST_IMPORTANCE = 1e30
_VALUES_A_CALL = 1 << 16


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("libggml") is not None


def requires_imatrix(kind: Kind) -> bool:
    """Whether ggml cannot round to a type without an importance matrix. Raises MissingPackageError."""
    return bool(_library(kind).ggml_quantize_requires_imatrix(int(kind)))


def round_to_blocks(
    values: npt.NDArray[np.float32], kind: Kind, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Rows rounded to blocks, by as many threads as torch has: each row for itself, so bytes do not depend on them.

    Args:
        values: float32 [rows, columns].
        kind: one of `KINDS`, whose blocks divide the columns.
        importance: float32 [columns], not negative: how much each column's error counts.

    Returns:
        uint8 [rows, bytes].

    Raises:
        MissingPackageError: libggml-python is not installed.
        UsageError: a type or a width that cannot be, or a missing importance.
        NumericError: a value that is not finite or beyond float16, which scales of blocks are.
    """
    library = _library(kind)
    _check(library, values, kind, importance)
    rows, columns = values.shape
    block, size = SIZES[kind]
    values = np.ascontiguousarray(values)
    packed = np.empty((rows, columns // block * size), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance)
    step = max(1, _VALUES_A_CALL // columns)

    def round_rows(start: int) -> bool:
        part, out = values[start : start + step], packed[start : start + step]
        given = None if weights is None else weights.ctypes.data
        library.ggml_quantize_chunk(int(kind), part.ctypes.data, out.ctypes.data, 0, len(part), columns, given)
        return bool(library.ggml_validate_row_data(int(kind), out.ctypes.data, out.nbytes))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        if not all(pool.map(round_rows, range(0, rows, step))):
            raise NumericError(f"{kind.name} cannot hold these values: a block's scale is not finite")
    return packed


def _check(library: Any, values: npt.NDArray[Any], kind: Kind, importance: npt.NDArray[Any] | None) -> None:
    assert values.ndim == 2 and values.dtype == np.float32, (values.shape, values.dtype)
    columns = values.shape[1]
    block = SIZES[kind][0]
    if columns == 0 or columns % block:
        raise UsageError(f"{columns} columns; {kind.name} needs a multiple of {block}")
    if not (values.min(initial=0) >= -_MOST and values.max(initial=0) <= _MOST):  # nor where they are NaN
        raise NumericError(f"a value is not finite or beyond float16, which the scales of {kind.name} are")
    if importance is None:
        if library.ggml_quantize_requires_imatrix(int(kind)):
            raise UsageError(f"{kind.name} needs an importance matrix")
        return
    assert importance.dtype == np.float32, importance.dtype
    if importance.shape != (columns,):
        raise UsageError(f"an importance of shape {list(importance.shape)} for {columns} columns")
    if not bool(((importance >= 0) & (importance <= _MOST_IMPORTANCE)).all()):
        raise NumericError(f"an importance is negative, not finite or above {_MOST_IMPORTANCE:g}")


def _library(kind: Kind) -> Any:
    if kind not in KINDS:
        raise UsageError(f"nothing here rounds to {kind.name}")
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("libggml-python", "ggml", f"rounding to {kind.name}")
    return _loaded(Path(spec.submodule_search_locations[0]))


@cache
def _loaded(package: Path) -> Any:
    """ggml's C functions; ctypes lets other threads run while one of them does."""
    path = next((path for name in _NAMES for path in sorted(package.glob(f"*/{name}"))), None)
    if path is None:
        raise UsageError(f"libggml-python has none of {', '.join(_NAMES)}: install its wheel for this system")
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        count, pointer = ctypes.c_int64, ctypes.c_void_p
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
        library.ggml_validate_row_data.restype = ctypes.c_bool
        library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise UsageError(f"libggml-python cannot be used ({error}): pip install 'quantkit[ggml]'") from error
    return library
