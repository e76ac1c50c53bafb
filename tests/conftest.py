"""Fixtures shared by all tests: a byte-level tokenizer and tiny random models, in folders and as a GGUF file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from support.hub_server import HubServer
from support.judge_env import Judge, Program, judge_python
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from quantkit.blocks import arithmetic
from quantkit.tokens import TokenMatrix

VOCABULARY = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Heads and blocks are few and widths small, but not so regular that an index mistaken for another goes unseen:
# 64 and 96 are different widths, and 96 has a short last group at 64 and 128.
_HYBRID = ["sliding_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}

# What a family's config needs besides; None takes a size away that its config does not have.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None, "ffn_hidden_size": 96},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": _HYBRID},
    "gpt2": {"n_inner": 96},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 16},
}
FAMILIES = tuple(FAMILY_SIZES)
EXPERTS = ("mixtral", "olmoe", "qwen3_moe")

MakeModel = Callable[..., Path]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCABULARY` ids; adds no BOS of its own, has a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [
        "the quick brown fox jumps over the lazy dog while the user asks the assistant a question",
        "write a short story about the sea, then explain how the tides follow the moon",
        "what is the answer to the question, and where does the explanation of it begin?",
    ]
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def random_model(family: str, *, tied: bool, dtype: torch.dtype, seed: int, **config: Any) -> Any:
    """A tiny transformers model whose every parameter is random: biases and norms too."""
    settings = CONFIG_MAPPING[family](
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        bos_token_id=SPECIAL.index("<|im_start|>"),
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<pad>"),
        **{
            key: value
            for key, value in {**SIZES, **FAMILY_SIZES.get(family, {}), **config}.items()
            if value is not None
        },
    )
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
            else:
                is_embedding = any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
                parameter.copy_((0.3 if is_embedding else 0.08) * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):  # of a router
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype)


@pytest.fixture(scope="session", autouse=True)
def _float32() -> Iterator[None]:
    """Runs compute in float32, whatever the processor of the tests is faster in; those of whole modules too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "bfloat16_pays", lambda: False)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of each worker: how many share a small product changes its last bits on some processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """make_model(family, tied=False, dtype="float16", max_shard_size="5GB", seed=0, **config) -> folder.

    Made once per session for the same arguments: copy the folder before changing anything in it.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def make(
        family: str = "llama",
        *,
        tied: bool = False,
        dtype: str = "float16",
        max_shard_size: str = "5GB",
        seed: int = 0,
        **config: Any,
    ) -> Path:
        key = (family, tied, dtype, max_shard_size, seed, repr(sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            model = random_model(family, tied=tied, dtype=getattr(torch, dtype), seed=seed, **config)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def token_matrix(samples: int, seq_len: int, seed: int = 0) -> TokenMatrix:
    """Random ids below `VOCABULARY`, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(SPECIAL), VOCABULARY, (samples, seq_len), generator=generator)
    return TokenMatrix.of(tokens, "random")


@pytest.fixture(scope="session")
def tiny_tokens() -> TokenMatrix:
    """12 calibration windows of 32 random tokens."""
    return token_matrix(12, 32)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama as GGUF with F32, F16, Q8_0 and Q4_0 tensors; the weights of make_model("llama", dtype="float32")."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama-Q4_0.gguf"
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    write_gguf(path, model, tokenizer)
    return path


def write_gguf(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Llama model as llama.cpp's converter does: Q and K permuted, 1-D tensors in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny-llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _write_vocabulary(writer, tokenizer)
    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permute_heads(
                values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        if values.ndim == 1:
            kind = kinds.F32
        elif "embed_tokens" in name or "lm_head" in name:
            kind = kinds.F16
        else:
            kind = kinds.Q8_0 if "down_proj" in name or "v_proj" in name else kinds.Q4_0
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    types = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def permute_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of Q and K: ``LlamaModel.permute`` of its converter."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.phases: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.phases.append(name)
        yield lambda steps: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def detail(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[Program], Judge]]:
    """ask(program): one process each. Skips the test where its environment is missing."""
    running: dict[str, Judge] = {}

    def get(program: Program) -> Judge:
        judge_python(program)
        return running.setdefault(program.name, Judge(program))

    yield get
    for one in running.values():
        one.close()


@pytest.fixture
def recorder() -> Recorder:
    """A Progress that keeps its notes, warnings and phases' names."""
    return Recorder()


# -- a Hub of one's own ---------------------------------------------------------------------------------------------

TOKEN = "hf_thisIsTheSecretOfTheTests"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        running.tokens = {TOKEN: "someone", "hf_other": "other"}
        yield running


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits, which are noted and not waited for."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def hub_client(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> None:
    """The Hub client as on a machine where somebody has logged in to `server`."""
    home = tmp_path / "hf-home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
