"""Pieces and scores of a SentencePiece vocabulary, from its model file or from the merges of a tokenizer.json.

The model file is a protobuf message (sentencepiece_model.proto, `ModelProto`); the few fields that count are read here,
so that no package is needed for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError

Piece = tuple[str, float, int]
"""Text, score, and type: SentencePiece's numbers are those of gguf.TokenType."""

_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


def read_pieces(path: Path) -> list[Piece]:
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
