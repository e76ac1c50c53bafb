"""The ggjt container, version 3: a Llama with a SentencePiece vocabulary, as llama.cpp read it before GGUF.

`read.GgjtSource` is the reader. The format has no keys: what it has no number for is either refused (`check`), or
warned of where readers of the time assumed something else.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gguf
import numpy as np
import numpy.typing as npt

from quantkit.codes.kinds import SIZES, Kind
from quantkit.containers.ggjt import read as ggjt
from quantkit.containers.gguf.order import in_rotary_order
from quantkit.containers.gguf.probe import cut_differently
from quantkit.containers.gguf.write import PlacedWriter
from quantkit.containers.hf.read import unused_beyond
from quantkit.containers.source import Source, TensorInfo
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Vocabulary = list[tuple[bytes, float]]

# Types of matrices, and the header's number for a file of mostly that type.
FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q4_0: 2, Kind.Q4_1: 3, Kind.Q8_0: 7, Kind.Q5_0: 8, Kind.Q5_1: 9}
_EPSILONS = (ggjt.RMS_EPS, 1e-6)  # of llama.cpp from July 2023 on, and before
_COMMON_MULTIPLE = 256  # Meta's own n_mult
_SPACE = "\u2581"
# Where a vocabulary that is not SentencePiece's would be cut otherwise.
_PROBES = (
    "the quick brown fox",
    "  two spaces in front, and two after  ",
    "tabs\tand\r\nlines\n\n",
    "na\u00efve \ufb01ne \uff21\u00bd caf\u00e9 cafe\u0301",
    "\u6f22\u5b57 \U0001f642 \u200b1234567890",
    "",
)


@dataclass(frozen=True)
class GgjtTensor:
    """A tensor that will be written.

    Attributes:
        name: in the file.
        published: the Hugging Face name of the tensor its values are those of.
        shape: [out, in] or [length].
        kind: of its values in the file.
        heads: whose rows are put into llama.cpp's rotary order; 0 where there are none.
    """

    name: str
    published: str
    shape: tuple[int, ...]
    kind: Kind
    heads: int = 0

    @property
    def bytes(self) -> int:
        """Of its values."""
        block, size = SIZES[self.kind]
        return int(math.prod(self.shape) // block * size)


def check(source: Source, progress: Progress = SILENT) -> None:
    """Refuse a model that the format has no place for, and warn of what its readers take for granted.

    Raises:
        UsageError: says what has no place, and to write GGUF instead.
    """
    config: Any = source.config
    if config.model_type != "llama":
        _refuse(source, f"architecture {config.model_type} has no place in a ggjt file, which holds Llamas")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups != heads:
        _refuse(source, f"{heads} heads share {groups} keys and values, which a ggjt file cannot say")
    width = config.hidden_size // heads
    if (config.head_dim or width) != width:
        _refuse(source, f"its heads are {config.head_dim} wide, and a ggjt file has them {width} wide (hidden / heads)")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(source, f"its rotary embedding is scaled ({rope.get('rope_type')}), which a ggjt file cannot say")
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        _refuse(source, "a ggjt file holds no biases and no activation but silu")
    n_mult(config)
    if config.rms_norm_eps not in _EPSILONS:
        progress.warn(
            f"the norms' epsilon is {config.rms_norm_eps:g}; a ggjt file cannot say so, and its readers assume "
            f"{_EPSILONS[0]:g} (those of before August 2023 {_EPSILONS[1]:g}): give it to the reader, or write GGUF"
        )
    if rope["rope_theta"] != ggjt.ROPE_THETA:
        progress.warn(
            f"the rotary base is {rope['rope_theta']:g}; a ggjt file cannot say so, and its readers assume "
            f"{ggjt.ROPE_THETA:g}: give it to the reader (--rope-freq-base), or write GGUF"
        )


def n_mult(config: PretrainedConfig) -> int:
    """What readers compute the inner width from: 2/3 of 4 hidden widths, rounded up to a multiple of this.

    Raises:
        UsageError: no number gives this width.
    """
    inner, least = config.intermediate_size, 2 * 4 * config.hidden_size // 3
    found = next((n for n in (_COMMON_MULTIPLE, inner) if -(-least // n) * n == inner), None)
    if found is None:
        raise UsageError(
            f"a ggjt file cannot say an inner width of {inner}: with a hidden width of {config.hidden_size} it is "
            f"{least} or more; write GGUF instead"
        )
    return found


def plan(config: PretrainedConfig, tensors: Mapping[str, TensorInfo], kinds: Mapping[str, Kind]) -> list[GgjtTensor]:
    """Every tensor that the file will hold, in its order.

    Args:
        config: of a model that `check` has passed.
        tensors: the model's, by published name; a tied output embedding may be missing.
        kinds: published name -> type, of every matrix; vectors are always F32.

    Raises:
        UsageError: a type or a tensor that the format has no place for, or a width that is no multiple of a block.
    """
    known = ggjt.names_of(config.num_hidden_layers)
    for name in tensors:
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise UsageError(f"tensor {name} has no place in a ggjt file; write GGUF instead")
    planned = []
    for published, name in known.items():
        origin = published
        if published == "lm_head.weight" and published not in tensors and config.tie_word_embeddings:
            origin = "model.embed_tokens.weight"
        shape = tensors[origin].shape
        kind = kinds.get(published, kinds.get(origin)) if len(shape) == 2 else Kind.F32
        if kind not in FILE_TYPES:
            allowed = ", ".join(known_kind.name for known_kind in FILE_TYPES)
            raise UsageError(f"{published}: a ggjt file holds {allowed}, not {getattr(kind, 'name', kind)}")
        block = SIZES[kind][0]
        if shape[-1] % block:
            raise UsageError(
                f"{published} is {shape[-1]} wide: {kind.name} needs multiples of {block}; choose F16 for it"
            )
        turned = published.endswith(("q_proj.weight", "k_proj.weight"))
        planned.append(GgjtTensor(name, origin, shape, kind, config.num_attention_heads if turned else 0))
    return planned


def make_vocabulary(tokenizer: Any, size: int, progress: Progress = SILENT) -> Vocabulary:
    """Bytes and score of every token, for a reader that joins the neighbours whose piece scores highest.

    Args:
        tokenizer: a BPE with byte fallback whose merges are those that SentencePiece's rule makes of its pieces.
        size: of the model's vocabulary; what the tokenizer has no token for is left empty.
        progress: is told of an end token that the format's readers do not know.

    Raises:
        UsageError: a vocabulary of another kind, or one that such a reader would cut text otherwise with.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = content.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UsageError(
            "a ggjt file holds SentencePiece vocabularies with bytes only, not this tokenizer's; write GGUF"
        )
    unused = unused_beyond(tokenizer, size)
    added = {token["id"]: token["content"] for token in content["added_tokens"] if token["id"] not in unused}
    token_of = {number: token for token, number in model["vocab"].items()} | added
    if max(token_of) >= size:
        raise UsageError(f"the tokenizer has {max(token_of) + 1} tokens, but the model embeds only {size}")
    _check_fixed_ids(tokenizer, token_of, progress)
    merges = [(left, right) for left, right in model["merges"]]
    pieces = [token_of[i] for i in sorted(token_of) if i >= ggjt.FIRST_BYTE + 256 and i not in added]
    # SentencePiece's scores count down: pieces in the order in which they are joined, then the others.
    joined = [left + right for left, right in merges]
    order = list(dict.fromkeys(joined))
    if len(order) != sum(1 for _ in groupby(joined)):
        raise UsageError(
            "the tokenizer's merges are not in the order of scores, as SentencePiece's are; write GGUF instead"
        )
    scores = {piece: float(-rank) for rank, piece in enumerate(dict.fromkeys([*order, *pieces]))}
    unknown = model.get("unk_token")
    vocabulary = [_entry(number, token_of.get(number), unknown, scores) for number in range(size)]
    _check_same_cuts(tokenizer, merges, vocabulary)
    return vocabulary


class GgjtWriter(PlacedWriter):
    """Writes one file, each planned tensor exactly once, in any order, then `finish`."""

    def __init__(
        self, path: Path, config: PretrainedConfig, vocabulary: Vocabulary, tensors: Sequence[GgjtTensor]
    ) -> None:
        assert len(vocabulary) == config.vocab_size
        super().__init__(tensor.name for tensor in tensors)
        self._path = path
        path.write_bytes(b"")
        self._heads: dict[str, tuple[int, bytes]] = {}
        header = _header(config, vocabulary, tensors)
        self._write(path, 0, "its header", header)
        at = len(header)
        for tensor in tensors:
            name, shape = tensor.name.encode(), tensor.shape[::-1]
            head = struct.pack(f"<{3 + len(shape)}I", len(shape), len(name), tensor.kind, *shape) + name
            head += bytes(-(at + len(head)) % ggjt.ALIGNMENT)
            self._heads[tensor.name] = at, head
            at += len(head) + tensor.bytes

    def write(self, tensor: GgjtTensor, values: npt.NDArray[Any]) -> None:
        """Write one tensor's values, rows in Hugging Face order.

        Args:
            tensor: one of the plan.
            values: floats of its shape; or uint8 [rows, bytes of a row] that are of its type already.

        Raises:
            NumericError: a value that is not finite, or that the type cannot hold.
        """
        self._pending.remove(tensor.name)
        rows = _encoded(tensor, values)
        assert rows.nbytes == tensor.bytes, tensor.name
        at, head = self._heads[tensor.name]
        self._write(self._path, at, tensor.name, head, in_rotary_order(rows, tensor.heads).tobytes())


def _refuse(source: Source, why: str) -> NoReturn:
    raise UsageError(f"{source.label}: {why}; write GGUF instead")


# -- bytes -----------------------------------------------------------------------------------------------------------


def _header(config: Any, vocabulary: Vocabulary, tensors: Sequence[GgjtTensor]) -> bytes:
    weights: Counter[Kind] = Counter()
    for tensor in tensors:
        if len(tensor.shape) == 2:
            weights[tensor.kind] += math.prod(tensor.shape)
    heads = config.num_attention_heads
    sizes = (
        *(config.vocab_size, config.hidden_size, n_mult(config), heads, config.num_hidden_layers),
        *(config.hidden_size // heads, FILE_TYPES[weights.most_common(1)[0][0]]),
    )
    tokens = b"".join(struct.pack("<I", len(text)) + text + struct.pack("<f", score) for text, score in vocabulary)
    return ggjt.MAGIC + struct.pack("<8I", ggjt.VERSION, *sizes) + tokens


def _encoded(tensor: GgjtTensor, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values as the file has them, [rows, ...]."""
    if values.dtype == np.uint8:
        return values
    assert values.shape == tensor.shape, tensor.name
    floats = values.astype(np.float32, copy=False)
    limit = np.finfo(np.float32 if tensor.kind == Kind.F32 else np.float16).max  # scales of blocks are float16 too
    if not bool((np.abs(floats) <= limit).all()):
        if not bool(np.isfinite(floats).all()):
            raise NumericError(f"{tensor.published} holds NaN or infinity; the model's files are damaged")
        raise NumericError(f"{tensor.published}: a value is not finite in {tensor.kind.name}; choose F32 for it")
    encoded: npt.NDArray[Any] = gguf.quants.quantize(floats, tensor.kind)
    return encoded


# -- vocabulary ------------------------------------------------------------------------------------------------------


def _check_fixed_ids(tokenizer: Any, token_of: Mapping[int, str], progress: Progress) -> None:
    """Readers of the time know some ids by heart."""
    ids = range(ggjt.FIRST_BYTE, ggjt.FIRST_BYTE + 256)
    others = [token_of.get(number) for number in ids if token_of.get(number) != f"<0x{number - ggjt.FIRST_BYTE:02X}>"]
    if others or tokenizer.bos_token_id != ggjt.BOS:
        raise UsageError(
            f"readers of ggjt files take id {ggjt.BOS} for the BOS and {ids[0]} to {ids[-1]} for the bytes, and "
            f"the tokenizer has {others[0] if others else tokenizer.bos_token!r} elsewhere; write GGUF instead"
        )
    if tokenizer.eos_token_id != ggjt.EOS:
        progress.warn(
            f"readers of ggjt files stop at id {ggjt.EOS}, and the model at {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}): give that to the reader as a stop text, or write GGUF"
        )


def _entry(number: int, token: str | None, unknown: str | None, scores: Mapping[str, float]) -> tuple[bytes, float]:
    """Bytes and score of a token; one without a score was added to the pieces, None is one that there is not."""
    if token is None:
        return b"", ggjt.ADDED_SCORE
    if number in (ggjt.BOS, ggjt.EOS):
        return b"", 0.0
    if token == unknown:
        return ggjt.UNKNOWN_TEXT.encode(), 0.0
    if ggjt.FIRST_BYTE <= number < ggjt.FIRST_BYTE + 256:
        return bytes([number - ggjt.FIRST_BYTE]), 0.0
    if token in scores:
        return token.replace(_SPACE, " ").encode(), scores[token]
    return token.encode(), ggjt.ADDED_SCORE


def _check_same_cuts(tokenizer: Any, merges: Sequence[tuple[str, str]], vocabulary: Vocabulary) -> None:
    """A reader joins any two neighbours that make a piece, begins text with a space, and changes nothing else in it."""
    try:
        rebuilt: Any = ggjt.rebuilt_tokenizer(vocabulary)
    except SourceError as error:
        raise UsageError(f"a ggjt file cannot hold this tokenizer: {error}; write GGUF instead") from error
    theirs = [tuple(pair) for pair in json.loads(rebuilt.backend_tokenizer.to_str())["model"]["merges"]]
    if set(theirs) != set(merges):
        raise UsageError(
            f"the tokenizer joins pieces in {len(set(merges))} ways, and a reader of a ggjt file would in "
            f"{len(set(theirs))}: it would cut text otherwise; write GGUF instead"
        )
    if wrong := cut_differently(rebuilt, tokenizer, _PROBES):
        raise UsageError(
            f"a reader of a ggjt file would cut {wrong[0]!r} otherwise than the tokenizer; write GGUF instead"
        )
