"""The verb `ggml`: any model that can be read as a file for llama.cpp. Codes of a GPTQ run go into it as they are."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import numpy.typing as npt
import torch

from quantkit import __version__
from quantkit.codes.reencode import expected_reencodings, reencode, reencodings
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.model.stream import ModelStream
from quantkit.model.weights import Weights
from quantkit.preflight import note_source, parse_size
from quantkit.progress import SILENT, Progress
from quantkit.sources import Source, open_source, variant_name
from quantkit.sources.gptq import GptqSource
from quantkit.writers import gguf as container

Kind = gguf.GGMLQuantizationType
Fidelity = Literal["exact", "bounded", "requantized", "rounded"]
GgmlType = Literal[
    "auto", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"
]

_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
# Types that gguf-py rounds to, as ggml itself does, to the bit.
_ROUNDED_TO = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Kind.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Kind.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q2_K: gguf.LlamaFileType.MOSTLY_Q2_K_S,
    Kind.Q3_K: gguf.LlamaFileType.MOSTLY_Q3_K_S,
    Kind.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_S,
    Kind.Q5_K: gguf.LlamaFileType.MOSTLY_Q5_K_S,
    Kind.Q6_K: gguf.LlamaFileType.MOSTLY_Q6_K,
}


@dataclass(frozen=True)
class GgmlTensor:
    """A tensor of the file: its type there, and how it came to it. None: vectors, which stay as they are."""

    name: str
    type: str
    fidelity: Fidelity | None


@dataclass(frozen=True)
class GgmlReport:
    """What `ggml` made, or with `dry_run` would make.

    Attributes:
        out: the file, or the first of its parts.
        bytes: of all tensors.
        fidelity: matrices by how they came to their types.
        fallback: matrices whose width no block of the type asked for divides, which are float16 instead.
    """

    out: Path
    bytes: int
    tensors: list[GgmlTensor]
    fallback: list[str]
    seconds: float = 0.0
    dry_run: bool = False
    fidelity: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(tensor.fidelity for tensor in self.tensors if tensor.fidelity is not None)
        object.__setattr__(self, "fidelity", dict(counts))

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**vars(self), "out": str(self.out), "tensors": [vars(tensor) for tensor in self.tensors]}


def ggml(
    model: str | Path,
    out: str | Path | None = None,
    *,
    type: GgmlType = "auto",
    requantize: bool = False,
    embedding_type: GgmlType = "auto",
    output_type: GgmlType = "auto",
    pre: str | None = None,
    split_max_size: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> GgmlReport:
    """Write a model as a GGUF file for llama.cpp.

    Codes of a GPTQ checkpoint are kept: its Linears become blocks that hold the same numbers. Everything else is
    rounded once, from what the source holds.

    Args:
        model: folder (full precision or GPTQ), GGUF file, or Hub id.
        out: file to write; None names it after the model.
        type: of the Linears; "auto" is the smallest that holds a GPTQ checkpoint's codes exactly, and the source's own
            precision for others.
        requantize: allow a type that rounds what has been rounded before.
        embedding_type, output_type: of these two matrices; "auto" is the source's own precision.
        pre: name of the pre-tokenizer, for a byte-level vocabulary that is not known by its ids.
        split_max_size: write parts of at most this size, such as "2GB", or bytes.
        revision: of a Hub id.
        trust_remote_code: let transformers run code from the model's folder.
        dry_run: read headers only and report sizes; write nothing.
        force: replace an existing file.
        progress: receives bars, notes and warnings.

    Raises:
        UsageError: a type that cannot hold the codes, options out of range, a file in the way.
        QuantkitError: the model or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    kinds = _kind("type", type), _kind("embedding-type", embedding_type), _kind("output-type", output_type)
    split = 0 if split_max_size is None else parse_size(split_max_size)
    source = open_source(model, revision, trust_remote_code)
    note_source(source, progress)
    weights = ModelStream(source, torch.device("cpu"), torch.float32).weights
    plan = container.plan(source, weights)
    choices = _Chooser(source, weights, kinds, requantize).choose(plan)
    typed = [(tensor, choice.kind) for tensor, choice in zip(plan, choices, strict=True)]
    counts = Counter(choice.kind for choice in choices if choice.fidelity is not None)
    main = counts.most_common(1)[0][0]
    target = _output(out, source, main)
    _check_output(target, source, force)
    keys = container.header(source, _FILE_TYPES[main], pre=pre, provenance=_provenance(source, choices))
    for text in container.limits(source):
        progress.warn(text)
    fallback = [tensor.name for tensor, choice in zip(plan, choices, strict=True) if choice.fell_back]
    if fallback:
        progress.note(f"{len(fallback)} matrices have widths that no block divides and are F16: {fallback[0]}, ...")
    report = GgmlReport(
        target,
        sum(container.packed_bytes(tensor, kind) for tensor, kind in typed),
        [GgmlTensor(t.name, c.kind.name, c.fidelity) for t, c in zip(plan, choices, strict=True)],
        fallback,
        dry_run=True,
    )
    if dry_run:
        return report
    architecture = container.architecture_of(source)
    with container.staged_files(target) as folder:
        with container.GgufWriter(folder / target.name, architecture, keys, typed, split) as writer:
            with progress.phase("writing", len(plan)) as advance:
                for tensor, choice in zip(plan, choices, strict=True):
                    for published in tensor.sources:
                        writer.write(published, choice.encode(tensor, published))
                    advance(1)
            writer.finish()
        first = target.parent / writer.paths[0].name
    return GgmlReport(first, report.bytes, report.tensors, fallback, time.perf_counter() - started)


Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Choice:
    """A tensor's type in the file, and what makes its data from a published tensor."""

    kind: Kind
    fidelity: Fidelity | None
    encode: Callable[[container.GgufTensor, str], Array]
    fell_back: bool = False


class _Chooser:
    """Decides the type of every tensor of a file."""

    def __init__(
        self,
        source: Source,
        weights: Weights,
        kinds: tuple[Kind | None, Kind | None, Kind | None],
        requantize: bool,
    ) -> None:
        """`kinds`: of the Linears, the embedding and the output; None for auto."""
        self._source, self._weights, self._requantize = source, weights, requantize
        self._kind, self._ends = kinds[0], {"token_embd.weight": kinds[1], "output.weight": kinds[2]}
        self._own = Kind.BF16 if source.dtype == torch.bfloat16 else Kind.F16
        self._rounded = {n for n, info in weights.tensors.items() if info.stored_as not in _UNROUNDED}

    def choose(self, plan: Sequence[container.GgufTensor]) -> list[_Choice]:
        """A choice for each tensor.

        Raises:
            UsageError: a type that would round twice, or that nothing here rounds to.
        """
        return [self._choose(tensor) for tensor in plan]

    def _choose(self, tensor: container.GgufTensor) -> _Choice:
        if tensor.always_f32:
            return _Choice(Kind.F32, None, self._values(Kind.F32))
        if tensor.name in self._ends:
            return self._float_or_rounded(tensor, self._ends[tensor.name])
        linears = self._linears(tensor)
        if not linears:
            return self._float_or_rounded(tensor, self._kind)
        found = self._common(tensor, linears)
        if self._kind is None:
            exact = next((name for name, fidelity in found.items() if fidelity == "exact"), None)
            if exact is None:
                raise UsageError(
                    f"{tensor.name}: no type holds its codes exactly; name as --type what comes near "
                    f"({_shown(found)}), or use --requantize"
                )
            return _Choice(Kind.__members__[exact], "exact", self._codes(linears, exact))
        name = self._kind.name
        if name in found:
            return _Choice(self._kind, found[name], self._codes(linears, name))
        if self._kind in _FLOATS:
            return _Choice(self._kind, "rounded", self._values(self._kind))
        if not self._requantize:
            raise UsageError(
                f"{tensor.name}: {name} would round GPTQ's codes again; what holds them: {_shown(found)}. "
                "--requantize does it all the same"
            )
        return self._float_or_rounded(tensor, self._kind)

    def _float_or_rounded(self, tensor: container.GgufTensor, asked: Kind | None) -> _Choice:
        kind = self._own if asked is None else asked  # not `or`: F32 is 0
        if kind in _FLOATS:
            return _Choice(kind, "rounded", self._values(kind))
        if kind not in _ROUNDED_TO:
            known = ", ".join(known.name for known in (*_FLOATS, *_ROUNDED_TO))
            raise UsageError(f"{tensor.name}: {kind.name} is only written from GPTQ codes; rounded to are {known}")
        twice = any(name in self._rounded for name in tensor.sources)
        if twice and not self._requantize:
            stored = self._weights.tensors[tensor.sources[0]].stored_as
            raise UsageError(
                f"{tensor.name}: {kind.name} would round it again ({stored} in the source); "
                "--requantize does it all the same"
            )
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return _Choice(Kind.F16, "rounded", self._values(Kind.F16), fell_back=True)
        return _Choice(kind, "requantized" if twice else "rounded", self._values(kind))

    def _linears(self, tensor: container.GgufTensor) -> dict[str, str]:
        """Published name -> the GPTQ source's module, where all of the tensor is codes."""
        if not isinstance(self._source, GptqSource):
            return {}
        quantized = set(self._source.quantized_names())
        modules = {name: (self._weights.stored(name) or "").removesuffix(".weight") for name in tensor.sources}
        return modules if quantized.issuperset(modules.values()) else {}

    def _common(self, tensor: container.GgufTensor, linears: Mapping[str, str]) -> dict[str, Fidelity]:
        """Types that hold the codes of all parts, the smallest first, whatever the codes are."""
        assert isinstance(self._source, GptqSource)
        common: dict[str, Fidelity] | None = None
        for module in linears.values():
            bits, zeros = self._source.bits(module), self._source.read_zeros(module)
            expected = expected_reencodings(bits, zeros, self._source.read_groups(module))
            types: dict[str, Fidelity] = {found.type: found.fidelity for found in expected}
            common = types if common is None else {name: fid for name, fid in common.items() if name in types}
        return common or {}

    def _codes(self, linears: Mapping[str, str], name: str) -> Callable[[container.GgufTensor, str], Array]:
        source = self._source
        assert isinstance(source, GptqSource)

        def encode(_: container.GgufTensor, published: str) -> Array:
            linear = source.read_codes(linears[published])
            if name not in {found.type for found in reencodings(linear)}:
                raise SourceError(f"{source.path}: {linears[published]} has other codes than its config says")
            return reencode(linear, name)

        return encode

    def _values(self, kind: Kind) -> Callable[[container.GgufTensor, str], Array]:
        def encode(tensor: container.GgufTensor, published: str) -> Array:
            values = tensor.values(self._weights.read(published))
            if kind == Kind.F16 and float(np.abs(values).max(initial=0.0)) > float(np.finfo(np.float16).max):
                raise NumericError(f"{published}: a value is beyond float16; use --type bf16 or f32")
            encoded: Array = gguf.quants.quantize(values, kind)
            return encoded

        return encode


# Stored as they were trained or published: rounding them is the first.
_UNROUNDED = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8")


def _kind(option: str, value: str) -> Kind | None:
    """The GGML type of an option; None for auto."""
    if value not in get_args(GgmlType):
        raise UsageError(f"--{option} {value}: choose {', '.join(get_args(GgmlType))}")
    return None if value == "auto" else Kind.__members__[value.upper()]


def _shown(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({fidelity})" for name, fidelity in found.items()) or "none"


def _provenance(source: Source, choices: Sequence[_Choice]) -> dict[str, Any]:
    keys = {"quantkit.version": __version__}
    if any(choice.fidelity in ("exact", "bounded") for choice in choices):
        keys["quantkit.weights"] = "GPTQ codes"
    return keys


def _output(out: str | Path | None, source: Source, kind: Kind) -> Path:
    if out is not None:
        return Path(os.path.abspath(Path(out).expanduser()))
    return Path.cwd() / f"{variant_name(source.label)}-{kind.name}.gguf"


def _check_output(out: Path, source: Source, force: bool) -> None:
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.exists() and (out.resolve() == source.path.resolve() or not force):
        advice = "name another" if out.resolve() == source.path.resolve() else "use --force to replace it"
        raise UsageError(f"--out {out} already exists; {advice}")
