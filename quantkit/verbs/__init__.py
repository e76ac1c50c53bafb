"""The verbs: a module and a function each, of the name of the command."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin

from quantkit.options.spec import Options, Spec, bare, make, members

O = TypeVar("O", bound=Options)  # noqa: E741 - as in Options
P = ParamSpec("P")
R = TypeVar("R")

# What verbs take beside options.
_OTHERS = {
    "progress": "Receives bars, notes and warnings.",
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
                raise TypeError(f"{function.__name__}() {error}") from None
            fields = {name: given.pop(name) for name in spec.model_fields if name in given}
            required = {name for name, field in spec.model_fields.items() if field.is_required()}
            told = {name: value for name, value in fields.items() if value is not None or name in required}
            positional: Callable[..., R] = function
            return positional(make(spec, **told), **given)

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
    rest = [*fields.values(), *(one for one in others if one.kind is Parameter.KEYWORD_ONLY)]
    by_keyword = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in rest]
    return Signature([*first, *by_keyword], return_annotation=own.return_annotation)


def _parameter(spec: type[Options], name: str) -> Parameter:
    field = spec.model_fields[name]
    default = Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=_accepted(field.annotation))


def _accepted(kind: Any) -> Any:
    """What may be given for a field: any sequence for a tuple, a mapping for a spec."""
    kind = bare(kind)
    if len(members(kind)) > 1:
        union = _accepted(members(kind)[0])
        for one in members(kind)[1:]:
            union |= _accepted(one)
        return union
    if get_origin(kind) is tuple:
        return Sequence[_accepted(get_args(kind)[0])]  # type: ignore[misc]  # made at run time
    if get_origin(kind) is Mapping:
        return Mapping[tuple(map(_accepted, get_args(kind)))]  # type: ignore[misc]
    known = isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec
    return Mapping[str, Any] if known else kind


def _documented(spec: type[Options], function: Callable[..., Any], called: Signature) -> str:
    """A function's docstring with what it takes, before what it raises."""
    texts = {name: spec.help_of(name) if name in spec.model_fields else _OTHERS[name] for name in called.parameters}
    arguments = "\n".join(f"    {name}: {' '.join(text.split())}" for name, text in texts.items())
    head, raises, tail = cleandoc(function.__doc__ or "").partition("\nRaises:")
    return f"{head.rstrip()}\n\nArgs:\n{arguments}\n{raises}{tail}"
