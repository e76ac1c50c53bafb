"""How far apart two computations of one number may lie that only add up in another order, which the processor decides.

A library picks its loops by the processor: how wide they are, how many partial sums they keep, whether a product and a
sum are one instruction. A tolerance that held on one machine says nothing about the next, so it is computed.
"""

from __future__ import annotations

import math

import torch
from conftest import SIZES

_SURE = 6.0  # a sum's error is above the bound with a probability of 2 exp(-_SURE**2 / 2), which is 3e-8


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Most that two sums of the same terms may differ by, as a part of the sum of the terms' absolute values.

    A rounding changes a number by u = eps / 2 of itself at most. In any order, blocked or fused, n of them leave a sum
    off by no more than ``n u`` of that absolute sum (Higham, Accuracy and Stability of Numerical Algorithms, section
    4.2), for which all of them would have to go the same way. Where they are independent and as often up as down, it is
    no more than ``_SURE sqrt(n) u`` (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019,
    theorem 2.4). The smaller of the two is taken: the first, which is certain, for few terms; the second, because it
    still sees an error of a thousandth in sums of 100,000 terms, where the first would let a hundredth pass. Two sums
    may be off in opposite directions, hence twice that.

    Args:
        terms: of the sum. A term that is itself rounded while it is made adds its own roundings to this number.
        dtype: what is added up in.
    """
    return 2 * min(terms, _SURE * math.sqrt(terms)) * torch.finfo(dtype).eps / 2


def summed(terms: int, dtype: torch.dtype = torch.float32, scale: float = 0.0) -> dict[str, float]:
    """`rtol` and `atol` by `rounding`, for ``torch.testing.assert_close``, ``torch.allclose`` and NumPy's.

    Args:
        terms, dtype: as `rounding` takes them.
        scale: the sum of the terms' absolute values, where they cancel: what is left may be smaller than its error. 0
            for terms of one sign. Where it varies much, divide both sides by it and give 1.
    """
    bound = rounding(terms, dtype)
    return {"rtol": bound, "atol": bound * scale}


def longest_path(tokens: int) -> int:
    """Roundings, one after another, from the tokens of a window of so many to the logits of a tiny model.

    In a block: its two norms, the products into and out of attention and into and out of the MLP; scores, softmax and
    the mean of the values. Then the last norm and the head.
    """
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    block = 2 * hidden + 2 * hidden + SIZES["head_dim"] + 2 * tokens + hidden + inner
    return int(SIZES["num_hidden_layers"] * block + 2 * hidden)


def forward(logits: torch.Tensor) -> dict[str, float]:
    """`rtol` and `atol` of a tiny model's logits [windows, tokens, vocabulary] in float32, beside the largest of them.

    Norms hold the hidden states at one size, so what is wrong in one operation goes through the others about as large
    as it is, and roundings add up along the `longest_path`.
    """
    return summed(longest_path(logits.shape[-2]), scale=float(logits.abs().max()))


def assert_mean_product(H: torch.Tensor, x: torch.Tensor) -> None:
    """H float32 [in, in] is the mean of x x^T over activations x [tokens, in], to the rounding of each entry's sum."""
    x = x.double()
    size = x.T.abs() @ x.abs() / len(x)
    torch.testing.assert_close(H.double() / size, x.T @ x / len(x) / size, **summed(len(x) + 2, scale=1))
