"""Methods: plain rounding from end to end, and what it takes to add one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file
from support.problems import problem

import quantkit
from quantkit.codes import GgmlLinear, QuantizedLinear
from quantkit.containers.gptq.read import GptqSource
from quantkit.errors import UsageError
from quantkit.options import METHODS, MethodName, QuantSpec
from quantkit.options.grid import MethodRow
from quantkit.quantize import gptq, rounding
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.hessian import HessianAccumulator, row_losses
from quantkit.quantize.methods import Method, Solved, Sums, method_of
from quantkit.quantize.targets import on_grid_of
from quantkit.runs.places import folder_of

OPTIONS: dict[str, Any] = {
    "calibration": token_matrix(4, 32),
    "group_size": 32,
    "evaluate": False,
    "device": "cpu",
    "effort": "fast",
}


def rounded(W: np.ndarray, bits: int, group_size: int, sym: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, zeros) of plain rounding, group by group, after AutoGPTQ's ``Quantizer``."""
    top = 2**bits - 1
    codes = np.zeros(W.shape, np.uint8)
    scales, zeros = [], []
    for start in range(0, W.shape[1], group_size):
        part = W[:, start : start + group_size]
        high, low = np.maximum(part.max(axis=1), 0), np.minimum(part.min(axis=1), 0)
        if sym:
            high = np.maximum(high, -low)
            low = -high
        scale = ((high - low) / np.float32(top)).astype(np.float16)
        step = scale.astype(np.float32)
        zero = np.full_like(step, 2 ** (bits - 1)) if sym else np.clip(np.round(-low / step), 1, top)
        codes[:, start : start + group_size] = np.clip(np.round(part / step[:, None] + zero[:, None]), 0, top)
        scales.append(scale)
        zeros.append(zero.astype(np.uint8))
    return codes, np.stack(scales, axis=1), np.stack(zeros, axis=1)


def linears(folder: Path) -> dict[str, QuantizedLinear]:
    """What a checkpoint holds, by module."""
    source = GptqSource(folder)
    names = [name.removesuffix(".qweight") for name in load_file(folder / "model.safetensors") if "qweight" in name]
    return {name: source.read_codes(name) for name in names}


# -- plain rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sym", [True, False])
def test_a_rounded_checkpoint_holds_the_nearest_codes(make_model: MakeModel, tmp_path: Path, sym: bool) -> None:
    model = make_model()
    report = quantkit.gptq(model, tmp_path / "out", method="round", sym=sym, **OPTIONS)
    stored = load_file(model / "model.safetensors")
    found = linears(tmp_path / "out")
    assert len(found) == 14
    for name, linear in found.items():
        codes, scales, zeros = rounded(stored[f"{name}.weight"].float().numpy(), 4, 32, sym)
        assert np.array_equal(linear.codes.numpy(), codes), name
        assert np.array_equal(linear.scales.numpy(), scales), name
        assert np.array_equal(linear.zeros.numpy(), zeros), name
    assert all(layer.loss == layer.rtn_loss > 0 and not layer.fallback for layer in report.layers)

    record = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert record["recipe"]["method"] == "round"
    rtn = {layer["name"]: layer["rtn_loss"] for layer in record["layers"]}
    usual = quantkit.gptq(model, tmp_path / "usual", sym=sym, **OPTIONS)
    assert "method" not in json.loads((tmp_path / "usual" / "quantkit.json").read_text())["recipe"]
    first = usual.layers[0]  # of later ones the inputs differ: they come of other codes
    assert (first.rtn_loss, first.loss < first.rtn_loss) == (rtn[first.name], True)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_on_a_type_of_ggml_rounding_is_on_its_grid(name: str) -> None:
    W, H = problem(8, 512)
    [solved] = rounding.solve([W], H, QuantSpec(method="round", **on_grid_of(name)))
    assert isinstance(solved.linear, GgmlLinear)
    grid = solved.linear.grid
    scale, minimum = (part[:, grid.group.long(), None] for part in grid.steps())
    distance = (scale * torch.arange(2**grid.bits) - minimum - W[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((solved.linear.dequantize() - W).abs(), distance, rtol=1e-4, atol=1e-6)
    assert torch.equal(solved.loss, row_losses(W, solved.linear, H))


def test_outputs_of_two_methods_do_not_share_a_name(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def planned(**more: Any) -> str:
        return quantkit.gptq(make_model(), dry_run=True, **OPTIONS, **more).out.name

    assert planned() == "tiny-llama-GPTQ-4bit-32g"
    assert planned(method="round") == "tiny-llama-GPTQ-4bit-32g-rtn"
    assert planned(method="round", ggml="q4_0", pre="gpt-2") == "tiny-llama-RTN-Q4_0"


def test_rounding_has_no_order_of_columns(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="act_order dynamic"):
        quantkit.gptq(make_model(), tmp_path / "out", method="round", act_order="dynamic", **OPTIONS)


def test_a_run_of_one_method_is_not_gone_on_with_by_another(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = make_model(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "solve", _failing_at(rounding.solve, call=6))  # in the second block
        with pytest.raises(UsageError, match="enough"):
            quantkit.gptq(model, out, method="round", **OPTIONS)
    assert folder_of(out).is_dir()
    with pytest.raises(UsageError, match="recipe method: round then, none now"):
        quantkit.gptq(model, out, resume=True, **OPTIONS)
    quantkit.gptq(model, out, method="round", resume=True, **OPTIONS)
    assert not folder_of(out).exists()
    with pytest.raises(UsageError, match=r"complete, but made otherwise .*method: round then, none now"):
        quantkit.gptq(model, out, resume=True, **OPTIONS)


def _failing_at(solve: Callable[..., list[Solved]], call: int) -> Callable[..., list[Solved]]:
    calls = iter(range(1, call))

    def run(*arguments: Any) -> list[Solved]:
        if next(calls, None) is None:
            raise UsageError("enough")
        return solve(*arguments)

    return run


# -- one module, one row -----------------------------------------------------------------------------------------------


class Means:
    """Sums of a stage's input, not of its squares."""

    def __init__(self, columns: int) -> None:
        self.sum, self.tokens = torch.zeros(columns), 0

    def add(self, x: torch.Tensor) -> None:
        self.sum += x.reshape(-1, x.shape[-1]).float().sum(dim=0)
        self.tokens += x[..., 0].numel()

    def merge(self, other: Means) -> Means:
        self.sum += other.sum
        self.tokens += other.tokens
        return self

    def packed(self) -> torch.Tensor:
        return self.sum.clone()

    def unpack(self, packed: torch.Tensor) -> None:
        self.sum = packed

    def finish(self, name: str) -> torch.Tensor:
        return self.sum / max(self.tokens, 1)


def toy(seen: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> ModuleType:
    """A method that gathers means, and rounds downwards: its codes are the nearest, or one below."""
    module: Any = ModuleType("toy_method")

    def solve(tiles: list[torch.Tensor], mean: torch.Tensor, spec: QuantSpec) -> list[Solved]:
        seen.extend((tuple(W.shape), tuple(mean.shape)) for W in tiles)
        return [floored(W.float(), mean, spec) for W in tiles]

    module.needs, module.solve = (), solve
    module.gathers = lambda columns, device: Means(columns)
    return module  # type: ignore[no-any-return]


def floored(W: torch.Tensor, mean: torch.Tensor, spec: QuantSpec) -> Solved:
    nearest = round_to_nearest(W, spec)
    above = nearest.dequantize() > W
    lower = replace(nearest, codes=nearest.codes - above.byte())
    loss = ((W - lower.dequantize()) @ mean).double().square()
    return Solved(lower, loss, loss)


def test_a_method_is_a_module_and_a_row(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    monkeypatch.setitem(sys.modules, "toy_method", toy(seen))
    monkeypatch.setitem(METHODS, "round", MethodRow("toy_method", "TOY", "-toy"))
    monkeypatch.chdir(tmp_path)
    report = quantkit.gptq(model, method="round", **OPTIONS)
    assert report.out.name == "tiny-llama-GPTQ-4bit-32g-toy"
    stored = load_file(model / "model.safetensors")
    found = linears(report.out)
    assert len(found) == 14
    for name, linear in found.items():
        codes, scales, _ = rounded(stored[f"{name}.weight"].float().numpy(), 4, 32, sym=True)
        assert np.array_equal(linear.scales.numpy(), scales)
        assert set(np.unique(codes.astype(int) - linear.codes.numpy())) == {0, 1}, name
    assert len(seen) == 2 * 4  # stacks: q, k and v; o; gate and up; down
    assert all(rows[1:] == columns for rows, columns in seen)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_names_a_method(name: MethodName) -> None:
    method = method_of(name)
    assert {"needs", "gathers", "solve"} <= vars(method).keys()
    assert method.gathers(8, torch.device("cpu")).tokens == 0


def test_rows_are_the_names_that_options_take() -> None:
    assert tuple(METHODS) == get_args(MethodName)
    assert len({row.label for row in METHODS.values()} | {row.suffix for row in METHODS.values()}) == 2 * len(METHODS)


def test_names_are_listed_without_torch() -> None:
    program = "import sys; from quantkit.options import METHODS; print(*METHODS, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [*METHODS, "False"]


# For mypy: modules and sums are what the protocols describe.
_METHODS: tuple[Method, ...] = (gptq, rounding)
_SUMS: tuple[Sums, ...] = (Means(1), HessianAccumulator(1, torch.device("cpu")))
