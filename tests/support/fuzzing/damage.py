"""Damage: bytes that are flipped, cut and spliced, and trees of JSON and YAML with values that nobody expects."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np
import yaml

from quantkit.containers.ggjt.read import MAGIC as GGJT_MAGIC
from quantkit.containers.ggjt.read import GgjtFile
from quantkit.containers.gguf.file import GgufFile

Damage = Callable[[Random, bytes], bytes]

# What integers are replaced by: nothing, signs and their neighbours, sizes that no memory has.
EXTREMES = (0, 1, 2, 3, 7, 31, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


# -- bytes --------------------------------------------------------------------------------------------------------


def bytes_of(dice: Random, data: bytes) -> bytes:
    """One to four places changed, removed, repeated or filled, or the end cut off."""
    content = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at, length = dice.randint(0, len(content)), dice.choice((1, 2, 4, 8, dice.randint(1, 300)))
        what = dice.choice(("flip", "flip", "bytes", "number", "insert", "remove", "repeat", "splice", "cut", "fill"))
        if what == "flip" and at < len(content):
            content[at] ^= 1 << dice.randint(0, 7)
        elif what == "bytes":
            content[at : at + length] = dice.randbytes(length)
        elif what == "number":
            width = dice.choice((1, 2, 4, 8))
            content[at : at + width] = struct.pack("<Q", dice.choice(EXTREMES))[:width]
        elif what == "insert":
            content[at:at] = dice.choice(
                (b"\0", b"\xff\xfe", b"\x1b]0;x\x07", "\u202e".encode(), dice.randbytes(length))
            )
        elif what == "remove":
            del content[at : at + length]
        elif what == "repeat":
            content[at:at] = content[at : at + length] * dice.choice((1, 2, 50))
        elif what == "splice":
            start = dice.randint(0, len(content))
            content[at : at + dice.choice((0, length))] = content[start : start + length]
        elif what == "cut":
            del content[at:]
        elif what == "fill":
            content[at : at + length] = bytes(length)
    return bytes(content)


def of_numbers(places: Callable[[bytes], tuple[list[Place], list[Place]]]) -> Damage:
    """Damage of a binary header whose numbers are known: mostly those, and bytes of the header."""
    known: dict[int, tuple[list[Place], list[Place]]] = {}

    def damage(dice: Random, data: bytes) -> bytes:
        integers, values = known.setdefault(hash(data), ([], []))
        if not integers:
            found = places(data)
            integers += found[0]
            values += found[1]
        content, end = bytearray(data), integers[-1][0]
        # Lengths of the vocabulary's strings are most of the numbers; counts, shapes and offsets are around them.
        rare = integers[:60] + integers[-150:]
        for _ in range(dice.randint(1, 4)):
            if dice.random() < 0.5:
                at, width = dice.choice(dice.choice((values, values, rare, integers)))
                value = dice.choice((dice.choice(EXTREMES), dice.randint(0, 300), dice.randint(0, 2**64 - 1)))
                content[at : at + width] = struct.pack("<Q", value)[:width]
            elif dice.random() < 0.7:
                content[:end] = bytes_of(dice, bytes(content[:end]))
                break  # the numbers are elsewhere now
            else:
                return bytes_of(dice, bytes(content))
        return bytes(content)

    return damage


Place = tuple[int, int]
"""Where a number is, and its width in bytes."""


def numbers_of_gguf(data: bytes) -> tuple[list[Place], list[Place]]:
    """Every number of a file's header, and those that are values of keys."""
    import tempfile
    from pathlib import Path

    base: Any = GgjtFile if data[:4] == GGJT_MAGIC else GgufFile

    class Recorder(base):  # type: ignore[misc]
        def _read_header(self) -> None:
            self.places: list[Place] = []
            self.values_of_keys: list[Place] = []
            super()._read_header()

        def _number(self, dtype: str) -> Any:
            self.places.append((self._at, np.dtype(dtype).itemsize))
            return super()._number(dtype)

        def _value(self, kind: int, key: str) -> Any:
            before = len(self.places)
            value = super()._value(kind, key)
            if len(self.places) == before + 1 and not isinstance(value, str):
                self.values_of_keys.append(self.places[-1])
            return value

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        found = Recorder(Path(file.name))
    return found.places, found.values_of_keys or found.places[2:9]  # of ggjt the sizes behind magic and version


# -- trees of JSON and YAML -------------------------------------------------------------------------------------------


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        10**4,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        -(10**30),
    ),
    *(10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1.5, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "0",
        "-1",
        "1e9",
        "null",
        "true",
        "a",
        "\n",
        "\x1b[2J",
        "\u202eabc",
        "\x00",
        "\ud800",
        "\U0001f600",
        "é" * 99,
    ),
    *(
        "x" * 5000,
        "../../etc/passwd",
        "/etc/passwd",
        ".",
        "..",
        "~",
        "model.safetensors",
        "a/b",
        "llama",
        "{{ 7*7 }}",
        "%s",
        "{0}",
    ),
    *([], {}, [[]], [None], [1, "a"], {"": None}, {"a": {"b": 1}}, [0] * 300, {str(n): n for n in range(50)}),
    *(_nested(51), _nested(300), _nested(301)),
)


def tree_of(dice: Random, value: Any) -> Any:
    """A tree with one to three of its nodes replaced, removed, repeated, renamed or moved."""
    content = deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        content = _one(dice, content)
    return content


def _one(dice: Random, root: Any) -> Any:
    holder = [root]
    places = list(_places(holder))
    if dice.random() < 0.6:  # long lists and tables must not hide the rest
        depth = dice.choice(sorted({level for _, _, level in places}))
        places = [place for place in places if place[2] == depth]
    into, key, _ = dice.choice(places)
    what = dice.choice(("odd", "odd", "odd", "near", "near", "remove", "repeat", "rename", "swap", "wrap"))
    old = into[key]
    if what == "odd":
        into[key] = deepcopy(dice.choice(ODD))
    elif what == "near":
        into[key] = _near(dice, old)
    elif what == "remove" and into is not holder:
        del into[key]
    elif what == "repeat" and isinstance(old, list) and old:
        into[key] = old * dice.choice((2, 3, 500 if len(old) < 50 else 2))
    elif what == "rename" and isinstance(into, dict):
        other = dice.choice((*map(str, into), str(key).upper(), f"{key}_", "", "\x1b[31m", "\u2066", "k" * 3000))
        into[other] = into.pop(key)
    elif what == "swap":
        there, other, _ = dice.choice(places)
        into[key], there[other] = deepcopy(there[other]), deepcopy(old)
    else:
        into[key] = dice.choice(([old], {"a": old}, [old, old], str(old)[:2000]))
    return holder[0]


def _places(holder: Any, level: int = 0) -> Any:
    """(what holds it, its key or number, how deep it lies) of every node."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield holder, key, level
        if isinstance(value, (dict, list)) and level < 40:
            yield from _places(value, level + 1)


def _near(dice: Random, value: Any) -> Any:
    """A value that is almost it."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        near = (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, str(value)[:400])
        return dice.choice((*near, float(value)) if abs(value) < 2**900 else near)
    if isinstance(value, float):
        return dice.choice((-value, value * 1e9, 1 / value if value else 1, round(value) if abs(value) < 1e300 else 0))
    if isinstance(value, str):
        at = dice.randint(0, len(value))
        added = dice.choice(
            ("", "\n", "\x1b[0m", "\u202e", " ", "\ud83d", "'", '"', "`", "|", "\\", "$(id)", "%", "a" * 999)
        )
        return dice.choice((value[:at], value[:at] + added + value[at:], value.upper(), value[::-1], value * 2))
    if isinstance(value, list):
        return dice.choice(
            (value[1:], value[::-1], value + value[:1], value[0] if value else None, dict.fromkeys(map(str, value)))
        )
    return dice.choice((list(value.values()), list(value), None, {**value, "unknown": 1}))


def json_of(dice: Random, data: bytes) -> bytes:
    """A JSON file with another tree, or with text that no tree has."""
    if dice.random() < 0.7:
        try:
            return json.dumps(tree_of(dice, json.loads(data)), indent=dice.choice((None, 2))).encode()
        except (ValueError, RecursionError):
            return bytes_of(dice, data)
    return _text_of(dice, data, _JSON_PIECES)


_JSON_PIECES = (
    *(
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"NaN",
        b"-Infinity",
        b"1" * 5000,
        b"1e99999",
        b"-0",
        b'"\\ud800"',
        b'"\\u0000"',
    ),
    *(
        b"null",
        b",",
        b"}",
        b"]",
        b"//",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b'"a":1,"a":2',
        b'"\x1b[2J"',
        b'"\xe2\x80\xae"',
        b"\x00",
    ),
)


def _text_of(dice: Random, data: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """Text with a piece put somewhere or in the place of a word; encoded otherwise; or bytes changed."""
    what = dice.choice(("piece", "piece", "word", "whole", "encoding", "bytes", "bytes"))
    if what == "piece":
        at = dice.randint(0, len(data))
        return data[:at] + dice.choice(pieces) + data[at:]
    if what == "word":
        words = [at for at, byte in enumerate(data) if byte in b" :,\n"]
        at = dice.choice(words or [0]) + 1
        end = min((stop for stop in words if stop > at), default=len(data))
        return data[:at] + dice.choice(pieces) + data[end:]
    if what == "whole":
        return dice.choice((b"", b"null", b"[]", b"{}", b'"a"', b"1", dice.choice(pieces)))
    if what == "encoding":
        text = data.decode("utf-8", "replace")
        return dice.choice((text.encode("utf-16"), b"\xef\xbb\xbf" + data, text.encode("latin-1", "replace"), data * 2))
    return bytes_of(dice, data)


def lines_of(dice: Random, data: bytes) -> bytes:
    """JSON lines: one of them damaged, repeated, dropped or in another's place; or the text of all."""
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    what = dice.choice(("line", "line", "line", "repeat", "drop", "swap", "text"))
    if what == "line":
        lines[at] = json_of(dice, lines[at]).replace(b"\n", dice.choice((b" ", b"\n")))
    elif what == "repeat":
        lines[at:at] = [lines[at]] * dice.choice((1, 3))
    elif what == "drop":
        del lines[at]
    elif what == "swap":
        other = dice.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        return _text_of(dice, data, _JSON_PIECES)
    return dice.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + dice.choice((b"\n", b""))


def yaml_of(dice: Random, data: bytes) -> bytes:
    """A YAML file with another tree, or with text that no tree has."""
    if dice.random() < 0.6:
        text = yaml.dump(tree_of(dice, yaml.safe_load(data)), allow_unicode=dice.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    return _text_of(dice, data, _YAML_PIECES)


_YAML_PIECES = (
    *(
        b"&a [*a]",
        b"*a",
        b"<<: *a\n",
        b"<<: {name: x}\n",
        b"!!python/object/apply:os.system [id]",
        b"!!binary aGk=",
        b"!!set {a}",
    ),
    *(
        b"!!timestamp 2001-99-99",
        b"2001-99-99",
        b"!!int x",
        b"1:99:99",
        b"0x",
        b"0b2",
        b".nan",
        b".inf",
        b"-.inf",
        b"~",
        b"? [a]\n: b\n",
    ),
    *(
        b"- " * 3000,
        b"[" * 3000,
        b"{a: " * 3000,
        b"\t",
        b"---\n",
        b"...\n",
        b"|\n",
        b">\n",
        b"'",
        b'"',
        b'"\\x1b[2J"',
        b'"\\uD800"',
        b"#",
    ),
    *(
        b"%YAML 9.9\n---\n",
        b"%TAG ! x\n",
        b"!!float 1e",
        b"!!null x",
        b"!!omap [a]",
        b"!!pairs 3",
        b"\xe2\x80\xae",
        b"\x00",
        b"1" * 5000,
    ),
    *(b"\xef\xbb\xbf", b"2020-01-01T25:61:61Z", b"9" * 20, b"!!bool maybe", b"key: value\n", b": ", b"? ", b"- "),
)


def front_of(dice: Random, data: bytes) -> bytes:
    """A card whose front matter is damaged, or its text."""
    start, head, body = data.split(b"---\n", 2)
    if dice.random() < 0.8:
        return start + b"---\n" + yaml_of(dice, head).removesuffix(b"\n") + b"\n---\n" + body
    return bytes_of(dice, data)


def template_of(dice: Random, data: bytes) -> bytes:
    """A Jinja template with a piece more, or bytes changed."""
    return _text_of(dice, data, _JINJA_PIECES)


_JINJA_PIECES = (
    *(
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"{#",
        b"{% if %}",
        b"{% for a in %}",
        b"{% endfor %}",
        b"{{ x.y.z }}",
        b"{{ 1/0 }}",
        b"{{ 'a' + 1 }}",
    ),
    *(
        b"{{ raise_exception('\x1b[2J\n no') }}",
        b"{{ messages[99].x }}",
        b"{{ ''.__class__.__mro__ }}",
        b"{{ messages.pop() }}",
    ),
    *(
        b"{% include 'x' %}",
        b"{% import 'x' as y %}",
        b"{% extends 'x' %}",
        b"{{ range(10**9) | list }}",
        b"{{ 'a' * 10**10 }}",
    ),
    *(
        b"{{ 10**10**7 }}",
        b"{{ strftime_now('%') }}",
        b"{{ messages | tojson }}",
        b"{% set x = 1 %}",
        b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ),
    *(
        b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        b"{{ cycler }}",
        b"{{ '%s' | format }}",
        b"{% break %}",
    ),
    *(
        b"{{ " + b"(" * 500,
        b"{% if x %}" * 300,
        b"\x00",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"{{ messages[0]['content'].encode() }}",
        b"{{ lipsum() }}",
    ),
)


# -- files of several parts -----------------------------------------------------------------------------------------


def safetensors_of(dice: Random, data: bytes) -> bytes:
    """A safetensors file with another header, or bytes changed."""
    length = int.from_bytes(data[:8], "little")
    if dice.random() < 0.3:
        return bytes_of(dice, data)
    head = json_of(dice, data[8 : 8 + length])
    told = len(head) if dice.random() < 0.9 else dice.choice(EXTREMES)
    return struct.pack("<Q", told) + head + data[8 + length :]


def zip_of(dice: Random, data: bytes) -> bytes:
    """A zip archive with a member damaged, renamed, repeated, left out or compressed; or bytes changed."""
    if dice.random() < 0.3:
        return bytes_of(dice, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at, packed = dice.randrange(len(members)), zipfile.ZIP_STORED
    at = dice.choice((at, next(number for number, (name, _) in enumerate(members) if name.endswith("data.pkl"))))
    name, content = members[at]
    what = dice.choice(("content", "content", "content", "content", "rename", "repeat", "drop", "pack", "swap"))
    if what == "content":
        members[at] = name, bytes_of(dice, content)
    elif what == "rename":
        members[at] = (
            dice.choice(("../x", "/etc/x", "data.pkl", f"{name}x", "a" * 3000, "\x1b[2J", members[0][0])),
            content,
        )
    elif what == "repeat":
        members.append((name, content))
    elif what == "drop":
        del members[at]
    elif what == "pack":
        packed = dice.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        other = dice.randrange(len(members))
        members[at], members[other] = (name, members[other][1]), (members[other][0], content)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packed) as archive:
        for member, inside in members:
            archive.writestr(member, inside)
    return written.getvalue()


def journal_of(dice: Random, data: bytes) -> bytes:
    """A journal with a record damaged, left out or repeated; half the time with seals that fit."""
    lines = data.splitlines()
    at = dice.randrange(len(lines))
    what = dice.choice(("record", "record", "record", "drop", "repeat", "bytes"))
    if what == "bytes":
        return bytes_of(dice, data)
    if what == "drop":
        del lines[at]
    elif what == "repeat":
        lines.insert(at, lines[at])
    else:
        seal, _, text = lines[at].partition(b" ")
        lines[at] = seal + b" " + json_of(dice, text).replace(b"\n", b" ")
    return b"".join(line + b"\n" for line in (_sealed(lines) if dice.random() < 0.5 else lines))


def _sealed(lines: list[bytes]) -> list[bytes]:
    """The lines with the seals of their records, as `quantkit.runs.journal` has them."""
    found, before = [], ""
    for line in lines:
        text = line.partition(b" ")[2].decode("utf-8", "replace")
        before = hashlib.sha256(f"{before} {text}".encode("utf-8", "surrogatepass")).hexdigest()
        found.append(f"{before} {text}".encode())
    return found
