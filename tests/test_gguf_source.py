"""GGUF files of every architecture that is read: weights, config, tokenizer, parts, and what is refused."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, SPECIAL, random_model
from gguf_models import Quantization, byte_level, sentencepiece, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamed import streamed_logits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import quantkit
from quantkit.calibration import TokenMatrix
from quantkit.errors import SourceError
from quantkit.model.stream import ModelStream
from quantkit.sources import open_source
from quantkit.sources.gguf import GgufSource
from quantkit.sources.gguf_tokenizer import CUTS

SENTENCEPIECE = json.loads((Path(__file__).resolve().parent / "sentencepiece_ids.json").read_text(encoding="utf-8"))
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
    torch.testing.assert_close(logits, logits_of(model, tiny_tokens.tokens[:2]), rtol=0, atol=2e-5)


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


@pytest.mark.parametrize("window", [None, 8])
def test_a_mistral_is_a_llama_unless_it_has_a_window(window: int | None, write: Any, tiny_tokens: TokenMatrix) -> None:
    model = tiny("mistral", sliding_window=window)
    path = write(model, keys={"attention.sliding_window": window} if window else None)
    source = open_source(path)
    assert source.config.model_type == ("mistral" if window else "llama")
    logits = streamed_logits(ModelStream(source, CPU, torch.float32), [tiny_tokens.tokens[:2]])[0]
    torch.testing.assert_close(logits, logits_of(model, tiny_tokens.tokens[:2]), rtol=0, atol=2e-5)


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
    ("pre", "said"), [(None, "is missing"), ("default", "'default' is not known"), ("viking", "'viking' is not known")]
)
def test_an_unknown_pre_tokenizer_is_no_guess(
    pre: str | None, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_model(tmp_path / "tiny.gguf", tiny("llama"), byte_level(tokenizer, pre))
    with pytest.raises(SourceError, match=f"tiny.gguf: tokenizer.ggml.pre {said}") as error:
        open_source(tmp_path / "tiny.gguf").tokenizer()
    assert all(name in str(error.value) for name in CUTS)
    assert "Convert the model again" in str(error.value)


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


def test_parts_of_two_models_do_not_make_one(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(SourceError, match=r"hold \d+ tensors, not \d+"):
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
        ({"expert_count": 8}, {}, "llama.expert_count is 8"),
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


def test_an_unknown_architecture_lists_those_that_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"'bloom' is not supported; supported: llama, .*gemma3, phi3"):
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
