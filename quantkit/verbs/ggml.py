"""The verb `ggml`: any model that can be read as a file for llama.cpp. Codes of a GPTQ run go into it as they are."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.blocks.open import named, note_left_out, note_source, open_parts, whole
from quantkit.blocks.stream import ModelStream
from quantkit.codes.kinds import SIZES, FileType, Kind
from quantkit.containers import CONTAINERS, load
from quantkit.containers import gguf as gguf_files
from quantkit.containers.ggjt import write as ggjt
from quantkit.containers.gguf.recipes import file_type, parse_kind, recipe_of
from quantkit.containers.gguf.types import Choice, Chooser, Fidelity, TypeOptions
from quantkit.containers.imatrix import Imatrix, read_imatrix
from quantkit.containers.source import Source, Weights
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import parse_size
from quantkit.options.verbs import Ggml
from quantkit.progress import SILENT, Progress, size
from quantkit.quantize.gguf_target import note_fallback
from quantkit.report import Report
from quantkit.runs.atomic import absolute_file
from quantkit.runs.outputs import check_other_file, staged_files
from quantkit.runs.record import check_unchanged
from quantkit.sources import variant_name
from quantkit.verbs import verb


@dataclass(frozen=True)
class GgmlTensor:
    """A tensor of the file: its type there, and how it came to it. None: vectors, which stay as they are."""

    name: str
    type: str
    fidelity: Fidelity | None


@dataclass(frozen=True)
class GgmlReport(Report):
    """What `ggml` made, or with `dry_run` would make.

    Attributes:
        out: the file, or the first of its parts.
        bytes: of all tensors.
        fidelity: matrices by how they came to their types.
        fallback: matrices whose width is no whole number of blocks of their type, by the type they are instead.
        memory_bytes: estimate of the peak beyond what importing torch takes.
    """

    out: Path
    bytes: int
    tensors: list[GgmlTensor]
    fallback: dict[str, str]
    memory_bytes: int = field(default=0, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False
    fidelity: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(tensor.fidelity for tensor in self.tensors if tensor.fidelity is not None)
        object.__setattr__(self, "fidelity", dict(counts))

    def lines(self) -> Iterator[str]:
        took = "" if self.dry_run else f", in {self.seconds:.0f} s"
        types = Counter(tensor.type for tensor in self.tensors)
        yield f"{'would write' if self.dry_run else 'wrote'} {self.out}"
        yield f"{size(self.bytes)}{took}: {', '.join(f'{count} {name}' for name, count in types.most_common())}"
        yield f"matrices: {', '.join(f'{count} {fidelity}' for fidelity, count in self.fidelity.items())}"


@verb(Ggml)
def ggml(options: Ggml, *, progress: Progress = SILENT) -> GgmlReport:
    """Write a model as a file for llama.cpp.

    Codes of a GPTQ checkpoint are kept: its Linears become blocks that hold the same numbers. So are blocks of a GGUF
    or ggjt file that have the right type already. Everything else is rounded once, from what the source holds.

    Raises:
        UsageError: a type that cannot hold the codes or needs an importance matrix, options out of range, a file in
            the way.
        MissingPackageError: a type that libggml-python rounds to.
        QuantkitError: the model or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    asked = _type_options(options)
    row = CONTAINERS[options.container]
    holds = row.holds
    assert holds is not None
    types = asked if holds.mixed else replace(asked, pure=True)
    split = 0 if options.split_max_size is None else parse_size(options.split_max_size)
    if not row.metadata and (split or options.pre):
        raise UsageError("--split-max-size and --pre are for GGUF files")
    given = named(options.model, options.base, options.delta)
    parts = open_parts(given, options.revision, options.trust_remote_code)
    if options.out is not None and not split:  # names of parts, and of types, come of the plan
        check_other_file(absolute_file(options.out), parts, options.force, dry_run=options.dry_run)
    source = whole(parts)
    note_source(source, progress)
    if row.admits:
        load(row.admits)(source, progress)
    apart = gguf_files.parts_ends(source.config)
    weights = ModelStream(source, torch.device("cpu"), torch.float32, untie=apart).weights
    note_left_out(weights, progress, parameters_only=True)
    for text in gguf_files.remarks(source, weights):
        progress.note(text)
    allowed = tuple(Kind.__members__[name] for name in holds.types) or tuple(Kind)
    plan = gguf_files.plan(source, weights)
    chooser = Chooser(source, weights, types, allowed)
    chosen = list(zip(plan, chooser.choose(plan), strict=True))
    imatrix = types.imatrix and _fitting(types.imatrix, chosen, progress)
    kinds = [choice.kind for _, choice in chosen]
    recipe = types.recipe
    if recipe is None or _holds_codes(source, chosen):  # these have one type, whatever the mixture
        recipe = recipe_of(kinds, plan, source.config.get_text_config(), gguf_files.architecture_of(source))
    name = f"{variant_name(source.label)}-{(recipe or 'mixed').upper()}{row.suffix}"
    target = Path.cwd() / name if options.out is None else absolute_file(options.out)
    report = _sizes(target, weights, chosen, progress)
    asked_for = recipe, options.pre, imatrix, options.force, options.dry_run
    job = Job(target, source, weights, chosen, split, progress, *asked_for)
    write: Callable[[], Path] = load(row.writes)(job)
    if options.dry_run:
        return report
    first = write()
    chooser.underflow.warn(progress, "--type bf16 or f32 keeps them")
    return replace(report, out=first, seconds=time.perf_counter() - started, dry_run=False)


Chosen = Sequence[tuple[gguf_files.GgufTensor, Choice]]


@dataclass(frozen=True)
class Job:
    """A file to write. Planning it does all that can fail before the work; what that returns does the work."""

    target: Path
    source: Source
    weights: Weights
    chosen: Chosen
    split_max_bytes: int
    progress: Progress
    recipe: str | None
    pre: str | None
    imatrix: Imatrix | None
    force: bool
    dry_run: bool


def plan_gguf(job: Job) -> Callable[[], Path]:
    """What writes a GGUF file, or its parts; it returns the first. Raises QuantkitError where it cannot be made."""
    source, chosen = job.source, job.chosen
    typed = [(tensor, choice.kind) for tensor, choice in chosen]
    names = gguf_files.part_names(job.target, typed, job.split_max_bytes)
    parts = names if len(names) > 1 else ()
    check_other_file(job.target, [source], job.force, parts, job.dry_run)
    origin = gguf_files.origin(from_gptq=_holds_codes(source, chosen) and source.from_gptq)
    number = FileType.GUESSED if job.recipe is None else file_type(job.recipe)
    keys = gguf_files.file_keys(source, number, pre=job.pre, provenance={**origin, **_imatrix_keys(job.imatrix)})
    architecture = gguf_files.architecture_of(source)
    for text in (*gguf_files.limits(source), *gguf_files.cut_otherwise(source, keys)):
        job.progress.warn(text)

    def write() -> Path:
        with staged_files(job.target, job.force, parts) as folder:
            path = folder / job.target.name
            with gguf_files.GgufWriter(path, architecture, keys, typed, job.split_max_bytes) as writer:
                with job.progress.phase("writing", len(chosen)) as advance:
                    for tensor, choice in chosen:
                        for published in tensor.sources:
                            writer.write(published, choice.encode(tensor, published), tensor.name)
                        advance(1)
                writer.finish()
            check_unchanged(source)
            return job.target.parent / names[0]

    return write


def plan_ggjt(job: Job) -> Callable[[], Path]:
    """What writes a ggjt file. Raises QuantkitError where it cannot be made."""
    check_other_file(job.target, [job.source], job.force, dry_run=job.dry_run)
    config = job.source.config
    vocabulary = ggjt.make_vocabulary(job.source.tokenizer(), config.vocab_size, job.progress)
    made = {tensor.sources[0]: (tensor, choice) for tensor, choice in job.chosen if tensor.sources}
    kinds = {published: choice.kind for published, (_, choice) in made.items()}
    tensors = ggjt.plan(config, job.weights.tensors, kinds)

    def write() -> Path:
        with (
            staged_files(job.target, job.force) as folder,
            ggjt.GgjtWriter(folder / job.target.name, config, vocabulary, tensors) as writer,
        ):
            with job.progress.phase("writing", len(tensors)) as advance:
                for tensor in tensors:
                    planned, choice = made[tensor.published]
                    writer.write(tensor, choice.encode(planned, tensor.published))
                    advance(1)
            writer.finish()
            check_unchanged(job.source)
        return job.target

    return write


def _holds_codes(source: Source, chosen: Chosen) -> bool:
    kept = any(choice.fidelity in ("exact", "bounded") for _, choice in chosen)
    return kept and (source.from_gptq or source.codes is not None)


def _sizes(target: Path, weights: Weights, chosen: Chosen, progress: Progress) -> GgmlReport:
    fallback = {tensor.name: choice.kind.name for tensor, choice in chosen if choice.fell_back}
    note_fallback(fallback, progress)
    return GgmlReport(
        target,
        sum(gguf_files.packed_bytes(tensor, choice.kind) for tensor, choice in chosen),
        [GgmlTensor(tensor.name, choice.kind.name, choice.fidelity) for tensor, choice in chosen],
        fallback,
        memory_bytes=weights.largest_bytes(3),
        dry_run=True,
    )


def _type_options(options: Ggml) -> TypeOptions:
    if options.type == "auto" and (options.pure or options.imatrix):
        raise UsageError("--pure and --imatrix go with a --type that is rounded to")
    return TypeOptions(
        None if options.type == "auto" else options.type,
        options.pure,
        parse_kind("embedding-type", options.embedding_type),
        parse_kind("output-type", options.output_type),
        options.requantize,
        None if options.imatrix is None else read_imatrix(options.imatrix),
    )


def _fitting(imatrix: Imatrix, chosen: Chosen, progress: Progress) -> Imatrix | None:
    """The matrix if it counts for anything. Embeddings and outputs aside, which few have, it should have an entry for
    every matrix that is rounded.

    Raises:
        UsageError: it has one for none.
    """
    rounded = [tensor.name for tensor, choice in chosen if SIZES[choice.kind][0] > 1]
    blocks = [name for name in rounded if name.startswith("blk.")]
    missing = [name for name in blocks if name not in imatrix.entries]
    if missing and len(missing) == len(blocks):
        raise UsageError(
            f"--imatrix {imatrix.path}: none of its {len(imatrix.names)} entries is for a matrix of this model, as "
            f"{missing[0]}; it was made for another one"
        )
    if missing:
        progress.warn(
            f"{imatrix.path.name} has no entry for {len(missing)} of {len(blocks)} matrices, such as {missing[0]}: "
            "these are rounded without it"
        )
    if any(name in imatrix.entries for name in rounded):
        return imatrix
    progress.warn(f"{imatrix.path.name} counts for nothing: no matrix that it has an entry for is rounded to blocks")
    return None


def _imatrix_keys(imatrix: Imatrix | None) -> dict[str, Any]:
    """What llama-quantize writes of an importance matrix; of paths their last part only."""
    if imatrix is None:
        return {}
    keys: dict[str, Any] = {
        "quantize.imatrix.file": imatrix.path.name,
        "quantize.imatrix.dataset": re.split(r"[/\\]", imatrix.datasets[0])[-1] if imatrix.datasets else "",
        "quantize.imatrix.entries_count": len(imatrix.names),
        "quantize.imatrix.chunks_count": imatrix.chunks,
    }
    return {key: value for key, value in keys.items() if value}
