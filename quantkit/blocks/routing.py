"""Which of a batch's tokens an expert runs with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from quantkit.late import torch

ROUTED: ContextVar[torch.Tensor | None] = ContextVar("ROUTED", default=None)
"""While an expert runs: the numbers of its tokens in the batch, int64 [n], ascending. Paused forwards each have their
own, as a greenlet has its own context."""


@contextmanager
def routing(tokens: torch.Tensor) -> Iterator[None]:
    """While inside, `ROUTED` are these; a forward may be ended there."""
    ROUTED.set(tokens)
    try:
        yield
    finally:
        ROUTED.set(None)
