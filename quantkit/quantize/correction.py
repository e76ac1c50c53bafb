"""A corrected target: weights that give, on what the quantized blocks hand on, what the model gave on its own inputs.

With x what a stage reads in the unquantized model and x_q what it reads behind quantized blocks, the weight of least
``sum w |W x - W* x_q|^2`` is

    W* = W + W C (H + lambda I)^-1,    C = sum w (x - x_q) x_q^T / sum w,    H = sum w x_q x_q^T / sum w

(QEP, arXiv 2504.09629, section 4; GPTAQ, 2504.02692, section 3; Qronos, 2505.11695). All of that step fits the
calibration tokens too well, so a part a of it is taken: W* = W + a D. Of two folds of the calibration batches each
tells what part of the other's step is right for its own tokens, by least squares.
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple, Self

from quantkit.blocks.stages import Beside, Reading
from quantkit.blocks.states import HiddenPlace, HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import Workers
from quantkit.late import nn, torch
from quantkit.quantize.hessian import HessianAccumulator, add_product

_FOLDS = 2


class Moments(NamedTuple):
    """H and C [in, in] float32 over some tokens, and how many those are by weight."""

    H: torch.Tensor
    C: torch.Tensor
    weight: float


class CorrectionSums:
    """Sums for H and C over each fold, which are there from its first batch on. As `methods.Sums` describes them."""

    def __init__(self, columns: int, device: torch.device, folds: int = _FOLDS) -> None:
        self._columns, self._device = columns, device
        self._folds: list[tuple[HessianAccumulator, torch.Tensor] | None] = [None] * folds
        self.tokens = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None, difference: torch.Tensor, batch: int) -> None:
        """Add what the stage reads, [..., in]; each token's weight; ``x - x_q``, float32; the batch's number, which
        decides on the fold."""
        hessian, cross = self._fold(batch % len(self._folds))
        hessian.add(x, weight)
        x, difference = x.reshape(-1, x.shape[-1]).float(), difference.reshape(-1, x.shape[-1])
        if weight is not None:
            difference = difference * weight.reshape(-1, 1).to(x.device)
        add_product(cross, difference, x)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> Self:
        """These sums with another's added to them."""
        for number, theirs in enumerate(other._folds):
            if theirs is None or (own := self._folds[number]) is None:
                self._folds[number] = theirs or self._folds[number]
                continue
            own[0].merge(theirs[0])
            own[1].add_(theirs[1])
        self.tokens += other.tokens
        return self

    def packed(self) -> torch.Tensor:
        """float32 [n]."""
        hessians, crosses = zip(*self._all(), strict=True)
        return torch.cat([sums.packed() for sums in hessians] + [cross.reshape(-1) for cross in crosses])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take what `packed` made."""
        for sums, _ in self._all():
            own, packed = packed.tensor_split([sums.packed().numel()])
            sums.unpack(own)
        for _, cross in self._all():
            own, packed = packed.tensor_split([cross.numel()])
            cross.copy_(own.view_as(cross))

    def finish(self, name: str) -> list[Moments]:
        """Of each fold. Raises NumericError, as `HessianAccumulator.finish`."""
        return [Moments(sums.finish(name), cross.div_(sums.weight or 1), sums.weight) for sums, cross in self._all()]

    def _fold(self, number: int) -> tuple[HessianAccumulator, torch.Tensor]:
        found = self._folds[number]
        if found is None:
            zeros = torch.zeros(self._columns, self._columns, device=self._device)
            found = self._folds[number] = HessianAccumulator(self._columns, self._device), zeros
        return found

    def _all(self) -> list[tuple[HessianAccumulator, torch.Tensor]]:
        return [self._fold(number) for number in range(len(self._folds))]


class OriginalPath:
    """The unquantized model, run in step with the one that is quantized.

    Attributes:
        hidden: what enters its next block.
    """

    def __init__(self, stream: ModelStream, hidden: HiddenStates, place: HiddenPlace) -> None:
        """`hidden`: what enters the first block, of both."""
        self._stream = stream
        self.hidden = HiddenStates(stream.device, place, hidden)

    def beside(self, index: int, block: nn.Module, again: bool) -> Beside:
        """Block `index` as it is now, for `run_paused`, or where it is run `again` for each stage."""
        own = deepcopy(block)

        def forward(i: int) -> torch.Tensor:
            return self._stream.call(index, own, i, self.hidden[i] if again else self.hidden.take(i))

        return Beside(own, forward, self.hidden.__setitem__)

    def pass_through(self, index: int, block: nn.Module, workers: Workers) -> None:
        """Go through a block that has its own weights still."""
        for i, output in workers.each(lambda i: self._stream.call(index, block, i, self.hidden[i])):
            self.hidden[i] = output


class BothPaths:
    """Hidden states of both paths, each batch's as one tensor [2, ...]: `runs.landing.Batches` to keep and restore."""

    def __init__(self, *paths: HiddenStates) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths[0])

    def __getitem__(self, i: int, /) -> torch.Tensor:
        return torch.stack([path[i] for path in self._paths])

    def __setitem__(self, i: int, state: torch.Tensor, /) -> None:
        for path, own in zip(self._paths, state.unbind(), strict=True):
            path[i] = own.contiguous()


def difference_of(read: Reading) -> torch.Tensor:
    """``x - x_q`` float32, as `read.x`; 0 for tokens that the unquantized path sends to another expert."""
    other, x = read.beside, read.x.float()
    assert other is not None
    if read.tokens is None or other.tokens is None:
        return other.x.float() - x if other.x.shape == x.shape else torch.zeros_like(x)
    if not len(other.tokens):
        return torch.zeros_like(x)
    at = torch.searchsorted(other.tokens, read.tokens).clamp(max=len(other.tokens) - 1)
    both = other.tokens[at] == read.tokens
    return torch.where(both[:, None], other.x[at].float() - x, 0.0)


class Corrector:
    """Targets for the Linears of a stage.

    Args:
        folds: one, or two where `part` is None.
        damp: lambda, as a fraction of H's mean diagonal.
        part: a; None: as the folds tell, for each Linear.

    Attributes:
        H: float32 [in, in], over all tokens.
    """

    def __init__(self, folds: list[Moments], damp: float, part: float | None) -> None:
        total = sum(fold.weight for fold in folds)
        self._part, self._folds = part, folds
        self._shares = [fold.weight / total if total else 0.0 for fold in folds]
        self.H = folds[0].H if len(folds) == 1 else self._over_all([fold.H for fold in folds])
        self._factor = _factor(self.H, damp)
        self._of_folds = [_factor(fold.H, damp) for fold in folds] if part is None else []

    def target(self, W: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(W*, a): the weight float32 [out, in] to quantize instead of W, and what part of the whole step it takes."""
        W, part = W.float(), self._part
        changes = [W @ fold.C for fold in self._folds]
        if part is None:
            steps = [_step(change, factor) for change, factor in zip(changes, self._of_folds, strict=True)]
            held = zip(steps, reversed(changes), reversed(self._folds), strict=True)
            parts = [_part(step, change, fold.H) for step, change, fold in held]
            part = sum(parts) / len(parts)
        step = _step(changes[0] if len(changes) == 1 else self._over_all(changes), self._factor) if part else None
        return (W, 0.0) if step is None else (W.add(step, alpha=part), part)

    def _over_all(self, found: list[torch.Tensor]) -> torch.Tensor:
        """What was found of each fold, over the tokens of all."""
        whole = found[0] * self._shares[0]
        for share, own in zip(self._shares[1:], found[1:], strict=True):
            whole.add_(own, alpha=share)
        return whole


def _factor(H: torch.Tensor, damp: float) -> torch.Tensor | None:
    """The damped Hessian's Cholesky factor; None where it has none."""
    damped = H.clone()
    damped.diagonal().add_(damp * float(damped.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else L


def _step(change: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor | None:
    """D = W C (H + lambda I)^-1, float32 [out, in], of ``W C`` and the factor; None where there is none."""
    if factor is None:
        return None
    step = torch.cholesky_solve(change.T, factor).T
    return step if bool(torch.isfinite(step).all()) else None


def _part(step: torch.Tensor | None, change: torch.Tensor, H: torch.Tensor) -> float:
    """What part of a step is best for other tokens: ``tr(W C D^T) / tr(D H D^T)``, within 0 and 1."""
    if step is None:
        return 0.0
    gained = float((change * step).sum(dtype=torch.float64))
    spent = float(((step @ H) * step).sum(dtype=torch.float64))
    return min(max(gained / spent, 0.0), 1.0) if spent > 0 else 0.0
