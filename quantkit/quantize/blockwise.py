"""GPTQ over a whole model: blocks in order, stages within a block, each Linear's forward once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

from quantkit.blocks.budget import Budget
from quantkit.blocks.families import Stages, has_experts, showing_all, weight_of
from quantkit.blocks.memory import MemoryPlan, plan_quantizing
from quantkit.blocks.stages import Reading, run_paused, run_replayed
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers, batch_windows, worker_count
from quantkit.codes import Codes, Plan, put_together, take_apart
from quantkit.errors import NumericError, SourceError
from quantkit.late import inference, nn, torch
from quantkit.options import QuantSpec
from quantkit.progress import SILENT, Progress
from quantkit.quantize import row_feedback
from quantkit.quantize.coded_ends import head_of
from quantkit.quantize.correction import BothPaths, CorrectionSums, Corrector, OriginalPath, difference_of
from quantkit.quantize.gptq_grid import check_losses
from quantkit.quantize.hessian import row_losses
from quantkit.quantize.layers import LayerStatistics
from quantkit.quantize.methods import Solved, Sums, method_of
from quantkit.quantize.sharing import BY_ITSELF, Gathering, Sharing
from quantkit.quantize.token_weights import ALIKE, TokenWeights, Weighing
from quantkit.runs.batches import Batches
from quantkit.runs.landing import NOTHING, Landed

OnBlock = Callable[[int, Batches | None], None]
OnEnd = Callable[[HiddenStates, int], None]
"""Gets the hidden states that leave the last block, of this process's batches, and how many all have."""

TRIED = 4  # Hessians of a stage whose candidates are tried: one to quantize by, three Linears' to judge by
_FALLBACK_TEXT = {
    "eigenvalues": "its Hessian had to be repaired (negative eigenvalues); more calibration samples may help",
    "rounding": "no usable Hessian, so it was only rounded; more calibration samples may help",
}


OnLinear = Callable[[str, Codes, LayerStatistics], None]


@inference
def quantize_blocks(
    stream: ModelStream,
    tokens: torch.Tensor,
    plan: Plan,
    on_linear: OnLinear,
    memory_budget: Budget,
    progress: Progress = SILENT,
    landed: Landed = NOTHING,
    on_block: OnBlock = lambda index, hidden: None,
    sharing: Sharing = BY_ITSELF,
    weights: TokenWeights | None = None,
    work_of: Callable[..., StageWork] | None = None,
    on_end: OnEnd | None = None,
) -> None:
    """Quantize every Linear of the plan; `on_linear` gets each one's codes as soon as they exist.

    The Linears of blocks that landed in an earlier run are not quantized again and not given to `on_linear`: what such
    a block hands on is computed with its codes.

    Args:
        stream: the model.
        tokens: int64 [samples, seq_len], the calibration windows.
        plan: bits, groups, order, damping of each Linear.
        memory_budget: what the pass may take; `plan_quantizing` says what that means, and a note what is not usual.
        landed: what an earlier run of the same left.
        on_block: called when a block's Linears are quantized, with its index and the hidden states that leave it; None
            where hidden states alone are not all that it hands on.
        sharing: how the work is split; every process calls this alike and gets all codes, but only its own part of the
            hidden states.
        weights: what each token counts; None: all the same.
        work_of: makes what is done at a block's stages, by the arguments of `StageWork`; None: that.
        on_end: called when all blocks are done; None: nothing is wanted of what leaves the last one.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
        UsageError: a budget that was given and is too little.
    """
    if landed.blocks >= len(stream.blocks) and on_end is None:
        return
    batches = in_batches(tokens, stream.device)
    mine = sharing.batches(len(batches))
    count = worker_count(stream.device, len(mine))
    correcting = corrects(next(iter(plan.values())).spec)
    sizes = sum(batches[i].numel() for i in mine), batches[0].numel()
    feeds, squares = weights is not None and weights.feed_rows, 1 if work_of is None else TRIED
    head = None if on_end is None else shape_of_head(plan)
    memory = plan_quantizing(stream, *sizes, memory_budget, count, correcting, feeds, squares, head)
    memory.note(progress)
    with progress.phase("capturing", len(mine)) as advance:
        hidden = stream.embed([batches[i] for i in mine], advance, memory.hidden)
    replayed = sharing.ranks.any(not memory.paused)
    hands_on = sharing.ranks.any(stream.hands_on)
    if correcting and hands_on:
        progress.note("no target is corrected: blocks hand on more than hidden states, and cannot run twice in step")
    shown = _shows_all(plan)
    if shown and not has_experts(stream.modules):
        progress.note("its blocks have no experts to show all tokens to: --experts all changes nothing")
    original = OriginalPath(stream, hidden, memory.hidden) if correcting and not hands_on else None
    states = hidden if original is None else BothPaths(hidden, original.hidden)
    start = 0 if hands_on else landed.restore(states, mine.start, len(batches))
    with (
        progress.phase("quantizing blocks" if work_of is None else "trying candidates", len(stream.blocks)) as advance,
        stream.reading_ahead(memory.prefetch),
        Workers(sharing.shares(len(batches), count if memory.side_by_side and not hands_on else 1)) as workers,
    ):
        advance(start)
        for index in range(start, len(stream.blocks)):
            with stream.block(index) as block:

                def forward(i: int, index: int = index, block: nn.Module = block) -> torch.Tensor:
                    # What enters it is let go with it, unless it will be run again.
                    return stream.call(index, block, i, hidden[i] if replayed else hidden.take(i))

                if index < landed.blocks:
                    if original is not None:
                        original.pass_through(index, block, workers)
                    _restore_codes(stream, index, block, landed, sharing)
                    for batch, output in workers.each(forward):
                        hidden[batch] = output
                    advance(1)
                    continue
                stages = _planned(stream, index, block, hidden, sharing, plan)
                sizes_until = [batches[i].numel() for i in range(mine.stop)]
                weighing = Weighing(weights, index, sizes_until, mine.start, tokens.numel())
                work = (work_of or StageWork)(
                    *(stream, index, block, stages, plan, on_linear, progress, len(batches), sharing),
                    workers.count,
                    weighing,
                    mine.start if original is not None else None,
                )
                run = run_replayed if replayed else run_paused
                seen = work.observe, work.quantize, hidden.__setitem__
                with showing_all(block) if shown else nullcontext():
                    beside = None if original is None else original.beside(index, block, replayed)
                    run(block, stages, forward, len(mine), *seen, workers, beside)
            on_block(index, None if hands_on else states)
            advance(1)
    if on_end is not None:
        on_end(hidden, len(batches))


def _shows_all(plan: Plan) -> bool:
    """Whether experts' Hessians are of all tokens."""
    return next(iter(plan.values())).spec.experts == "all"


def _restore_codes(stream: ModelStream, index: int, block: nn.Module, landed: Landed, sharing: Sharing) -> None:
    """Give a block the weights that its codes stand for, as the run that landed it went on with them."""
    codes: list[tuple[str, Codes]] = sharing.ranks.from_first(
        lambda: [(linear.name, put_together(linear.tensors, linear.fields)) for linear in landed.linears(index)]
    )
    modules = {stream.published(index, name): name for name in stream.family.linears(block)}
    for name, linear in codes:
        weight = weight_of(block.get_submodule(modules[name]))
        placed = put_together(*take_apart(linear), stream.device)
        weight.copy_(placed.dequantize(weight.dtype))


def in_batches(tokens: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Calibration windows int64 [samples, seq_len] as they are run."""
    return list(torch.split(tokens, batch_windows(device, *tokens.shape)))


def corrects(spec: QuantSpec) -> bool:
    """Whether targets are corrected: plain rounding has none."""
    return spec.correct != 0 and spec.method == "gptq"


def plan_gptq_memory(
    stream: ModelStream,
    samples: int,
    seq_len: int,
    beside: bool = False,
    products: bool = False,
    tried: bool = False,
    head: tuple[int, int] | None = None,
) -> MemoryPlan:
    """What `quantize_blocks` will do for memory with so many calibration windows, or where candidates are `tried`.

    `head`: shape of the output head, where it is quantized too. Raises UsageError.
    """
    windows = batch_windows(stream.device, samples, seq_len)  # of a batch
    workers = worker_count(stream.device, -(-samples // windows))
    sizes = samples * seq_len, windows * seq_len
    return plan_quantizing(stream, *sizes, stream.budget, workers, beside, products, TRIED if tried else 1, head)


def shape_of_head(plan: Plan) -> tuple[int, int] | None:
    """(out, in) of the output head, where a plan has it."""
    found = head_of(plan)
    return None if found is None else found[1].shape


def gptq_multiplications(
    stream: ModelStream, tokens: int, beside: bool = False, head: tuple[int, int] | None = None
) -> int:
    """Multiplications, with their additions, of `quantize_blocks`: one forward, Hessians, their factors, updates.

    `beside`: the unquantized model runs in step, and what both read is multiplied too. `head`: shape of the output
    head, where it is quantized too.
    """
    shapes = dict(stream.linears())
    operations = (2 if beside else 1) * tokens * sum(rows * columns for rows, columns in shapes.values())
    for index, stages in enumerate(stream.known_stages()):
        for stage in stages:
            held = [shapes[stream.published(index, name)] for name in stage]
            width, rows = held[0][1], sum(rows for rows, _ in held)
            operations += (3 if beside else 1) * tokens * width**2 // 2 + width**3 + rows * width**2
    rows, width = head or (0, 0)
    return operations + tokens * width**2 // 2 + width**3 + rows * width**2


def _planned(
    stream: ModelStream, index: int, block: nn.Module, hidden: HiddenStates, sharing: Sharing, plan: Plan
) -> Stages:
    """The block's stages without the Linears that stay as they are."""
    # A forward may be needed to see them, and the first rank is sure to have a sample.
    stages: Stages = sharing.ranks.from_first(lambda: stream.stages(index, block, 0, hidden[0]))
    reached = {stream.published(index, name) for stage in stages for name in stage}
    missed = [name for name, _ in stream.linears_in(index) if name in plan and name not in reached]
    if missed:
        raise SourceError(f"the forward never calls {', '.join(missed)}; leave it out with --exclude")
    kept = (tuple(name for name in stage if stream.published(index, name) in plan) for stage in stages)
    return tuple(stage for stage in kept if stage)


class StageWork:
    """Sums and codes of the stages of one block.

    On every rank the same stages are quantized in the same order, whether a sample of its own reached them or not.
    """

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        block: nn.Module,
        stages: Stages,
        plan: Plan,
        on_linear: OnLinear,
        progress: Progress,
        batches: int,
        sharing: Sharing,
        workers: int = 1,
        weighing: Weighing = ALIKE,
        first: int | None = None,
    ) -> None:
        """`first`: number of this rank's first batch, where targets are corrected."""
        self._stored = partial(stream.stored_weight, index, block)
        self._weighing, self._first = weighing, first
        self._block, self._stages, self._plan = block, stages, plan
        self._names = {name: stream.published(index, name) for stage in stages for name in stage}
        self._on_linear, self._progress = on_linear, progress
        self._sharing, self._workers = sharing, workers
        spec = next(iter(plan.values())).spec
        self._method, self._part = method_of(spec.method), None if spec.correct == "auto" else float(spec.correct)
        assert set(self._method.needs) <= {"weight"}, "only a stage's own input is at hand, and weights"
        self._lock = threading.Lock()
        self._gatherings: dict[int, Gathering] = {}
        for stage, names in enumerate(stages):
            weight = weight_of(block.get_submodule(names[0]))
            self._gatherings[stage] = sharing.gathering(self._sums(stage, weight.shape[1], weight.device), batches)
        self._seconds = 0.0

    def _sums(self, stage: int, columns: int, device: torch.device) -> Callable[[], Sums]:
        """Makes what adds up the input of a stage."""
        if self._first is not None:
            return partial(CorrectionSums, columns, device, 2 if self._part is None else 1)
        return partial(self._method.gathers, columns, device)

    def _beside(self, stage: int, batch: int, read: Reading) -> list[Any]:
        """What the sums take beside the input and its tokens' weights."""
        return [] if self._first is None else [difference_of(read), self._first + batch]

    def observe(self, stage: int, batch: int, read: Reading) -> None:
        """Take what this rank's batch number `batch` feeds to a stage; several threads may call it."""
        start = time.perf_counter()
        name = self._names[self._stages[stage][0]]
        given: list[Any] = [self._weighing.of(name, batch, read)] if self._method.needs else []
        self._gatherings[stage].add(batch, read.x, *given, *self._beside(stage, batch, read))
        spent = (time.perf_counter() - start) / self._workers
        with self._lock:
            self._seconds += spent

    def quantize(self, stage: int) -> None:
        """Codes of a stage whose input is gathered, Linears that are quantized alike as one stack."""
        modules, gathered, tokens, spent = self._finished(stage)
        stacks: dict[QuantSpec, list[str]] = {}
        for linear in modules:
            stacks.setdefault(self._plan[self._names[linear]].spec, []).append(linear)
        for spec, linears in stacks.items():
            start = time.perf_counter()
            names, weights = [self._names[name] for name in linears], [weight_of(modules[name]) for name in linears]
            corrector = None if self._first is None else Corrector(gathered, spec.damp, self._part)
            stored = [self._stored(name) for name in linears]
            targets = [(W, None) if corrector is None else corrector.target(W) for W in stored]
            H = gathered if corrector is None else corrector.H
            products = [self._weighing.products(name) for name in names] if spec.row_feedback else []
            try:
                if any(own is not None for own in products):  # rows that depend on each other are every process's own
                    solved = row_feedback.solve([W for W, _ in targets], products, H, spec)
                else:
                    solved = self._sharing.solve(self._method, torch.cat([W for W, _ in targets]), H, spec)
                losses = _sums([solved.loss, solved.rtn_loss], [weight.shape[0] for weight in weights])
                check_losses(chain(*losses), weights[0].device)
            except NumericError as error:
                raise NumericError(f"{', '.join(names)}: {error}") from None
            seconds = spent / len(stacks) + time.perf_counter() - start
            own = None if corrector is None else [partial(row_losses, W.float(), H=H) for W in stored]
            self._hand_on(names, weights, solved, losses, tokens, seconds, [part for _, part in targets], own)

    def _finished(self, stage: int) -> tuple[dict[str, nn.Module], Any, int, float]:
        """A stage's Linears by their names in the block, what was gathered of their input, of how many tokens, and the
        seconds that took."""
        start = time.perf_counter()
        modules = {name: self._block.get_submodule(name) for name in self._stages[stage]}
        gathering = self._gatherings.pop(stage)
        gathered, tokens = gathering.finish(self._names[next(iter(modules))])
        del gathering  # its sums are as large as what is gathered, and what the method makes of that comes on top
        spent, self._seconds = self._seconds + time.perf_counter() - start, 0.0
        return modules, gathered, tokens, spent

    def _hand_on(
        self,
        names: Sequence[str],
        weights: Sequence[torch.Tensor],
        solved: Solved,
        losses: Sequence[Sequence[float]],
        tokens: int,
        seconds: float,
        parts: Sequence[float | None],
        own: Sequence[Callable[[Codes], torch.Tensor]] | None,
    ) -> None:
        """Put the codes of a stack in place of its weights [out, in], and give each Linear's to `on_linear`.

        `losses`: of each Linear, and those of plain rounding.
        `own`: losses of codes against the weight that the model has, where `solved` has them against another.
        """
        rows = [weight.shape[0] for weight in weights]
        linears: Sequence[Codes] = solved.linear.split(rows)
        found = zip(names, weights, linears, torch.split(solved.loss, rows), *losses, parts, strict=True)
        for number, (name, weight, linear, loss, lost, rtn_lost, part) in enumerate(found):
            own_loss = loss if own is None else own[number](linear)  # of the weight that is about to be written over
            weight.copy_(linear.dequantize(weight.dtype))
            share = seconds * weight.shape[0] / sum(rows)
            statistics = LayerStatistics(
                *(name, lost, rtn_lost, solved.damp, solved.fallback, tokens, share),
                self._weighing.effective(name, tokens) if self._method.needs else None,
                part,
                self._weighing.divergence(name, own_loss),
            )
            self._progress.detail(f"{name}  error {statistics.loss:.3g}, plain rounding {statistics.rtn_loss:.3g}")
            if solved.fallback and tokens:
                self._progress.warn(f"{name}: {_FALLBACK_TEXT[solved.fallback]}")
            self._on_linear(name, linear, statistics)


def _sums(losses: Sequence[torch.Tensor], rows: Sequence[int]) -> list[list[float]]:
    """Of losses [out] of a stack the sums of each Linear's `rows`. A GPU is waited for once, till its work is done."""
    parts = [[part.sum() for part in torch.split(one, list(rows))] for one in losses]
    found = torch.stack(list(chain(*parts))).tolist()
    return [found[start : start + len(rows)] for start in range(0, len(found), len(rows))]
