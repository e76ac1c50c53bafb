"""What the command line sets of its own process, and a library call leaves as it is."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from quantkit.blocks.allocator import tune


@contextmanager
def settled(arguments: Sequence[str]) -> Iterator[None]:
    """The process as a command wants it: its allocator tuned, and for an export no search for cycles.

    A vocabulary's hundred thousand words are no cycles, and while they are made Python goes over everything that is
    loaded again and again, for a fifth of an export's time.
    """
    tune()
    searches = gc.isenabled()
    if "ggml" in arguments[:1]:
        gc.disable()
    try:
        yield
    finally:
        if searches:
            gc.enable()
