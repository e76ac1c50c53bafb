"""A model's weights under the names they are published by, and where each parameter lies in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantkit.containers.source import Source, TensorInfo


@dataclass(frozen=True)
class Place:
    """Where a published tensor's values are: a tensor of the source, or one expert's part of it.

    Attributes:
        name: of the source's tensor.
        expert: index along its first dimension.
        part: 0 or 1, where gate and up share a tensor; `interleaved` if row by row.
        transposed: the source has it as [in, out] and it is wanted as [out, in], or the other way round.
        below: a second tensor of the source, whose rows come after.
    """

    name: str
    expert: int | None = None
    part: int | None = None
    interleaved: bool = False
    transposed: bool = False
    below: str | None = None

    def read(self, source: Source) -> torch.Tensor:
        """The values."""
        tensor = source.read(self.name)
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.part is not None:
            half = tensor.shape[0] // 2
            tensor = tensor[self.part :: 2] if self.interleaved else tensor[self.part * half : (self.part + 1) * half]
        tensor = tensor.contiguous()
        return tensor if self.below is None else torch.cat([tensor, source.read(self.below)])


@dataclass(frozen=True)
class Weights:
    """What a variant of a model holds.

    Attributes:
        tensors: shape, stored type and bytes of every tensor, by the name it is published with.
        names: parameter (or stored buffer) of the model -> published name.
        untied: whether a tied output embedding got a tensor of its own.
    """

    tensors: Mapping[str, TensorInfo]
    names: Mapping[str, str]
    untied: bool
    _source: Source
    _places: Mapping[str, Place]

    def read(self, name: str) -> torch.Tensor:
        """A published tensor, as the source has it (dequantized), on the CPU.

        Raises:
            SourceError: the file ends early or cannot be read.
        """
        return self._places[name].read(self._source)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what `read` gives. Raises SourceError."""
        stored = self.stored(name)
        return self.read(name)[start:stop] if stored is None else self._source.read_rows(stored, start, stop)

    def stored(self, name: str) -> str | None:
        """The source's tensor that a published one is, as it is; None where it is only a part or put together."""
        place = self._places[name]
        return place.name if place == Place(place.name) else None

    def module(self, name: str) -> str:
        """The published name of the model's module `name`."""
        return self.names[f"{name}.weight"].removesuffix(".weight")
