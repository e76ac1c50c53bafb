"""The calibration windows that a run would take, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.blocks.open import model_or_default, open_model
from quantkit.options.verbs import Samples
from quantkit.progress import SILENT, Progress, counted
from quantkit.report import Report, Rule, Shown, Text
from quantkit.tokens import TokenMatrix, shown_license
from quantkit.tokens.text import calibration_windows
from quantkit.verbs import verb


@dataclass(frozen=True)
class SamplesReport(Report):
    """What a run would calibrate on. It is not read back: its JSON says where the tokens come from, and lacks them."""

    matrix: TokenMatrix
    windows: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {**self.matrix.provenance.model_dump(mode="json"), "windows": self.windows}

    def lines(self, show: int = 1) -> Iterator[Shown]:
        """With the first `show` windows."""
        facts = self.matrix.provenance
        parts = facts.parts or (facts,)
        for part in parts:
            left_out = counted(part.dropped, "record left out that is", "records left out that are")
            dropped = f", {left_out} also in the evaluation text" if part.dropped else ""
            yield (
                f"{counted(part.samples, 'window')} of {counted(facts.seq_len, 'token')} "
                f"from {counted(len(part.records), 'record')} of {part.dataset} "
                f"({shown_license(part.license)}, sha256 {part.dataset_sha256[:12]}){dropped}"
            )
        yield f"template {facts.template}, seed {facts.seed}"
        yield f"tokens sha256 {facts.tokens_sha256}"
        for part in parts:
            yield f"records: {', '.join(part.records)}"
        for number, window in enumerate(self.windows[:show]):
            yield Rule(f"window {number}")
            yield Text(window)


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
