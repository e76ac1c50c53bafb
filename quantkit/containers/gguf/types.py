"""Which GGML type every tensor of a file gets, and what makes its data.

Codes of a GPTQ checkpoint and blocks of a GGML file go into it as they are wherever it has them in that type; all else
is rounded from its values, a tile of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import gguf
import numpy as np

from quantkit.codes import libggml
from quantkit.codes.kinds import READABLE, SIZES, Kind, dequantize
from quantkit.codes.reencode import expected_reencodings, q4_0_rows, reencode
from quantkit.containers.gguf import GgufTensor, architecture_of
from quantkit.containers.gguf.file import Array
from quantkit.containers.gguf.recipes import (
    EMBEDDING,
    FLOATS,
    OUTPUT,
    Planned,
    base_kind,
    fitting,
    needs_importance,
    tensor_kinds,
)
from quantkit.containers.imatrix import Imatrix
from quantkit.containers.source import Source, Weights
from quantkit.containers.values import Underflow
from quantkit.errors import NumericError, UsageError
from quantkit.late import torch

Fidelity = Literal["exact", "bounded", "requantized", "rounded"]
"""A matrix's numbers in the file: the source's own codes or blocks; those but for a minimum rounded once more; rounded
after a rounding; or rounded (if at all) for the first time."""

# Types that gguf-py rounds to, as ggml itself does, to the bit. It knows no importance.
_WITHOUT_LIBRARY = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
UNROUNDED = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8")
"""What tensors are stored in as they were trained or published: rounding them is the first."""
_AS_IT_IS = {"torch.float32": Kind.F32, "torch.float16": Kind.F16, "torch.bfloat16": Kind.BF16}
_VALUES_A_TILE = 1 << 22


@dataclass(frozen=True)
class Choice:
    """A tensor's type in the file, and what makes its data from a published tensor.

    Attributes:
        kind: its type.
        fidelity: None for vectors.
        encode: rows in their published order, uint8 [rows, bytes of a row]; a vector's values float32 [length].
        fell_back: whether its width does not suit the type that it would have otherwise.
    """

    kind: Kind
    fidelity: Fidelity | None
    encode: Callable[[GgufTensor, str], Array]
    fell_back: bool = False


@dataclass(frozen=True)
class TypeOptions:
    """What is asked for.

    Attributes:
        recipe: one of `recipes.RECIPES`; None for the smallest type that keeps codes and blocks as they are, and
            the source's own precision for the rest.
        pure: the recipe's main type for every matrix.
        embedding, output: of these two matrices, whatever the recipe says.
        requantize: what has been rounded may be rounded again.
        imatrix: how much each column's error counts.
    """

    recipe: str | None = None
    pure: bool = False
    embedding: Kind | None = None
    output: Kind | None = None
    requantize: bool = False
    imatrix: Imatrix | None = None


class Chooser:
    """Decides the type of every tensor of a file."""

    def __init__(
        self, source: Source, weights: Weights, options: TypeOptions, allowed: Collection[Kind] = tuple(Kind)
    ) -> None:
        """
        Args:
            source, weights: the model.
            options: what is asked for.
            allowed: what the file can hold.
        """
        self._source, self._weights, self._options, self._allowed = source, weights, options, allowed
        self._own = Kind.BF16 if source.dtype == torch.bfloat16 and Kind.BF16 in allowed else Kind.F16
        self._modules = frozenset[str]() if source.codes is None else frozenset(source.codes.quantized_names())
        self.underflow = Underflow()
        self._rounded = {n for n, info in weights.tensors.items() if info.stored_as not in UNROUNDED}

    def choose(self, plan: Sequence[GgufTensor]) -> list[Choice]:
        """A choice for each tensor.

        Raises:
            UsageError: a type that would round twice, that the file has no place for, or that needs an importance.
            SourceError: an importance matrix of another model.
            MissingPackageError: a type that only ggml itself rounds to.
        """
        embedding, output = self._options.embedding, self._options.output
        if embedding is None and all(tensor.name != OUTPUT for tensor in plan):
            embedding = output
        asked = {name: kind for name, kind in ((EMBEDDING, embedding), (OUTPUT, output)) if kind is not None}
        return [self._choose(*pair, asked) for pair in zip(plan, self._planned(plan, asked), strict=True)]

    def of_kind(self, tensor: GgufTensor, kind: Kind | None) -> Choice:
        """A tensor in the type that its caller wants; None for what it is stored in. Raises as `choose` does."""
        if tensor.always_f32:
            return Choice(Kind.F32, None, self._values(Kind.F32))
        return self._as_stored(tensor) if kind is None else self._of_plan(tensor, _fitted(tensor, kind))

    def _planned(self, plan: Sequence[GgufTensor], asked: Mapping[str, Kind]) -> list[Planned | None]:
        """What every tensor is to be; None for what the source has it in. `asked`: by an option of its own."""
        options = self._options
        if options.recipe is None:
            return [_fitted(tensor, asked[tensor.name]) if tensor.name in asked else None for tensor in plan]
        found = tensor_kinds(
            options.recipe,
            plan,
            self._source.config.get_text_config(),
            architecture_of(self._source),
            pure=options.pure,
            embedding=options.embedding,
            output=options.output,
            importance=options.imatrix is not None,
        )
        # GPTQ left these in full precision; so they stay.
        kept = {EMBEDDING, OUTPUT}.difference(asked) if self._modules and not options.pure else set()
        return [None if tensor.name in kept else planned for tensor, planned in zip(plan, found, strict=True)]

    def _choose(self, tensor: GgufTensor, planned: Planned | None, asked: Mapping[str, Kind]) -> Choice:
        if tensor.always_f32:
            return Choice(Kind.F32, None, self._values(Kind.F32))
        linears = {name: (self._weights.stored(name) or "").removesuffix(".weight") for name in tensor.sources}
        if linears and self._modules.issuperset(linears.values()) and not tensor.by_values:
            recipe = self._options.recipe
            kind = asked.get(tensor.name, None if recipe is None else base_kind(recipe))
            return self._of_codes(tensor, linears, kind, planned)
        return self._as_stored(tensor) if planned is None else self._of_plan(tensor, planned)

    def _of_codes(
        self, tensor: GgufTensor, linears: Mapping[str, str], kind: Kind | None, planned: Planned | None
    ) -> Choice:
        """A tensor of GPTQ codes, in the type that is asked for or the smallest that is exact.

        `linears`: published name -> the source's module, of all that the tensor is made of.
        """
        found = {n: fidelity for n, fidelity in self._common(linears).items() if Kind.__members__[n] in self._allowed}
        if kind is None:
            exact = next((name for name, fidelity in found.items() if fidelity == "exact"), None)
            if exact is None:
                raise UsageError(
                    f"{tensor.name}: no type holds its codes exactly; name a --type, one that comes near "
                    f"({_shown(found)}) or any with --requantize"
                )
            return Choice(Kind.__members__[exact], "exact", self._codes(linears, exact))
        if kind.name in found:
            return Choice(kind, found[kind.name], self._codes(linears, kind.name))
        if kind in FLOATS or self._options.requantize:
            return self._of_plan(tensor, planned or _fitted(tensor, kind))
        raise UsageError(
            f"{tensor.name}: {kind.name} would round GPTQ's codes again; what holds them: {_shown(found)}. "
            "--requantize does it all the same"
        )

    def _as_stored(self, tensor: GgufTensor) -> Choice:
        """A tensor in what the source has it in."""
        stored = self._stored_kind(tensor)
        if stored is None or (stored in FLOATS and stored not in self._allowed):
            return Choice(self._own, "rounded", self._values(self._own))
        self._check_allowed(tensor, stored)
        return Choice(stored, "exact", self._blocks)

    def _of_plan(self, tensor: GgufTensor, planned: Planned) -> Choice:
        """A tensor in a type that may have to be rounded to."""
        kind, fell_back = planned.kind, planned.kind != planned.wanted
        self._check_allowed(tensor, kind)
        if kind == self._stored_kind(tensor):
            return Choice(kind, "exact", self._blocks, fell_back)
        if kind in FLOATS:
            return Choice(kind, "rounded", self._values(kind), fell_back)
        twice = any(name in self._rounded for name in tensor.sources)
        if twice and (tensor.shared or tensor.by_values):  # there is no type that holds a part of one as it is
            return Choice(self._own, "rounded", self._values(self._own), fell_back)
        if twice and not self._options.requantize:
            stored = self._weights.tensors[tensor.sources[0]].stored_as
            raise UsageError(
                f"{tensor.name}: {kind.name} would round it again ({stored} in the source); "
                "--requantize does it all the same"
            )
        encode = self._values(kind, self._importance(tensor, kind))
        return Choice(kind, "requantized" if twice else "rounded", encode, fell_back)

    def _check_allowed(self, tensor: GgufTensor, kind: Kind) -> None:
        if kind not in self._allowed:
            held = ", ".join(kind.name for kind in self._allowed)
            option = {EMBEDDING: "; --embedding-type chooses one", OUTPUT: "; --output-type chooses one"}
            hint = option.get(tensor.name, "")
            raise UsageError(f"{tensor.name}: {kind.name} has no place in this file; it holds {held}{hint}")

    def _importance(self, tensor: GgufTensor, kind: Kind) -> Array | None:
        """float32 [experts or 1, columns]; None without. Sees to it that there is what rounds to the type."""
        imatrix = self._options.imatrix
        found = None if imatrix is None else imatrix.importance(tensor.name, tensor.shape)
        if found is None and kind in _WITHOUT_LIBRARY:
            return None
        needed = libggml.requires_imatrix(kind) or needs_importance(self._options.recipe, tensor.name, kind)
        if found is None and needed:
            where = "--imatrix names one" if imatrix is None else f"{imatrix.path.name} has nothing for it"
            raise UsageError(f"{tensor.name}: {kind.name} needs an importance matrix; {where}")
        return found

    def _stored_kind(self, tensor: GgufTensor) -> Kind | None:
        """The type of a tensor whose bytes a GGML file has; None for other sources."""
        if self._source.ggml is None or tensor.offset or tensor.logarithm or tensor.shared or tensor.by_values:
            return None
        kinds = {self._weights.tensors[name].stored_as for name in tensor.sources}
        whole = all(self._weights.stored(name) for name in tensor.sources)
        return Kind.__members__[kinds.pop()] if len(kinds) == 1 and whole else None

    def _common(self, linears: Mapping[str, str]) -> dict[str, Fidelity]:
        """Types that hold the codes of all parts, the smallest first, whatever the codes are."""
        source = self._source.codes
        assert source is not None
        types: list[dict[str, Fidelity]] = []
        for module in linears.values():
            bits, zeros = source.bits(module), source.read_zeros(module)
            expected = expected_reencodings(bits, zeros, source.read_groups(module))
            types.append({found.type: found.fidelity for found in expected})
        return {name: fidelity for name, fidelity in types[0].items() if all(name in others for others in types)}

    def _codes(self, linears: Mapping[str, str], name: str) -> Callable[[GgufTensor, str], Array]:
        source = self._source.codes
        assert source is not None

        def encode(_: GgufTensor, published: str) -> Array:
            module = linears[published]
            if name == "Q4_0" and source.bits(module) == 4:  # which it holds where all zeros are 8 only
                words = source.read_words(module)
                if words is not None:
                    return q4_0_rows(words, source.read_scales(module), source.read_groups(module))
            return reencode(source.read_codes(module), name)

        return encode

    def _blocks(self, _: GgufTensor, published: str) -> Array:
        stored = self._weights.stored(published)
        assert self._source.ggml is not None and stored is not None
        kind, rows = self._source.ggml.blocks(stored)
        step = max(1, _VALUES_A_TILE // (rows.shape[1] or 1))
        if kind in FLOATS:
            if not bool(torch.isfinite(self._weights.read(published)).all()):
                raise _damaged(published)
        elif kind in READABLE:
            with np.errstate(all="ignore"):
                for start in range(0, len(rows), step):
                    if not np.isfinite(dequantize(rows[start : start + step], kind)).all():
                        raise _damaged(published)
        return rows

    def _values(self, kind: Kind, importance: Array | None = None) -> Callable[[GgufTensor, str], Array]:
        def encode(tensor: GgufTensor, published: str) -> Array:
            values = tensor.as_matrix(self._weights.read(published))
            if _AS_IT_IS.get(str(values.dtype)) == kind and values.ndim == 2 and not tensor.offset:
                if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):  # NaN comes through
                    raise _damaged(published)
                octets: Array = values.contiguous().view(torch.uint8).numpy()
                return octets
            if values.ndim == 1:
                return self._held(tensor.values(values), kind, published)
            own = None if importance is None else importance[tensor.sources.index(published)]
            block, size = SIZES[kind]
            packed = np.empty((values.shape[0], values.shape[1] // block * size), dtype=np.uint8)
            step = max(1, _VALUES_A_TILE // values.shape[1])
            for start in range(0, len(packed), step):
                tile = self._held(tensor.values(values[start : start + step]), kind, published)
                packed[start : start + step] = rounded_blocks(tile, kind, own)
            return packed

        return encode

    def _held(self, values: Array, kind: Kind, published: str) -> Array:
        """Values that the type holds; those that it makes zeros of are counted. Raises NumericError."""
        if kind not in (Kind.F32, Kind.BF16):
            self.underflow.see(published, torch.from_numpy(values))
        return _checked(values, kind, published)


def rounded_blocks(values: Array, kind: Kind, importance: Array | None = None) -> Array:
    """Rows float32 [rows, columns] as a type has them, uint8 [rows, bytes]; raises as `libggml.round_to_blocks`."""
    by_library = importance is not None or kind not in _WITHOUT_LIBRARY or libggml.available()
    if kind not in FLOATS and by_library:
        return libggml.round_to_blocks(values, kind, importance)
    packed: Array = np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    return packed


def rounding_kinds() -> Collection[Kind]:
    """Types that something here rounds to."""
    return READABLE if libggml.available() else _WITHOUT_LIBRARY


def _fitted(tensor: GgufTensor, kind: Kind) -> Planned:
    return Planned(fitting(kind, tensor.shape[-1]), kind)


def _checked(values: Array, kind: Kind, published: str) -> Array:
    wide = kind in (Kind.F32, Kind.BF16)
    most = float(np.finfo(np.float32 if wide else np.float16).max)
    if not (values.min(initial=0) >= -most and values.max(initial=0) <= most):  # nor where they are NaN
        if not np.isfinite(values).all():
            raise _damaged(published)
        raise NumericError(f"{published}: a value is beyond float16; use --type bf16 or f32")
    return values


def _damaged(published: str) -> NumericError:
    return NumericError(f"{published} holds NaN or infinity; the model's files are damaged")


def _shown(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({fidelity})" for name, fidelity in found.items()) or "none"
