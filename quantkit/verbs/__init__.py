"""The verbs: a module and a function each, of the name of the command."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from quantkit.bars import Worded, listening
from quantkit.errors import QuantkitError, meant
from quantkit.options.spec import Options, Spec, alone, bare, choices, make, members
from quantkit.progress import Progress

O = TypeVar("O", bound=Options)  # noqa: E741 - as in Options
P = ParamSpec("P")
R = TypeVar("R")

# What verbs take beside options.
_OTHERS = {
    "progress": "True: bars, notes and warnings on stderr; or what receives them, a `quantkit.progress.Progress`; "
    "without, warnings come as `QuantkitWarning`.",
    "ranks": "The processes that share the work, from `quantkit.runs.ranks.joined`; each calls this alike.",
    "person": "Who talks with the model.",
}


def verb(spec: type[O]) -> Callable[[Callable[Concatenate[O, P], R]], Callable[..., R]]:
    """Let a function of a spec be called with its fields, as keywords: checked, and shown by `help`.

    None stands for the default of a field that is never None. The spec itself may be given in place of its fields.
    """

    def decorate(function: Callable[Concatenate[O, P], R]) -> Callable[..., R]:
        called = signature_of(spec, function)

        @functools.wraps(function)
        def call(*arguments: Any, **others: Any) -> R:
            if arguments and isinstance(arguments[0], spec):
                return function(*arguments, **others)
            try:
                given = called.bind(*arguments, **others).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}{_nearly(others, called)}") from None
            if "progress" in called.parameters:
                words = functools.partial(_in_arguments, spec, given)
                given["progress"] = Worded(listening(given.get("progress", False)), words)
            fields = {name: given.pop(name) for name in spec.model_fields if name in given}
            required = {name for name, field in spec.model_fields.items() if field.is_required()}
            told = {name: value for name, value in fields.items() if value is not None or name in required}
            positional: Callable[..., R] = function
            try:
                return positional(make(spec, **told), **given)
            except QuantkitError as error:
                if error.args and isinstance(error.args[0], str):
                    error.args = (_in_arguments(spec, fields, error.args[0]), *error.args[1:])
                raise

        call.__dict__["__signature__"] = called
        call.__doc__ = _documented(spec, function, called)
        return call

    return decorate


def signature_of(spec: type[Options], function: Callable[..., Any]) -> Signature:
    """A function's signature with the fields of a spec in place of it: arguments, and what it takes beside them, by
    position; `out` too, where an option may stand; the rest by keyword alone."""
    own = signature(function)
    others = list(own.parameters.values())[1:]
    fields = {name: _parameter(spec, name) for name in spec.in_order() if not spec.typed(name).display}
    first = [fields.pop(name) for name in spec.arguments]
    first += [one for one in others if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
    out = fields.get("out")
    if out is not None and (out.default is not Parameter.empty or first[-1].default is Parameter.empty):
        first.append(fields.pop("out"))
    by_keyword_only = (one for one in others if one.kind is Parameter.KEYWORD_ONLY)
    rest = [*fields.values(), *map(_listened, by_keyword_only)]
    by_keyword = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in rest]
    return Signature([*first, *by_keyword], return_annotation=own.return_annotation)


def _parameter(spec: type[Options], name: str) -> Parameter:
    field = spec.model_fields[name]
    default = Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=_accepted(field.annotation))


def _listened(one: Parameter) -> Parameter:
    """`progress` as callers may give it: a bool, or what receives it."""
    return one.replace(annotation=Progress | bool, default=False) if one.name == "progress" else one


def _nearly(given: Mapping[str, Any], called: Signature) -> str:
    """What an argument that is not taken may have been meant as."""
    unknown = [name for name in given if name not in called.parameters]
    return meant(unknown[0], called.parameters) if unknown else ""


def _in_arguments(spec: type[Options], given: Mapping[str, Any], text: str) -> str:
    """A message that names options of the command line, with the arguments of the function instead.

    Commands that are quoted stay: they are to be typed.
    """
    named = dict[str, tuple[str, bool]]()
    for name in spec.model_fields:
        spelled = f"--{name}" if name in spec.arguments else spec.spelling(name)
        plain, _, negated = spelled.partition("/")
        named |= {plain: (name, True), negated: (name, False)}

    def argument(found: re.Match[str]) -> str:
        name, flag = named.get(found[1], ("", False))
        if not name:
            return found[0]
        kind, value = spec.model_fields[name].annotation, given.get(name)
        known = [*map(str, value if isinstance(value, list | tuple | Mapping) else [value]), *choices(kind)]
        if re.match(rf" (\d|({'|'.join(map(re.escape, known))})(?!\w))", found.string[found.end() :]):
            return f"{name}=\0"
        return f"{name}={flag}" if kind is bool else name

    parts = re.split(r"(`[^`]*`)", text)
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"(?<!\w)(--[a-z][a-z-]*[a-z])", argument, parts[number]).replace("\0 ", "")
    return "".join(parts)


def _accepted(kind: Any) -> Any:
    """What may be given for a field: any sequence for a tuple, a mapping for a spec."""
    kind = bare(kind)
    if len(members(kind)) > 1:
        union = _accepted(members(kind)[0])
        for one in members(kind)[1:]:
            union |= _accepted(one)
        return union
    if get_origin(kind) is tuple:
        one = _accepted(get_args(kind)[0])
        several = Sequence[one]  # type: ignore[valid-type]  # made at run time
        return several | one if alone(kind) else several
    if get_origin(kind) is Mapping:
        return Mapping[tuple(map(_accepted, get_args(kind)))]  # type: ignore[misc]
    known = isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec
    return Mapping[str, Any] if known else kind


def _documented(spec: type[Options], function: Callable[..., Any], called: Signature) -> str:
    """A function's docstring with what it takes, before what it raises."""
    texts = {name: spec.help_of(name) if name in spec.model_fields else _OTHERS[name] for name in called.parameters}
    arguments = "\n".join(
        f"    {name}: {_in_arguments(spec, {}, ' '.join(text.split()))}" for name, text in texts.items()
    )
    head, raises, tail = cleandoc(function.__doc__ or "").partition("\nRaises:")
    return f"{head.rstrip()}\n\nArgs:\n{arguments}\n\nReturns:\n    {_returned(function)}\n{raises}{tail}"


def _returned(function: Callable[..., Any]) -> str:
    """The report's name, and what it is."""
    kind = get_type_hints(function)["return"]
    return f"{kind.__name__}: {(cleandoc(kind.__doc__ or '')).partition(chr(10))[0]}"
