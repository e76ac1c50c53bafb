"""quantkit: the variants of a language model that people publish, each with its measured loss of accuracy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.chatting import chat
    from quantkit.comparing import compare
    from quantkit.conversion import convert
    from quantkit.drawing import samples
    from quantkit.evaluating import perplexity
    from quantkit.export import ggml
    from quantkit.generation import generate
    from quantkit.harness.verb import eval
    from quantkit.importance import imatrix
    from quantkit.inspection import inspect
    from quantkit.merging import diff, merge
    from quantkit.pipeline import gptq
    from quantkit.publishing.card import card
    from quantkit.publishing.hub import publish
    from quantkit.releasing import release
    from quantkit.verification import verify

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
    "verify",
]

# The verbs pull in torch and transformers, seconds of work: they are imported when first used.
_VERBS = {
    "card": "publishing.card",
    "chat": "chatting",
    "compare": "comparing",
    "convert": "conversion",
    "diff": "merging",
    "eval": "harness.verb",
    "generate": "generation",
    "ggml": "export",
    "gptq": "pipeline",
    "imatrix": "importance",
    "inspect": "inspection",
    "merge": "merging",
    "perplexity": "evaluating",
    "publish": "publishing.hub",
    "release": "releasing",
    "samples": "drawing",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(f"quantkit.{_VERBS[name]}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
