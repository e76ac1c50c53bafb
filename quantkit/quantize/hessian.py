"""The Hessian of a Linear's squared output error, and the triangular factor of its inverse that GPTQ needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Self

from quantkit.codes import Codes
from quantkit.errors import NumericError
from quantkit.late import torch
from quantkit.quantize.methods import Fallback
from quantkit.runs.ranks import share_of

_BLOCKS = 4  # of columns: the blocks of a symmetric matrix from each one's diagonal to the right are 5/8 of it
_STRIPS = 8  # a symmetric matrix is sent as so many strips, each from its diagonal on: 9/16 of the bytes
_DIRECT = 128  # columns of a triangular matrix that is inverted at once
_TOKENS = 2048  # of one product: few enough to stay in the cache while all of its blocks are made
_LEAF, _GPU_LEAF = 192, 1024  # columns of a symmetric product that is made as if it were none


class HessianAccumulator:
    """Weighted mean of x x^T over the tokens seen: H [in, in] float32, without the constant factor 2, which cancels
    everywhere.

    The product is symmetric and only its upper triangle is made, by halves: 9/16 of the operations at 1536 columns.
    BLAS's own symmetric product has no name in torch; NumPy's reaches it, in threads that fight with torch's for the
    processor (docs/speed.md). As `methods.Sums` describes them.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0
        self._weight = torch.zeros(1, device=device)  # float32 as the sum: what is sent of it is all of it

    def add(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add activations x [..., in] of any float dtype, and what each counts, float32 [...]; None: all the same."""
        x, given = x.reshape(-1, x.shape[-1]), x.dtype
        self.tokens += x.shape[0]
        if weight is not None:
            weight = weight.reshape(-1).to(x.device)
            x = x.float() * weight.sqrt()[:, None]
        elif not adds_up_in_float32(x.dtype, x.device):
            x = x.float()
        self._weight += x.shape[0] if weight is None else weight.sum()
        if given != x.dtype and adds_up_in_float32(torch.bfloat16, x.device):
            for left, right in _in_halves(x):
                _add_symmetric(self.sum, left, right, _GPU_LEAF)
        elif x.device.type == "cpu":
            for part in torch.split(x, _TOKENS):
                _add_symmetric(self.sum, part, part, _LEAF)
        else:
            _add_symmetric(self.sum, x, x, _GPU_LEAF)

    def merge(self, other: Self) -> Self:
        """These sums with another's added to them."""
        self.sum.add_(other.sum)
        self.tokens += other.tokens
        self._weight += other._weight
        return self

    def packed(self) -> torch.Tensor:
        """The sum of weights, the upper triangle, and a little more, float32 [n]."""
        return torch.cat([self._weight, *(place.reshape(-1) for place in self._strips())])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take what `packed` made; what lies below the triangle stays as it is."""
        self._weight.copy_(packed[:1])
        places = self._strips()
        for place, part in zip(places, torch.split(packed[1:], [place.numel() for place in places]), strict=True):
            place.copy_(part.view(place.shape))

    def finish(self, name: str) -> torch.Tensor:
        """H [in, in] float32.

        Raises:
            NumericError: an activation was not finite; `name` says whose input it was.
        """
        check_squares(self.sum.diagonal(), name)
        weight = self._weight
        on_gpu = weight.device.type != "cpu"  # whose number is not waited for
        upper = torch.triu(self.sum).div_(torch.where(weight == 0, 1.0, weight) if on_gpu else self.weight or 1)
        return upper.add_(torch.triu(upper, diagonal=1).T)

    @property
    def weight(self) -> float:
        """The sum of what all tokens count."""
        return float(self._weight)

    def _strips(self) -> list[torch.Tensor]:
        columns = self.sum.shape[0]
        strips = (share_of(columns, k, _STRIPS) for k in range(_STRIPS))
        return [self.sum[strip.start : strip.stop, strip.start :] for strip in strips if strip]


def _in_halves(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of bfloat16 matrices whose products x^T y add up to that of float32 x [tokens, in] with itself.

    A number is one of bfloat16 and a rest that is another. Left out is the product of the rests: about 2^-18 of the
    whole, and three products of halves take a fifth of the time of one of float32 on a tensor core.
    """
    high = x.bfloat16()
    low = (x - high).bfloat16()
    yield from ((high, high), (high, low), (low, high))


def _add_symmetric(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, leaf: int) -> None:
    """Add the upper triangle of x^T y to `total` [in, in], by halves down to `leaf` columns; x and y [tokens, in]."""
    columns = x.shape[1]
    if columns <= leaf:
        add_product(total, x, y)
        return
    middle = columns // 2
    add_product(total[:middle, middle:], x[:, :middle], y[:, middle:])
    _add_symmetric(total[:middle, :middle], x[:, :middle], y[:, :middle], leaf)
    _add_symmetric(total[middle:, middle:], x[:, middle:], y[:, middle:], leaf)


def add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """``total += x^T y``, of a dtype that `adds_up_in_float32`.

    A product of two bfloat16 or float16 numbers is exact in float32, so half-precision operands lose nothing against
    the same numbers cast to float32 but the order of the sum; they take a sixteenth of the time on a tensor core.

    Args:
        total: float32 [m, n]; rows may be strided.
        x: float32, bfloat16 or float16 [tokens, m].
        y: [tokens, n], as x.
    """
    if x.dtype == torch.float32:
        total.addmm_(x.T, y)
    else:
        torch.addmm(total, x.T, y, out_dtype=torch.float32, out=total)


@cache
def adds_up_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of `dtype` to a float32 sum in place: on CUDA since 2.8 or 2.9, tried once, on
    numbers whose sum a half cannot hold."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32
    total, x = torch.ones(16, 16, device=device), torch.full((16, 16), 1 + 2.0**-7, dtype=dtype, device=device)
    try:
        add_product(total, x, x)
    except (RuntimeError, TypeError):  # no such kernel on this device; no such argument in this torch
        return False
    return bool((total == 1 + 16 * (1 + 2.0**-7) ** 2).all())


def row_losses(W: torch.Tensor, linear: Codes, H: torch.Tensor) -> torch.Tensor:
    """``(w - q) H (w - q)^T`` per row, float64 [out]. H is symmetric: products with its upper block triangle do."""
    error = W - linear.dequantize().to(W.device)
    losses = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
    edges = (round(W.shape[1] * k / _BLOCKS) for k in range(_BLOCKS + 1))
    for start, stop in pairwise(edges):
        left = error[:, start:stop]
        twice = (left @ H[start:stop, start:]).mul_(error[:, start:])
        twice[:, : stop - start] *= 0.5  # the diagonal block counts once, what lies right of it stands for both sides
        losses += twice.sum(dim=1)
    return losses * 2


def check_squares(sums: torch.Tensor, name: str) -> None:
    """Refuse sums of squared activations that are not finite. Raises NumericError for the Linear `name`."""
    if not bool(torch.isfinite(sums).all()):
        raise NumericError(
            f"{name}: an input activation is not finite (NaN or overflow); "
            "try --dtype float32, or look for a broken weight in an earlier layer"
        )


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U [in, in] float32 with ``H_damped[perm][:, perm]^-1 = U^T U``.

    Attributes:
        U: float32 [in, in].
        perm: int64 [in]; GPTQ's k-th column is column perm[k] of the weight.
        damp: fraction of the mean diagonal that was added.
        fallback: "" or "eigenvalues" where damping alone did not make the Hessian positive definite.
    """

    U: torch.Tensor
    perm: torch.Tensor
    damp: float
    fallback: Fallback


def column_order(H: torch.Tensor, act_order: bool) -> torch.Tensor:
    """int64 [in]: columns by falling Hessian diagonal (ties in natural order), or in natural order."""
    if not act_order:
        return torch.arange(H.shape[0], device=H.device)
    return torch.argsort(H.diagonal(), descending=True, stable=True)


def factorize(H: torch.Tensor, perm: torch.Tensor, damp: float) -> InverseFactor | None:
    """The factor of the damped inverse Hessian in the order `perm`.

    Damping doubles from `damp` up to 1 until the Cholesky factor exists; then eigenvalues below `damp` times the mean
    diagonal are lifted to it; where even that fails the result is None and the layer can only be rounded.

    Instead of inverting H and factorizing the inverse (GPTQ, algorithm 1), the order of the columns is reversed:
    with ``J H J = L L^T``, ``U = J L^-1 J``. One factorization and one triangular solve, and better conditioned.
    """
    H = H.index_select(0, perm).index_select(1, perm)
    mean: float | torch.Tensor = H.diagonal().mean()
    if H.device.type == "cpu":
        mean = float(mean)
        if not mean > 0:
            return None
    H /= mean  # in place, here and below: of a wide layer, a few of these matrices are most of the memory
    trial = damp
    while trial <= 1.0:
        U = _reversed_factor(H, trial)
        if U is not None:
            return InverseFactor(U.div_(mean**0.5), perm, trial, "")
        if not mean > 0:  # of a GPU, which is waited for where something is wrong
            return None
        trial *= 2
    try:
        values, vectors = torch.linalg.eigh(H.double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    repaired = (vectors * values.clamp(min=damp)) @ vectors.T
    U = _reversed_factor(repaired.to(H.dtype), 0.0)
    return None if U is None else InverseFactor(U.div_(mean**0.5), perm, damp, "eigenvalues")


def _reversed_factor(H: torch.Tensor, damp: float) -> torch.Tensor | None:
    reversed_ = H.flip(0, 1)
    reversed_.diagonal().add_(damp)
    L, failed = torch.linalg.cholesky_ex(reversed_)
    del reversed_
    if L.device.type == "cpu" and int(failed):
        return None
    L = _inverse(L)
    U = L.flip(0, 1)
    ends = torch.stack(torch.aminmax(U))  # NaN comes through
    return U if bool((torch.isfinite(ends) & (failed == 0)).all()) else None  # a GPU is waited for once


def _inverse(L: torch.Tensor) -> torch.Tensor:
    """Inverse of a lower triangular matrix [n, n], by halves: a third of the operations of solving for all of the
    identity, and nearly all of them in matrix products."""
    n = L.shape[0]
    if n <= _DIRECT:
        identity = torch.eye(n, dtype=L.dtype, device=L.device)
        solved: torch.Tensor = torch.linalg.solve_triangular(L, identity, upper=False)
        return solved
    half = n // 2
    inverse = torch.zeros(n, n, dtype=L.dtype, device=L.device)
    inverse[:half, :half] = _inverse(L[:half, :half])
    inverse[half:, half:] = _inverse(L[half:, half:])
    torch.mm(-inverse[half:, half:], L[half:, :half] @ inverse[:half, :half], out=inverse[half:, :half])
    return inverse
