"""The calibration windows that a run would take, for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.blocks.open import model_or_default, open_model
from quantkit.cli import console
from quantkit.options.verbs import Samples
from quantkit.progress import SILENT, Progress
from quantkit.tokens import TokenMatrix
from quantkit.tokens.calibration import calibration_windows
from quantkit.verbs import verb


@dataclass(frozen=True)
class SamplesReport:
    """What a run would calibrate on."""

    matrix: TokenMatrix
    windows: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**self.matrix.provenance.model_dump(mode="json"), "windows": self.windows}


@verb(Samples)
def samples(options: Samples, *, progress: Progress = SILENT) -> SamplesReport:
    """Draw the windows that `gptq` would calibrate on, with the same arguments, and decode them.

    Raises:
        UsageError: nothing has the name, or a mixture is wrongly written.
        CalibrationError: data that cannot be read or is too short.
    """
    source = open_model(model_or_default(options.model, progress), options.revision, options.trust_remote_code)
    tokenizer = source.tokenizer()
    judged = options.text if options.evaluate else None
    matrix = calibration_windows(options.calibration, options, source, judged, progress)
    return SamplesReport(matrix, [str(tokenizer.decode(row)) for row in matrix.tokens.tolist()])


def print_samples(report: SamplesReport, show: int) -> None:
    from quantkit.tokens import shown_license

    facts = report.matrix.provenance
    sets = [
        f"{part.samples} windows of {facts.seq_len} tokens from {len(part.records)} records of {part.dataset} "
        f"({shown_license(part.license)}, sha256 {part.dataset_sha256[:12]})"
        + (f", {part.dropped} records left out that are also in the evaluation text" if part.dropped else "")
        for part in facts.parts or (facts,)
    ]
    drawn = [f"template {facts.template}, seed {facts.seed}", f"tokens sha256 {facts.tokens_sha256}"]
    names = [f"records: {', '.join(part.records)}" for part in facts.parts or (facts,)]
    console.results.print("\n".join([*sets, *drawn, *names]), markup=False)
    for number, window in enumerate(report.windows[:show]):
        console.results.rule(f"window {number}", align="left")
        console.results.print(window, markup=False)
