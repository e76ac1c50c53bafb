"""GGUF files of every architecture that is read: weights, config, tokenizer, parts, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, SPECIAL, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_models import Quantization, byte_level, sentencepiece, write_model
from support.streamed import streamed_logits
from support.tolerance import forward
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.containers.gguf.config import _llama3 as rope_of_factors
from quantkit.containers.gguf.config import llama3_factors
from quantkit.containers.gguf.cuts import CUTS, NOT_BYTES
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.pretokenizers import NAMES
from quantkit.containers.gguf.read import GgufSource
from quantkit.errors import SourceError
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

SENTENCEPIECE = json.loads(
    (Path(__file__).parents[1] / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8")
)
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
    "partial_rotary_factor": 0.75,
    "long_factor": [1.0, 1.5, 2.25, 3.0, 4.0, 4.5],
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
}
# name -> family, config. A case's config is one that the file must say in full.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-head-width": ("llama", {"head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "gemma2": ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "layer_types": None, "sliding_window": 8}),
    "gemma3-linear-rope": (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8, "original_max_position_embeddings": 256}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 16,
            "sliding_window": None,
        },
    ),
}
CPU = torch.device("cpu")
# What a published config says a second time, for readers before transformers 5.
OLD_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def tiny(family: str, tied: bool = False, vocab_size: int | None = None, **config: Any) -> Any:
    model = random_model(family, tied=tied, dtype=torch.float32, seed=0, **config)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.fixture
def write(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """write(model, **options of write_model) -> file, with the tests' tokenizer as a Qwen one."""

    def written(model: Any, name: str = "tiny.gguf", **options: Any) -> Path:
        write_model(tmp_path / name, model, byte_level(tokenizer, "qwen2"), **options)
        return tmp_path / name

    return written


# -- weights and config -------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights_config_and_logits_are_the_models_own(
    case: str, tied: bool, write: Any, tiny_tokens: TokenMatrix
) -> None:
    family, config = CASES[case]
    if family == "gemma2" and not tied:
        pytest.skip("llama.cpp knows no Gemma 2 with an output matrix of its own")
    model = tiny(family, tied=tied, **config)
    source = open_source(write(model))
    state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    assert set(source.tensors) == set(state)
    for name, info in source.tensors.items():
        assert info.shape == tuple(state[name].shape)
        # Gemma's norms are stored with 1 added: what that rounds away in float32 is all that may differ.
        torch.testing.assert_close(source.read(name), state[name], rtol=0, atol=2e-7)
    ours, theirs = source.config.to_dict(), model.config.to_dict()
    for key in ("dtype", "architectures", "transformers_version", "_sliding_window_pattern"):
        ours.pop(key, None), theirs.pop(key, None)
    if family in ("phi3", "qwen2"):
        theirs.pop("head_dim")  # the tests' own; these configs have none
    assert ours == theirs
    logits = streamed_logits(ModelStream(source, CPU, torch.float32), [tiny_tokens.tokens[:2]])[0]
    expected = logits_of(model, tiny_tokens.tokens[:2])
    torch.testing.assert_close(logits, expected, **forward(expected))


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_quantized_files_read_as_transformers_reads_them(case: str, write: Any) -> None:
    family, config = CASES[case]
    # transformers takes every Qwen3 head to be 128 wide.
    wide = {"head_dim": 128} if family == "qwen3" else {}
    model = tiny(family, tied=True, **{**config, **wide})
    path = write(model, kind=Quantization.Q8_0)
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    source = open_source(path)
    assert set(source.tensors) == set(state)
    assert {info.stored_as for info in source.tensors.values()} == {"F32", "Q8_0"}
    for name in source.tensors:
        torch.testing.assert_close(source.read(name), state[name], rtol=0, atol=0)


def dequantized(source: Any, name: str) -> torch.Tensor:
    """A tensor's values from its bytes."""
    kind, rows = source.blocks(name)
    values = gguf.quants.dequantize(rows, kind).reshape(source.tensors[name].shape)
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("kind", [Quantization.F32, Quantization.F16, Quantization.BF16, Quantization.Q4_1])
@pytest.mark.parametrize("case", ["llama", "llama-biases", "qwen2", "phi3"])
def test_blocks_are_the_stored_bytes_of_what_is_read(case: str, kind: Quantization, write: Any) -> None:
    family, config = CASES[case]
    source = open_source(write(tiny(family, **config), kind=kind))
    for name, info in source.tensors.items():
        stored, rows = source.blocks(name)
        assert (stored.name, rows.dtype, rows.nbytes) == (info.stored_as, np.uint8, info.bytes), name
        assert rows.shape[0] == (info.shape[0] if len(info.shape) == 2 else 1)
        assert torch.equal(dequantized(source, name), source.read(name).float()), name


def test_norms_that_are_stored_otherwise_have_no_blocks(write: Any) -> None:
    source = open_source(write(tiny("gemma2", tied=True), kind=Quantization.Q8_0))
    assert torch.equal(dequantized(source, "model.embed_tokens.weight"), source.read("model.embed_tokens.weight"))
    with pytest.raises(SourceError, match=r"the bytes of model\.norm\.weight are not the published tensor's"):
        source.blocks("model.norm.weight")


@pytest.mark.parametrize("window", [None, 8])
def test_a_mistral_is_a_llama_unless_it_has_a_window(window: int | None, write: Any, tiny_tokens: TokenMatrix) -> None:
    model = tiny("mistral", sliding_window=window)
    path = write(model, keys={"attention.sliding_window": window} if window else None)
    source = open_source(path)
    assert source.config.model_type == ("mistral" if window else "llama")
    logits = streamed_logits(ModelStream(source, CPU, torch.float32), [tiny_tokens.tokens[:2]])[0]
    expected = logits_of(model, tiny_tokens.tokens[:2])
    torch.testing.assert_close(logits, expected, **forward(expected))


@pytest.mark.parametrize(
    ("family", "layers", "scalar"), [("gemma2", 26, 16), ("gemma2", 46, 8), ("gemma3_text", 34, 16)]
)
def test_gemma_attention_scale_of_the_widest_models(family: str, layers: int, scalar: int, write: Any) -> None:
    model = tiny(
        family,
        tied=True,
        num_hidden_layers=layers,
        layer_types=None,
        num_attention_heads=8,
        head_dim=16,
        intermediate_size=32,
    )
    assert open_source(write(model)).config.query_pre_attn_scalar == scalar


@pytest.mark.parametrize(
    ("pattern", "full"), [(None, [5]), (3, [2, 5]), ([True, False, True, True, False, True], [1, 4])]
)
def test_gemma_window_pattern_of_the_file(pattern: Any, full: list[int], write: Any) -> None:
    model = tiny("gemma3_text", num_hidden_layers=6, layer_types=None)
    path = write(model, keys={} if pattern is None else {"attention.sliding_window_pattern": pattern})
    types = open_source(path).config.layer_types
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == full


def test_variants_keep_bfloat16_where_float16_would_overflow(write: Any) -> None:
    assert (
        open_source(write(tiny("gemma3_text", num_hidden_layers=6, layer_types=None), "g.gguf")).dtype == torch.bfloat16
    )
    assert open_source(write(tiny("qwen2"), "q.gguf")).dtype == torch.float16
    assert open_source(write(tiny("qwen2"), "b.gguf", kind=Quantization.BF16)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "qwen3"])
def test_a_checkpoint_of_a_gguf_file_is_one_that_transformers_loads(
    family: str, write: Any, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    path = write(
        tiny(family, sliding_window=8, **({"num_hidden_layers": 6, "layer_types": None} if "gemma" in family else {}))
    )
    quantkit.gptq(path, tmp_path / "out", group_size=32, calibration=tiny_tokens, evaluate=False)
    source, written = open_source(path), open_source(tmp_path / "out")
    assert written.dtype == source.dtype
    ours, theirs = written.config.to_dict(), source.config.to_dict()
    for key in ("dtype", "architectures", "quantization_config", "_name_or_path", *OLD_ROPE):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
    text = "the sea, 2024:\n\n  cafe\u0301"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == source.tokenizer()(text).input_ids


# -- tokenizers ---------------------------------------------------------------------------------------------------

TEXTS = [
    "the quick brown fox",
    "  two spaces in front, and two after  ",
    "a  b   c    d\u00a0e",
    "tabs\tand\r\nnew\n\n\nlines ",
    "1234567890, 3.14159, in 2024",
    "caf\u00e9, cafe\u0301, \u00fcber, \u65e5\u672c\u8a9e, \U0001f600",
    "def f(x):\n    return x['a'] + 1  # it's, IT'S, we'll\n",
    "camelCaseWords HTTPServer and/or\n/path",
    "<|im_start|>user\nhello <|im_end|>  <pad>",
    "",
    "zebra",
]
# As the tokenizer.json files of the models that these names stand for have them, in one piece.
SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def original_tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as the family's own tokenizer.json has it, trained on the texts that it is tried on."""
    backend = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    byte_level_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    if pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level_step])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level_step])
    else:
        backend.pre_tokenizer = byte_level_step
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    # The trainer sees the texts uncut by any of these, so that a wrong cut has merges to show itself with.
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([text for text in TEXTS[:-1] for _ in range(2)], trainer)
    learned = json.loads(learner.to_str())["model"]
    # One word that no merges make: only a vocabulary that is searched for whole words first gives its id.
    backend.model = models.BPE(
        {**learned["vocab"], "zebra": len(learned["vocab"])},
        [tuple(pair) for pair in learned["merges"]],
        ignore_merges=pre in ("llama-bpe", "tekken"),
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )


@pytest.mark.parametrize("pre", [*SPLITS, "smollm", "gpt-2"])
def test_byte_level_ids_are_those_of_the_original(pre: str, tmp_path: Path) -> None:
    original = original_tokenizer(pre)
    original.chat_template = CHAT_TEMPLATE
    write_model(tmp_path / "tiny.gguf", tiny("qwen2", vocab_size=len(original)), byte_level(original, pre))
    ours = open_source(tmp_path / "tiny.gguf").tokenizer()
    for text in TEXTS:
        ids = original(text).input_ids
        assert ours(text).input_ids == ids, text
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<pad>")
    assert ours.chat_template == CHAT_TEMPLATE
    assert ours.decode(original("<|im_start|>hello").input_ids, skip_special_tokens=True) == "hello"


def test_the_cuts_differ_where_it_matters() -> None:
    """What the test above rests on: each name cuts these texts into other ids than every other name."""
    names = [*SPLITS, "smollm", "gpt-2"]
    ids = {pre: [tuple(original_tokenizer(pre)(text).input_ids) for text in TEXTS] for pre in names}
    for one in names:
        assert [other for other in names if ids[other] == ids[one]] == [one]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepiece_ids_are_sentencepieces_own(name: str, tmp_path: Path) -> None:
    vocabulary = SENTENCEPIECE[name]
    family, config = CASES["gemma3" if name == "gemma" else "llama"]
    model = tiny(family, vocab_size=len(vocabulary["tokens"]), **config)
    write_model(tmp_path / "tiny.gguf", model, sentencepiece(vocabulary))
    tokenizer = open_source(tmp_path / "tiny.gguf").tokenizer()
    for text, ids in vocabulary["encoded"]:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer(text).input_ids == [vocabulary["ids"]["bos"], *ids]
        assert tokenizer.decode(ids) == text


def test_special_tokens_within_sentencepiece_text(tmp_path: Path) -> None:
    vocabulary = SENTENCEPIECE["llama"]
    the = vocabulary["tokens"].index("\u2581the")
    for family, stripped in (("llama", False), ("phi3", True)):
        model = tiny(family, vocab_size=len(vocabulary["tokens"]))
        write_model(tmp_path / f"{family}.gguf", model, sentencepiece(vocabulary))
        tokenizer = open_source(tmp_path / f"{family}.gguf").tokenizer()
        plain, spaced = (tokenizer(text).input_ids for text in ("the</s>the", "the</s>\n the"))
        assert plain == [1, the, vocabulary["ids"]["eos"], the]
        assert (spaced == plain) is stripped  # Phi-3's special tokens eat the white space after them


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_a_bos_where_the_file_or_the_family_says_so(
    pre: str, flag: bool | None, adds: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.gguf", tiny("qwen2"), byte_level(tokenizer, pre, add_bos=flag))
    ids = open_source(tmp_path / "tiny.gguf").tokenizer()("the sea").input_ids
    assert (ids[0] == tokenizer.bos_token_id) is adds


@pytest.mark.parametrize(
    ("pre", "said"),
    [
        (None, "is missing"),
        ("default", "'default' is not known"),
        ("another", "'another' is not known"),
        ("gemma4", "'gemma4': only vocabularies of bytes"),
    ],
)
def test_an_unknown_pre_tokenizer_is_no_guess(
    pre: str | None, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.gguf", tiny("llama"), byte_level(tokenizer, pre))
    with pytest.raises(SourceError, match=f"tiny.gguf: tokenizer.ggml.pre {said}") as error:
        open_source(tmp_path / "tiny.gguf").tokenizer()
    assert "convert the model again" in str(error.value)


def test_every_name_that_is_written_can_be_read() -> None:
    assert CUTS.keys() | NOT_BYTES == NAMES
    assert not CUTS.keys() & NOT_BYTES


# Written down by hand: what the patterns of llama.cpp say.
WORDS = {
    "falcon": ("I paid $12345, ok", ["I", "\u0120paid", "\u0120", "$", "123", "45", ",", "\u0120ok"]),
    "deepseek-v3": ("a.b 12345\n x", ["a", ".b", "\u0120", "123", "45", "\u010a", "\u0120x"]),
    "deepseek-coder": ("hi, you 42", ["hi", ",", "\u0120you", "\u0120", "4", "2"]),
    "viking": ("so (a) 12.", ["so", "\u0120(", "a", ")", "\u0120", "1", "2", "."]),
    "afmoe": ("x1234567", ["x", "1", "234", "567"]),
    "superbpe": ("by the way 1234567", ["by\u0120the\u0120way\u0120", "1", "234", "567"]),
    "tiny_aya": ("a 12345", ["a", "\u0120", "12", "345"]),
    "kimi-k2": ("Hello's \u4f60\u597dab 1234", ["Hello's", "\u0120", "\u4f60\u597d", "ab", "\u0120", "123", "4"]),
    "glm4": ("it's 1234", ["it", "'s", "\u0120", "123", "4"]),
    "seed-coder": ("x =\n\ny", ["x", "\u0120=", "\u010a\u010a", "y"]),
    "bloom": ("so, a b.", ["so", ",", "\u0120a", "\u0120b", "."]),
    "laguna": ("a \n b", ["a", "\u0120", "\u010a", "\u0120b"]),
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_those_of_the_name(pre: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", tiny("qwen2"), byte_level(tokenizer, pre))
    backend: Any = open_source(tmp_path / "tiny.gguf").tokenizer()
    text, words = WORDS[pre]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected = [alphabet.pre_tokenize_str(word)[0][0] if ord(max(word)) > 0x2000 else word for word in words]
    found = [word for word, _ in backend.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == expected


@pytest.mark.parametrize("pre", sorted(CUTS))
@settings(max_examples=8, deadline=None)
@given(text=st.text(max_size=30) | st.text(" \n\t'sReabAB019./!\u4f60\u3042\u0431", max_size=30))
def test_no_cut_loses_a_byte(pre: str, text: str) -> None:
    pieces = [text]
    for pattern in CUTS[pre].patterns:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        pieces = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("kind", "said"), [("bert", "model 'bert' is not"), ("gpt2", "no vocabulary"), ("llama", "no vocabulary")]
)
def test_a_vocabulary_that_cannot_be_read(kind: str, said: str, tmp_path: Path) -> None:
    def vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        if kind == "bert":
            writer.add_token_list(["a"])

    write_model(tmp_path / "tiny.gguf", tiny("llama"), vocabulary)
    with pytest.raises(SourceError, match=said):
        open_source(tmp_path / "tiny.gguf").tokenizer()


def test_an_answers_end_is_in_the_generation_config(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def vocabulary(writer: gguf.GGUFWriter) -> None:
        byte_level(tokenizer, "qwen2")(writer)
        writer.add_eot_token_id(0)

    write_model(tmp_path / "tiny.gguf", tiny("qwen2"), vocabulary)
    source = open_source(tmp_path / "tiny.gguf")
    source.copy_companions(tmp_path)
    assert source.config.eos_token_id == 2
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]


# -- parts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(write: Any) -> list[Path]:
    path = write(tiny("qwen3"), max_tensors=10)
    return sorted(path.parent.glob("tiny-*.gguf"))


def test_any_part_names_the_whole_model(parts: list[Path]) -> None:
    assert len(parts) == 3
    state = tiny("qwen3").state_dict()
    for part in parts:
        source = open_source(part)
        assert (source.label, list(source.weight_files())) == ("tiny", parts)
        assert set(source.tensors) == set(state)
        assert all(torch.equal(source.read(name), state[name]) for name in source.tensors)
        assert source.tokenizer()("the sea").input_ids


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(SourceError, match=r"tiny-00002-of-00003\.gguf: this part of tiny is missing"):
        open_source(parts[0])


def test_a_part_under_another_parts_name_is_refused(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        SourceError, match=r"00002-of-00003\.gguf: its keys call it part 3 of 3, and its name part 2 of 3"
    ):
        open_source(parts[0])


def test_a_part_under_a_name_of_its_own_is_refused(parts: list[Path]) -> None:
    alone = parts[0].with_name("alone.gguf")
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(SourceError, match=r"alone\.gguf: its keys call it part 1 of 3, and its name part 1 of 1"):
        open_source(alone)


def test_there_is_no_part_0_and_none_after_the_last(parts: list[Path]) -> None:
    for name in ("tiny-00000-of-00000.gguf", "tiny-00004-of-00003.gguf"):
        parts[0].with_name(name).write_bytes(parts[0].read_bytes())
        with pytest.raises(SourceError, match=r"there is no part \d of \d; give the parts their published names"):
            open_source(parts[0].with_name(name))


def test_parts_of_models_of_two_architectures_do_not_make_one(parts: list[Path]) -> None:
    """llama.cpp's own splitter leaves the architecture out of the later parts; one that says it must say the same."""
    first = bytearray(parts[0].read_bytes())
    at = first.index(b"split.no") + len(b"split.no") + 4
    first[at : at + 2] = struct.pack("<H", 1)
    parts[1].write_bytes(first.replace(b"qwen3", b"qwen2"))
    with pytest.raises(SourceError, match=r"00002-of-00003\.gguf: a part of another architecture than the first"):
        open_source(parts[0])


def test_parts_that_hold_a_tensor_twice_do_not_make_a_model(parts: list[Path]) -> None:
    first = bytearray(parts[0].read_bytes())
    at = first.index(b"split.no") + len(b"split.no") + 4
    first[at : at + 2] = struct.pack("<H", 1)
    parts[1].write_bytes(first)
    with pytest.raises(SourceError, match="two of its parts hold the same tensor"):
        open_source(parts[0])


def test_parts_that_hold_other_counts_than_said_do_not_make_a_model(parts: list[Path]) -> None:
    data = bytearray(parts[0].read_bytes())
    at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    data[at : at + 4] = struct.pack("<I", 99)
    parts[0].write_bytes(data)
    with pytest.raises(SourceError, match=r"hold \d+ tensors, not 99"):
        open_source(parts[0])


# -- bad files ----------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(write: Any) -> None:
    path = write(tiny("gemma3_text", num_hidden_layers=6, layer_types=None), leave_out="blk.3.ffn_down.weight")
    with pytest.raises(SourceError, match=r"tensor model\.layers\.3\.mlp\.down_proj\.weight is missing"):
        ModelStream(open_source(path), CPU, torch.float32)
    path = write(tiny("llama"), "e.gguf", leave_out="token_embd.weight")
    with pytest.raises(SourceError, match=r"e\.gguf: tensor token_embd\.weight is missing"):
        open_source(path)


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({}, {"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}, "tensor blk.0.ffn_gate_inp.weight is not one"),
        ({}, {"blk.1.attn_q_norm.weight": np.ones(16)}, "tensor blk.1.attn_q_norm.weight is not one"),
        ({}, {"rope_freqs.weight": np.linspace(1, 3, 8)}, "rope_freqs.weight does not hold Llama 3's scaling"),
        ({"expert_count": 8}, {}, "key llama.expert_used_count is missing"),
        ({"attention.scale": 0.5}, {}, "llama.attention.scale is 0.5"),
        ({"rope.scaling.type": "other"}, {}, "llama.rope.scaling.type 'other'"),
        ({"rope.scaling.type": "yarn"}, {}, "key llama.rope.scaling.factor is missing"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    keys: dict[str, Any], tensors: dict[str, np.ndarray], said: str, write: Any
) -> None:
    path = write(tiny("llama"), keys=keys, tensors=tensors)
    with pytest.raises(SourceError, match=said) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}: ")


def test_an_unknown_architecture_is_told_where_the_known_ones_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"'bloom' is not supported; docs/ggml.md lists the \d\d that are$"):
        open_source(tmp_path / "other.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_model(path, tiny("llama"), byte_level(tokenizer, "gpt-2"), kind=Quantization.Q8_0)
    return path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 0.9999))
def test_a_file_cut_anywhere_is_one_clear_error(part: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(SourceError, match=r"cut\.gguf: broken or cut short"):
        GgufSource(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, 4000), byte=st.integers(0, 255))
def test_a_damaged_header_never_ends_in_another_error(at: int, byte: int, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    with suppress(SourceError):  # anything else fails the test; a file that is still whole may be read
        GgufSource(path).tokenizer()


KEY, TENSOR = (b"k", 4, struct.pack("<I", 7)), (b"t", (32,), 0, 0)


def raw(
    keys: Sequence[tuple[bytes, int, bytes]] = (KEY,),
    tensors: Sequence[tuple[bytes, tuple[int, ...], int, int]] = (TENSOR,),
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file by its bytes: keys as (name, type, value), tensors as (name, dimensions, type, offset)."""
    found = counts or (len(tensors), len(keys))
    data = b"GGUF" + struct.pack("<IQQ", 3, *found)
    for name, kind, value in keys:
        data += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        head = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        data += struct.pack("<Q", len(name)) + name + head
    return data + bytes(-len(data) % 32) + bytes(1024)


def alignment(value: int, kind: int = 4) -> tuple[bytes, int, bytes]:
    return b"general.alignment", kind, struct.pack("<I", value)


def text(length: int) -> bytes:
    return struct.pack("<Q", length) + b"abc"


HUGE = 2**63
BROKEN = {
    "more keys than room": ("no room for 1000 keys and 1", raw(counts=(1, 1000))),
    "more keys than any memory": (f"no room for {HUGE} keys", raw(counts=(1, HUGE))),
    "more tensors than any memory": (f"no room for 1 keys and {HUGE} tensors", raw(counts=(HUGE, 1))),
    "a key longer than the file": ("a key of 5000 bytes", raw([(b"k" * 5000, 4, bytes(4))])),
    "a key that is no text": ("a key is no text: b'k.xff'", raw([(b"k\xff", 4, bytes(4))])),
    "a key of two lines": ("a key is no text", raw([(b"k\nl", 4, bytes(4))])),
    "a key twice": ("it holds key k twice", raw([KEY, KEY])),
    "an unknown type of value": ("the value of k is of type 13, which the format has not", raw([(b"k", 13, bytes(4))])),
    "an array of unknown values": (
        "the values of k are of type 13",
        raw([(b"k", 9, struct.pack("<IQ", 13, 1) + bytes(8))]),
    ),
    "a string longer than the file": ("ends within its header", raw([(b"k", 8, text(10**6))])),
    "a string longer than any memory": ("ends within its header", raw([(b"k", 8, text(HUGE))])),
    "an array longer than the file": ("ends within its header", raw([(b"k", 9, struct.pack("<IQ", 10, HUGE // 8))])),
    "strings that have no room": (
        "no room for the 1152921504606846976 strings of k",
        raw([(b"k", 9, struct.pack("<IQ", 8, HUGE // 8))]),
    ),
    "a tensor's name of many bytes": ("a tensor's name of 64 bytes", raw(tensors=[(b"t" * 64, (32,), 0, 0)])),
    "a tensor's name that is no text": ("a tensor's name is no text", raw(tensors=[(b"\xc3", (32,), 0, 0)])),
    "a tensor without a name": ("a tensor's name is no text", raw(tensors=[(b"", (32,), 0, 0)])),
    "a tensor twice": ("it holds t twice", raw(tensors=[TENSOR, TENSOR])),
    "a tensor without dimensions": ("t has 0 dimensions", raw(tensors=[(b"t", (), 0, 0)])),
    "a tensor of many dimensions": ("t has 5 dimensions", raw(tensors=[(b"t", (1, 1, 1, 1, 32), 0, 0)])),
    "a dimension of nothing": (r"t of shape \[32, 0\] cannot be F32", raw(tensors=[(b"t", (0, 32), 0, 0)])),
    "a width that no block divides": (r"t of shape \[33\] cannot be Q8_0", raw(tensors=[(b"t", (33,), 8, 0)])),
    "dimensions beyond all numbers": ("ends before the end of t", raw(tensors=[(b"t", (HUGE, HUGE, 2, 2), 0, 0)])),
    "dimensions that come round to nothing": ("ends before the end of t", raw(tensors=[(b"t", (2**32, 2**32), 0, 0)])),
    "an unknown type of tensor": ("t is of type 999, which is not known", raw(tensors=[(b"t", (32,), 999, 0)])),
    "a type that was given up": ("t is of type 4, which is not known", raw(tensors=[(b"t", (32,), 4, 0)])),
    "an offset beyond the file": ("ends before the end of t", raw(tensors=[(b"t", (32,), 0, 2**20)])),
    "an offset beyond all numbers": ("ends before the end of t", raw(tensors=[(b"t", (32,), 0, 2**64 - 32)])),
    "an offset that is not aligned": ("the offset of t is no multiple of 32", raw(tensors=[(b"t", (32,), 0, 8)])),
    "tensors that overlap": ("t and u overlap", raw(tensors=[TENSOR, (b"u", (32,), 0, 96)])),
    "tensors in one place": ("t and u overlap", raw(tensors=[TENSOR, (b"u", (32,), 0, 0)])),
    "no alignment": ("general.alignment is 0, no power of two", raw([alignment(0)])),
    "an odd alignment": ("general.alignment is 24, no power of two", raw([alignment(24)])),
    "an alignment that is a string": ("general.alignment is abc, no power", raw([(b"general.alignment", 8, text(3))])),
    "an alignment beyond the file": ("ends before the end of t", raw([alignment(2**31)])),
    "arrays of arrays": ("k is an array of arrays", raw([(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(12))])),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_named(case: str, tmp_path: Path) -> None:
    said, data = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"broken\.gguf: broken or cut short GGUF file \(.*{said}") as error:
        open_source(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    """What the damages above are done to."""
    (tmp_path / "raw.gguf").write_bytes(raw())
    file = GgufFile(tmp_path / "raw.gguf")
    assert file.keys == {"k": 7}
    assert file.values("t").tolist() == [0.0] * 32


@pytest.mark.parametrize("length", [*range(4, 129), 200, 223])
def test_a_header_cut_at_any_byte_is_one_clear_error(length: int, tmp_path: Path) -> None:
    data = raw()
    assert len(data) == 96 + 1024
    (tmp_path / "cut.gguf").write_bytes(data[:length])
    with pytest.raises(SourceError, match=r"cut\.gguf: broken or cut short"):
        open_source(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"block_count": "two"}, "llama.block_count is 'two', no number"),
        ({"block_count": -1}, "llama.block_count is '-1', no number"),
        ({"block_count": 0}, "llama.block_count is 0"),
        ({"block_count": 2**31 - 1}, "llama.block_count is 2147483647, but the file holds 2 blocks"),
        ({"block_count": 2**32 - 1}, "llama.block_count is '4294967295', no number"),
        ({"block_count": 1}, "llama.block_count is 1, but the file holds 2 blocks"),
        ({"block_count": 2.0}, "llama.block_count is '2.0', no number"),
        ({"block_count": None}, "key llama.block_count is missing"),
        ({"embedding_length": 2**31 - 1}, r"has shape \[\d+, 64\], but the file's keys ask for \[\d+, 2147483647\]"),
        ({"feed_forward_length": 95}, r"ffn_gate.weight has shape \[96, 64\], but .* \[95, 64\]"),
        ({"feed_forward_length": [96, 95]}, "llama.feed_forward_length differs between layers"),
        ({"attention.head_count": 8}, r"attn_q.weight has shape \[64, 64\], but the file's keys ask for \[128, 64\]"),
        ({"attention.head_count_kv": 3}, "4 heads of 16 cannot share 48 rows of keys"),
        ({"attention.head_count_kv": 1}, r"attn_k.weight has shape \[32, 64\], but .* \[16, 64\]"),
        ({"attention.key_length": 15}, "4 heads of 15 cannot share"),
        ({"attention.key_length": "wide"}, "llama.attention.key_length is 'wide'"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon is 'nan', no number"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "layer_norm_rms_epsilon is 'small', no number"),
        ({"rope.freq_base": 0.0}, "llama.rope turns 16 of 16 dimensions with a base of 0.0"),
        ({"rope.freq_base": [1.0, 2.0]}, "llama.rope.freq_base differs between layers"),
        ({"rope.dimension_count": 2**31 - 1}, "llama.rope turns 2147483647 of 16 dimensions"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": math.inf}, "rope.scaling.factor is 'inf', no number"),
        ({"attention.sliding_window": "wide"}, "llama.attention.sliding_window is 'wide'"),
        ({"tokenizer.ggml.bos_token_id": 320}, "bos_token_id is '320', but there are 320 tokens"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id is '-1', but there are 320 tokens"),
        ({"tokenizer.ggml.padding_token_id": "last"}, "padding_token_id is 'last', but there are 320 tokens"),
        ({"general.architecture": "l" * 10**6}, "GGUF architecture 'l+' is not supported"),
    ],
    ids=str,
)
def test_keys_that_no_model_has_are_named(keys: dict[str, Any], said: str, write: Any) -> None:
    path = write(tiny("llama", num_key_value_heads=2), keys=keys)
    with pytest.raises(SourceError, match=rf"tiny\.gguf: .*{said}") as error:
        open_source(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokens": ["a"] * 321}, "tokens holds 321 tokens, but the model embeds only 320"),
        ({"tokens": [1, 2, 3]}, "tokens is no list of strings"),
        ({"tokens": ["a", "b" * 5000]}, "tokens holds a string of 5000 characters"),
        ({"token_type": [1, 1]}, "token_type holds 2 numbers for 320 tokens"),
        ({"token_type": ["a"] * 320}, "token_type is no list of numbers"),
        ({"token_type": 1}, "token_type is no list of numbers"),
        ({"merges": None}, "no merges"),
        ({"merges": [1]}, "merges is no list of strings"),
        ({"merges": ["ab"]}, "merges holds 'ab', which is no pair"),
        ({"merges": ["never seen"]}, "cannot make its tokenizer: .*never"),
        ({"unknown_token_id": "x"}, "unknown_token_id is 'x', but there are 320 tokens"),
        ({"../chat_templates": "rag"}, "tokenizer.chat_templates is no list of names"),
        ({"../chat_templates": ["rag"], "../chat_template.rag": 7}, "tokenizer.chat_template.rag is no text"),
        ({"pre": 1}, "pre '1' is not known"),
        ({"model": ["gpt2"]}, "model .* is not a vocabulary"),
        ({"../chat_template": 7}, "tokenizer.chat_template is no text"),
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_fit_together_is_named(keys: dict[str, Any], said: str, write: Any) -> None:
    named = {f"tokenizer.{key[3:]}" if key[0] == "." else f"tokenizer.ggml.{key}": keys[key] for key in keys}
    source = open_source(write(tiny("llama"), keys=named))
    with pytest.raises(SourceError, match=rf"tiny\.gguf: .*{said}"):
        source.tokenizer()


@pytest.mark.parametrize("number", [320, -1, 2**32 - 1])
@pytest.mark.parametrize("key", ["padding_token_id", "unknown_token_id"])
def test_a_number_of_no_token_is_none_where_llama_cpp_takes_none(key: str, number: int, write: Any) -> None:
    source = open_source(write(tiny("llama"), keys={f"tokenizer.ggml.{key}": number}))
    assert source.remarks == [f"tokenizer.ggml.{key} is {number}, but there are 320 tokens: taken for none"]
    tokenizer = source.tokenizer()
    assert (tokenizer.pad_token if key == "padding_token_id" else tokenizer.unk_token) is None
    assert source.config.pad_token_id is None or key != "padding_token_id"


@pytest.mark.parametrize("usual", [CHAT_TEMPLATE, None])
def test_named_chat_templates_are_read_and_written(usual: str | None, write: Any, tmp_path: Path) -> None:
    named = {"rag": "{{ documents }}", "tool_use": "{{ tools }}"}
    keys = {"tokenizer.chat_templates": sorted(named), "tokenizer.chat_template": usual}
    keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    source = open_source(write(tiny("llama"), keys=keys))
    wanted = named if usual is None else {"default": usual, **named}
    assert source.tokenizer().chat_template == wanted
    quantkit.convert(source.path, out=tmp_path / "folder")
    assert open_source(tmp_path / "folder").tokenizer().chat_template == wanted


@pytest.mark.parametrize("head", [16, 32, 128])
@pytest.mark.parametrize(
    ("original", "low", "high", "theta"),
    [(512, 1.0, 4.0, 1e4), (4096, 1.0, 4.0, 5e5), (777, 1.3, 2.0, 1e6), (8192, 2.0, 2.2, 2.3e5), (64, 0.5, 9.0, 1e4)],
)
def test_llama3_scaling_is_read_from_its_factors_alone(
    original: int, low: float, high: float, theta: float, head: int
) -> None:
    scaling = {"factor": 12.5, "low_freq_factor": low, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = original
    factors = llama3_factors(theta, scaling, head // 2).astype(np.float32)
    found = rope_of_factors(theta, factors)
    if found:
        np.testing.assert_allclose(llama3_factors(theta, found, head // 2), factors, rtol=1e-4)
    else:
        assert (factors == 1).all()
    if (low, high, head) == (1.0, 4.0, 128):
        assert found == {"rope_type": "llama3", **scaling}


def test_factors_that_no_llama3_scaling_makes_are_refused() -> None:
    with pytest.raises(SourceError, match="does not hold Llama 3's scaling"):
        rope_of_factors(1e4, np.array([1, 2, 1.5, 8], np.float32))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (31, "of type Q4_0_4_4, which llama.cpp has removed: .* take the Q4_0 file instead"),
        (38, "of type IQ4_NL_8_8, which llama.cpp has removed: .* take the IQ4_NL file instead"),
        (99, "of type 99, which the installed gguf package does not know; try pip install --upgrade gguf"),
        (2**31, "broken or cut short GGUF file"),
    ],
)
def test_a_type_that_cannot_be_read_is_told_from_damage(number: int, said: str, write: Any) -> None:
    path = write(tiny("llama"))
    content, name = path.read_bytes(), b"blk.0.attn_q.weight"
    at = content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    at += 4 + 8 * int.from_bytes(content[at : at + 4], "little")
    path.write_bytes(content[:at] + number.to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(SourceError, match=said):
        open_source(path)


def test_an_adapter_is_told_from_a_model(write: Any) -> None:
    keys = {"general.type": "adapter", "general.base_model.0.name": "Tiny"}
    with pytest.raises(SourceError, match=r"a LoRA adapter, no model: merge it into Tiny first"):
        open_source(write(tiny("llama"), keys=keys))


def test_scores_of_another_count_than_the_pieces_are_named(tmp_path: Path) -> None:
    vocabulary = SENTENCEPIECE["llama"]
    model = tiny("llama", vocab_size=len(vocabulary["tokens"]))
    keys = {"tokenizer.ggml.scores": [0.0, 1.0]}
    write_model(tmp_path / "tiny.gguf", model, sentencepiece(vocabulary), keys=keys)
    with pytest.raises(SourceError, match=r"scores holds 2 numbers for \d+ tokens"):
        open_source(tmp_path / "tiny.gguf").tokenizer()


@pytest.mark.parametrize("pattern", [0, [True], "every other"])
def test_a_window_pattern_that_says_nothing_is_named(pattern: Any, write: Any) -> None:
    path = write(tiny("gemma3_text", layer_types=None), keys={"attention.sliding_window_pattern": pattern})
    with pytest.raises(SourceError, match=r"sliding_window_pattern is .*, which says nothing of 2 layers"):
        open_source(path)


def test_an_answers_end_beyond_the_vocabulary_is_named(write: Any, tmp_path: Path) -> None:
    source = open_source(write(tiny("qwen2"), keys={"tokenizer.ggml.eot_token_id": 10**6}))
    with pytest.raises(SourceError, match="eot_token_id is '1000000', but there are 320 tokens"):
        source.copy_companions(tmp_path)


def test_the_first_version_of_the_format_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(SourceError, match="GGUF version 1 cannot be read"):
        open_source(path)


def test_arrays_within_arrays_are_refused(tmp_path: Path) -> None:
    """Nobody writes them, and nested thousands deep they would exhaust the stack."""
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000))
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + nested
    (tmp_path / "nested.gguf").write_bytes(header)
    with pytest.raises(SourceError, match="an array of arrays"):
        open_source(tmp_path / "nested.gguf")
