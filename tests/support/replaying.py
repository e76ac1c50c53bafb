"""Runs whose blocks are replayed for each stage, as where paused forwards have no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quantkit.quantize import blockwise


@contextmanager
def replaying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While inside, no forward is paused."""
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "run_paused", blockwise.run_replayed)
        patch.setattr(blockwise.HiddenStates, "take", blockwise.HiddenStates.__getitem__)
        yield
