"""Which GGML type every tensor of a file gets, and what makes its data: codes as they are, or values rounded once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch

from quantkit.codes.reencode import expected_reencodings, reencode, reencodings
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.model.weights import Weights
from quantkit.sources.base import Source
from quantkit.sources.gptq import GptqSource
from quantkit.writers.gguf import GgufTensor

Kind = gguf.GGMLQuantizationType
Fidelity = Literal["exact", "bounded", "requantized", "rounded"]
"""A matrix's numbers in the file: GPTQ's own; those but for a minimum rounded once more; rounded after a rounding; or
rounded (if at all) for the first time."""

_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
# Types that gguf-py rounds to, as ggml itself does, to the bit.
_ROUNDED_TO = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """A tensor's type in the file, and what makes its data from a published tensor."""

    kind: Kind
    fidelity: Fidelity | None
    encode: Callable[[GgufTensor, str], Array]
    fell_back: bool = False


class Chooser:
    """Decides the type of every tensor of a file."""

    def __init__(
        self,
        source: Source,
        weights: Weights,
        kinds: tuple[Kind | None, Kind | None, Kind | None],
        requantize: bool,
        allowed: Collection[Kind],
    ) -> None:
        """
        Args:
            source, weights: the model.
            kinds: of the Linears, the embedding and the output; None for auto.
            requantize: whether what has been rounded may be rounded again.
            allowed: what the file can hold.
        """
        self._source, self._weights, self._requantize, self._allowed = source, weights, requantize, allowed
        self._kind, self._ends = kinds[0], {"token_embd.weight": kinds[1], "output.weight": kinds[2]}
        self._own = Kind.BF16 if source.dtype == torch.bfloat16 and Kind.BF16 in allowed else Kind.F16
        self._modules = frozenset(source.quantized_names()) if isinstance(source, GptqSource) else frozenset()
        self._rounded = {n for n, info in weights.tensors.items() if info.stored_as not in _UNROUNDED}

    def choose(self, plan: Sequence[GgufTensor]) -> list[Choice]:
        """A choice for each tensor.

        Raises:
            UsageError: a type that would round twice, or that nothing here rounds to.
        """
        return [self._choose(tensor) for tensor in plan]

    def _choose(self, tensor: GgufTensor) -> Choice:
        if tensor.always_f32:
            return Choice(Kind.F32, None, self._values(Kind.F32))
        if tensor.name in self._ends:
            return self._float_or_rounded(tensor, self._ends[tensor.name])
        linears = self._linears(tensor)
        if not linears:
            return self._float_or_rounded(tensor, self._kind)
        found = {n: fidelity for n, fidelity in self._common(linears).items() if Kind.__members__[n] in self._allowed}
        if self._kind is None:
            exact = next((name for name, fidelity in found.items() if fidelity == "exact"), None)
            if exact is None:
                raise UsageError(
                    f"{tensor.name}: no type holds its codes exactly; name as --type what comes near "
                    f"({_shown(found)}), or use --requantize"
                )
            return Choice(Kind.__members__[exact], "exact", self._codes(linears, exact))
        name = self._kind.name
        if name in found:
            return Choice(self._kind, found[name], self._codes(linears, name))
        if self._kind in _FLOATS:
            return Choice(self._kind, "rounded", self._values(self._kind))
        if not self._requantize:
            raise UsageError(
                f"{tensor.name}: {name} would round GPTQ's codes again; what holds them: {_shown(found)}. "
                "--requantize does it all the same"
            )
        return self._float_or_rounded(tensor, self._kind)

    def _float_or_rounded(self, tensor: GgufTensor, asked: Kind | None) -> Choice:
        kind = self._own if asked is None else asked  # not `or`: F32 is 0
        if kind not in self._allowed:
            raise UsageError(f"{tensor.name}: {kind.name} has no place in this file; it holds {_names(self._allowed)}")
        if kind in _FLOATS:
            return Choice(kind, "rounded", self._values(kind))
        if kind not in _ROUNDED_TO:
            known = _names((*_FLOATS, *_ROUNDED_TO))
            raise UsageError(f"{tensor.name}: {kind.name} is only written from GPTQ codes; rounded to are {known}")
        twice = any(name in self._rounded for name in tensor.sources)
        if twice and not self._requantize:
            stored = self._weights.tensors[tensor.sources[0]].stored_as
            raise UsageError(
                f"{tensor.name}: {kind.name} would round it again ({stored} in the source); "
                "--requantize does it all the same"
            )
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return Choice(Kind.F16, "rounded", self._values(Kind.F16), fell_back=True)
        return Choice(kind, "requantized" if twice else "rounded", self._values(kind))

    def _linears(self, tensor: GgufTensor) -> dict[str, str]:
        """Published name -> the GPTQ source's module, where all of the tensor is codes."""
        modules = {name: (self._weights.stored(name) or "").removesuffix(".weight") for name in tensor.sources}
        return modules if self._modules.issuperset(modules.values()) else {}

    def _common(self, linears: Mapping[str, str]) -> dict[str, Fidelity]:
        """Types that hold the codes of all parts, the smallest first, whatever the codes are."""
        assert isinstance(self._source, GptqSource)
        common: dict[str, Fidelity] | None = None
        for module in linears.values():
            bits, zeros = self._source.bits(module), self._source.read_zeros(module)
            expected = expected_reencodings(bits, zeros, self._source.read_groups(module))
            types: dict[str, Fidelity] = {found.type: found.fidelity for found in expected}
            common = types if common is None else {name: fid for name, fid in common.items() if name in types}
        return common or {}

    def _codes(self, linears: Mapping[str, str], name: str) -> Callable[[GgufTensor, str], Array]:
        source = self._source
        assert isinstance(source, GptqSource)

        def encode(_: GgufTensor, published: str) -> Array:
            linear = source.read_codes(linears[published])
            if name not in {found.type for found in reencodings(linear)}:
                raise SourceError(f"{source.path}: {linears[published]} has other codes than its config says")
            return reencode(linear, name)

        return encode

    def _values(self, kind: Kind) -> Callable[[GgufTensor, str], Array]:
        def encode(tensor: GgufTensor, published: str) -> Array:
            values = tensor.values(self._weights.read(published))
            if kind == Kind.F16 and float(np.abs(values).max(initial=0.0)) > float(np.finfo(np.float16).max):
                raise NumericError(f"{published}: a value is beyond float16; use --type bf16 or f32")
            encoded: Array = gguf.quants.quantize(values, kind)
            return encoded

        return encode


# Stored as they were trained or published: rounding them is the first.
_UNROUNDED = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8")


def _shown(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({fidelity})" for name, fidelity in found.items()) or "none"


def _names(kinds: Iterable[Kind]) -> str:
    return ", ".join(kind.name for kind in kinds)
