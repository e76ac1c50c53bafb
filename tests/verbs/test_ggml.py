"""`quantkit ggml`: GPTQ codes in llama.cpp's files as they are, and models that were never quantized."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from safetensors.torch import load_file, save_file
from support.ggjt_models import LLAMA, tiny
from support.gguf_models import WIDE, sentencepiece, types_of, write_model
from support.imatrix_files import random_imatrix
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward

import quantkit
from quantkit.codes import libggml
from quantkit.containers.ggjt.read import GgjtSource
from quantkit.containers.gguf import types as ggml_types
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.read import GgufSource
from quantkit.containers.gguf.types import Kind
from quantkit.containers.gptq.read import GptqSource
from quantkit.containers.imatrix import read_imatrix
from quantkit.errors import (
    MissingPackageError,
    NumericError,
    QuantkitError,
    SourceError,
    UsageError,
)
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

IDS = token_matrix(2, 24, seed=5).tokens


def quantized(make_model: MakeModel, tokens: TokenMatrix, out: Path, family: str = "llama", **options: Any) -> Path:
    config = options.pop("config", WIDE)
    folder = make_model(family, **config)
    quantkit.gptq(folder, out, calibration=tokens, evaluate=False, device="cpu", **options)
    return out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"group_size": size}, "Q4_0") for size in (32, 64, 128, 256, -1)),
        *(({"group_size": size, "bits": 8}, "Q8_0") for size in (32, -1)),
        *(({"group_size": size, "sym": False}, "Q4_K") for size in (256, -1)),
        ({"group_size": 64, "bits": 3}, "Q4_0"),
        *(({"group_size": size, "bits": 2}, "Q2_0") for size in (64, 128, -1)),
        ({"group_size": 32, "bits": 2}, "Q4_0"),
        ({"group_size": 256, "bits": 2, "sym": False}, "Q2_K"),
        ({"group_size": 32, "sym": False}, "Q5_0"),
    ],
    ids=str,
)
def test_the_files_weights_are_the_checkpoints_to_the_bit(
    options: dict[str, Any], expected: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Judged by gguf's own dequantizer (Q2_0 by ours), rows of Q and K put back from llama.cpp's order."""
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", **options)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert report.fidelity["exact"] == 14
    assert {t.type for t in report.tensors if t.fidelity == "exact"} == {expected}
    checkpoint = open_source(folder)
    assert isinstance(checkpoint, GptqSource)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    names |= {"attn_v": "self_attn.v_proj"} | {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    seen = 0
    file = GgufFile(tmp_path / "out.gguf")
    for name in file.tensors:
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in names:
            values = file.values(name)
            heads = {"attn_q": 4, "attn_k": 2}.get(part)
            if heads:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            module = f"model.layers.{name.split('.')[1]}.{names[part]}"
            assert np.array_equal(values, checkpoint.read_codes(module).dequantize().numpy()), name
            seen += 1
    assert seen == 14
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    torch.testing.assert_close(ours[0], ours[1], **forward(ours[1]))


def test_q2_0_is_read_by_every_verb(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    """2-bit codes of a GPTQ folder, and what comes back of the file: the same numbers as of the folder."""
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=64, bits=2)
    file = tmp_path / "q2_0.gguf"
    quantkit.ggml(folder, file, pre="gpt-2")
    back = [quantkit.convert(path, tmp_path / f"back{i}", dtype="float32").out for i, path in enumerate((folder, file))]
    one, other = (load_file(path / "model.safetensors") for path in back)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if "norm" not in name)
    assert any("Q2_0" in line for line in map(str, quantkit.inspect(file).lines()))
    assert all("perplexity" in problem for problem in quantkit.verify(file).problems)  # random weights: that alone
    answers = {found.program: found for found in quantkit.verify(file).models[0].loads}
    assert answers["llama.cpp"].ok
    assert "the gguf package, by which it reads, does not know Q2_0" in answers["transformers"].why
    copied = quantkit.ggml(file, tmp_path / "copy.gguf", output_type="f16")
    assert copied.fidelity == {"exact": 16}
    (tmp_path / "text.txt").write_text("words of a text, and more of them " * 40)
    quantkit.compare(folder, [file], tmp_path / "c", texts=[str(tmp_path / "text.txt")], eval_tokens=64, seq_len=16)
    _, variant = json.loads((tmp_path / "c" / "report.json").read_text())["models"]
    assert variant["texts"]["text.txt"]["kl_divergence"]["mean"] < 1e-6


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
    torch.testing.assert_close(ours[0], ours[1], **forward(ours[1]))


def test_bits_may_differ_between_modules(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    override = {"*.down_proj": {"bits": 8}}
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32, override=override)
    quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    stored = types_of(tmp_path / "out.gguf")
    assert (stored["blk.1.ffn_down.weight"], stored["blk.1.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    ours = [streamed_logits(open_stream(path), [IDS])[0] for path in (folder, tmp_path / "out.gguf")]
    torch.testing.assert_close(ours[0], ours[1], **forward(ours[1]))


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
    """128 columns are four blocks of 32 and half a one of 256; 80 are no whole number of either."""
    folder = make_model("llama", hidden_size=128, intermediate_size=80)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_0", pre="gpt-2", progress=recorder)
    downs = {f"blk.{block}.ffn_down.weight": "F16" for block in range(2)}
    assert report.fallback == {**downs, "output.weight": "Q8_0"}  # Q6_K elsewhere
    assert {name: types_of(tmp_path / "out.gguf")[name] for name in report.fallback} == report.fallback
    assert any("3 matrices are no whole number of blocks wide" in n and "2 F16, 1 Q8_0" in n for n in recorder.notes)


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
    with pytest.raises(UsageError, match="already exists; use force=True"):
        quantkit.ggml(make_model("llama"), out, pre="gpt-2")
    assert out.read_text() == "mine"
    quantkit.ggml(make_model("llama"), out, pre="gpt-2", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "q9_0"}, "type=q9_0: choose auto, f32"),
        ({"embedding_type": "q4_k_m"}, "embedding_type=q4_k_m: choose auto, f32"),
        ({"pure": True}, "pure=True and imatrix go with a type"),
        ({"type": "iq2_xs"}, r"blk\.0\.attn_q\.weight: IQ2_XS needs an importance matrix; imatrix names one"),
        ({"type": "q2_k_s"}, r"blk\.0\.attn_q\.weight: Q2_K needs an importance matrix"),
        ({"type": "f16", "imatrix": "none.gguf"}, r"none\.gguf: no such file"),
        ({"split_max_size": "0GB"}, "0GB"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        quantkit.ggml(make_model("llama", **WIDE), tmp_path / "out.gguf", pre="gpt-2", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "embedding"), [({}, "F16"), ({"embedding_type": "q5_0"}, "Q5_0")])
def test_the_ends_of_a_checkpoint_keep_their_precision(
    options: dict[str, Any], embedding: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32)
    quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_0", pre="gpt-2", **options)
    stored = types_of(tmp_path / "out.gguf")
    assert (stored["token_embd.weight"], stored["output.weight"]) == (embedding, "F16")
    quantkit.ggml(folder, tmp_path / "pure.gguf", type="q4_0", pure=True, pre="gpt-2")
    assert types_of(tmp_path / "pure.gguf")["output.weight"] == "Q4_0"


def test_codes_in_one_type_are_not_called_a_mixture(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=256, sym=False)
    quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_k_m", pre="gpt-2")
    stored = types_of(tmp_path / "out.gguf")
    assert {kind for name, kind in stored.items() if name.startswith("blk.") and "norm" not in name} == {"Q4_K"}
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S


def test_a_recipe_takes_over_what_is_rounded_again(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = quantized(make_model, tiny_tokens, tmp_path / "gptq", group_size=32)
    report = quantkit.ggml(folder, tmp_path / "out.gguf", type="q3_k_m", requantize=True, pre="gpt-2")
    assert types_of(tmp_path / "out.gguf")["blk.1.attn_v.weight"] == "Q5_K"
    assert report.fidelity["requantized"] == 14


# -- blocks as they are ----------------------------------------------------------------------------------------------


def same_blocks(first: Path, second: Path) -> None:
    """Both files hold the same bytes of every matrix, by their readers' published names."""
    ours, theirs = open_source(first), open_source(second)
    assert isinstance(ours, GgufSource | GgjtSource)
    assert isinstance(theirs, GgufSource | GgjtSource)
    for name, info in ours.tensors.items():
        if len(info.shape) == 2:
            assert ours.blocks(name)[0] == theirs.blocks(name)[0], name
            assert np.array_equal(ours.blocks(name)[1], theirs.blocks(name)[1]), name


@pytest.mark.parametrize("type", ["q5_0", "q4_k_m", "iq4_xs", "q8_0"])
def test_a_gguf_file_is_copied_with_its_types(type: Any, make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.ggml(make_model("llama", **WIDE), tmp_path / "first.gguf", type=type, pre="gpt-2")
    report = quantkit.ggml(tmp_path / "first.gguf", tmp_path / "second.gguf")
    assert set(report.fidelity) == {"exact"}
    same_blocks(tmp_path / "first.gguf", tmp_path / "second.gguf")
    first, second = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("first", "second"))
    assert second.fields["general.file_type"].contents() == first.fields["general.file_type"].contents()
    assert "quantkit.weights" not in second.fields


def test_a_gguf_file_in_its_own_type_is_not_rounded_again(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", **WIDE)
    quantkit.ggml(folder, tmp_path / "first.gguf", type="q4_k_m", output_type="f16", pre="gpt-2")
    report = quantkit.ggml(tmp_path / "first.gguf", tmp_path / "second.gguf", type="q4_k_m")
    assert report.fidelity == {"exact": 15, "rounded": 1}  # the output, as Q6_K for the first time
    with pytest.raises(UsageError, match=r"would round it again \(Q4_K in the source\)"):
        quantkit.ggml(tmp_path / "first.gguf", tmp_path / "third.gguf", type="q5_k_m")
    assert not (tmp_path / "third.gguf").exists()


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "f32"])
def test_between_gguf_and_ggjt_nothing_is_lost(type: Any, sentencepiece_llama: Path, tmp_path: Path) -> None:
    quantkit.ggml(sentencepiece_llama, tmp_path / "first.gguf", type=type, pure=True)
    report = quantkit.ggml(tmp_path / "first.gguf", tmp_path / "second.bin", container="ggjt")
    assert set(report.fidelity) == {"exact"}
    same_blocks(tmp_path / "first.gguf", tmp_path / "second.bin")
    quantkit.ggml(tmp_path / "second.bin", tmp_path / "third.gguf")
    same_blocks(tmp_path / "first.gguf", tmp_path / "third.gguf")


def test_a_type_that_ggjt_has_not_is_refused(sentencepiece_llama: Path, tmp_path: Path) -> None:
    quantkit.ggml(sentencepiece_llama, tmp_path / "first.gguf", type="iq4_nl", pure=True)
    with pytest.raises(UsageError, match="IQ4_NL has no place in this file"):
        quantkit.ggml(tmp_path / "first.gguf", tmp_path / "second.bin", container="ggjt")
    assert not (tmp_path / "second.bin").exists()


# -- importance ------------------------------------------------------------------------------------------------------


def test_an_importance_matrix_decides_and_is_named_without_its_path(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", **WIDE)
    quantkit.ggml(folder, tmp_path / "plain.gguf", type="q4_k_s", pre="gpt-2")
    matrix = random_imatrix(tmp_path / "matrix.gguf", tmp_path / "plain.gguf")
    quantkit.ggml(folder, tmp_path / "weighed.gguf", type="q4_k_s", pre="gpt-2", imatrix=matrix)
    plain, weighed = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    other = {tensor.name: tensor.data.tobytes() for tensor in plain.tensors}
    changed = {tensor.name for tensor in weighed.tensors if tensor.data.tobytes() != other[tensor.name]}
    assert changed == {name for name in other if name.startswith("blk.") and "norm" not in name}
    keys = {key: field.contents() for key, field in weighed.fields.items() if key.startswith("quantize.")}
    assert keys == {
        "quantize.imatrix.file": "matrix.gguf",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 3,
    }


def test_an_importance_matrix_of_another_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.ggml(make_model("llama", **WIDE), tmp_path / "wide.gguf", pre="gpt-2")
    matrix = random_imatrix(tmp_path / "matrix.gguf", tmp_path / "wide.gguf")
    with pytest.raises(SourceError, match=r"256 values for blk\.0\.attn_q\.weight"):
        quantkit.ggml(make_model("llama"), tmp_path / "out.gguf", type="q4_0", imatrix=matrix, pre="gpt-2")
    assert not (tmp_path / "out.gguf").exists()


def test_a_matrix_that_an_importance_matrix_lacks_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", **WIDE)
    quantkit.ggml(folder, tmp_path / "plain.gguf", pre="gpt-2")
    matrix = random_imatrix(tmp_path / "matrix.gguf", tmp_path / "plain.gguf", leave_out="blk.1.attn_k.weight")
    with pytest.raises(UsageError, match=r"blk\.1\.attn_k\.weight: IQ2_XS needs .*; matrix\.gguf has nothing for it"):
        quantkit.ggml(folder, tmp_path / "out.gguf", type="iq2_xs", imatrix=matrix, pre="gpt-2")


def test_every_expert_has_its_own_importance(make_model: MakeModel, tmp_path: Path) -> None:
    """A stack is what its experts are alone with their rows of the matrix."""
    config = {"mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 64}
    folder = make_model("qwen3_moe", **config)
    quantkit.ggml(folder, tmp_path / "f32.gguf", type="f32", pre="gpt-2")
    matrix = random_imatrix(tmp_path / "matrix.gguf", tmp_path / "f32.gguf")
    quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_1", imatrix=matrix, pre="gpt-2")
    name = "blk.1.ffn_down_exps.weight"
    stacks = [
        next(tensor.data for tensor in gguf.GGUFReader(tmp_path / f"{file}.gguf").tensors if tensor.name == name)
        for file in ("f32", "out")
    ]
    weights = read_imatrix(matrix).importance(name)
    assert weights is not None
    for expert, values, blocks in zip(weights, *stacks, strict=True):
        assert np.array_equal(libggml.round_to_blocks(np.array(values), Kind.Q4_1, expert), blocks)


def test_what_only_ggml_rounds_to_needs_its_package(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of 32 need nothing, and are the same either way."""
    folder = make_model("llama", **WIDE)
    quantkit.ggml(folder, tmp_path / "with.gguf", type="q5_1", pure=True, pre="gpt-2")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libggml" else find_spec(name))
    quantkit.ggml(folder, tmp_path / "without.gguf", type="q5_1", pure=True, pre="gpt-2")
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()
    with pytest.raises(
        MissingPackageError, match=r"to Q4_K needs the package libggml-python: pip install 'quantkit\[g"
    ):
        quantkit.ggml(folder, tmp_path / "out.gguf", type="q4_k_m", pre="gpt-2")
    assert not (tmp_path / "out.gguf").exists()


def test_tiles_of_rows_make_the_same_file(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama", **WIDE)
    for name, size in (("whole", 1 << 22), ("tiles", 1000)):
        monkeypatch.setattr(ggml_types, "_VALUES_A_TILE", size)
        quantkit.ggml(folder, tmp_path / f"{name}.gguf", type="q4_k_m", embedding_type="f16", pre="gpt-2")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "tiles.gguf").read_bytes()


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
    with pytest.raises(UsageError, match="split_max_size and pre are for GGUF"):
        quantkit.ggml(sentencepiece_llama, tmp_path / "out.bin", container="ggjt", split_max_size="1GB")
    with pytest.raises(UsageError, match="BF16 has no place in this file"):
        quantkit.ggml(sentencepiece_llama, tmp_path / "out.bin", container="ggjt", type="bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_codes_with_a_scale_that_is_no_number_go_nowhere(
    value: float, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    model = quantized(make_model, tiny_tokens, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.scales"
    tensors[name][0, 3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for make in (partial(quantkit.ggml, pre="gpt-2"), quantkit.convert):
        with pytest.raises(QuantkitError, match=rf"{name} hold NaN or infinity; the model's files are damaged"):
            make(model, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_blocks_with_a_scale_that_is_no_number_are_not_copied(make_model: MakeModel, tmp_path: Path) -> None:
    first = tmp_path / "first.gguf"
    quantkit.ggml(make_model("llama"), type="q8_0", pre="gpt-2", out=first)
    tensor = GgufFile(first).tensors["blk.0.ffn_down.weight"]
    with first.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(NumericError, match=r"layers\.0\.mlp\.down_proj\.weight holds NaN or infinity"):
        quantkit.ggml(first, type="q8_0", out=tmp_path / "second.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["first.gguf"]


def test_what_float16_makes_zeros_of_is_said(make_model: MakeModel, recorder: Recorder, tmp_path: Path) -> None:
    model = shutil.copytree(make_model("llama", dtype="float32"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e-9
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for number, (make, options, loses) in enumerate(
        [
            (quantkit.convert, {}, True),
            (quantkit.convert, {"dtype": "bfloat16"}, False),
            (quantkit.ggml, {"type": "f16", "pre": "gpt-2"}, True),
            (quantkit.ggml, {"type": "q8_0", "pre": "gpt-2"}, True),
            (quantkit.ggml, {"type": "f32", "pre": "gpt-2"}, False),
            (quantkit.gptq, {"calibration": token_matrix(2, 16), "evaluate": False, "device": "cpu"}, True),
        ]
    ):
        recorder.warnings.clear()
        make(model, out=tmp_path / str(number), progress=recorder, **options)
        said = [
            text for text in recorder.warnings if "makes zeros of 100 % of the values of model.embed_tokens" in text
        ]
        assert len(said) == loses, (make, options)
        assert all("bfloat16" in text or "bf16" in text for text in said)


def test_an_importance_matrix_of_another_model(
    make_model: MakeModel, tiny_gguf: Path, tmp_path: Path, recorder: Recorder
) -> None:
    part = random_imatrix(tmp_path / "part.gguf", tiny_gguf, leave_out="blk.1.attn_k.weight")
    asked: dict[str, Any] = {"type": "q4_0", "pre": "gpt-2", "progress": recorder}
    quantkit.ggml(make_model("llama"), tmp_path / "part-Q4_0.gguf", imatrix=part, **asked)
    said = "part.gguf has no entry for 1 of 14 matrices, such as blk.1.attn_k.weight: these are rounded without it"
    assert said in recorder.warnings
    other = read_imatrix(part).entries
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    for name, values in other.items():
        writer.add_tensor(f"{name.replace('attn_', 'other_').replace('ffn_', 'other_')}.in_sum2", values)
        writer.add_tensor(f"{name.replace('attn_', 'other_').replace('ffn_', 'other_')}.counts", values[:, :1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"none of its \d+ entries is for a matrix of this model, as blk\.0\."):
        quantkit.ggml(make_model("llama"), tmp_path / "out.gguf", imatrix=tmp_path / "other.gguf", **asked)
    assert not (tmp_path / "out.gguf").exists()
    quantkit.ggml(make_model("llama"), tmp_path / "f16.gguf", imatrix=part, **asked | {"type": "f16"})
    assert "part.gguf counts for nothing: no matrix that it has an entry for is rounded to blocks" in recorder.warnings
    assert not [key for key in open_source(tmp_path / "f16.gguf").metadata if "imatrix" in key]
