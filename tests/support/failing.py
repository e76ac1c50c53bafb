"""A function that fails at a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantkit.errors import UsageError


def failing_at(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function`, which raises a UsageError at call number `call`, from 1."""
    calls = iter(range(1, call))

    def run(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise UsageError("enough")
        return function(*arguments)

    return run
