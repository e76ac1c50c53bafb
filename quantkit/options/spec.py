"""What every option is made of: a field of a frozen spec, whose type bounds it and whose docstring is its help."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc, get_annotations, getsource
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from quantkit.errors import UsageError, meant, shortened

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True)
class Typed:
    """How a field is written on the command line, where that is not ``--its-name``.

    Attributes:
        spelled: an option or a pair, such as "--sym/--asym".
        metavar: what stands for an argument in the help.
        also: another spelling of the option, which is a key of recipes too.
        display: it decides on what is shown alone, so that the library's function does not take it.
        bare: the value where the option stands alone.
    """

    spelled: str = ""
    metavar: str = ""
    also: str = ""
    display: bool = False
    bare: str = ""


@dataclass(frozen=True)
class Words:
    """What `Annotated` says of a text that is one of these: more of them than a Literal's, which help would list."""

    words: tuple[str, ...]


class Spec(BaseModel):
    """Base of all specs: immutable, closed, written to and read from JSON. Known words are read blind to case."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _blind_to_case(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = {cls._known_as(name): value for name, value in given.items()}
        fields = cls.model_fields
        return {name: _as_meant(value, fields[name]) if name in fields else value for name, value in given.items()}

    @classmethod
    def _known_as(cls, key: str) -> str:
        """The field of a key that may be its other spelling."""
        other = f"--{key}"
        fields = () if key in cls.model_fields else cls.model_fields.items()
        return next((name for name, field in fields if other in [getattr(m, "also", "") for m in field.metadata]), key)

    def part(self, group: type[S]) -> S:
        """The fields of one of its groups by themselves."""
        return group(**{name: getattr(self, name) for name in group.model_fields})


class Options(Spec):
    """Base of what a verb takes, and of the groups that this is made of.

    Attributes:
        panel: heading of a group's options in the help.
        arguments: fields that the command line takes without their names, in order.
        defaults: of fields that are declared in another group, what they are here where they are not given. None is
            one more value then, of which type checkers know nothing: who reads such a field asks.
        helps: of such fields, what the help says here.
    """

    panel: ClassVar[str] = "Options"
    arguments: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    helps: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, default in cls.__dict__.get("defaults", {}).items():
            field = cls.model_fields[name]  # this class's own copy
            field.default = default
            if default is None:
                typed = [one for one in field.metadata if isinstance(one, Typed)]
                checks = [one for one in field.metadata if one not in typed]
                bounded: Any = Annotated[(field.annotation, *checks)] if checks else field.annotation
                field.annotation, field.metadata = bounded | None, typed

    @classmethod
    def in_order(cls) -> list[str]:
        """Fields in the order of help and signatures: arguments, what is the verb's own, then group after group."""
        declared = (name for one in cls.__mro__ for name in get_annotations(one) if name in cls.model_fields)
        return list(dict.fromkeys((*cls.arguments, *declared)))

    @classmethod
    def panel_of(cls, name: str) -> str:
        """Heading of the group that has this field: of the one that declares it, or else of the first made of that."""
        declaring = next(one for one in cls.__mro__ if name in get_annotations(one))
        groups = (one for one in reversed(cls.__mro__) if issubclass(one, declaring) and "panel" in one.__dict__)
        return str(next(groups, Options).__dict__["panel"])

    @classmethod
    def help_of(cls, name: str) -> str:
        """What a field is: as a group says of it, or its docstring."""
        for one in cls.__mro__:
            said = one.__dict__.get("helps", {}).get(name) or _documented(one.__module__).get((one.__name__, name))
            if said is not None:
                return str(said)
        raise KeyError(name)

    @classmethod
    def typed(cls, name: str) -> Typed:
        """How a field is written."""
        return next((one for one in cls.model_fields[name].metadata if isinstance(one, Typed)), Typed())

    @classmethod
    def spelling(cls, name: str) -> str:
        """A field as it is typed: ``--bits``, ``--sym/--asym``, or what stands for an argument."""
        typed = cls.typed(name)
        if name in cls.arguments:
            return typed.metavar.removesuffix("...") or name.upper()
        plain = name.replace("_", "-")
        pair = f"--{plain}/--no-{plain}" if cls.model_fields[name].default is True else f"--{plain}"
        return typed.spelled or pair


@cache
def _documented(module: str) -> dict[tuple[str, str], str]:
    """The strings below fields, by class and field. pydantic's own way would read each class's source at import."""
    found = {}
    for node in ast.parse(getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            for field, text in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[node.name, ast.unparse(field.target)] = cleandoc(ast.literal_eval(text.value))
    return found


def members(kind: Any) -> tuple[Any, ...]:
    """The types that a union is of; a type that is none by itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def bare(kind: Any) -> Any:
    """A type without what `Annotated` says of it."""
    return getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind


def choices(kind: Any) -> tuple[str, ...]:
    """The words of a Literal, or of one in a union; else none."""
    return next((get_args(one) for one in members(kind) if get_origin(one) is Literal), ())


def words_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field is one of; none where it may be anything."""
    told = [*field.metadata, *(one for kind in members(field.annotation) for one in getattr(kind, "__metadata__", ()))]
    return choices(field.annotation) or next((one.words for one in told if isinstance(one, Words)), ())


def alone(kind: Any) -> bool:
    """Whether a type is several texts or paths, for which one by itself may be given."""
    kind = bare(kind)
    return get_origin(kind) is tuple and bare(members(bare(get_args(kind)[0]))[0]) in (str, Path)


def _as_meant(value: Any, field: FieldInfo) -> Any:
    """A known word as it is spelled; one path or text as the only one of several."""
    if isinstance(value, str | Path) and alone(field.annotation):
        return (value,)
    return _as_spelled(value, words_of(field)) if isinstance(value, str) else value


def _as_spelled(value: str, words: Iterable[str]) -> str:
    return next((word for word in words if word.lower() == value.lower()), value)


# -- wrong values ------------------------------------------------------------------------------------------------------


def make(spec: type[S], **fields: Any) -> S:
    """Make a spec; raise `UsageError` with one line for the first field that does not fit."""
    try:
        return spec(**fields)
    except ValidationError as error:
        found = error.errors()  # a key that is misspelled comes before the one that is missing for it
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        where, said = [shortened(part) for part in map(str, first["loc"]) if not _MEMBER.match(part)], _said(first)
    if where and issubclass(spec, Options):
        option, given = spec.spelling(where[0]).partition("/")[0], fields.get(where[0])
        within = "".join(f"{part}: " for part in where[1:]) if isinstance(given, Mapping) else ""
        raise UsageError(f"{option}: {within}{said}" if within else f"{option} {shortened(str(given))}: {said}")
    if first["type"] == "extra_forbidden":
        said += meant(where[-1], _keys_at(spec, where[:-1]))
    shown = where and first["type"] not in ("missing", "union_tag_not_found")
    got = f" (got {shortened(repr(first['input']))})" if shown else ""
    raise UsageError("".join(f"{part}: " for part in where) + said + got)


def _keys_at(spec: type[Spec], where: Iterable[str]) -> set[str]:
    """The keys that a place within a spec may have."""
    here = [spec]
    for part in where:
        if not part.isdigit():
            inner = [
                kind for one in here if part in one.model_fields for kind in _specs(one.model_fields[part].annotation)
            ]
            tagged = [one for one in here if part in choices(getattr(one.model_fields.get("kind"), "annotation", None))]
            here = inner or tagged
    return {name for one in here for name in one.model_fields}


def _specs(kind: Any) -> list[type[Spec]]:
    """The specs that an annotation speaks of."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return [kind] if issubclass(kind, Spec) else []
    return [found for one in get_args(kind) for found in _specs(one)]


_MEMBER = re.compile(r"(lax-or-strict|function-\w+|is-instance)\[")  # what pydantic calls a member of a union
_WORDS = {
    "greater_than": "give more than {gt}",
    "greater_than_equal": "give at least {ge}",
    "less_than": "give less than {lt}",
    "less_than_equal": "give at most {le}",
    "finite_number": "give a number",
    "string_type": "give text",
    "path_type": "give a path",
    "missing": "is missing",
    "extra_forbidden": "no such key",
    "union_tag_invalid": "choose {expected_tags}",
    "union_tag_not_found": "{discriminator} is missing",
}
_KINDS = {
    "string": "give text",
    "int": "give a whole number",
    "float": "give a number",
    "bool": "give true or false",
    "tuple": "give a list",
    "dict": "give keys and values",
    "mapping": "give keys and values",
    "model": "give keys and values",
}


def _said(error: Any) -> str:
    """What is wrong with a value, in a few words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"choose {context['expected'].replace(' or ', ', ')}".replace("'", "")
    if kind in _WORDS:
        return _WORDS[kind].format(**{key: _plain(value) for key, value in context.items()})
    return _KINDS.get(kind.partition("_")[0]) or str(error["msg"])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")
