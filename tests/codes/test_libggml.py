"""Rounding by the prebuilt ggml: what it makes, and that nothing which would end the process gets to it."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.codes import kinds, libggml
from quantkit.codes.kinds import Kind, dequantize
from quantkit.errors import (
    MissingPackageError,
    NumericError,
    QuantkitError,
    UsageError,
)

Array = np.ndarray[Any, Any]
# Those without a grid, which takes seconds to make.
QUICK = sorted(kind for kind in libggml.KINDS if kind.name[:3] not in ("IQ1", "IQ2", "IQ3"))
OF_32 = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


def normal(rows: int = 4, columns: int = 512, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(scale=0.05, size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
def test_values_come_back_near(kind: Kind) -> None:
    values = normal()
    packed = libggml.round_to_blocks(values, kind)
    block, size = kinds.SIZES[kind]
    assert packed.shape == (4, 512 // block * size)
    error = np.abs(dequantize(packed, kind) - values).mean() / np.abs(values).mean()
    limits = {8: 0.01, 6: 0.05, 5: 0.09, 4: 0.1, 3: 0.2, 2: 0.35}
    ternary = kind in (Kind.TQ1_0, Kind.TQ2_0, kinds.Q2_0)  # Q2_0's scale is the largest weight: three values of four
    assert error < (0.9 if ternary else limits[size * 8 // block])


def test_what_gguf_py_does_not_read_is_read_as_ggml_reads_it() -> None:
    """Q2_0, by ggml's own dequantizer, to the bit."""
    packed = np.random.default_rng(3).integers(0, 256, (4, 8 * 18)).astype(np.uint8)
    scales = packed.reshape(-1, 18)[:, :2]
    scales[:] = np.random.default_rng(4).normal(size=(32, 1)).astype("<f2").view(np.uint8)
    expected = np.empty((4, 512), dtype=np.float32)
    library = libggml._library(kinds.Q2_0)
    library.dequantize_row_q2_0(
        ctypes.c_void_p(packed.ctypes.data), ctypes.c_void_p(expected.ctypes.data), ctypes.c_int64(expected.size)
    )
    assert dequantize(packed, kinds.Q2_0).tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(OF_32),
    exponent=st.floats(-30, 4),
    spread=st.floats(0, 8),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_blocks_of_32_are_gguf_pys_to_the_bit(
    kind: Kind, exponent: float, spread: float, blocks: int, seed: int
) -> None:
    """What stands in where the package is missing."""
    generator = np.random.default_rng(seed)
    magnitudes = 10.0 ** (exponent - spread * generator.random((3, 32 * blocks)))
    values = (magnitudes * generator.choice([-1, 0, 1], size=magnitudes.shape)).astype(np.float32)
    assert np.array_equal(libggml.round_to_blocks(values, kind), gguf.quants.quantize(values, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_K, Kind.IQ3_XXS], ids=lambda kind: kind.name)
def test_bytes_depend_neither_on_threads_nor_on_the_other_rows(kind: Kind) -> None:
    values, threads = normal(rows=700), torch.get_num_threads()
    try:
        torch.set_num_threads(5)  # the first call, in which the threads make a grid
        together = libggml.round_to_blocks(values, kind)
        torch.set_num_threads(1)
        alone = libggml.round_to_blocks(values, kind)
        assert np.array_equal(together, alone)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(np.concatenate([libggml.round_to_blocks(row[None], kind) for row in values[:9]]), alone[:9])


def test_columns_that_count_more_come_back_nearer() -> None:
    values, importance = normal(rows=64), np.ones(512, dtype=np.float32)
    importance[::4] = 100
    wrong = []
    for weights in (None, importance):
        back = gguf.quants.dequantize(libggml.round_to_blocks(values, Kind.Q2_K, weights), Kind.Q2_K)
        wrong.append(float(np.square(back - values)[:, ::4].mean()))
    assert wrong[1] < 0.8 * wrong[0]


def test_a_view_is_rounded_as_its_copy() -> None:
    values = normal(rows=8, columns=1024)
    view = values[::2, 512:]
    assert np.array_equal(libggml.round_to_blocks(view, Kind.Q4_K), libggml.round_to_blocks(view.copy(), Kind.Q4_K))


ONES = np.ones(512, dtype=np.float32)


@pytest.mark.parametrize(
    ("values", "kind", "importance", "error", "message"),
    [
        (normal(columns=96), Kind.Q4_K, None, UsageError, "96 columns; Q4_K needs a multiple of 256"),
        (normal(columns=0), Kind.Q4_0, None, UsageError, "0 columns"),
        (normal() * np.float32(np.nan), Kind.Q4_0, None, NumericError, "not finite or beyond float16"),
        (normal() * np.float32(1e30), Kind.Q4_K, None, NumericError, "not finite or beyond float16"),
        (np.full((1, 512), -np.inf, np.float32), Kind.Q8_0, None, NumericError, "not finite or beyond float16"),
        (normal(), Kind.Q8_1, None, UsageError, "nothing here rounds to Q8_1"),
        (normal(), Kind.IQ2_XXS, None, UsageError, "IQ2_XXS needs an importance matrix"),
        (normal(), Kind.Q4_K, ONES[:256], UsageError, r"shape \[256\] for 512 columns"),
        (normal(), Kind.Q4_K, -ONES, NumericError, "an importance is negative"),
        (normal(), Kind.Q4_K, ONES * np.float32(np.nan), NumericError, "an importance is negative, not finite"),
        (normal(), Kind.Q4_K, ONES * np.float32(1e35), NumericError, r"or above 1e\+30"),
    ],
)
def test_what_would_end_the_process_is_refused(
    values: Array, kind: Kind, importance: Array | None, error: type[QuantkitError], message: str
) -> None:
    with pytest.raises(error, match=message):
        libggml.round_to_blocks(values, kind, importance)


def test_nothing_to_round_makes_nothing() -> None:
    assert libggml.round_to_blocks(normal(rows=0), Kind.Q4_K).shape == (0, 288)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not libggml.available()
    with pytest.raises(MissingPackageError, match=r"rounding to Q6_K needs .* pip install 'quantkit\[ggml\]'"):
        libggml.round_to_blocks(normal(), Kind.Q6_K)


def test_a_package_without_the_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libggml").mkdir()
    (tmp_path / "libggml" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"libggml-python has none of libggml-base\.so"):
        libggml.round_to_blocks(normal(), Kind.Q6_K)
    (tmp_path / "libggml" / "lib").mkdir()
    (tmp_path / "libggml" / "lib" / "libggml-base.so").write_bytes(b"not a library")
    with pytest.raises(UsageError, match="libggml-python cannot be used"):
        libggml.round_to_blocks(normal(), Kind.Q6_K)


ODD_INPUT = """
import numpy as np
from quantkit.codes import libggml
generator = np.random.default_rng({seed})
for kind in sorted(libggml.KINDS):
    if kind.name.startswith(("IQ1", "IQ2")):
        continue  # their grids take seconds; IQ3's are of the same making
    for _ in range(10):
        size = 10 ** (4.8 - generator.uniform(0, 50) - generator.choice([0, 1, 40]) * generator.random((4, 256)))
        values = (size * generator.choice([-1, 0, 1], size=size.shape)).astype(np.float32)
        weights = (10.0 ** (30 - generator.uniform(0, 75) - 20 * generator.random(256))).astype(np.float32)
        weights[generator.random(256) < generator.choice([0, 0.9, 1])] = 0
        libggml.round_to_blocks(values, kind, weights)
        if not libggml.requires_imatrix(kind):
            libggml.round_to_blocks(values, kind)
print("done")
"""


def test_no_size_of_values_and_importance_ends_the_process() -> None:
    """In a process of its own, since ggml would take the tests with it."""
    done = subprocess.run(
        [sys.executable, "-c", ODD_INPUT.format(seed=0)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-500:]
