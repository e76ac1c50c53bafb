"""What lies beside the weights: the two copies of the label, the tokenizer, and metadata that must not say where."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.containers.hf.read import LOCAL_KEYS, unused_beyond
from quantkit.errors import SourceError, first_line
from quantkit.runs.atomic import read_json, read_text
from quantkit.runs.limits import check_rendered, template_limit
from quantkit.runs.links import foreign_files
from quantkit.runs.panics import panics_as
from quantkit.verbs.verify.findings import Findings, listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# What decides how a file is read, and what a reader takes where it is not said.
_DECIDING: dict[str, Any] = {
    "bits": None,
    "group_size": None,
    "sym": None,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "lm_head": False,
    "dynamic": None,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
_PROBE = "The quick brown fox, 12 days later."

# Text that a model is made of, not about: words in it are nobody's path.
_NOT_METADATA = ("tokenizer.json", "vocab.json", "added_tokens.json")
_TEXTS = ("chat_template", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_PLACES = "home|Users|root|tmp|mnt|media|workspace|scratch|private|var|opt|srv|content|kaggle|data|notebooks"
_PATH = re.compile(
    rf"(?<![\w:/.~\\-])(?:/(?:{_PLACES})/[\w.~-]|~/[\w.])[^\s\"'<>|]*"  # not the path of an address
    r"|file://[^\s\"']+"
    r"|(?<![\w])[A-Za-z]:[\\/](?![\\/])[^\s\"']+"
    r"|\\\\[\w.-]+\\[^\s\"']+"
)
# In a card, which tells people where to put things, only what names somebody.
_HOME = re.compile(r"(?<![\w:/.~\\-])/(?:home|Users)/[\w.][^\s\"'<>|)]*|[A-Za-z]:\\Users\\[^\s\"']+|file://[^\s\"')]+")
# Names that say nothing of a person.
_COMMON = {"root", "user", "admin", "ubuntu", "debian", "runner", "nobody", "default", "data", "model", "jovyan"}


def check_copies(folder: Path, config: Mapping[str, Any], found: Findings) -> None:
    """``quantization_config`` of config.json and quantize_config.json must say the same."""
    path = folder / "quantize_config.json"
    one = config.get("quantization_config")
    if not isinstance(one, dict):
        found.problem("config.json has no quantization_config, so transformers takes the model for unquantized; add it")
        return
    if not path.is_file():
        found.problem("quantize_config.json is missing, which AutoGPTQ reads; copy quantization_config of config.json")
        return
    other = read_json(path)
    for key in sorted({*one, *other, *_DECIDING}):
        default = _DECIDING.get(key)
        here, there = one.get(key, default), other.get(key, default)
        same = here == there and type(here) is type(there)
        if not same and (key in _DECIDING or (key in one and key in other)):
            found.problem(
                f"{key} is {here!r} in config.json's quantization_config and {there!r} in {path.name}; "
                "make both the same"
            )
    if alone := sorted((one.keys() ^ other.keys()) - _DECIDING.keys()):
        found.note(f"only one of the two quantization configs has {listed(alone)}")


def check_ids(folder: Path, config: PretrainedConfig, found: Findings) -> None:
    """Special ids of config and generation config must be below the vocabulary's size."""
    size = int(config.get_text_config().vocab_size)
    places: dict[str, Mapping[str, Any]] = {"config.json": config.get_text_config().to_dict()}
    if (folder / "generation_config.json").is_file():
        places["generation_config.json"] = read_json(folder / "generation_config.json")
    for place, content in places.items():
        for key in _IDS:
            ids = content.get(key)
            for number in ids if isinstance(ids, list) else [ids]:
                if number is not None and (type(number) is not int or not -1 <= number < size):
                    found.problem(f"{place}: {key} is {number!r}, the model has ids 0 to {size - 1}; correct it")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, found: Findings) -> None:
    """Its ids must be among the model's, text must survive it, its chat template must render."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        found.problem("the tokenizer has no tokens; copy that of the model it was made from")
        return
    unused = unused_beyond(tokenizer, vocabulary)
    if unused:
        found.note(
            f"the tokenizer has {listed(list(unused.values()))} beyond the {vocabulary} ids that the model embeds, "
            "which no usual text gives"
        )
    if any(number >= vocabulary and number not in unused for number in tokenizer.get_vocab().values()):
        found.problem(
            f"the tokenizer has ids up to {highest}, the model embeds {vocabulary}; it is another model's, or the "
            "embedding was not extended"
        )
    for role, token in tokenizer.special_tokens_map.items():
        for one in token if isinstance(token, list) else [token]:
            number = tokenizer.get_vocab().get(str(one))
            if number in unused:
                continue
            if number is None or not 0 <= number < vocabulary:
                found.problem(f"the tokenizer's {role} {one!r} has id {number}, which the model does not embed")
    with panics_as(SourceError, "an English sentence cannot be taken apart"):
        ids = tokenizer(_PROBE)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not ids or not str(text).strip():
        found.problem("the tokenizer gives nothing for an English sentence; copy that of the model it was made from")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _PROBE}]
        try:
            with template_limit():
                rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            check_rendered(rendered, len(_PROBE))
        except Exception as error:  # a template is the model's own program and may raise anything
            found.problem(f"the chat template cannot be rendered: {first_line(error)}; copy that of the source model")
            return
        if _PROBE not in rendered:
            found.problem("the chat template leaves the user's words out; copy that of the source model")


def check_links(folder: Path, found: Findings) -> None:
    """Links that lead out of the folder to what is no part of a model: a copy of the folder would hold that."""
    for path in foreign_files(folder):
        found.problem(
            f"{path.relative_to(folder)} is a link to outside the folder, to something that is no part of a model; "
            "remove it, or put a copy in its place"
        )


# -- local paths -----------------------------------------------------------------------------------------------------


def check_folder_paths(folder: Path, found: Findings) -> None:
    """No local path or user name in the JSON files, tables, cards and lists of a folder."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name in _NOT_METADATA:
            continue
        with found.guard(path.name):
            if path.suffix == ".json":
                check_strings(path.name, _strings(read_json(path)), found)
            elif path.suffix in (".csv", ".md", ".yaml", ".yml") or path.name == "SHA256SUMS":
                lines = enumerate(read_text(path).splitlines(), 1)
                pattern = _HOME if path.suffix == ".md" else _PATH
                check_strings(path.name, ((f"line {number}", line) for number, line in lines), found, pattern)


def check_metadata_paths(file: str, metadata: Mapping[str, Any], found: Findings) -> None:
    """The same of a weight file's own keys; a vocabulary is none of them."""
    check_strings(file, _strings({k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}), found)


def check_strings(
    file: str, strings: Iterator[tuple[str, str]], found: Findings, pattern: re.Pattern[str] = _PATH
) -> None:
    """Report every string that holds a path of some machine, or this machine's user."""
    person = _person()
    for place, text in strings:
        match = pattern.search(text) or (person.search(text) if person else None)
        # ``owner/name`` of the Hub is no path.
        is_path = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or "\\" in text
        if match or (is_path and place.rsplit(".", 1)[-1] in LOCAL_KEYS):
            shown = match[0] if match else text
            found.problem(f"{file}: {place} holds {shown!r}, a local path or user name; remove it before publishing")


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a JSON value with its place; keys count too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, place)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _TEXTS:
                yield f"{place} (key)" if place else "a key", str(key)
                yield from _strings(item, f"{place}.{key}" if place else str(key))


def _person() -> re.Pattern[str] | None:
    """This machine's user and home folder as whole words; not as the owner of a repository."""
    try:
        user, home, names = getpass.getuser(), str(Path.home()), []
    except (KeyError, OSError, RuntimeError):  # a user without an entry
        return None
    if len(user) > 3 and user.lower() not in _COMMON:
        names.append(rf"(?<![\w/@.-]){re.escape(user)}(?![\w/@.-])")
    if home.count("/") > 1 or Path(home).name.lower() not in _COMMON:
        names.append(rf"(?<![\w:/.]){re.escape(home)}(?![\w.-])")
    return re.compile("|".join(names)) if names and len(home) > 1 else None
