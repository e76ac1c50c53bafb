"""GPTQ over a whole model: blocks in order, stages within a block, each Linear's forward once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quantkit.blocks.budget import Budget
from quantkit.blocks.families import Stages, weight_of
from quantkit.blocks.memory import MemoryPlan, plan_quantizing
from quantkit.blocks.stages import run_paused, run_replayed
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers, worker_count
from quantkit.codes import Codes, Plan, put_together, take_apart
from quantkit.errors import SourceError
from quantkit.progress import SILENT, Progress
from quantkit.quantize.sharing import BY_ITSELF, Sharing
from quantkit.quantize.stagework import OnLinear, StageWork
from quantkit.runs.landing import NOTHING, Landed

OnBlock = Callable[[int, HiddenStates | None], None]

_BATCH_TOKENS = 1024  # where workers run side by side, larger ones are no faster


@torch.inference_mode()
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

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
        UsageError: a budget that was given and is too little.
    """
    if landed.blocks == len(stream.blocks):
        return
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    mine = sharing.batches(len(batches))
    count = worker_count(stream.device, len(mine))
    memory = plan_quantizing(stream, sum(batches[i].numel() for i in mine), batches[0].numel(), memory_budget, count)
    memory.note(progress)
    with progress.phase("capturing", len(mine)) as advance:
        hidden = stream.embed([batches[i] for i in mine], advance, memory.hidden)
    replayed = sharing.ranks.any(not memory.paused)
    hands_on = sharing.ranks.any(stream.hands_on)
    start = 0 if hands_on else landed.restore(hidden, mine.start, len(batches))
    with (
        progress.phase("quantizing blocks", len(stream.blocks)) as advance,
        stream.reading_ahead(memory.prefetch),
        Workers(sharing.shares(len(batches), count if memory.side_by_side and not hands_on else 1)) as workers,
    ):
        advance(start)
        for index in range(start, len(stream.blocks)):
            with stream.block(index) as block:
                forward = _forward(stream, index, block, hidden, replayed)
                if index < landed.blocks:
                    _run_landed(stream, index, block, landed, sharing, forward, hidden, workers)
                    advance(1)
                    continue
                stages = _planned(stream, index, block, hidden, sharing, plan)
                work = StageWork(
                    stream, index, block, stages, plan, on_linear, progress, len(batches), sharing, workers.count
                )
                run = run_replayed if replayed else run_paused
                run(block, stages, forward, len(mine), work.observe, work.quantize, hidden.__setitem__, workers)
            on_block(index, None if hands_on else hidden)
            advance(1)


def _run_landed(
    stream: ModelStream,
    index: int,
    block: nn.Module,
    landed: Landed,
    sharing: Sharing,
    forward: Callable[[int], torch.Tensor],
    hidden: HiddenStates,
    workers: Workers,
) -> None:
    """A block's forward with the weights that its codes stand for, as the run that landed it went on with them."""
    codes: list[tuple[str, Codes]] = sharing.ranks.from_first(
        lambda: [(linear.name, put_together(linear.tensors, linear.fields)) for linear in landed.linears(index)]
    )
    modules = {stream.published(index, name): name for name in stream.family.linears(block)}
    for name, linear in codes:
        weight = weight_of(block.get_submodule(modules[name]))
        placed = put_together(*take_apart(linear), stream.device)
        weight.copy_(placed.dequantize(weight.dtype))
    for batch, output in workers.each(forward):
        hidden[batch] = output


def plan_gptq_memory(stream: ModelStream, samples: int, seq_len: int) -> MemoryPlan:
    """What `quantize_blocks` will do for memory with so many calibration windows. Raises UsageError."""
    windows = max(1, _BATCH_TOKENS // seq_len)  # of a batch
    workers = worker_count(stream.device, -(-samples // windows))
    return plan_quantizing(stream, samples * seq_len, windows * seq_len, stream.budget, workers)


def gptq_multiplications(stream: ModelStream, tokens: int) -> int:
    """Multiplications, with their additions, of `quantize_blocks`: one forward, Hessians, their factors, updates."""
    shapes = dict(stream.linears())
    operations = tokens * sum(rows * columns for rows, columns in shapes.values())
    for index, stages in enumerate(stream.known_stages()):
        for stage in stages:
            held = [shapes[stream.published(index, name)] for name in stage]
            width, rows = held[0][1], sum(rows for rows, _ in held)
            operations += tokens * width**2 // 2 + width**3 + rows * width**2
    return operations


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


def _forward(
    stream: ModelStream, index: int, block: nn.Module, hidden: HiddenStates, again: bool
) -> Callable[[int], torch.Tensor]:
    """A batch's forward. What enters it is let go with it, unless it will be run again."""
    return lambda i: stream.call(index, block, i, hidden[i] if again else hidden.take(i))
