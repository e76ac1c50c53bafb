"""Values of options: their types, how they are read, and what is refused before anything heavy is imported."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, Field

from quantkit.errors import UsageError, meant

GgmlType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
"""Types on whose grids GPTQ runs."""
FILE_TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_k", "q2_k_s", "q3_k", "q4_k", "q5_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"),
    *("q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
    *("iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
)
"""llama.cpp's mixtures; a test holds them against `containers.gguf.recipes`, which would need transformers here."""

DATA_NAMES = (
    *("evol-instruct-sample", "evol-instruct-sample:heldout", "evol-instruct-70k", "evol-instruct-v2"),
    *("alpaca", "c4", "wikitext2"),
)
"""Data sets that have a name here; a test holds them against `tokens.datasets`."""

_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".md", ".raw", ".gz")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_OWNERS = ("models", "datasets", "spaces")  # the Hub gives these names to nobody
_WIKITEXT2 = "wikitext2"


# -- sizes, times, numbers ---------------------------------------------------------------------------------------------


def parse_size(size: str | int, option: str = "max-shard-size") -> int:
    """Bytes of "500MB", "5GB" (powers of ten, as the Hub counts) or a number. Raises UsageError."""
    try:
        return _bytes(size)
    except ValueError as error:
        raise UsageError(f"--{option} {size}: {error}") from None


def _bytes(size: str | int) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError("give a size such as 5GB or 500MB")
    return value


def _sized(size: str | int) -> str | int:
    _bytes(size)
    return size


def _tokens(number: str | int) -> str | int:
    text = str(number).strip().lower()
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise ValueError("give a number of tokens such as 8192, or all")
    return text if text == "all" else int(text)


@dataclass(frozen=True)
class Every:
    """How often hidden states are kept: after so many seconds, or so many blocks; never where both are None."""

    seconds: float | None = None
    blocks: int | None = None

    def due(self, since: float, blocks: int) -> bool:
        """Whether they are, that long and that many blocks after the last time."""
        if self.blocks is not None:
            return blocks >= self.blocks
        return self.seconds is not None and since >= self.seconds


def parse_every(text: str) -> Every:
    """``10m`` (or s, h), a number of blocks such as ``4``, or ``off``. Raises UsageError."""
    if text == "off":
        return Every()
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"--checkpoint-every {text}: give minutes such as 10m, a number of blocks such as 4, or off")
    number = int(found[1])
    return Every(seconds=number * {"s": 1, "m": 60, "h": 3600}[found[2]]) if found[2] else Every(blocks=number)


def _timed(text: str) -> str:
    parse_every(text)
    return text


def _codable(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError("give 2, 3, 4 or 8")
    return bits


def _grouped(columns: int) -> int:
    if columns != -1 and (columns <= 0 or columns % 8):
        raise ValueError("give -1 (one group a row) or a positive multiple of 8")
    return columns


def _divergence(nats: float) -> float:
    if not 0 <= nats < math.inf:
        raise ValueError("give a divergence in nats, such as 0.05")
    return nats


# -- names of things ---------------------------------------------------------------------------------------------------


# Who mistypes a file's name does not want the Hub to be asked for it.
_FILE_SUFFIXES = (".gguf", ".ggml", ".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".onnx", ".json", ".zip")


def looks_like_id(name: str) -> bool:
    """Whether `name` has the form owner/name of the Hub, is not that of a file, and its owner is no folder here."""
    owner = name.partition("/")[0]
    formed = bool(_ID.fullmatch(name)) and ".." not in name and not name.lower().endswith(_FILE_SUFFIXES)
    return formed and owner not in _NO_OWNERS and not os.path.isdir(owner)


def check_model(name: str | Path) -> None:
    """Refuse what is neither a path that exists nor may be a Hub id. Raises UsageError."""
    path = Path(name).expanduser()
    if path.exists() or looks_like_id(str(name)):
        return
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = meant(path.name, beside)
    raise UsageError(f"{name}: no such file or folder, and not a Hub id (owner/name){near}")


def check_data(spec: str) -> str:
    """Calibration data as it was given. Raises UsageError for what can only be a file, and is not there."""
    parts = [spec] if os.path.isfile(spec) else [re.sub(r":[\d.]+$", "", part.strip()) for part in spec.split(",")]
    for part in parts:
        name = part.partition(":")[0]
        is_path = name.lower().endswith(_DATA_SUFFIXES) or name.startswith(("/", ".", "~")) or name.count("/") > 1
        if is_path and not os.path.exists(part):
            raise no_data(part)
    return spec


def no_data(spec: str) -> UsageError:
    """The error of a data set that nothing is known of."""
    return UsageError(
        f"no such data: {spec!r} is neither a file nor a known name ({', '.join(DATA_NAMES)}) "
        "nor a Hub data set (owner/name or owner/name:file)"
    )


def is_wikitext2(text: str) -> bool:
    """Whether an evaluation text is WikiText-2, or a local copy of it: ``wikitext2``, ``wikitext2:FILE``."""
    return text.partition(":")[0] == _WIKITEXT2


def default_seq_len(text: str) -> int:
    """Tokens a window where the user names none: 2048 for the papers' WikiText-2 protocol, else 512."""
    return 2048 if is_wikitext2(text) else 512


def gptq_type(recipe: str) -> GgmlType:
    """The type of most Linears of a mixture that GPTQ can run on. Raises UsageError for others."""
    types = {name: re.sub(r"_K_[SML]$", "_K", name.upper()) for name in FILE_TYPES}
    known: dict[str, GgmlType] = {name: held for name, held in types.items() if held in get_args(GgmlType)}  # type: ignore[misc]
    if recipe not in known:
        rounded = f"; `quantkit ggml --type {recipe}` rounds to it" if recipe in FILE_TYPES else ""
        raise UsageError(f"--ggml {recipe}: GPTQ goes to {', '.join(known)}{rounded}")
    return known[recipe]


def _on_grid(recipe: str) -> str:
    gptq_type(recipe)
    return recipe


def _file_type(name: str) -> str:
    if name not in ("auto", *FILE_TYPES):
        raise ValueError(f"choose auto, {', '.join(FILE_TYPES)}")
    return name


def _kind(name: str) -> str:
    own = (kind for kind in FILE_TYPES if kind not in ("iq2_m", "iq3_xs", "iq3_m"))
    kinds = list(dict.fromkeys(re.sub(r"_k_[sml]$", "_k", kind) for kind in own))
    if name not in ("auto", *kinds):
        raise ValueError(f"choose auto, {', '.join(kinds)}")
    return name


def _device(name: str) -> str:
    if re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", name) is None:
        raise ValueError("not a device to run on; use auto, cpu, cuda or cuda:N")
    return name


def _named_folders(given: Any) -> Any:
    """``NAME=DIR`` texts as a mapping."""
    if not isinstance(given, tuple | list) or not all(isinstance(one, str) for one in given):
        return given
    pairs = [(text, *text.partition("=")) for text in given]
    for text, name, equals, folder in pairs:
        if not (name and equals and folder):
            raise UsageError(f"--with-branch {text}: write NAME=DIR")
    return {name: Path(folder) for _, name, _, folder in pairs}


# The command line takes the first type of a union.
Name = str | Path
"""What a model is opened by: folder, file or Hub id."""
Place = Path | str
Size = Annotated[str | int, AfterValidator(_sized)]
"""Such as "5GB", or bytes."""
Interval = Annotated[str, AfterValidator(_timed)]
TokenCount = Annotated[str | int, AfterValidator(_tokens)]
"""A number, or "all"."""
Natural = Annotated[int, Field(ge=1)]
Divergence = Annotated[float, AfterValidator(_divergence)]
SeqLen = Annotated[int, Field(ge=8)]
Bits = Annotated[int, AfterValidator(_codable)]
"""Checkpoints hold 2, 3, 4 and 8; blocks of GGML's types also 5 and 6."""
GroupSize = Annotated[int, AfterValidator(_grouped)]
DeviceName = Annotated[str, AfterValidator(_device)]
FileType = Annotated[str, AfterValidator(_file_type)]
KindName = Annotated[str, AfterValidator(_kind)]
"""A type of matrices."""
GridType = Annotated[str, AfterValidator(_on_grid)]
Folders = Annotated[Mapping[str, Place], BeforeValidator(_named_folders)]


@runtime_checkable
class DrawnWindows(Protocol):
    """Windows made beforehand: `quantkit.tokens.TokenMatrix`, which would need torch here."""

    @property
    def tokens(self) -> Any: ...

    @property
    def provenance(self) -> Any: ...
