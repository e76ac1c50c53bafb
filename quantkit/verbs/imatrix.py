"""The verb `imatrix`: how much each column of a model's Linears matters on calibration text, for llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantkit.blocks.open import named, note_source, open_stream
from quantkit.blocks.stream import ModelStream
from quantkit.containers import gguf as gguf_files
from quantkit.containers.imatrix import Entry, write_imatrix
from quantkit.options import HELDOUT
from quantkit.options.verbs import Imatrix
from quantkit.progress import SILENT, Progress, size
from quantkit.quantize.squares import InputSquares, collect_squares, plan_squares_memory
from quantkit.report import Report
from quantkit.runs.atomic import absolute
from quantkit.runs.outputs import check_other_file, staged_files
from quantkit.sources import variant_name
from quantkit.tokens import TokenMatrix
from quantkit.tokens.text import calibration_windows, check_tokens
from quantkit.verbs import verb
from quantkit.version import __version__


@dataclass(frozen=True)
class ImatrixReport(Report):
    """What `imatrix` made, or with `dry_run` would make.

    Attributes:
        entries: tensors that the file has sums for; the experts of a block's stack are one.
        chunks, chunk_size: calibration windows, and tokens in each.
        unseen: by tensor, how many of its experts saw no token.
        bytes: size of the sums and counts.
        memory_bytes: estimate of the peak beyond what importing torch takes.
        multiplications: of the run, with their additions.
    """

    out: Path
    entries: int
    chunks: int
    chunk_size: int
    bytes: int
    memory_bytes: int
    unseen: Mapping[str, int]
    multiplications: int = field(default=0, kw_only=True)
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        took = "" if self.dry_run else f", in {self.seconds:.0f} s"
        yield f"{'would write' if self.dry_run else 'wrote'} {self.out}"
        yield (
            f"{self.entries} tensors over {self.chunks} windows of {self.chunk_size} tokens, {size(self.bytes)}{took}"
        )
        if self.dry_run:
            yield f"peak memory about {size(self.memory_bytes)} beyond torch itself"


@verb(Imatrix)
def imatrix(options: Imatrix, *, progress: Progress = SILENT) -> ImatrixReport:
    """Write an importance matrix in llama.cpp's GGUF form, for its quantizers and for `ggml`.

    It holds, for every Linear of the blocks, each input column's squares summed over calibration tokens, at the model's
    own weights. Embedding, output and an expert model's routers have no entry.

    Raises:
        UsageError: options that cannot work together, a file in the way.
        QuantkitError: the model, the data or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    calibration = options.calibration
    stream = open_stream(named(options.model, options.base, options.delta), options, memory=options.memory)
    source = stream.source
    note_source(source, progress)
    places = _places(stream)
    entries = {t.name: Entry.empty(len(t.sources), t.shape[-1]) for t, _ in places.values()}
    name = f"{variant_name(source.label)}.imatrix.gguf"
    target = Path.cwd() / name if options.out is None else absolute(options.out)
    check_other_file(target, source, options.force)
    drawn = options.samples, options.seq_len
    chunks, chunk_size = calibration.tokens.shape if isinstance(calibration, TokenMatrix) else drawn
    size = sum(entry.bytes for entry in entries.values())
    peak = size + plan_squares_memory(stream, chunks * chunk_size).needed
    work = chunks * chunk_size * sum(rows * columns for _, (rows, columns) in stream.linears())
    sizes = len(entries), chunks, chunk_size, size, peak
    report = ImatrixReport(target, *sizes, {}, multiplications=work, dry_run=True)
    if options.dry_run:
        return report

    matrix = calibration_windows(calibration, options, source, HELDOUT, progress)
    check_tokens(matrix.tokens, source)
    chunks, chunk_size = matrix.tokens.shape

    def keep(name: str, squares: InputSquares) -> None:
        tensor, part = places[name]
        entries[tensor.name].sums[part] = squares.sums.numpy()
        entries[tensor.name].counts[part] = squares.tokens

    with staged_files(target, options.force) as folder:
        collect_squares(stream, matrix.tokens, keep, progress)
        facts = matrix.provenance
        datasets = [part.dataset for part in facts.parts or (facts,)]
        origin = {"quantkit.version": __version__, "quantkit.tokens_sha256": facts.tokens_sha256}
        write_imatrix(folder / target.name, entries, datasets, chunks, chunk_size, origin)
    unseen = _unseen(entries, progress)
    seconds = time.perf_counter() - started
    return replace(report, chunks=chunks, chunk_size=chunk_size, unseen=unseen, seconds=seconds, dry_run=False)


def _places(stream: ModelStream) -> dict[str, tuple[gguf_files.GgufTensor, int]]:
    """Published module name of every Linear -> the tensor of a GGUF file that it is (a part of), and which part.

    Raises:
        SourceError: an architecture that GGUF files cannot hold.
    """
    plan = gguf_files.plan(stream.source, stream.weights)
    parts = {published: (tensor, part) for tensor in plan for part, published in enumerate(tensor.sources)}
    return {name: parts[f"{name}.weight"] for name, _ in stream.linears()}


def _unseen(entries: Mapping[str, Entry], progress: Progress) -> dict[str, int]:
    """Experts without a token by tensor, with a warning if there are any."""
    counts = {name: int((entry.counts == 0).sum()) for name, entry in sorted(entries.items())}
    unseen = {name: count for name, count in counts.items() if count}
    if unseen:
        worst = max(unseen, key=lambda name: unseen[name])
        progress.warn(
            f"{len(unseen)} stacks have experts that saw no calibration token (most: {worst}, {unseen[worst]} of "
            f"{len(entries[worst].counts)}), whose columns count alike; use more --samples, or text of more kinds"
        )
    return unseen
