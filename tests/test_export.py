"""`quantkit ggml`: GPTQ codes in llama.cpp's files as they are, and models that were never quantized."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from gguf_models import sentencepiece, write_model
from safetensors.torch import load_file, save_file
from streamed import open_stream, streamed_logits
from test_ggjt import LLAMA, tiny

import quantkit
from quantkit.calibration import TokenMatrix
from quantkit.errors import NumericError, UsageError
from quantkit.sources import open_source
from quantkit.sources.gptq import GptqSource

IDS = token_matrix(2, 24, seed=5).tokens
# Widths that whole groups of every size fit into; four heads share two keys and values.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def quantized(make_model: MakeModel, tokens: TokenMatrix, out: Path, family: str = "llama", **options: Any) -> Path:
    config = options.pop("config", WIDE)
    folder = make_model(family, **config)
    quantkit.gptq(folder, out, calibration=tokens, evaluate=False, device="cpu", **options)
    return out


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"group_size": size}, "Q4_0") for size in (32, 64, 128, 256, -1)),
        *(({"group_size": size, "bits": 8}, "Q8_0") for size in (32, -1)),
        *(({"group_size": size, "sym": False}, "Q4_K") for size in (256, -1)),
        ({"group_size": 64, "bits": 3}, "Q4_0"),
        ({"group_size": 256, "bits": 2, "sym": False}, "Q2_K"),
        ({"group_size": 32, "sym": False}, "Q5_0"),
    ],
    ids=str,
)
def test_the_files_weights_are_the_checkpoints_to_the_bit(
    options: dict[str, Any], expected: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Judged by gguf's own reader and dequantizer, rows of Q and K put back from llama.cpp's order."""
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", **options)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert report.fidelity["exact"] == 14
    assert {t.type for t in report.tensors if t.fidelity == "exact"} == {expected}
    checkpoint = open_source(folder)
    assert isinstance(checkpoint, GptqSource)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    names |= {"attn_v": "self_attn.v_proj"} | {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    seen = 0
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in names:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            heads = {"attn_q": 4, "attn_k": 2}.get(part)
            if heads:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            module = f"model.layers.{tensor.name.split('.')[1]}.{names[part]}"
            assert np.array_equal(values, checkpoint.read_codes(module).dequantize().numpy()), tensor.name
            seen += 1
    assert seen == 14
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "phi3", "gemma3_text"])
def test_other_families(family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    config = {"mlp_only_layers": [], "norm_topk_prob": True} if family == "qwen3_moe" else {}
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", family, group_size=32, config=config)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert report.fidelity["exact"] > 0
    stored = types_of(tmp_path / "out.gguf")
    assert stored == {tensor.name: tensor.type for tensor in report.tensors}
    assert "Q4_0" in stored.values()
    if family == "qwen3_moe":  # written, but not read by us yet
        assert stored["blk.0.ffn_gate_exps.weight"] == "Q4_0"
        return
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-3, atol=1e-3)


def test_bits_may_differ_between_modules(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    override = {"*.down_proj": {"bits": 8}}
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32, override=override)
    quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    stored = types_of(tmp_path / "out.gguf")
    assert (stored["blk.1.ffn_down.weight"], stored["blk.1.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-4, atol=1e-4)


def test_asymmetric_codes_go_into_the_smaller_type_where_that_is_asked_for(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32, sym=False)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_1", pre="gpt-2")
    assert report.fidelity["bounded"] == 14
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    difference = float((ours[0] - ours[1]).abs().mean())
    assert 0 < difference < 0.02 * float(ours[0].std())


def test_codes_are_not_rounded_again_unless_asked(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32, bits=8)
    with pytest.raises(UsageError, match=r"Q4_0 would round GPTQ's codes again; what holds them: Q8_0 \(exact\)"):
        quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_0", pre="gpt-2")
    assert list(tmp_path.iterdir()) == [folder]
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_0", requantize=True, pre="gpt-2")
    assert report.fidelity["requantized"] == 14


def test_scattered_groups_have_no_exact_type(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32, act_order="dynamic")
    with pytest.raises(UsageError, match="no type holds its codes exactly"):
        quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")


def test_a_rounded_source_is_not_rounded_again(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Q4_1 would round it again \(Q4_0 in the source\)"):
        quantkit.ggml(tiny_gguf, tmp_path / "out.gguf", type="q4_1")


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_full_precision_is_rounded_once(type: Any, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama")
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type=type, pre="gpt-2")
    assert {t.type for t in report.tensors if t.name.startswith("blk.") and t.fidelity} == {type.upper()}
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    error = float((ours[0] - ours[1]).abs().mean() / ours[0].std())
    assert error < {"f32": 1e-5, "f16": 1e-3, "bf16": 0.03, "q8_0": 0.03}.get(type, 0.4)


def test_widths_that_no_block_divides_fall_back(make_model: MakeModel, recorder: Recorder, tmp_path: Path) -> None:
    folder = make_model("llama", intermediate_size=80)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_0", pre="gpt-2", progress=recorder)
    assert report.fallback == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert types_of(tmp_path / "out.gguf")["blk.0.ffn_down.weight"] == "F16"
    assert any("2 matrices have widths" in note for note in recorder.notes)


def test_embedding_and_output_have_types_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama")
    quantkit.ggml(folder, tmp_path / "out.gguf", embedding_type="q8_0", output_type="f32", pre="gpt-2")
    stored = types_of(tmp_path / "out.gguf")
    assert (stored["token_embd.weight"], stored["output.weight"]) == ("Q8_0", "F32")
    assert stored["blk.0.attn_q.weight"] == "F16"


def test_the_file_says_that_its_weights_come_from_gptq(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32)
    quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["quantkit.weights"].contents() == "GPTQ codes"
    assert str(tmp_path).encode() not in (tmp_path / "out.gguf").read_bytes()


def test_a_dry_run_writes_nothing_and_knows_the_size(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32)
    dry = quantkit.ggml(folder, tmp_path / "out.gguf", dry_run=True, pre="gpt-2")
    assert not (tmp_path / "out.gguf").exists()
    wet = quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert (dry.bytes, dry.tensors) == (wet.bytes, wet.tensors)
    assert wet.bytes == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors)


def test_an_existing_file_is_kept_without_force(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(UsageError, match="already exists; use --force"):
        quantkit.ggml(make_model("llama"), out, pre="gpt-2")
    assert out.read_text() == "mine"
    quantkit.ggml(make_model("llama"), out, pre="gpt-2", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "q9_0"}, "--type q9_0: choose auto, f32"),
        ({"type": "q4_k"}, "Q4_K is only written from GPTQ codes"),
        ({"split_max_size": "0GB"}, "0GB"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantkit.ggml(make_model("llama"), tmp_path / "out.gguf", pre="gpt-2", **options)
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_float16_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", dtype="float32"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: a value is beyond float16"):
        quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert not (tmp_path / "out.gguf").exists()


# -- ggjt ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads share nothing, with a SentencePiece vocabulary."""
    path = tmp_path_factory.mktemp("llama") / "tiny-llama-F32.gguf"
    write_model(path, tiny(), sentencepiece(LLAMA))
    return path


@pytest.mark.parametrize(("bits", "expected"), [(4, "Q4_0"), (8, "Q8_0"), (3, "Q4_0")])
def test_a_ggjt_file_holds_the_codes_too(
    bits: int, expected: str, sentencepiece_llama: Path, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder, out = tmp_path / "gptq", tmp_path / "out.ggjt.bin"
    tokens = TokenMatrix.of(tiny_tokens.tokens % open_source(sentencepiece_llama).config.vocab_size, "random")
    quantkit.gptq(sentencepiece_llama, folder, bits=bits, group_size=32, calibration=tokens, evaluate=False)
    report = quantkit.ggml(folder, out, container="ggjt")
    assert {t.type for t in report.tensors if t.fidelity == "exact"} == {expected}
    assert open_source(out).kind == "ggjt"
    for name in open_source(out).tensors:
        if "proj" in name:
            assert torch.equal(open_source(out).read(name), open_source(folder).read(name)), name


def test_ggjt_refuses_what_it_cannot_say(make_model: MakeModel, sentencepiece_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="heads share 2 keys and values"):
        quantkit.ggml(make_model("llama"), tmp_path / "out.bin", container="ggjt")
    with pytest.raises(UsageError, match="--split-max-size and --pre are for GGUF"):
        quantkit.ggml(sentencepiece_llama, tmp_path / "out.bin", container="ggjt", split_max_size="1GB")
    with pytest.raises(UsageError, match="BF16 has no place in this file"):
        quantkit.ggml(sentencepiece_llama, tmp_path / "out.bin", container="ggjt", type="bf16")
    assert not list(tmp_path.iterdir())
