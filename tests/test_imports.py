"""Rooms of the package import only those below them, and modules of one room do not import each other in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import quantkit

# From low to high; what stands in one line is one room. The last are the doors: names that other programs import.
ROOMS = [
    {"errors", "late", "progress", "version", "options", "report", "bars"},
    {"runs"},
    {"codes"},
    {"containers"},
    {"sources"},
    {"blocks"},
    {"tokens"},
    {"quantize"},
    {"evaluate"},
    {"verbs"},
    {""},
    {"cli"},
    {"__main__", "chatting", "harness", "model", "parallel"},
]
ROOM = {name: number for number, names in enumerate(ROOMS) for name in names}

PACKAGE = Path(quantkit.__file__).parent


def named(path: Path) -> str:
    """A module's name below the package: "" for the package itself, "verbs.card" for verbs/card/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {named(path): path for path in PACKAGE.rglob("*.py")}


def imports(text: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "quantkit":
                yield inner if inner in MODULES else inner.rpartition(".")[0]


def room(module: str) -> int:
    return ROOM[module.partition(".")[0]]


def imported() -> dict[str, set[str]]:
    """Modules by name, each with those that it imports."""
    return {name: set(imports(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def test_every_import_of_the_package_is_found() -> None:
    text = """
import quantkit.errors
from typing import TYPE_CHECKING
from quantkit.runs import ranks as parallel
if TYPE_CHECKING:
    from quantkit.containers.source import Source
def late():
    from quantkit import UsageError
"""
    assert set(imports(text)) == {"errors", "runs.ranks", "containers.source", ""}


def test_every_module_has_its_room() -> None:
    assert {name for name in MODULES if name.partition(".")[0] not in ROOM} == set()


def test_no_room_imports_one_above_it() -> None:
    assert not {(one, other) for one, others in imported().items() for other in others if room(other) > room(one)}


def test_modules_of_one_room_do_not_import_each_other_in_a_circle() -> None:
    inside = {one: {other for other in others if room(other) == room(one)} for one, others in imported().items()}
    assert not {(one, other) for one, others in inside.items() for other in others if one in reached(other, inside)}


def reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    """A module and all that it imports, directly or not."""
    found, waiting = set[str](), [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


# What derives from classes of torch, transformers or the harness, or is compiled, and is imported where it is used.
HEAVY = {"blocks.experts", "verbs.eval.model", "verbs.generate.drawing"}
HEAVY |= {"quantize.kernels.columns", "quantize.kernels.grids"}


def test_no_module_imports_torch_before_it_computes() -> None:
    """Options, paths and headers are looked at without it (`quantkit.late`)."""
    names = [f"quantkit.{name}".rstrip(".") for name in sorted(MODULES.keys() - HEAVY - {"__main__"})]
    program = f"""
import sys
from importlib import import_module
for name in {names}:
    import_module(name)
    assert not {{"torch", "transformers"}} & sys.modules.keys(), name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
