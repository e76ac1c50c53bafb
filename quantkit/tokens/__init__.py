"""Calibration and evaluation text: instruction data or plain text into a token matrix."""

from __future__ import annotations

from quantkit.options.values import parse_mixture
from quantkit.tokens.datasets import KNOWN_NAMES
from quantkit.tokens.overlap import TextIndex
from quantkit.tokens.readers import Dataset, Mixture, load_calibration, load_dataset, shown_license
from quantkit.tokens.records import Record, Turn, parse_record, render, resolve
from quantkit.tokens.windows import (
    Part,
    Provenance,
    TokenMatrix,
    draw,
    token_hash,
    window_text,
    windows_in_order,
)

__all__ = [
    "KNOWN_NAMES",
    "Dataset",
    "Mixture",
    "Part",
    "Provenance",
    "Record",
    "TextIndex",
    "TokenMatrix",
    "Turn",
    "draw",
    "load_calibration",
    "load_dataset",
    "parse_mixture",
    "parse_record",
    "render",
    "resolve",
    "shown_license",
    "token_hash",
    "window_text",
    "windows_in_order",
]
