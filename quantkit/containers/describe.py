"""What a source is made of: scheme, sizes, types, from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.containers.source import Source, TensorInfo


@dataclass(frozen=True)
class Inspection:
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

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def describe(source: Source) -> Inspection:
    """The same of a model that is open."""
    tensors = source.tensors
    parameters = sum(_count(info) for info in tensors.values())
    size = sum(info.bytes for info in tensors.values())
    types = Counter(info.stored_as for info in tensors.values())
    return Inspection(
        model=source.label,
        kind=source.kind,
        architecture=str(source.config.model_type),
        scheme=source.scheme or f"{source.kind}: mostly {types.most_common(1)[0][0]}",
        parameters=parameters,
        bits_per_weight=8 * size / parameters,
        bytes=size,
        types=dict(types),
        quantization=source.quantization,
        tensors=[
            {"name": name, "shape": list(info.shape), "type": info.stored_as, "bytes": info.bytes}
            for name, info in tensors.items()
        ],
    )


def _count(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count
