"""Headers of safetensors files: taken and refused as the safetensors library does, which is the oracle."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from quantkit.containers.hf.header import Stored, examine_header, read_header
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.errors import SourceError

TYPES = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
UNKNOWN = ("C128", "F128", "I4", "U4", "I2", "U1", "F4_E2M1", "f32", "", "float32", "BF8", "F6", "F8")


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(**parts: str) -> str:
    return f'{{"a":{entry(**parts)}}}'


E = entry()
NUMBERS = ("-0", "0", "0.0", "0e0", "-1", "1e400", "1e-400", "true", "null", '"0"', "01", "+0", "0x0", "1" * 400)
NUMBERS += ("1" * 5000, str(2**63), str(2**64 - 1), str(2**64), "NaN", "-Infinity", "[]", "1.", ".5", "-")
STRINGS = (r"\ud800", r"\ude42", r"\ud83d\ude42", r"\ud83d\ud83d\ude42", r"\u0000", r"\\ud800", r"\/", r"\x", "\x01")
STRINGS += ("\x7f", "\ufeff", "\u2028", "\n", r"\n", r"\u12", "é", r"\U0041")

# What a header says, and how many bytes follow it.
HEADERS: list[tuple[str | bytes, int]] = [
    *((f"{before}{one()}{after}", 4) for before in ("", " ", "\n\t\r ", "\f", "\0", "\ufeff") for after in ("", "  ")),
    *((one() + after, 4) for after in ("\n", "\0", ",", "{}", "x", "\u00a0")),
    *((text, 0) for text in ("", " ", "{}", "[]", "null", "1", '"a"', "{", '{"a"}', "{,}", "{}}")),
    *((one(more=f',"x":{number}'), 4) for number in NUMBERS),
    *((one(offsets=f"[{number},4]"), 4) for number in NUMBERS),
    *((one(shape=f"[0,{number}]", offsets="[0,0]"), 0) for number in NUMBERS),
    *((f'{{"a":{number}}}', 0) for number in NUMBERS),
    *((one(more=f',"x":"{text}"'), 4) for text in STRINGS),
    *((f'{{"{text}":{E}}}', 4) for text in STRINGS),
    *((f'{{"__metadata__":{{"{text}":"{text}"}}}}', 0) for text in STRINGS),
    *((one(dtype=f'"{name}"', shape="[8]", offsets=f"[0,{bits}]"), bits) for name, bits in TYPES.items()),
    *((one(dtype=f'"{name}"', shape="[4]", offsets=f"[0,{bits // 2}]"), bits // 2) for name, bits in TYPES.items()),
    *((one(dtype=f'"{name}"', shape="[3]", offsets=f"[0,{bits}]"), bits) for name, bits in TYPES.items()),
    *((one(dtype=f'"{name}"', shape="[1]", offsets=f"[0,{bits // 8}]"), bits // 8) for name, bits in TYPES.items()),
    *((one(dtype=f'"{name}"', shape="[8]", offsets="[0,8]"), 8) for name in UNKNOWN),
    *((one(dtype=text), 4) for text in ("null", "1", "[]", "{}", '["F32"]', '{"F32":null}', '{"F32":{}}', '{"F32":1}')),
    (one(dtype='{"F32":null,"F32":null}'), 4),
    *((one(shape=shape), 4) for shape in ("[]", "[1,1]", "{}", "null", "1", "[[1]]", "[true]", "[2]", "[1.0]")),
    *((one(offsets=text), 4) for text in ("[]", "[0]", "[0,4,4]", "[4,0]", '{"0":0,"1":4}', "null", "[0,3]", "[1,5]")),
    *((one(shape=str(list(sides)), offsets="[0,0]"), 0) for sides in ((0,), (2**60, 0), (2**63, 2, 0), (0, 2**63, 2))),
    (one(shape=f"[{2**62},4]", offsets="[0,0]"), 0),
    (one(dtype='"F64"', shape=f"[{2**61}]", offsets="[0,0]"), 0),
    *((one(more=f',"x":{"[" * depth}{"]" * depth}'), 4) for depth in (1, 124, 125, 126, 200)),
    *(('{"a":' * depth + "1" + "}" * depth, 0) for depth in (2, 127, 128)),
    ("[" * 100_000, 0),
    # Names that come twice, but those of tensors.
    (one(more=',"x":1,"x":2'), 4),
    (one(more=',"x":{"y":1,"y":2}'), 4),
    *((one(more=f',{again}'), 4) for again in ('"dtype":"F32"', '"shape":[1]', '"data_offsets":[0,4]')),
    (f'{{"a":{E},"__metadata__":{{"x":"1","x":"2"}}}}', 4),
    (f'{{"__metadata__":{{}},"a":{E},"__metadata__":{{}}}}', 4),
    # An entry as a list, as serde reads it too.
    *((f'{{"a":{text}}}', 4) for text in ('["F32",[1],[0,4]]', '["F32",[1],[0,4],1]', '["F32",[1]]', "[]", '"F32"')),
    *((f'{{"a":{{{text}}}}}', 4) for text in ('"dtype":"F32","shape":[1]', '"shape":[1],"data_offsets":[0,4]', "")),
    *((f'{{"__metadata__":{text}}}', 0) for text in ("{}", "null", "[]", '{"a":1}', '{"a":null}', '{"a":{}}', '""')),
    *((f'{{"__metadata__":{{"format":"pt"}},"a":{E}}}', size) for size in (0, 3, 4, 5)),
    # Two tensors: one after the other in either order, with a hole, an overlap, or one place for both.
    *((f'{{"a":{entry(offsets=x)},"b":{entry(offsets=y)}}}', size)
      for x, y in (("[0,4]", "[4,8]"), ("[4,8]", "[0,4]"), ("[0,4]", "[5,9]"), ("[0,4]", "[3,7]"), ("[0,4]", "[0,4]"))
      for size in (4, 8, 9)),
    (f'{{"a":{E},"b":{entry(shape="[0]", offsets="[4,4]")},"c":{entry(shape="[0]", offsets="[0,0]")}}}', 4),
    (f'{{"a":{E},"b":{entry(shape="[0]", offsets="[2,2]")}}}', 4),
    (b'{"\xff":1}', 0),
    (b'{"a\xc3":' + E.encode() + b"}", 4),
]  # fmt: skip


def file_of(path: Path, header: str | bytes, size: int) -> Path:
    raw = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    return path


def theirs(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the library says that a file holds; None where it refuses it. Both its readers must agree."""
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError:
        found = None
    try:
        deserialize(path.read_bytes())
    except SafetensorError:
        assert found is None
    else:
        assert found is not None
    return found


def ours(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    header = examine_header(path)
    if header.problems:
        with pytest.raises(ValueError, match=f"^{re.escape(header.problems[0])}$"):
            read_header(path)
        return None
    assert header.entries == read_header(path)
    return {name: (stored.dtype, list(stored.shape)) for name, stored in header.entries.items()}


def test_headers_are_taken_and_refused_as_by_the_library(tmp_path: Path) -> None:
    taken = 0
    for header, size in HEADERS:
        path = file_of(tmp_path / "a.safetensors", header, size)
        expected = theirs(path)
        assert ours(path) == expected, (header[:200], examine_header(path).problems)
        taken += expected is not None
    assert len(HEADERS) > 300
    assert 80 < taken < len(HEADERS) - 80


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_files_that_are_too_short(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2)[:size] + b"{}"[: max(size - 8, 0)])
    assert (ours(path) is None) == (theirs_or_none(path) is None)


def theirs_or_none(path: Path) -> object:
    try:
        return deserialize(path.read_bytes())
    except SafetensorError:
        return None


@pytest.mark.parametrize("over", [0, 1])
def test_the_longest_header(over: int, tmp_path: Path) -> None:
    """100 MB and no byte more; what does not fit is not read."""
    text = one().encode()
    length = 100_000_000 + over
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + b" " * (length - len(text)) + bytes(4))
    assert (theirs(path) is None) == (ours(path) is None) == bool(over)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A sound header of a few tensors, in any order and with other keys, and what may have been changed in it."""
    entries, at = {}, 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(TYPES)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=3))
        bits = TYPES[dtype]
        for side in shape:
            bits *= side
        size = bits // 8
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        fields |= draw(st.dictionaries(st.text(max_size=3), VALUES, max_size=1))
        entries[f"t{number}"] = dict(draw(st.permutations(sorted(fields.items()))))
        at += size
    names = draw(st.permutations(sorted(entries)))
    content: dict[str, object] = {name: entries[name] for name in names}
    if draw(st.booleans()):
        content["__metadata__"] = draw(VALUES | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    text = json.dumps(content, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    for _ in range(draw(st.integers(0, 1))):
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place] + draw(st.sampled_from(["-", "0", "1", ".", "e", " ", ",", '"', "{", "]", "8"])) + text[place:]
        )
    return text, max(at + draw(st.sampled_from([0, 0, 0, 0, 1, -1])), 0)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers())
def test_random_headers_are_taken_and_refused_as_by_the_library(header: tuple[str, int], tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.safetensors", *header)
    assert ours(path) == theirs(path), examine_header(path).problems


def test_every_problem_is_listed(tmp_path: Path) -> None:
    texts = {"a": entry(dtype='"F31"'), "b": entry(offsets="[0,5]"), "c": "1", "d": E, "__metadata__": '{"x":1}'}
    header = "{" + ",".join(f'"{name}":{text}' for name, text in texts.items()) + "}"
    found = examine_header(file_of(tmp_path / "a.safetensors", header, 4))
    assert [problem.partition(" ")[0] for problem in found.problems] == ["a:", "b:", "c:", "its"]
    assert found.entries == {"d": Stored("F32", (1,), 8 + len(header), 12 + len(header))}
    assert found.metadata is None


@pytest.mark.parametrize("name", ["t{}", "t"], ids=["sound", "one name again and again"])
def test_the_time_grows_with_the_length(name: str, tmp_path: Path) -> None:
    """Of 8 times the entries it may take 30 times as long, were it quadratic it took 64 times."""

    def seconds(count: int) -> float:
        parts = (f'"{name.format(i)}":{entry(offsets=f"[{4 * i},{4 * i + 4}]")}' for i in range(count))
        path = file_of(tmp_path / "a.safetensors", "{" + ",".join(parts) + "}", 4 * count)
        started = time.process_time()
        examine_header(path)
        return time.process_time() - started

    shortest = min(seconds(40_000) for _ in range(3))  # a busy machine adds to some
    assert shortest < 30 * max(seconds(5_000) for _ in range(3))


@pytest.mark.parametrize("shape", [(2**64 - 1, 0), (0, 2**62, 2**62)])
def test_an_empty_tensor_that_torch_cannot_make(shape: tuple[int, ...], tmp_path: Path) -> None:
    file_of(tmp_path / "model.safetensors", one(shape=str(list(shape)), offsets="[0,0]"), 0)
    files = SafetensorsFiles(tmp_path)
    assert files.tensors["a"].shape == shape
    with pytest.raises(SourceError, match=r"a has shape \[.*\], which no tensor can have"):
        files.read("a")


def test_an_empty_tensor_and_a_scalar(tmp_path: Path) -> None:
    header = f'{{"a":{entry(shape="[2,0]", offsets="[0,0]")},"b":{entry(shape="[]")}}}'
    file_of(tmp_path / "model.safetensors", header, 4)
    files = SafetensorsFiles(tmp_path)
    assert torch.equal(files.read("a"), torch.empty(2, 0))
    assert torch.equal(files.read("b"), torch.tensor(0.0))
