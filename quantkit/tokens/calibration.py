"""The windows of tokens that a run calibrates on."""

from __future__ import annotations

import torch

from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError
from quantkit.options import Drawing, DrawnWindows
from quantkit.progress import Progress
from quantkit.tokens.mixtures import load_calibration
from quantkit.tokens.text import text_index
from quantkit.tokens.windows import TokenMatrix, draw


def calibration_windows(
    given: str | DrawnWindows, spec: Drawing, source: Source, judged: str | None, progress: Progress
) -> TokenMatrix:
    """The windows that a run was given, or draws, without the records that also occur in the text `judged`.

    Raises:
        CalibrationError: data that cannot be read or is too short.
    """
    if isinstance(given, TokenMatrix):
        return given
    if not isinstance(given, str):
        raise UsageError(f"--calibration: windows made beforehand are a TokenMatrix, not a {type(given).__name__}")
    index = None if judged is None else text_index(judged)
    return draw(load_calibration(given, progress), spec, source.tokenizer(), progress, index)


def check_tokens(tokens: torch.Tensor, source: Source) -> None:
    """Refuse token ids that the model has no embedding for."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    if int(tokens.max()) >= vocabulary:
        raise SourceError(
            f"{source.label}: its tokenizer gives id {int(tokens.max())}, but the model embeds only {vocabulary} ids"
        )
