"""Gradients drawn at a model's logits, whose covariance is the Fisher information of its output there.

With p the softmax of a position's logits that is ``F = diag(p) - p p^T``. The gradient ``p - e_label`` of a label drawn
from p has it, but where the model is nearly sure it is next to nothing most times and now and then large. With signs r,
each of them + or - by an even chance, ``g = sqrt(p) r - p (sqrt(p) . r)`` has it too,

    E g g^T = S E[r r^T] S^T = S S^T = F,    S = diag(sqrt p) - p sqrt(p)^T,

and its squares are spread far less: of all r with independent entries signs give ``(v . g)^2`` the least variance
(Hutchinson, Communications in Statistics 18, 1989). No number is looked up in a sum of probabilities, so rounding moves
g by as much as it moved p.

A sum over the vocabulary is one over slices of it: first each is measured, then each one's part of g can be made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantkit.late import torch

_WORD, _BYTE = 64, 8
# Of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as numbers with a sign: the stride, and how a state is mixed.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_MIXED = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def sign_seeds(shape: Sequence[int], seed: int) -> torch.Tensor:
    """What decides on the signs at each token: int64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64([seed, 1])).integers(2**63, size=tuple(shape)))


def signs(seeds: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """r float32 [positions, count], -1 or 1, of the rows of the vocabulary from `start` on; seeds int64 [positions].

    Bits of a number for each 64 rows, so that no slices and no device change them.
    """
    first, last = start // _WORD, -(-(start + count) // _WORD)
    words = seeds[:, None] + _STRIDE * torch.arange(first + 1, last + 1, device=seeds.device)
    for shift, factor in _MIXED:
        words = (words ^ (words >> shift & 2 ** (_WORD - shift) - 1)) * factor
    bits = words.view(torch.uint8)[..., None] >> torch.arange(_BYTE, dtype=torch.uint8, device=seeds.device) & 1
    found: torch.Tensor = bits.reshape(len(seeds), -1)[:, start - _WORD * first :][:, :count].float()
    return found.mul_(2).sub_(1)


def slice_sums(logits: torch.Tensor, start: int, seeds: torch.Tensor) -> torch.Tensor:
    """What `Probe` takes of each slice of the vocabulary: float64 [2, positions].

    Args:
        logits: float [positions, rows].
        start: the slice's first row.
        seeds: int64 [positions].
    """
    share = logits.logsumexp(dim=-1, keepdim=True)
    product = (logits - share).div_(2).exp_().mul_(signs(seeds, start, logits.shape[-1]))
    return torch.stack([share[:, 0].double(), product.sum(dim=-1, dtype=torch.float64)])


class Probe:
    """g of some positions.

    Args:
        sums: `slice_sums` of all slices.
        seeds: int64 [positions].
    """

    def __init__(self, sums: Sequence[torch.Tensor], seeds: torch.Tensor) -> None:
        shares, products = torch.stack(list(sums), dim=-1)
        self._total = shares.logsumexp(dim=-1, keepdim=True)
        self._product = ((shares - self._total).div(2).exp() * products).sum(dim=-1, keepdim=True)
        self._seeds = seeds

    def gradient(self, logits: torch.Tensor, start: int) -> torch.Tensor:
        """By the logits [positions, rows] of the slice that begins at row `start`; in their dtype."""
        roots = (logits - self._total.to(logits.dtype)).div_(2).exp_()
        drawn = signs(self._seeds, start, logits.shape[-1]).to(logits.dtype).mul_(roots)
        return drawn.addcmul_(roots.square_(), self._product.to(logits.dtype), value=-1)

    def state_gradient(self, logits: torch.Tensor, start: int, state: torch.Tensor) -> torch.Tensor:
        """By the state [..., 1, positions, hidden] that the logits [1, positions, rows] were made of."""
        return torch.autograd.grad(logits, state, self.gradient(logits.detach()[0], start)[None])[0]
