"""The windows of tokens that a run calibrates on, and those that models are judged on, with the scored positions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.containers.source import Source
from quantkit.errors import CalibrationError, SourceError, UsageError
from quantkit.late import torch
from quantkit.options import Drawing, DrawnWindows, EvaluationSpec
from quantkit.options.values import PACKED_SUFFIXES, is_wikitext2
from quantkit.progress import SILENT, Progress, counted
from quantkit.tokens import (
    Dataset,
    Provenance,
    Record,
    TextIndex,
    TokenMatrix,
    draw,
    load_calibration,
    load_dataset,
    window_text,
    windows_in_order,
)
from quantkit.tokens.datasets import DataFiles, data_file
from quantkit.tokens.readers import read_source
from quantkit.tokens.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIKITEXT2 = "wikitext2"
_WIKITEXT2_TEST = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
_DATASET_SUFFIXES = (".json", ".jsonl", ".parquet", *PACKED_SUFFIXES)


@dataclass(frozen=True)
class EvaluationText:
    """Windows, and what they were made of. `name` is what reports call the text."""

    name: str
    windows: Windows
    provenance: Provenance


def evaluation_text(
    spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, progress: Progress = SILENT
) -> EvaluationText:
    """Read and window the text that `spec` names.

    ``wikitext2`` is the protocol of the GPTQ paper and its successors: the raw test split, records joined with blank
    lines, tokenized as one string, cut into windows, no overlap. ``wikitext2:FILE`` reads a local copy (Parquet, or
    text that is already joined). Instruction data (a known name, .json, .jsonl, .parquet) is rendered with the
    template, record after record; any other file is plain text. `spec.eval_tokens` takes the first windows of it.

    Raises:
        CalibrationError: text that cannot be read, or is shorter than one window.
    """
    # With overlapping windows the text is first cut at the stride, then put together again.
    # (At least 2, so that a window's own BOS leaves room for a token.)
    cut = spec.seq_len if spec.stride is None else max(spec.stride, 2)
    at_most = None if spec.eval_tokens == "all" else -(-max(int(spec.eval_tokens), spec.seq_len) // cut)
    name, content = _shown_name(spec.text), _read(spec.text, progress)
    if isinstance(content, Dataset):
        matrix = windows_in_order(
            content, seq_len=cut, template=spec.template, tokenizer=tokenizer, progress=progress, at_most=at_most
        )
    else:
        once = is_wikitext2(spec.text)
        matrix = window_text(content, name, cut, tokenizer, leading_bos_once=once, at_most=at_most)
    tokens = matrix.tokens
    first_scored = torch.ones(tokens.shape[0], dtype=torch.int64)
    if spec.stride is not None:
        tokens, first_scored = _overlapping(matrix, spec.seq_len, spec.stride)
    return EvaluationText(name, Windows(tokens, first_scored), matrix.provenance)


def common_text(
    tokenizers: Sequence[tuple[str, PreTrainedTokenizerBase]], spec: EvaluationSpec, progress: Progress = SILENT
) -> EvaluationText:
    """The text for several models, each with its label; the first one's tokenizer and chat template make it.

    Raises:
        UsageError: another one's tokenizer makes other tokens of the same text.
        CalibrationError: as `evaluation_text`.
    """
    (first, own), *others = tokenizers
    text = evaluation_text(spec, own, progress)
    for label, tokenizer in others:
        # A ggjt file has no place for a chat template, and converters change it: it decides no model's numbers.
        rendering = copy(tokenizer)
        rendering.chat_template = own.chat_template
        if evaluation_text(spec, rendering).provenance.tokens_sha256 != text.provenance.tokens_sha256:
            raise UsageError(
                f"{label} and {first} tokenize the text differently: their perplexities cannot be compared"
            )
    return text


def text_index(text: str) -> TextIndex:
    """The text that `--text` names, for telling which calibration records occur in it.

    Raises:
        UsageError: nothing has that name.
        CalibrationError: text that cannot be read.
    """
    content = _read(text, SILENT)
    return TextIndex.of(content) if isinstance(content, Dataset) else TextIndex(_shown_name(text), [content])


def calibration_windows(
    given: str | Sequence[str] | DrawnWindows, spec: Drawing, source: Source, judged: str | None, progress: Progress
) -> TokenMatrix:
    """The windows that a run was given, or draws, without the records that also occur in the text `judged`.

    Texts that were given are records of plain text.

    Raises:
        CalibrationError: data that cannot be read or is too short.
    """
    if isinstance(given, TokenMatrix):
        return given
    if not isinstance(given, str | tuple):
        raise UsageError(f"--calibration: windows made beforehand are a TokenMatrix, not a {type(given).__name__}")
    index = None if judged is None else text_index(judged)
    data = load_calibration(given, progress) if isinstance(given, str) else _dataset_of(given)
    return draw(data, spec, source.tokenizer(), progress, index)


def _dataset_of(texts: Sequence[str]) -> Dataset:
    """Texts as a data set of plain records, without those of white space alone."""
    records = tuple(Record(str(number), text=text) for number, text in enumerate(texts) if text.strip())
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass"))
    return Dataset(counted(len(texts), "text"), digest.hexdigest(), records)


def check_tokens(tokens: torch.Tensor, source: Source) -> None:
    """Refuse token ids that the model has no embedding for."""
    vocabulary = int(source.config.get_text_config().vocab_size)
    if int(tokens.max()) >= vocabulary:
        raise SourceError(
            f"{source.label}: its tokenizer gives id {int(tokens.max())}, but the model embeds only {vocabulary} ids"
        )


def _read(text: str, progress: Progress) -> Dataset | str:
    """Records, or one plain text."""
    if is_wikitext2(text):
        return _wikitext2(text)
    path = Path(text)
    if os.path.isfile(path) and path.suffix.lower() not in _DATASET_SUFFIXES:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return load_dataset(text, progress)


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
    if is_wikitext2(text):
        return WIKITEXT2
    return Path(text).name if os.path.isfile(text) else text


def _wikitext2(text: str) -> str:
    local = text.partition(":")[2]
    try:
        path = Path(local) if local else data_file(*_WIKITEXT2_TEST)
    except CalibrationError as error:
        raise CalibrationError(f"{error}, as --text {WIKITEXT2}:FILE") from error
    if path.suffix == ".parquet":
        source = DataFiles(WIKITEXT2, ((path.name, path),), None, joined=True)
        return read_source(source).text or ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path}: cannot be read as WikiText-2: {error}") from error
