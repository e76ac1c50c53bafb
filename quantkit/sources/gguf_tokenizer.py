"""The tokenizer that a GGUF file describes: byte-level BPE by its pre-tokenizer's name, or a SentencePiece vocabulary.

The file holds the vocabulary and little of what comes before it. How text is cut for a byte-level vocabulary is told by
a name alone (`tokenizer.ggml.pre`), so a name that is not in the table is an error: another cut gives other ids, and a
model that is only a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quantkit.errors import SourceError
from quantkit.sources.gguf_architectures import Architecture

# tokenizer.ggml.token_type, as gguf.TokenType has them
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"
_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class _Cut:
    """How text is cut into words before the merges.

    Attributes:
        pattern: a word; None is GPT-2's own pattern.
        single_digits: digits are cut off one by one first.
        nfc: text is composed first.
        whole_words: a word that the vocabulary has is one token, whatever the merges would make of it.
        bos: BOS comes first where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_LLAMA3 = _Cut(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, bos=True)
_CL100K = _Cut(_LLAMA3.pattern)
_QWEN2 = _Cut(rf"{_LETTERS}|\p{{N}}|{_REST}", nfc=True)
_TEKKEN = _Cut(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}", whole_words=True, bos=True)
_O200K = _Cut(rf"{_CASED[0]}{_SHORT}|{_CASED[1]}{_SHORT}|\p{{N}}{{1,3}}|{_REST_SLASH}")

CUTS: dict[str, _Cut] = {
    "gpt-2": _Cut(),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _Cut(single_digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    "gpt-4o": _O200K,
}


def make_tokenizer(values: Callable[[str], Any], architecture: Architecture) -> PreTrainedTokenizerFast:
    """The tokenizer of a file.

    Args:
        values: the file's value of a key, or None.
        architecture: the row of its architecture.

    Raises:
        SourceError: a kind of vocabulary or a pre-tokenizer that is not known, or a key that is missing.
    """

    def ggml(key: str) -> Any:
        return values(f"tokenizer.ggml.{key}")

    kind, tokens = ggml("model"), ggml("tokens")
    if not tokens:
        raise SourceError("the file has no vocabulary (tokenizer.ggml.tokens)")
    types = ggml("token_type") or [1] * len(tokens)
    if kind == "gpt2":
        cut = _known_cut(ggml("pre"))
        backend, bos = _byte_level(tokens, ggml("merges"), cut), cut.bos
    elif kind == "llama":
        prefix = ggml("add_space_prefix") is not False
        tokens = [_respelled(token, types[i]) for i, token in enumerate(tokens)]
        backend, bos = _sentencepiece(tokens, types, _joins(ggml, tokens, types), prefix), True
    else:
        raise SourceError(f"tokenizer.ggml.model {kind!r} is not a vocabulary that can be read; known: gpt2, llama")
    _add_tokens(backend, tokens, types, rstrip=architecture.rstrip_special and kind == "llama")
    named = {name: tokens[ggml(key)] for name, key in _KEYS.items() if ggml(key) is not None}
    adds_bos = bos if ggml("add_bos_token") is None else ggml("add_bos_token")
    _add_ends(backend, named, adds_bos and "bos_token" in named, bool(ggml("add_eos_token")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = values("tokenizer.chat_template")
    return tokenizer


def _known_cut(name: str | None) -> _Cut:
    if name in CUTS:
        return CUTS[name]
    what = "tokenizer.ggml.pre is missing" if name is None else f"tokenizer.ggml.pre {name!r} is not known"
    raise SourceError(
        f"{what}, so its text cannot be cut as the model learned it; known: {', '.join(CUTS)}. "
        "Convert the model again with a current llama.cpp, or name its original Hugging Face folder"
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str] | None, cut: _Cut) -> Tokenizer:
    if merges is None:
        raise SourceError("the file has no merges (tokenizer.ggml.merges)")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, _pairs(merges), ignore_merges=cut.whole_words))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.single_digits else []
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    cuts = [merge.index(" ", 1) for merge in merges]
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _respelled(token: str, kind: int) -> str:
    """User-defined tokens are stored as they look in text; the vocabulary is searched with marks for the spaces."""
    return token.replace(" ", _SPACE) if kind == _USER_DEFINED else token


def _joins(ggml: Callable[[str], Any], tokens: Sequence[str], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: few files list them, the others' follow from the scores."""
    if ggml("merges") is not None:
        return _pairs(ggml("merges"))
    if ggml("scores") is None:
        raise SourceError("the file has neither scores nor merges for its vocabulary (tokenizer.ggml.scores)")
    return _merges(tokens, types, ggml("scores"))


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, str]], prefix: bool
) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    unknown = unknown or ("<unk>" if "<unk>" in vocabulary else None)
    backend = Tokenizer(models.BPE(vocabulary, list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    marks = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), marks])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = marks
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, in the order in which SentencePiece prefers them.

    It joins the neighbours whose piece scores highest, user-defined pieces (runs of spaces) before all. Among equals
    the order is that of the published tokenizer.json files: of runs the longest part first, else by ids.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ways: list[tuple[tuple[float, ...], str, str]] = []
    for piece, id_ in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left not in ids or right not in ids:
                continue
            if types[id_] == _USER_DEFINED:
                ways.append(((-math.inf, -len(left), -len(right), id_), left, right))
            else:
                ways.append(((-scores[id_], id_, ids[left], ids[right]), left, right))
    ways.sort()
    return [(left, right) for _, left, right in ways]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int], rstrip: bool) -> None:
    """Control and user-defined tokens are found in the text before anything else."""
    plain = ("<unk>", "<s>", "<|endoftext|>")  # where special tokens strip, these never do
    added = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL or (kind == _UNKNOWN and token == "<unk>"):
            added.append(AddedToken(token, normalized=False, special=True, rstrip=rstrip and token not in plain))
        elif kind == _USER_DEFINED:
            added.append(AddedToken(token, normalized=False, special=False, rstrip=rstrip and token == "</s>"))
    backend.add_tokens(added)


def _add_ends(backend: Tokenizer, named: Mapping[str, str], bos: bool, eos: bool) -> None:
    first = [named["bos_token"]] if bos else []
    last = [named["eos_token"]] if eos and "eos_token" in named else []
    one = [*first, "$A:0", *last]
    two = [*one, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    ends = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
    backend.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=ends)
