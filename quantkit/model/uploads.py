"""A block's tensors on their way to a GPU, on a stream of their own, while the block before it computes."""

from __future__ import annotations

from functools import cache

import torch


def uploaded(stored: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on `device`, for the thread that read them: it waits for the copies, so that nobody else has to.

    Each goes through pinned memory, from which the GPU copies by itself. Nothing happens where the device is a CPU.
    """
    if device.type != "cuda":
        return stored
    stream = _copying(device)
    with torch.cuda.stream(stream):
        for name in list(stored):
            pinned = stored.pop(name).contiguous().pin_memory()
            arrived = torch.empty_like(pinned, device=device)
            # The memory may be what an earlier block's tensor had: its last use was queued before it was let go.
            stream.wait_stream(torch.cuda.default_stream(device))
            stored[name] = arrived.copy_(pinned, non_blocking=True)
    stream.synchronize()
    return stored


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
