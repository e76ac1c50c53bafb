"""The tokenizer that a GGUF file describes: byte-level BPE by its pre-tokenizer's name, or a SentencePiece vocabulary.

The file holds the vocabulary and little of what comes before it. How text is cut for a byte-level vocabulary is told by
a name alone (`tokenizer.ggml.pre`), so a name that is not in the table is an error: another cut gives other ids, and a
model that is only a little worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantkit.containers.gguf.architectures import Architecture
from quantkit.containers.gguf.config import TOKENS, token_id
from quantkit.containers.gguf.cuts import CUTS, DIGIT, GPT2, NOT_BYTES
from quantkit.errors import SourceError
from quantkit.late import transformers

# tokenizer.ggml.token_type, as gguf.TokenType has them
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"
_REMEDY = "convert the model again with a current llama.cpp, or name its original Hugging Face folder"
_LONGEST = 4096  # characters of a token: the merges of a longer one take their time, and no model has any


def make_tokenizer(
    values: Callable[[str], Any], architecture: Architecture, embedded: int
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a file.

    Args:
        values: the file's value of a key, or None.
        architecture: the row of its architecture.
        embedded: how many ids the model embeds.

    Raises:
        SourceError: a kind of vocabulary or a pre-tokenizer that is not known, or keys that are missing or do not fit
            each other.
    """

    def ggml(key: str) -> Any:
        return values(f"tokenizer.ggml.{key}")

    kind, tokens = ggml("model"), _strings(ggml, "tokens")
    if not tokens:
        raise SourceError("the file has no vocabulary (tokenizer.ggml.tokens)")
    if len(tokens) > embedded:
        raise SourceError(f"tokenizer.ggml.tokens holds {len(tokens)} tokens, but the model embeds only {embedded}")
    types = _numbers(ggml, "token_type", len(tokens)) or [1] * len(tokens)
    if kind == "gpt2":
        backend, bos = _byte_level(ggml, tokens)
    elif kind == "llama":
        # User-defined ones are stored as they look in text; the vocabulary is searched with marks for the spaces.
        tokens = [token.replace(" ", _SPACE) if types[i] == _USER_DEFINED else token for i, token in enumerate(tokens)]
        backend, bos = _sentencepiece(ggml, tokens, types), True
    else:
        raise SourceError(
            f"tokenizer.ggml.model {str(kind)[:40]!r} is not a vocabulary that can be read; known: gpt2, llama"
        )
    _add_tokens(backend, tokens, types, rstrip=architecture.rstrip_special and kind == "llama")
    ids = {name: token_id(values, key, len(tokens)) for name, key in TOKENS.items()}
    named = {name: tokens[number] for name, number in ids.items() if number is not None}
    adds_bos = bos if ggml("add_bos_token") is None else ggml("add_bos_token")
    first = [named["bos_token"]] if adds_bos and "bos_token" in named else []
    last = [named["eos_token"]] if ggml("add_eos_token") and "eos_token" in named else []
    one = [*first, "$A:0", *last]
    two = [*one, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    ends = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
    backend.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = _templates(values)
    return tokenizer


def _templates(values: Callable[[str], Any]) -> str | dict[str, str] | None:
    """The file's chat template; by name, the usual one as "default", where it has several."""
    names = values("tokenizer.chat_templates") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError("tokenizer.chat_templates is no list of names")
    found = {"default": values("tokenizer.chat_template")}
    found |= {name: values(f"tokenizer.chat_template.{name}") for name in names if name != "default"}
    given = {name: text for name, text in found.items() if text is not None}
    for name, text in given.items():
        if not isinstance(text, str):
            raise SourceError(f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'} is no text")
    return given if given.keys() - {"default"} else given.get("default")


def _strings(ggml: Callable[[str], Any], key: str) -> list[str] | None:
    found = ggml(key)
    if found is not None and not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
        raise SourceError(f"tokenizer.ggml.{key} is no list of strings")
    longest = max(map(len, found or ()), default=0)
    if longest > _LONGEST:
        raise SourceError(f"tokenizer.ggml.{key} holds a string of {longest} characters; no vocabulary does")
    return found


def _numbers(ggml: Callable[[str], Any], key: str, count: int) -> list[Any] | None:
    found = ggml(key)
    if found is not None and not (isinstance(found, list) and all(isinstance(number, int | float) for number in found)):
        raise SourceError(f"tokenizer.ggml.{key} is no list of numbers")
    if found is not None and len(found) != count:
        raise SourceError(f"tokenizer.ggml.{key} holds {len(found)} numbers for {count} tokens")
    return found


def _byte_level(ggml: Callable[[str], Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """The backend, and whether BOS comes first where the file does not say."""
    name = ggml("pre")
    if isinstance(name, str) and name in NOT_BYTES:
        raise SourceError(f"tokenizer.ggml.pre {name!r}: only vocabularies of bytes can be read; {_REMEDY}")
    if not isinstance(name, str) or name not in CUTS:
        what = (
            "tokenizer.ggml.pre is missing" if name is None else f"tokenizer.ggml.pre {str(name)[:40]!r} is not known"
        )
        raise SourceError(f"{what}, so its text cannot be cut as the model learned it; {_REMEDY}")
    cut, merges = CUTS[name], _strings(ggml, "merges")
    if merges is None:
        raise SourceError("the file has no merges (tokenizer.ggml.merges)")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, _pairs(merges), ignore_merges=cut.whole_words))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    # GPT-2's own words are the byte-level step's default.
    words = cut.patterns[-1] == GPT2
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in cut.patterns[: -1 if words else None]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return backend, cut.bos


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        raise SourceError(f"tokenizer.ggml.merges holds {merges[cuts.index(-1)][:40]!r}, which is no pair")
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _sentencepiece(ggml: Callable[[str], Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    # Few files list the merges, the others' follow from the scores.
    merges, scores = _strings(ggml, "merges"), _numbers(ggml, "scores", len(tokens))
    if merges is None and scores is None:
        raise SourceError("the file has neither scores nor merges for its vocabulary (tokenizer.ggml.scores)")
    pairs = _merges(tokens, types, scores or ()) if merges is None else _pairs(merges)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    unknown = unknown or ("<unk>" if "<unk>" in vocabulary else None)
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    marks = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if ggml("add_space_prefix") is not False:
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
