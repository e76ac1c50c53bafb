"""The verb `imatrix`: how much each column of a model's Linears matters on calibration text, for llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantkit.blocks.families import Stages, shape_of
from quantkit.blocks.memory import plan_watching
from quantkit.blocks.open import named, note_source, open_parts, stream_of, whole
from quantkit.blocks.pair import label_of
from quantkit.blocks.stages import Reading, run_watched
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.containers import gguf as gguf_files
from quantkit.containers.imatrix import Entry, write_imatrix
from quantkit.late import inference, nn, torch
from quantkit.options import HELDOUT
from quantkit.options.verbs import Imatrix
from quantkit.progress import SILENT, Progress, counted, size
from quantkit.quantize.hessian import check_squares
from quantkit.quantize.token_weights import TokenWeights, Weighing, plan_weights_memory, weigh_tokens
from quantkit.report import Report
from quantkit.runs.atomic import absolute_file
from quantkit.runs.outputs import check_other_file, staged_files
from quantkit.runs.record import check_unchanged
from quantkit.sources import variant_name
from quantkit.tokens import TokenMatrix
from quantkit.tokens.text import calibration_windows, check_tokens
from quantkit.verbs import verb
from quantkit.version import __version__

_BATCH_TOKENS = 4096


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
            f"{counted(self.entries, 'tensor')} over {counted(self.chunks, 'window')} of "
            f"{counted(self.chunk_size, 'token')}, {size(self.bytes)}{took}"
        )
        if self.dry_run:
            yield f"peak memory about {size(self.memory_bytes)} beyond torch itself"


@verb(Imatrix)
def imatrix(options: Imatrix, *, progress: Progress = SILENT) -> ImatrixReport:
    """Write an importance matrix in llama.cpp's GGUF form, for its quantizers and for `ggml`.

    It holds, for every Linear of the blocks, each input column's squares summed over calibration tokens, at the model's
    own weights; with `loss_aware` each token's as often as it counts. Embedding, output and an expert model's routers
    have no entry.

    Raises:
        UsageError: options that cannot work together, a file in the way.
        QuantkitError: the model, the data or the disk failed; nothing is left at `out`.
    """
    started = time.perf_counter()
    calibration = options.calibration
    given = named(options.model, options.base, options.delta)
    parts = open_parts(given, options.revision, options.trust_remote_code)
    name = f"{variant_name(label_of(parts))}.imatrix.gguf"
    target = Path.cwd() / name if options.out is None else absolute_file(options.out)
    check_other_file(target, parts, options.force)
    source = whole(parts)
    apart = gguf_files.parts_ends(source.config)
    stream = stream_of(source, options.device, options.dtype, apart, options.memory)
    note_source(source, progress)
    places = _places(stream)
    entries = {t.name: Entry.empty(t.shape[0] if len(t.shape) == 3 else 1, t.shape[-1]) for t, _ in places.values()}
    drawn = options.samples, options.seq_len
    chunks, chunk_size = calibration.tokens.shape if isinstance(calibration, TokenMatrix) else drawn
    size = sum(entry.bytes for entry in entries.values())
    plans = [plan_watching(stream, chunks * chunk_size, _BATCH_TOKENS, stream.budget)]
    if options.loss_aware:
        plans.append(plan_weights_memory(stream, chunks, chunk_size))
    peak = size + max(plan.needed for plan in plans)
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
        own = part if len(tensor.sources) > 1 else slice(None)  # of one matrix in heads, every head reads the same
        entries[tensor.name].sums[own] = squares.sums.numpy()
        entries[tensor.name].counts[own] = squares.tokens

    with staged_files(target, options.force) as folder:
        weights = _weights(stream, matrix.tokens, options.seed, progress) if options.loss_aware else None
        collect_squares(stream, matrix.tokens, keep, progress, weights)
        check_unchanged(source)
        facts = matrix.provenance
        datasets = [part.dataset for part in facts.parts or (facts,)]
        origin = {"quantkit.version": __version__, "quantkit.tokens_sha256": facts.tokens_sha256}
        origin |= {"quantkit.token_weights_seed": str(options.seed)} if weights is not None else {}
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
            f"{counted(len(unseen), 'stack has', 'stacks have')} experts that saw no calibration token (most: {worst}, "
            f"{unseen[worst]} of {len(entries[worst].counts)}), whose columns count alike; use more --samples, or text "
            "of more kinds"
        )
    return unseen


# -- how much a column matters: the Hessian's diagonal times the tokens ------------------------------------------------


@dataclass(frozen=True)
class InputSquares:
    """What Linears with a common input saw.

    Attributes:
        sums: float64 [in], the squares of each column summed over tokens, on the CPU.
        tokens: how many; an expert sees those that were routed to it.
    """

    sums: torch.Tensor
    tokens: int


def _weights(stream: ModelStream, tokens: torch.Tensor, seed: int, progress: Progress) -> TokenWeights | None:
    """What each token counts, in memory; None where all count the same."""
    blocks: dict[int, Mapping[str, torch.Tensor]] = {}
    found = weigh_tokens(stream, tokens, seed, stream.budget, blocks.__setitem__, progress)
    return TokenWeights(blocks.__getitem__) if found else None


OnInputSquares = Callable[[str, InputSquares], None]


@inference
def collect_squares(
    stream: ModelStream,
    tokens: torch.Tensor,
    on_linear: OnInputSquares,
    progress: Progress = SILENT,
    weights: TokenWeights | None = None,
) -> None:
    """Run the model over calibration windows, once and with its own weights; what each Linear read goes to `on_linear`.

    Args:
        tokens: int64 [samples, seq_len].
        on_linear: receives every Linear's published module name, block by block.
        weights: what each token counts; None: all the same.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
    """
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    memory = plan_watching(stream, tokens.numel(), _BATCH_TOKENS, stream.budget)
    memory.note(progress)
    with progress.phase("capturing", len(batches)) as advance:
        hidden = stream.embed(batches, advance, memory.hidden)
    with progress.phase("watching blocks", len(stream.blocks)) as advance, stream.reading_ahead(memory.prefetch):
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                stages = stream.stages(index, block, 0, hidden[0])
                weighing = Weighing(weights, index, [batch.numel() for batch in batches])
                watched = _watch(stream, index, block, stages, hidden, weighing)
                for stage, squares in zip(stages, watched, strict=True):
                    names = [stream.published(index, name) for name in stage]
                    found = squares.finish(names[0])
                    for name in names:
                        on_linear(name, found)
            advance(1)


def _watch(
    stream: ModelStream, index: int, block: nn.Module, stages: Stages, hidden: HiddenStates, weighing: Weighing
) -> list[_Squares]:
    """Move all batches through a block; what each stage read."""
    squares = [_Squares(shape_of(block.get_submodule(stage[0]))[1], stream.device) for stage in stages]

    def forward(batch: int) -> torch.Tensor:
        return stream.call(index, block, batch, hidden[batch])

    def observe(stage: int, batch: int, read: Reading) -> None:
        squares[stage].add(read.x, weighing.of(stream.published(index, stages[stage][0]), batch, read))

    run_watched(block, stages, forward, len(hidden), observe, hidden.__setitem__)
    return squares


class _Squares:
    """The running sum of one stage's input."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Add activations x [..., in] of any float dtype, and what each counts, float32 [...]; None: all the same."""
        x = x.reshape(-1, x.shape[-1])
        squares = x.float().square()
        if weight is not None:
            squares *= weight.reshape(-1, 1).to(x.device)
        self._sums += squares.sum(0, dtype=torch.float64)
        self._tokens += x.shape[0]

    def finish(self, name: str) -> InputSquares:
        sums = self._sums.cpu()
        check_squares(sums, name)
        return InputSquares(sums, self._tokens)
