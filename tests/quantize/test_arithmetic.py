"""bfloat16 for the calibration forwards on a CPU: who chooses it, and what it leaves as it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix

import quantkit
from quantkit.blocks import arithmetic
from quantkit.errors import Interrupted, UsageError
from quantkit.quantize import gptq as method
from quantkit.quantize.methods import Solved
from quantkit.sources import open_source
from quantkit.verbs.gptq import GptqReport

MEASURED = arithmetic.bfloat16_pays
GIVEN: dict[str, Any] = {"calibration": token_matrix(12, 32), "group_size": 32, "evaluate": False, "device": "cpu"}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is faster in bfloat16."""
    have(monkeypatch, True)


def have(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(arithmetic, "bfloat16_pays", lambda: pays)


def dtype_of(folder: Path) -> str:
    return str(json.loads((folder / "quantkit.json").read_text())["compute"]["dtype"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what it leaves as it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "file"])
def test_codes_are_made_of_the_weights_as_they_are_stored(
    kind: str, make_model: MakeModel, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of none that bfloat16 rounded, of Linears as [out, in]; Hessians are float32 sums."""
    seen: list[torch.Tensor] = []
    solve = method.solve

    def noted(tiles: list[torch.Tensor], H: torch.Tensor, spec: Any) -> list[Solved]:
        assert H.dtype == torch.float32
        seen.extend(row.float() for tile in tiles for row in tile)
        return solve(tiles, H, spec)

    monkeypatch.setattr(method, "solve", noted)
    model = tiny_gguf if kind == "file" else make_model(kind)
    report = quantkit.gptq(model, tmp_path / "out", dtype="bfloat16", **GIVEN)
    assert dtype_of(tmp_path / "out") == "bfloat16"
    source = open_source(model)
    stored = {layer.name: source.read(f"{layer.name}.weight").float() for layer in report.layers}
    rows = [row for weight in stored.values() for row in (weight.T if kind == "gpt2" else weight)]
    assert any(not torch.equal(row, row.bfloat16().float()) for row in rows)
    assert {tuple(row.tolist()) for row in seen} == {tuple(row.tolist()) for row in rows}


def test_the_evaluation_is_in_float32(make_model: MakeModel, tmp_path: Path) -> None:
    given = {**GIVEN, "evaluate": True, "eval_tokens": 512, "dtype": "bfloat16"}
    found = quantkit.gptq(make_model("llama"), tmp_path / "out", **given).evaluation
    assert found is not None
    alone = quantkit.perplexity(
        tmp_path / "out", against=make_model("llama"), dtype="float32", eval_tokens=512, device="cpu"
    )
    assert [row.perplexity for row in found.results] == [row.perplexity for row in alone.results]


# -- who chooses it ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("stored", "asked", "taken"),
    [
        ("float16", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float16", "float32", "float32"),
    ],
)
def test_where_it_is_faster_and_the_weights_are_of_half_precision(
    stored: str, asked: Any, taken: str, make_model: MakeModel, tmp_path: Path
) -> None:
    recorder = Recorder()
    quantkit.gptq(make_model("llama", dtype=stored), tmp_path / "out", dtype=asked, progress=recorder, **GIVEN)
    assert dtype_of(tmp_path / "out") == taken
    assert any("in bfloat16" in note for note in recorder.notes) == (taken == "bfloat16")


@pytest.mark.usefixtures("fast")
def test_codes_of_a_file_are_of_less_than_half_precision(tiny_gguf: Path, tmp_path: Path) -> None:
    quantkit.gptq(tiny_gguf, tmp_path / "out", **GIVEN)
    assert dtype_of(tmp_path / "out") == "bfloat16"


def test_elsewhere_it_is_float32(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.gptq(make_model("llama"), tmp_path / "out", **GIVEN)
    assert dtype_of(tmp_path / "out") == "float32"


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_goes_on_as_it_began_on_another_processor(
    begun: bool, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished or complete; but not where another arithmetic is asked for."""
    model, out = make_model("llama", num_hidden_layers=3), tmp_path / "out"
    have(monkeypatch, begun)
    quantkit.gptq(model, tmp_path / "whole", **GIVEN)
    with pytest.raises(Interrupted):
        quantkit.gptq(model, out, checkpoint_every="1", progress=Stopping(2), **GIVEN)
    have(monkeypatch, not begun)
    other: Any = "float32" if begun else "bfloat16"
    with pytest.raises(UsageError, match="compute dtype"):
        quantkit.gptq(model, out, resume=True, dtype=other, **GIVEN)
    quantkit.gptq(model, out, resume=True, **GIVEN)
    assert files(out) == files(tmp_path / "whole")
    assert dtype_of(out) == ("bfloat16" if begun else "float32")
    recorder = Recorder()
    again: GptqReport = quantkit.gptq(model, out, resume=True, progress=recorder, **GIVEN)
    assert any("complete already" in note for note in recorder.notes)
    assert again.layers


class Stopping(Recorder):
    """Interrupts when so many Linears of blocks were told of: those of the blocks before have landed."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self._left = 7 * blocks + 1

    def detail(self, text: str) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


# -- whether it is faster ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "slow", "pays"),
    [
        ("fpu avx2", torch.float32, False),
        ("fpu avx512_bf16", torch.float32, True),
        ("fpu avx512_bf16", torch.bfloat16, False),
        ("fpu amx_bf16 amx_tile", torch.float32, True),
    ],
)
def test_it_is_measured_where_the_processor_has_it(
    flags: str, slow: torch.dtype, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    found = arithmetic._processor_flags(cpuinfo)
    assert found == set(flags.split())
    monkeypatch.setattr(arithmetic, "_processor_flags", lambda: found)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: time.sleep(0.02 if x.dtype == slow else 0.002))
    assert MEASURED.__wrapped__() is pays


def test_no_processor_is_told_of(tmp_path: Path) -> None:
    assert arithmetic._processor_flags(tmp_path / "none") == set()
