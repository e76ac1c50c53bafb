"""A verb's spec as a command: Typer reads its options from a signature that is made here."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from quantkit.blocks.budget import tune
from quantkit.cli import console
from quantkit.options import Terminal, make, verbs
from quantkit.options.spec import Options, bare, choices, members, words_of
from quantkit.runs.ranks import joined

_REMEDIES = {True: "go on with --resume, with as many processes as are left", False: "start it again"}
# What of a verb's report, where it is not empty, ends the command with 1.
_FAILURES = {"compare": "unmet", "verify": "problems", "release": "failures"}
_WORDS = {str: "str", Path: "path", int: "int", float: "float"}


def spec_of(name: str) -> type[Options]:
    """The spec of a verb, whose name is that of its module, its function and its command."""
    spec: type[Options] = getattr(verbs, name.capitalize())
    return spec


def command_of(name: str) -> Callable[..., None]:
    """The command of a verb, whose module is imported when it runs."""
    spec = spec_of(name)

    def command(**given: Any) -> None:
        told = make(Terminal, **{field: given[field] for field in Terminal.model_fields})
        fields = {field: given[field] for field in spec.model_fields if given[field] is not None}
        options = make(spec, **fields)
        with settled(name):
            _run(name, options, told)

    parameters = [_parameter(spec, field) for field in spec.in_order()]
    parameters += [_parameter(Terminal, field) for field in Terminal.in_order() if field not in spec.model_fields]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def class_of(name: str) -> type[TyperCommand]:
    """The class of a verb's command, which takes some options without a value: Typer has no such ones."""
    spec = spec_of(name)
    bare = {spec.spelling(field): one for field in spec.model_fields if (one := spec.typed(field).bare)}

    class Filled(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            given: list[str] = []
            for word, after in zip_longest(args, args[1:], fillvalue="-"):
                given += [word, bare[word]] if word in bare and after.startswith("-") else [word]
            return super().parse_args(ctx, given)

    return Filled


@contextmanager
def settled(verb: str) -> Iterator[None]:
    """The process as a verb wants it: its allocator tuned, and for an export no search for cycles.

    A vocabulary's hundred thousand words are no cycles, and while they are made Python goes over everything that is
    loaded again and again, for a fifth of an export's time.
    """
    tune()
    searched = gc.isenabled()
    (gc.disable if verb == "ggml" else gc.enable)()
    try:
        yield
    finally:
        (gc.enable if searched else gc.disable)()


def _run(name: str, options: Options, told: Terminal) -> None:
    """Call a verb and show its report. Raises typer.Exit where that tells of a failure."""
    if isinstance(options, verbs.Release) and isinstance(options.recipe, str | Path):
        from quantkit.verbs.recipe import load_recipe

        load_recipe(options.recipe)  # what is wrong with it is told before torch is imported
    module = import_module(f"quantkit.verbs.{name}")
    verb, bars = getattr(module, name), console.Bars(told.quiet)
    takes = inspect.signature(verb).parameters
    others: dict[str, Any] = {"progress": bars}
    if "person" in takes:
        from quantkit.cli.terminal import Terminal as Person

        others["person"] = Person(silent=told.as_json, quiet=told.quiet)
    fields = type(options).model_fields
    with joined(getattr(options, "device", "auto"), _REMEDIES["resume" in fields], bars) as ranks:
        others["ranks"] = ranks
        report = verb(options, **{key: value for key, value in others.items() if key in takes})
    if not ranks.first:
        return
    display = {field: getattr(options, field) for field in fields if options.typed(field).display}
    if told.as_json:
        console.print_json(report.as_dict())
    elif report is not None:
        console.show(report.lines(**display))
    failure = getattr(report, _FAILURES[name]) if name in _FAILURES else None
    if isinstance(failure, str):
        console.say(failure, "red")
    if failure:
        raise typer.Exit(1)


def _parameter(spec: type[Options], name: str) -> inspect.Parameter:
    """A field as Typer takes it. Whatever is no flag is text here, for its spec to read and to refuse."""
    field, typed = spec.model_fields[name], spec.typed(name)
    help = re.sub(r"\[(?=[a-z#/@])", r"\\[", " ".join(spec.help_of(name).split()))  # no markup, as rich has it
    given = None if field.is_required() else field.get_default(call_default_factory=True)
    kind, several, word = _kind(field.annotation)
    default: Any = inspect.Parameter.empty if field.is_required() else None
    if kind is bool:
        default = given
    elif not several and given is not None:
        default = str(given)
    taken: Any = list[str] if several else kind
    if default is None:
        taken = taken | None
    if name in spec.arguments:
        info = typer.Argument(metavar=typed.metavar or None, help=help, show_default=False)
    else:
        shown = default not in (None, inspect.Parameter.empty)
        spelled = typed.spelled.split("/") if typed.spelled.endswith("-q") else [spec.spelling(name)]
        spelled += [typed.also] if typed.also else []
        info = typer.Option(
            *spelled,
            metavar=None if kind is bool else f"[<{word}>]" if typed.bare else f"<{word}>",
            help=help,
            show_default=shown,
            rich_help_panel=spec.panel_of(name),
            autocompletion=_words(words_of(field)),
        )
    annotation = Annotated[taken, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _words(known: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    """What a shell offers for a value; None: names of files."""
    return (lambda incomplete: [word for word in known if word.startswith(incomplete.lower())]) if known else None


def _kind(annotation: Any) -> tuple[Any, bool, str]:
    """What Typer takes for a field, whether several times, and what stands for a value in the help."""
    first = bare(members(bare(members(annotation)[0]))[0])
    if get_origin(first) is tuple:
        return str, True, _kind(get_args(first)[0])[2]
    if first is bool:
        return bool, False, "bool"
    word = "|".join(choices(annotation)) or _WORDS.get(first)
    return str, word is None, word or "str"
