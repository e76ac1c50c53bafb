"""GGUF files that quantkit writes: against an independent writer, through two readers, and in llama.cpp."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, SPECIAL, VOCABULARY, MakeModel, Recorder, random_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import towers
from support.few_files import few_files
from support.gguf_models import byte_level, sentencepiece, write_model
from support.llamacpp import floored, llama_logprobs, mean_kl, scored_rows
from support.smollm2 import smollm2_gguf
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.containers.gguf import (
    GgufTensor,
    GgufWriter,
    architecture_of,
    file_keys,
    limits,
    packed_bytes,
    plan,
)
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.order import in_rotary_order
from quantkit.containers.gguf.pretokenizers import BY_IDS, NAMES
from quantkit.containers.gguf.vocabulary import read_pieces
from quantkit.containers.source import Source
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.runs.outputs import Staging, staged_files
from quantkit.sources import open_source

Kind = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
SENTENCEPIECE = json.loads(
    (Path(__file__).parents[1] / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8")
)
TEXT = "the quick brown fox jumps over the lazy dog, and where does the answer to the question begin? " * 12
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "long_factor": [1.0, 1.5, 2.25, 3.0, 4.0, 4.5, 5.0, 6.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
SIX = {"num_hidden_layers": 6, "layer_types": None}
EXPERTS = {"norm_topk_prob": True, "mlp_only_layers": []}
# name -> family, config, tied. Widths are multiples of 32, so that every matrix can be Q8_0.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {"head_dim": 32, "rms_norm_eps": 1e-5}, False),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, True),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, False),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}, False),
    "mistral": ("mistral", {"sliding_window": None}, False),
    "qwen2": ("qwen2", {}, True),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}, False),
    "qwen3": ("qwen3", {"head_dim": 32}, False),
    "gemma2": ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}, True),
    "gemma3": ("gemma3_text", {"sliding_window": 8, **SIX}, False),
    "gemma3-tied": ("gemma3_text", {"sliding_window": 8, "final_logit_softcapping": 5.0, **SIX}, True),
    "phi3": ("phi3", {"sliding_window": 8, "original_max_position_embeddings": 256}, False),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None},
        False,
    ),
}


def publish(
    source: Source,
    path: Path,
    kind: Kind = Kind.F32,
    split_max_bytes: int = 0,
    tensors: Sequence[GgufTensor] | None = None,
    **options: Any,
) -> list[Path]:
    """Write a model with all its matrices as `kind`, in the reverse of the file's order."""
    weights = ModelStream(source, CPU, torch.float32).weights
    planned = plan(source, weights) if tensors is None else tensors
    typed = [(tensor, Kind.F32 if tensor.always_f32 else kind) for tensor in planned]
    options.setdefault("pre", "qwen2")
    keys = file_keys(source, gguf.LlamaFileType.ALL_F32, **options)
    with (
        staged_files(path, force=True) as staging,
        GgufWriter(staging / path.name, architecture_of(source), keys, typed, split_max_bytes) as writer,
    ):
        for tensor, stored in reversed(typed):
            for name in tensor.sources:
                writer.write(name, gguf.quants.quantize(tensor.values(weights.read(name)), stored))
        writer.finish()
        return [path.with_name(part.name) for part in writer.paths]


def tiny(make_model: MakeModel, case: str) -> Source:
    family, config, tied = CASES[case]
    return open_source(make_model(family, tied=tied, dtype="float32", **config))


def plain_config(source: Source) -> dict[str, Any]:
    """What a config says of the model, not of its file."""
    config = source.config.to_dict()
    for key in ("dtype", "architectures", "transformers_version", "_sliding_window_pattern", "_name_or_path"):
        config.pop(key, None)
    return config


# -- weights and keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_one_of_an_independent_writer(
    case: str, kind: Kind, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    family, config, tied = CASES[case]
    publish(tiny(make_model, case), tmp_path / "ours.gguf", kind)
    model = random_model(family, tied=tied, dtype=torch.float32, seed=0, **config)
    write_model(tmp_path / "theirs.gguf", model, byte_level(tokenizer, "qwen2"), kind=kind)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].shape, ours.tensors[name].kind) == (tensor.shape, tensor.kind), name
        np.testing.assert_array_equal(ours.values(name), theirs.values(name), err_msg=name)
    left_out = {key for key in theirs.keys if key not in ours.keys} - {"general.name"}
    assert not left_out
    for key in set(theirs.keys) - {"general.name"}:
        assert ours.keys[key] == theirs.keys[key], key


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_back_is_the_model(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    source = tiny(make_model, case)
    publish(source, tmp_path / "tiny.gguf")
    read = open_source(tmp_path / "tiny.gguf")
    assert set(read.tensors) == set(source.tensors)
    for name in source.tensors:
        # Gemma's norms are stored with 1 added: what that rounds away in float32 is all that may differ.
        torch.testing.assert_close(read.read(name), source.read(name), rtol=0, atol=2e-7)
    ours, theirs = plain_config(read), plain_config(source)
    if case == "mistral":  # without a window it is a Llama to every reader of GGUF
        ours, theirs = ({k: v for k, v in c.items() if k in ("hidden_size", "rope_parameters")} for c in (ours, theirs))
    if case.startswith(("phi3", "qwen2")):
        theirs.pop("head_dim")  # the tests' own; these configs have none
    assert ours == theirs
    for text in ("the sea, 2024:\n\n  begin?", "<|im_start|>user\nhello <|im_end|>", ""):
        assert read.tokenizer()(text).input_ids == source.tokenizer()(text).input_ids
    assert read.tokenizer().chat_template == CHAT_TEMPLATE


def test_a_mistrals_window_is_in_the_file(make_model: MakeModel, tmp_path: Path) -> None:
    publish(open_source(make_model("mistral", dtype="float32", sliding_window=16)), tmp_path / "tiny.gguf")
    config = open_source(tmp_path / "tiny.gguf").config
    assert (config.model_type, config.sliding_window) == ("mistral", 16)


@pytest.mark.parametrize(("family", "said"), [("mistral", 1), ("phi3", 1), ("llama", 0), ("gemma3_text", 0)])
def test_a_window_that_llama_cpp_does_not_see_is_said(family: str, said: int, make_model: MakeModel) -> None:
    notes = limits(open_source(make_model(family, dtype="float32", sliding_window=16)))
    assert len(notes) == said
    assert all("llama.cpp lets every token see all before it, this model the last 16" in note for note in notes)


def test_gemmas_other_window_patterns_are_in_the_file(make_model: MakeModel, tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    for family in ("gemma2", "gemma3_text"):
        folder = make_model(family, tied=True, dtype="float32", num_hidden_layers=3, layer_types=types)
        publish(open_source(folder), tmp_path / f"{family}.gguf")
        assert open_source(tmp_path / f"{family}.gguf").config.layer_types == types


def test_experts_are_stacked_in_their_order(make_model: MakeModel, tmp_path: Path) -> None:
    source = open_source(make_model("qwen3_moe", dtype="float32", num_experts=12, **EXPERTS))
    publish(source, tmp_path / "tiny.gguf", Kind.Q8_0)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = ModelStream(source, CPU, torch.float32).weights
    for block in range(2):
        assert found[f"blk.{block}.ffn_gate_inp.weight"].tensor_type == Kind.F32
        for name in ("gate", "up", "down"):
            stack = found[f"blk.{block}.ffn_{name}_exps.weight"]
            assert list(stack.shape) == ([32, 64, 12] if name == "down" else [64, 32, 12])
            for expert in range(12):
                own = weights.read(f"model.layers.{block}.mlp.experts.{expert}.{name}_proj.weight").numpy()
                np.testing.assert_array_equal(stack.data[expert], gguf.quants.quantize(own, Kind.Q8_0))
    keys = {name: reader.fields[f"qwen3moe.{name}"].contents() for name in ("expert_count", "expert_used_count")}
    assert keys == {"expert_count": 12, "expert_used_count": 2}
    assert reader.fields["qwen3moe.expert_feed_forward_length"].contents() == 32


@given(heads=st.sampled_from([1, 2, 3, 8]), half=st.integers(1, 9))
def test_the_row_order_is_llama_cpps_permutation(heads: int, half: int) -> None:
    values = np.random.default_rng(0).normal(size=(heads * half * 2, 3))
    order = [head * 2 * half + i % 2 * half + i // 2 for head in range(heads) for i in range(2 * half)]
    np.testing.assert_array_equal(in_rotary_order(values, heads), values[order])


def test_provenance_and_origin_are_in_the_file(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama", dtype="float32"), tmp_path / "model")
    card = "---\nlicense: apache-2.0\nbase_model:\n- some-one/Base-1\n- ./a/local/path\n---\n# A model\n"
    (folder / "README.md").write_text(card)
    provenance = {"quantkit.quantized_by": "GPTQ", "quantkit.bits": 4, "quantkit.damp": 0.5, "quantkit.sym": True}
    publish(open_source(folder), tmp_path / "tiny.gguf", name="A name", provenance=provenance)
    keys = GgufFile(tmp_path / "tiny.gguf").keys
    assert {key: keys[key] for key in provenance} == provenance
    general = {key: value for key, value in keys.items() if key.startswith("general.")}
    assert general == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "A name",
        "general.size_label": "103K",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Base-1",
        "general.base_model.0.organization": "some-one",
        "general.base_model.0.repo_url": "https://huggingface.co/some-one/Base-1",
        "general.file_type": 0,
        "general.quantization_version": 2,
    }
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    publish(open_source(folder), tmp_path / "broken.gguf")
    assert "general.license" not in GgufFile(tmp_path / "broken.gguf").keys


@pytest.mark.e2e
def test_smollm2s_keys_are_those_of_its_own_file(tmp_path: Path) -> None:
    original = open_source(smollm2_gguf())
    folder = tmp_path / "SmolLM2"
    folder.mkdir()
    original.copy_companions(folder)
    (folder / "config.json").write_text(json.dumps(original.config_dict()))
    save_file({"model.norm.weight": torch.ones(1)}, folder / "model.safetensors")
    stored = GgufFile(smollm2_gguf()).keys
    told_by_the_file = {key for key in stored if key.startswith("general.") and key != "general.type"}
    for source in (open_source(folder), original):
        keys = file_keys(source, gguf.LlamaFileType(stored["general.file_type"]))
        shared = {key for key in stored if key in keys} - {"general.name"}
        left_out = set(stored) - set(keys)
        # The architecture is the writer's to add, what a model is called in parts is known to its own card only.
        assert left_out <= {"general.architecture", "general.size_label", *told_by_the_file}
        for key in shared:
            exact = np.float32(keys[key]) if isinstance(stored[key], float) else keys[key]
            assert exact == stored[key], key


# -- tokenizers ---------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, make_model: MakeModel, tokenizer: Any, **config: Any) -> Path:
    """A tiny Llama's folder with a tokenizer of any size."""
    shutil.copytree(make_model("llama", dtype="float32"), folder, ignore=shutil.ignore_patterns("*token*", "*jinja"))
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "vocab_size": len(tokenizer), **config}))
    return folder


def of_fixture(vocabulary: dict[str, Any], tmp_path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer.json form of a SentencePiece vocabulary, by quantkit's reader."""
    model = random_model("llama", tied=True, dtype=torch.float32, seed=0)
    model.resize_token_embeddings(len(vocabulary["tokens"]), mean_resizing=False)
    write_model(tmp_path / "fixture.gguf", model, sentencepiece(vocabulary))
    tokenizer: Any = open_source(tmp_path / "fixture.gguf").tokenizer()
    return tokenizer


def model_file(vocabulary: dict[str, Any], kind: int = 2) -> bytes:
    """A tokenizer.model: protobuf's length-delimited fields, each piece with text, score and type."""

    def field(number: int, content: bytes) -> bytes:
        size, low = b"", len(content)
        while low > 127:
            size, low = size + bytes([low & 127 | 128]), low >> 7
        return bytes([number << 3 | 2]) + size + bytes([low]) + content

    pieces = b"".join(
        field(1, field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([type_]))
        for token, score, type_ in zip(*(vocabulary[key] for key in ("tokens", "scores", "types")), strict=True)
    )
    return pieces + field(2, field(1, b"corpus.txt" * 20) + b"\x18" + bytes([kind])) + field(3, b"\x18\x01")


@pytest.mark.parametrize("with_model_file", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_sentencepiece_vocabulary_is_written_as_it_was(
    name: str, with_model_file: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    vocabulary = SENTENCEPIECE[name]
    folder = with_tokenizer(tmp_path / "model", make_model, of_fixture(vocabulary, tmp_path))
    if with_model_file:
        (folder / "tokenizer.model").write_bytes(model_file(vocabulary))
    keys = file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.tokens"] == vocabulary["tokens"]
    assert keys["tokenizer.ggml.token_type"] == [
        3 if t in ("<s>", "</s>", "<pad>") else k
        for t, k in zip(vocabulary["tokens"], vocabulary["types"], strict=True)
    ]
    if with_model_file:  # added tokens get a score of their own, from llama.cpp's converter
        ordinary = [i for i, kind in enumerate(vocabulary["types"]) if kind in (1, 2, 6)]
        scores = np.float32(keys["tokenizer.ggml.scores"])[ordinary]
        np.testing.assert_array_equal(scores, np.float32(vocabulary["scores"])[ordinary])
    assert keys["tokenizer.ggml.add_space_prefix"] is vocabulary["prefix"]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk")):
        assert keys[f"tokenizer.ggml.{key}_token_id"] == vocabulary["ids"][ours]
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    write_model(tmp_path / "read.gguf", resized(len(vocabulary["tokens"])), lambda writer: write_keys(writer, keys))
    writer.close()
    read = open_source(tmp_path / "read.gguf").tokenizer()
    for text, ids in vocabulary["encoded"]:
        assert read(text, add_special_tokens=False).input_ids == ids, text


def resized(size: int) -> Any:
    model = random_model("llama", tied=True, dtype=torch.float32, seed=0)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def write_keys(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    """The tokenizer's keys alone."""
    for key, value in keys.items():
        if key.startswith("tokenizer."):
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a BPE model"),
        (b"\x0a\x7fshort", "not readable as a SentencePiece model .it ends early."),
        (b"\x0b\x01", "not readable as a SentencePiece model .wire type 3."),
        (b"\x0a\x80", "not readable as a SentencePiece model"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not readable as a SentencePiece model"),
        (model_file(SENTENCEPIECE["llama"], kind=1), "not a BPE model; llama.cpp would cut text otherwise"),
    ],
)
def test_a_model_file_that_cannot_be_used_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(SourceError, match=f"tokenizer.model: {said}"):
        read_pieces(tmp_path / "tokenizer.model")


@given(cut=st.integers(0, 3000))
def test_a_cut_model_file_is_pieces_or_one_error(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.model"
    path.write_bytes(model_file(SENTENCEPIECE["llama"])[:cut])
    with pytest.raises(SourceError):
        read_pieces(path)


def test_a_piece_that_no_merge_makes_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    tokenizer = of_fixture(SENTENCEPIECE["llama"], tmp_path)
    folder = with_tokenizer(tmp_path / "model", make_model, tokenizer)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "\u2581the"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        SourceError, match=r"model: no merge .* '\u2581the', but llama.cpp would; put its tokenizer.model"
    ):
        file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32)


def test_added_tokens_keep_their_kind(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    grown = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    grown = type(grown).from_pretrained(saved(grown, tmp_path))
    grown.add_tokens([AddedToken("<think>", special=False), AddedToken("<|tool|>", special=False)])
    grown.add_special_tokens({"additional_special_tokens": ["[CALL]"]})
    folder = with_tokenizer(tmp_path / "model", make_model, grown, vocab_size=VOCABULARY + 6)
    keys = file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32, pre="gpt-2")
    assert keys["tokenizer.ggml.tokens"][VOCABULARY:] == [
        "<think>",
        "<|tool|>",
        "[CALL]",
        "[PAD323]",
        "[PAD324]",
        "[PAD325]",
    ]
    assert keys["tokenizer.ggml.token_type"][VOCABULARY - 1 :] == [1, 4, 3, 3, 5, 5, 5]
    assert keys["tokenizer.ggml.token_type"][: len(SPECIAL)] == [3] * len(SPECIAL)
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (False, False)


def saved(tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_several_chat_templates_have_keys_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "one", "tool_use": "two", "rag": "three"}
    keys = file_keys(
        open_source(with_tokenizer(tmp_path / "model", make_model, tokenizer)), gguf.LlamaFileType.ALL_F32, pre="gpt-2"
    )
    assert {key: value for key, value in keys.items() if "template" in key} == {
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.tool_use": "two",
        "tokenizer.chat_template.rag": "three",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }


def test_the_names_are_llama_cpps() -> None:
    known = {"0ef9807a": "llama-bpe", "e636dc30": "qwen2", "85505942": "smollm", "3ce83efd": "gpt-2"}
    assert {start: next(name for ids, name in BY_IDS.items() if ids.startswith(start)) for start in known} == known
    assert len(BY_IDS) == 94
    assert set(BY_IDS.values()) <= NAMES


def test_an_unknown_pre_tokenizer_is_no_guess(make_model: MakeModel) -> None:
    source = open_source(make_model("llama", dtype="float32"))
    with pytest.raises(SourceError, match=r"llama.cpp has no name for how this tokenizer cuts .*: --pre llama-bpe"):
        file_keys(source, gguf.LlamaFileType.ALL_F32)
    with pytest.raises(UsageError, match=r"--pre qwen: llama.cpp knows no pre-tokenizer .* qwen2, "):
        file_keys(source, gguf.LlamaFileType.ALL_F32, pre="qwen")
    assert file_keys(source, gguf.LlamaFileType.ALL_F32, pre="tekken")["tokenizer.ggml.pre"] == "tekken"


def test_a_gguf_sources_pre_tokenizer_is_no_guess_either(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = random_model("llama", tied=True, dtype=torch.float32, seed=0)
    write_model(tmp_path / "old.gguf", model, byte_level(tokenizer, None))
    with pytest.raises(SourceError, match=r"tokenizer.ggml.pre is None, which llama.cpp does not know; give --pre"):
        file_keys(open_source(tmp_path / "old.gguf"), gguf.LlamaFileType.ALL_F32)
    keys = file_keys(open_source(tmp_path / "old.gguf"), gguf.LlamaFileType.ALL_F32, pre="smollm")
    assert keys["tokenizer.ggml.pre"] == "smollm"


def test_pre_is_for_byte_level_vocabularies_only(make_model: MakeModel, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", make_model, of_fixture(SENTENCEPIECE["llama"], tmp_path))
    for path in (folder, tmp_path / "fixture.gguf"):
        with pytest.raises(UsageError, match=rf"--pre qwen2: the vocabulary of {path} is not a byte-level one"):
            file_keys(open_source(path), gguf.LlamaFileType.ALL_F32, pre="qwen2")


def test_a_model_file_of_another_vocabulary_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", make_model, of_fixture(SENTENCEPIECE["llama"], tmp_path))
    (folder / "tokenizer.model").write_bytes(model_file(SENTENCEPIECE["gemma"]))
    with pytest.raises(SourceError, match=r"tokenizer.model: id 3 is '<unk>', in tokenizer.json '<0x00>'; remove one"):
        file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32)


def test_a_tokenizer_of_another_kind_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    source = open_source(with_tokenizer(tmp_path / "model", make_model, words))
    with pytest.raises(SourceError, match="model: a WordLevel tokenizer of this kind cannot be written as GGUF"):
        file_keys(source, gguf.LlamaFileType.ALL_F32)


def test_a_space_that_a_byte_level_tokenizer_puts_first_is_refused(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = with_tokenizer(tmp_path / "model", make_model, tokenizer)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match="its tokenizer puts a space before a text"):
        file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32, pre="gpt-2")


def test_a_model_without_a_tokenizer_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*token*", "*jinja")
    folder = shutil.copytree(make_model("llama", dtype="float32"), tmp_path / "model", ignore=ignored)
    with pytest.raises(SourceError, match="has no tokenizer"):
        publish(open_source(folder), tmp_path / "out" / "tiny.gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_a_larger_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model("llama", dtype="float32"))
    folder = with_tokenizer(tmp_path / "model", make_model, tokenizer, vocab_size=VOCABULARY - 1)
    with pytest.raises(SourceError, match=r"tokenizer has the id 319, its embedding only 319 rows"):
        file_keys(open_source(folder), gguf.LlamaFileType.ALL_F32, pre="gpt-2")


# -- what cannot be written ---------------------------------------------------------------------------------------


def test_an_architecture_that_cannot_be_written_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = open_source(make_model("opt"))
    with pytest.raises(SourceError, match=r"opt cannot be written as GGUF; what can: arcee, .*, starcoder2$"):
        publish(source, tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', where a llama GGUF file means 'silu'"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast 16 of its yarn"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor 2.0 of its yarn"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "rope_type 'llama3' has no place in a qwen2"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type 'dynamic' has no place"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window"),
        (
            "qwen3_moe",
            {"made": {"norm_topk_prob": True, "mlp_only_layers": [0]}},
            r"mlp_only_layers is \[0\], where a qwen3moe GGUF file means \[\]",
        ),
        ("qwen3_moe", {"made": {"mlp_only_layers": []}}, "norm_topk_prob is False, where .* means True"),
        ("gemma2", {"made": {"tied": True}, "query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24, .* means 16"),
        ("gemma2", {"made": {"tied": True}, "final_logit_softcapping": None}, "final_logit_softcapping is not set"),
        ("gemma2", {}, "no output matrix beside the embedding"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, where .* means None"),
        ("gpt_oss", {"rope_parameters": YARN}, "truncate True of its yarn scaling has no place in a gpt-oss"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit is 5.0, where a gpt-oss GGUF file means 7.0"),
        ("glm4_moe", {"n_group": 2}, "n_group is 2, where a glm4moe GGUF file means 1"),
        ("lfm2", {"made": {"layer_types": ["conv"] * 2, "conv_bias": True}}, "conv_bias is True, where a lfm2 GGUF"),
        ("exaone4", {"sliding_window": 8}, "sliding_window is 8, which a exaone4 GGUF file of this many blocks"),
        ("olmoe", {}, "4 heads share 2 keys and values, which a olmoe GGUF file cannot say"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is not every 4th"),
        ("starcoder2", {"made": {"use_bias": False}}, "use_bias is False, where a starcoder2 GGUF file means True"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True, where .* means False"),
        (
            "olmo3",
            {
                "made": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            "rope_theta 5000.0 of sliding_attention",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, config: dict[str, Any], said: str, make_model: MakeModel, tmp_path: Path
) -> None:
    source = open_source(edited(make_model, tmp_path / "model", family, config))
    with pytest.raises(SourceError, match=said) as error:
        header_and_plan(source)
    assert str(error.value).startswith(f"{source.path}: ")


def header_and_plan(source: Source) -> None:
    """What a caller asks for before any work."""
    file_keys(source, gguf.LlamaFileType.ALL_F32, pre="gpt-2")
    plan(source, ModelStream(source, CPU, torch.float32).weights)


def edited(make_model: MakeModel, folder: Path, family: str, config: dict[str, Any]) -> Path:
    """A tiny model, made with config["made"], whose config.json says something else."""
    shutil.copytree(make_model(family, dtype="float32", **config.get("made", {})), folder)
    said = {key: value for key, value in config.items() if key != "made"}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "layer_types": None, **said}))
    return folder


def test_a_tensor_without_a_place_is_refused(make_model: MakeModel) -> None:
    source = open_source(make_model("qwen3", dtype="float32", attention_bias=True))
    with pytest.raises(SourceError, match=r"model\.layers\.0\.self_attn\.k_proj\.bias has no place in a qwen3 GGUF"):
        plan(source, ModelStream(source, CPU, torch.float32).weights)


def test_a_width_that_a_type_cannot_hold_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"token_embd.weight has 64 columns; Q4_K needs a multiple of 256"):
        publish(open_source(make_model("llama", dtype="float32")), tmp_path / "tiny.gguf", Kind.Q4_K)
    assert list(tmp_path.iterdir()) == []
    tensor = GgufTensor("x", ("x",), (3, 64, 256))
    assert packed_bytes(tensor, Kind.Q4_K) == 3 * 64 * 144


# -- the files ----------------------------------------------------------------------------------------------------


def test_parts_are_one_model(make_model: MakeModel, tmp_path: Path) -> None:
    source = tiny(make_model, "qwen3")
    parts = publish(source, tmp_path / "tiny.gguf", Kind.F16, split_max_bytes=60_000)
    assert sorted(tmp_path.iterdir()) == parts
    assert parts[0].name == f"tiny-00001-of-{len(parts):05d}.gguf"
    assert len(parts) > 2
    for part in parts:
        assert sum(tensor.bytes for tensor in GgufFile(part).tensors.values()) <= 60_000
    read = open_source(parts[1])
    assert set(read.tensors) == set(source.tensors)
    for name in source.tensors:
        values = source.read(name)
        expected = values if values.ndim == 1 else values.half()
        torch.testing.assert_close(read.read(name).float(), expected.float(), rtol=0, atol=0)
    assert read.tokenizer()("the sea").input_ids == source.tokenizer()("the sea").input_ids


KEYS = {
    "general.type": "model",
    "a.flag": True,
    "a.count": 4_000_000_000,
    "a.number": 1e-5,
    "left.out": "",
    "also.left.out": [],
    "words": ["", "the", "\u6f22\u5b57 \U0001f642", "a" * 300],
    "counts": [0, -1, 2_000_000_000],
    "numbers": [0.0, -1000.0, 1e-45],
    "flags": [True, False],
}


def test_more_parts_than_a_process_may_have_open(make_model: MakeModel, tmp_path: Path) -> None:
    source = tiny(make_model, "llama")
    whole = publish(source, tmp_path / "whole.gguf", Kind.F16)
    with few_files():
        parts = publish(source, tmp_path / "tiny.gguf", Kind.F16, split_max_bytes=1)
    assert len(parts) > 16
    read, other = open_source(parts[0]), open_source(whole[0])
    assert all(torch.equal(read.read(name), other.read(name)) for name in other.tensors)
    assert read.tensors == other.tensors


@pytest.mark.parametrize("split", [0, 1, 9_000, 10**9])
@pytest.mark.parametrize("case", ["llama3-rope", "qwen3moe"])
def test_the_bytes_are_those_of_gguf_py(case: str, split: int, make_model: MakeModel, tmp_path: Path) -> None:
    family, config, tied = {**CASES, "qwen3moe": ("qwen3_moe", EXPERTS, False)}[case]
    source = open_source(make_model(family, tied=tied, dtype="float32", **config))
    weights = ModelStream(source, CPU, torch.float32).weights
    planned = plan(source, weights)
    theirs = gguf.GGUFWriter(tmp_path / "theirs" / "a.gguf", "llama", split_max_size=split)
    (tmp_path / "theirs").mkdir()
    for key, value in KEYS.items():
        add = {bool: theirs.add_bool, int: theirs.add_uint32, float: theirs.add_float32, str: theirs.add_string}
        add.get(type(value), theirs.add_array)(key, value)
    typed = [(tensor, Kind.F32 if tensor.always_f32 else Kind.F16) for tensor in planned]
    for tensor, kind in typed:
        rows = [weights.read(name).numpy() for name in tensor.sources] or [np.array(tensor.computed)]
        ordered = [tensor.ordered(part) for part in rows]
        values = np.stack(ordered) if len(tensor.shape) == 3 else ordered[0]
        theirs.add_tensor(tensor.name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    theirs.add_size_label(gguf.size_label(*theirs.get_total_parameter_count()))
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    (tmp_path / "ours").mkdir()
    with GgufWriter(tmp_path / "ours" / "a.gguf", "llama", KEYS, typed, split) as ours:
        for tensor, kind in typed:
            for name in tensor.sources:
                ours.write(name, gguf.quants.quantize(tensor.values(weights.read(name)), kind))
        ours.finish()
    assert sorted(p.name for p in tmp_path.glob("ours/*")) == sorted(p.name for p in tmp_path.glob("theirs/*"))
    for path in ours.paths:
        assert path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes(), path.name


def test_one_file_where_the_limit_is_not_reached(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = publish(tiny(make_model, "llama"), tmp_path / "tiny.gguf", split_max_bytes=10**9)
    assert [part.name for part in parts] == ["tiny.gguf"]
    assert sorted(tmp_path.iterdir()) == parts
    assert caplog.records == []


def test_equal_runs_give_equal_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    for name in ("one", "other"):
        publish(tiny(make_model, "llama3-rope"), tmp_path / name / "tiny.gguf", Kind.Q8_0)
    assert (tmp_path / "one" / "tiny.gguf").read_bytes() == (tmp_path / "other" / "tiny.gguf").read_bytes()


@pytest.mark.parametrize("split", [0, 60_000])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_what_was_there(
    error: BaseException, split: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(make_model, "llama")
    publish(source, tmp_path / "old.gguf")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write, calls = GgufWriter.write, []

    def failing(self: GgufWriter, name: str, data: Any) -> None:
        calls.append(name)
        if len(calls) == 5:
            raise error
        write(self, name, data)

    monkeypatch.setattr(GgufWriter, "write", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    for out in (tmp_path / "old.gguf", tmp_path / "new" / "deep" / "tiny.gguf"):
        calls.clear()
        with pytest.raises(expected) as caught:
            publish(source, out, Kind.F16, split)
        if expected is OutputError:
            assert str(caught.value) == f"writing {out} failed: No space left on device; nothing was left there"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parts_appear_together_or_not_at_all(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(make_model, "llama")
    old = publish(source, tmp_path / "tiny.gguf", Kind.F16, split_max_bytes=60_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    move, count = Staging._move, 0

    def failing(self: Staging, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(self, *arguments)

    monkeypatch.setattr(Staging, "_move", failing)
    for name in ("tiny.gguf", "another.gguf"):
        count = 0
        with pytest.raises(OutputError, match="Input/output error"):
            publish(source, tmp_path / name, Kind.F32, split_max_bytes=120_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    other = open_source(make_model("llama", dtype="float32", seed=1, head_dim=32, rms_norm_eps=1e-5))
    assert publish(other, tmp_path / "tiny.gguf", Kind.F16, split_max_bytes=60_000) == old
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    assert all(path.read_bytes() != before[path.name] for path in old)


def test_a_tensor_that_was_never_written_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    source = tiny(make_model, "llama")
    typed = [(tensor, Kind.F32) for tensor in plan(source, ModelStream(source, CPU, torch.float32).weights)]
    with GgufWriter(tmp_path / "tiny.gguf", "llama", {}, typed) as writer:
        with pytest.raises(OutputError, match=r"21 planned tensors were not written, such as lm_head\.weight"):
            writer.finish()
        with pytest.raises(AssertionError, match=r"token_embd\.weight"):
            writer.write("model.embed_tokens.weight", np.zeros((VOCABULARY, 63), np.float32))


@pytest.mark.parametrize("place", [9, 3_000, -5_000], ids=["a count", "a word", "a weight"])
def test_a_disk_that_changes_a_bit_is_noticed(
    place: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, changed = GgufWriter._close, list[Path]()

    def changing(self: GgufWriter) -> None:
        close(self)
        if not changed:
            changed.append(self.paths[0])
            content = bytearray(self.paths[0].read_bytes())
            content[place] ^= 1
            self.paths[0].write_bytes(content)

    monkeypatch.setattr(GgufWriter, "_close", changing)
    with pytest.raises(OutputError, match="other data was read back than was written"):
        publish(tiny(make_model, "llama"), tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []


# -- llama.cpp ----------------------------------------------------------------------------------------------------

# llama.cpp gives Phi-3 no window (its pull request 13676).
JUDGED = {**CASES, "qwen3moe": ("qwen3_moe", EXPERTS, False), "phi3": ("phi3", {"sliding_window": None}, False)}


@pytest.mark.judges
@pytest.mark.parametrize(
    ("case", "split"), [*((case, 0) for case in JUDGED), ("llama", 100_000), ("qwen3moe", 100_000)]
)
def test_llama_cpp_computes_the_model(case: str, split: int, make_model: MakeModel, tmp_path: Path) -> None:
    family, config, tied = JUDGED[case]
    source = open_source(make_model(family, tied=tied, dtype="float32", **config))
    # Where the name says Phi-3, llama.cpp looks up tokens that the tests' tokenizer does not have.
    parts = publish(source, tmp_path / "tiny.gguf", split_max_bytes=split, pre="gpt-2", name="tiny")
    assert (len(parts) > 1) is bool(split)
    theirs, ours = judged(source, parts[0], random_model(family, tied=tied, dtype=torch.float32, seed=0, **config))
    # Gemma's GELU is a table of float16 there.
    assert mean_kl(floored(ours), theirs) < (2e-5 if "gemma" in case else 1e-6)


def judged(source: Source, path: Path, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """llama.cpp's log-probabilities of a file and transformers' of the model, for windows of 64 tokens."""
    ids = torch.tensor(source.tokenizer()(TEXT).input_ids)
    tokens = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    theirs = llama_logprobs(path, TEXT, tokens)
    rows = scored_rows(64)
    with torch.inference_mode():
        ours = model(input_ids=tokens).logits[:, rows.start : rows.stop].log_softmax(-1)
    return theirs, ours


def sized_model(folder: Path, tokenizer: Any, family: str, **config: Any) -> Source:
    """A tiny model with a tokenizer of any size."""
    model = random_model(family, tied=True, dtype=torch.float32, seed=0, **config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(folder)


def assert_llama_cpp_cuts_alike(source: Source, text: str, tmp_path: Path, **options: Any) -> None:
    """Fails in `llama_logprobs` where llama.cpp makes other ids of the text than the source's tokenizer."""
    publish(source, tmp_path / "tiny.gguf", name="tiny", **options)
    ids = torch.tensor(source.tokenizer()(text).input_ids)
    tokens = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    assert len(tokens) > 5
    llama_logprobs(tmp_path / "tiny.gguf", text, tokens)


@pytest.mark.judges
@pytest.mark.parametrize("with_model_file", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_llama_cpp_cuts_text_as_sentencepiece_does(name: str, with_model_file: bool, tmp_path: Path) -> None:
    vocabulary = SENTENCEPIECE[name]
    config = SIX if name == "gemma" else {}
    tokenizer = of_fixture(vocabulary, tmp_path)
    source = sized_model(tmp_path / "model", tokenizer, "gemma3_text" if name == "gemma" else "llama", **config)
    if with_model_file:
        (tmp_path / "model" / "tokenizer.model").write_bytes(model_file(vocabulary))
    text = "the quick" + "\n".join(text for text, _ in vocabulary["encoded"] if "<" not in text)
    assert_llama_cpp_cuts_alike(source, text, tmp_path, pre=None)


@pytest.mark.e2e
@pytest.mark.judges
def test_llama_cpp_cuts_text_as_smollm2_does(tmp_path: Path) -> None:
    tokenizer = open_source(smollm2_gguf()).tokenizer()
    text = (
        "\n".join(text for text, _ in SENTENCEPIECE["llama"]["encoded"])
        + TEXT
        + "1234567890 caf\u00e9 HTTPServer's\r\n\t"
    )
    assert_llama_cpp_cuts_alike(sized_model(tmp_path / "model", tokenizer, "llama"), text, tmp_path, pre=None)


def test_what_lies_beside_the_text_is_said_to_stay_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, recorder: Recorder
) -> None:
    model = towers.write(tmp_path / "model", "qwen3_vl", tokenizer)
    quantkit.ggml(model, tmp_path / "text.gguf", type="q8_0", pre="llama-bpe", progress=recorder)
    tower = [name for name in open_source(model).tensors if name.startswith("model.visual.")]
    assert recorder.notes == [
        f"the file has the text part alone: {len(tower)} tensors are left out, model.visual ({len(tower)})"
    ]
    assert not any("visual" in name for name in GgufFile(tmp_path / "text.gguf").tensors)
