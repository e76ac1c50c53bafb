"""A GGUF file of Llama type: weights by way of gguf's dequantizers, config and tokenizer by way of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.errors import SourceError
from quantkit.sources.base import TensorInfo
from quantkit.sources.hf import copy_companions, first_line, load_tokenizer, publishable_config

MAGIC = b"GGUF"
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA}
_FLOATS = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


class GgufSource:
    """A GGUF file. Tensors have Hugging Face names and layout; quantized ones are given as float32."""

    kind = "gguf"

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self._reader = _open(path)
        architecture = self._field("general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(sorted(_ARCHITECTURES))
            raise SourceError(f"{path}: GGUF architecture {architecture!r} is not supported; supported: {known}")
        self._permuted_heads = architecture == "llama"
        self.label = label or path.stem
        self.config = _config(path)
        self.dtype = torch.float16
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._gguf_name = self._names(_ARCHITECTURES[architecture])

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _names(self, architecture: gguf.MODEL_ARCH) -> dict[str, str]:
        """Hugging Face name -> GGUF name, for every tensor of the file."""
        table = gguf.get_tensor_name_map(architecture, self.config.num_hidden_layers)
        backwards: dict[str, str] = {}
        for key, (_, name) in table.mapping.items():
            if key.startswith(("model.layers.", "model.embed_tokens", "model.norm", "lm_head")):
                backwards.setdefault(name, key)
        names = {}
        for name in self._stored:
            base, _, suffix = name.rpartition(".")
            if name == "rope_freqs.weight":  # follows from the config's rope scaling
                continue
            if base not in backwards:
                raise SourceError(f"{self.path}: tensor {name} is not one of a Llama model's")
            names[f"{backwards[base]}.{suffix}"] = name
        return names

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shown = {}
        for name, stored in self._gguf_name.items():
            tensor = self._stored[stored]
            shape = tuple(int(n) for n in reversed(tensor.shape))
            shown[name] = TensorInfo(shape, tensor.tensor_type.name, int(tensor.n_bytes))
        return shown

    def read(self, name: str) -> torch.Tensor:
        tensor = self._stored[self._gguf_name[name]]
        if tensor.tensor_type in _FLOATS:
            values = torch.from_numpy(np.array(tensor.data))
        else:
            try:
                values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            except NotImplementedError as error:
                raise SourceError(f"{self.path}: {tensor.tensor_type.name} of {name} has no dequantizer") from error
        if self._permuted_heads and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            heads = self.config.num_attention_heads if "q_proj" in name else self.config.num_key_value_heads
            values = unpermute_heads(values, heads)
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path.parent, trust_remote_code=False, gguf_file=self.path.name)

    def weight_files(self) -> Sequence[Path]:
        return [self.path]

    def config_dict(self) -> dict[str, Any]:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]
        return publishable_config({**self.config.to_diff_dict(), "architectures": [architecture]})

    def copy_companions(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer().save_pretrained(scratch)
            copy_companions(Path(scratch), folder)
        if not (folder / "generation_config.json").is_file():
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)


def unpermute_heads(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of Q and K, [rows, ...]: per head, halves are interleaved for its rotary."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises what numpy raises on a short file
        raise SourceError(f"{path}: broken or cut short GGUF file ({first_line(error)}); download it again") from error


def _config(path: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers raises many kinds for metadata it cannot use
        raise SourceError(f"{path}: cannot make a config from its metadata: {first_line(error)}") from error
    return config
