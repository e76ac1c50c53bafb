"""A GGUF file: weights by way of gguf's dequantizers, config and tokenizer made from its keys."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantkit.containers.gguf.architectures import ARCHITECTURES, BLOCK, IN_CONFIG, part_of, row_of_file
from quantkit.containers.gguf.config import LENIENT, ArchitectureKeys, config_settings, make_config, token_id
from quantkit.containers.gguf.file import Array, Blocks, GgufFile
from quantkit.containers.gguf.order import Order, Picked, columns_of, norm_offset, order_of
from quantkit.containers.gguf.tokenizer import make_tokenizer
from quantkit.containers.hf.read import copy_companions, publishable_config, stored_dtype
from quantkit.containers.source import HoldsBlocks, Source, TensorInfo
from quantkit.errors import SourceError, first_line, meant
from quantkit.late import torch, transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


class InFile(NamedTuple):
    """Where a published tensor is: a tensor of a file, or one expert's part of it.

    `order` is that of its rows, `columns` that of its columns, `offset` what was added to its values; `logarithm` says
    that the file has minus the exponential, `vector` that the file has a matrix of one row as a vector, `turned` that a
    matrix is published as [in, out], `squeezed` that it is [rows, 1, columns], `grid` that a vector lies in rows.
    `others` are further tensors that the published one is made of.
    """

    file: GgufFile
    name: str
    expert: int | None = None
    order: Order | None = None
    offset: float = 0.0
    vector: bool = False
    turned: bool = False
    squeezed: bool = False
    columns: Picked | None = None
    logarithm: bool = False
    grid: bool = False
    others: tuple[InFile, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether rows of the published tensor are others than those of the file's."""
        moves = (self.order, self.columns, self.offset, self.logarithm, self.vector, self.turned, self.squeezed)
        return self.grid or any(moves)

    @property
    def by_parts(self) -> bool:
        """Whether it is made of parts of tensors, or of their columns."""
        return self.columns is not None or (isinstance(self.order, Picked) and (bool(self.others) or self.order.turned))


class GgmlSource(Source):
    """A file of GGML's types. Tensors have Hugging Face names and layout; quantized ones are given as float32."""

    _stored: Mapping[str, InFile]

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
        for name, found in self._stored.items():
            tensor = found.file.tensors[found.name]
            shape, size = tensor.shape, tensor.bytes
            if found.expert is not None:
                shape, size = shape[1:], size // shape[0]
            if isinstance(found.order, Picked):
                columns = shape[-2 if found.order.turned else -1] if len(shape) > 1 else None
                shape = (found.order.whole,) if columns is None else (found.order.whole, columns)
                size += sum(part.file.tensors[part.name].bytes for part in found.others)
            shape = shape[::-1] if found.turned else shape
            shape = (math.prod(shape),) if found.grid else shape
            shape = (shape[0], 1, *shape[1:]) if found.squeezed else shape
            shown[name] = TensorInfo((1, *shape) if found.vector else shape, tensor.kind.name, size)
        return shown

    def read(self, name: str) -> torch.Tensor:
        found = self._stored[name]
        values = found.file.values(found.name, found.expert)
        values = values - found.offset if found.offset else values
        values = np.log(-values) if found.logarithm else values
        values = values.reshape(-1) if found.grid else values
        values = values[:, np.argsort(found.columns.rows)] if found.columns else values
        values = _ordered(found, values)
        values = values[:, None] if found.squeezed else values
        tensor = torch.from_numpy(values[None] if found.vector else values)
        return tensor.T.contiguous() if found.turned else tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self._stored[name]
        if found.moved or len(self.tensors[name].shape) < 2:
            return self.read(name)[start:stop]
        return torch.from_numpy(found.file.values(found.name, found.expert, slice(start, stop)))

    def blocks(self, name: str) -> Blocks:
        """Type and bytes of a tensor as it is stored, uint8 [rows, bytes of a row]; a vector is one row.

        Rows are in the order that `read` gives them; of a matrix that is published as [in, out] they are those of
        [out, in].

        Raises:
            SourceError: what is stored is not what `read` gives: norms that have 1 added, quantized vectors whose
                values lie in another order.
        """
        found = self._stored[name]
        kind, rows = found.file.blocks(found.name, found.expert)
        length = self.tensors[name].shape[0]
        if found.offset or found.logarithm or found.by_parts or (found.order and rows.size % length):
            raise SourceError(f"{self.path}: the bytes of {name} are not the published tensor's; read its values")
        return kind, found.order.undo(rows.reshape(length, -1)).reshape(rows.shape) if found.order else rows

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


def _ordered(found: InFile, values: Array) -> Array:
    """A published tensor's rows in their own order."""
    if not isinstance(found.order, Picked):
        return found.order.undo(values) if found.order else values
    whole: Array | None = None
    for part, own in ((found, values), *((part, part.file.values(part.name)) for part in found.others)):
        assert isinstance(part.order, Picked)
        rows = own.reshape(-1, own.shape[-1]) if own.ndim > 1 else own
        if whole is None:
            columns = (own.shape[1],) if part.order.turned else rows.shape[1:]
            whole = np.zeros((part.order.whole, *columns), rows.dtype)
        whole = part.order.put(rows, whole)
    assert whole is not None
    return whole


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
            near = meant(str(name)[:40], ARCHITECTURES)
            more = f"; docs/ggml.md lists the {len(ARCHITECTURES)} that are{near}"
            raise SourceError(f"{path}: GGUF architecture {str(name)[:40]!r} is not supported{more}")
        self._architecture = row_of_file(name, self._field, {name for part in self._parts for name in part.tensors})
        self.metadata = self._parts[0].keys
        self.from_gptq = self._field("quantkit.weights") is not None
        self.remarks = self._unnamed()
        self.label = label or model_stem(path)
        self._holder = {name: part for part in self._parts for name in part.tensors}
        self._check_parts()
        self._settings = self._config_settings()
        self.model_type = self._settings["model_type"]
        self._stored = self._found()

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

    def _config_settings(self) -> dict[str, Any]:
        shapes = {name: part.tensors[name].shape for name, part in self._holder.items()}
        keys = ArchitectureKeys(self._architecture, self._field)
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

    def _found(self) -> dict[str, InFile]:
        """Where every published tensor is. Raises SourceError where the file has not all parts of one."""
        found: dict[str, InFile] = {}
        for published, part in self._names():
            first = found.get(published)
            found[published] = part if first is None else first._replace(others=(*first.others, part))
        for published, part in found.items():
            if isinstance(part.order, Picked):
                held = sum(len(own.order.rows) for own in (part, *part.others) if isinstance(own.order, Picked))
                if held != part.order.whole:
                    raise SourceError(f"{self.path}: {part.name} alone does not make {published}; the file is broken")
        return found

    def _names(self) -> Iterator[tuple[str, InFile]]:
        """Hugging Face name and where it is stored, for every tensor of the file."""
        row, heads = self._architecture, self._settings["num_attention_heads"]
        shared = self._settings[row.shared_heads or "num_attention_heads"]
        for name, part in self._holder.items():
            if name in IN_CONFIG:
                continue
            block = BLOCK.match(name)
            ours = row.block.get(name[block.end() :]) if block else row.outside.get(name)
            if ours is None:
                raise SourceError(f"{self.path}: tensor {name} is not one that a {row.name} model is read with")
            published = row.published_name(f"{row.layers}.{block[1]}.{ours}" if block else ours)
            role = part_of(name)
            offset = norm_offset(row, name)
            vector = role in row.vectors and len(part.tensors[name].shape) == 1
            turned = role in row.turned and name.endswith(".weight")
            squeezed = role in row.squeezed and name.endswith(".weight")
            order = order_of(row, role, heads, shared, self._settings.__getitem__)
            found = InFile(part, name, None, order, offset, vector, turned, squeezed)
            if role in (*row.columns, *row.logarithms, *row.grids):
                columns = columns_of(row, role, self._settings.__getitem__)
                found = found._replace(columns=columns, logarithm=role in row.logarithms, grid=role in row.grids)
            if "*" not in published:
                yield published, found
                continue
            for expert in range(part.tensors[name].shape[0]):
                yield published.replace("*", str(expert)), found._replace(expert=expert)

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
        if self._architecture.fields.get("expert_count") == "num_experts":  # transformers 5 says num_local_experts
            content["num_experts"] = self.config.num_experts
        return publishable_config(content, type(self.config))


def model_stem(path: Path) -> str:
    """A file's name without its suffix, and without the number of a part."""
    return _PART.sub("", path.stem)


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
