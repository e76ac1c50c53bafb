"""ggjt version 3, llama.cpp's file before GGUF (the "GGML" of 2023): a Llama and its SentencePiece vocabulary.

The format says little. What else a reader has to know is taken from the shapes, or assumed as llama.cpp did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from quantkit.codes.kinds import Kind
from quantkit.containers.gguf.architectures import WRITABLE
from quantkit.containers.gguf.file import GgufFile, StoredTensor, bytes_of
from quantkit.containers.gguf.order import Rotary
from quantkit.containers.gguf.read import GgmlSource, InFile
from quantkit.containers.gguf.tokenizer import make_tokenizer
from quantkit.containers.hf.read import publishable_config, stored_dtype
from quantkit.errors import SourceError
from quantkit.late import torch, transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MAGIC = b"tjgg"  # numbers are little-endian, the first one too
VERSION = 3
OLDER = {b"lmgg": "ggml", b"fmgg": "ggmf", b"algg": "ggla (a LoRA)"}
MAGICS = (MAGIC, *OLDER)
ALIGNMENT = 32
# What readers take for granted.
RMS_EPS = 5e-6
ROPE_THETA = 10000.0
CONTEXT = 2048
BOS, EOS, FIRST_BYTE = 1, 2, 3
UNKNOWN_TEXT = " \u2047 "
ADDED_SCORE = -1000.0

_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# The K-quants came later in 2023 and share the version.
_KINDS = (
    *(Kind.F32, Kind.F16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)
_SIZES = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
_LONGEST = 1024  # bytes of a token or a tensor's name: more is a broken file, and would take its time
_SPACE = "\u2581"


def names_of(layers: int) -> dict[str, str]:
    """Hugging Face name -> the format's name, of every tensor that a Llama of so many layers has."""
    blocks = {f"model.layers.{i}.{ours}": f"layers.{i}.{name}" for i in range(layers) for name, ours in _BLOCK.items()}
    outside = {ours: name for name, ours in _OUTSIDE.items()}
    return {f"{ours}.weight": f"{name}.weight" for ours, name in {**outside, **blocks}.items()}


class GgjtFile(GgufFile):
    """One file, its header and the heads of its tensors read.

    Attributes:
        sizes: the seven numbers of the header, by llama.cpp's names.
        vocabulary: bytes and score of every token.
        tensors: by the format's names, shapes [out, in].

    Raises:
        SourceError: broken, cut short or of another version.
    """

    sizes: dict[str, int]
    vocabulary: list[tuple[bytes, float]]

    def _broken(self, why: object) -> SourceError:
        return SourceError(f"{self.path}: broken or cut short ggjt file ({why}); download it again")

    def _read_header(self) -> None:
        self._at = 0
        magic = self._take(4)
        if magic not in MAGICS:
            raise ValueError("it does not begin with ggjt")
        found = OLDER.get(magic) or f"ggjt version {self._number('<u4')}"
        if found != f"ggjt version {VERSION}":
            raise SourceError(
                f"{self.path}: {found} cannot be read, only ggjt version {VERSION} and GGUF; take a newer file of this "
                "model, or the Hugging Face folder it was made from"
            )
        self.sizes = {name: self._number("<u4") for name in _SIZES}
        nothing = next((name for name in _SIZES if self.sizes[name] == 0 and name != "ftype"), None)
        if nothing:
            raise ValueError(f"{nothing} is 0")
        if self.sizes["n_vocab"] * 8 > self._bytes.size:
            raise ValueError(f"it has no room for {self.sizes['n_vocab']} tokens")
        self.vocabulary = [self._token(number) for number in range(self.sizes["n_vocab"])]
        while self._at < self._bytes.size:
            self._read_tensor()

    def _token(self, number: int) -> tuple[bytes, float]:
        text = self._bounded(f"token {number}", self._number("<u4"))
        score = float(self._number("<f4"))
        if not math.isfinite(score):
            raise ValueError(f"the score of token {number} is {score}")
        return text, score

    def _read_tensor(self) -> None:
        dimensions, length, number = self._number("<u4"), self._number("<u4"), self._number("<u4")
        if dimensions not in (1, 2):
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self._number("<u4") for _ in range(dimensions))[::-1]
        name = self._as_name("a tensor's name", self._bounded("a tensor's name", length))
        if name in self.tensors:
            raise ValueError(f"it holds {name} twice")
        if number not in _KINDS:
            raise ValueError(f"{name} is of type {number}, which ggjt version {VERSION} has not")
        size = bytes_of(name, shape, Kind(number))
        self._at += -self._at % ALIGNMENT
        self.tensors[name] = StoredTensor(shape, Kind(number), self._at, size)
        self._at += size
        if self._at > self._bytes.size:
            raise ValueError(f"it ends before the end of {name}")

    def _bounded(self, what: str, length: int) -> bytes:
        if length > _LONGEST:
            raise ValueError(f"{what} of {length} bytes")
        return self._take(length)


class GgjtSource(GgmlSource):
    """A ggjt file."""

    kind = "ggjt"
    model_type = "llama"
    remarks = (
        "a ggjt file says neither the norms' epsilon, nor the rotary base, nor the context length: "
        f"{RMS_EPS:g}, {ROPE_THETA:g} and {CONTEXT} are assumed",
    )

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or path.stem
        self._file = GgjtFile(path)
        self._stored = {name: InFile(self._file, stored) for name, stored in self._names().items()}
        self._settings = self._config_settings()
        self._check_shapes()
        heads = {"q_proj": self._settings["num_attention_heads"], "k_proj": self._settings["num_key_value_heads"]}
        for name, found in self._stored.items():
            if name.split(".")[-2] in heads:
                self._stored[name] = found._replace(order=Rotary(heads[name.split(".")[-2]]))

    @cached_property
    def config(self) -> PretrainedConfig:
        return transformers.LlamaConfig(**self._settings)

    @cached_property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.tensors)

    def _names(self) -> dict[str, str]:
        """`names_of` the header's layers, which must be the names of the file's tensors."""
        layers, stored = self._file.sizes["n_layer"], self._file.tensors
        wanted = len(_OUTSIDE) + len(_BLOCK) * layers
        if len(stored) < wanted:  # before anything is made of a number of layers that may be absurd
            raise SourceError(f"{self.path}: {layers} layers have {wanted} tensors, but the file holds {len(stored)}")
        names = names_of(layers)
        missing = next((name for name in names.values() if name not in stored), None)
        if missing:
            raise SourceError(f"{self.path}: tensor {missing} is missing")
        known = set(names.values())
        other = next((name for name in stored if name not in known), None)
        if other is not None:
            raise SourceError(f"{self.path}: tensor {other!r} is not one that a Llama of {layers} layers is read with")
        return names

    def _config_settings(self) -> dict[str, Any]:
        sizes = self._file.sizes
        width, heads = sizes["n_embd"], sizes["n_head"]
        if width % heads or sizes["n_rot"] != width // heads or sizes["n_rot"] % 2:
            raise SourceError(
                f"{self.path}: {heads} heads of {sizes['n_rot']} do not make up a width of {width}; the file is broken"
            )
        keys = self._file.tensors["layers.0.attention.wk.weight"].shape[0]
        inner = self._file.tensors["layers.0.feed_forward.w1.weight"].shape[0]
        return {
            "vocab_size": sizes["n_vocab"],
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": sizes["n_layer"],
            "num_attention_heads": heads,
            # Not stored: 2023's readers were told on the command line. The shapes tell it as well.
            "num_key_value_heads": max(keys // sizes["n_rot"], 1),
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": RMS_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "tie_word_embeddings": False,
        }

    def _check_shapes(self) -> None:
        width, inner, words, heads, shared = (
            self._settings[name]
            for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
        )
        keys = shared * (width // heads)
        if heads % shared:
            raise SourceError(f"{self.path}: {heads} heads cannot share {keys} rows of keys")
        shapes = {
            **dict.fromkeys(("embed_tokens", "lm_head"), (words, width)),
            **dict.fromkeys(("q_proj", "o_proj"), (width, width)),
            **dict.fromkeys(("k_proj", "v_proj"), (keys, width)),
            **dict.fromkeys(("gate_proj", "up_proj"), (inner, width)),
            "down_proj": (width, inner),
        }
        for name, info in self.tensors.items():
            wanted = shapes.get(name.split(".")[-2], (width,))
            if info.shape != wanted:
                raise SourceError(
                    f"{self.path}: {self._stored[name].name} has shape {list(info.shape)}, but the header asks for "
                    f"{list(wanted)}"
                )

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        return rebuilt_tokenizer(self._file.vocabulary)

    def weight_files(self) -> Sequence[Path]:
        return [self.path]

    def config_dict(self) -> dict[str, Any]:
        content = {**self.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"]}
        return publishable_config(content, type(self.config))


def rebuilt_tokenizer(vocabulary: Sequence[tuple[bytes, float]]) -> PreTrainedTokenizerBase:
    """The tokenizer that cuts text as llama.cpp does with a ggjt file's vocabulary; it begins text with the BOS.

    Raises:
        SourceError: a token that is no text, or that is there twice.
    """
    tokens, types = _pieces(vocabulary)
    seen: set[str] = set()
    for number, token in enumerate(tokens):
        if token in seen:
            raise SourceError(f"its vocabulary holds {token!r} twice, the second time as token {number}")
        seen.add(token)
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [score for _, score in vocabulary],
        "token_type": types,
    }
    for key, number in (("bos_token_id", BOS), ("eos_token_id", EOS)):
        if types[number : number + 1] == [gguf.TokenType.CONTROL]:
            keys[key] = number
    if gguf.TokenType.UNKNOWN in types:
        keys["unknown_token_id"] = types.index(gguf.TokenType.UNKNOWN)
    values = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return make_tokenizer(values.get, WRITABLE["llama"], len(tokens))


def _pieces(vocabulary: Sequence[tuple[bytes, float]]) -> tuple[list[str], list[gguf.TokenType]]:
    """Tokens as SentencePiece spells them, and their types."""
    last_byte = FIRST_BYTE + 256
    has_bytes = [text for text, _ in vocabulary[FIRST_BYTE:last_byte]] == [bytes([value]) for value in range(256)]
    # The last ones were added after training, where they share the score of those.
    added = len(vocabulary)
    while added and vocabulary[added - 1][1] == ADDED_SCORE:
        added -= 1
    # Scores of pieces count down by one, so one of them has this score too, and may be the last.
    if 0 < added < len(vocabulary) and vocabulary[added - 1][1] == ADDED_SCORE + 1:
        added += 1
    tokens, types = [], []
    for number, (raw, _) in enumerate(vocabulary):
        if has_bytes and FIRST_BYTE <= number < last_byte:
            token, kind = f"<0x{number - FIRST_BYTE:02X}>", gguf.TokenType.BYTE
        elif number in (BOS, EOS) and raw in (b"", b"<s>", b"</s>"):
            token, kind = "<s>" if number == BOS else "</s>", gguf.TokenType.CONTROL
        elif not raw:
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif raw == UNKNOWN_TEXT.encode():
            token, kind = "<unk>", gguf.TokenType.UNKNOWN
        else:
            try:
                token = raw.decode()
            except UnicodeDecodeError as error:
                raise SourceError(f"token {number} of its vocabulary is no text: {raw[:32]!r}") from error
            kind = gguf.TokenType.USER_DEFINED if number >= added else gguf.TokenType.NORMAL
            token = token if number >= added else token.replace(" ", _SPACE)
        tokens.append(token)
        types.append(kind)
    return tokens, types
