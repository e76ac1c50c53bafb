"""Tuning what lies around the codes, on the divergence of the model's output: gains of norms and scales; codes stay.

The gradient of ``KL(unquantized || quantized)`` over all positions goes through the quantized model block by block
(`blocks.backward`); a scale's is that of its weights times their codes. EfficientQAT (arXiv 2407.11062) and PV-Tuning
(2405.14852) train scales behind fixed codes end to end, Norm Tweaking (2309.02784) gains. The unquantized model's last
hidden states are kept, and its logits made again from them.

Every forward is that of values as the output will hold them: scales rounded to float16, gains to the dtype they are
published in. Gradients pass that rounding as if it were none. Steps are Adam's (arXiv 1412.6980). Some calibration
windows are held out; of all states that were judged on these the best is kept, be it the first.

A batch is one window, and what windows give is added in their order, whoever made it: neither processes nor workers
change a sum. All ranks step alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from quantkit.blocks.backward import head_pieces, head_slices, run_block, run_forward
from quantkit.blocks.families import as_rows, weight_of
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.states import HiddenStates, half
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers, even_shares, worker_count
from quantkit.codes import Codes
from quantkit.codes.units import unit_gradients, units, with_units
from quantkit.late import nn, torch
from quantkit.options.grid import REFINE_STEPS
from quantkit.progress import SILENT, Progress
from quantkit.runs.ranks import ALONE, Ranks

CodesOf = Callable[[int], Sequence[tuple[str, Codes]]]
"""Published names and codes of the Linears of a block."""
Tensors = dict[str, "torch.Tensor"]

T = TypeVar("T")

_STEP_TOKENS = 1024
_BETAS = 0.9, 0.95
_EPSILON = 1e-12  # of a gradient summed over tokens; smaller ones are noise, and move nothing


@dataclass(frozen=True)
class Settings:
    """How far and how fast.

    Attributes:
        steps: how many.
        every: steps between two judgements on held-out windows.
        gains: first step of a gain, as a part of the root mean square of its norm's gains, where the divergence is 1.
        scales: that of a scale, as a part of itself.
    """

    steps: int = REFINE_STEPS
    every: int = 4
    gains: float = 1e-2
    scales: float = 2e-3


def step_windows(windows: Sequence[T], step: int, seq_len: int) -> list[T]:
    """Those of the windows that step number `step`, from 0, looks at: in order, over and over."""
    count = max(1, _STEP_TOKENS // seq_len)
    return [windows[(step * count + i) % len(windows)] for i in range(min(count, len(windows)))]


def step_share(windows: int, seq_len: int, ranks: Ranks = ALONE) -> int:
    """How many windows of a step a rank has that has so many of all."""
    return min(windows, -(-max(1, _STEP_TOKENS // seq_len) // ranks.size))


@dataclass(frozen=True)
class Tuned:
    """A tensor that is tuned.

    Attributes:
        start: as it was, in the dtype it is written in.
        unit: float32, what a step of 1 is.
        rate: of its steps.
    """

    start: torch.Tensor
    unit: torch.Tensor
    rate: float

    def at(self, offset: torch.Tensor) -> torch.Tensor:
        """Its value at float32 steps from the start, in the dtype it is written in."""
        return (self.start.float() + self.unit * offset).to(self.start.dtype)


class Student:
    """The quantized model with what is tuned of it.

    Args:
        stream: the unquantized model.
        codes: of each block.
        settings: rates.
        gain_dtype: what a gain is written in, by its published name.

    Attributes:
        tuned: by published name of a gain, or name of a Linear and what of its grid, such as "x.scales".
        offsets: float32, of each.
    """

    def __init__(
        self, stream: ModelStream, codes: CodesOf, settings: Settings, gain_dtype: Callable[[str], torch.dtype]
    ) -> None:
        self._stream, self._codes = stream, codes
        self.tuned: dict[str, Tuned] = {}
        for index in range(len(stream.blocks)):
            for name, linear in codes(index) if settings.scales else ():
                for unit, start in units(linear).items():
                    self.tuned[f"{name}.{unit}"] = Tuned(start.cpu(), start.cpu().float(), settings.scales)
        places = [name for index in range(len(stream.blocks)) for name in self._gains_in(index).values()]
        places += [name for name, parameter in stream.outside() if _is_gain(name, parameter)]
        for name in places if settings.gains else ():
            gains = stream.weights.read(name).to(gain_dtype(name))
            self.tuned[name] = Tuned(gains, gains.float().square().mean().sqrt(), settings.gains)
        self.offsets = {name: torch.zeros(one.start.shape) for name, one in self.tuned.items()}

    def value(self, name: str) -> torch.Tensor:
        """A tuned tensor as it would be written now."""
        return self.tuned[name].at(self.offsets[name])

    def linear(self, name: str, linear: Codes) -> Codes:
        """A Linear's codes on the grid as it is now."""
        changed = {u: self.value(f"{name}.{u}") for u in units(linear) if f"{name}.{u}" in self.tuned}
        return with_units(linear, {unit: value.to(linear.codes.device) for unit, value in changed.items()})

    def gains(self) -> Tensors:
        """The gains as they would be written now, by published name."""
        return {name: self.value(name) for name in self.tuned if name in self._stream.weights.tensors}

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with the weights of the quantized model."""
        places = self._linears_in(index)
        with self._stream.block(index) as block:
            with torch.no_grad():
                for name, linear in self._codes(index):
                    weight = weight_of(block.get_submodule(places[name]))
                    weight.copy_(self.linear(name, linear).dequantize(weight.dtype))
                for place, name in self._gains_in(index).items():
                    if name in self.tuned:
                        block.get_parameter(place).copy_(self.value(name))
            try:
                yield block
            finally:
                block.requires_grad_(False)

    def leaves(self, index: int, block: nn.Module) -> list[torch.Tensor]:
        """The parameters of a loaded block that `take` wants gradients of; from now on they have some."""
        places = self._linears_in(index)
        found = [places[name] + ".weight" for name, _ in self._codes(index)]
        found += [place for place, name in self._gains_in(index).items() if name in self.tuned]
        return [block.get_parameter(name).requires_grad_() for name in found]

    def gradients(self, index: int, block: nn.Module, leaves: Sequence[torch.Tensor | None]) -> Tensors:
        """Gradients by the offsets of a block, from those by its `leaves`; without those that are None."""
        places, linears = self._linears_in(index), self._codes(index)
        found: Tensors = {}
        for (name, linear), gradient in zip(linears, leaves, strict=False):
            if gradient is not None:
                rows = as_rows(block.get_submodule(places[name]), gradient)
                found |= {f"{name}.{unit}": own for unit, own in unit_gradients(linear, rows).items()}
        gains = [name for name in self._gains_in(index).values() if name in self.tuned]
        own_gains = zip(gains, leaves[len(linears) :], strict=True)
        return self.by_offsets(found | {name: gradient for name, gradient in own_gains if gradient is not None})

    def by_offsets(self, gradients: Tensors) -> Tensors:
        """Gradients by the offsets of what is tuned, float32 on the CPU, from those by its values."""
        tuned = {name: gradient for name, gradient in gradients.items() if name in self.tuned}
        return {name: self.tuned[name].unit * gradient.detach().cpu().float() for name, gradient in tuned.items()}

    def _linears_in(self, index: int) -> dict[str, str]:
        """Place in the block, by published name."""
        block = self._stream.modules[index]
        return {self._stream.published(index, name): name for name in self._stream.family.linears(block)}

    def _gains_in(self, index: int) -> dict[str, str]:
        """Published name, by place in the block."""
        names, prefix = self._stream.weights.names, self._stream.blocks[index]
        inside = self._stream.modules[index].named_parameters()
        return {place: names[f"{prefix}.{place}"] for place, parameter in inside if _is_gain(place, parameter)}


def _is_gain(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 and name.endswith("weight")


class Refining:
    """Steps and judgements.

    Args:
        stream: the unquantized model.
        tokens: int64 [windows, seq_len].
        student: the quantized one.
        memory: where states wait.
        exact: keep states in the stream's dtype, not in half precision.
        mine: windows that this rank runs, each of which one rank has; None: all.
    """

    def __init__(
        self,
        stream: ModelStream,
        tokens: torch.Tensor,
        student: Student,
        memory: MemoryPlan,
        progress: Progress = SILENT,
        exact: bool = False,
        mine: Sequence[int] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._stream, self._student, self._memory, self._exact, self._ranks = stream, student, memory, exact, ranks
        mine = range(len(tokens)) if mine is None else mine
        self._batches = {window: batch for batch, window in enumerate(mine)}
        abreast = worker_count(stream.device, step_share(len(mine), tokens.shape[1], ranks))
        self._workers = abreast if memory.side_by_side else 1
        hidden = stream.embed([tokens[window : window + 1] for window in mine], place=memory.hidden)
        self._entering = HiddenStates(stream.device, memory.hidden, (hidden[i] for i in range(len(hidden))))
        with (
            progress.phase("refining: the unquantized model", len(stream.blocks)) as advance,
            stream.reading_ahead(memory.prefetch),
            self._at_work(len(mine)) as workers,
        ):
            run_forward(stream, hidden, range(len(mine)), workers, advance=advance)
        kept = (hidden[i] if exact else half(hidden[i]) for i in range(len(hidden)))
        self._taught = HiddenStates(stream.device, memory.hidden, kept)
        hidden.close()
        self._totals: dict[int, torch.Tensor] = {}

    def _own(self, windows: Sequence[int]) -> list[int]:
        """Numbers of this rank's batches among some windows."""
        return [self._batches[window] for window in windows if window in self._batches]

    def _at_work(self, batches: int) -> Workers:
        return Workers(even_shares(batches, self._workers))

    def divergence(self, windows: Sequence[int]) -> float:
        """Mean divergence of the quantized model's output over all positions of some windows, nats.

        All ranks call it alike, and get the same.
        """
        found = self._everyone(windows, self._divergences(self._own(windows)))
        return sum(one for one, _ in found) / sum(positions for _, positions in found)

    def _divergences(self, batches: Sequence[int]) -> list[tuple[float, int]]:
        """Of each batch the divergence summed over its positions, and how many these are."""
        if not batches:
            return []
        hidden = HiddenStates(self._stream.device, self._memory.hidden, (self._entering[i] for i in batches))
        with torch.no_grad(), self._at_work(len(batches)) as workers:
            run_forward(self._stream, hidden, batches, workers, self._student.block)
            return _Head(self._stream, self._student, self._taught, batches, hidden, self._totals).divergences()

    def gradients(self, windows: Sequence[int]) -> Tensors:
        """The gradient of the divergence, summed over all positions of some windows, by the student's offsets.

        All ranks call it alike, and get the same.
        """
        total: Tensors = {}
        for found in self._way_back(self._own(windows)):
            total |= _summed(self._everyone(windows, found))
        return total

    def _everyone(self, windows: Sequence[int], own: Sequence[T]) -> list[T]:
        """Of each window what the rank that runs it found; `own`: what this one did, in order."""
        mine = [window for window in windows if window in self._batches]
        parts = self._ranks.gather(dict(zip(mine, own, strict=True)))
        found = {window: one for part in parts for window, one in part.items()}
        return [found[window] for window in windows]

    def _way_back(self, batches: Sequence[int]) -> Iterator[list[Tensors]]:
        """Of each batch the gradients by what lies outside the blocks, then by each block's, from the last."""
        stream, student = self._stream, self._student
        if not batches:
            yield from ([] for _ in range(1 + len(stream.blocks)))
            return
        hidden = HiddenStates(stream.device, "device", (self._entering[i] for i in batches))
        kept: list[torch.Tensor] = []
        with self._at_work(len(batches)) as workers:
            run_forward(stream, hidden, batches, workers, student.block, lambda states: kept.extend(states))
            gradients, outside = _Head(stream, student, self._taught, batches, hidden, self._totals).gradients()
            yield [student.by_offsets(one) for one in outside]
            for index in reversed(range(len(stream.blocks))):
                states = kept[-len(batches) :]
                del kept[-len(batches) :]
                with student.block(index) as block:
                    leaves = student.leaves(index, block)

                    def backward(
                        i: int,
                        index: int = index,
                        block: nn.Module = block,
                        states: list[torch.Tensor] = states,
                        leaves: list[torch.Tensor] = leaves,
                    ) -> tuple[torch.Tensor, Tensors]:
                        run = run_block(stream, index, block, batches[i], states[i])
                        gradient, own = run.gradients(gradients[i], leaves)
                        return gradient, student.gradients(index, block, own)

                    found: list[Tensors] = [{} for _ in batches]
                    for i, (gradient, own) in workers.each(backward):
                        gradients[i], found[i] = gradient, own
                yield found


def _summed(parts: Sequence[Tensors]) -> Tensors:
    """Of each name the sum over those that have it, in order."""
    total: Tensors = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


class _Head:
    """What follows the blocks, of both models, on some batches: the divergence, and its gradient.

    Args:
        taught: states that leave the unquantized model's last block, by batch.
        hidden: those of the quantized one, by position in `batches`.
        totals: logarithms of the unquantized model's softmax denominators, by batch; those that lack are added.
    """

    def __init__(
        self,
        stream: ModelStream,
        student: Student,
        taught: HiddenStates,
        batches: Sequence[int],
        hidden: HiddenStates,
        totals: dict[int, torch.Tensor],
    ) -> None:
        self._stream, self._student, self._taught = stream, student, taught
        self._batches, self._hidden, self._totals = batches, hidden, totals
        self._pieces = head_pieces((1, hidden[i].shape[-2]) for i in range(len(hidden)))

    def divergences(self) -> list[tuple[float, int]]:
        """Of each batch the sum over its positions, nats, and how many these are."""
        self._find_totals()
        shares: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(self._pieces))}
        sums = torch.zeros(len(self._hidden), dtype=torch.float64, device=self._stream.device)
        counts = [0] * len(self._hidden)
        for start, stop in head_slices(self._stream):
            with torch.no_grad(), self._heads(start, stop) as (teach, learn):
                for n, (i, _, at) in enumerate(self._pieces):
                    wanted, found = teach(self._taught_at(i, at))[0], learn(self._hidden[i][..., at, :])[0]
                    shares[n].append(found.logsumexp(dim=-1).double())
                    p = (wanted - self._total(i, at).to(wanted.dtype)).exp_()
                    sums[i] += (p * (wanted - found)).sum(dtype=torch.float64)
        for n, (i, _, at) in enumerate(self._pieces):
            own = torch.stack(shares[n], dim=-1).logsumexp(dim=-1)
            sums[i] += (own - self._total(i, at)[:, 0]).sum()
            counts[i] += len(own)
        return list(zip(sums.tolist(), counts, strict=True))

    def gradients(self) -> tuple[list[torch.Tensor], list[Tensors]]:
        """Of each batch that of the divergence, summed over positions: by its state in `hidden`, and by gains outside
        the blocks."""
        self._find_totals()
        shares: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(self._pieces))}
        for start, stop in head_slices(self._stream):
            with torch.no_grad(), self._heads(start, stop) as (_, learn):
                for n, (i, _, at) in enumerate(self._pieces):
                    shares[n].append(learn(self._hidden[i][..., at, :])[0].logsumexp(dim=-1).double())
        totals = [torch.stack(shares[n], dim=-1).logsumexp(dim=-1)[:, None] for n in range(len(self._pieces))]
        gradients = [torch.zeros_like(self._hidden[i]) for i in range(len(self._hidden))]
        outside: list[Tensors] = [{} for _ in gradients]
        for start, stop in head_slices(self._stream):
            with self._heads(start, stop) as (teach, learn):
                gains = {n: p.requires_grad_() for n, p in self._stream.outside() if n in self._student.tuned}
                for n, (i, _, at) in enumerate(self._pieces):
                    with torch.no_grad():
                        wanted = teach(self._taught_at(i, at))[0]
                        own = (wanted - self._total(i, at).to(wanted.dtype)).exp_().neg_()
                    with torch.enable_grad():
                        state = self._hidden[i][..., at, :].detach().requires_grad_()
                        found = learn(state)
                    own += (found.detach()[0] - totals[n].to(found.dtype)).exp_()
                    by_state, *by_gains = torch.autograd.grad(found, (state, *gains.values()), own[None])
                    gradients[i][..., at, :] += by_state
                    outside[i] = _summed([outside[i], dict(zip(gains, by_gains, strict=True))])
        return gradients, outside

    def _taught_at(self, i: int, at: slice) -> torch.Tensor:
        return self._taught[self._batches[i]][..., at, :].to(self._stream.dtype)

    def _total(self, i: int, at: slice) -> torch.Tensor:
        """Float64 [positions, 1], of the unquantized model."""
        return self._totals[self._batches[i]][at, None]

    def _find_totals(self) -> None:
        lacking = [(i, at) for i, _, at in self._pieces if self._batches[i] not in self._totals]
        shares: list[list[torch.Tensor]] = [[] for _ in lacking]
        for start, stop in head_slices(self._stream) if lacking else ():
            with torch.no_grad(), self._heads(start, stop) as (teach, _):
                for n, (i, at) in enumerate(lacking):
                    shares[n].append(teach(self._taught_at(i, at))[0].logsumexp(dim=-1).double())
        found: dict[int, list[torch.Tensor]] = {}
        for (i, _), own in zip(lacking, shares, strict=True):
            found.setdefault(self._batches[i], []).append(torch.stack(own, dim=-1).logsumexp(dim=-1))
        self._totals |= {batch: torch.cat(parts) for batch, parts in found.items()}

    @contextmanager
    def _heads(
        self, start: int, stop: int
    ) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]]:
        """Logits of some rows of the vocabulary: of the unquantized model and of the quantized one."""
        with self._stream.head_rows((start, stop)) as [head]:
            own = {name: p for name, p in self._stream.outside() if name in self._student.tuned}
            before = {name: p.data for name, p in own.items()}
            after = {name: self._student.value(name).to(p.device, p.dtype) for name, p in own.items()}

            def run(values: Mapping[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
                for name, parameter in own.items():
                    parameter.data = values[name]
                return head(state)

            yield partial(run, before), partial(run, after)


@dataclass
class Adam:
    """Steps so far, and both moments of each tensor's gradient."""

    steps: int = 0
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)

    def step(self, student: Student, gradients: Tensors, part: float) -> None:
        """Move the student's offsets by `part` of their rates."""
        self.steps += 1
        (one, two), t = _BETAS, self.steps
        for name, gradient in gradients.items():
            first = self.first.setdefault(name, torch.zeros_like(gradient))
            second = self.second.setdefault(name, torch.zeros_like(gradient))
            first.lerp_(gradient, 1 - one)
            second.lerp_(gradient.square(), 1 - two)
            size = (second / (1 - two**t)).sqrt_().add_(_EPSILON)
            student.offsets[name] -= part * student.tuned[name].rate * (first / (1 - one**t)) / size


class Course:
    """Where refining is: what the student has, the best of it so far, Adam's moments, and how it was judged.

    Steps are the smaller the nearer the quantized model is to the other, as the square root of the divergence at the
    start, and fall linearly to 0. Where a judgement is no better than the best one, refining goes on from that, in
    steps of half the size.

    Attributes:
        judged: (step, divergence on held-out windows), in order; the first one is of step 0.
        best: offsets.
    """

    def __init__(self, student: Student, settings: Settings) -> None:
        self._student, self._settings, self._adam = student, settings, Adam()
        self.judged: list[tuple[int, float]] = []
        self.best = _copied(student.offsets)

    @property
    def steps(self) -> int:
        """How many were taken."""
        return self._adam.steps

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.steps >= self._settings.steps

    @property
    def due(self) -> bool:
        """Whether the student is to be judged now."""
        return self.steps % self._settings.every == 0 or self.done

    def judge(self, divergence: float) -> None:
        """Take the divergence on held-out windows of what the student has."""
        if self.judged and not divergence < min(one for _, one in self.judged):  # nor where it is not a number
            self._student.offsets = _copied(self.best)
            self._adam.first.clear()
        else:
            self.best = _copied(self._student.offsets)
        self.judged.append((self.steps, divergence))

    def step(self, gradients: Tensors) -> None:
        """Move the student against gradients by its offsets."""
        found = [one for _, one in self.judged]
        missed = sum(not one < min(found[:number]) for number, one in enumerate(found) if number)
        size = math.sqrt(min(1.0, found[0])) / 2**missed
        self._adam.step(self._student, gradients, size * (1 - self.steps / self._settings.steps))

    def packed(self) -> Tensors:
        """All but the judgements."""
        adam = self._adam
        parts = {"offset": self._student.offsets, "best": self.best, "first": adam.first, "second": adam.second}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def unpack(self, judged: Sequence[tuple[int, float]], tensors: Tensors) -> None:
        """Be where another was when it was `packed`."""
        parts: dict[str, Tensors] = {"offset": {}, "best": {}, "first": {}, "second": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.judged, self.best, self._student.offsets = list(judged), parts["best"], parts["offset"]
        self._adam = Adam(judged[-1][0], parts["first"], parts["second"])


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}
