"""Patterns that a file brings along, after Python's `re`: matched with a limit to their time, size and memory."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

import regex

from quantkit.errors import SourceError, shortened

# Of a pattern: seconds to look at a name, characters, and the product of what it repeats, which takes memory.
_PATTERN_SECONDS, _MOST_PATTERN, _MOST_REPEATS = 1.0, 100_000, 10_000


def fits(pattern: str, name: str, origin: str) -> bool:
    """Whether a name begins with what a pattern stands for.

    Raises:
        SourceError: it is no pattern, or takes too long; `origin` says where it is from.
    """
    try:
        return bool(_compiled(pattern).match(name, timeout=_PATTERN_SECONDS))
    except (regex.error, TimeoutError, RecursionError, ValueError) as error:
        raise SourceError(f"{origin} {shortened(pattern)!r} is no pattern: {error}") from None


@lru_cache(1 << 16)
def _compiled(pattern: str) -> Any:
    """A file's pattern; its matches can be given a limit, as those of `re` cannot. Raises ValueError for a bomb."""
    repeats = (int(count) for count in re.findall(r"\{(?:\d*,)?(\d+)", pattern))
    if len(pattern) > _MOST_PATTERN or math.prod(max(1, count) for count in repeats) > _MOST_REPEATS:
        raise ValueError("it is too long, or repeats too much")
    return regex.compile(pattern)
