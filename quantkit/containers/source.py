"""What a source of weights offers, whatever its format, and its weights under the names that they are published by."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.late import dtype_of, torch
from quantkit.runs.atomic import FileStates
from quantkit.runs.record import rounded_before

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from quantkit.codes import QuantizedLinear, StoredCodes

# What is no rounding of weights to less than the floats of training.
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
# Masks and counters that some checkpoints store; everything else is a weight.
_INTEGERS = {"I32": "int32", "I64": "int64", "U8": "uint8"}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, known from its header.

    `stored_as` is the format's name for the type, `bytes` the size there, `bits` of a code where a module's codes are
    packed; 0 for all others. `group` columns share a scale of them, -1: a row; 0: as the folder's label says.
    """

    shape: tuple[int, ...]
    stored_as: str
    bytes: int
    bits: int = 0
    group: int = 0


class HoldsCodes(Protocol):
    """A source whose Linears are codes, each with a zero for every group: what takes them as they are asks this."""

    def quantized_names(self) -> Iterable[str]:
        """Module names of the quantized Linears."""

    def bits(self, module: str) -> int:
        """Bits of a module's codes."""

    def read_codes(self, module: str) -> QuantizedLinear:
        """Codes of one Linear, exactly as they were written. Raises SourceError where scales are no float16 numbers."""

    def read_stored(self, name: str) -> StoredCodes | None:
        """What `read` makes floats of; None where it makes none of codes, scales and zeros. Raises SourceError."""

    def read_words(self, module: str) -> torch.Tensor | None:
        """Codes packed along the columns, int32 [in * bits / 32, out]; None where they are packed otherwise."""

    def read_scales(self, module: str) -> torch.Tensor:
        """Scales of one Linear, float16 [groups, out]. Raises SourceError as `read_codes` does."""

    def read_zeros(self, module: str) -> torch.Tensor:
        """Zeros of one Linear, uint8 [out, groups]."""

    def read_groups(self, module: str) -> torch.Tensor:
        """Group of each column of one Linear, int32 [in]."""


class HoldsBlocks(Protocol):
    """A source whose tensors are of GGML's types."""

    def blocks(self, name: str) -> tuple[Any, npt.NDArray[np.uint8]]:
        """Type and bytes of a tensor as it is stored, uint8 [rows, bytes of a row]; a vector is one row."""


class Source(Protocol):
    """A model on disk, read tensor by tensor under Hugging Face names.

    Attributes:
        label: what to call the model in reports: a folder's, file's or repository's name, never a local path.
        kind: name of its container in `quantkit.containers.CONTAINERS`; of a pair "delta" or "diff".
        path: the folder or file that is read.
        model_type: transformers' name of its kind, as its config has it.
        float32: names of the tensors that are float32 beside weights in half precision, and stay that.
        remarks: what a user should know of what was chosen or assumed to read it, a line each.
        left_out: what lies beside it and no output takes along, a line each.
        doubt: why it may not be what it is taken for; None where nothing says so.
        choices: what was chosen to read it, for the record beside a result.
        quantization: the quantization of its config, of folders that hold codes; None of others.
        metadata: keys of a file that has its own, such as GGUF's; of others none.
        from_gptq: whether matrices of it hold the codes of a GPTQ run.
        trusts_code: whether Python code that comes with it may run.
        states: of its files as they were when it was opened.
    """

    label: str
    kind: str
    path: Path
    model_type: str
    float32: frozenset[str] = frozenset()
    remarks: Sequence[str] = ()
    left_out: Sequence[str] = ()
    doubt: str | None = None
    choices: Mapping[str, Any] = MappingProxyType({})
    quantization: dict[str, Any] | None = None
    metadata: Mapping[str, Any] = MappingProxyType({})
    from_gptq: bool = False
    trusts_code: bool = False
    states: FileStates = MappingProxyType({})

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration, without any quantization; made when it is first asked for. Raises SourceError."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that are not quantized, as published variants should keep it."""

    @property
    def parts(self) -> Mapping[str, Source]:
        """What it is read from, by role: itself as "model"; of a base and a delta those two."""
        return {"model": self}

    @property
    def codes(self) -> HoldsCodes | None:
        """Its Linears' codes; None where it has none that can be taken as they are."""
        return None

    @property
    def ggml(self) -> HoldsBlocks | None:
        """Its tensors as blocks of GGML's types; None where they are not."""
        return None

    @property
    def scheme(self) -> str | None:
        """How its weights are stored, in a few words; None: as the types of its tensors say."""
        return None

    @property
    def precision(self) -> str:
        """What it is read as, and what its weights were rounded to before: "float16", "float16 from Q4_1"."""
        rounded = {info.stored_as for info in self.tensors.values() if info.bits or info.stored_as not in _PLAIN}
        before = ", ".join(sorted(rounded)) or (rounded_before(self.path) if self.path.is_dir() else "")
        return str(self.dtype).removeprefix("torch.") + (f" from {before}" if before else "")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it says of its codes: bits, group_size, sym, desc_act and damp, as far as it does."""
        return {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor `read` can give, by name, with its shape as `read` gives it."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantized where it is stored as codes; on the CPU.

        Raises:
            SourceError: the file ends early or cannot be read.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what `read` gives; in the memory of so many rows where the format allows it.

        Raises:
            SourceError: the file ends early or cannot be read.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            SourceError: it has none that can be read.
        """

    def weight_files(self) -> Sequence[Path]:
        """The files that hold the weights, in order."""

    def config_dict(self) -> dict[str, Any]:
        """config.json to publish a variant with: no quantization, no local path."""

    def copy_companions(self, folder: Path) -> None:
        """Write what a published folder needs beside weights and config: tokenizer, generation config, template."""


@dataclass(frozen=True)
class Place:
    """Where a published tensor's values are: a tensor of the source, or one expert's part of it.

    Attributes:
        name: of the source's tensor.
        expert: index along its first dimension, or among the `experts` whose rows follow one another there.
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
    experts: int | None = None

    def read(self, source: Source) -> torch.Tensor:
        """The values."""
        tensor = source.read(self.name)
        if self.experts is not None:
            tensor = tensor.unflatten(0, (self.experts, -1))
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
        left_out: the source's tensors that no variant holds, since the model's class passes over them.
        apart: an output embedding that is stored, and is not the input's, although the config says that they are tied.
        changed: tensors that are read instead of the source's.
    """

    tensors: Mapping[str, TensorInfo]
    names: Mapping[str, str]
    untied: bool
    left_out: tuple[str, ...]
    apart: str | None
    _source: Source
    _places: Mapping[str, Place]
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def dtype(self, name: str, wanted: torch.dtype | None = None) -> torch.dtype:
        """What a variant holds a tensor in that is not quantized: `wanted`, or else what the source keeps it in."""
        integers = _INTEGERS.get(self.tensors[name].stored_as)
        own = torch.float32 if self.in_float32(name) else self._source.dtype
        return dtype_of(integers) if integers else wanted or own

    def in_float32(self, name: str) -> bool:
        """Whether the tensor is float32 beside weights in half precision, as routers' biases are."""
        return self._places[name].name in self._source.float32

    def read(self, name: str) -> torch.Tensor:
        """A published tensor, as the source has it (dequantized), on the CPU.

        Raises:
            SourceError: the file ends early or cannot be read.
        """
        found = self.changed.get(name)
        return self._places[name].read(self._source) if found is None else found

    def largest_bytes(self, copies: int) -> int:
        """Of so many float32 copies of the largest tensor: what work on one after another takes."""
        return copies * max(4 * math.prod(info.shape) for info in self.tensors.values())

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what `read` gives. Raises SourceError."""
        stored = self.stored(name)
        return self.read(name)[start:stop] if stored is None else self._source.read_rows(stored, start, stop)

    def read_codes(self, name: str) -> StoredCodes | None:
        """What `read` makes floats of, where a published tensor is codes as it is stored. Raises SourceError."""
        stored, codes = self.stored(name), self._source.codes
        return None if stored is None or codes is None else codes.read_stored(stored)

    def stored(self, name: str) -> str | None:
        """The source's tensor that a published one is, as it is; None where it is only a part or put together."""
        place = self._places[name]
        if name in self.changed:
            return None
        return place.name if place == Place(place.name) else None

    def coded(self, name: str) -> str | None:
        """As `stored`, also where it is turned: codes are [out, in] in either case."""
        place = self._places[name]
        return place.name if replace(place, transposed=False) == Place(place.name) else None

    def module(self, name: str) -> str:
        """The published name of the model's module `name`."""
        return self.names[f"{name}.weight"].removesuffix(".weight")


def by_prefix(names: Iterable[str], others: Collection[str]) -> dict[str, list[str]]:
    """`names` by the shortest part of each that none of `others` begins with, such as "model.visual"; none is both."""
    taken = {other[:end] for other in others for end in _ends(other)}
    found: dict[str, list[str]] = {}
    for name in names:
        prefix = next(name[:end] for end in _ends(name) if name[:end] not in taken or end == len(name))
        found.setdefault(prefix, []).append(name)
    return found


def _ends(name: str) -> list[int]:
    """Where the dots of a name are, and its end."""
    return [place for place, letter in enumerate(name) if letter == "."] + [len(name)]
