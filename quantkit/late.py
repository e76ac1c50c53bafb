"""torch and transformers by names that import them when something of them is first asked for.

They take seconds of processor time, which what only looks at options, paths and headers does without. So no module
here imports either by itself: it takes these names, as with Python 3.15's ``lazy import``. Classes that derive from
theirs lie in modules that are imported when they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    import torch as torch
    import transformers as transformers
    from torch import nn as nn
else:

    class _Late(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.__name__), name)

    torch, nn, transformers = (_Late(name) for name in ("torch", "torch.nn", "transformers"))


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a name, such as "float16"."""
    found: torch.dtype = getattr(torch, name)
    return found


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """What ``@torch.inference_mode()`` makes of a function; that would import torch at once."""

    @functools.wraps(function)
    def call(*arguments: P.args, **others: P.kwargs) -> R:
        with torch.inference_mode():
            return function(*arguments, **others)

    return call
