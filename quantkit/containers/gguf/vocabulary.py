"""A GGUF file's `tokenizer.*` keys: a byte-level vocabulary ("gpt2") or a SentencePiece one ("llama").

Which tokens are found in a text first, and whether a BOS comes before it, is asked of the tokenizer itself, so that the
file does what the tokenizer does. A SentencePiece model file is a protobuf message (sentencepiece_model.proto,
`ModelProto`); the few fields that count are read here, so that no package is needed for it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from gguf import TokenType

from quantkit.containers.gguf.config import TOKENS
from quantkit.containers.gguf.pretokenizers import BY_IDS, NAMES, PROBE
from quantkit.containers.hf.read import unused_beyond
from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError

_SPACE = "\u2581"
_SPACES = (_SPACE, "\u0120")  # the latter is byte-level's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
# llama.cpp's converter takes these for control tokens even where a tokenizer calls them no special ones.
_SPECIAL = re.compile(r"<\|.*\|>$|<\uff5c.*\uff5c>$|<unused.*>$|(<pad>|<mask>|<2mass>|\[@BOS@\])$", re.DOTALL)
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0
_Piece = tuple[str, float, int]  # text, score, and type: SentencePiece's numbers are those of gguf.TokenType
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


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
    unused = unused_beyond(tokenizer, source.config.get_text_config().vocab_size)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in unused]
    kind, bytes_ = content["model"]["type"], '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]])
    if kind == "BPE" and content["model"].get("byte_fallback"):
        _refuse_pre(source, pre)
        keys = _sentencepiece(source, content)
    elif kind == "BPE" and bytes_:
        keys = _byte_level(source, tokenizer, content, pre)
    else:
        raise SourceError(
            f"{source.path}: a {kind} tokenizer of this kind cannot be written as GGUF; byte-level BPE and "
            "SentencePiece BPE can"
        )
    ids = {key: getattr(tokenizer, f"{token}_id") for token, key in TOKENS.items()}
    keys |= {key: number for key, number in ids.items() if number is not None and number not in unused}
    letter = tokenizer("a").input_ids
    keys["add_bos_token"] = tokenizer.bos_token_id is not None and letter[:1] == [tokenizer.bos_token_id]
    keys["add_eos_token"] = tokenizer.eos_token_id is not None and letter[-1:] == [tokenizer.eos_token_id]
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


def _byte_level(source: Source, tokenizer: Any, content: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
    pieces = {id_: (token, 0.0, TokenType.NORMAL) for token, id_ in content["model"]["vocab"].items()}
    pieces |= {token["id"]: (token["content"], 0.0, _added_type(token)) for token in content["added_tokens"]}
    tokens, _, types = _padded(source, pieces)
    return {
        "model": "gpt2",
        "pre": pre or pre_tokenizer(source, tokenizer),
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in _merges(content)],
    }


def _sentencepiece(source: Source, content: Mapping[str, Any]) -> dict[str, Any]:
    model_file = source.path / "tokenizer.model"
    vocab: dict[str, int] = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    pieces: dict[int, _Piece] = {}
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
    tokens, scored, types = _padded(source, pieces)
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scored, "token_type": types}


def _added_type(token: Mapping[str, Any]) -> TokenType:
    special = token["special"] or _SPECIAL.match(token["content"])
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _padded(source: Source, pieces: Mapping[int, _Piece]) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types, for every row of the embedding. Raises SourceError."""
    size = source.config.get_text_config().vocab_size
    if max(pieces) >= size:
        raise SourceError(
            f"{source.path}: its tokenizer has the id {max(pieces)}, its embedding only {size} rows; copy the "
            "tokenizer of the same model"
        )
    rows = [pieces.get(id_) or (f"[PAD{id_}]", _PAD_SCORE, TokenType.UNUSED) for id_ in range(size)]
    return [text for text, _, _ in rows], [score for _, score, _ in rows], [int(kind) for _, _, kind in rows]


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


def read_pieces(path: Path) -> list[_Piece]:
    """The pieces of a ``tokenizer.model``, by id.

    Raises:
        SourceError: it cannot be read, or its pieces are not joined by score (a Unigram model).
    """
    kind = 1  # Unigram, where the file does not say
    pieces = []
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                found: dict[Any, Any] = {(part, type(content)): content for part, content in _fields(value)}
                score = struct.unpack("<f", found.get((2, bytes), bytes(4)))[0]
                pieces.append((found.get((1, bytes), b"").decode("utf-8"), score, found.get((3, int), 1)))
            elif field == 2 and isinstance(value, bytes):
                kind = next((int(content) for part, content in _fields(value) if part == 3), kind)
    except (OSError, IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise SourceError(f"{path}: not readable as a SentencePiece model ({error}); download it again") from error
    if kind != _BPE:
        raise SourceError(f"{path}: not a BPE model; llama.cpp would cut text otherwise than its Unigram does")
    return pieces


def scores_from_merges(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Scores that make llama.cpp join pieces in the order of `merges`; pieces that none makes come after all others.

    Raises:
        SourceError: llama.cpp would make a piece that no merge makes.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    for piece in vocabulary.keys() - ranks.keys():
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                raise SourceError(
                    f"no merge of its tokenizer makes {piece!r}, but llama.cpp would; put its tokenizer.model beside it"
                )
    return {piece: -float(ranks.get(piece, len(merges) + id_)) for piece, id_ in vocabulary.items()}


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-size numbers as their bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("it ends early")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
