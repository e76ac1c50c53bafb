"""Values of options: their types, how they are read, and what is refused before anything heavy is imported."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import ctypes
import errno
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, Field

from quantkit.errors import UsageError, meant
from quantkit.options.spec import Words

GgmlType = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"
]
"""Types on whose grids GPTQ runs."""
FILE_TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_k", "q2_k_s", "q3_k", "q4_k", "q5_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"),
    *("q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
    *("q2_0", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0"),
)
"""llama.cpp's mixtures; a test holds them against `containers.gguf.recipes`, which would need transformers here."""

DATA_NAMES = (
    *("evol-instruct-sample", "evol-instruct-sample:heldout", "evol-instruct-70k", "evol-instruct-v2"),
    *("alpaca", "c4", "wikitext2"),
)
"""Data sets that have a name here; a test holds them against `tokens.datasets`."""

PACKED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".zip", ".7z")
"""Of files that are packed, whatever they hold; a test holds them against `tokens.readers`."""

DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".md", ".raw", *PACKED_SUFFIXES)
"""Of files of records or text."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_DATA = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:@\s]+))?(?::(?P<path>.+))?"
)
"""A data set of the Hub: ``owner/name``, then maybe ``@REVISION``, then maybe ``:PATH``."""
_WEIGHTED = re.compile(r"(?P<data>.+):(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)
_NO_OWNERS = ("models", "datasets", "spaces")  # the Hub gives these names to nobody
_WIKITEXT2 = "wikitext2"
_KNOWN_DATA = re.compile(rf"(?<![^,\s])({'|'.join(sorted(DATA_NAMES, reverse=True))})(?=$|[:,])", re.IGNORECASE)


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


@dataclass(frozen=True)
class Allowance:
    """What codes may take: so many bits a weight of the quantized Linears, with scales, zeros and their order, or so
    many bytes of weight files with all that is in them."""

    bits_per_weight: float | None = None
    bytes: int | None = None


def parse_allowance(text: str | int) -> Allowance:
    """``4.5bpw``, or a size such as ``3GB``. Raises ValueError."""
    if found := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*bpw", str(text).strip().lower()):
        return Allowance(bits_per_weight=float(found[1]))
    try:
        return Allowance(bytes=_bytes(text))
    except ValueError:
        raise ValueError("give bits per weight such as 4.5bpw, or a size such as 900MB") from None


def allowances(text: str | int) -> tuple[str, ...]:
    """The parts of ``4.5bpw,3GB``, each as `parse_allowance` reads it, without spaces. Raises ValueError."""
    parts = tuple("".join(part.split()) for part in str(text).split(","))
    read = [parse_allowance(part) for part in parts]
    if len(set(read)) < len(read):
        raise ValueError("the same budget is given twice")
    return parts


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


NEVER = Every()
"""``off``."""


def parse_every(text: str) -> Every:
    """``10m`` (or s, h), a number of blocks such as ``4``, or ``off``. Raises UsageError."""
    if text == "off":
        return NEVER
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"--checkpoint-every {text}: give minutes such as 10m, a number of blocks such as 4, or off")
    number = int(found[1])
    return Every(seconds=number * {"s": 1, "m": 60, "h": 3600}[found[2]]) if found[2] else Every(blocks=number)


def _parsed(parse: Callable[[Any], object]) -> AfterValidator:
    """For values that stay as they are typed: `parse` refuses what it cannot read."""
    return AfterValidator(lambda value: (parse(value), value)[1])


def _must(hold: Callable[[Any], object], advice: str) -> AfterValidator:
    """For values that must `hold`; of others `advice` says what to give."""

    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError(advice)
        return value

    return AfterValidator(check)


def _one_of(*words: str) -> tuple[Words, AfterValidator]:
    """For texts that are one of the words."""

    def check(value: str) -> str:
        if value not in words:
            raise ValueError(f"choose {', '.join(words)}{meant(value, words)}")
        return value

    return Words(words), AfterValidator(check)


# -- names of things ---------------------------------------------------------------------------------------------------


# Who mistypes a file's name does not want the Hub to be asked for it.
_FILE_SUFFIXES = (".gguf", ".ggml", ".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".onnx", ".json", ".zip")


def looks_like_id(name: str) -> bool:
    """Whether `name` has the form owner/name of the Hub, not a file's, and its first part is no folder here."""
    owner = name.partition("/")[0]
    formed = bool(_ID.fullmatch(name)) and ".." not in name and not name.lower().endswith(_FILE_SUFFIXES)
    return formed and owner not in _NO_OWNERS and not os.path.isdir(owner)


def _can_be(path: str | Path) -> bool:
    """Whether a file may have this name: not where it is empty, too long, has a zero byte, or begins with nobody's
    home."""
    if not str(path):
        return False
    try:
        os.lstat(Path(path).expanduser())
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except (RuntimeError, ValueError):
        return False
    return True


def check_folder_name(out: str | Path | None) -> None:
    """Refuse a file's name for what will be a folder, unless there is a folder of it. Raises UsageError."""
    if out is None or os.path.isdir(os.path.expanduser(out)):
        return
    if str(out).lower().endswith((*_FILE_SUFFIXES, ".jsonl", ".html", ".pdf", ".yaml")):
        raise UsageError(f"--out {out} is a file's name, and a folder is written; name a folder")


def check_model(name: str | Path) -> None:
    """Refuse what is neither a path that exists nor may be a Hub id. Raises UsageError."""
    path = Path(name).expanduser()
    if path.exists() or looks_like_id(str(name)):
        return
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = meant(path.name, beside)
    raise UsageError(f"{name}: no such file or folder, and not a Hub id (owner/name){near}")


NO_GPU = "this machine's torch sees no CUDA GPU; use --device cpu"


def check_device(device: str) -> None:
    """Refuse a GPU where there is no driver of one, which torch would only find after seconds. Raises UsageError."""
    if device.startswith("cuda") and not has_driver():
        raise UsageError(f"--device {device}: {NO_GPU}")


def has_driver() -> bool:
    """False where torch cannot find a GPU that it calls cuda: neither NVIDIA's library nor AMD's device is there."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_data(spec: str) -> str:
    """Calibration data as it was given. Raises UsageError for a mixture that is none, and for names of nothing."""
    for data, _ in parse_mixture(spec):
        check_dataset(data)
    return spec


def check_dataset(spec: str) -> None:
    """Refuse what is neither a file nor a known name nor has the form of a Hub data set's. Raises UsageError."""
    name, colon, file = spec.partition(":")
    if os.path.isfile(spec) or spec in DATA_NAMES:
        return
    if os.path.isdir(spec):
        raise UsageError(f"{spec} is a folder: give one file")
    if colon and name in DATA_NAMES:
        if not os.path.isfile(file):
            raise UsageError(f"{spec}: there is no file {Path(file)}; {name} alone is taken from the Hub")
    elif not HUB_DATA.fullmatch(spec) or name.lower().endswith(DATA_SUFFIXES):
        raise no_data(spec)  # a mistyped local path must not reach for the network


def parse_mixture(spec: str) -> tuple[tuple[str, float], ...]:
    """Take a calibration spec apart into (data, weight) pairs.

        calibration := data | data:weight,data:weight[,...]
        data        := FILE | NAME | NAME:FILE | OWNER/NAME[@REVISION][:PATH]
        weight      := a positive decimal number, such as 0.7, .3 or 2

    A comma makes a mixture: each part's weight stands after its last colon, and only the ratio of the weights counts.
    Without a comma nothing is read as a weight. An existing file whose name holds a comma is one data set, by itself
    or as the FILE of a known NAME; in a mixture it has no place.

    Raises:
        UsageError: a part that is empty, has no weight or a weight of 0, or is named twice.
    """
    name, _, file = spec.partition(":")
    if "," not in spec or os.path.isfile(spec) or (name in DATA_NAMES and os.path.isfile(file)):
        return ((spec, 1.0),)
    parts = []
    for part in spec.split(","):
        match = _WEIGHTED.fullmatch(part.strip())
        if not match:
            raise UsageError(f"calibration: {part.strip()!r} has no weight; write a mixture as A:0.7,B:0.3")
        weight = float(match["weight"])
        if not 0 < weight < math.inf:
            raise UsageError(f"calibration: the weight of {match['data']} must be a number above 0, not {weight:g}")
        parts.append((match["data"], weight))
    names = [data for data, _ in parts]
    twice = next((data for data in names if names.count(data) > 1), None)
    if twice is not None:
        raise UsageError(f"calibration: {twice} is in the mixture twice; add up its weights")
    return tuple(parts)


def _known_data(spec: str) -> str:
    """With the names of data sets as they are spelled, in whatever case they are typed."""
    return spec if os.path.exists(spec) else _KNOWN_DATA.sub(lambda found: found[0].lower(), spec)


def no_data(spec: str) -> UsageError:
    """The error of a data set that nothing is known of."""
    return UsageError(
        f"no such data: {spec!r} is neither a file nor a known name ({', '.join(DATA_NAMES)}) "
        f"nor a Hub data set (owner/name or owner/name:file){meant(spec, DATA_NAMES)}"
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
_NO_NAME = "no file can have this name"
Name = Annotated[str | Path, _must(_can_be, _NO_NAME)]
"""What a model is opened by: folder, file or Hub id."""
Place = Annotated[Path | str, _must(_can_be, _NO_NAME)]


def _part(given: str | float) -> str | float:
    """ "auto", or a number from 0 to 1."""
    try:
        if given == "auto" or 0 <= (part := float(given)) <= 1:
            return given if given == "auto" else part
    except ValueError:
        pass
    raise ValueError("give a number from 0 to 1, or auto")


Size = Annotated[str | int, _parsed(_bytes)]
"""Such as "5GB", or bytes."""
AllowanceText = Annotated[str | int, _parsed(allowances)]
"""Such as "4.5bpw" or "3GB", or several by commas."""
DataName = Annotated[str, AfterValidator(_known_data)]
"""A known name, NAME:FILE, a file, a Hub id."""
Interval = Annotated[str, _parsed(parse_every)]
TokenCount = Annotated[
    str | int,
    _must(lambda number: re.fullmatch(r"all|0*[1-9]\d*", str(number)), "give a number of tokens such as 8192, or all"),
]
Natural = Annotated[int, Field(ge=1)]
Part = Annotated[str | float, AfterValidator(_part)]
"""From 0 to 1, or "auto"."""
Divergence = Annotated[float, _must(lambda nats: 0 <= nats < math.inf, "give a divergence in nats, such as 0.05")]
SeqLen = Annotated[int, Field(ge=8)]
Bits = Annotated[int, _must(lambda bits: 2 <= bits <= 8, "give 2, 3, 4 or 8")]
"""GPTQ checkpoints hold 2, 3, 4 and 8; blocks of GGML's types also 5 and 6, compressed-tensors all."""
GroupSize = Annotated[
    int,
    _must(
        lambda columns: columns == -1 or (columns > 0 and columns % 8 == 0),
        "give -1 (one group a row) or a positive multiple of 8",
    ),
]
DeviceName = Annotated[
    str,
    _must(re.compile(r"(auto|(cpu|cuda)(:\d+)?)").fullmatch, "not a device to run on; use auto, cpu, cuda or cuda:N"),
]
FileType = Annotated[str, *_one_of("auto", *FILE_TYPES)]
_MIXTURES = ("iq2_m", "iq3_xs", "iq3_m")  # which have no kind of their name
_KINDS = tuple(dict.fromkeys(re.sub(r"_k_[sml]$", "_k", kind) for kind in FILE_TYPES if kind not in _MIXTURES))
KindName = Annotated[str, *_one_of("auto", *_KINDS)]
"""A type of matrices."""
GridType = Annotated[str, Words(FILE_TYPES), _parsed(gptq_type)]
Folders = Annotated[Mapping[str, Place], BeforeValidator(_named_folders)]


@runtime_checkable
class DrawnWindows(Protocol):
    """Windows made beforehand: `quantkit.tokens.TokenMatrix`, which would need torch here."""

    @property
    def tokens(self) -> Any: ...

    @property
    def provenance(self) -> Any: ...
