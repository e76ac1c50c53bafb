"""GPTQ's loop over the columns of a block in torch's own operations, on any device."""

from __future__ import annotations

import torch


def quantize_columns(
    W: torch.Tensor, U: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, top: int, codes: torch.Tensor
) -> torch.Tensor:
    """`loops.quantize_columns`, by other means.

    A column gathers the errors of the block's earlier columns when it is reached (one matrix-vector product) rather
    than every column being updated after each one.
    """
    Ut, diagonal = U.T.contiguous(), U.diagonal().tolist()
    scale = scale.contiguous()
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    shifted = W + minimum
    errors, found = torch.empty_like(scale), torch.empty_like(scale)
    for j in range(W.shape[0]):
        w = shifted[j]
        if j:
            w = torch.addmv(w, errors[:j].T, Ut[j, :j], alpha=-1)
        q = torch.mul(w, inverse[j], out=found[j]).round_().clamp_(0, top)
        torch.addcmul(w, q, scale[j], value=-1, out=errors[j]).div_(diagonal[j])
    codes.copy_(found)
    return errors
