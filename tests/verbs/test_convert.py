"""The verb `convert`: a folder that transformers loads, of the weights that our readers read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, MakeModel, Recorder, token_matrix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.few_files import few_files
from support.ggjt_models import LLAMA, tiny, write
from support.gguf_models import sentencepiece, write_model
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import quantkit
from quantkit.blocks import folder as folders
from quantkit.cli import app as cli
from quantkit.containers.hf.write import ShardedWriter
from quantkit.errors import (
    NumericError,
    OutputError,
    SourceError,
    UsageError,
)
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

Change = Callable[[dict[str, torch.Tensor]], None]
UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = token_matrix(2, 12).tokens.long()
GPTQ: dict[str, Any] = {"device": "cpu", "evaluate": False, "group_size": 32}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def loaded_logits(folder: Path) -> torch.Tensor:
    """transformers' logits in float32, of a folder from which it has to find everything."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert {key: list(value) for key, value in said.items() if value} == {}
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return logits


def our_logits(model: Path) -> torch.Tensor:
    return streamed_logits(open_stream(model), [TOKENS])[0]


def assert_same_model(out: Path, model: Path) -> None:
    expected = our_logits(model)
    torch.testing.assert_close(loaded_logits(out), expected, **forward(expected))


def changed(model: Path, copy: Path, change: Change) -> Path:
    """A copy of a one-file folder with its tensors changed."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


# -- every source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_every_family_loads_in_transformers(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2}
    model = make_model(family, dtype="float32", **(sizes if family == "gpt_oss" else {}))
    report = quantkit.convert(model, tmp_path / "out", dtype="float32")
    before, after = stored(model), stored(tmp_path / "out")
    assert before.keys() == after.keys()  # experts too are stored as they were, apart or fused
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.bytes == sum(tensor.nbytes for tensor in after.values())
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_cast(dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", dtype="float32")
    report = quantkit.convert(model, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored(model).items()}
    found = stored(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == report.dtype == dtype


@pytest.mark.parametrize(("stored_as", "made"), [("float32", "float16"), ("float16", "float16"), ("bfloat16",) * 2])
def test_auto_keeps_bfloat16_and_is_float16_else(
    stored_as: str, made: str, make_model: MakeModel, tmp_path: Path
) -> None:
    assert quantkit.convert(make_model("llama", dtype=stored_as), tmp_path / "out").dtype == made


def test_a_tied_bin_folder_loses_its_second_copy(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", tied=True, dtype="float32")
    tensors = stored(model)
    (tmp_path / "bin").mkdir()
    for path in model.glob("*.json"):
        shutil.copy(path, tmp_path / "bin")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(both, tmp_path / "bin" / "pytorch_model.bin")
    quantkit.convert(tmp_path / "bin", tmp_path / "out", dtype="float32")
    found = stored(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert_same_model(tmp_path / "out", tmp_path / "bin")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *EXPERTS])
def test_gptq_is_dequantized(family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    model = make_model(family, dtype="float32")
    quantkit.gptq(model, tmp_path / "gptq", calibration=tiny_tokens, bits=4, **GPTQ)
    quantkit.convert(tmp_path / "gptq", tmp_path / "out", dtype="float32")
    found = stored(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in stored(model).items()
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert_same_model(tmp_path / "out", tmp_path / "gptq")
    assert not torch.allclose(loaded_logits(tmp_path / "out"), our_logits(model), atol=1e-3)


def test_experts_that_are_fused_in_the_source_are_fused_again(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Transposed, gate and up interleaved, with biases: under the names and with the shapes of the source."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2}
    model = make_model("gpt_oss", dtype="float32", **sizes)
    quantkit.gptq(model, tmp_path / "gptq", calibration=tiny_tokens, **GPTQ)
    quantkit.convert(tmp_path / "gptq", tmp_path / "out", dtype="float32")
    found, source = stored(tmp_path / "out"), stored(model)
    assert {name: own.shape for name, own in found.items()} == {name: own.shape for name, own in source.items()}
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert torch.equal(found[name], source[name].half().float())  # as the codes' folder keeps it
    assert_same_model(tmp_path / "out", tmp_path / "gptq")


def test_parts_that_nothing_puts_together_are_refused(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of codes are stored apart; of a kind that is not stacked again, transformers would miss them."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention"] * 2}
    quantkit.gptq(make_model("gpt_oss", **sizes), tmp_path / "gptq", calibration=tiny_tokens, **GPTQ)
    monkeypatch.setattr(folders, "with_stacks", lambda source, *_: source)
    with pytest.raises(SourceError) as caught:
        quantkit.convert(tmp_path / "gptq", tmp_path / "out")
    assert str(caught.value) == (
        "gptq: model.layers.0.mlp.experts.down_proj is stored in parts, under names that transformers does not put "
        "together for gpt_oss; convert the model that this one was made from"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


def test_a_gguf_file(tiny_gguf: Path, tmp_path: Path) -> None:
    quantkit.convert(tiny_gguf, tmp_path / "out", dtype="float32")
    assert_same_model(tmp_path / "out", tiny_gguf)
    source = open_source(tiny_gguf)
    assert stored(tmp_path / "out").keys() == source.tensors.keys()
    ours, theirs = source.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the quick brown fox", "  two\n\nlines ", "<|im_start|>user"):
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template
    record = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert record["recipe"] == {"dtype": "float32"}
    assert record["source"]["kind"] == "gguf"
    assert list(record["source"]["sha256"]) == [tiny_gguf.name]


def test_a_ggjt_file_with_what_it_does_not_say(tmp_path: Path, recorder: Recorder) -> None:
    write_model(tmp_path / "tiny.gguf", tiny(), sentencepiece(LLAMA))
    written = write(tmp_path / "tiny.bin", open_source(tmp_path / "tiny.gguf"))
    quantkit.convert(written.path, tmp_path / "out", dtype="float32", progress=recorder)
    assert recorder.notes == [*written.remarks]
    assert recorder.phases == ["converting", "reading back"]
    assert_same_model(tmp_path / "out", tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, ids in LLAMA["encoded"]:
        assert tokenizer(text).input_ids == [1, *ids], text


# -- what can go wrong -----------------------------------------------------------------------------------------------


def large(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 5] = 70000.0


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 5] = torch.nan


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.int16)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (large, NumericError, rf"{UP}: a value is beyond float16; use dtype=bfloat16 or float32"),
        (nan, NumericError, rf"{UP} holds NaN or infinity; the model's files are damaged"),
        (integers, SourceError, rf"holds quantized weights \({UP}\), but nothing says how"),
        (missing, SourceError, rf"tensor {UP} is missing"),
    ],
)
def test_a_tensor_that_cannot_be_converted_is_named(
    change: Change, error: type[Exception], said: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = changed(make_model("llama", dtype="float32"), tmp_path / "model", change)
    with pytest.raises(error, match=said):
        quantkit.convert(model, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if change is large:
        quantkit.convert(model, tmp_path / "out", dtype="bfloat16")
        assert stored(tmp_path / "out")[UP][3, 5] == torch.tensor(70000.0).bfloat16()


def test_an_output_in_the_way(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = make_model("llama"), tmp_path / "out"
    quantkit.convert(model, out)
    with pytest.raises(UsageError, match="already exists; use force=True"):
        quantkit.convert(model, out)
    quantkit.convert(model, out, dtype="bfloat16", force=True)
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="lies inside the source"):
        quantkit.convert(model, model / "out")
    with pytest.raises(UsageError, match="dtype=int8: choose auto, float16, bfloat16, float32"):
        quantkit.convert(model, tmp_path / "other", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_shard_size=none"):
        quantkit.convert(model, tmp_path / "other", max_shard_size="none")


def test_a_full_disk_leaves_nothing(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardedWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardedWriter, "write", full)
    with pytest.raises(OutputError, match="No space left on device; nothing was left there"):
        quantkit.convert(make_model("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_come_back_otherwise_are_named(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> Any:
        changed_tensors = load_file(folder / "model.safetensors")
        changed_tensors[UP][0, 0] += 1
        save_file(changed_tensors, folder / "model.safetensors")
        return original(folder)

    original = folders.open_weights
    monkeypatch.setattr(folders, "open_weights", damaged)
    with pytest.raises(OutputError, match=rf"{UP}: other data was read back than was written"):
        quantkit.convert(make_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- shards, sizes and the command line ------------------------------------------------------------------------------


def test_shards_are_as_large_as_asked(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", dtype="float32")
    quantkit.convert(model, tmp_path / "out", dtype="float32", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 110_000 for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for path in shards:
        with safe_open(path, framework="pt") as opened:
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == set(opened.keys())
    assert_same_model(tmp_path / "out", model)


def test_the_same_run_gives_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantkit.convert(make_model("llama"), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"config.json", "model.safetensors", "quantkit.json", "tokenizer.json", "generation_config.json"} <= names
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "one").glob("*.json"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def test_a_dry_run_knows_the_size_and_writes_nothing(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("llama", dtype="float32")
    code, out, err = run(capsys, "convert", model, "--dry-run", "--json", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    planned = json.loads(out)
    assert planned["out"] == str(tmp_path / "tiny-llama-BF16")
    assert list(tmp_path.iterdir()) == []
    code, out, err = run(capsys, "convert", model, "--json", "--quiet", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert {**made, "dry_run": True, "seconds": 0.0} == planned
    found = stored(tmp_path / "tiny-llama-BF16")
    assert (made["tensors"], made["bytes"]) == (len(found), sum(tensor.nbytes for tensor in found.values()))


def test_what_the_command_says(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("llama")
    code, out, err = run(capsys, "convert", model, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert out.startswith(f"would write {tmp_path / 'out'}\n21 tensors in float16, ")
    code, out, err = run(capsys, "convert", model, "--out", tmp_path / "out")
    assert code == 0
    assert out.startswith(f"wrote {tmp_path / 'out'}\n21 tensors in float16, ")
    assert "converting: 21/21" in err
    code, out, err = run(capsys, "convert", model, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "already exists; use --force" in err
    code, out, err = run(capsys, "convert", tmp_path / "nothing", "--out", tmp_path / "out", "--quiet")
    assert (code, out) == (2, "")


# -- what goes in comes out ------------------------------------------------------------------------------------------


def test_float32_beside_half_precision_stays_unless_a_type_is_asked_for(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Routers' biases and state spaces' decays are stored so, and mean little in 16 bits."""
    name, model = "model.norm.weight", Path(shutil.copytree(make_model(), tmp_path / "model"))
    values = 7 + torch.linspace(0, 0.01, 64)
    save_file({**stored(model), name: values}, model / "model.safetensors", {"format": "pt"})
    quantkit.gptq(model, tmp_path / "gptq", calibration=tiny_tokens, **GPTQ)
    quantkit.convert(model, tmp_path / "same")
    quantkit.convert(model, tmp_path / "half", dtype="float16")
    for out in ("gptq", "same"):
        assert torch.equal(stored(tmp_path / out)[name], values)
        assert stored(tmp_path / out)["model.embed_tokens.weight"].dtype == torch.float16
    assert torch.equal(stored(tmp_path / "half")[name], values.half())


def test_float32_of_a_base_stays_in_what_is_merged(make_model: MakeModel, tmp_path: Path) -> None:
    name, base = "model.norm.weight", Path(shutil.copytree(make_model(), tmp_path / "base"))
    values = 7 + torch.linspace(0, 0.01, 64)
    save_file({**stored(base), name: values}, base / "model.safetensors", {"format": "pt"})
    quantkit.diff(base, base, tmp_path / "delta")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "merged")
    assert torch.equal(stored(tmp_path / "merged")[name], values)
    assert stored(tmp_path / "merged")[UP].dtype == torch.float16


def test_a_model_of_float32_is_cast_as_a_whole(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.convert(make_model(dtype="float32"), tmp_path / "out")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.float16}


def test_tensors_that_the_models_class_passes_over_are_named(
    make_model: MakeModel, tiny_tokens: TokenMatrix, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    more = {f"{name}.weight": torch.ones(4) for name in ("model.visual.a", "model.visual.b", "mtp.norm", "extra")}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # which every reader computes
    save_file({**stored(model), **more, **old}, model / "model.safetensors", {"format": "pt"})
    ignored = [r"^mtp", r"visual", r"inv_freq"]
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    quantkit.convert(model, tmp_path / "out", progress=recorder)
    quantkit.gptq(model, tmp_path / "gptq", calibration=tiny_tokens, progress=recorder, **GPTQ)
    quantkit.ggml(model, tmp_path / "out.gguf", type="f16", pre="smollm", progress=recorder)
    found = [text for text in recorder.warnings if "left out" in text]
    # The folders hold them as they are.
    assert [text.partition(": ")[2] for text in found] == ["extra (1), model.visual (2), mtp (1)"]
    for folder in ("out", "gptq"):
        assert set(more) <= set(stored(tmp_path / folder))
        assert not set(old) & set(stored(tmp_path / folder))


def test_what_was_rounded_before_is_called_so(tiny_gguf: Path, recorder: Recorder, tmp_path: Path) -> None:
    quantkit.gptq(tiny_gguf, dry_run=True, progress=recorder, **GPTQ)
    assert any("was rounded before: what is quantized is float16 from Q4_0, Q8_0" in text for text in recorder.notes)
    quantkit.convert(tiny_gguf, tmp_path / "out")
    quantkit.gptq(tmp_path / "out", dry_run=True, progress=recorder, **GPTQ)
    assert "out was made from a GGUF file (its quantkit.json): what that rounded stays so" in recorder.notes


def test_more_shards_than_a_process_may_have_open(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    with few_files():
        report = quantkit.convert(model, tmp_path / "out", max_shard_size="1KB")
    assert len(list(report.out.glob("*.safetensors"))) > 16
    assert_same_model(report.out, model)
