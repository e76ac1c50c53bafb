"""llama.cpp's programs and ctransformers against transformers, on files that quantkit did not write."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, permute_heads, random_model, token_matrix, write_gguf
from support import llamacpp
from support.gguf_models import sentencepiece, write_model
from support.judge_env import Judge, JudgeError
from support.llamacpp import (
    ctransformers_judge,
    ctransformers_logits,
    ctransformers_tokens,
    floored,
    imatrix,
    llama_kl,
    llama_logprobs,
    llama_tool,
    mean_kl,
    quantize,
    run,
    scored_rows,
    to_f32,
)
from support.smollm2 import smollm2_gguf
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quantkit.sources import open_source

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over the lazy dog, and where does the answer to the question begin? " * 12
WINDOW = 32
EXACT = 2e-6  # mean KL divergence; measured: 3e-8 by llama_logprobs, below 1e-6 by llama_kl, 3e-7 by ctransformers
N_MULT = 64  # the feed-forward part of a ggjt file is 2/3 of 4 n_embd wide, rounded up to a multiple of this
Kind = gguf.GGMLQuantizationType


def windows(tokenizer: Any, text: str, window: int) -> torch.Tensor:
    """Ids int64 [windows, window] of a text, the rest left out."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return ids[: len(ids) // window * window].reshape(-1, window)


def transformers_model(path: Path) -> Any:
    """A GGUF file in transformers, in float32: weights and config by quantkit's reader."""
    source = open_source(path)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict({name: source.read(name).float() for name in source.tensors}, strict=False)
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def own_logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' log-probabilities where llama-perplexity scores: float32 [windows, rows, vocabulary]."""
    rows = scored_rows(tokens.shape[1])
    return model(input_ids=tokens).logits[:, rows.start : rows.stop].log_softmax(-1)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A random Llama in float32."""
    return random_model("llama", tied=False, dtype=torch.float32, seed=5)


@pytest.fixture(scope="module")
def tiny_f32(tiny: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Q4_0 and Q8_0 blocks make of its weights, in float32; mixed.gguf beside it has the blocks."""
    folder = tmp_path_factory.mktemp("llamacpp")
    write_gguf(folder / "mixed.gguf", tiny, tokenizer)
    return to_f32(folder / "mixed.gguf", folder / "f32.gguf")


@pytest.fixture(scope="module")
def read(tiny_f32: Path) -> Any:
    """The model of `tiny_f32` in transformers."""
    return transformers_model(tiny_f32)


@pytest.fixture(scope="module")
def sentencepiece_gguf(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `tiny` with a SentencePiece vocabulary and a BOS, in float32."""
    whole = json.loads((REPOSITORY / "tests" / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8"))[
        "llama"
    ]
    # Too many for the model: special tokens, bytes, the first joined pieces, then the letters, which end the list.
    kept = {key: whole[key][: VOCABULARY - 46] + whole[key][-46:] for key in ("tokens", "scores", "types")}
    assert whole["tokens"][-46] == "\u2581"
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.gguf"
    write_model(path, tiny, sentencepiece({**whole, **kept}))
    return path


@pytest.fixture(scope="module")
def ctransformers() -> Iterator[Judge]:
    """One process of ctransformers for the tests of this file."""
    judge = ctransformers_judge()
    yield judge
    judge.close()


def test_a_missing_environment_is_said_and_fails_only_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_JUDGES", str(tmp_path))
    monkeypatch.delenv("QUANTKIT_REQUIRE_JUDGES", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"llama\.cpp's environment is missing: run `make judges`"):
        llama_tool("llama-quantize")
    monkeypatch.setenv("QUANTKIT_REQUIRE_JUDGES", "1")
    with pytest.raises(pytest.fail.Exception, match=r"llama\.cpp's environment is missing"):
        ctransformers_judge()


@pytest.mark.parametrize("vocabulary", [6, 7], ids=["even", "odd"])
def test_saved_logprobs_are_read_as_they_are_written(vocabulary: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (3, 8), generator=generator)
    ours = (9 * torch.randn(3, 3, vocabulary, generator=generator)).log_softmax(-1)
    llamacpp._write_saved(tmp_path / "logits", tokens, ours)
    theirs, values = llamacpp._read_saved(tmp_path / "logits")
    assert torch.equal(theirs, tokens)
    assert values.shape == ours.shape
    assert (values - ours.clamp(min=ours.amax(-1, keepdim=True) - 16)).abs().max() < 16 / 65535
    assert mean_kl(floored(ours), values.log_softmax(-1)) < 1e-7


@pytest.mark.judges
def test_llama_cpp_computes_what_transformers_does(
    tiny: Any, tiny_f32: Path, read: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = windows(tokenizer, TEXT, WINDOW)
    theirs = llama_logprobs(tiny_f32, TEXT, tokens)
    assert theirs.shape == (len(tokens), WINDOW // 2 - 1, VOCABULARY)
    assert mean_kl(floored(own_logprobs(read, tokens)), theirs) < EXACT
    # The model from before Q4_0 and Q8_0 is another one: the number can tell.
    assert mean_kl(floored(own_logprobs(tiny, tokens)), theirs) > 100 * EXACT


@pytest.mark.judges
def test_a_bos_takes_the_place_of_the_first_token_of_each_window(tiny: Any, sentencepiece_gguf: Path) -> None:
    tokenizer = open_source(sentencepiece_gguf).tokenizer()
    tokens = torch.tensor(tokenizer(TEXT).input_ids)[: 4 * WINDOW].reshape(4, WINDOW)
    seen = torch.cat([torch.full((4, 1), tokenizer.bos_token_id), tokens[:, 1:]], 1)
    assert torch.equal(seen[0], tokens[0])
    assert not torch.equal(seen, tokens)
    theirs = llama_logprobs(sentencepiece_gguf, TEXT, tokens)
    assert mean_kl(floored(own_logprobs(tiny, seen)), theirs) < EXACT
    assert mean_kl(floored(own_logprobs(tiny, tokens)), theirs) > 100 * EXACT


@pytest.mark.judges
def test_kernels_of_quantized_types_round_the_activations(tiny_f32: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = windows(tokenizer, TEXT, WINDOW)
    exact = llama_logprobs(tiny_f32, TEXT, tokens)
    as_it_is = llama_logprobs(tiny_f32.with_name("mixed.gguf"), TEXT, tokens)
    assert EXACT < mean_kl(exact, as_it_is) < 1e-3


@pytest.mark.judges
def test_text_that_llama_cpp_reads_in_another_way_is_refused(
    tiny_f32: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = windows(tokenizer, TEXT, WINDOW)
    tokens[1, 4] = 7
    with pytest.raises(JudgeError, match=r"other tokens: \d+ at window 1, position 4, where ours has 7"):
        llama_logprobs(tiny_f32, TEXT, tokens)
    with pytest.raises(JudgeError, match=r"saved nothing\. Is the text of two windows of 32 tokens"):
        llama_logprobs(tiny_f32, "too short", tokens)


@pytest.mark.judges
def test_divergence_on_any_ids_is_the_one_we_compute(tiny_f32: Path, read: Any) -> None:
    tokens = token_matrix(8, WINDOW).tokens.long()
    tokens[:, 3] = 2  # a special token, which no text gives
    ours = own_logprobs(read, tokens)
    assert llama_kl(tiny_f32, tokens, ours) < EXACT
    sharper = (2 * ours).log_softmax(-1)
    assert llama_kl(tiny_f32, tokens, sharper) == pytest.approx(mean_kl(sharper, ours), rel=1e-3)
    with pytest.raises(ValueError, match="under 100"):
        llama_kl(tiny_f32, tokens[:2], ours[:2])


@pytest.mark.judges
def test_to_f32_gives_the_weights_that_the_blocks_stand_for(tiny_f32: Path) -> None:
    blocks = {t.name: t for t in gguf.GGUFReader(tiny_f32.with_name("mixed.gguf")).tensors}
    read = gguf.GGUFReader(tiny_f32).tensors
    assert {t.tensor_type for t in blocks.values()} == {Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0}
    assert blocks.keys() == {t.name for t in read}
    for tensor in read:
        block = blocks[tensor.name]
        assert tensor.tensor_type == Kind.F32
        assert np.array_equal(tensor.data, gguf.quants.dequantize(block.data, block.tensor_type)), tensor.name


@pytest.mark.judges
def test_the_importance_matrix_is_the_mean_square_of_each_input(
    tiny_f32: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read = transformers_model(tiny_f32)  # its own, for the hooks
    tokens = windows(tokenizer, TEXT, WINDOW)
    inputs = {}
    for stored, name in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}.items():
        read.get_submodule(f"model.layers.1.{name}").register_forward_pre_hook(
            lambda module, x, stored=stored: inputs.__setitem__(f"blk.1.{stored}.weight", x[0].flatten(0, 1))
        )
    with torch.inference_mode():
        read(input_ids=tokens)

    made = imatrix(tiny_f32, tmp_path / "imatrix.gguf", TEXT, WINDOW)
    entries = {t.name: t.data for t in gguf.GGUFReader(made).tensors}
    assert "output.weight.in_sum2" not in entries
    for name, x in inputs.items():
        mean = entries[f"{name}.in_sum2"].ravel() / entries[f"{name}.counts"].ravel()
        np.testing.assert_allclose(mean, x.square().mean(0).numpy(), rtol=1e-3)

    plain = quantize(tiny_f32, tmp_path / "plain.gguf", "Q4_0", "--pure")
    weighted = quantize(tiny_f32, tmp_path / "weighted.gguf", "Q4_0", "--pure", imatrix=made)
    bytes_of = [{t.name: bytes(t.data) for t in gguf.GGUFReader(path).tensors} for path in (plain, weighted)]
    assert bytes_of[0]["blk.1.ffn_down.weight"] != bytes_of[1]["blk.1.ffn_down.weight"]
    assert bytes_of[0]["output.weight"] == bytes_of[1]["output.weight"]


@pytest.mark.judges
def test_a_program_that_fails_says_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(JudgeError, match=r"llama-quantize ended with 1: (.|\n)*failed to quantize"):
        quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf", "Q8_0")


@pytest.mark.judges
def test_split_files_are_read_as_one(tiny_f32: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run("llama-gguf-split", "--split", "--split-max-tensors", "8", tiny_f32, tmp_path / "part")
    first = sorted(tmp_path.glob("part-00001-of-*.gguf"))
    tokens = windows(tokenizer, TEXT, WINDOW)
    assert torch.equal(llama_logprobs(first[0], TEXT, tokens), llama_logprobs(tiny_f32, TEXT, tokens))


@pytest.mark.judges
def test_ctransformers_reads_a_sentencepiece_gguf(ctransformers: Judge, tiny: Any, sentencepiece_gguf: Path) -> None:
    assert_ctransformers_agrees(ctransformers, sentencepiece_gguf, tiny)
    ids = open_source(sentencepiece_gguf).tokenizer()(TEXT, add_special_tokens=False).input_ids
    assert ctransformers_tokens(ctransformers, sentencepiece_gguf, TEXT) == ids


@pytest.mark.judges
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_ctransformers_reads_ggjt(ctransformers: Judge, kind: Kind, tmp_path: Path) -> None:
    # ggjt says nothing of grouped keys and values or of the norms' epsilon, and of the inner width only `N_MULT`.
    sizes = {"num_key_value_heads": 4, "rms_norm_eps": 5e-6, "intermediate_size": 192}
    model = random_model("llama", tied=False, dtype=torch.float32, seed=6, **sizes)
    write_ggjt(tmp_path / "tiny.bin", model, kind)
    within = EXACT if kind == Kind.F32 else 5e-3  # Q8_0: the weights are rounded, and the activations in its kernel
    assert_ctransformers_agrees(ctransformers, tmp_path / "tiny.bin", model, within)


@pytest.mark.judges
def test_ctransformers_says_no_to_a_byte_level_gguf(ctransformers: Judge, tiny_f32: Path) -> None:
    with pytest.raises(JudgeError, match="Failed to create LLM"):
        ctransformers_logits(ctransformers, tiny_f32, torch.tensor([[1, 2, 3]]))


@pytest.mark.e2e
@pytest.mark.judges
def test_smollm2_by_llama_cpp_and_by_transformers(tmp_path: Path) -> None:
    source = smollm2_gguf()
    model = transformers_model(source)
    tokenizer = open_source(source).tokenizer()
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")[:4000]
    tokens = windows(tokenizer, text, 256)[:2]
    theirs = llama_logprobs(to_f32(source, tmp_path / "f32.gguf"), text, tokens)
    assert mean_kl(floored(own_logprobs(model, tokens)), theirs) < EXACT
    assert mean_kl(floored(own_logprobs(model, tokens)), llama_logprobs(source, text, tokens)) < 5e-3


def assert_ctransformers_agrees(judge: Judge, path: Path, model: Any, within: float = EXACT) -> None:
    tokens = token_matrix(2, 12).tokens.long()
    with torch.inference_mode():
        ours = model(input_ids=tokens).logits.log_softmax(-1)
    theirs = ctransformers_logits(judge, path, tokens).log_softmax(-1)
    assert theirs.shape == ours.shape
    assert mean_kl(ours, theirs) < within
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def write_ggjt(path: Path, model: Any, kind: Kind) -> None:
    """A Llama as a ggjt v3 file, its tokens named by their numbers."""
    config = model.config
    rotated = config.hidden_size // config.num_attention_heads
    assert -(-(2 * 4 * config.hidden_size // 3) // N_MULT) * N_MULT == config.intermediate_size
    sizes = [config.vocab_size, config.hidden_size, N_MULT, config.num_attention_heads]
    data = struct.pack("<2I7I", 0x67676A74, 3, *sizes, config.num_hidden_layers, rotated, 0 if kind == Kind.F32 else 7)
    for token in range(config.vocab_size):
        data += struct.pack("<I", len(str(token))) + str(token).encode() + struct.pack("<f", 0.0)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permute_heads(values, config.num_attention_heads)
        stored = Kind.F32 if values.ndim == 1 or "embed" in name else kind
        label = ggjt_name(name).encode()
        data += struct.pack(f"<3I{values.ndim}I", values.ndim, len(label), stored, *reversed(values.shape)) + label
        data += bytes(-len(data) % 32) + gguf.quants.quantize(values, stored).tobytes()
    path.write_bytes(data)


def ggjt_name(name: str) -> str:
    """The name of a transformers Llama's tensor in a ggjt file."""
    renamed = {
        **{"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers"},
        **{f"self_attn.{part}_proj": f"attention.w{part}" for part in "qkvo"},
        **{"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"},
        **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    }
    for theirs, ggjt in renamed.items():
        name = name.replace(theirs, ggjt)
    return name
