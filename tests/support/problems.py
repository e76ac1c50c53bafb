"""Weights with a Hessian, GPTQ of one, and GPTQ as the paper has it, in float64."""

from __future__ import annotations

import numpy as np
import torch

from quantkit.options import QuantSpec
from quantkit.quantize.methods import Solved, method_of


def problem(rows: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = 0.1 * torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    X = torch.randn(4 * columns, columns, generator=generator) @ mixing
    X *= torch.exp(0.7 * torch.randn(columns, generator=generator))
    X[:, list(dead)] = 0.0
    return W, X.T @ X / X.shape[0]


def quantize(W: torch.Tensor, H: torch.Tensor, spec: QuantSpec) -> Solved:
    """W [out, in] by the method of the spec, as one tile."""
    return method_of(spec.method).solve([W], H, spec)[0]


def naive_gptq(
    W: np.ndarray,
    H: np.ndarray,
    perm: np.ndarray,
    damp: float,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
    levels: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ, algorithm 1, without blocks: float64, one column after the other, the inverse taken as such.

    With `levels` the nearest of a table, which needs no zero.

    Returns codes [out, in] and the weights [out, in] as each column stood when its turn came.
    """
    W = W.astype(np.float64).copy()
    columns = W.shape[1]
    damped = H.astype(np.float64)[np.ix_(perm, perm)]
    damped += damp * np.mean(np.diag(damped)) * np.eye(columns)
    Hinv = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper
    codes = np.zeros(W.shape, dtype=np.int64)
    W = W[:, perm]
    seen = W.copy()
    for k in range(columns):
        i = perm[k]
        seen[:, k] = W[:, k]
        if levels:
            q = np.abs(W[:, k, None] / scale[:, i, None] - np.array(levels)).argmin(axis=1)
            steps = np.array(levels)[q]
        else:
            q = np.clip(np.round(W[:, k] / scale[:, i] + zero[:, i]), 0, 2**bits - 1)
            steps = q - zero[:, i]
        codes[:, i] = q
        error = (W[:, k] - scale[:, i] * steps) / Hinv[k, k]
        W[:, k:] -= np.outer(error, Hinv[k, k:])
    natural = np.empty_like(seen)
    natural[:, perm] = seen
    return codes, natural
