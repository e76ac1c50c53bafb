"""A card's text from its template: one of the package's, or a user's own file."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from quantkit.errors import SourceError, UsageError
from quantkit.progress import significant, size

BUILT_IN = ("default", "thebloke-2023")
_COMPILED = "<template>"  # what jinja2 calls the file of a template that came as text


def read_template(name: str) -> str:
    """The text of a built-in template, or of a file. Raises UsageError."""
    if name in BUILT_IN:
        return (files("quantkit.verbs.card") / "templates" / f"{name}.md.j2").read_text(encoding="utf-8")
    place = Path(name).expanduser()
    if not place.is_file():
        raise UsageError(f"--template {name}: choose {', '.join(BUILT_IN)}, or name a file (.md.j2)")
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{place}: cannot be read: {error}") from error


def render(template: str, name: str, variables: Mapping[str, Any]) -> str:
    """The template with the variables put in; docs/publish.md lists them.

    Raises:
        UsageError: names the line of the template with an error, or with a variable that there is not.
    """
    # No HTML is escaped: Markdown is text, and the values are the publisher's own.
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(size=size, cell=_cell, number=significant)
    try:
        return environment.from_string(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"--template {name}, line {error.lineno}: {error.message}") from None
    except Exception as error:  # whatever an expression in a template raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _COMPILED]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--template {name}{where}: {error}") from None


def _cell(value: object) -> str:
    """Text that fits into a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
