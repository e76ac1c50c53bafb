"""What verbs return: reports that become JSON, are read back from it with checks, and say themselves in lines."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Self, Union, get_args, get_origin, get_type_hints

from quantkit.errors import QuantkitError

LEFT_OUT: Final[Mapping[str, None]] = {"json": None}
"""Metadata of a field that is not in the JSON."""


def called(key: str) -> Mapping[str, str]:
    """Metadata of a field that the JSON has under another name."""
    return {"json": key}


class ReportError(QuantkitError):
    """What was to be read back is no such report. Says which key, and what is wrong with it."""


# -- what is shown -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line in a colour or style, such as "red" or "dim"; one without is plain text."""

    text: str
    style: str


@dataclass(frozen=True)
class Text:
    """Text of any number of lines; anything else is one line, whatever names are in it."""

    text: str


@dataclass(frozen=True)
class Rule:
    """A line across the screen, with a title at its left."""

    title: str


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        drop: on a narrow terminal columns with the largest number are left out first; those with 0 stay.
        wraps: text goes on in the next line, at words, where it is too wide.
    """

    head: str
    justify: Literal["left", "center", "right"] = "right"
    drop: int = 0
    wraps: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under heads, or without; the first column has names.

    Attributes:
        short: where there is little room, names lose what all begin with.
        indent: spaces before each row.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    heads: bool = True
    short: bool = False
    indent: int = 0


Shown = str | Line | Rule | Table | Text


def common_start(names: Sequence[str]) -> str:
    """What all names begin with, up to a mark such as "-" behind which each goes on; "" of a single name.

    The point of a number such as 1.0 is no mark.
    """
    start = 0
    for at in range(1, min(map(len, names)) if len(names) > 1 else 0):
        number = (
            names[0][at - 1] == "." and any(name[at].isdigit() for name in names) and names[0][:at][-2:-1].isdigit()
        )
        if len({name[:at] for name in names}) == 1 and names[0][at - 1] in "-_./" and not number:
            start = at
    return names[0][:start] if names else ""


# -- reports -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Base of reports, frozen dataclasses. Fields are text, numbers, paths, reports and other dataclasses, and
    sequences and mappings of these; the metadata of one may be `LEFT_OUT` or `called(...)`."""

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        content: dict[str, Any] = _plain(self)
        return content

    def lines(self, *_: Any, **display: Any) -> Iterable[Shown]:
        """What a person is shown. Subclasses name what may be asked of it, each with a default."""
        return ()

    @classmethod
    def of(cls, content: Any, **left_out: Any) -> Self:
        """Read back what `as_dict` made; what JSON made of it does as well.

        Args:
            content: the object. Keys may be missing of fields that have a default.
            left_out: fields that it does not hold, where they have no default.

        Raises:
            ReportError: names the first key that is unknown, missing or of another type.
        """
        report: Self = _of_dataclass(cls, content, "", left_out)
        return report


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {key: _plain(getattr(value, field.name)) for key, field in _keys(type(value)).items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _keys(kind: Any) -> dict[str, Field[Any]]:
    """Fields by their keys in the JSON, in order, without those that it lacks."""
    named = ((field.metadata.get("json", field.name), field) for field in fields(kind))
    return {key: field for key, field in named if key is not None}


def _of_dataclass(kind: Any, content: Any, where: str, left_out: Mapping[str, Any]) -> Any:
    if not isinstance(content, Mapping):
        raise ReportError(f"{where or 'this'} is no object")
    keys, types = _keys(kind), get_type_hints(kind)
    if unknown := [key for key in content if key not in keys]:
        raise ReportError(f"{_within(where, unknown[0])} is unknown")
    given, reckoned = dict(left_out), dict[str, Any]()
    for key, field in keys.items():
        if key in content:
            read = _of(types[field.name], content[key], _within(where, key))
            (given if field.init else reckoned)[field.name] = read
        elif field.init and field.default is MISSING and field.default_factory is MISSING:
            raise ReportError(f"{_within(where, key)} is missing")
    report = kind(**given)
    for name, value in reckoned.items():  # it may rest on a field that is left out
        object.__setattr__(report, name, value)
    return report


def _of(kind: Any, value: Any, where: str) -> Any:
    """A value of a field's type; of unions those with None."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _of_dataclass(kind, value, where, {})
    if origin in (Union, UnionType):
        (other,) = (member for member in inner if member is not NoneType)
        return None if value is None else _of(other, value, where)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_of(inner[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        read = {}
        for key, item in value.items():
            at = _within(where, key)
            known = int(key) if inner[0] is int and str(key).isdecimal() else key  # JSON has text for numbers
            read[_of(inner[0], known, at)] = _of(inner[1], item, at)
        return read
    if kind is Path and isinstance(value, str):
        return Path(value)
    whole = kind is float and type(value) is int
    if kind is Any or type(value) is kind or whole or (origin is Literal and value in inner):
        return value
    wanted = f"one of {', '.join(map(str, inner))}" if origin is Literal else f"of type {kind.__name__}"
    raise ReportError(f"{where} is {reprlib.repr(value)}, not {wanted}")


def _within(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
