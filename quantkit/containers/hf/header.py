"""The header of a safetensors file, read without the rest of it: the only reader of such headers here.

The library's `safe_open` maps the whole file to look at its header, which a process with a limit of address space
cannot do for a file larger than that; and it stops at the first fault. The rules are its own (safetensors' README,
section "Format", and its parser).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.containers.source import TensorInfo

_LENGTH = 8  # bytes that say how long a header is
_LARGEST = 100_000_000
_MOST = 2**64  # above every size, number of values and number of bits
_DEEPEST = 127  # objects and lists inside each other
BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its type by safetensors' name, and where its bytes start and stop in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype, self.bytes)


@dataclass(frozen=True)
class Header:
    """What a file's header says, as far as it can be believed.

    Attributes:
        entries: every tensor that is described soundly, by name, in the header's order.
        metadata: ``__metadata__``; empty where there is none, None where it cannot be read.
        size: bytes of the file.
        problems: what safetensors refuses as well, and tensors named twice, of which it takes the last.
    """

    entries: Mapping[str, Stored] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None
    size: int = 0
    problems: tuple[str, ...] = ()


def read_header(path: Path) -> Mapping[str, Stored]:
    """Every tensor of the file by name, in the header's order.

    Raises:
        ValueError: the first of the problems that `examine_header` finds.
        OSError: the file cannot be read.
    """
    header = examine_header(path)
    for problem in header.problems:
        raise ValueError(problem)
    return header.entries


def examine_header(path: Path) -> Header:
    """The header and everything that is wrong with it, in time that grows with its length. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(size - _LENGTH, _LARGEST):
            return Header(size=size, problems=(f"its header would be {length} bytes of a file of {size}",))
        raw = file.read(length)
    if len(raw) != length:
        return Header(size=size, problems=("the file has become shorter",))
    try:
        content = _parsed(raw)
    except (ValueError, RecursionError) as error:
        return Header(size=size, problems=(f"its header is no JSON ({error})",))
    if not isinstance(content, tuple):
        return Header(size=size, problems=("its header is no JSON object",))
    counts = Counter(name for name, _ in content)
    problems = [f"its header has {name!r} twice" for name, count in counts.items() if count > 1]
    entries: dict[str, Stored] = {}
    metadata: Mapping[str, str] | None = {}
    for name, value in content:
        if name == _METADATA:
            pairs = () if value is None else value
            readable = isinstance(pairs, tuple) and all(isinstance(text, str) for _, text in pairs)
            metadata = dict(pairs) if readable else None
            problems += [] if readable else [f"its {_METADATA} is no text by name"]
            continue
        try:
            entries[name] = _stored(value, _LENGTH + length)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return Header(entries, metadata, size, tuple(problems or _gaps(entries, _LENGTH + length, size)))


def _parsed(raw: bytes) -> Any:
    """JSON as safetensors' parser takes it, an object as a tuple of its pairs: names that come twice are to be seen.

    Raises:
        ValueError: no JSON.
        RecursionError: it is nested too deeply.
    """
    text = raw.decode("utf-8")
    content = json.loads(
        text, object_pairs_hook=tuple, parse_int=_whole, parse_float=_finite, parse_constant=_no_number
    )
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # an escaped half of a character is no text
    return content


def _whole(text: str) -> int | float:
    """A whole number, which -0 is not; one that no float holds is no number at all."""
    return _finite(text) if text == "-0" or len(text) > len(str(_MOST)) else int(text)


def _finite(text: str) -> float:
    value = float(text)
    return _no_number(text[:40]) if value in (float("inf"), float("-inf")) else value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _stored(entry: Any, data: int) -> Stored:
    """An entry, of a file whose tensors begin at byte `data`. Raises ValueError."""
    dtype, shape, offsets = _fields(entry)
    if isinstance(dtype, tuple) and len(dtype) == 1 and dtype[0][1] is None:  # {"F32": null}: serde's long form
        dtype = dtype[0][0]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"its type {str(dtype)[:40]} is none of the format")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"shape {str(shape)[:80]} or place {str(offsets)[:80]} are no whole numbers")
    count = 1
    for side in shape:
        count *= side
        if count >= _MOST:
            break
    if count * BITS[dtype] >= _MOST:
        raise ValueError(f"shape {str(shape)[:80]} is larger than any file")
    size, rest = divmod(count * BITS[dtype], 8)
    if rest:
        raise ValueError(f"shape {shape} of {dtype} ends within a byte")
    start, stop = offsets
    if stop - start != size:
        raise ValueError(f"shape {shape} of {dtype} takes {size} bytes, its place has {stop - start}")
    return Stored(dtype, tuple(shape), data + start, data + stop)


def _fields(entry: Any) -> tuple[Any, Any, Any]:
    """Type, shape and place of an entry: an object with those three once and whatever else, or the list of them."""
    if isinstance(entry, list) and len(entry) == len(_FIELDS):
        return entry[0], entry[1], entry[2]
    pairs = entry if isinstance(entry, tuple) else ()
    found, others = dict(pairs), [value for name, value in pairs if name not in _FIELDS]
    if len(pairs) - len(others) != len(_FIELDS) or not found.keys() >= set(_FIELDS):
        raise ValueError(f"its entry has not {', '.join(_FIELDS)} once each")
    if any(_is_deeper(value, _DEEPEST - 2) for value in others):
        raise ValueError("its entry is nested too deeply")
    return found["dtype"], found["shape"], found["data_offsets"]


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether more than so many objects and lists are inside each other."""
    if not isinstance(value, (tuple, list)):
        return False
    inside = value if isinstance(value, list) else [inner for _, inner in value]
    return levels == 0 or any(_is_deeper(inner, levels - 1) for inner in inside)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)


def _gaps(entries: Mapping[str, Stored], at: int, size: int) -> list[str]:
    """Tensors must follow each other without gap or overlap, to the end of the file."""
    for name, stored in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != at:
            return [f"{name} begins at byte {stored.start}, the tensor before it ends at {at}"]
        at = stored.stop
    return [] if at == size else [f"it has {size} bytes, its tensors end at {at}"]


def read_into(path: Path, start: int, rest: memoryview) -> None:
    """Fill a buffer with a file's bytes from `start` on. Raises OSError, also where the file has become shorter."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while rest and (count := file.readinto(rest)):  # at most 2 GB at once
            rest = rest[count:]
    if rest:
        raise OSError("the file has become shorter")
