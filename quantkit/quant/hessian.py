"""The Hessian of a Linear's squared output error, and the triangular factor of its inverse that GPTQ needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from quantkit.errors import NumericError

_TILES = 4


class HessianAccumulator:
    """Mean of x x^T over the tokens seen: H [in, in] float32, without the constant factor 2, which cancels everywhere.

    The product is symmetric, so only its upper block triangle is computed (5/8 of the operations).
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0
        edges = [round(columns * k / _TILES) for k in range(_TILES + 1)]
        self._tiles = [(a, b) for a, b in pairwise(edges) if a < b]

    def add(self, x: torch.Tensor) -> None:
        """Add activations x [..., in] of any float dtype."""
        x = x.reshape(-1, x.shape[-1]).float()
        for start, stop in self._tiles:
            self.sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.tokens += x.shape[0]

    def mean(self, name: str) -> torch.Tensor:
        """H [in, in] float32.

        Raises:
            NumericError: an activation was not finite; `name` says whose input it was.
        """
        check_squares(self.sum.diagonal(), name)
        upper = torch.triu(self.sum)
        return (upper + torch.triu(self.sum, diagonal=1).T) / max(self.tokens, 1)


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
    fallback: str


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
    H = H[perm][:, perm]
    mean = float(H.diagonal().mean())
    if not mean > 0:
        return None
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    trial = damp
    while trial <= 1.0:
        U = _reversed_factor(H / mean + trial * identity)
        if U is not None:
            return InverseFactor(U / mean**0.5, perm, trial, "")
        trial *= 2
    try:
        values, vectors = torch.linalg.eigh((H / mean).double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    repaired = (vectors * values.clamp(min=damp)) @ vectors.T
    U = _reversed_factor(repaired.to(H.dtype))
    return None if U is None else InverseFactor(U / mean**0.5, perm, damp, "eigenvalues")


def _reversed_factor(H: torch.Tensor) -> torch.Tensor | None:
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed):
        return None
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
    return U.contiguous() if bool(torch.isfinite(U).all()) else None
