"""ggjt v3: what is written is the format, ctransformers reads it, our reader too, and broken files are named."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import Recorder, permute_heads, token_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ggjt_models import LLAMA, SIZES, VOCABULARY, Parts, parts_tensors, tiny, write
from support.gguf_models import sentencepiece, write_model
from support.judge_env import Judge
from support.llamacpp import ctransformers_judge, ctransformers_logits, ctransformers_tokens, mean_kl
from support.streamed import streamed_logits
from tokenizers import AddedToken
from transformers import LlamaConfig, PreTrainedTokenizerFast

from quantkit.blocks.stream import ModelStream
from quantkit.containers.ggjt import write as writers_ggjt
from quantkit.containers.ggjt.read import GgjtSource, rebuilt_tokenizer
from quantkit.containers.ggjt.write import (
    FILE_TYPES,
    GgjtWriter,
    Kind,
    check,
    make_vocabulary,
    n_mult,
    plan,
)
from quantkit.containers.source import Source
from quantkit.errors import (
    NumericError,
    OutputError,
    SourceError,
    UsageError,
)
from quantkit.sources import open_source

# Kernels of quantized types round the activations too, so the judge's logits are a little off.
WITHIN = {kind: 2e-6 if kind in (Kind.F32, Kind.F16) else 5e-3 for kind in FILE_TYPES}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama with a SentencePiece vocabulary, from a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, tiny(), sentencepiece(LLAMA))
    return open_source(path)


def logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Our reading of a model, float32 [prompts, tokens, vocabulary]."""
    return streamed_logits(ModelStream(source, torch.device("cpu"), torch.float32), [tokens])[0]


# -- a writer of its own ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """opened(parts) -> the source of a file made of them."""

    def open_parts(parts: Parts) -> GgjtSource:
        path = tmp_path / "parts.bin"
        path.write_bytes(parts.bytes())
        return GgjtSource(path)

    return open_parts


# -- the format ------------------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_format(source: Source, tmp_path: Path) -> None:
    write(tmp_path / "tiny.bin", source, Kind.Q8_0)
    data = (tmp_path / "tiny.bin").read_bytes()
    assert struct.unpack_from("<9I", data) == (0x67676A74, 3, VOCABULARY, 64, 192, 4, 2, 16, 7)
    at, tokens = 36, []
    for _ in range(VOCABULARY):
        (length,) = struct.unpack_from("<I", data, at)
        tokens.append((data[at + 4 : at + 4 + length], *struct.unpack_from("<f", data, at + 4 + length)))
        at += 8 + length
    assert tokens[:4] == [(" \u2047 ".encode(), 0.0), (b"", 0.0), (b"", 0.0), (b"\x00", 0.0)]
    assert tokens[3 + 0xE2] == (b"\xe2", 0.0)
    assert tokens[LLAMA["tokens"].index("\u2581the")][0] == b" the"
    assert [score for _, score in tokens] == LLAMA["scores"]
    found = {}
    while at < len(data):
        dimensions, length, kind = struct.unpack_from("<3I", data, at)
        shape = struct.unpack_from(f"<{dimensions}I", data, at + 12)[::-1]
        name = data[at + 12 + 4 * dimensions :][:length].decode()
        at += 12 + 4 * dimensions + length
        assert not any(data[at : at + -at % 32])
        at += -at % 32
        size = math.prod(shape) // 32 * 34 if kind == 8 else math.prod(shape) * 4
        assert (kind, len(shape)) in ((8, 2), (0, 1))
        found[name] = (shape, data[at : at + size])
        at += size
    assert at == len(data)
    assert len(found) == 3 + 2 * 9
    assert found["layers.1.feed_forward.w2.weight"][0] == (64, 192)
    keys = permute_heads(source.read("model.layers.1.self_attn.k_proj.weight").numpy(), 4)
    assert found["layers.1.attention.wk.weight"][1] == gguf.quants.quantize(keys, Kind.Q8_0).tobytes()
    down = source.read("model.layers.1.mlp.down_proj.weight").numpy()
    assert found["layers.1.feed_forward.w2.weight"][1] == gguf.quants.quantize(down, Kind.Q8_0).tobytes()
    norm = source.read("model.layers.0.post_attention_layernorm.weight").numpy()
    assert found["layers.0.ffn_norm.weight"][1] == norm.tobytes()


@pytest.mark.parametrize("kind", FILE_TYPES, ids=lambda kind: kind.name)
def test_what_is_written_is_read_back(kind: Kind, source: Source, tmp_path: Path) -> None:
    written = write(tmp_path / "tiny.bin", source, kind)
    assert written.kind == "ggjt"
    assert written.label == "tiny"
    assert written.tensors.keys() == source.tensors.keys()
    for name, info in written.tensors.items():
        values = source.read(name)
        stored = kind if values.ndim == 2 else Kind.F32
        expected = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), stored), stored)
        assert info.stored_as == stored.name
        assert torch.equal(written.read(name).float(), torch.from_numpy(expected.astype(np.float32))), name
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in (*fields, "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert getattr(written.config, name) == getattr(source.config, name), name
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.bin"]


@pytest.mark.parametrize("kind", FILE_TYPES, ids=lambda kind: kind.name)
def test_blocks_are_the_stored_bytes_of_what_is_read(kind: Kind, source: Source, tmp_path: Path) -> None:
    written = write(tmp_path / "tiny.bin", source, kind)
    for name, info in written.tensors.items():
        stored, rows = written.blocks(name)
        assert (stored.name, rows.dtype, rows.nbytes) == (info.stored_as, np.uint8, info.bytes), name
        values = gguf.quants.dequantize(rows, stored).reshape(info.shape).astype(np.float32)
        assert torch.equal(torch.from_numpy(values), written.read(name).float()), name


def test_packed_rows_go_in_as_they_are(source: Source, tmp_path: Path) -> None:
    tensors = plan(source.config, source.tensors, dict.fromkeys(source.tensors, Kind.Q4_0))
    vocabulary = make_vocabulary(source.tokenizer(), VOCABULARY)
    with GgjtWriter(tmp_path / "packed.bin", source.config, vocabulary, tensors) as writer:
        for tensor in tensors:
            values = source.read(tensor.published).numpy()
            writer.write(tensor, values if values.ndim == 1 else gguf.quants.quantize(values, Kind.Q4_0))
        writer.finish()
    write(tmp_path / "floats.bin", source, Kind.Q4_0)
    assert (tmp_path / "packed.bin").read_bytes() == (tmp_path / "floats.bin").read_bytes()


def test_a_tied_output_is_written_once_more(tmp_path: Path) -> None:
    write_model(tmp_path / "tied.gguf", tiny(tied=True), sentencepiece(LLAMA))
    tied = open_source(tmp_path / "tied.gguf")
    assert "lm_head.weight" not in tied.tensors
    written = write(tmp_path / "tied.bin", tied)
    assert torch.equal(written.read("lm_head.weight"), tied.read("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("hidden", "inner", "expected"), [(4096, 11008, 256), (5120, 13824, 256), (64, 192, 192), (3200, 8640, 8640)]
)
def test_n_mult_gives_the_inner_width(hidden: int, inner: int, expected: int) -> None:
    found = n_mult(LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=4))
    assert found == expected
    assert (2 * (4 * hidden) // 3 + found - 1) // found * found == inner


@settings(max_examples=60, deadline=None)
@given(hidden=st.integers(1, 300).map(lambda n: 32 * n), extra=st.integers(-2000, 4000))
def test_n_mult_is_found_for_every_width_that_a_reader_could_compute(hidden: int, extra: int) -> None:
    least = 8 * hidden // 3
    inner = least + extra
    config = LlamaConfig(hidden_size=hidden, intermediate_size=max(inner, 1), num_attention_heads=1)
    if extra < 0:
        with pytest.raises(UsageError, match="a ggjt file cannot say an inner width of"):
            n_mult(config)
    else:
        found = n_mult(config)
        assert -(-least // found) * found == inner


# -- the vocabulary --------------------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece(source: Source, tmp_path: Path) -> None:
    tokenizer = write(tmp_path / "tiny.bin", source).tokenizer()
    for text, ids in LLAMA["encoded"]:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer(text).input_ids == [1, *ids]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer("a</s>b").input_ids == source.tokenizer()("a</s>b").input_ids


@pytest.fixture(scope="module")
def rebuilt(source: Source) -> Any:
    """The source's tokenizer after its way through a ggjt vocabulary."""
    return rebuilt_tokenizer(make_vocabulary(source.tokenizer(), VOCABULARY))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text("the foxqu \u2581\u00e9", max_size=40))
def test_any_text_has_the_ids_of_the_original(source: Source, rebuilt: Any, text: str) -> None:
    assert rebuilt(text).input_ids == source.tokenizer()(text).input_ids


def test_added_tokens_and_missing_ids(source: Source) -> None:
    tokenizer = changed_tokenizer(source)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    vocabulary = make_vocabulary(tokenizer, VOCABULARY + 5)
    assert vocabulary[VOCABULARY:] == [(b"<extra>", -1000.0), (b"[PAD]", -1000.0), *[(b"", -1000.0)] * 3]
    rebuilt = rebuilt_tokenizer(vocabulary)
    text = "the[PAD] quick<extra>fox"
    assert rebuilt(text).input_ids == tokenizer(text).input_ids
    assert len(rebuilt) == VOCABULARY + 5
    with pytest.raises(UsageError, match=f"has {VOCABULARY + 2} tokens, but the model embeds only {VOCABULARY}"):
        make_vocabulary(tokenizer, VOCABULARY)


def test_a_piece_whose_score_is_that_of_added_tokens_stays_a_piece() -> None:
    pieces = [(f"x{number}".encode(), float(-number)) for number in range(1001)]
    tokens = (*Parts().tokens, *pieces)
    alone, more = (rebuilt_tokenizer(vocabulary) for vocabulary in (tokens, (*tokens, (b"<more>", -1000.0))))
    assert "x1000" not in alone.get_added_vocab()
    assert "<more>" in more.get_added_vocab()
    assert "x1000" not in more.get_added_vocab()


def test_a_byte_level_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UsageError, match="SentencePiece vocabularies with bytes only, not this tokenizer's; write GGUF"
    ):
        make_vocabulary(tokenizer, 400)


def changed_tokenizer(source: Source, **model: Any) -> PreTrainedTokenizerFast:
    """The model's tokenizer with something in its BPE changed; `normalizer` is beside it."""
    backend = source.tokenizer().backend_tokenizer
    content = json.loads(backend.to_str())
    if "normalizer" in model:
        content["normalizer"] = model.pop("normalizer")
    content["model"] |= model
    return PreTrainedTokenizerFast(
        tokenizer_object=backend.__class__.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )


def test_a_tokenizer_that_a_reader_would_not_agree_with_is_refused(source: Source) -> None:
    content = json.loads(source.tokenizer().backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    fewer = list({left + right: [left, right] for left, right in reversed(merges)}.values())[::-1]
    with pytest.raises(
        UsageError, match=rf"joins pieces in {len(fewer)} ways, and a reader .* in {len(merges)}: it would"
    ):
        make_vocabulary(changed_tokenizer(source, merges=fewer), VOCABULARY)
    twice = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    mixed = [*merges[:twice], *merges[twice + 1 :], merges[twice]]
    with pytest.raises(UsageError, match="not in the order of scores"):
        make_vocabulary(changed_tokenizer(source, merges=mixed), VOCABULARY)
    with pytest.raises(UsageError, match="would cut 'the quick brown fox' otherwise"):
        make_vocabulary(
            changed_tokenizer(source, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}),
            VOCABULARY,
        )
    nfkc = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, content["normalizer"]]}
    with pytest.raises(UsageError, match=r"would cut 'na.*otherwise"):
        make_vocabulary(changed_tokenizer(source, normalizer=nfkc), VOCABULARY)
    with pytest.raises(UsageError, match="with bytes only"):
        make_vocabulary(changed_tokenizer(source, byte_fallback=False), VOCABULARY)


def test_ids_that_readers_know_by_heart(source: Source, recorder: Recorder) -> None:
    other = changed_tokenizer(source)
    other.bos_token = "</s>"
    with pytest.raises(
        UsageError, match="take id 1 for the BOS and 3 to 258 for the bytes, and the tokenizer has '</s>'"
    ):
        make_vocabulary(other, VOCABULARY)
    vocabulary = json.loads(source.tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    moved = {**vocabulary, "<0x00>": vocabulary["<0x01>"], "<0x01>": vocabulary["<0x00>"]}
    with pytest.raises(UsageError, match="the tokenizer has '<0x01>' elsewhere; write GGUF"):
        make_vocabulary(changed_tokenizer(source, vocab=moved), VOCABULARY)
    other = changed_tokenizer(source)
    other.eos_token = "<unk>"
    make_vocabulary(other, VOCABULARY, recorder)
    assert recorder.warnings == [
        "readers of ggjt files stop at id 2, and the model at 0 ('<unk>'): give that to the reader as a stop text, or "
        "write GGUF"
    ]


# -- what the writer refuses -----------------------------------------------------------------------------------------


@dataclass
class Configured:
    """What `check` looks at."""

    config: Any
    label: str = "tiny"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 2}, "tiny: 4 heads share 2 keys and values, which a ggjt file cannot say; write GGUF"),
        ({"head_dim": 32}, "its heads are 32 wide, and a ggjt file has them 16 wide"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, r"is scaled \(linear\)"),
        ({"attention_bias": True}, "no biases"),
        ({"mlp_bias": True}, "no biases"),
        ({"hidden_act": "gelu"}, "no activation but silu"),
        ({"intermediate_size": 96}, "cannot say an inner width of 96: with a hidden width of 64 it is 170 or more"),
        ({"model_type": "mistral"}, "architecture mistral has no place in a ggjt file, which holds Llamas"),
    ],
)
def test_what_the_format_cannot_say_is_refused(change: dict[str, Any], said: str) -> None:
    config = LlamaConfig(
        **{
            **SIZES,
            "hidden_size": 64,
            "num_attention_heads": 4,
            **{k: v for k, v in change.items() if k != "model_type"},
        }
    )
    config.model_type = change.get("model_type", "llama")
    with pytest.raises(UsageError, match=said):
        check(Configured(config))


def test_what_readers_assume_is_warned_of(recorder: Recorder) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, **SIZES}
    for eps in (5e-6, 1e-6):
        check(Configured(LlamaConfig(**{**sizes, "rms_norm_eps": eps})), recorder)
    assert recorder.warnings == []
    rope = {"rope_type": "default", "rope_theta": 1e6}
    check(Configured(LlamaConfig(**{**sizes, "rms_norm_eps": 1e-5, "rope_parameters": rope})), recorder)
    eps, base = recorder.warnings
    assert "epsilon is 1e-05" in eps
    assert "assume 5e-06 (those of before August 2023 1e-06)" in eps
    assert "rotary base is 1e+06" in base
    assert "assume 10000" in base


def test_types_and_tensors_without_a_place_are_refused(source: Source) -> None:
    kinds = dict.fromkeys(source.tensors, Kind.F16)
    with pytest.raises(
        UsageError, match=r"model.layers.0.mlp.up_proj.weight: a ggjt file holds F32, F16, .*, not BF16"
    ):
        plan(source.config, source.tensors, {**kinds, "model.layers.0.mlp.up_proj.weight": Kind.BF16})
    with pytest.raises(UsageError, match=r"not None"):
        plan(source.config, source.tensors, {})
    extra = {**source.tensors, "model.layers.0.self_attn.q_proj.bias": source.tensors["model.norm.weight"]}
    with pytest.raises(UsageError, match=r"q_proj.bias has no place in a ggjt file"):
        plan(source.config, extra, kinds)
    narrow = replace(source.tensors["model.layers.0.mlp.down_proj.weight"], shape=(64, 80))
    with pytest.raises(UsageError, match=r"down_proj.weight is 80 wide: Q4_0 needs multiples of 32; choose F16 for it"):
        plan(
            source.config,
            {**source.tensors, "model.layers.0.mlp.down_proj.weight": narrow},
            dict.fromkeys(source.tensors, Kind.Q4_0),
        )


@pytest.mark.parametrize(("kind", "value"), [(Kind.F16, 1e5), (Kind.Q4_0, np.nan), (Kind.F32, np.inf)])
def test_values_that_a_type_cannot_hold_are_named(kind: Kind, value: float, source: Source, tmp_path: Path) -> None:
    tensors = plan(source.config, source.tensors, dict.fromkeys(source.tensors, kind))
    vocabulary = make_vocabulary(source.tokenizer(), VOCABULARY)
    matrix = next(tensor for tensor in tensors if tensor.published.endswith("q_proj.weight"))
    values = source.read(matrix.published).numpy().copy()
    values[3, 5] = value
    said = f": a value is not finite in {kind.name}" if np.isfinite(value) else " holds NaN or infinity"
    with (
        pytest.raises(NumericError, match=f"{matrix.published}{said}"),
        GgjtWriter(tmp_path / "tiny.bin", source.config, vocabulary, tensors) as writer,
    ):
        writer.write(matrix, values)


def test_an_unfinished_file_is_not_finished(source: Source, tmp_path: Path) -> None:
    tensors = plan(source.config, source.tensors, dict.fromkeys(source.tensors, Kind.F32))
    vocabulary = make_vocabulary(source.tokenizer(), VOCABULARY)
    with GgjtWriter(tmp_path / "tiny.bin", source.config, vocabulary, tensors) as writer:
        writer.write(tensors[0], source.read(tensors[0].published).numpy())
        with pytest.raises(OutputError, match=r"20 planned tensors were not written, such as layers\.0\.attention\.wk"):
            writer.finish()
        with pytest.raises(KeyError):  # twice
            writer.write(tensors[0], source.read(tensors[0].published).numpy())


def test_a_full_disk_leaves_nothing(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writers_ggjt, "in_rotary_order", full)
    with pytest.raises(
        OutputError, match=r"writing .*tiny.bin failed: No space left on device; nothing was left there"
    ):
        write(tmp_path / "tiny.bin", source)
    assert list(tmp_path.iterdir()) == []


# -- reading what others wrote ---------------------------------------------------------------------------------------


def test_parts_make_a_model(opened: Any) -> None:
    source = opened(Parts())
    config = source.config_dict()
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (config["rms_norm_eps"], config["rope_theta"], config["max_position_embeddings"]) == (5e-6, 10000.0, 2048)
    assert "5e-06, 10000 and 2048 are assumed" in source.remarks[0]
    assert source.weight_files() == [source.path]
    stored = {name: data for name, _, _, data in Parts().tensors}
    keys = np.frombuffer(stored["layers.0.attention.wk.weight"], "<f2").reshape(32, 32)
    assert np.array_equal(permute_heads(source.read("model.layers.0.self_attn.k_proj.weight").numpy(), 2), keys)
    down = source.read("model.layers.0.mlp.down_proj.weight")
    assert down.shape == (32, 96)
    assert down.numpy().tobytes() == stored["layers.0.feed_forward.w2.weight"]
    assert source.tokenizer()("\u00e9").input_ids == [1, *(3 + byte for byte in "\u2581\u00e9".encode())]


def test_grouped_keys_are_told_by_their_shape(opened: Any) -> None:
    source = opened(Parts(sizes=(259, 64, 32, 4, 1, 16, 1), tensors=parts_tensors(64, 192, keys=32)))
    assert source.config.num_key_value_heads == 2
    stored = next(data for name, _, _, data in parts_tensors(64, 192, keys=32) if ".wk." in name)
    keys = source.read("model.layers.0.self_attn.k_proj.weight").numpy()
    assert np.array_equal(permute_heads(keys, 2), np.frombuffer(stored, "<f2").reshape(32, 64))
    assert logits(source, torch.tensor([[1, 5, 7]])).shape == (1, 3, 259)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_of_2023_are_read(kind: Kind, opened: Any) -> None:
    parts = Parts(sizes=(259, 256, 256, 4, 1, 64, 15), tensors=parts_tensors(256, 768, kind=kind))
    source = opened(parts)
    _, shape, _, data = next(tensor for tensor in parts.tensors if "w2" in tensor[0])
    rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
    values = source.read("model.layers.0.mlp.down_proj.weight").numpy()
    assert np.array_equal(values, gguf.quants.dequantize(rows, kind))
    assert 0.001 < values.std() < 1


def test_a_vocabulary_without_bytes_or_special_tokens_can_be_used(opened: Any) -> None:
    tokens = tuple((str(number).encode(), 0.0) for number in range(259))
    source = opened(replace(Parts(), tokens=tokens))
    assert source.tokenizer()("12").input_ids
    assert source.tokenizer().bos_token is None


def broken(said: str, **change: Any) -> Any:
    return pytest.param(replace(Parts(), **change), said, id=said[:40])


def size(index: int, value: int) -> tuple[int, ...]:
    sizes = list(Parts().sizes)
    sizes[index] = value
    return tuple(sizes)


ALL = Parts().tensors
TOKENS = Parts().tokens


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        broken("ggml cannot be read, only ggjt version 3 and GGUF", magic=b"lmgg", version=b""),
        broken("ggmf cannot be read", magic=b"fmgg"),
        broken(r"ggla \(a LoRA\) cannot be read", magic=b"algg"),
        broken("ggjt version 1 cannot be read", version=struct.pack("<I", 1)),
        broken("ggjt version 2 cannot be read", version=struct.pack("<I", 2)),
        broken("ggjt version 4 cannot be read", version=struct.pack("<I", 4)),
        broken("does not begin with ggjt", magic=b"abcd"),
        broken("it has no room for 4294967295 tokens", sizes=size(0, 2**32 - 1)),
        broken(r"a tensor of \d+ dimensions", sizes=size(0, 260)),
        broken("n_embd is 0", sizes=size(1, 0)),
        broken("2 heads of 16 do not make up a width of 64", sizes=size(1, 64)),
        broken("3 heads of 16 do not make up a width of 32", sizes=size(3, 3)),
        broken("4 heads of 16 do not make up", sizes=size(3, 4)),
        broken("4294967295 layers have 38654705658 tensors, but the file holds 12", sizes=size(4, 2**32 - 1)),
        broken("2 layers have 21 tensors, but the file holds 12", sizes=size(4, 2)),
        broken("n_layer is 0", sizes=size(4, 0)),
        broken("2 heads of 15 do not make up", sizes=size(5, 15)),
        broken("token 7 of 1048576 bytes", tokens=(*TOKENS[:7], (b"x" * 2**20, 0.0), *TOKENS[8:])),
        broken("the score of token 5 is nan", tokens=(*TOKENS[:5], (b"x", math.nan), *TOKENS[6:])),
        broken("1 layers have 12 tensors, but the file holds 11", tensors=ALL[:-1]),
        broken("tensor tok_embeddings.weight is missing", tensors=(("other", *ALL[0][1:]), *ALL[1:])),
        broken("tensor 'other' is not one that a Llama of 1 layers", tensors=(*ALL, ("other", *ALL[0][1:]))),
        broken("it holds norm.weight twice", tensors=(*ALL, ALL[1])),
        broken("a tensor of 0 dimensions", tensors=(*ALL, ("other", (), 0, b""))),
        broken("a tensor of 3 dimensions", tensors=(*ALL, ("other", (1, 1, 1), 0, bytes(4)))),
        broken("a tensor's name of 5000 bytes", tensors=(*ALL, ("n" * 5000, (1,), 0, bytes(4)))),
        broken("of shape .* cannot be F32", tensors=(*ALL, ("other", (0, 4), 0, b""))),
    ],
)
def test_broken_files_are_named(parts: Parts, said: str, opened: Any) -> None:
    with pytest.raises(SourceError, match=rf"parts\.bin: .*({said})") as error:
        opened(parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [4, 5, 9, 16, 30, 99, 2**32 - 1])
def test_types_that_the_format_has_not_are_named(number: int, opened: Any) -> None:
    with pytest.raises(SourceError, match=rf"output.weight is of type {number}, which ggjt version 3 has not"):
        opened(Parts().changed("output.weight", kind=number))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("layers.0.feed_forward.w2.weight", (2**32 - 1, 2**32 - 1), "ends before the end of layers.0.feed_forward.w2"),
        ("output.weight", (32, 259), r"output.weight has shape \[32, 259\], but the header asks for \[259, 32\]"),
        ("layers.0.attention.wk.weight", (16, 64), r"attention.wk.weight has shape \[16, 64\], but .* \[16, 32\]"),
        ("layers.0.attention.wv.weight", (64, 16), r"attention.wv.weight has shape \[64, 16\]"),
        ("norm.weight", (1, 32), r"norm.weight has shape \[1, 32\], but the header asks for \[32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], said: str, opened: Any) -> None:
    with pytest.raises(SourceError, match=said):
        opened(Parts().changed(name, shape=shape))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (
            (*TOKENS[:3], *((b"x", 0.0) for _ in range(256))),
            "its vocabulary holds 'x' twice, the second time as token 4",
        ),
        ((*TOKENS[:3], *((bytes([255, n]), 0.0) for n in range(256))), "token 3 of its vocabulary is no text"),
    ],
)
def test_a_vocabulary_that_is_no_text_is_named_when_it_is_wanted(tokens: Any, said: str, opened: Any) -> None:
    source = opened(replace(Parts(), tokens=tokens))
    with pytest.raises(SourceError, match=rf"parts\.bin: {said}"):
        source.tokenizer()


def boundaries(data: bytes) -> list[int]:
    """Cuts at every byte of the header, of the first tokens and of every tensor's head, and at some between."""
    heads = [data.index(name.encode()) for name, *_ in ALL]
    near = {at + step for at in [*heads, len(data)] for step in range(-16, 48, 3)}
    return sorted({*range(120), *(at for at in near if 0 <= at < len(data)), *range(0, len(data), 997)})


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = Parts().bytes()
    path = tmp_path / "cut.bin"
    for length in boundaries(data):
        path.write_bytes(data[:length])
        with pytest.raises(SourceError):
            open_source(path)


@contextmanager
def little_memory(bytes: int) -> Iterator[None]:
    """Let this process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.one_of(
                st.integers(0, 2**32 - 1).map(lambda n: struct.pack("<I", n)),
                st.sampled_from([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"]),
                st.binary(min_size=1, max_size=8),
            ),
        ),
        max_size=4,
    ),
    cut=st.none() | st.integers(0, 10**6),
    heads=st.booleans(),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int | None, heads: bool
) -> None:
    data = bytearray(Parts().bytes())
    places = [
        *range(36),
        *(at for name, *_ in ALL for at in range(data.index(name.encode()) - 20, data.index(name.encode()))),
    ]
    for place, patch in changes:
        at = places[place % len(places)] if heads else place % len(data)
        data[at : at + len(patch)] = patch
    path = tmp_path / "damaged.bin"
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    with little_memory(2**30), suppress(SourceError):
        source = open_source(path)
        for name in source.tensors:
            assert source.read(name).shape == source.tensors[name].shape
        source.tokenizer()("the fox")


# -- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ctransformers() -> Iterator[Judge]:
    """One process of ctransformers for the tests of this file."""
    judge = ctransformers_judge()
    yield judge
    judge.close()


def assert_agrees(judge: Judge, source: Source, within: float) -> None:
    tokens = token_matrix(2, 12).tokens.long() % source.config.vocab_size
    ours = logits(source, tokens).log_softmax(-1)
    theirs = ctransformers_logits(judge, source.path, tokens).log_softmax(-1)
    assert theirs.shape == ours.shape
    assert mean_kl(ours, theirs) < within


@pytest.mark.judges
@pytest.mark.parametrize("kind", FILE_TYPES, ids=lambda kind: kind.name)
def test_ctransformers_computes_what_we_do(kind: Kind, ctransformers: Judge, source: Source, tmp_path: Path) -> None:
    assert_agrees(ctransformers, write(tmp_path / "tiny.bin", source, kind), WITHIN[kind])


@pytest.mark.judges
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_ctransformers_reads_k_quants_as_we_do(kind: Kind, ctransformers: Judge, opened: Any) -> None:
    parts = Parts(sizes=(259, 256, 256, 4, 1, 64, 15), tensors=parts_tensors(256, 768, kind=kind))
    assert_agrees(ctransformers, opened(parts), 5e-3)


@pytest.mark.judges
def test_ctransformers_cuts_text_as_we_do(ctransformers: Judge, source: Source, tmp_path: Path) -> None:
    written = write(tmp_path / "tiny.bin", source)
    texts = [
        (text, ids) for text, ids in LLAMA["encoded"] if len(ids) < len(text) + 2
    ]  # it keeps no more ids than that
    assert len(texts) > 10
    for text, ids in texts:  # before GGUF the space in front was the caller's business
        assert ctransformers_tokens(ctransformers, written.path, f" {text}") == ids, text
