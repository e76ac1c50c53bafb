"""Codes as plain tensors and a word or two, for a file of quantkit's own, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit.codes.ggml_linear import GgmlGrid, GgmlLinear
from quantkit.codes.linear import QuantizedLinear

_OF_LINEAR = ("codes", "scales", "zeros", "group")
_OF_GRID = ("d", "dmin", "sc", "m")


def take_apart(linear: QuantizedLinear | GgmlLinear) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by field name, the other fields, which are JSON)."""
    if isinstance(linear, QuantizedLinear):
        return {name: getattr(linear, name) for name in _OF_LINEAR}, {"bits": linear.bits}
    of_grid = {name: getattr(linear.grid, name) for name in _OF_GRID}
    tensors = {"codes": linear.codes, **{name: part for name, part in of_grid.items() if part is not None}}
    return tensors, {"type": linear.grid.type}


def put_together(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], device: torch.device | None = None
) -> QuantizedLinear | GgmlLinear:
    """What `take_apart` took apart, on a device; None: where the tensors are."""
    placed = {name: part.to(device) if device is not None else part for name, part in tensors.items()}
    if "bits" in fields:
        return QuantizedLinear(bits=fields["bits"], **placed)
    codes = placed.pop("codes")
    return GgmlLinear(codes, GgmlGrid(type=fields["type"], **placed))
