"""A GGUF file: weights by way of gguf's dequantizers, config and tokenizer made from its keys."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.errors import SourceError
from quantkit.sources.base import TensorInfo, first_line
from quantkit.sources.gguf_architectures import ARCHITECTURES, IN_CONFIG, OUTSIDE
from quantkit.sources.gguf_config import Keys, make_config
from quantkit.sources.gguf_file import MAGIC, GgufFile, GgufTensor
from quantkit.sources.gguf_tokenizer import make_tokenizer
from quantkit.sources.hf import copy_companions, publishable_config, stored_dtype

__all__ = ["MAGIC", "GgufSource", "unpermute_heads"]

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_END_OF_TURN = "tokenizer.ggml.eot_token_id"


class GgufSource:
    """A GGUF file, or several that are parts of one model (``-00001-of-00003.gguf``: any of them names it).

    Tensors have Hugging Face names and layout; quantized ones are given as float32.
    """

    kind = "gguf"

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self._parts = [GgufFile(part) for part in _parts(path)]
        name = self._field("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise SourceError(f"{path}: GGUF architecture {name!r} is not supported; supported: {known}")
        self._architecture = ARCHITECTURES[name]
        self.label = label or _PART.sub("", path.stem)
        self._holder = {name: part for part in self._parts for name in part.tensors}
        self._check_count()
        self.config = self._config(name)
        self._gguf_name = dict(self._names())
        self.dtype = torch.bfloat16 if self._architecture.bfloat16 else stored_dtype(self.tensors)

    def _field(self, key: str) -> Any:
        return self._parts[0].keys.get(key)

    def _tensor(self, stored: str) -> GgufTensor:
        return self._holder[stored].tensors[stored]

    def _check_count(self) -> None:
        expected = self._field("split.tensors.count")
        if len(self._parts) > 1 and expected is not None and expected != len(self._holder):
            raise SourceError(f"{self.path}: its parts hold {len(self._holder)} tensors, not {expected}")

    def _config(self, architecture: str) -> PretrainedConfig:
        shapes = {name: self._tensor(name).shape for name in self._holder}
        try:
            return make_config(Keys(architecture, self._field), shapes, lambda name: self._holder[name].values(name))
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from error
        except Exception as error:  # whatever a config class raises on values it does not like
            raise SourceError(f"{self.path}: cannot make a config from its metadata: {first_line(error)}") from error

    def _names(self) -> Iterator[tuple[str, str]]:
        """Hugging Face name and GGUF name, for every tensor of the file."""
        for name in self._holder:
            if name in IN_CONFIG:
                continue
            block = re.match(r"blk\.(\d+)\.", name)
            ours = self._architecture.block.get(name[block.end() :]) if block else OUTSIDE.get(name)
            if ours is None:
                kind = self._field("general.architecture")
                raise SourceError(f"{self.path}: tensor {name} is not one that a {kind} model is read with")
            yield (f"model.layers.{block[1]}.{ours}" if block else ours), name

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        stored = {name: self._tensor(stored) for name, stored in self._gguf_name.items()}
        return {name: TensorInfo(tensor.shape, tensor.kind.name, tensor.bytes) for name, tensor in stored.items()}

    def read(self, name: str) -> torch.Tensor:
        stored = self._gguf_name[name]
        values = torch.from_numpy(self._holder[stored].values(stored))
        if self._architecture.permuted and ".self_attn." in name and (".q_proj." in name or ".k_proj." in name):
            heads = self.config.num_attention_heads if "q_proj" in name else self.config.num_key_value_heads
            values = unpermute_heads(values, heads)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            values = values - self._architecture.norm_offset
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return make_tokenizer(self._field, self._architecture)
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from error
        except Exception as error:  # tokenizers raises plain Exceptions for a vocabulary it cannot use
            raise SourceError(f"{self.path}: cannot make its tokenizer: {first_line(error)}") from error

    def weight_files(self) -> Sequence[Path]:
        return [part.path for part in self._parts]

    def config_dict(self) -> dict[str, Any]:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]
        return publishable_config({**self.config.to_diff_dict(), "architectures": [architecture]})

    def copy_companions(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer().save_pretrained(scratch)
            copy_companions(Path(scratch), folder)
        if not (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_model_config(self.config)
            turn = self._field(_END_OF_TURN)
            if turn not in (None, generation.eos_token_id):  # an answer of an instructed model ends here
                generation.eos_token_id = [generation.eos_token_id, turn]
            generation.save_pretrained(folder)


def unpermute_heads(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of Q and K, [rows, ...]: per head, halves are interleaved for its rotary."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _parts(path: Path) -> list[Path]:
    """The files of the model that `path` is, or is a part of."""
    part = _PART.search(path.stem)
    if part is None:
        return [path]
    count = int(part[2])
    stem = path.stem[: part.start()]
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file}: this part of {stem} is missing; download it beside the others")
    return files
