"""A GGUF file that a gptq run writes its codes into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, GgmlLinear, LinearPlan, Plan
from quantkit.codes.kinds import SIZES, Kind
from quantkit.containers import gguf as gguf_files
from quantkit.containers.gguf.recipes import EMBEDDING, FLOATS, OUTPUT, file_type, fitting, parse_kind, tensor_kinds
from quantkit.containers.gguf.types import UNROUNDED, Choice, Chooser, TypeOptions, rounding_kinds
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import METHODS, Ends, GgmlType, QuantSpec
from quantkit.progress import Progress, counted
from quantkit.quantize.allocate import End
from quantkit.quantize.targets import CodesWriter, on_grid_of, plan_linears


class GgufTarget:
    """A folder with a GGUF file. Its matrices have the types of a recipe, on whose grids the Linears are quantized.

    Attributes:
        fallback: matrices that the type meant for them does not divide, and the type they get.
        limits: where llama.cpp's result drifts from the model's.
        remarks: what else the file has otherwise than the model.
    """

    def __init__(self, stream: ModelStream, spec: QuantSpec, recipe: str, name: str, ends: Ends) -> None:
        """
        Args:
            stream, spec: the model, and what its Linears are quantized to.
            recipe: one of `gguf.recipes.RECIPES`.
            name: of the file.
            ends: types of the embedding and the output matrix, and the pre-tokenizer.

        Raises:
            UsageError: a pattern that no Linear matches, an override that a GGUF file has no place for.
            SourceError: a model that a GGUF file cannot hold.
        """
        kept = parse_kind("embedding-type", ends.embedding_type), parse_kind("output-type", ends.output_type)
        self.changed: dict[str, torch.Tensor] = {}
        source, weights = stream.source, replace(stream.weights, changed=self.changed)
        self._name, self._architecture = name, gguf_files.architecture_of(source)
        origin = gguf_files.origin(from_gptq=METHODS[spec.method].label == "GPTQ")
        self._keys = gguf_files.file_keys(source, file_type(recipe), pre=ends.pre, provenance=origin)
        self.limits = [*gguf_files.limits(source), *gguf_files.cut_otherwise(source, self._keys)]
        self.remarks = gguf_files.remarks(source, weights)
        tensors = gguf_files.plan(source, weights)
        planned = tensor_kinds(
            recipe, tensors, source.config.get_text_config(), self._architecture, embedding=kept[0], output=kept[1]
        )
        asked = plan_linears(stream, spec)
        linears = {name for name, _ in stream.linears()}
        chooser = Chooser(source, weights, TypeOptions(requantize=True))
        kinds: dict[str, Kind] = {}
        self._typed: list[tuple[gguf_files.GgufTensor, Kind]] = []
        self._others: list[tuple[gguf_files.GgufTensor, Choice]] = []
        self.fallback: dict[str, str] = {}
        by_values = {source for tensor in tensors if tensor.by_values for source in tensor.sources}
        for tensor, found in zip(tensors, planned, strict=True):
            modules = [name.removesuffix(".weight") for name in tensor.sources]
            coded = bool(modules) and linears.issuperset(modules) and by_values.isdisjoint(tensor.sources)
            wanted = _wanted(tensor, [asked.get(module) for module in modules], found.wanted) if coded else found.wanted
            kind = None if wanted is None else fitting(wanted, tensor.shape[-1])
            if kind is not None and kind != wanted:
                self.fallback[tensor.name] = kind.name
            if coded and modules[0] in kinds:  # another tensor that the same Linear is written into
                kind = kinds[modules[0]]
            if coded and kind is not None and kind.name in get_args(GgmlType):
                kinds |= dict.fromkeys(modules, kind)
            else:
                choice = chooser.of_kind(tensor, kind)
                self._others.append((tensor, choice))
                kind = choice.kind
            self._typed.append((tensor, kind))
        self.plan: Plan = {
            name: LinearPlan(linear.shape, linear.spec.model_copy(update=on_grid_of(kinds[name].name)))
            for name, linear in asked.items()
            if name in kinds
        }
        self.ends: Mapping[str, str] = {
            tensor.sources[0]: choice.kind.name
            for tensor, choice in self._others
            if tensor.name in (EMBEDDING, OUTPUT) and choice.kind not in FLOATS and choice.fidelity != "exact"
        }
        self.bytes = sum(gguf_files.packed_bytes(tensor, kind) for tensor, kind in self._typed)
        others = sum(gguf_files.packed_bytes(tensor, choice.kind) for tensor, choice in self._others)
        self.quantized_bytes = self.bytes - others

    def check_kept(self, name: str, values: torch.Tensor) -> None:
        for tensor, choice in self._others:
            if choice.kind == Kind.F16 and name in tensor.sources:  # of what is read anyway, what can be beyond it
                choice.encode(tensor, name)

    def gain_dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def model_in(self, folder: Path) -> Path:
        return folder / self._name

    @property
    def head_bytes(self) -> int:
        """Of what the file has beside tensors."""
        return gguf_files.head_bytes(self._architecture, self._keys, self._typed)

    @contextmanager
    def writer(self, folder: Path) -> Iterator[CodesWriter]:
        with gguf_files.GgufWriter(self.model_in(folder), self._architecture, self._keys, self._typed) as writer:
            yield _GgufCodesWriter(writer, self._others)


def end_candidates(stream: ModelStream, ends: Ends) -> list[End]:
    """The embedding and the output matrix, each with the types that it may have: those that GPTQ runs on, and that
    something here rounds to. One whose type is asked for is left out, as is what is rounded already."""
    known = rounding_kinds()
    names, found = dict.fromkeys(stream.ends), list[End]()
    asked = (ends.embedding_type, ends.output_type) if len(names) == 2 else ({ends.embedding_type, ends.output_type},)
    for name, types, option in zip(names, asked, ("embedding_type", "output_type"), strict=False):
        rows, columns = stream.weights.tensors[name].shape
        sizes = {
            kind.name: rows * columns // SIZES[kind][0] * SIZES[kind][1]
            for kind in (Kind.__members__[name] for name in get_args(GgmlType) if name != "Q2_0")
            if kind in known and columns % SIZES[kind][0] == 0
        }
        if types in ("auto", {"auto"}) and sizes and stream.weights.tensors[name].stored_as in UNROUNDED:
            found.append(End(name, option, sizes))
    return found


def _wanted(tensor: gguf_files.GgufTensor, linears: Sequence[LinearPlan | None], recipe: Kind) -> Kind | None:
    """The type that a tensor made of Linears is to have; None where they stay as they are."""
    asked = {None if linear is None else linear.spec.ggml or recipe.name for linear in linears}
    if len(asked) > 1:
        raise UsageError(
            f"{tensor.name} holds {len(linears)} modules of the model in one type; --include, --exclude and --override "
            "must treat them alike"
        )
    name = asked.pop()
    return None if name is None else Kind.__members__[name]


class _GgufCodesWriter:
    def __init__(self, writer: gguf_files.GgufWriter, others: Sequence[tuple[gguf_files.GgufTensor, Choice]]) -> None:
        self._writer, self._others = writer, others

    def add_linear(self, module: str, linear: Codes) -> None:
        assert isinstance(linear, GgmlLinear)
        self._writer.write(f"{module}.weight", linear.pack())

    def add_others(self) -> None:
        for tensor, choice in self._others:
            for published in tensor.sources:
                self._writer.write(published, choice.encode(tensor, published), tensor.name)

    def finish(self) -> None:
        self._writer.finish()


def note_fallback(fallback: Mapping[str, str], progress: Progress) -> None:
    """Say which matrices of a GGUF file get another type than the one meant for them."""
    if fallback:
        held = ", ".join(f"{count} {name}" for name, count in Counter(fallback.values()).most_common())
        shown = next(iter(fallback)) + (", ..." if len(fallback) > 1 else "")
        progress.note(
            f"{counted(len(fallback), 'matrix is', 'matrices are')} no whole number of blocks wide and "
            f"{'gets another type' if len(fallback) == 1 else 'get other types'} ({held}): {shown}"
        )
