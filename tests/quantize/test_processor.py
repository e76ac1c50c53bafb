"""`make test-numerics` computes as a processor without newer instructions does: the variables it sets are obeyed."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from quantkit.quantize import loops

pytestmark = pytest.mark.numerics


def under(variable: str, value: str) -> pytest.MarkDecorator:
    reason = f"{variable} is not {value} (make test-numerics sets it)"
    return pytest.mark.skipif(os.environ.get(variable) != value, reason=reason)


@under("ATEN_CPU_CAPABILITY", "default")
def test_torchs_own_loops() -> None:
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"


@under("NUMBA_CPU_NAME", "generic")
@pytest.mark.skipif(not loops.has_numba(), reason="Numba is not installed (pip install 'quantkit[cpu]')")
def test_numbas_loops_and_what_it_keeps_of_them() -> None:
    """The processor and its features are a part of the key under which machine code is kept on disk."""
    from numba.core.registry import cpu_target

    _, processor, features = cpu_target.target_context.codegen().magic_tuple()
    assert (processor, features) == ("generic", "")


@under("MKL_CBWR", "COMPATIBLE")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")
def test_mkls_products(capfd: pytest.CaptureFixture[str]) -> None:
    a = torch.ones(32, 32)
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        a @ a
    ctypes.CDLL(None).fflush(None)
    assert "CNR:COMPATIBLE" in capfd.readouterr().out
