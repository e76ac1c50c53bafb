"""What the model's output feels of each token's error at each Linear: squared gradients, block by block.

Labels are drawn from the model's own distribution at every position, so the squares are a sample of the true Fisher
information: to second order the divergence of a model whose Linear is off by e[t] at its output for token t is, with g
the gradient of the summed loss there, ``1/2 sum_t (g[t] . e[t])^2`` (GuidedQuant, arXiv 2505.07004, section 3; YAQA,
2505.22988, section 2).

No more than one block need be in memory with its graph. A forward keeps the states that enter each block, the head's
gradient is taken over slices of the vocabulary, and then the blocks run once more, from the last to the first. Where
all blocks have room with the graph of a batch, each batch goes there and back at once, and no forward is run twice;
every product is the same one, so that both ways give the same bits. Weights have no gradient; what is asked for is that
of states and of the Linears' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock, local
from typing import Any

from quantkit.blocks.backward import BlockRun, head_pieces, head_slices, run_block, run_forward
from quantkit.blocks.budget import let_go
from quantkit.blocks.families import ROUTED, Stages, weight_of
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.states import HiddenStates, half
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers
from quantkit.late import nn, torch
from quantkit.progress import Progress

_PIECE = 64  # tokens whose squares are made at a time on a CPU: they stay in its cache for both sums

Slices = list[tuple[int, int]]
Head = Callable[["torch.Tensor"], "torch.Tensor"]
Found = list[list["StageSquares"]]  # by batch and stage
Products = dict[str, "torch.Tensor"]
"""``sum g g^T`` over all tokens, float64 [out, out], of some Linears by their names in the block."""


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


def fisher_squares(
    stream: ModelStream,
    batches: Sequence[torch.Tensor],
    chances: Sequence[torch.Tensor],
    memory: MemoryPlan,
    workers: Workers,
    progress: Progress,
    exact: bool = False,
    most_rows: int = 0,
) -> Iterator[tuple[int, Stages, Found, Products]]:
    """Squared gradients of every block, from the last to the first: (index, its stages, per batch and stage, products).

    Not to be run in inference mode, whose tensors have no gradients.

    Args:
        batches: int64 [windows, seq] token ids each.
        chances: what decides on labels, as `batches`: float64, a number from 0 to 1 that is looked up in the model's
            distribution; or int64, the labels themselves.
        memory: where states wait, and whether all blocks are held.
        exact: keep states in the stream's dtype, not in half precision; where all blocks are held none are kept.
        most_rows: products are made of Linears of at most so many rows that all tokens go through; 0: of none.

    Raises:
        RuntimeError: torch's own, where the forward has no gradient.
    """
    slices = head_slices(stream)
    if memory.at_once:
        yield from _at_once(stream, batches, chances, memory, workers, progress, slices, most_rows)
        return
    kept, last = _kept_states(stream, batches, memory, workers, progress, exact)
    found = _head_gradients(stream, last, chances, memory.head_rows is None, slices, progress)
    gradients = HiddenStates(stream.device, memory.hidden, found)
    last.close()
    with progress.phase("weighing backwards", len(stream.blocks)) as advance:
        for index in reversed(range(len(stream.blocks))):
            with stream.block(index) as block:
                first = index * len(batches)
                stages = stream.stages(index, block, 0, kept[first].to(stream.dtype)) if batches else ()
                watch = _Watch(block, stages, most_rows)

                def backward(
                    i: int, index: int = index, block: nn.Module = block, watch: _Watch = watch, first: int = first
                ) -> tuple[torch.Tensor, list[StageSquares]]:
                    state, gradient = kept.take(first + i).to(stream.dtype), gradients.take(i)
                    with watch.batch() as seen:
                        run = run_block(stream, index, block, i, state)
                    return run.gradient(gradient), seen

                squares: Found = [[] for _ in batches]
                with watch.hooked():
                    for i, (gradient, seen) in workers.each(backward):
                        gradients[i], squares[i] = gradient, seen
            yield index, stages, squares, watch.products
            advance(1)
    kept.close()
    gradients.close()


def _at_once(
    stream: ModelStream,
    batches: Sequence[torch.Tensor],
    chances: Sequence[torch.Tensor],
    memory: MemoryPlan,
    workers: Workers,
    progress: Progress,
    slices: Slices,
    most_rows: int,
) -> Iterator[tuple[int, Stages, Found, Products]]:
    """`fisher_squares` with all blocks held: each batch through all of them, the head, and back."""
    with torch.no_grad():
        hidden = stream.embed(list(batches), place=memory.hidden)
    every = range(len(stream.blocks))
    with ExitStack() as held, progress.phase("weighing tokens", len(batches)) as advance:
        with stream.reading_ahead(memory.prefetch):
            blocks = [held.enter_context(stream.block(index)) for index in every]
        stages = [stream.stages(index, blocks[index], 0, hidden[0]) for index in every] if batches else []
        watches = [_Watch(block, own, most_rows) for block, own in zip(blocks, stages, strict=False)]
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

        for items in workers.rounds():
            at_hand = list(chain.from_iterable(items))
            lasts = workers.together(forward, items)
            gradients = {
                i: _batch_gradient(heads, slices, last, chances[i]) for i, last in zip(at_hand, lasts, strict=True)
            }
            workers.together(backward, items)
            let_go()  # each round leaves holes: SmolLM2's peak rose from 1.7 to 2.0 GB in three
            advance(len(at_hand))
    hidden.close()
    for index in reversed(every):
        yield index, stages[index] if stages else (), found[index], watches[index].products if watches else {}


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
    with torch.no_grad(), progress.phase("weighing forwards", len(stream.blocks)) as advance:
        hidden = stream.embed(list(batches), place=memory.hidden)

        def keep(entering: HiddenStates) -> None:
            for state in entering:
                kept.append(state if exact else half(state))

        with stream.reading_ahead(memory.prefetch):
            run_forward(stream, hidden, range(len(batches)), workers, entering=keep, advance=advance)
    return kept, hidden


# -- head --------------------------------------------------------------------------------------------------------------


def _head_gradients(
    stream: ModelStream,
    hidden: HiddenStates,
    chances: Sequence[torch.Tensor],
    held: bool,
    slices: Slices,
    progress: Progress,
) -> list[torch.Tensor]:
    """The summed loss's gradient at the states that leave the last block, per batch, of labels that `chances` decide.

    A softmax's denominator is a sum over slices of the vocabulary; with those of all slices known, each slice's own
    part of the gradient can be made, and the labels that fall into it be found. Where the whole head is `held` the
    logits of a few positions wait for that, else they are made twice.
    """
    if held:
        with progress.phase("weighing the head", len(hidden)) as advance, stream.head_rows(*slices) as heads:
            found = []
            for state, chance in zip(hidden, chances, strict=True):
                found.append(_batch_gradient(heads, slices, state, chance))
                advance(1)
            return found
    pieces = head_pieces((len(chance), chance.shape[1]) for chance in chances)
    shares: dict[int, list[torch.Tensor]] = {piece: [] for piece in range(len(pieces))}
    with progress.phase("weighing the head", 2 * len(slices)) as advance:
        for at_rows in slices:
            with torch.no_grad(), stream.head_rows(at_rows) as [head]:
                for number, (i, row, at) in enumerate(pieces):
                    shares[number].append(_share(head(hidden[i][..., row : row + 1, at, :])))
            advance(1)
        draws = [
            _Draw(torch.stack(shares[number], dim=-1), chances[i][row, at].to(stream.device))
            for number, (i, row, at) in enumerate(pieces)
        ]
        gradients = [torch.zeros_like(state) for state in hidden]
        for place, at_rows in enumerate(slices):
            with stream.head_rows(at_rows) as [head]:
                for draw, (i, row, at) in zip(draws, pieces, strict=True):
                    state = hidden[i][..., row : row + 1, at, :].detach().requires_grad_()
                    with torch.enable_grad():
                        logits = head(state)
                    gradients[i][..., row : row + 1, at, :] += draw.state_gradient(place, at_rows[0], logits, state)
            advance(1)
    return gradients


def _batch_gradient(heads: list[Head], slices: Slices, state: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """`_head_gradients` of one batch, with a head for each slice."""
    gradient = torch.zeros_like(state)
    for _, row, at in head_pieces([(len(chance), chance.shape[1])]):
        part = state[..., row : row + 1, at, :].detach().requires_grad_()
        with torch.enable_grad():
            logits = [head(part) for head in heads]
        draw = _Draw(torch.stack([_share(own.detach()) for own in logits], dim=-1), chance[row, at].to(state.device))
        for place, (start, _) in enumerate(slices):
            gradient[..., row : row + 1, at, :] += draw.state_gradient(place, start, logits[place], part)
    return gradient


def _share(logits: torch.Tensor) -> torch.Tensor:
    """The logarithm of a slice's part of the softmax's denominator, float64; logits [1, positions, rows]."""
    return logits[0].logsumexp(dim=-1).double()


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

    def state_gradient(self, place: int, start: int, logits: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The same by the state [..., 1, positions, hidden] that the logits [1, positions, rows] were made of."""
        own = self.loss_gradient(place, start, logits.detach()[0])
        return torch.autograd.grad(logits, state, own[None])[0]

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
