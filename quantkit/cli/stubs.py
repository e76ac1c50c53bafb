"""What type checkers know of `quantkit.gptq` and its like: `python -m quantkit.cli.stubs` writes `__init__.pyi`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import Parameter, Signature, formatannotation, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import quantkit

_HEAD = '"""Written by `python -m quantkit.cli.stubs` from quantkit/options/verbs.py."""'
_PLACES = {
    "Any": "typing",
    "DrawnWindows": "quantkit.options",
    "Literal": "typing",
    "Mapping": "collections.abc",
    "Path": "pathlib",
    "Sequence": "collections.abc",
    "Spec": "quantkit.options.spec",
}


def stubs() -> str:
    """The text of the file."""
    functions = [
        made
        for name in sorted([*quantkit.__all__, "eval"])
        if not isinstance(made := getattr(quantkit, name), str | type)
    ]
    bodies = [_function(verb) for verb in functions]
    names = {name for body in bodies for name in re.findall(r"\b[A-Z]\w+\b", re.sub(r"'[^']*'", "", body))}
    places = dict(pair for verb in functions for pair in _places(sys.modules[verb.__module__], names))
    places |= {name: module for name, module in _PLACES.items() if name in names}
    lines = [
        f"from {module} import {', '.join(sorted(name for name in places if places[name] == module))}"
        for module in sorted(set(places.values()))
    ]
    lines += [
        f"from quantkit.errors import {name} as {name}" for name in ("QuantkitError", "QuantkitWarning", "UsageError")
    ]
    ours = sorted(line for line in lines if " quantkit." in line)
    others = sorted(set(lines) - set(ours))
    listed = "\n".join(["__all__ = [", *(f'    "{name}",' for name in quantkit.__all__), "]"])
    parts = [_HEAD, "\n".join(others), "\n".join(ours), listed, "\n".join(["__version__: str", "", *bodies])]
    return "\n\n".join(parts).replace("'", '"') + "\n"


def _places(module: ModuleType, names: set[str]) -> Iterator[tuple[str, str]]:
    for name in names & vars(module).keys():
        yield name, vars(module)[name].__module__


def _function(verb: Any) -> str:
    made: Signature = signature(verb)
    lines: list[str] = []
    star = False
    for one in made.parameters.values():
        if one.kind is Parameter.KEYWORD_ONLY and not star:
            lines, star = [*lines, "    *,"], True
        default = "" if one.default is Parameter.empty else " = ..."
        lines.append(f"    {one.name}: {_text(one.annotation)}{default},")
    taken = "\n".join(["", *lines, ""]) if lines else ""
    return f"def {verb.__name__}({taken}) -> {_text(made.return_annotation)}: ..."


def _text(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else formatannotation(annotation)
    plain = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
    if found := re.fullmatch(r"Union\[(Literal\[.*?\]), (.*)\]", plain):
        return " | ".join([found[1], *found[2].split(", ")])
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", plain)  # of a Literal


if __name__ == "__main__":
    Path(quantkit.__file__).with_suffix(".pyi").write_text(stubs(), encoding="utf-8")
