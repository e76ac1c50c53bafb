"""What every place that weights come from offers, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from quantkit.errors import first_line as first_line
from quantkit.runs.files import file_sha256 as file_sha256
from quantkit.runs.files import read_json as read_json


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, known from its header: `stored_as` is the format's name for the type, `bytes` the size there."""

    shape: tuple[int, ...]
    stored_as: str
    bytes: int


class Source(Protocol):
    """A model on disk, read tensor by tensor under Hugging Face names.

    Attributes:
        label: what to call the model in reports: a folder's, file's or repository's name, never a local path.
        kind: "hf", "gguf", "ggjt" or "gptq".
        path: the folder or file that is read.
        config: the model's configuration, without any quantization.
        dtype: dtype of the tensors that are not quantized, as published variants should keep it.
        remarks: what a user should know of what was chosen or assumed to read it, a line each.
        doubt: why it may not be what it is taken for; None where nothing says so.
        choices: what was chosen to read it, for the record beside a result.
        quantization: the quantization of its config, of folders that hold codes; None of others.
    """

    label: str
    kind: str
    path: Path
    config: PretrainedConfig
    dtype: torch.dtype
    remarks: Sequence[str] = ()
    doubt: str | None = None
    choices: Mapping[str, Any] = MappingProxyType({})
    quantization: dict[str, Any] | None = None

    @property
    def parts(self) -> Mapping[str, Source]:
        """What it is read from, by role: itself as "model"; of a base and a delta those two."""
        return {"model": self}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor `read` can give, by name, with its shape as `read` gives it."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantized where it is stored as codes; on the CPU.

        Raises:
            SourceError: the file ends early or cannot be read.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what `read` gives; in the memory of so many rows where the format allows it.

        Raises:
            SourceError: the file ends early or cannot be read.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            SourceError: it has none that can be read.
        """

    def weight_files(self) -> Sequence[Path]:
        """The files that hold the weights, in order."""

    def config_dict(self) -> dict[str, Any]:
        """config.json to publish a variant with: no quantization, no local path."""

    def copy_companions(self, folder: Path) -> None:
        """Write what a published folder needs beside weights and config: tokenizer, generation config, template."""
