"""Codes on their way from a GPU to the host: packed where they are, copied once, while the GPU works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from quantkit.codes import Codes, QuantizedLinear, put_together, take_apart_packed
from quantkit.late import torch


class Carried:
    """The codes of a Linear, for whoever writes them; on a CPU they are there already.

    From a GPU they go into pinned memory, which it copies to by itself, on a stream of its own, so that nothing waits
    for them but `wait`.

    Attributes:
        tensors, fields: as `take_apart_packed` gives them, on the CPU; after `wait` the tensors have their values.
    """

    def __init__(self, linear: Codes) -> None:
        self._linear = linear
        packed, self.fields = take_apart_packed(linear)
        self.tensors, self.wait = _to_host(packed)

    def linear(self) -> Codes:
        """The same as writers take it: all that they ask for is on the CPU, but for the codes of a `QuantizedLinear`,
        which one in another layout than words may pack where they are. After `wait`."""
        if self._linear.codes.device.type == "cpu":
            return self._linear
        if not isinstance(self._linear, QuantizedLinear):
            return put_together(self.tensors, self.fields)
        scales, zeros, group = (self.tensors[name] for name in ("scales", "zeros", "group"))
        return replace(self._linear, scales=scales, zeros=zeros, group=group).with_words(self.tensors["words"])


def _to_host(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Callable[[], Any]]:
    """The tensors on the CPU, and what waits until they have their values."""
    device = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
    if device is None:
        return dict(tensors), lambda: None
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stream, found = _landing(device), dict[str, torch.Tensor]()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for name, tensor in whole.items():
            if tensor.device.type == "cpu":
                found[name] = tensor
                continue
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            found[name] = pinned.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # it may be let go before it was copied
    return found, stream.record_event().synchronize


@cache
def _landing(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
