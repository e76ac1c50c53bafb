"""How much each input column of a model's Linears matters: the sum of its squares over calibration tokens.

It is the Hessian's diagonal times the tokens, and all that llama.cpp's quantizers want to know of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.blocks.families import Stages, shape_of
from quantkit.blocks.memory import MemoryPlan, plan_watching
from quantkit.blocks.stages import run_watched
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.progress import SILENT, Progress
from quantkit.quantize.hessian import check_squares

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class InputSquares:
    """What Linears with a common input saw.

    Attributes:
        sums: float64 [in], the squares of each column summed over tokens, on the CPU.
        tokens: how many; an expert sees those that were routed to it.
    """

    sums: torch.Tensor
    tokens: int


OnInputSquares = Callable[[str, InputSquares], None]


@torch.inference_mode()
def collect_squares(
    stream: ModelStream, tokens: torch.Tensor, on_linear: OnInputSquares, progress: Progress = SILENT
) -> None:
    """Run the model over calibration windows, once and with its own weights; what each Linear read goes to `on_linear`.

    Args:
        tokens: int64 [samples, seq_len].
        on_linear: receives every Linear's published module name, block by block.

    Raises:
        NumericError: an activation that is not finite, named by the Linear that reads it.
    """
    batches = list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))
    memory = plan_squares_memory(stream, tokens.numel())
    memory.note(progress)
    with progress.phase("capturing", len(batches)) as advance:
        hidden = stream.embed(batches, advance, memory.hidden)
    with progress.phase("watching blocks", len(stream.blocks)) as advance, stream.reading_ahead(memory.prefetch):
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                stages = stream.stages(index, block, 0, hidden[0])
                for stage, squares in zip(stages, _watch(stream, index, block, stages, hidden), strict=True):
                    names = [stream.published(index, name) for name in stage]
                    found = squares.finish(names[0])
                    for name in names:
                        on_linear(name, found)
            advance(1)


def plan_squares_memory(stream: ModelStream, tokens: int) -> MemoryPlan:
    """What `collect_squares` will do for memory with so many calibration tokens. Raises UsageError."""
    return plan_watching(stream, tokens, _BATCH_TOKENS, stream.budget)


def _watch(stream: ModelStream, index: int, block: nn.Module, stages: Stages, hidden: HiddenStates) -> list[_Squares]:
    """Move all batches through a block; what each stage read."""
    squares = [_Squares(shape_of(block.get_submodule(stage[0]))[1], stream.device) for stage in stages]

    def forward(batch: int) -> torch.Tensor:
        return stream.call(index, block, batch, hidden[batch])

    def observe(stage: int, _: int, x: torch.Tensor) -> None:
        squares[stage].add(x)

    run_watched(block, stages, forward, len(hidden), observe, hidden.__setitem__)
    return squares


class _Squares:
    """The running sum of one stage's input."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations x [..., in] of any float dtype."""
        x = x.reshape(-1, x.shape[-1])
        self._sums += x.float().square().sum(0, dtype=torch.float64)
        self._tokens += x.shape[0]

    def finish(self, name: str) -> InputSquares:
        sums = self._sums.cpu()
        check_squares(sums, name)
        return InputSquares(sums, self._tokens)
