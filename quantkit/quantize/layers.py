"""What happened to each Linear of a run: as its log and its record have it, and what that tells of the model."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.codes import Plan
from quantkit.errors import SourceError
from quantkit.quantize.methods import Fallback
from quantkit.runs.atomic import REPORT_NAME
from quantkit.runs.records import read_record


@dataclass(frozen=True)
class LayerStatistics:
    """What happened to one Linear.

    Attributes:
        name: module name in the model.
        loss: mean over tokens of the squared output error, summed over outputs.
        rtn_loss: the same for plain rounding.
        damp: fraction of the mean Hessian diagonal added; 0 where the layer was only rounded.
        fallback: "", "eigenvalues" or "rounding".
        tokens: calibration tokens that it saw; an expert sees those that were routed to it.
        seconds: quantizing it, Hessian included; a stage's time is shared out by rows.
        n_eff: of weighted tokens, how many of equal weight would tell as much: ``(sum w)^2 / sum w^2``.
        corrected: what part of the step to the corrected target was taken; losses are then against that target.
        predicted: mean KL divergence of the model's output, in nats, that its error makes to second order; always of
            the error against the model's own weight. None without token weights.
    """

    name: str
    loss: float
    rtn_loss: float
    damp: float
    fallback: Fallback
    tokens: int
    seconds: float
    n_eff: float | None = None
    corrected: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class EndStatistics:
    """The embedding or the output matrix of a GGUF file, or the one that is both: its published name, its type, and the
    mean KL divergence in nats that this is predicted to make."""

    name: str
    type: str
    predicted: float


def recorded_ends(record: Mapping[str, Any]) -> list[EndStatistics]:
    """What a run's record says of embedding and output matrix."""
    return [EndStatistics(**one) for one in record.get("ends", ())]


def recorded_layers(folder: Path) -> list[LayerStatistics]:
    """What a finished run noted of each Linear. Raises SourceError where the record is not as it was written."""
    try:
        return [LayerStatistics(**layer, seconds=0.0) for layer in read_record(folder)["layers"]]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{folder / REPORT_NAME}: layers: {error}; the record is damaged, make it again") from None


def predicted_divergence(layers: Sequence[LayerStatistics]) -> float | None:
    """The mean KL divergence, in nats, that the errors of all Linears make: the sum of what each makes by itself.

    None where it is not known of some that saw tokens.
    """
    seen = [layer.predicted for layer in layers if layer.tokens]
    known = [predicted for predicted in seen if predicted is not None]
    return sum(known) if seen and len(known) == len(seen) else None


def write_layer_table(
    path: Path, layers: Sequence[LayerStatistics], plan: Plan, planned: Mapping[str, float] | None = None
) -> None:
    """CSV with a row per Linear. No seconds: equal runs write equal files.

    `planned`: of a run that chose its bits, what was predicted when they were chosen; not of those that were given.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        heads = ["layer", "loss", "rtn_loss", "loss_over_rtn", "damp", "fallback", "tokens", "n_eff", "corrected"]
        table.writerow([*heads, "predicted", *([] if planned is None else ["planned", "bits", "group_size", "type"])])
        for layer in layers:
            ratio = layer.loss / layer.rtn_loss if layer.rtn_loss else 1.0
            numbers = [f"{value:.6g}" for value in (layer.loss, layer.rtn_loss, ratio, layer.damp)]
            effective = layer.tokens if layer.n_eff is None else f"{layer.n_eff:.6g}"
            rest = [layer.fallback, layer.tokens, effective, f"{layer.corrected or 0:.4g}"]
            predicted = "" if layer.predicted is None else f"{layer.predicted:.6g}"
            spec = plan[layer.name].spec
            known = f"{planned[layer.name]:.6g}" if planned and layer.name in planned else ""
            own = [] if planned is None else [known, spec.bits, spec.group_size, spec.ggml]
            table.writerow([layer.name, *numbers, *rest, predicted, *own])
