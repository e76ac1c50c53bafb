"""What the model's output feels of each token's error at each Linear: squared gradients, block by block.

What goes back is drawn at every position's logits with the covariance of the model's own Fisher information there
(`probes`): to second order the divergence of a model whose Linear is off by e[t] at its output for token t is the mean
of ``1/2 sum_t (g[t] . e[t])^2``, with g what arrives there (GuidedQuant, arXiv 2505.07004, section 3; YAQA, 2505.22988,
section 2, both with labels drawn from the model's distribution).

No more than one block need be in memory with its graph. A forward keeps the states that enter each block, the head's
gradient is taken over slices of the vocabulary, and then the blocks run once more, from the last to the first. Where
all blocks have room with the graph of a batch, each batch goes there and back at once, and no forward is run twice;
every product is the same one, so that both ways give the same bits. Weights have no gradient; what is asked for is that
of states and of the Linears' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock, local
from typing import Any, NamedTuple, Protocol

from quantkit.blocks.backward import BlockRun, head_slices, run_block, run_forward
from quantkit.blocks.budget import let_go
from quantkit.blocks.families import ROUTED, Stages, weight_of
from quantkit.blocks.head_gradient import batch_gradient, head_gradients
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.states import HiddenStates, half
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers
from quantkit.late import nn, torch
from quantkit.progress import Progress

_PIECE = 64  # tokens whose squares are made at a time on a CPU: they stay in its cache for both sums

Found = list[list["StageSquares"]]  # by batch and stage
Reached = Callable[[int, HiddenStates], None]
"""Told how far a pass back is: all blocks from this one on are done; per batch, the gradient at what enters it."""
Begun = tuple[int, Iterable["torch.Tensor"]]
Products = dict[str, "torch.Tensor"]
"""``sum g g^T`` over all tokens, float64 [out, out], of some Linears by their names in the block."""


class BlockSquares(NamedTuple):
    """The squared gradients of the block of this number, and what they are of: its stages of Linears."""

    number: int
    stages: Stages
    found: Found
    products: Products


class Ends(Protocol):
    """Looks at batches where they leave the last block and where their gradients enter the first."""

    def leaving(self, i: int, state: torch.Tensor) -> None:
        """The state [batch, seq, hidden] of batch `i`."""

    def entering(self, i: int, gradient: torch.Tensor) -> None:
        """The gradient of the summed loss by it, of the same shape; several threads may call it."""


@dataclass
class StageSquares:
    """The squared gradients at the outputs of one stage's Linears, over one batch.

    Attributes:
        rows: per Linear, float64 [out]: summed over the batch's tokens.
        squares: float32 [n]: of each token, summed over all outputs of the stage; empty before any was seen.
        tokens: int64 [n], numbers in the batch, ascending: those that an expert saw; None: all, in order.
        own: per Linear, what `squares` adds up.
    """

    rows: list[torch.Tensor]
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: torch.Tensor | None = None
    own: dict[int, torch.Tensor] = field(default_factory=dict)

    def see(self, number: int, gradient: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Take the gradient [..., out] at the output of the stage's Linear `number`, of these tokens."""
        gradient = gradient.detach().reshape(-1, gradient.shape[-1])
        sums = []
        for part in torch.split(gradient, _PIECE if gradient.device.type == "cpu" else max(1, len(gradient))):
            squares = part.float().square()
            self.rows[number] += squares.sum(dim=0)
            sums.append(squares.sum(dim=1))
        of_tokens = torch.cat(sums)
        self.squares = self.squares + of_tokens if len(self.squares) else of_tokens
        self.tokens = tokens
        self.own[number] = of_tokens


@dataclass(frozen=True)
class FisherPass:
    """A pass through the model and back that looks at the gradients of some windows at every Linear.

    Not to be run in inference mode, whose tensors have no gradients.

    Attributes:
        batches: int64 [windows, seq] token ids each.
        seeds: int64, as `batches`: what decides on each token's signs.
        memory: where states wait, and whether all blocks are held.
        exact: keep states in the stream's dtype, not in half precision; where all blocks are held none are kept.
        most_rows: products are made of Linears of at most so many rows that all tokens go through; 0: of none.
        ends: sees every batch before the first block's squares are given.
    """

    stream: ModelStream
    batches: Sequence[torch.Tensor]
    seeds: Sequence[torch.Tensor]
    memory: MemoryPlan
    workers: Workers
    progress: Progress
    exact: bool = False
    most_rows: int = 0
    ends: Ends | None = None

    def squares(self, reached: Reached | None = None, begun: Begun | None = None) -> Iterator[BlockSquares]:
        """Of every block, from the last to the first.

        Args:
            reached: is told of every block that was taken how far the pass is; not where all blocks are held.
            begun: where to go on, of what an earlier pass was told as `reached`; not where all blocks are held.

        Raises:
            RuntimeError: torch's own, where the forward has no gradient.
        """
        return self._at_once() if self.memory.at_once else self._by_block(reached, begun)

    def _by_block(self, reached: Reached | None, begun: Begun | None) -> Iterator[BlockSquares]:
        count = len(self.stream.blocks) if begun is None else begun[0]
        entering = _Entering(self.stream, len(self.batches), self.memory, self.workers, self.exact)
        last = self._forward(entering, count)
        found = self._leaving(last) if begun is None else begun[1]
        gradients = HiddenStates(self.stream.device, self.memory.hidden, found)
        last.close()
        if reached is not None and begun is None:
            reached(count, gradients)
        with self.progress.phase("weighing backwards", count) as advance:
            for index in reversed(range(count)):
                yield self._backward(index, *entering.of(index), gradients)
                if reached is not None:
                    reached(index, gradients)
                advance(1)
        entering.close()
        gradients.close()

    def _forward(self, entering: _Entering, count: int) -> HiddenStates:
        """The states that leave the last of `count` blocks."""
        with torch.no_grad(), self.progress.phase("weighing forwards", count) as advance:
            hidden = self.stream.embed(list(self.batches), place=self.memory.hidden)
            with self.stream.reading_ahead(self.memory.prefetch):
                run_forward(
                    *(self.stream, hidden, range(len(self.batches)), self.workers),
                    entering=entering.see,
                    advance=advance,
                    blocks=range(count),
                )
        return hidden

    def _leaving(self, last: HiddenStates) -> list[torch.Tensor]:
        """Gradients at the states that leave the last block."""
        if self.ends is not None:
            for i, state in enumerate(last):
                self.ends.leaving(i, state)
        return head_gradients(self.stream, last, self.seeds, self.memory.head_rows is None, self.progress)

    def _backward(self, index: int, kept: HiddenStates, first: int, gradients: HiddenStates) -> BlockSquares:
        """Take all batches back through a block, which they enter as `kept` has them from number `first` on."""
        stream = self.stream
        squares: Found = [[] for _ in self.batches]
        with stream.block(index) as block:
            stages = stream.stages(index, block, 0, kept[first].to(stream.dtype)) if self.batches else ()
            watch = _Watch(block, stages, self.most_rows)

            def backward(i: int) -> tuple[torch.Tensor, list[StageSquares]]:
                state, gradient = kept.take(first + i).to(stream.dtype), gradients.take(i)
                with watch.batch() as seen:
                    run = run_block(stream, index, block, i, state)
                return run.gradient(gradient), seen

            with watch.hooked():
                for i, (gradient, seen) in self.workers.each(backward):
                    gradients[i], squares[i] = gradient, seen
                    if self.ends is not None and index == 0:
                        self.ends.entering(i, gradient)
        return BlockSquares(index, stages, squares, watch.products)

    def _at_once(self) -> Iterator[BlockSquares]:
        """With all blocks held: each batch through all of them, the head, and back."""
        stream, batches, ends, slices = self.stream, self.batches, self.ends, head_slices(self.stream)
        with torch.no_grad():
            hidden = stream.embed(list(batches), place=self.memory.hidden)
        every = range(len(stream.blocks))
        with ExitStack() as held, self.progress.phase("weighing tokens", len(batches)) as advance:
            with stream.reading_ahead(self.memory.prefetch):
                blocks = [held.enter_context(stream.block(index)) for index in every]
            stages = [stream.stages(index, blocks[index], 0, hidden[0]) for index in every] if batches else []
            watches = [_Watch(block, own, self.most_rows) for block, own in zip(blocks, stages, strict=False)]
            for watch in watches:
                held.enter_context(watch.hooked())
            heads = held.enter_context(stream.head_rows(*slices))
            found: list[Found] = [[[] for _ in batches] for _ in every]
            runs: dict[int, list[BlockRun]] = {}

            def forward(i: int) -> torch.Tensor:
                state, runs[i] = hidden.take(i), []
                for index in every:
                    with watches[index].batch() as found[index][i]:
                        runs[i].append(run_block(stream, index, blocks[index], i, state))
                    state = runs[i][-1].output.detach()
                return state

            def backward(i: int) -> None:
                gradient, own = gradients.pop(i), runs.pop(i)
                while own:
                    gradient = own.pop().gradient(gradient)
                if ends is not None:
                    ends.entering(i, gradient)

            for items in self.workers.rounds():
                at_hand = list(chain.from_iterable(items))
                lasts = self.workers.together(forward, items)
                if ends is not None:
                    for i, last in zip(at_hand, lasts, strict=True):
                        ends.leaving(i, last)
                gradients = {
                    i: batch_gradient(heads, slices, last, self.seeds[i])
                    for i, last in zip(at_hand, lasts, strict=True)
                }
                self.workers.together(backward, items)
                let_go()  # each round leaves holes: SmolLM2's peak rose from 1.7 to 2.0 GB in three
                advance(len(at_hand))
        hidden.close()
        for index in reversed(every):
            watched = (stages[index], found[index], watches[index].products) if watches else ((), found[index], {})
            yield BlockSquares(index, *watched)


# -- forward -----------------------------------------------------------------------------------------------------------


class _Entering:
    """What enters each block, of all batches: it is kept of one block in `memory.every`, and made again from there of
    the others.

    What others are made from is kept as it is; else, unless `exact`, in half precision.
    """

    def __init__(self, stream: ModelStream, batches: int, memory: MemoryPlan, workers: Workers, exact: bool) -> None:
        self._stream, self._batches, self._memory, self._workers = stream, batches, memory, workers
        self._rounded: Callable[[torch.Tensor], torch.Tensor] = (lambda state: state) if exact else half
        self._kept = HiddenStates(stream.device, memory.kept)
        self._seen = 0
        self._between, self._start = HiddenStates(stream.device, memory.kept), -1

    def see(self, states: HiddenStates) -> None:
        """Take those of the next block, on the way forward."""
        if self._seen % self._memory.every == 0:
            for state in states:
                self._kept.append(state if self._memory.every > 1 else self._rounded(state))
        self._seen += 1

    def of(self, index: int) -> tuple[HiddenStates, int]:
        """Those of a block, on the way back, and where its first batch is among them; each may be taken once."""
        if self._memory.every == 1:
            return self._kept, index * self._batches
        start = index - index % self._memory.every
        if start != self._start:
            self._make_again(start, index)
        return self._between, (index - start) * self._batches

    def close(self) -> None:
        self._kept.close()
        self._between.close()

    def _make_again(self, start: int, last: int) -> None:
        """From what enters `start`, that and what enters those after it up to `last`."""
        self._between.close()
        self._between, self._start = HiddenStates(self._stream.device, self._memory.kept), start
        at = start // self._memory.every * self._batches
        own = (self._kept.take(at + i) for i in range(self._batches))
        hidden = HiddenStates(self._stream.device, self._memory.hidden, own)

        def keep(states: HiddenStates) -> None:
            for state in states:
                self._between.append(self._rounded(state))

        run_forward(self._stream, hidden, range(self._batches), self._workers, entering=keep, blocks=range(start, last))
        keep(hidden)
        hidden.close()


# -- backward ----------------------------------------------------------------------------------------------------------


class _Watch:
    """Looks at the gradients that reach the outputs of a block's Linears; batches may run side by side.

    Attributes:
        products: of Linears of at most `most_rows` rows. Numbers of float32 are added in float64, which is exact but
            for what is 2^-29 of the rest: their order does not matter.
    """

    def __init__(self, block: nn.Module, stages: Stages, most_rows: int = 0) -> None:
        self._block, self._stages, self._here = block, stages, local()
        self._most_rows, self._lock = most_rows, Lock()
        self.products: Products = {}

    @contextmanager
    def batch(self) -> Iterator[list[StageSquares]]:
        """What a batch's forward and backward in this thread show of each stage."""
        linears = [[self._block.get_submodule(name) for name in stage] for stage in self._stages]
        weights = [[weight_of(linear) for linear in stage] for stage in linears]
        zeros = [[torch.zeros(len(W), dtype=torch.float64, device=W.device) for W in stage] for stage in weights]
        self._here.seen = [StageSquares(rows) for rows in zeros]
        yield self._here.seen
        del self._here.seen

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While inside, forwards in a `batch` are looked at."""
        hooks = [
            self._block.get_submodule(name).register_forward_hook(
                lambda _, __, output, stage=stage, number=number: self._look(stage, number, output)
            )
            for stage, names in enumerate(self._stages)
            for number, name in enumerate(names)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, stage: int, number: int, output: Any) -> None:
        seen, tokens = self._here.seen[stage], ROUTED.get()
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.see(number, gradient, tokens))
            if tokens is None and output.shape[-1] <= self._most_rows:
                output.register_hook(lambda gradient: self._multiply(self._stages[stage][number], gradient))

    def _multiply(self, name: str, gradient: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        product = rows.T @ rows
        with self._lock:
            total = self.products.setdefault(name, torch.zeros_like(product, dtype=torch.float64))
            total += product
