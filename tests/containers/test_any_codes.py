"""Any codes, in any container that can hold them, and from there in any other: the same float32 weights, and the same
codes, scales and zeros up to the normal form that docs/containers.md states; or a refusal, and nothing written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import MakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.coded import random_linear, same, write_codes

import quantkit
from quantkit.codes import LinearPlan, QuantizedLinear
from quantkit.containers import misfit, of_format
from quantkit.errors import UsageError
from quantkit.options import CheckpointFormat, QuantSpec, make
from quantkit.sources import open_source

FORMATS = get_args(CheckpointFormat)
WIDTHS = (64, 96)  # of the Linears of the tiny Llama
WHOLE_GROUPS = {"compressed-tensors", "awq", "mlx"}

specs = st.builds(
    lambda **fields: make(QuantSpec, **fields),
    bits=st.sampled_from([2, 3, 4, 4, 5, 6, 7, 8]),
    group_size=st.sampled_from([16, 32, 32, 64, -1]),
    sym=st.booleans(),
    act_order=st.sampled_from(["static", "off", "off", "dynamic"]),
)


def awkward(linear: LinearPlan, seed: int) -> QuantizedLinear:
    """Codes with every end: scales of 0, of either sign, the smallest and large ones; zeros at both ends."""
    made, dice = random_linear(linear, seed), torch.Generator().manual_seed(seed + 1)
    scales, zeros = made.scales.clone(), made.zeros.clone()
    kinds = torch.randint(0, 8, scales.shape, generator=dice)
    for kind, scale in enumerate((0.0, 6e-8, -6e-8, 400.0, -1.0)):
        scales[kinds == kind] = scale
    if not linear.spec.sym:
        zeros[kinds == 5], zeros[kinds == 6] = 1, 2**made.bits - 1
    return replace(made, scales=scales, zeros=zeros)


def holds(format: str, spec: QuantSpec) -> bool:
    short = spec.group_size != -1 and any(width % spec.group_size for width in WIDTHS)
    return misfit(of_format(format), [spec]) is None and not (short and format in WHOLE_GROUPS)


def after(format: str, linear: QuantizedLinear) -> QuantizedLinear:
    """The normal form: where a scale is 0, MLX keeps no zero, and its reader has the middle one."""
    if format != "mlx":
        return linear
    return replace(linear, zeros=linear.zeros.masked_fill(linear.scales == 0, 2 ** (linear.bits - 1)))


def exactly(format: str) -> dict[str, Any]:
    return {"mlx_bias": "float32"} if format == "mlx" else {}


def check(folder: Path, expected: dict[str, QuantizedLinear], weights: dict[str, torch.Tensor]) -> None:
    source = open_source(folder)
    assert source.codes is not None
    assert sorted(source.codes.quantized_names()) == sorted(expected)
    for module, linear in expected.items():
        assert same(source.codes.read_codes(module), linear), module
        assert torch.equal(source.read(f"{module}.weight"), weights[module]), module


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spec=specs,
    way=st.lists(st.sampled_from(FORMATS), min_size=2, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_codes_are_the_same_in_whatever_holds_them(
    spec: QuantSpec, way: list[str], seed: int, make_model: MakeModel, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    first, *others = way
    if not holds(first, spec):
        with pytest.raises(UsageError):
            write_codes(tmp_path / "0", make_model(), spec, first, seed, make=awkward)
        assert not (tmp_path / "0").exists()
        return
    expected = write_codes(tmp_path / "0", make_model(), spec, first, seed, make=awkward)
    weights = {module: linear.dequantize() for module, linear in expected.items()}
    expected = {module: after(first, linear) for module, linear in expected.items()}
    check(tmp_path / "0", expected, weights)
    for number, format in enumerate(others):
        source, out = tmp_path / str(number), tmp_path / str(number + 1)
        if not holds(format, spec):
            with pytest.raises(UsageError):
                quantkit.repack(source, out, to=format, **exactly(format))
            assert not out.exists()
            return
        quantkit.repack(source, out, to=format, **exactly(format))
        expected = {module: after(format, linear) for module, linear in expected.items()}
        check(out, expected, weights)
