"""What a source is made of: scheme, sizes, types, from its headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.containers.source import Source
from quantkit.progress import size
from quantkit.report import Column, Report, Shown, Table


@dataclass(frozen=True)
class Inspection(Report):
    """What `inspect` found.

    Attributes:
        scheme: how the weights are stored, in a few words.
        parameters: number of weights.
        bits_per_weight: bytes of all tensors over all weights, times 8.
        bytes: of all tensors.
        types: tensors per stored type.
        tensors: name, shape, stored type and bytes of each.
    """

    model: str
    kind: str
    architecture: str
    scheme: str
    parameters: int
    bits_per_weight: float
    bytes: int
    types: dict[str, int]
    quantization: dict[str, Any] | None
    tensors: list[dict[str, Any]]

    def lines(self, tensors: bool = False) -> Iterator[Shown]:
        """With `tensors` one for each too."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.types.items())
        yield f"{self.model}: {self.architecture}, {self.scheme}"
        yield (
            f"{self.parameters / 1e6:.1f} M weights in {size(self.bytes)}, {self.bits_per_weight:.2f} bits per weight"
        )
        yield f"tensors: {kinds}"
        if tensors:
            columns = (Column("tensor", "left"), Column("shape", "left"), Column("type", "left"), Column("size"))
            rows = [
                [tensor["name"], " x ".join(map(str, tensor["shape"])), tensor["type"], size(tensor["bytes"])]
                for tensor in self.tensors
            ]
            yield Table(columns, rows, heads=False)


def describe(source: Source) -> Inspection:
    """What an open source is made of."""
    tensors = source.tensors
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    held = sum(info.bytes for info in tensors.values())
    types = Counter(info.stored_as for info in tensors.values())
    return Inspection(
        model=source.label,
        kind=source.kind,
        architecture=source.model_type,
        scheme=source.scheme or f"{source.kind}: mostly {types.most_common(1)[0][0]}",
        parameters=parameters,
        bits_per_weight=8 * held / parameters,
        bytes=held,
        types=dict(types),
        quantization=source.quantization,
        tensors=[
            {"name": name, "shape": list(info.shape), "type": info.stored_as, "bytes": info.bytes}
            for name, info in tensors.items()
        ],
    )
