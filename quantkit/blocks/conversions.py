"""Tensors that are stored otherwise than the model's class names them, as transformers' own conversions make them.

A checkpoint may hold Q, K and V in one tensor, the halves of a projection in two, a convolution in three. transformers
has a table of what it does with them when it loads a family (``conversion_mapping``); the same operations run here, for
a parameter when it is read, and on tensors without values for its shape. What was made goes by the model's name for it,
which transformers reads as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from quantkit.blocks.families import DBRX_PARTS, ExpertNames
from quantkit.containers.source import Source, TensorInfo
from quantkit.errors import SourceError, first_line
from quantkit.late import nn, torch

Read = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True)
class Made:
    """A tensor that is made of stored ones.

    Attributes:
        of: their names.
        shape: what it comes out with.
        make: makes it of what a reader gives for these.
    """

    of: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Read], torch.Tensor]


class _MadeSource:
    """A source with tensors that are made of others, which it does not show any more; all else is the source's."""

    def __init__(self, source: Source, made: Mapping[str, Made]) -> None:
        self._source, self._made = source, made
        gone = {name for one in made.values() for name in one.of}
        kept = {name: info for name, info in source.tensors.items() if name not in gone}
        self.tensors = {**kept, **{name: _info(source, one) for name, one in made.items()}}
        whole32 = (name for name, one in made.items() if source.float32.issuperset(one.of))
        self.float32 = source.float32.union(whole32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, made where it has to be. Raises SourceError."""
        one = self._made.get(name)
        return self._source.read(name) if one is None else one.make(self._source.read)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what `read` gives. Raises SourceError."""
        return self.read(name)[start:stop] if name in self._made else self._source.read_rows(name, start, stop)


def with_made(source: Source, made: Mapping[str, Made]) -> Source:
    """`source` with tensors that are made of its own; itself where there are none."""
    return cast(Source, _MadeSource(source, made)) if made else source


def _info(source: Source, one: Made) -> TensorInfo:
    """Header of a made tensor: the type of the first that it is made of, its share of their bytes."""
    stored = [source.tensors[name] for name in one.of]
    whole = sum(math.prod(info.shape) for info in stored)
    size = sum(info.bytes for info in stored) * math.prod(one.shape) // max(whole, 1)
    return replace(stored[0], shape=one.shape, bytes=size, bits=0, group=0)


# -- by transformers' table --------------------------------------------------------------------------------------------


def converted(
    source: Source,
    found: Iterable[tuple[str, str, str]],
    converters: Iterable[Any],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, Made]:
    """What transformers makes of a source's tensors while it loads them, by the parameters' names.

    Args:
        source: with the stored tensors.
        found: of each tensor that goes through a conversion its name, the first parameter that is made of it, and the
            converter's pattern that it has, in the order in which they are put together.
        converters: transformers' conversions of this model.
        parameters: of the model as its class has them, on the meta device.

    Raises:
        SourceError: an operation does not take the stored shapes.
    """
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str]]] = {}
    for stored, target, pattern in found:
        groups.setdefault(target, []).append((stored, pattern))
    made: dict[str, Made] = {}
    for target, members in groups.items():
        names = tuple(stored for stored, _ in members)
        use = _Use(by_pattern[members[0][1]], target, tuple(members), source.config, _Parameters(parameters))
        try:
            outcome = use(lambda name: torch.empty(source.tensors[name].shape, device="meta"))
        except Exception as error:  # whatever an operation raises on a shape that it does not expect
            raise SourceError(
                f"{source.path}: {names[0]} cannot be converted as transformers does: {first_line(error)}"
            ) from error
        for name, empty in outcome.items():
            made[name] = Made(names, tuple(empty.shape), lambda read, use=use, name=name: use(read)[name])  # type: ignore[misc]
    return made


@dataclass(frozen=True)
class _Parameters:
    """What transformers' operations ask a model for."""

    held: Mapping[str, nn.Parameter]

    def get_parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name."""
        return self.held[name]


@dataclass(frozen=True)
class _Use:
    """One use of a converter: the tensors that go in, each with its pattern, and the first that comes out."""

    converter: Any
    target: str
    members: tuple[tuple[str, str], ...]
    config: Any
    model: _Parameters

    def __call__(self, read: Read) -> dict[str, torch.Tensor]:
        """All that comes out, by name: as transformers' ``WeightConverter.convert``."""
        tensors: dict[str, Any] = {}
        for stored, pattern in self.members:
            tensors.setdefault(pattern, []).append(read(stored))
        patterns = {
            "source_patterns": self.converter.source_patterns,
            "target_patterns": self.converter.target_patterns,
        }
        given = {"full_layer_name": self.target, "model": self.model, "config": self.config, "missing_keys": None}
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, **patterns, **given)
        before, _, after = next(self.target.partition(key) for key in tensors if key in self.target)
        return {before + key + after: own[0] if isinstance(own, list) else own for key, own in tensors.items()}


# -- experts -----------------------------------------------------------------------------------------------------------


def stacked(source: Source, module: str, fused: Any, names: ExpertNames) -> dict[str, Made]:
    """A fused module's parameters, of experts that are stored apart under the names that we publish them by.

    Args:
        source: with the stored tensors.
        module: the fused module's name.
        fused: the module.
        names: what the parts of an expert are called.
    """
    made: dict[str, Made] = {}
    for name, parameter in fused.named_parameters(recurse=False):
        kind = name.removesuffix("_bias")
        suffix = "bias" if kind != name else "weight"
        parts = {"gate_up_proj": (names.gate, names.up), "up_proj": (names.up,), "down_proj": (names.down,)}.get(kind)
        of = tuple(f"{module}.{expert}.{part}.{suffix}" for expert in range(parameter.shape[0]) for part in parts or ())
        if of and source.tensors.keys() >= set(of):
            turned = bool(fused.is_transposed) and suffix == "weight"
            stack = _Stack(of, len(parts or ()), bool(fused.is_concatenated), turned)
            made[f"{module}.{name}"] = Made(of, tuple(parameter.shape), stack)
    return made


def stacked_rows(source: Source, module: str, shape: tuple[int, ...]) -> dict[str, Made]:
    """JetMoE's stack [experts, out, in], of experts that are stored apart under their numbers; as `stacked`."""
    of = tuple(f"{module}.{expert}.weight" for expert in range(shape[0]))
    stack = Made(of, tuple(shape), _Stack(of, 1, concatenated=True, turned=False))
    return {f"{module}.weight": stack} if source.tensors.keys() >= set(of) else {}


def stacked_parts(source: Source, module: str, fused: Any) -> dict[str, Made]:
    """DBRX's [experts * rows, hidden] of each part, of experts that are stored apart; as `stacked`."""
    made: dict[str, Made] = {}
    for part in DBRX_PARTS:
        of = tuple(f"{module}.{expert}.{part}.weight" for expert in range(fused.moe_num_experts))
        if source.tensors.keys() >= set(of):
            stack = _Stack(of, 1, concatenated=True, turned=part == DBRX_PARTS[-1], flat=True)
            made[f"{module}.{part}"] = Made(of, tuple(getattr(fused, part).shape), stack)
    return made


@dataclass(frozen=True)
class _Stack:
    """Experts put together: [experts, parts' rows, in], rows one after the other or in turn; perhaps turned, perhaps
    `flat`: [experts * rows, in]."""

    of: tuple[str, ...]
    parts: int
    concatenated: bool
    turned: bool
    flat: bool = False

    def __call__(self, read: Read) -> torch.Tensor:
        """Of the experts' tensors, each read once."""
        experts = []
        for first in range(0, len(self.of), self.parts):
            own = [read(name) for name in self.of[first : first + self.parts]]
            rows = torch.cat(own) if self.concatenated else torch.stack(own, dim=1).flatten(0, 1)
            experts.append(rows.T if self.turned else rows)
        whole = torch.stack(experts).contiguous()
        return whole.flatten(0, 1) if self.flat else whole
