"""Codes: the one form that weights have between quantizing and writing, and how containers pack them."""

from quantkit.codes.linear import QuantizedLinear, contiguous_groups
from quantkit.codes.packing import PACKABLE_BITS, pack, packing_multiple, unpack

__all__ = ["PACKABLE_BITS", "QuantizedLinear", "contiguous_groups", "pack", "packing_multiple", "unpack"]
