"""What the model's output feels of each token's error at each Linear: squared gradients, block by block.

Labels are drawn from the model's own distribution at every position, so the squares are a sample of the true Fisher
information: to second order the divergence of a model whose Linear is off by e[t] at its output for token t is, with g
the gradient of the summed loss there, ``1/2 sum_t (g[t] . e[t])^2`` (GuidedQuant, arXiv 2505.07004, section 3; YAQA,
2505.22988, section 2).

No more than one block is in memory with its graph. A forward keeps the states that enter each block, the head's
gradient is taken over slices of the vocabulary, and then the blocks run once more, from the last to the first. Weights
have no gradient; what is asked for is that of states and of the Linears' outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import Any

from quantkit.blocks.backward import block_gradients, head_pieces, head_slices, run_forward
from quantkit.blocks.families import ROUTED, Stages, weight_of
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.states import HiddenStates, half
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers
from quantkit.late import nn, torch
from quantkit.progress import Advance, Progress


@dataclass
class StageSquares:
    """The squared gradients at the outputs of one stage's Linears, over one batch.

    Attributes:
        rows: per Linear, float64 [out]: summed over the batch's tokens.
        squares: float32 [n]: of each token, summed over all outputs of the stage; empty before any was seen.
        tokens: int64 [n], numbers in the batch, ascending: those that an expert saw; None: all, in order.
    """

    rows: list[torch.Tensor]
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: torch.Tensor | None = None

    def see(self, number: int, gradient: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Take the gradient [..., out] at the output of the stage's Linear `number`, of these tokens."""
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
        self.rows[number] += squares.sum(dim=0, dtype=torch.float64)
        of_tokens = squares.sum(dim=1)
        self.squares = self.squares + of_tokens if len(self.squares) else of_tokens
        self.tokens = tokens


def fisher_squares(
    stream: ModelStream,
    batches: Sequence[torch.Tensor],
    chances: Sequence[torch.Tensor],
    memory: MemoryPlan,
    workers: Workers,
    progress: Progress,
    exact: bool = False,
) -> Iterator[tuple[int, Stages, list[list[StageSquares]]]]:
    """Squared gradients of every block, from the last to the first: (index, its stages, per batch and stage).

    Not to be run in inference mode, whose tensors have no gradients.

    Args:
        batches: int64 [windows, seq] token ids each.
        chances: what decides on labels, as `batches`: float64, a number from 0 to 1 that is looked up in the model's
            distribution; or int64, the labels themselves.
        memory: where states wait.
        exact: keep them in the stream's dtype, not in half precision.

    Raises:
        RuntimeError: torch's own, where the forward has no gradient.
    """
    kept, last = _kept_states(stream, batches, memory, workers, progress, exact)
    with progress.phase("weighing: head", 2 * len(head_slices(stream))) as advance:
        gradients = HiddenStates(stream.device, memory.hidden, _head_gradients(stream, last, chances, advance))
    last.close()
    with progress.phase("weighing: blocks, backward", len(stream.blocks)) as advance:
        for index in reversed(range(len(stream.blocks))):
            with stream.block(index) as block:
                first = index * len(batches)
                stages = stream.stages(index, block, 0, kept[first].to(stream.dtype))
                watch = _Watch(block, stages)

                def backward(
                    i: int, index: int = index, block: nn.Module = block, watch: _Watch = watch, first: int = first
                ) -> tuple[torch.Tensor, list[StageSquares]]:
                    state, gradient = kept.take(first + i).to(stream.dtype), gradients.take(i)
                    with watch.batch() as seen:
                        [found] = block_gradients(stream, index, block, i, state, gradient)
                        assert found is not None
                        return found, seen

                found: list[list[StageSquares]] = [[] for _ in batches]
                with watch.hooked():
                    for i, (gradient, squares) in workers.each(backward):
                        gradients[i], found[i] = gradient, squares
            yield index, stages, found
            advance(1)
    kept.close()
    gradients.close()


# -- forward -----------------------------------------------------------------------------------------------------------


def _kept_states(
    stream: ModelStream,
    batches: Sequence[torch.Tensor],
    memory: MemoryPlan,
    workers: Workers,
    progress: Progress,
    exact: bool,
) -> tuple[HiddenStates, HiddenStates]:
    """The states that enter each block, block after block and batch after batch; and those that leave the last."""
    kept = HiddenStates(stream.device, memory.kept)
    with torch.no_grad(), progress.phase("weighing: blocks, forward", len(stream.blocks)) as advance:
        hidden = stream.embed(list(batches), place=memory.hidden)
        numbers = range(len(batches))

        def keep(entering: HiddenStates) -> None:
            for state in entering:
                kept.append(state if exact else half(state))

        with stream.reading_ahead(memory.prefetch):
            run_forward(stream, hidden, numbers, workers, entering=keep, advance=advance)
    return kept, hidden


# -- head --------------------------------------------------------------------------------------------------------------


def _head_gradients(
    stream: ModelStream, hidden: HiddenStates, chances: Sequence[torch.Tensor], advance: Advance
) -> list[torch.Tensor]:
    """The summed loss's gradient at the states that leave the last block, per batch, of labels that `chances` decide.

    A softmax's denominator is a sum over slices of the vocabulary; with those of all slices known, the second time a
    slice is run its own part of the gradient can be made, and the labels that fall into it be found.
    """
    pieces = head_pieces((len(chance), chance.shape[1]) for chance in chances)
    slices = head_slices(stream)
    shares: dict[int, list[torch.Tensor]] = {piece: [] for piece in range(len(pieces))}
    for start, stop in slices:
        with torch.no_grad(), stream.head_rows(start, stop) as head:
            for number, (i, row, at) in enumerate(pieces):
                shares[number].append(head(hidden[i][..., row : row + 1, at, :])[0].logsumexp(dim=-1).double())
        advance(1)
    draws = [
        _Draw(torch.stack(shares[number], dim=-1), chances[i][row, at].to(stream.device))
        for number, (i, row, at) in enumerate(pieces)
    ]
    gradients = [torch.zeros_like(state) for state in hidden]
    for place, (start, stop) in enumerate(slices):
        with stream.head_rows(start, stop) as head:
            for draw, (i, row, at) in zip(draws, pieces, strict=True):
                with torch.enable_grad():
                    state = hidden[i][..., row : row + 1, at, :].detach().requires_grad_()
                    logits = head(state)
                own = draw.loss_gradient(place, start, logits.detach()[0])
                gradients[i][..., row : row + 1, at, :] += torch.autograd.grad(logits, state, own[None])[0]
        advance(1)
    return gradients


class _Draw:
    """Labels of some positions, from the distribution that a model has there.

    Args:
        shares: float64 [positions, slices], the logarithm of each slice's part of the softmax's denominator.
        chance: float64 [positions], each between 0 and 1; or int64, labels that are given.
    """

    def __init__(self, shares: torch.Tensor, chance: torch.Tensor) -> None:
        self._total = shares.logsumexp(dim=-1, keepdim=True)
        self._until = (shares - self._total).exp().cumsum(dim=-1)
        self._chance, self._last = chance, shares.shape[-1] - 1

    def loss_gradient(self, place: int, start: int, logits: torch.Tensor) -> torch.Tensor:
        """Of ``-log p[label]`` by the logits [positions, rows] of slice number `place`, which begins at `start`."""
        gradient = (logits - self._total.to(logits.dtype)).exp()
        at, labels = self._labels_in(place, start, gradient)
        gradient[at, labels] -= 1
        return gradient

    def _labels_in(self, place: int, start: int, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions whose labels lie in a slice, and where in it."""
        if not self._chance.is_floating_point():
            labels = self._chance - start
            at = torch.where((labels >= 0) & (labels < probabilities.shape[-1]))[0]
            return at, labels[at]
        # Where rounding leaves a sum below its chance, the last one counts.
        slices = torch.searchsorted(self._until, self._chance[:, None], right=True)[:, 0].clamp(max=self._last)
        at = torch.where(slices == place)[0]
        left = self._chance[at] - (self._until[at, place - 1] if place else 0.0)
        until = probabilities[at].cumsum(dim=-1, dtype=torch.float64)
        return at, torch.searchsorted(until, left[:, None], right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


# -- backward ----------------------------------------------------------------------------------------------------------


class _Watch:
    """Looks at the gradients that reach the outputs of a block's Linears; batches may run side by side."""

    def __init__(self, block: nn.Module, stages: Stages) -> None:
        self._block, self._stages, self._here = block, stages, local()

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
