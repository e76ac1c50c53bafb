"""A GGUF file: weights by way of gguf's dequantizers, config and tokenizer made from its keys."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantkit.containers.gguf.architectures import ARCHITECTURES, BLOCK, IN_CONFIG, OUTSIDE
from quantkit.containers.gguf.config import LENIENT, ArchitectureKeys, config_settings, make_config, token_id
from quantkit.containers.gguf.file import Array, Blocks, GgufFile
from quantkit.containers.gguf.tokenizer import make_tokenizer
from quantkit.containers.hf.read import copy_companions, publishable_config, stored_dtype
from quantkit.containers.source import HoldsBlocks, Source, TensorInfo
from quantkit.errors import SourceError, first_line
from quantkit.late import torch, transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


class InFile(NamedTuple):
    """Where a published tensor is: a tensor of a file, or one expert's part of it."""

    file: GgufFile
    name: str
    expert: int | None = None


class GgmlSource(Source):
    """A file of GGML's types. Tensors have Hugging Face names and layout; quantized ones are given as float32."""

    _stored: Mapping[str, InFile]
    _permuted = True
    _norm_offset = 0.0

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError

    def _generation(self) -> transformers.GenerationConfig:
        return transformers.GenerationConfig.from_model_config(self.config)

    @property
    def ggml(self) -> HoldsBlocks:
        return self

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shown = {}
        for name, (file, stored, expert) in self._stored.items():
            tensor = file.tensors[stored]
            whole = TensorInfo(tensor.shape, tensor.kind.name, tensor.bytes)
            of_one = TensorInfo(tensor.shape[1:], tensor.kind.name, tensor.bytes // tensor.shape[0])
            shown[name] = whole if expert is None else of_one
        return shown

    def read(self, name: str) -> torch.Tensor:
        (file, stored, expert), heads = self._stored[name], self._turned_heads(name)
        values = file.values(stored, expert)
        values = unpermute_heads(values, heads) if heads else values
        return torch.from_numpy(values - self._offset(name) if self._offset(name) else values)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        file, stored, expert = self._stored[name]
        if self._turned_heads(name) or len(self.tensors[name].shape) < 2:
            return self.read(name)[start:stop]
        values = file.values(stored, expert, slice(start, stop))
        return torch.from_numpy(values - self._offset(name) if self._offset(name) else values)

    def blocks(self, name: str) -> Blocks:
        """Type and bytes of a tensor as it is stored, uint8 [rows, bytes of a row]; a vector is one row.

        Rows are in the order that `read` gives them.

        Raises:
            SourceError: what is stored is not what `read` gives: norms that have 1 added, quantized vectors whose
                values lie in another order.
        """
        file, stored, expert = self._stored[name]
        kind, rows = file.blocks(stored, expert)
        heads, length = self._turned_heads(name), self.tensors[name].shape[0]
        if self._offset(name) or (heads and rows.size % length):
            raise SourceError(f"{self.path}: the bytes of {name} are not the published tensor's; read its values")
        return kind, unpermute_heads(rows.reshape(length, -1), heads).reshape(rows.shape) if heads else rows

    def _turned_heads(self, name: str) -> int:
        """How many heads share a tensor's rows, where they are in llama.cpp's order; else 0."""
        if not self._permuted or ".self_attn." not in name:
            return 0
        heads: dict[str, int] = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(name.split(".")[-2], 0)

    def _offset(self, name: str) -> float:
        """What was added to a tensor's values."""
        return self._norm_offset if name.endswith("norm.weight") else 0.0

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return self._make_tokenizer()
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from error
        except Exception as error:  # tokenizers raises plain Exceptions for a vocabulary it cannot use
            raise SourceError(f"{self.path}: cannot make its tokenizer: {first_line(error)}") from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def copy_companions(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer().save_pretrained(scratch)
            copy_companions(Path(scratch), folder)
        self._generation().save_pretrained(folder)


class GgufSource(GgmlSource):
    """A GGUF file, or several that are parts of one model (``-00001-of-00003.gguf``: any of them names it)."""

    kind = "gguf"

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self._parts = [GgufFile(part) for part in _parts(path)]
        if self._field("general.type") == "adapter":
            base = self._field("general.base_model.0.name") or "its base model"
            raise SourceError(
                f"{path}: a LoRA adapter, no model: merge it into {str(base)[:60]} first (llama-export-lora, or peft's "
                "merge_and_unload), and give what comes of it"
            )
        name = self._field("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise SourceError(f"{path}: GGUF architecture {str(name)[:40]!r} is not supported; supported: {known}")
        self._architecture = ARCHITECTURES[name]
        self._permuted, self._norm_offset = self._architecture.permuted, self._architecture.norm_offset
        self.metadata = self._parts[0].keys
        self.from_gptq = self._field("quantkit.weights") is not None
        self.remarks = self._unnamed()
        self.label = label or model_stem(path)
        self._holder = {name: part for part in self._parts for name in part.tensors}
        self._check_parts()
        self._settings = self._config_settings(name)
        self.model_type = self._settings["model_type"]
        self._stored = dict(self._names())

    def _field(self, key: str) -> Any:
        return self._parts[0].keys.get(key)

    def _unnamed(self) -> list[str]:
        """What the file says of tokens that it does not have."""
        count = len(self._field("tokenizer.ggml.tokens") or ())
        keys = {key: self._field(f"tokenizer.ggml.{key}") for key in LENIENT}
        return [
            f"tokenizer.ggml.{key} is {str(number)[:40]}, but there are {count} tokens: taken for none"
            for key, number in keys.items()
            if type(number) is int and not 0 <= number < count
        ]

    def _check_parts(self) -> None:
        """Each part must be the one that its name says, and of one model with the first; each tensor lies in one."""
        architecture = self._field("general.architecture")
        for number, part in enumerate(self._parts):
            count, own = part.keys.get("split.count"), part.keys.get("split.no")
            alone = len(self._parts) == 1 and count in (None, 0)
            if not alone and (count != len(self._parts) or own != number):
                said = str(own + 1 if type(own) is int else own)[:20]  # people count from 1
                raise SourceError(
                    f"{part.path}: its keys call it part {said} of {str(count)[:20]}, and its name part {number + 1} "
                    f"of {len(self._parts)}; give the parts their published names"
                )
            if part.keys.get("general.architecture", architecture) != architecture:
                raise SourceError(f"{part.path}: a part of another architecture than the first; download it again")
        stored = sum(len(part.tensors) for part in self._parts)
        if stored != len(self._holder):
            raise SourceError(f"{self.path}: two of its parts hold the same tensor; download them again")
        expected = self._field("split.tensors.count")
        if len(self._parts) > 1 and expected is not None and expected != stored:
            raise SourceError(f"{self.path}: its parts hold {stored} tensors, not {str(expected)[:20]}")

    @cached_property
    def config(self) -> PretrainedConfig:
        with self._making_config():
            return make_config(self._settings)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._architecture.bfloat16 else stored_dtype(self.tensors)

    def _config_settings(self, architecture: str) -> dict[str, Any]:
        shapes = {name: part.tensors[name].shape for name, part in self._holder.items()}
        keys = ArchitectureKeys(architecture, self._field)
        with self._making_config():
            return config_settings(keys, shapes, lambda name: self._holder[name].values(name))

    @contextmanager
    def _making_config(self) -> Iterator[None]:
        try:
            yield
        except SourceError as error:
            raise SourceError(f"{self.path}: {error}") from error
        except Exception as error:  # whatever a config class raises on values it does not like
            raise SourceError(f"{self.path}: cannot make a config from its metadata: {first_line(error)}") from error

    def _names(self) -> Iterator[tuple[str, InFile]]:
        """Hugging Face name and where it is stored, for every tensor of the file."""
        for name, part in self._holder.items():
            if name in IN_CONFIG:
                continue
            block = BLOCK.match(name)
            ours = self._architecture.block.get(name[block.end() :]) if block else OUTSIDE.get(name)
            if ours is None:
                kind = self._field("general.architecture")
                raise SourceError(f"{self.path}: tensor {name} is not one that a {kind} model is read with")
            published = f"model.layers.{block[1]}.{ours}" if block else ours
            if "*" not in published:
                yield published, InFile(part, name)
                continue
            for expert in range(part.tensors[name].shape[0]):
                yield published.replace("*", str(expert)), InFile(part, name, expert)

    def _make_tokenizer(self) -> PreTrainedTokenizerBase:
        return make_tokenizer(self._field, self._architecture, self.config.vocab_size)

    def _generation(self) -> transformers.GenerationConfig:
        generation = super()._generation()
        turn = token_id(self._field, "eot_token_id", self.config.vocab_size)
        if turn not in (None, generation.eos_token_id):  # an answer of an instructed model ends here
            generation.eos_token_id = [generation.eos_token_id, turn]
        return generation

    def weight_files(self) -> Sequence[Path]:
        return [part.path for part in self._parts]

    def config_dict(self) -> dict[str, Any]:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]
        content = {**self.config.to_diff_dict(), "architectures": [architecture]}
        if "expert_count" in self._architecture.fields:  # which transformers 5 calls num_local_experts
            content["num_experts"] = self.config.num_experts
        return publishable_config(content, type(self.config))


def model_stem(path: Path) -> str:
    """A file's name without its suffix, and without the number of a part."""
    return _PART.sub("", path.stem)


def unpermute_heads(values: Array, heads: int) -> Array:
    """Undo llama.cpp's row order of Q and K, [rows, ...]: per head, halves are interleaved for its rotary."""
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _parts(path: Path) -> list[Path]:
    """The files of the model that `path` is, or is a part of."""
    part = _PART.search(path.stem)
    if part is None:
        return [path]
    count = int(part[2])
    if not 0 < int(part[1]) <= count:
        raise SourceError(f"{path}: there is no part {int(part[1])} of {count}; give the parts their published names")
    stem = path.stem[: part.start()]
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file}: this part of {stem} is missing; download it beside the others")
    return files
