"""quantkit: the variants of a language model that people publish, each with its measured loss of accuracy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantkit.blocks.allocator import tune
from quantkit.errors import QuantkitError, UsageError
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.verbs.card import card
    from quantkit.verbs.chat import chat
    from quantkit.verbs.compare import compare
    from quantkit.verbs.convert import convert
    from quantkit.verbs.diff import diff
    from quantkit.verbs.eval import eval
    from quantkit.verbs.generate import generate
    from quantkit.verbs.ggml import ggml
    from quantkit.verbs.gptq import gptq
    from quantkit.verbs.imatrix import imatrix
    from quantkit.verbs.inspect import inspect
    from quantkit.verbs.merge import merge
    from quantkit.verbs.perplexity import perplexity
    from quantkit.verbs.publish import publish
    from quantkit.verbs.release import release
    from quantkit.verbs.samples import samples
    from quantkit.verbs.verify import verify

__all__ = [
    "QuantkitError",
    "UsageError",
    "__version__",
    "card",
    "chat",
    "compare",
    "convert",
    "diff",
    "eval",
    "generate",
    "ggml",
    "gptq",
    "imatrix",
    "inspect",
    "merge",
    "perplexity",
    "publish",
    "release",
    "samples",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The verbs pull in torch and transformers, seconds of work: each is imported when it is first used."""
    if name in __all__:
        return getattr(import_module(f"quantkit.verbs.{name}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
