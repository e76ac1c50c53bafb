"""Links in a folder that somebody else made: what they may lead to, and what is never opened.

People keep weights, config and tokenizer as links into other folders; such a file is taken where its content is what
its name says. Anything else (a licence, a card, a chat template, a picture) is copied, quoted or published as it is, so
it must lie in the folder itself, or in the Hub's cache that the folder is of: a link to a private file would carry that
along.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantkit.runs.atomic import LARGEST_TEXT

_TABLE_BYTES = 1 << 16  # of a vocabulary's beginning


def is_foreign(path: Path, folder: Path) -> bool:
    """Whether a file is a link out of the folder to something else than a part of a model."""
    return not lies_within(path, folder) and not _is_part_of_a_model(path)


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path ends, after all links, in the folder, or among the files of the Hub's cache that it shows."""
    real, root = path.resolve(), folder.resolve()
    snapshots = [one.parent for one in (root, *root.parents) if one.parent.name == "snapshots"]
    blobs = [one.parent / "blobs" for one in snapshots if one.parent.name.startswith(("models--", "datasets--"))]
    return any(real.is_relative_to(place) for place in (root, *blobs))


def foreign_files(folder: Path) -> Iterator[Path]:
    """Links of a folder that lead out of it, to a folder or to something else than a part of a model."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and (not lies_within(path, folder) if path.is_dir() else is_foreign(path, folder)):
            yield path


def first_pipe(folder: Path) -> Path | None:
    """Something in the folder that is neither file nor folder, and may never end when it is read."""
    inside = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    return next((path for path in inside if path.exists() and not path.is_file() and not path.is_dir()), None)


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda content: any(key in content for key in keys)


def _counts(content: dict[str, Any]) -> bool:
    return bool(content) and all(type(value) is int for value in content.values())


# What a JSON file of such a name holds.
_OBJECTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "config.json": _has("model_type", "architectures"),
    "generation_config.json": _has("transformers_version", "bos_token_id", "eos_token_id"),
    "quantize_config.json": _has("bits"),
    "tokenizer.json": _has("model"),
    "tokenizer_config.json": _has("tokenizer_class", "added_tokens_decoder", "model_max_length"),
    "special_tokens_map.json": lambda held: bool(held) and all(k.endswith(("_token", "_tokens")) for k in held),
    "vocab.json": _counts,
    "added_tokens.json": _counts,
    "preprocessor_config.json": _has("processor_class", "image_processor_type", "feature_extractor_type"),
    "processor_config.json": _has("processor_class"),
}
# What files of such a name begin with.
_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    ".gguf": (b"GGUF",),
    ".bin": (b"PK\x03\x04", b"\x80\x02", b"tjgg", b"lmgg", b"fmgg", b"tggg"),
    ".ggml": (b"tjgg", b"lmgg", b"fmgg", b"tggg"),
}


def _is_part_of_a_model(path: Path) -> bool:
    """Whether a file is weights, config or tokenizer, by its name and by what it holds."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".json":
            known = _has("weight_map") if path.name.endswith(".index.json") else _OBJECTS.get(path.name)
            if known is None or path.stat().st_size > LARGEST_TEXT:
                return False
            content = json.loads(path.read_text(encoding="utf-8"))
            return isinstance(content, dict) and known(content)
        with path.open("rb") as file:
            start = file.read(_TABLE_BYTES)
    except (OSError, ValueError, RecursionError):
        return False
    if path.suffix == ".safetensors":
        return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    if path.suffix == ".model":  # SentencePiece's: a message whose first part is a piece
        return start[:1] == b"\n" and b"<unk>" in start
    if path.name == "merges.txt":
        return start.startswith(b"#version") or "Ġ".encode() in start
    if path.name == "vocab.txt":
        return b"[UNK]" in start or b"[PAD]" in start
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in start.splitlines()[:-1]]
        return bool(lines) and all(len(parts) == 2 and parts[1].isdigit() for parts in lines)
    return start.startswith(_BEGINNINGS.get(path.suffix, ()))
