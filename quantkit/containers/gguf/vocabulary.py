"""A GGUF file's `tokenizer.*` keys: a byte-level vocabulary ("gpt2") or a SentencePiece one ("llama").

Which tokens are found in a text first, and whether a BOS comes before it, is asked of the tokenizer itself, so that the
file does what the tokenizer does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from gguf import TokenType

from quantkit.containers.gguf.pretokenizers import BY_IDS, NAMES, PROBE
from quantkit.containers.gguf.sentencepiece import Piece, read_pieces, scores_from_merges
from quantkit.containers.hf.read import unused_beyond
from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError

_SPACE = "\u2581"
_SPACES = (_SPACE, "\u0120")  # the latter is byte-level's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
# llama.cpp's converter takes these for control tokens even where a tokenizer calls them no special ones.
_SPECIAL = re.compile(r"<\|.*\|>$|<\uff5c.*\uff5c>$|<unused.*>$|(<pad>|<mask>|<2mass>|\[@BOS@\])$", re.DOTALL)
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0
_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}


def vocabulary(source: Source, pre: str | None = None) -> dict[str, Any]:
    """The keys of the source's tokenizer; a GGUF source's own.

    Args:
        source: the model.
        pre: name of the pre-tokenizer of a byte-level vocabulary, instead of the one that its ids tell.

    Raises:
        SourceError: no tokenizer, of a kind that cannot be written, or one whose pre-tokenizer is not known.
        UsageError: `pre` is a name that llama.cpp does not know, or the vocabulary is none that it is for.
    """
    if pre is not None and pre not in NAMES:
        raise UsageError(
            f"--pre {pre}: llama.cpp knows no pre-tokenizer of this name; known: {', '.join(sorted(NAMES))}"
        )
    if source.metadata:
        return _stored(source, pre)
    tokenizer: Any = source.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError(f"{source.path}: its tokenizer has no tokenizer.json form, so it cannot be written as GGUF")
    content = json.loads(backend.to_str())
    unused = unused_beyond(tokenizer, source.config.vocab_size)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in unused]
    if _is_byte_level(source, content):
        keys = _byte_level(source, tokenizer, content, pre)
    else:
        _refuse_pre(source, pre)
        keys = _sentencepiece(source, content)
    keys |= {key: getattr(tokenizer, ours) for key, ours in _IDS.items() if getattr(tokenizer, ours) is not None}
    ids = tokenizer("a").input_ids
    keys["add_bos_token"] = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    keys["add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
    keys["add_space_prefix"] = "".join(backend.encode("a", add_special_tokens=False).tokens)[:1] in _SPACES
    if keys["add_space_prefix"] and keys["model"] == "gpt2":
        raise SourceError(
            f"{source.path}: its tokenizer puts a space before a text; llama.cpp cannot, for byte-level BPE"
        )
    return {**{f"tokenizer.ggml.{key}": value for key, value in keys.items()}, **_templates(tokenizer.chat_template)}


def _stored(source: Source, pre: str | None) -> dict[str, Any]:
    """A GGUF file's own keys. Raises SourceError where they do not say how text is cut."""
    keys = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    said = keys.get("tokenizer.ggml.pre")
    if keys.get("tokenizer.ggml.model") != "gpt2":
        _refuse_pre(source, pre)
    elif pre is not None:
        keys["tokenizer.ggml.pre"] = pre
    elif said not in NAMES:
        raise SourceError(f"{source.path}: tokenizer.ggml.pre is {said!r}, which llama.cpp does not know; give --pre")
    if "tokenizer.ggml.tokens" not in keys:
        raise SourceError(f"{source.path}: the file has no vocabulary (tokenizer.ggml.tokens)")
    return keys


def _refuse_pre(source: Source, pre: str | None) -> None:
    if pre is not None:
        raise UsageError(f"--pre {pre}: the vocabulary of {source.path} is not a byte-level one; leave --pre out")


def pre_tokenizer(source: Source, tokenizer: Any) -> str:
    """llama.cpp's name for how the tokenizer cuts text, told by the ids it makes of a fixed one.

    Raises:
        SourceError: they are none that llama.cpp knows.
    """
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    # A model's copies differ in whether they put a BOS first, which is no matter of how text is cut.
    for ids in (tokenizer.encode(PROBE), plain, [tokenizer.bos_token_id, *plain]):
        name = BY_IDS.get(sha256(str(ids).encode()).hexdigest())
        if name is not None:
            return name
    raise SourceError(
        f"{source.path}: llama.cpp has no name for how this tokenizer cuts text into words, or its vocabulary is a new "
        "one; if it cuts as a known model's does, give that model's name: --pre llama-bpe, qwen2, gpt-2, ..."
    )


def _is_byte_level(source: Source, content: Mapping[str, Any]) -> bool:
    """Raises SourceError for neither kind."""
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return False
    if model["type"] == "BPE" and '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]]):
        return True
    raise SourceError(
        f"{source.path}: a {model['type']} tokenizer of this kind cannot be written as GGUF; byte-level BPE and "
        "SentencePiece BPE can"
    )


def _byte_level(source: Source, tokenizer: Any, content: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
    pieces = {id_: (token, 0.0, TokenType.NORMAL) for token, id_ in content["model"]["vocab"].items()}
    pieces |= {token["id"]: (token["content"], 0.0, _added_type(token)) for token in content["added_tokens"]}
    padded = _padded(source, pieces)
    return {
        "model": "gpt2",
        "pre": pre or pre_tokenizer(source, tokenizer),
        "tokens": [token for token, _, _ in padded],
        "token_type": [int(kind) for _, _, kind in padded],
        "merges": [" ".join(pair) for pair in _merges(content)],
    }


def _sentencepiece(source: Source, content: Mapping[str, Any]) -> dict[str, Any]:
    model_file = source.path / "tokenizer.model"
    vocab: dict[str, int] = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    pieces: dict[int, Piece] = {}
    if model_file.is_file():
        pieces = dict(enumerate(read_pieces(model_file)))
        for token, id_ in vocab.items():
            if id_ not in added and id_ in pieces and pieces[id_][0] != token:
                said = pieces[id_][0]
                raise SourceError(
                    f"{model_file}: id {id_} is {said!r}, in tokenizer.json {token!r}; remove one of them"
                )
    else:
        learned = {token: id_ for token, id_ in vocab.items() if id_ not in added}
        try:
            scores = scores_from_merges(learned, _merges(content))
        except SourceError as error:
            raise SourceError(f"{source.path}: {error}") from error
        for token, id_ in learned.items():
            kind = TokenType.BYTE if _BYTE.match(token) else TokenType.NORMAL
            pieces[id_] = (token, 0.0 if kind == TokenType.BYTE else scores[token], kind)
    for id_, token in added.items():
        kind = _added_type(token)
        text = token["content"].replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else token["content"]
        pieces[id_] = (text, _ADDED_SCORE, kind)
    unknown = content["model"]["unk_token"] or "<unk>"
    if unknown in vocab:
        pieces[vocab[unknown]] = (unknown, 0.0, TokenType.UNKNOWN)
    padded = _padded(source, pieces)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [token for token, _, _ in padded],
        "scores": [score for _, score, _ in padded],
        "token_type": [int(kind) for _, _, kind in padded],
    }


def _added_type(token: Mapping[str, Any]) -> TokenType:
    special = token["special"] or _SPECIAL.match(token["content"])
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _padded(source: Source, pieces: Mapping[int, Piece]) -> list[Piece]:
    """One piece for every row of the embedding. Raises SourceError."""
    size = source.config.vocab_size
    if max(pieces) >= size:
        raise SourceError(
            f"{source.path}: its tokenizer has the id {max(pieces)}, its embedding only {size} rows; copy the "
            "tokenizer of the same model"
        )
    return [pieces.get(id_) or (f"[PAD{id_}]", _PAD_SCORE, TokenType.UNUSED) for id_ in range(size)]


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, however the file lists them."""
    merges = content["model"]["merges"]
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges]


def _templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Of several templates the default one under the usual key, the others under keys that end in their names."""
    if not isinstance(template, Mapping):
        return {"tokenizer.chat_template": template} if template else {}
    others = {name: text for name, text in template.items() if name != "default"}
    keys: dict[str, Any] = _templates(template.get("default"))
    if others:
        keys["tokenizer.chat_templates"] = sorted(others)
    return keys | {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
