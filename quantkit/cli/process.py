"""What the command line sets of its own process, and a library call leaves as it is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.blocks.allocator import tune


@contextmanager
def settled(verb: str) -> Iterator[None]:
    """The process as a verb wants it: its allocator tuned, and for an export no search for cycles.

    A vocabulary's hundred thousand words are no cycles, and while they are made Python goes over everything that is
    loaded again and again, for a fifth of an export's time.
    """
    tune()
    searched = gc.isenabled()
    (gc.disable if verb == "ggml" else gc.enable)()
    try:
        yield
    finally:
        (gc.enable if searched else gc.disable)()
