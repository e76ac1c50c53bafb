"""How the process's memory allocator is set for work that makes and drops the same large tensors again and again.

glibc only; elsewhere (macOS, musl) these do nothing.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h: M_TRIM_THRESHOLD and so on
_LARGEST_IN_HEAP = 32 * 2**20  # the largest threshold that glibc takes
_LARGEST_WHILE_PAUSED = 4 * 2**20
_SMALL = 128 * 2**10  # what comes from the heap still where address space is limited
_KEPT = 512 * 2**20

_tuned = False
_threshold: int | None = None  # from how many bytes on tensors come straight from the system, as `tune` set it


def tune() -> None:
    """Set this process's allocator for work with large tensors, as the command line does for its own; once is enough.

    A library does not do so unasked: the settings hold for the whole process and cannot be read, so not be put back.
    Nothing that is computed depends on them.

    glibc then reuses what freed tensors held instead of handing it back to the kernel, which clears each page anew: a
    block's forward on 4096 tokens took 100,000 page faults and an eighth of its processor time for them (SmolLM2,
    2 cores). Where address space is limited (``ulimit -v``) the holes that this leaves would count, so there all but
    small tensors come straight from the kernel and return there: glibc asks for 96 bytes more to align a tensor than
    the hole of its like has, so that of tensors of one size (activations) its heap grows with every block.
    """
    global _tuned, _threshold
    libc = _glibc()
    if libc is None or _tuned:
        return
    _tuned = True
    libc.mallopt(_ARENA_MAX, 1)  # what one thread frees another can use
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    _threshold = _SMALL if limited else _LARGEST_IN_HEAP
    libc.mallopt(_MMAP_THRESHOLD, _threshold)
    if not limited:
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)


@contextmanager
def large_apart() -> Iterator[None]:
    """While inside, tensors of 4 MB and more come straight from the system and return there; in `tune`d processes only.

    Where some of a forward's tensors are kept and others of the same size let go, the heap gets holes that the next
    ones miss by the 96 bytes of their alignment: a seventh of the peak of SmolLM2's run. Small ones, which are many,
    stay in the heap.
    """
    libc = _glibc() if _tuned and _threshold == _LARGEST_IN_HEAP else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_WHILE_PAUSED)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)


def let_go() -> None:
    """Give the system back what was freed: blocks come and go, and what lies between them would only grow."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """glibc; None where there is another library, or none."""
    try:
        found = ctypes.CDLL(None)
        found.malloc_trim, found.mallopt  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return found
