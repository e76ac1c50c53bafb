"""The header of a safetensors file, read without the rest of it.

The library's `safe_open` maps the whole file to look at its header, which a process with a limit of address space
cannot do for a file larger than that. The rules are its own (safetensors' README, section "Format", and its parser).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LENGTH = 8  # bytes that say how long a header is
_LARGEST = 100_000_000
_MOST = 2**63
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its type by safetensors' name, and where its bytes start in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of the file by name, in the header's order.

    Raises:
        ValueError: a header that safetensors refuses as well, or one that names a tensor twice; or bytes of the file
            that belong to no tensor, or to two.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _LARGEST):
            raise ValueError(f"its header would be {length} bytes of a file of {size}")
        raw = file.read(length)
    if len(raw) != length:
        raise ValueError("the file has become shorter")
    entries = _parsed(raw)
    _check_metadata(entries.pop("__metadata__", None))
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    end = 0
    for start, stop, name in sorted((start, stop, name) for name, (start, stop) in spans.items()):
        if start != end:
            raise ValueError(f"invalid offset for tensor {name}")
        end = stop
    if _LENGTH + length + end != size:
        raise ValueError(f"its tensors end at byte {_LENGTH + length + end}, the file at {size}")
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), _LENGTH + length + spans[name][0])
        for name, entry in entries.items()
    }


def _parsed(raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"its header has {next(name for name in found if names.count(name) > 1)!r} twice")
        return found

    def no_number(text: str) -> Any:
        raise ValueError(f"its header holds {text}, which is no JSON")

    try:
        text = raw.decode("utf-8")
        entries = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # an escaped half of a character is no text
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    return entries


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no text by name")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor, counted behind the header."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} is of type {str(dtype)[:40]}, which the format has not")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape or data_offsets of {name} are no sizes")
    bits = _BITS[dtype]
    for side in shape:
        bits *= side
        if bits >= _MOST * 8:
            raise ValueError(f"{name} of shape {shape} is larger than any file")
    start, stop = offsets
    if start > stop:
        raise ValueError(f"invalid offset for tensor {name}")
    if 8 * (stop - start) != bits:
        raise ValueError(f"{name}: {stop - start} bytes for {dtype} of shape {shape}")
    return start, stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)
