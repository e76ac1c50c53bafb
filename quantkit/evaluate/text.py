"""Evaluation text: a name or a file into windows of tokens and the positions that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from quantkit.calibration import Provenance, TokenMatrix, load_dataset, window_text, windows_in_order
from quantkit.config import EvaluationSpec
from quantkit.errors import CalibrationError, MissingPackageError
from quantkit.evaluate.compare import Windows
from quantkit.progress import SILENT, Progress

WIKITEXT2 = "wikitext2"
_WIKITEXT2_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
_DATASET_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class EvaluationText:
    """Windows, and what they were made of. `name` is what reports call the text."""

    name: str
    windows: Windows
    provenance: Provenance


def default_seq_len(text: str) -> int:
    """Tokens a window where the user names none: 2048 for the papers' WikiText-2 protocol, else 512."""
    return 2048 if _is_wikitext2(text) else 512


def evaluation_text(
    spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, progress: Progress = SILENT
) -> EvaluationText:
    """Read and window the text that `spec` names.

    ``wikitext2`` is the protocol of the GPTQ paper and its successors: the raw test split, records joined with blank
    lines, tokenized as one string, cut into windows, no overlap. ``wikitext2:FILE`` reads a local copy (Parquet, or
    text that is already joined). Instruction data (a known name, .json, .jsonl, .parquet) is rendered with the
    template, record after record; any other file is plain text.

    Raises:
        CalibrationError: text that cannot be read, or is shorter than one window.
    """
    # With overlapping windows the text is first cut at the stride, then put together again.
    # (At least 2, so that a window's own BOS leaves room for a token.)
    cut = spec.seq_len if spec.stride is None else max(spec.stride, 2)
    matrix = _token_matrix(spec, cut, tokenizer, progress)
    tokens = matrix.tokens
    first_scored = torch.ones(tokens.shape[0], dtype=torch.int64)
    if spec.stride is not None:
        tokens, first_scored = _overlapping(matrix, spec.seq_len, spec.stride)
    return EvaluationText(_shown_name(spec.text), Windows(tokens, first_scored), matrix.provenance)


def _token_matrix(
    spec: EvaluationSpec, seq_len: int, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> TokenMatrix:
    if _is_wikitext2(spec.text):
        return window_text(_wikitext2(spec.text), WIKITEXT2, seq_len, tokenizer, leading_bos_once=True)
    path = Path(spec.text)
    if path.is_file() and path.suffix not in _DATASET_SUFFIXES:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        return window_text(text, path.name, seq_len, tokenizer, leading_bos_once=False)
    dataset = load_dataset(spec.text, progress)
    return windows_in_order(dataset, seq_len=seq_len, template=spec.template, tokenizer=tokenizer, progress=progress)


def _overlapping(matrix: TokenMatrix, seq_len: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of seq_len that start `stride` tokens apart; each scores only tokens that no earlier window scored."""
    has_bos = matrix.provenance.bos == "window"
    stream = matrix.tokens[:, int(has_bos) :].reshape(-1)
    width = seq_len - int(has_bos)
    if stream.numel() < width:
        raise CalibrationError(
            f"{matrix.provenance.dataset} is too short: {stream.numel()} tokens, {seq_len} needed for one window"
        )
    windows = stream.unfold(0, width, stride)
    if has_bos:
        windows = torch.cat([matrix.tokens[:1, :1].expand(windows.shape[0], 1), windows], dim=1)
    first_scored = torch.full((windows.shape[0],), seq_len - stride, dtype=torch.int64)
    first_scored[0] = 1
    return windows.contiguous(), first_scored


def _shown_name(text: str) -> str:
    """What reports call the text: a name as it is, a file without its folder."""
    if _is_wikitext2(text):
        return WIKITEXT2
    return Path(text).name if Path(text).is_file() else text


def _is_wikitext2(text: str) -> bool:
    return text == WIKITEXT2 or text.startswith(f"{WIKITEXT2}:")


def _wikitext2(text: str) -> str:
    local = text.partition(":")[2]
    path = Path(local) if local else _download_wikitext2()
    try:
        if path.suffix != ".parquet":
            return path.read_text(encoding="utf-8")
        return "\n\n".join(_parquet_column(path, "text"))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{path}: cannot be read as WikiText-2: {error}") from error


def _download_wikitext2() -> Path:
    repository, file = _WIKITEXT2_HUB
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CalibrationError(
            f"WikiText-2 is not in the Hub cache and cannot be downloaded; name a local copy: --text {WIKITEXT2}:FILE"
        ) from error


def _parquet_column(path: Path, column: str) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "hub", "reading Parquet") from None
    values: list[str] = parquet.read_table(path, columns=[column])[column].to_pylist()
    return values
