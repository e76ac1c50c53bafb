"""`quantkit gptq --format a,b`: one run, several folders, each what a run of its own writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.folders import contents

import quantkit
from quantkit.errors import SourceError, UsageError
from quantkit.options import CheckpointFormat
from quantkit.sources import open_source

FORMATS = get_args(CheckpointFormat)
OPTIONS: dict[str, Any] = {"calibration": token_matrix(4, 16), "group_size": 32, "evaluate": False, "effort": "fast"}


def record_of(folder: Path) -> Any:
    return json.loads((folder / "quantkit.json").read_text())


@pytest.mark.parametrize("grid", [{}, {"sym": False, "mlx_bias": "float32"}], ids=["sym", "asym"])
def test_each_folder_is_what_a_run_of_its_own_writes(
    grid: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(num_key_value_heads=4)
    report = quantkit.gptq(model, tmp_path / "all", format=FORMATS, **grid, **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(
        [*FORMATS, "quant_log.csv", "quantkit.json"]
    )
    for format in FORMATS:
        own = {name: value for name, value in grid.items() if name != "mlx_bias" or format == "mlx"}
        single = quantkit.gptq(model, tmp_path / "one" / format, format=format, **own, **OPTIONS)
        assert contents(tmp_path / "all" / format) == contents(single.out)
        assert report.folders[format] == single.bytes
    assert report.bytes == sum(report.folders.values())
    assert report.model == report.out / "gptq"
    assert record_of(report.out)["recipe"]["format"] == list(FORMATS)
    found = quantkit.verify(report.out, generate=False)
    assert found.ok
    assert [model.name for model in found.models] == list(FORMATS)
    weights = [open_source(report.out / format).read("model.layers.0.mlp.down_proj.weight") for format in FORMATS]
    assert all(torch.equal(weights[0], other) for other in weights)
    with pytest.raises(
        SourceError, match="holds models, name one of them: awq, compressed-tensors, gptq, gptq_v2, mlx"
    ):
        quantkit.inspect(report.out)


def test_verify_looks_at_no_folder_that_only_a_record_names(make_model: MakeModel, tmp_path: Path) -> None:
    out = quantkit.gptq(make_model(), tmp_path / "out", format="gptq,mlx", **OPTIONS).out
    (out / "gptq").rename(tmp_path / "elsewhere")
    record = record_of(out)
    record["recipe"]["format"] = ["../elsewhere", str(tmp_path / "elsewhere"), "mlx", "mlx", 3]
    (out / "quantkit.json").write_text(json.dumps(record))
    assert [model.name for model in quantkit.verify(out, generate=False).models] == ["mlx"]


def test_what_is_found_of_one_stands_in_all(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and asks a question " * 40)
    options = {**OPTIONS, "evaluate": True, "text": str(text), "eval_tokens": 64}
    report = quantkit.gptq(make_model(), tmp_path / "out", format="mlx,gptq", **options)
    assert report.model == tmp_path / "out" / "mlx"
    assert report.evaluation is not None
    for folder in (report.out, report.out / "mlx", report.out / "gptq"):
        assert record_of(folder)["evaluation"] == report.evaluation.as_dict()
    assert record_of(report.out / "gptq")["recipe"]["format"] == "gptq"
    recorder = Recorder()
    again = quantkit.gptq(make_model(), tmp_path / "out", format="mlx,gptq", resume=True, progress=recorder, **options)
    assert again.evaluation == report.evaluation
    assert any("is complete already" in note for note in recorder.notes)
    quantkit.card(report.out / "gptq", base_model=["someone/tiny"], licence="mit")
    assert "--format" not in (report.out / "gptq" / "README.md").read_text()


def test_a_dry_run_tells_each_folder(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = quantkit.gptq(make_model(), format=["gptq", "mlx"], dry_run=True, **OPTIONS)
    assert (report.out.name, report.model.name) == ("tiny-llama-4bit-32g", "gptq")
    first, second, *_ = report.lines()
    assert first == f"would write {report.out}"
    assert isinstance(second, str)
    assert second.startswith("in it gptq (")
    assert "), mlx (" in second
    assert not report.out.exists()
    assert quantkit.gptq(make_model(), format=["mlx"], dry_run=True, **OPTIONS).out.name == "tiny-llama-MLX-4bit-32g"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"format": "gptq,awq", "bits": 8}, "an AWQ folder holds 4 bits; 8-bit codes fit into a GPTQ checkpoint or"),
        ({"format": "mlx,gptq", "act_order": "dynamic"}, "use static or off; a GPTQ checkpoint holds it"),
        ({"format": "mlx,gptq", "group_size": 16}, "of 32, 64, 128; a GPTQ checkpoint or .* holds them"),
        ({"format": "mlx,gptq", "sym": False}, "mlx_bias=float32 holds them"),
        ({"format": "awq,gptq", "mlx_bias": "float32"}, "it is for an MLX folder, and awq and gptq is written"),
        ({"format": "gptq,awq", "group_size": 64}, "has no short groups; group_size=32 divides every width"),
        ({"format": "gptq,mlx", "ggml": "q4_0", "group_size": None}, "format=gptq,mlx is for folders: leave ggml"),
        ({"format": "gptq,mlx", "budget": "4.5bpw", "group_size": None, "effort": "standard"}, "give one format"),
        ({"format": "gptq,gptq"}, "names gptq twice"),
        ({"format": "gptq,mxl"}, "mxl is none; choose gptq, gptq_v2, compressed-tensors, awq, mlx; did you mean mlx"),
        ({"format": "gptq,"}, "an empty word is none; choose gptq, gptq_v2"),
        ({"format": "mlx,gguf"}, "gguf is a file: ggml TYPE writes GGUF"),
        ({"ggml": "q4_0", "mlx_bias": "float32", "group_size": None}, "it is for an MLX folder, and gguf is written"),
    ],
    ids=str,
)
def test_what_one_of_them_has_no_place_for_is_refused(
    options: dict[str, Any], line: str, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=line):
        quantkit.gptq(make_model(), tmp_path / "out", **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())


def test_a_short_last_group_is_told_with_what_to_do(make_model: MakeModel, tmp_path: Path) -> None:
    """Widths of 64 and 96 in groups of 64, as SmolLM2's 576 in groups of 128."""
    recorder = Recorder()
    made = quantkit.gptq(make_model(), tmp_path / "out", progress=recorder, **{**OPTIONS, "group_size": 64})
    (said,) = [note for note in recorder.notes if "no multiple of 64" in note]
    assert "widths 96 are no multiple of 64: their last group is short, which vLLM, ExLlama and AutoGPTQ refuse" in said
    assert "group_size=32 divides every width, and `quantkit repack --to gptq --group-size 32`" in said
    quantkit.repack(made.out, tmp_path / "split", to="gptq", group_size=32)
    for folder, refused in ((made.out, True), (tmp_path / "split", False)):
        (checked,) = quantkit.verify(folder, generate=False).models
        assert any("is 96 wide, no multiple" in load.why for load in checked.loads) == refused
