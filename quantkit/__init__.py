"""quantkit: the variants of a language model that people publish, each with its measured loss of accuracy.

`__init__.pyi` beside this says what the verbs take; it is written from their specs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from quantkit.blocks.budget import tune
from quantkit.errors import QuantkitError, QuantkitWarning, UsageError
from quantkit.version import __version__

__all__ = [
    "QuantkitError",
    "QuantkitWarning",
    "UsageError",
    "__version__",
    "card",
    "chat",
    "compare",
    "convert",
    "diff",
    "generate",
    "ggml",
    "gptq",
    "imatrix",
    "inspect",
    "merge",
    "perplexity",
    "publish",
    "release",
    "repack",
    "samples",
    "tune",
    "verify",
]
_LIKE_BUILTINS = ("eval",)  # part of the library, but `from quantkit import *` replaces no function of Python's


def __getattr__(name: str) -> Any:
    """The verbs pull in torch and transformers, seconds of work: each is imported when it is first used."""
    if name in (*__all__, *_LIKE_BUILTINS):
        return getattr(import_module(f"quantkit.verbs.{name}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is to use: not what this module is made of."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_LIKE_BUILTINS})
