"""The per-layer table beside a checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from quantkit.quant.stagework import LayerStatistics


def write_layer_table(path: Path, layers: Sequence[LayerStatistics]) -> None:
    """CSV with a row per Linear. No seconds: equal runs write equal files."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["layer", "loss", "rtn_loss", "loss_over_rtn", "damp", "fallback", "tokens"])
        for layer in layers:
            ratio = layer.loss / layer.rtn_loss if layer.rtn_loss else 1.0
            numbers = [f"{value:.6g}" for value in (layer.loss, layer.rtn_loss, ratio, layer.damp)]
            table.writerow([layer.name, *numbers, layer.fallback, layer.tokens])
