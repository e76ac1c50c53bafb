"""Work on a CUDA stream of its own. On a CPU it happens in turn, where it stands."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from types import TracebackType

import torch


class Beside:
    """A ``with`` block whose work runs beside what the current stream still has to do.

    Make it where the block's inputs are ready, queue what is to run beside it, then enter it. The block waits for what
    was queued before it was made, and whatever is queued after the block waits for the block. A host that waits for a
    result inside the block does not wait for the work beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._ready = torch.cuda.current_stream(device).record_event()

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            # Memory of earlier blocks comes back to this stream only after its last use: what used it was queued
            # on the other stream before `_ready`.
            side = _side_stream(self._device)
            side.wait_event(self._ready)
            self._inside: AbstractContextManager[None] = torch.cuda.stream(side)
            self._inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self._inside.__exit__(kind, error, trace)
            torch.cuda.current_stream(self._device).wait_stream(_side_stream(self._device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one: memory belongs to the stream that it was taken on."""
    return torch.cuda.Stream(device)
