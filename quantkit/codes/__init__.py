"""Codes: the one form that weights have between quantizing and writing, and how containers pack them."""

from quantkit.codes.ggml_linear import GgmlLinear
from quantkit.codes.linear import QuantizedLinear, contiguous_groups, grouped
from quantkit.codes.packing import (
    PACKABLE_BITS,
    pack,
    packing_multiple,
    unpack,
)

Codes = QuantizedLinear | GgmlLinear
"""Of one Linear, on the grid of GPTQ checkpoints or of a GGML type."""

__all__ = [
    "PACKABLE_BITS",
    "Codes",
    "GgmlLinear",
    "QuantizedLinear",
    "contiguous_groups",
    "grouped",
    "pack",
    "packing_multiple",
    "unpack",
]
