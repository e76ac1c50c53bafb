"""Several data sets mixed by weight: how a mixture is written, and what share of the windows each part has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from quantkit.errors import UsageError
from quantkit.progress import SILENT, Progress
from quantkit.tokens.datasets import KNOWN_HUB
from quantkit.tokens.readers import Dataset, load_dataset

_WEIGHTED = re.compile(r"(?P<data>.+):(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class Mixture:
    """Data sets and the weight of each, relative to the others'."""

    parts: tuple[tuple[Dataset, float], ...]


def load_calibration(spec: str, progress: Progress = SILENT) -> Dataset | Mixture:
    """Load what `--calibration` names: one data set, or a mixture of several, with a note on each one's licence.

    Raises as `parse_mixture` and `load_dataset` do.
    """
    named = parse_mixture(spec)
    parts = []
    for data, weight in named:
        dataset = load_dataset(data, progress)
        progress.note(f"calibration: {dataset.name} ({shown_license(dataset.license)})")
        parts.append((dataset, weight))
    return parts[0][0] if len(parts) == 1 else Mixture(tuple(parts))


def shown_license(name: str | None) -> str:
    """How a licence is shown, where none is stated too."""
    return f"licence {name}" if name else "no licence stated"


def parse_mixture(spec: str) -> tuple[tuple[str, float], ...]:
    """Take a calibration spec apart into (data, weight) pairs.

        calibration := data | data:weight,data:weight[,...]
        data        := FILE | NAME | NAME:FILE | OWNER/NAME[@REVISION][:PATH]
        weight      := a positive decimal number, such as 0.7, .3 or 2

    A comma makes a mixture: each part's weight stands after its last colon, and only the ratio of the weights counts.
    Without a comma nothing is read as a weight. An existing file whose name holds a comma is one data set, by itself
    or as the FILE of a known NAME; in a mixture it has no place.

    Raises:
        UsageError: a part that is empty, has no weight or a weight of 0, or is named twice.
    """
    if "," not in spec or os.path.isfile(spec) or _is_local_copy(spec):
        return ((spec, 1.0),)
    parts = []
    for part in spec.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        if not match:
            raise UsageError(f"calibration: {part.strip()!r} has no weight; write a mixture as A:0.7,B:0.3")
        weight = float(match["weight"])
        if not 0 < weight < math.inf:
            raise UsageError(f"calibration: the weight of {match['data']} must be a number above 0, not {weight:g}")
        parts.append((match["data"], weight))
    names = [data for data, _ in parts]
    twice = next((data for data in names if names.count(data) > 1), None)
    if twice is not None:
        raise UsageError(f"calibration: {twice} is in the mixture twice; add up its weights")
    return tuple(parts)


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """Split `samples` by weight, to the last one: rounded down, then one more where most was cut off."""
    total = sum(map(Fraction, weights))
    exact = [samples * Fraction(weight) / total for weight in weights]
    counts = [math.floor(share) for share in exact]
    largest_first = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in largest_first[: samples - sum(counts)]:
        counts[part] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, number within the part) of every window, such that each part is spread evenly over the whole."""
    places = [
        (Fraction(2 * number + 1, count), part, number) for part, count in enumerate(counts) for number in range(count)
    ]
    return [(part, number) for _, part, number in sorted(places)]


def _is_local_copy(spec: str) -> bool:
    name, _, file = spec.partition(":")
    return name in KNOWN_HUB and os.path.isfile(file)
