"""GPTQ over a whole model: blocks in order, stages within a block, each Linear's forward once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quantkit.model.families import Stages
from quantkit.model.linears import shape_of
from quantkit.model.stages import paused_bytes, run_paused, run_replayed
from quantkit.model.stream import ModelStream
from quantkit.progress import SILENT, Progress
from quantkit.quant.plan import Plan
from quantkit.quant.stagework import OnLinear, StageWork

_BATCH_TOKENS = 4096


@torch.inference_mode()
def quantize_blocks(
    stream: ModelStream,
    tokens: torch.Tensor,
    plan: Plan,
    on_linear: OnLinear,
    memory_budget: int,
    progress: Progress = SILENT,
) -> None:
    """Quantize every Linear of the plan; `on_linear` gets each one's codes as soon as they exist.

    Args:
        stream: the model.
        tokens: int64 [samples, seq_len], the calibration windows.
        plan: bits, groups, order, damping of each Linear.
        memory_budget: bytes that forwards paused between stages may hold; beyond it stages are replayed.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
    """
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    with progress.phase("capturing", len(batches)) as advance:
        hidden = stream.embed(batches, advance)
    run = run_paused
    with progress.phase("quantizing blocks", len(stream.blocks)) as advance:
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                stages = _planned(stream, index, stream.stages(index, block, 0, hidden[0]), plan)
                held = paused_bytes(block, stages, tokens.numel(), stream.dtype.itemsize)
                if run is run_paused and held > memory_budget:
                    run = run_replayed
                    progress.note("the samples do not fit in memory between stages: each block's stages are replayed")
                work = StageWork(stream, index, block, stages, plan, on_linear, progress)
                forward = _forward(stream, index, block, hidden)
                run(block, stages, forward, len(batches), work.observe, work.quantize, hidden.__setitem__)
            advance(1)


def peak_bytes(stream: ModelStream, plan: Plan, tokens: int) -> int:
    """Estimate of what `quantize_blocks` holds at most for so many calibration tokens, beyond torch itself.

    A block and its working copies, the widest Hessian with its factor, hidden states, forwards paused between stages,
    and the embedding while the first hidden states are made.
    """
    item = stream.dtype.itemsize
    first = stream.first_block
    shapes = [shape_of(first.get_submodule(name)) for name in stream.family.linears(first)]
    block = 3 * item * sum(rows * columns for rows, columns in shapes)
    hessian = 4 * 4 * max(linear.shape[1] for linear in plan.values()) ** 2
    config = stream.source.config.get_text_config()
    outside = item * int(config.hidden_size) * (tokens + int(config.vocab_size))
    return block + hessian + outside + paused_bytes(first, stream.known_stages()[0], tokens, item)


def _planned(stream: ModelStream, index: int, stages: Stages, plan: Plan) -> Stages:
    """The stages without the Linears that stay as they are."""
    kept = (tuple(name for name in stage if stream.published(index, name) in plan) for stage in stages)
    return tuple(stage for stage in kept if stage)


def _forward(
    stream: ModelStream, index: int, block: nn.Module, hidden: list[torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    return lambda i: stream.call(index, block, i, hidden[i])
