"""What is wrong with a command line, in this package's words instead of those of click, which Typer has a copy of."""

from __future__ import annotations

import re
from typing import Any

from quantkit.errors import meant


def said(error: Any) -> str:
    """A line for one of click's exceptions; "" where the help has been shown instead."""
    message = str(error.format_message())
    kind, context = type(error).__name__, getattr(error, "ctx", None)
    if kind == "NoSuchOption":
        names = (
            [name for one in context.command.params for name in one.opts if name.startswith("--")] if context else []
        )
        return f"{error.option_name}: no such option{meant(error.option_name, names)}"
    if kind == "MissingParameter" and (missing := re.search(r"'\[?([\w-]+)", message)):
        return f"{missing[1]} is missing; see {_help(context)}"
    if kind == "BadOptionUsage":
        return f"{error.option_name}: {'takes no value' if 'not take' in message else 'give a value'}"
    if extra := re.search(r"unexpected extra arguments? *(?:\(s\))? *\((.*)\)", message):
        return f"{extra[1]}: more than the command takes; see {_help(context)}"
    return message


def _help(context: Any) -> str:
    return f"`{context.command_path} --help`" if context else "`quantkit --help`"
