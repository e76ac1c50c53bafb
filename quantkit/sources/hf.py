"""A local Hugging Face folder: config.json and one or many safetensors shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from quantkit.errors import SourceError
from quantkit.sources.base import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
# Keys that libraries write into JSON companions and that hold the path a model was loaded from.
LOCAL_KEYS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "tokenizer_file",
        "vocab_file",
        "is_local",
        "local_files_only",
    }
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class SafetensorsFolder:
    """The tensors of a folder's safetensors shards. Headers are read at once: a broken shard shows before any work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard_of: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards():
            self._read_header(shard)
        self._check_index()

    def shards(self) -> list[Path]:
        """Shard files in order. Raises SourceError where there are none or one is missing."""
        if (self.folder / INDEX_NAME).is_file():
            names = sorted(set(self._index().values()))
        elif (self.folder / SINGLE_NAME).is_file():
            names = [SINGLE_NAME]
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if not names:
                raise SourceError(f"{self.folder}: no safetensors file in this folder")
        for name in names:
            if Path(name).name != name:
                raise SourceError(f"{self.folder / INDEX_NAME}: names a shard outside the folder: {name}")
            if not (self.folder / name).is_file():
                raise SourceError(f"{self.folder}: shard {name} is missing; download the folder again")
        return [self.folder / name for name in names]

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor."""
        try:
            with safe_open(self.shard_of[name], framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{self.shard_of[name]}: cannot read {name}: {error}") from error

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX_NAME
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise SourceError(f"{path}: has no weight_map from tensor names to file names")
        return weight_map

    def _check_index(self) -> None:
        if (self.folder / INDEX_NAME).is_file():
            for name, shard in self._index().items():
                if name not in self.tensors:
                    raise SourceError(f"{self.folder / shard}: the index says it holds {name}, but it does not")

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in self.shard_of:
                        raise SourceError(f"{shard}: {name} is also in {self.shard_of[name].name}")
                    header = opened.get_slice(name)
                    shape, stored_as = tuple(header.get_shape()), header.get_dtype()
                    width = _DTYPES[stored_as].itemsize if stored_as in _DTYPES else 1
                    self.shard_of[name] = shard
                    self.tensors[name] = TensorInfo(shape, stored_as, width * int(torch.Size(shape).numel()))
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{shard}: broken or cut short ({error}); download it again") from error


class FolderSource:
    """What every Hugging Face folder has, however its weights are stored."""

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        self.path = folder
        self.label = label or folder.resolve().name
        self._trust_remote_code = trust_remote_code
        self.config = load_config(folder, trust_remote_code)
        self.stored = SafetensorsFolder(folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, self._trust_remote_code)

    def weight_files(self) -> Sequence[Path]:
        return self.stored.shards()

    def config_dict(self) -> dict[str, Any]:
        config = publishable_config(read_json(self.path / "config.json"))
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def copy_companions(self, folder: Path) -> None:
        copy_companions(self.path, folder)


class HfSource(FolderSource):
    """A Hugging Face folder of full-precision weights."""

    kind = "hf"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self.dtype = stored_dtype(self.stored.tensors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.stored.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.stored.read(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: holds no JSON object")
    return content


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The folder's config. Raises SourceError."""
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no model here (it has no config.json)")
    if "model_type" not in read_json(folder / "config.json"):
        raise SourceError(f"{folder / 'config.json'}: has no model_type, so this is no transformers model")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises on values it does not like
        raise SourceError(f"{folder / 'config.json'}: {first_line(error)}") from error
    return config


def load_tokenizer(folder: Path, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises SourceError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise SourceError(f"{folder}: cannot load its tokenizer: {first_line(error)}") from error
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for a one-line report."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """float16 or bfloat16 as most bytes of the float tensors are stored; float16 for float32 sources."""
    sizes = {"F16": 0, "BF16": 0}
    for info in tensors.values():
        if info.stored_as in sizes:
            sizes[info.stored_as] += info.bytes
    return torch.bfloat16 if sizes["BF16"] > sizes["F16"] else torch.float16


def publishable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without local paths, that readers before transformers 5 understand too.

    transformers 5 keeps the rope base in rope_parameters; transformers 4 reads only a top-level rope_theta and takes
    10000 without a word where it is missing.
    """
    cleaned = {key: value for key, value in config.items() if key not in LOCAL_KEYS}
    rope = cleaned.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        cleaned.setdefault("rope_theta", rope["rope_theta"])
    return cleaned


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence; JSON files lose keys that hold local paths."""
    for name in COMPANIONS:
        path = source / name
        if not path.is_file():
            continue
        if name in ("tokenizer_config.json", "generation_config.json"):
            content = {key: value for key, value in read_json(path).items() if key not in LOCAL_KEYS}
            if content.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 does not know this name
                content["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / name)
    for path in sorted((source / "additional_chat_templates").glob("*.jinja")):
        target = folder / "additional_chat_templates"
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)
