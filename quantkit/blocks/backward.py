"""A pass through a model and back of which no more than one block, and its graph, is in memory.

A forward keeps the states that enter each block, the head's gradient is taken over slices of the vocabulary, and then
the blocks run once more, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from quantkit.blocks.memory import SLICE
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers
from quantkit.late import nn, torch
from quantkit.progress import Advance

_POSITIONS = 256  # whose logits are held at a time

Opened = Callable[[int], AbstractContextManager["nn.Module"]]
Piece = tuple[int, int, slice]
"""Number of a batch, a row of it, and positions there."""


def run_forward(
    stream: ModelStream,
    hidden: HiddenStates,
    numbers: Sequence[int],
    workers: Workers,
    opened: Opened | None = None,
    entering: Callable[[HiddenStates], None] = lambda hidden: None,
    advance: Advance = lambda n: None,
    blocks: range | None = None,
) -> None:
    """Run all blocks, without a graph, on hidden states, which those that leave the last block take the place of.

    Args:
        hidden: of some batches, which enter the first block.
        numbers: theirs in `ModelStream.embed`.
        workers: share out the positions in `numbers`.
        opened: what gives a block by its index; None: the stream, as it is.
        entering: sees the states that enter each block.
        blocks: run these only, whose first one the states enter.
    """
    for index in range(len(stream.blocks)) if blocks is None else blocks:
        entering(hidden)
        with (opened or stream.block)(index) as block:

            def forward(i: int, index: int = index, block: nn.Module = block) -> torch.Tensor:
                with torch.no_grad():  # in threads of their own too
                    return stream.call(index, block, numbers[i], hidden.take(i))

            for i, output in workers.each(forward):
                hidden[i] = output
        advance(1)


@dataclass
class BlockRun:
    """A batch's forward through a block, with its graph: what entered it and what left it, [batch, seq, hidden]."""

    state: torch.Tensor
    output: torch.Tensor

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """By what entered the block, of that by what left it."""
        return torch.autograd.grad(self.output, self.state, gradient)[0]

    def gradients(
        self, gradient: torch.Tensor, leaves: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        """The same, and those by `leaves`: None of one that the batch does not reach."""
        found, *own = torch.autograd.grad(self.output, (self.state, *leaves), gradient, allow_unused=True)
        return found, own


def run_block(stream: ModelStream, index: int, block: nn.Module, number: int, state: torch.Tensor) -> BlockRun:
    """Run a loaded block with a graph on what enters it of batch `number` in `ModelStream.embed`."""
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        return BlockRun(state, stream.call(index, block, number, state))


def head_pieces(shapes: Iterable[tuple[int, int]]) -> list[Piece]:
    """Batches of (rows, positions) in pieces that the head runs on at a time."""
    return [
        (i, row, slice(start, start + _POSITIONS))
        for i, (rows, positions) in enumerate(shapes)
        for row in range(rows)
        for start in range(0, positions, _POSITIONS)
    ]


def head_slices(stream: ModelStream) -> list[tuple[int, int]]:
    """(start, stop) of the rows of the vocabulary that are at hand at a time."""
    return [(start, min(start + SLICE, stream.vocabulary)) for start in range(0, stream.vocabulary, SLICE)]
