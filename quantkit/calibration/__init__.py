"""Calibration and evaluation text: instruction data or plain text into a token matrix."""

from __future__ import annotations

from quantkit.calibration.datasets import KNOWN_NAMES
from quantkit.calibration.mixtures import Mixture, load_calibration, parse_mixture, shown_license
from quantkit.calibration.overlap import TextIndex
from quantkit.calibration.readers import Dataset, load_dataset
from quantkit.calibration.records import Record, Turn, parse_record
from quantkit.calibration.sampling import Part, Provenance, TokenMatrix, draw, token_hash, window_text, windows_in_order
from quantkit.calibration.templates import render, resolve

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
