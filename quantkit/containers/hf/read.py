"""A local Hugging Face folder: config.json, one or many weight files, and what lies beside them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.containers.hf.pickled import PickledFiles
from quantkit.containers.hf.shards import SafetensorsFiles, WeightFiles
from quantkit.containers.source import Source, TensorInfo
from quantkit.errors import SourceError, first_line, shortened
from quantkit.late import torch, transformers
from quantkit.runs.atomic import check_readable, read_json, read_text
from quantkit.runs.links import first_pipe, is_foreign
from quantkit.runs.panics import panics_as
from quantkit.runs.places import READ_BY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Names, or patterns of them.
OF_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json"),
)
COMPANIONS = (
    *OF_TOKENIZERS,
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json"),
    *("LICENSE", "LICENSE.txt", "NOTICE"),
)
_OF_CODES = ("quantization_config", "quantization")  # of config.json; the second is MLX's
_GPTQ_LABEL = "add the quantize_config.json that belongs to them, with bits, group_size, sym and desc_act"
_OTHER_LABEL = "config.json has no quantization_config; take that of the repository they are from"
# The last part of a tensor's name that only quantized weights have.
_PACKED = {
    "qweight": _GPTQ_LABEL,
    **dict.fromkeys(("weight_packed", "weight_scale", "weight_scale_inv", "SCB", "absmax", "quant_map"), _OTHER_LABEL),
    **dict.fromkeys(("W_q", "q_weight", "codebooks", "_data"), _OTHER_LABEL),  # HQQ, ExLlamaV2, AQLM, Quanto
}
# Parts of names that PEFT gives to what an adapter adds, and to the weights below it.
_ADAPTED = {"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "ia3_l", "hada_w1_a"}
_WIDE, _NARROW = ("F64", "F32"), ("F16", "BF16", "F8_E4M3", "F8_E5M2")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tekken.json")
# Long enough for a pattern that looks back without end to be told before the work.
_TRIED = "the quick brown fox jumps over the lazy dog " * 20
# Keys that libraries write into JSON companions and that hold the path a model was loaded from.
LOCAL_KEYS = {
    *("_name_or_path", "_model_name_or_path", "name_or_path", "tokenizer_file", "vocab_file"),
    *("is_local", "local_files_only"),
}


class FolderSource(Source):
    """What every Hugging Face folder has, however its weights are stored. `dtype` is that of what is stored."""

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        self.path = folder
        self.label = label or folder.resolve().name
        self.trusts_code = trust_remote_code
        self.model_type = check_config(folder)
        self.stored = open_weights(folder)
        self.float32 = in_float32(self.stored.tensors)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        beside = [*companions(folder), *_templates(folder), *code_files(folder)]
        self.left_out = tuple(
            f"{path}: is a link to outside the folder, and is left out; put a copy in its place"
            for path in dict.fromkeys(beside)
            if is_foreign(path, folder)
        )

    @cached_property
    def config(self) -> PretrainedConfig:
        return load_config(self.path, self.trusts_code)

    @cached_property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.stored.tensors)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path, self.trusts_code)
        return self._tokenizer

    def weight_files(self) -> Sequence[Path]:
        return self.stored.shards()

    def config_dict(self) -> dict[str, Any]:
        config = {k: v for k, v in read_json(self.path / "config.json").items() if k not in _OF_CODES}
        return publishable_config(config, type(self.config))

    def copy_companions(self, folder: Path) -> None:
        copy_companions(self.path, folder)


class HfSource(FolderSource):
    """A Hugging Face folder of full-precision weights. Raises SourceError for codes that no label explains."""

    kind = "hf"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        check_plain(folder, self.stored.tensors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.stored.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.stored.read_rows(name, start, stop)


def check_plain(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises SourceError for what no model in full precision has: codes that nothing explains, parts of an adapter."""
    for name, info in tensors.items():
        parts = name.split(".")
        codes = parts[-1] == "weight" and info.stored_as[0] in "IU" and len(info.shape) > 1
        if codes or parts[-1] in _PACKED:
            raise SourceError(
                f"{folder}: holds quantized weights ({name}), but nothing says how they are to be read: "
                f"{_PACKED.get(parts[-1], _OTHER_LABEL)}"
            )
        if not _ADAPTED.isdisjoint(parts) or parts[:2] == ["base_model", "model"]:
            raise SourceError(
                f"{folder}: holds parts of an adapter ({name}) among its weights; merge them first (PEFT's "
                "merge_and_unload), and save the model that comes of it"
            )


def open_weights(folder: Path) -> WeightFiles:
    """The folder's weights: safetensors where there are any, else pytorch_model.bin. Raises SourceError."""
    if not SafetensorsFiles.present(folder) and PickledFiles.present(folder):
        return PickledFiles(folder)
    return SafetensorsFiles(folder)


def quantization_of(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization: in config.json, or before 2024 in quantize_config.json; {} if nothing.

    MLX's has no `quant_method`, and another key: it is "mlx" here.

    Raises:
        SourceError: neither is readable.
    """
    config = read_json(folder / "config.json")
    found: Any = config.get("quantization_config")
    of_mlx = config.get("quantization")
    if isinstance(of_mlx, dict) and not (isinstance(found, dict) and "quant_method" in found):
        return {"quant_method": "mlx", **of_mlx}
    if found is None and (folder / "quantize_config.json").is_file():
        found = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    return found if isinstance(found, dict) else {} if found is None else {"quant_method": found}


def check_config(folder: Path) -> str:
    """The model_type of a folder's config. Raises SourceError for what can be seen of it without transformers."""
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no model here (it has no config.json)")
    content = read_json(folder / "config.json")
    model_type = content.get("model_type")
    if model_type is None:
        raise SourceError(f"{folder / 'config.json'}: has no model_type, so this is no transformers model")
    if not isinstance(model_type, str):
        raise SourceError(f"{folder / 'config.json'}: model_type is {shortened(str(model_type))}, not a name")
    check_counts(content, folder / "config.json")
    return model_type


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The folder's config. Raises SourceError."""
    model_type = check_config(folder)
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises on values it does not like
        if model_type not in transformers.CONFIG_MAPPING and not trust_remote_code:
            _refuse_code(folder / "config.json", error)
        raise SourceError(f"{folder / 'config.json'}: {shortened(first_line(error), 500)}") from error
    return config


_COUNTS = re.compile(r"(?:^|_)(?:n|num)_?(?:[a-z]+_)*(layer|expert)s?$")
_MOST = {"layer": 10_000, "expert": 10_000}  # twenty times what the largest models have


def check_counts(content: Mapping[str, Any], place: Path, most: Mapping[str, int] = _MOST) -> None:
    """Refuse a config that has a class build more layers, or experts of a layer, than can be. Raises SourceError."""
    for key, value in content.items():
        found = _COUNTS.search(str(key))
        if isinstance(value, dict):
            check_counts(value, place, most)
        elif found and isinstance(value, int | float) and value > most[found[1]]:
            raise SourceError(f"{place}: {key} is {value}, but there can be {most[found[1]]} at most; it is damaged")


def load_tokenizer(folder: Path, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises SourceError."""
    if "gguf_file" not in options and not trust_remote_code:
        check_vocabulary(folder)
    if "gguf_file" not in options:
        if (pipe := first_pipe(folder)) is not None:
            raise SourceError(f"{pipe}: is no file, so it is not opened; remove it, or download the folder again")
        check_sizes(folder)
        options |= _empty_tokens(folder)
    try:
        with panics_as(SourceError, str(folder)):
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
            tokenizer(_TRIED)
    except SourceError:
        raise
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        if not trust_remote_code:
            _refuse_code(folder / "tokenizer_config.json", error)
        raise SourceError(f"{folder}: cannot load its tokenizer: {first_line(error)}") from error
    if any(is_foreign(path, folder) for path in _templates(folder)):
        own = folder / "tokenizer_config.json"
        tokenizer.chat_template = read_json(own).get("chat_template") if own.is_file() else None
    beside = folder / "chat_template.json"  # which processors read, and llama.cpp's converter
    if not tokenizer.chat_template and beside.is_file() and not is_foreign(beside, folder):
        held = read_json(beside).get("chat_template")
        tokenizer.chat_template = held if isinstance(held, str) else None
    if (folder / "added_tokens.json").is_file() and not (folder / "tokenizer.json").is_file():
        _check_added(folder / "added_tokens.json", tokenizer)
    return tokenizer


def check_vocabulary(folder: Path) -> None:
    """Raises SourceError where the files of a tokenizer are missing.

    For some model types transformers makes up a vocabulary of a few tokens where there is none.
    """
    names = {path.name for path in folder.iterdir()}
    if not has_tokenizer(folder):
        raise SourceError(
            f"{folder}: has no tokenizer (none of {', '.join(_VOCABULARIES)}); copy that of the model it was made from"
        )
    if "vocab.json" in names and not {"merges.txt", *_VOCABULARIES[:2]} & names:
        raise SourceError(f"{folder}: has a tokenizer's vocab.json, but the merges.txt that belongs to it is missing")


def check_sizes(folder: Path) -> None:
    """Refuse what a model is read by, beside its weights, where it would fill the memory. Raises SourceError."""
    for path in sorted(folder.iterdir()):
        if READ_BY.search(path.name) and path.is_file():
            check_readable(path)


def _templates(folder: Path) -> list[Path]:
    """Files of chat templates, which transformers takes as they are."""
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [path for path in (folder / "chat_template.jinja", *named) if path.is_file()]


def _empty_tokens(folder: Path) -> dict[str, None]:
    """Special tokens that are empty strings, to be taken for none; transformers would look for them without end.

    Raises:
        SourceError: BOS or EOS is one: a model whose texts begin or end without it is another one.
    """
    empty: dict[str, None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in read_json(folder / name).items() if (folder / name).is_file() else ():
            if not key.endswith("_token") or (token.get("content") if isinstance(token, dict) else token) != "":
                continue
            if key in ("bos_token", "eos_token"):
                raise SourceError(
                    f'{folder / name}: {key} is ""; write the token there (a LLaMA has "<s>" and "</s>"), or null '
                    "where the model has none"
                )
            empty[key] = None
    return empty


def _check_added(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers numbers added tokens anew where they do not follow the vocabulary. Raises SourceError."""
    for token, number in read_json(path).items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise SourceError(
                f"{path}: {token!r} has the id {number} here, and {found} once transformers has read the folder; put a "
                "tokenizer.json that holds it beside it, or name the unused ids in between there too"
            )


def unused_beyond(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Special tokens with ids that a model of `size` embedded ids lacks, and that nothing asks for: as Gemma 3's image
    token in its text models. None that has a role, that every text gets, or that a chat template writes."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    beyond = {number: str(token) for number, token in added.items() if number >= size and token.special}
    if not beyond:
        return {}
    roles = {getattr(tokenizer, role, None) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    template: Any = tokenizer.chat_template or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else template
    always = set(tokenizer("a").input_ids)
    return {n: token for n, token in beyond.items() if token not in roles and token not in written and n not in always}


def _refuse_code(path: Path, error: Exception) -> None:
    """Where a JSON file asks for code of its own, that is what has failed. Raises SourceError."""
    classes = read_json(path).get("auto_map") if path.is_file() else None
    if classes:
        files = sorted({f"{module}.py" for module in re.findall(r"(\w+)\.\w+", json.dumps(classes))})
        raise SourceError(
            f"{path}: asks for code that comes with the model ({', '.join(files)}), which was not run; read it, then "
            "give --trust-remote-code"
        ) from error


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """float16 or bfloat16 as most bytes of the float tensors are stored; float16 for float32 sources."""
    half, brain = (sum(info.bytes for info in tensors.values() if info.stored_as == kind) for kind in ("F16", "BF16"))
    return torch.bfloat16 if brain > half else torch.float16


def in_float32(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the float32 tensors, where most bytes of floats are in half precision or less; else none."""
    sizes = {True: 0, False: 0}
    for info in tensors.values():
        if info.stored_as in _WIDE + _NARROW:
            sizes[info.stored_as in _NARROW] += info.bytes
    return frozenset(n for n, i in tensors.items() if i.stored_as == "F32" and sizes[True] > sizes[False])


def publishable_config(config: dict[str, Any], read_by: type[PretrainedConfig]) -> dict[str, Any]:
    """A config.json without local paths, that readers before transformers 5 understand too.

    transformers 5 keeps all about rotary embeddings in rope_parameters; transformers 4 reads keys beside it, and takes
    its defaults without a word where they are missing. They are written where the config's class reads the same with
    them: one that is newer than these keys may take them for layers without parameters.
    """
    cleaned = {key: value for key, value in config.items() if key not in LOCAL_KEYS}
    widened = _with_older_keys(cleaned)
    try:
        same = _rope(read_by, widened) == _rope(read_by, cleaned)
    except Exception:  # whatever a config class raises on keys that it does not know
        same = False
    return widened if same else cleaned


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a model whose output embedding is stored, whatever it said."""
    inner = {key: untied(part) for key, part in config.items() if isinstance(part, dict) and _TIED in part}
    return {**config, **inner, _TIED: False}


_TIED = "tie_word_embeddings"
_NEXT_LAYERS = re.compile(r"(^|_)(mtp|nextn)(_|$).*(layers|modules)$")


def without_next_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a model that has no layers for the prediction of next tokens, whatever it said."""
    inner = {key: without_next_layers(part) for key, part in config.items() if isinstance(part, dict)}
    return {**config, **inner, **{key: 0 for key in config if _NEXT_LAYERS.search(key) and config[key]}}


def _rope(read_by: type[PretrainedConfig], config: dict[str, Any]) -> Any:
    """What a class makes of a config's rotary parameters."""
    with warnings.catch_warnings():  # of keys that it calls old
        warnings.simplefilter("ignore")
        return getattr(read_by.from_dict(deepcopy(config)), "rope_parameters", None)


def _with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys that transformers 4 reads."""
    cleaned = dict(config)
    rope = cleaned.get("rope_parameters")
    if isinstance(rope, dict) and {"full_attention", "sliding_attention"} <= rope.keys():  # Gemma 3
        cleaned.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
        rope = rope["full_attention"]
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return cleaned
    cleaned.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        cleaned.setdefault("rope_scaling", scaling)
    if "partial_rotary_factor" in rope:
        cleaned.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if cleaned.get("model_type") == "gpt_neox":  # which has names of its own for two of them
        cleaned.setdefault("rotary_emb_base", rope["rope_theta"])
        cleaned.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    return cleaned


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary of its own."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name in _VOCABULARIES or name.endswith(".tiktoken") for name in names)


def companions(folder: Path, names: Sequence[str] = COMPANIONS) -> list[Path]:
    """What of `names`, which may be patterns, lies in a folder."""
    return [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def code_files(folder: Path) -> list[Path]:
    """The Python files that its configs name for transformers (`auto_map`), and what these import beside them. What
    links that lead out of the folder import is not looked for."""
    named = [folder / "config.json", *(path for path in companions(folder) if path.name.endswith("_config.json"))]
    maps = json.dumps([read_json(path).get("auto_map") for path in named if path.is_file()])
    wanted, found = re.findall(r'\b(\w+)\.\w+"', re.sub(r'"[^"]*--[^"]*"', "", maps)), dict[str, Path]()
    while wanted:
        name = f"{wanted.pop()}.py"
        path = folder / name
        if name in found or not path.is_file():
            continue
        found[name] = path
        if not is_foreign(path, folder):
            text = read_text(path, "replace")
            wanted += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", text, re.MULTILINE)  # as transformers has it
    return [found[name] for name in sorted(found)]


def copy_companions(source: Path, folder: Path, names: Sequence[str] = COMPANIONS) -> None:
    """Copy companions, and with all of them the code that configs name; JSON files lose keys that hold local paths."""
    code = code_files(source) if names is COMPANIONS else []
    for path in (*companions(source, names), *code):
        name = path.name
        if is_foreign(path, source):
            continue
        if name.endswith("_config.json"):
            content = {key: value for key, value in read_json(path).items() if key not in LOCAL_KEYS}
            if content.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 does not know this name
                content["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / name)
    for path in _templates(source):
        if path.parent == source or is_foreign(path, source):
            continue
        target = folder / "additional_chat_templates"
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)
