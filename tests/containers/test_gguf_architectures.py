"""Every row of the table of GGUF architectures: a tiny model of it written, read back, and quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, random_model, token_matrix
from support.architectures import CONFIGS, PARTED, TIED
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward
from support.zoo import tiny
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.containers.gguf.architectures import ROWS, WRITABLE
from quantkit.containers.gguf.config import ArchitectureKeys, config_settings
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.order import Grouped, Rotary
from quantkit.errors import SourceError

# What a config says of its file, and what tests give every family.
_OF_FILE = ("dtype", "architectures", "transformers_version", "_sliding_window_pattern", "_name_or_path")
_ROUNDED = 2e-7  # norms with 1 added, and logarithms: what that rounds away in float32


def written(make_model: MakeModel, family: str, path: Path, **options: Any) -> Path:
    """A tiny model of a family as GGUF; returns its folder."""
    folder = make_model(family, tied=family in TIED, dtype="float32", **CONFIGS[family])
    kinds = dict.fromkeys(("type", "embedding_type", "output_type"), "f32")
    quantkit.ggml(folder, path, pre="gpt-2", **{**kinds, **options})
    return folder


def plain_config(source: Any) -> dict[str, Any]:
    config = source.config.to_dict()
    return {key: value for key, value in config.items() if key not in _OF_FILE}


def test_every_row_has_a_model() -> None:
    assert {row.model_type for row in ROWS} == set(CONFIGS)
    assert {kind for row in ROWS for kind in row.of or (row.model_type,)} == set(WRITABLE)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_read_back_is_the_model(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = written(make_model, family, tmp_path / "tiny.gguf")
    read, source = open_stream(tmp_path / "tiny.gguf"), open_stream(folder)
    assert {name: info.shape for name, info in read.weights.tensors.items()} == {
        name: info.shape for name, info in source.weights.tensors.items()
    }
    rounded = _ROUNDED if WRITABLE[family].norm_offset or WRITABLE[family].logarithms else 0
    for name in source.weights.tensors:
        values = source.weights.read(name)
        torch.testing.assert_close(read.weights.read(name), values, rtol=0, atol=rounded)
        torch.testing.assert_close(read.weights.read_rows(name, 1, 3), values[1:3], rtol=0, atol=rounded)
    ours, theirs = plain_config(read.source), plain_config(source.source)
    assert {key: value for key, value in theirs.items() if ours.get(key) != value and key != "head_dim"} == {}

    tokens = token_matrix(2, 32).tokens
    logits = streamed_logits(read, [tokens])[0]
    model = random_model(family, tied=family in TIED, dtype=torch.float32, seed=0, **CONFIGS[family])
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, **forward(expected))


@pytest.mark.parametrize("family", CONFIGS)
def test_names_are_those_of_gguf_py(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    row = WRITABLE[family]
    written(make_model, family, tmp_path / "tiny.gguf")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
    known = {gguf.TENSOR_NAMES[kind].format(bid=0) for kind in gguf.MODEL_TENSORS[arch]}
    file = GgufFile(tmp_path / "tiny.gguf")
    names = {
        re.sub(r"\.(weight|bias)$", "", name)
        for name in file.tensors
        if not name.startswith("blk.") or name.startswith("blk.0.")
    }
    assert names <= known
    assert file.keys["general.architecture"] == row.name


@pytest.mark.parametrize("family", CONFIGS)
def test_gptq_writes_it(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(family, tied=family in TIED, dtype="float32", **CONFIGS[family])
    quantkit.gptq(folder, tmp_path / "out", calibration=token_matrix(4, 32), ggml="q4_0", pre="gpt-2", evaluate=False)
    path = next((tmp_path / "out").glob("*.gguf"))
    read, source = open_stream(path), open_stream(folder)
    assert set(read.weights.tensors) == set(source.weights.tensors)
    coded = [name for name, info in read.weights.tensors.items() if info.stored_as == "Q4_0"]
    assert len(coded) >= 4 * source.source.config.num_hidden_layers
    for name in coded:
        values = source.weights.read(name)
        assert (read.weights.read(name) - values).norm() < 0.25 * values.norm(), name


@pytest.mark.parametrize("family", PARTED)
def test_a_tied_embedding_is_the_output_matrix_too(
    family: str, make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    folder = make_model(family, tied=True, dtype="float32", **CONFIGS[family])
    kinds = dict.fromkeys(("type", "embedding_type", "output_type"), "f32")
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", progress=recorder, **kinds)
    assert "output.weight too: llama.cpp loads no " in "".join(recorder.notes)
    file = GgufFile(tmp_path / "tiny.gguf")
    np.testing.assert_array_equal(file.values("output.weight"), file.values("token_embd.weight"))
    read, source = open_stream(tmp_path / "tiny.gguf"), open_stream(folder)
    assert not read.source.config.tie_word_embeddings
    assert not quantkit.verify(tmp_path / "tiny.gguf", generate=False).models[0].problems
    tokens = [token_matrix(2, 32).tokens]
    expected = streamed_logits(source, tokens)[0]
    torch.testing.assert_close(streamed_logits(read, tokens)[0], expected, **forward(expected))


def test_gptq_writes_a_tied_embedding_twice(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    folder = make_model("olmo2", tied=True, dtype="float32")
    options: dict[str, Any] = {"calibration": token_matrix(4, 32), "evaluate": False, "pre": "gpt-2"}
    quantkit.gptq(folder, tmp_path / "out", ggml="q4_0", output_type="q8_0", progress=recorder, **options)
    assert "output.weight too: llama.cpp loads no olmo2 " in "".join(recorder.notes)
    read = open_stream(next((tmp_path / "out").glob("*.gguf")))
    stored = {name: info.stored_as for name, info in read.weights.tensors.items()}
    assert (stored["lm_head.weight"], stored["model.embed_tokens.weight"]) == ("Q8_0", "Q4_0")
    quantkit.imatrix(folder, tmp_path / "tiny.imatrix.gguf", calibration=token_matrix(4, 32))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_oss", "granite", "lfm2_moe", "nemotron", "qwen2_moe"])
def test_blocks_go_from_file_to_file_as_they_are(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    written(make_model, family, tmp_path / "one.gguf", type="q8_0", embedding_type="q8_0", output_type="q8_0")
    quantkit.ggml(tmp_path / "one.gguf", tmp_path / "other.gguf", type="auto")
    one, other = GgufFile(tmp_path / "one.gguf"), GgufFile(tmp_path / "other.gguf")
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        assert (other.tensors[name].kind, other.tensors[name].shape) == (tensor.kind, tensor.shape)
        np.testing.assert_array_equal(other.blocks(name)[1], one.blocks(name)[1], err_msg=name)


def test_ends_of_the_yarn_ramp_of_gpt_oss_are_not_rounded(
    make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    sizes = {**CONFIGS["gpt_oss"], "rope_parameters": {**rope, "truncate": False}}
    folder = make_model("gpt_oss", dtype="float32", **sizes)
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", type="q8_0", progress=recorder)
    assert "llama.cpp rounds the ends of yarn's ramp" in "".join(recorder.warnings)
    read = open_stream(tmp_path / "tiny.gguf").source.config
    assert {key: read.rope_parameters[key] for key in sizes["rope_parameters"]} == sizes["rope_parameters"]
    tensors = GgufFile(tmp_path / "tiny.gguf").tensors
    assert {tensor.kind.name for name, tensor in tensors.items() if name.endswith(".bias")} == {"F32"}
    assert tensors["blk.0.ffn_up_exps.weight"].kind.name == "Q8_0"


@pytest.mark.parametrize(("multiplier", "width"), [(1.5, 128), (1.0, 96)])
def test_an_lfm2_is_read_with_the_width_that_its_class_makes(
    multiplier: float, width: int, make_model: MakeModel, tmp_path: Path
) -> None:
    said = {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": multiplier, "block_multiple_of": 32}
    folder = make_model("lfm2", dtype="float32", **{**CONFIGS["lfm2"], **said, "intermediate_size": 100})
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", type="f32")
    config = open_stream(tmp_path / "tiny.gguf").source.config
    assert (config.intermediate_size, config.block_auto_adjust_ff_dim) == (width, False)
    assert config.layer_types == CONFIGS["lfm2"]["layer_types"]


@pytest.mark.parametrize("heads", [[2, 0], [0, 0, 0], [0, 2, 1], 0])
def test_blocks_without_attention_are_counted(heads: Any, make_model: MakeModel, tmp_path: Path) -> None:
    written(make_model, "lfm2", tmp_path / "tiny.gguf")
    file = GgufFile(tmp_path / "tiny.gguf")
    said = {**file.keys, "lfm2.attention.head_count_kv": heads}
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    with pytest.raises(SourceError, match=r"head_count_kv is .*, which says nothing of 3 blocks"):
        config_settings(ArchitectureKeys(WRITABLE["lfm2"], said.get), shapes, file.values)


def test_a_glm_without_norms_of_heads_has_none_in_its_file(make_model: MakeModel, tmp_path: Path) -> None:
    sizes = {**CONFIGS["glm4_moe"], "use_qk_norm": False, "attention_bias": False, "first_k_dense_replace": 2}
    folder = make_model("glm4_moe", dtype="float32", **sizes)
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", type="f32")
    read = open_stream(tmp_path / "tiny.gguf")
    config = read.source.config
    assert (config.use_qk_norm, config.attention_bias, config.first_k_dense_replace) == (False, False, 2)
    assert set(read.weights.tensors) == set(open_stream(folder).weights.tensors)


@pytest.mark.parametrize(("key", "value"), [("nextn_predict_layers", 1), ("expert_gating_func", 1)])
def test_what_every_glm_file_says_is_not_read_otherwise(
    key: str, value: int, make_model: MakeModel, tmp_path: Path
) -> None:
    written(make_model, "glm4_moe", tmp_path / "tiny.gguf")
    file = GgufFile(tmp_path / "tiny.gguf")
    said, shapes = {**file.keys, f"glm4moe.{key}": value}, {name: own.shape for name, own in file.tensors.items()}
    with pytest.raises(SourceError, match=rf"glm4moe\.{key} is {value}; such models cannot be read"):
        config_settings(ArchitectureKeys(WRITABLE["glm4_moe"], said.get), shapes, file.values)


def test_a_granite_hybrid_without_experts(make_model: MakeModel, tmp_path: Path) -> None:
    own = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 64}
    folder = make_model("granitemoehybrid", dtype="float32", **{**CONFIGS["granitemoehybrid"], **own})
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", type="f32", embedding_type="f32", output_type="f32")
    read, source, tokens = open_stream(tmp_path / "tiny.gguf"), open_stream(folder), [token_matrix(2, 32).tokens]
    assert read.source.config.num_local_experts == 0
    assert set(read.weights.tensors) == set(source.weights.tensors)
    expected = streamed_logits(source, tokens)[0]
    torch.testing.assert_close(streamed_logits(read, tokens)[0], expected, **forward(expected))


@pytest.mark.parametrize("kind", ["7B", "11B", "40B"])
def test_falcons_of_every_kind(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    own = {
        "7B": {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None},
        "11B": {"num_ln_in_parallel_attn": 1},
        "40B": {},
    }[kind]
    folder = make_model("falcon", dtype="float32", **{**CONFIGS["falcon"], **own})
    quantkit.ggml(folder, tmp_path / "tiny.gguf", pre="gpt-2", type="f32", embedding_type="f32", output_type="f32")
    read, source, tokens = open_stream(tmp_path / "tiny.gguf"), open_stream(folder), [token_matrix(2, 32).tokens]
    assert set(read.weights.tensors) == set(source.weights.tensors)
    expected = streamed_logits(source, tokens)[0]
    torch.testing.assert_close(streamed_logits(read, tokens)[0], expected, **forward(expected))
    assert ("blk.0.attn_norm_2.weight" in GgufFile(tmp_path / "tiny.gguf").tensors) is (kind == "40B")


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "qwen3_vl", "qwen3_5", "llama4"])
def test_of_a_model_with_towers_the_text_is_written(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny(kind)
    if kind == "gemma3":
        model.config.text_config.query_pre_attn_scalar = 16
        for layer in model.model.language_model.layers:
            layer.self_attn.scaling = 16**-0.5
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quantkit.ggml(
        tmp_path / "model", tmp_path / "tiny.gguf", pre="gpt-2", type="f32", embedding_type="f32", output_type="f32"
    )
    tokens = token_matrix(2, 32).tokens
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    read = open_stream(tmp_path / "tiny.gguf")
    assert read.source.config.get_text_config() is read.source.config
    torch.testing.assert_close(streamed_logits(read, [tokens])[0], expected, **forward(expected))


def test_the_matrix_of_latent_keys_and_values_lies_in_two(make_model: MakeModel, tmp_path: Path) -> None:
    folder = written(make_model, "deepseek_v3", tmp_path / "one.gguf", type="q8_0")
    file, name = GgufFile(tmp_path / "one.gguf"), "model.layers.1.self_attn.kv_b_proj.weight"
    assert file.tensors["blk.1.attn_k_b.weight"].shape == (4, 32, 16)
    assert file.tensors["blk.1.attn_v_b.weight"].shape == (4, 24, 32)
    read, values = open_stream(tmp_path / "one.gguf").weights.read(name), open_stream(folder).weights.read(name)
    assert 0 < float((read - values).abs().max()) < 0.02
    quantkit.ggml(tmp_path / "one.gguf", tmp_path / "other.gguf", type="auto")
    again = open_stream(tmp_path / "other.gguf").weights.read(name)
    torch.testing.assert_close(again, read, rtol=1e-3, atol=1e-6)  # float16


def test_an_importance_matrix_has_latent_values_for_every_head(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("deepseek_v3", dtype="float32", **CONFIGS["deepseek_v3"])
    quantkit.imatrix(folder, tmp_path / "tiny.imatrix.gguf", calibration=token_matrix(4, 32))
    sums = GgufFile(tmp_path / "tiny.imatrix.gguf").values("blk.0.attn_v_b.weight.in_sum2")
    assert sums.shape == (4, 32)
    assert bool((sums == sums[0]).all())
    assert bool((sums > 0).all())
    imatrix = tmp_path / "tiny.imatrix.gguf"
    quantkit.ggml(folder, tmp_path / "tiny.gguf", type="q4_0", imatrix=imatrix, pre="gpt-2")
    assert GgufFile(tmp_path / "tiny.gguf").tensors["blk.0.attn_v_b.weight"].kind.name == "Q4_0"


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_mixed_rows_of_a_delta_net_are_quantized_together(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(family, dtype="float32", **CONFIGS[family])
    options: dict[str, Any] = {"calibration": token_matrix(4, 32), "evaluate": False, "pre": "gpt-2"}
    quantkit.gptq(folder, tmp_path / "out", ggml="q4_0", **options)
    path = next((tmp_path / "out").glob("*.gguf"))
    kinds = {name: tensor.kind.name for name, tensor in GgufFile(path).tensors.items()}
    assert (kinds["blk.0.attn_qkv.weight"], kinds["blk.0.attn_gate.weight"]) == ("Q4_0", "Q4_0")
    assert kinds["blk.0.ssm_conv1d.weight"] == "F32"


def test_a_mixtral_is_not_told_to_be_a_llama(make_model: MakeModel, tmp_path: Path) -> None:
    for family in ("mixtral", "llama"):
        written(make_model, family, tmp_path / f"{family}.gguf")
        loads = quantkit.verify(tmp_path / f"{family}.gguf", generate=False).models[0].loads
        why = next(load.why for load in loads if load.program == "transformers")
        assert ("for a model without experts" in why) is (family == "mixtral")


@pytest.mark.parametrize(("groups", "queries"), [(4, 1), (2, 3), (1, 5)])
def test_fused_heads_are_parted_and_put_together(groups: int, queries: int) -> None:
    rows = np.arange(groups * (queries + 2) * 4 * 3).reshape(-1, 3)
    order = Grouped(groups, queries)
    parted = order.apply(rows)
    heads = rows.reshape(groups, queries + 2, 4, 3)
    np.testing.assert_array_equal(parted[: groups * queries * 4], heads[:, :queries].reshape(-1, 3))
    np.testing.assert_array_equal(parted[-groups * 4 :], heads[:, -1].reshape(-1, 3))
    np.testing.assert_array_equal(order.undo(parted), rows)
    np.testing.assert_array_equal(Rotary(groups).undo(Rotary(groups).apply(rows)), rows)
