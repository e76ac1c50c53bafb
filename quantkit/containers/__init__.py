"""The containers: what a model lies in on disk, a row for each.

A container is a folder here (`read.py`, `write.py`), a row of this table and a test file. Whoever has to know which
one a model lies in asks the row, or an attribute of the source. Rows name modules as text, which `load` resolves when
they are needed: this module imports neither torch nor anything that does, so options and completion may ask it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import UsageError
from quantkit.options import ActOrder, Checkpoint, End, QuantSpec

_PROGRAMS = "quantkit.verbs.verify.programs"
_READS_GPTQ = "it reads GPTQ folders"
_READS_GGUF = "it reads GGUF files: quantkit ggml makes one of this"
_READS_MLX = "it reads MLX folders"
_READS_CODES = {
    **dict.fromkeys(("llama.cpp", "ctransformers"), _READS_GGUF),
    "mlx-lm": f"{_READS_MLX}: quantkit repack --to mlx makes one of this",
    "": f"{_READS_GPTQ}: --format gptq",
}
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
_LONGEST_MAGIC = 16
_FIRST_KEYS = 1024
# general.type = "imatrix" as GGUF has it: the key, the number of text, a length, the text.
_TYPED_IMATRIX = b"general.type" + struct.pack("<IQ", 8, 7) + b"imatrix"


@dataclass(frozen=True)
class Holds:
    """The codes that a container has a place for.

    Attributes:
        bits: of a code.
        group_sizes: columns that share a scale; -1 is a whole row.
        sym: whether symmetric ones, and whether others.
        act_order: which forms.
        mixed: several bits, groups or types in one model.
        ends: matrices outside the blocks that may be codes too.
        types: GGML types of its matrices; empty where it has all of them, or none.
        instead: bits -> the types of its own that take codes of so many bits from a run of another container.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    sym: tuple[bool, ...] = (True, False)
    act_order: tuple[ActOrder, ...] = ("static", "dynamic", "off")
    mixed: bool = True
    ends: tuple[End, ...] = ()
    types: tuple[str, ...] = ()
    instead: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """How cards, repositories and the Hub call it.

    Attributes:
        short: its name in a list of formats; in small letters the Hub's tag of what is quantized.
        form: what a repository holds, in the plural.
        purpose: what a repository of a family is, beside the others.
        endings: of repositories' names; a release takes the first.
        library: the Hub's name for what loads it; None where it has none.
    """

    short: str
    form: str
    purpose: str = ""
    endings: tuple[str, ...] = ()
    library: str | None = "transformers"


@dataclass(frozen=True)
class Loads:
    """A program that loads the container: what it takes, and the rule that tells which models it does not.

    Attributes:
        needs: in a few words; empty where it takes nothing.
        unless: text of a function from `quantkit.verbs.verify.programs.Facts` to the reasons against it, one line each.
    """

    needs: str = ""
    unless: str = ""


@dataclass(frozen=True)
class Container:
    """A row. Texts are ``module:name``, or a module.

    Attributes:
        name: in options, recipes, reports and records; the `kind` of its sources.
        word: what messages call it: "WORD folders can be read".
        one: the same with its article, and with what it is: "a GGUF file".
        opens: the class of its source: (path, label, trust_remote_code) of folders, (path) of files.
        method: of a folder, `quant_method` of its quantization; "" where it has none. None: a file.
        magics: of a file, what it can begin with.
        suffix: of a file that is written.
        quantized: whether its weights are codes.
        holds: codes that it has a place for; None where none are written.
        formats: of a checkpoint, names that `--format` gives its versions.
        writes: of a checkpoint, the module with the functions of `quantkit.quantize.targets.Layout`; of a file the
            function that plans one for the verb `ggml`.
        admits: function (source, progress) that refuses a model which it has no place for; "" where `writes` does.
        recipe: which variants of a release's recipe it is the `kind` of; None: of none.
        file: of such a variant, its file's name, of `name`, `type` and `title`.
        metadata: function from one of its files to the keys in it; "" where it has none.
        kernels: packages with which transformers multiplies by its codes; empty: nothing does.
        checks: what `verify` looks at in the tensors as they are stored (as `quantkit.verbs.verify.packed.check`); "":
            it looks at what the source gives.
        shown: in cards.
        loads: programs that load it.
        refused: why others do not, by program; "" is for all that are not named.
        own: options of this container alone, by name: the function (plan, value) that refuses what does not fit.
    """

    name: str
    word: str
    one: str
    opens: str
    shown: Shown
    method: str | None = None
    magics: tuple[bytes, ...] = ()
    suffix: str = ""
    quantized: bool = True
    holds: Holds | None = None
    formats: tuple[str, ...] = ()
    writes: str = ""
    admits: str = ""
    recipe: Literal["checkpoint", "file"] | None = None
    file: str = ""
    metadata: str = ""
    kernels: tuple[str, ...] = ()
    checks: str = ""
    loads: Mapping[str, Loads] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)


_FULL_PRECISION = {"transformers": Loads(), "vLLM": Loads(unless=f"{_PROGRAMS}:unknown_family")}
_NEEDS_CODES = {
    **dict.fromkeys(("llama.cpp", "ctransformers"), _READS_GGUF),
    "mlx-lm": f"{_READS_MLX} and full precision: quantkit convert makes that of this",
    "": f"{_READS_GPTQ}: quantkit gptq makes one of this",
}

_ROWS = (
    Container(
        "hf",
        word="full-precision",
        one="a full-precision folder",
        opens="quantkit.containers.hf.read:HfSource",
        method="",
        quantized=False,
        shown=Shown("fp16", "Weights in floats", "weights in floats, for transformers", ("HF", "fp16")),
        loads={
            **_FULL_PRECISION,
            "ExLlamaV2": Loads("in float16", f"{_PROGRAMS}:exllama2"),
            "mlx-lm": Loads(unless=f"{_PROGRAMS}:no_class_in_mlx"),
        },
        refused=_NEEDS_CODES,
    ),
    Container(
        "gptq",
        word="gptq",
        one="a GPTQ checkpoint",
        opens="quantkit.containers.gptq.read:GptqSource",
        method="gptq",
        # What GPTQModel 7.7, transformers, vLLM or AutoGPTQ can load.
        holds=Holds(bits=(2, 3, 4, 8), group_sizes=_GROUP_SIZES, ends=("head",)),
        formats=("gptq", "gptq_v2"),
        writes="quantkit.containers.gptq.write",
        recipe="checkpoint",
        kernels=("gptqmodel", "optimum"),
        checks="quantkit.verbs.verify.packed:check",
        shown=Shown("GPTQ", "GPTQ checkpoints", "GPTQ checkpoints, for GPUs", ("GPTQ",)),
        loads={
            "transformers": Loads("with gptqmodel and optimum", f"{_PROGRAMS}:transformers"),
            "GPTQModel": Loads("", f"{_PROGRAMS}:gptqmodel"),
            "vLLM": Loads("with its Marlin kernels, on a CPU 4 bits", f"{_PROGRAMS}:vllm"),
            "AutoGPTQ": Loads("0.7.1, with transformers 4", f"{_PROGRAMS}:autogptq"),
            "ExLlama": Loads("", f"{_PROGRAMS}:exllama"),
            "ExLlamaV2": Loads("", f"{_PROGRAMS}:exllama2"),
        },
        refused={"mlx-lm": _READS_CODES["mlx-lm"], "": _READS_GGUF},
    ),
    Container(
        "compressed-tensors",
        word="compressed-tensors",
        one="a compressed-tensors folder",
        opens="quantkit.containers.compressed.read:CompressedSource",
        method="compressed-tensors",
        holds=Holds(bits=(2, 3, 4, 5, 6, 7, 8), group_sizes=_GROUP_SIZES, act_order=("static", "off"), ends=("head",)),
        formats=("compressed-tensors",),
        writes="quantkit.containers.compressed.write",
        recipe="checkpoint",
        shown=Shown(
            "compressed-tensors",
            "compressed-tensors folders",
            "compressed-tensors folders, for vLLM and SGLang",
            ("compressed-tensors",),
        ),
        loads={
            "transformers": Loads("with compressed-tensors", f"{_PROGRAMS}:compressed_by_transformers"),
            "vLLM": Loads("", f"{_PROGRAMS}:compressed_by_vllm"),
        },
        refused=_READS_CODES,
    ),
    Container(
        "awq",
        word="awq",
        one="an AWQ folder",
        opens="quantkit.containers.awq.read:AwqSource",
        method="awq",
        holds=Holds(bits=(4,), group_sizes=(32, 64, 128, -1), act_order=("static", "off"), mixed=False),
        formats=("awq",),
        writes="quantkit.containers.awq.write",
        recipe="checkpoint",
        shown=Shown("AWQ", "AWQ folders", "AWQ folders, for GPUs", ("AWQ",)),
        loads={
            "transformers": Loads("with gptqmodel", f"{_PROGRAMS}:transformers"),
            "vLLM": Loads("", f"{_PROGRAMS}:awq_by_vllm"),
            "mlx-lm": Loads("", f"{_PROGRAMS}:awq_by_mlx"),
        },
        refused=_READS_CODES,
    ),
    Container(
        "mlx",
        word="MLX",
        one="an MLX folder",
        opens="quantkit.containers.mlx.read:MlxSource",
        method="mlx",
        holds=Holds(
            bits=(2, 3, 4, 5, 6, 8),
            group_sizes=(32, 64, 128),
            act_order=("static", "off"),
            ends=("head", "embeddings", "both"),
        ),
        formats=("mlx",),
        writes="quantkit.containers.mlx.write",
        recipe="checkpoint",
        shown=Shown("MLX", "MLX folders", "MLX folders, for Apple machines", ("MLX",), "mlx"),
        loads={"mlx-lm": Loads("", f"{_PROGRAMS}:mlx_lm")},
        refused={**_READS_CODES, "transformers": "it knows no MLX folders: quantkit repack makes another"},
        own={"mlx_bias": "quantkit.containers.mlx.write:check_biases"},
    ),
    Container(
        "fp8",  # to all but `verify` full precision: its sources say that they are hf
        word="fp8",
        one="an fp8 folder",
        opens="quantkit.containers.hf.fp8:Fp8Source",
        method="fp8",
        quantized=False,
        shown=Shown("fp8", "Weights in 8-bit floats"),
        loads=_FULL_PRECISION,
        refused=_NEEDS_CODES,
    ),
    Container(
        "gguf",
        word="GGUF",
        one="a GGUF file",
        opens="quantkit.containers.gguf.read:GgufSource",
        magics=(b"GGUF",),
        suffix=".gguf",
        holds=Holds(
            bits=(2, 3, 4, 5, 6, 8),
            group_sizes=(16, 32, 64),
            act_order=("static", "off"),
            instead={5: "Q5_0 (symmetric) or Q5_1", 6: "Q6_K", 7: "Q8_0, whose 8 bits hold them"},
        ),
        writes="quantkit.verbs.ggml:plan_gguf",
        recipe="file",
        file="{name}-{title}.gguf",
        metadata="quantkit.containers.gguf.file:read_keys",
        shown=Shown("GGUF", "GGUF files", "GGUF files, for llama.cpp", ("GGUF",), "gguf"),
        loads={
            "transformers": Loads("dequantized, with gguf_file=", f"{_PROGRAMS}:gguf_by_transformers"),
            "vLLM": Loads(
                "with its plugin vllm-gguf-plugin, and --tokenizer of the source model",
                f"{_PROGRAMS}:gguf_by_transformers",
            ),
            "llama.cpp": Loads("", f"{_PROGRAMS}:llama_cpp"),
            "ctransformers": Loads("0.2.27", f"{_PROGRAMS}:ctransformers"),
        },
        refused={"mlx-lm": f"{_READS_MLX}: quantkit gptq --format mlx makes one", "": _READS_GPTQ},
    ),
    Container(
        "ggjt",
        word="ggjt",
        one="a ggjt file",
        opens="quantkit.containers.ggjt.read:GgjtSource",
        magics=(b"tjgg", b"lmgg", b"fmgg", b"algg"),  # the first is read; the others are older, and told what they are
        suffix=".ggjt.bin",
        holds=Holds(
            bits=(4, 5, 8),
            group_sizes=(32,),
            act_order=("static", "off"),
            mixed=False,  # files of that time were of one type
            types=("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1"),
            instead={5: "Q5_0 (symmetric) or Q5_1"},
        ),
        writes="quantkit.verbs.ggml:plan_ggjt",
        admits="quantkit.containers.ggjt.write:check",
        recipe="file",
        file="{name}.ggmlv3.{type}.bin",
        shown=Shown("GGML", "GGML files (ggjt v3)", "GGML (ggjt) files, for programs of 2023", ("GGML",), None),
        loads={"ctransformers": Loads("0.2.27", f"{_PROGRAMS}:ggjt_by_ctransformers")},
        refused={
            "llama.cpp": "since August 2023 it reads GGUF only; of June and July 2023 it reads this",
            "": "it reads no ggjt files",
        },
    ),
)
CONTAINERS: dict[str, Container] = {row.name: row for row in _ROWS}


def load(text: str) -> Any:
    """What a row's text names: a module, or with ``module:name`` something in it."""
    module, _, name = text.partition(":")
    found = import_module(module)
    return getattr(found, name) if name else found


def folders() -> list[Container]:
    """The containers that are folders."""
    return [row for row in CONTAINERS.values() if row.method is not None]


def files() -> list[Container]:
    """The containers that are files."""
    return [row for row in CONTAINERS.values() if row.method is None]


def of_folder(quantization: Mapping[str, Any]) -> Container | None:
    """The container of a folder with this quantization ({}: none); None where it is not known."""
    method = quantization.get("quant_method") or None if quantization else ""
    return next((row for row in folders() if row.method == method), None)


def of_file(path: Path) -> Container | None:
    """The container of a file, by its first bytes; None where they are of none."""
    with path.open("rb") as opened:
        head = opened.read(_LONGEST_MAGIC)
    return next((row for row in files() if head.startswith(row.magics)), None)


def is_imatrix(path: Path) -> bool:
    """Whether a file is an importance matrix, which has the form of a GGUF file and may lie beside one."""
    with path.open("rb") as opened:
        return _TYPED_IMATRIX in opened.read(_FIRST_KEYS)


def of_format(name: str) -> Container:
    """The container that `--format` names a version of. Raises UsageError."""
    known = {format: row for row in CONTAINERS.values() for format in row.formats}
    if name not in known:
        raise UsageError(f"--format {name}: choose {', '.join(known)}")
    return known[name]


def misfit(row: Container, specs: Collection[QuantSpec], option_of_bits: str = "--bits") -> str | None:
    """Why codes of these specs have no place in a container, and which ones have; None where they fit.

    One line, which begins with the option that decides it.
    """
    holds = row.holds
    if holds is None:
        return f"{row.one} holds no codes"
    option, spec = _first_unheld(holds, specs) or ("", None)
    if spec is None:
        return None
    if option == "bits":
        fitting = _elsewhere(spec.bits)
        others = f"; {spec.bits}-bit codes fit into {fitting}" if fitting else ""
        return f"{option_of_bits} {spec.bits}: {row.one} holds {_either(holds.bits)} bits{others}"
    if option == "group_size":
        known = ", ".join(str(size) for size in holds.group_sizes if size != -1)
        whole = ", or -1 for whole rows" if -1 in holds.group_sizes else ""
        others = _holding(specs, "; ", " holds them")
        return f"--group-size {spec.group_size}: {row.shown.short} readers load groups of {known}{whole}{others}"
    if option == "sym":
        return f"--{'sym' if spec.sym else 'asym'}: {row.one} holds none of these codes; leave it out"
    if option == "act_order":
        others = _holding(specs, "; ", " holds it")
        return f"--act-order {spec.act_order}: {row.one} cannot hold it; use {_either(holds.act_order)}{others}"
    return f"--override: {row.one} holds one precision for all Linears{_holding(specs, '; ', ' holds several')}"


def misfit_end(row: Container, end: End, spec: QuantSpec) -> str | None:
    """As `misfit`, of a matrix outside the blocks."""
    option = f"--{'embeddings' if end == 'embeddings' else 'head'}"
    if row.holds is None or end in row.holds.ends:
        return misfit(row, [spec], option)
    fitting = [one.one for one in CONTAINERS.values() if one.formats and one.holds and end in one.holds.ends]
    others = f"; {' or '.join(fitting)} holds them"
    names = {"both": "a matrix that is head and embedding (tied)", "embeddings": "an embedding"}
    return f"{option} {spec.bits}: {row.one} has no place for codes of {names.get(end, 'an output head')}{others}"


def _first_unheld(holds: Holds, specs: Collection[QuantSpec]) -> tuple[str, QuantSpec] | None:
    """The option that decides that codes of these specs have no place, and the first spec of which it does."""
    places: dict[str, Collection[Any]] = {
        "bits": holds.bits,
        "group_size": holds.group_sizes,
        "sym": holds.sym,
        "act_order": holds.act_order,
    }
    for spec in specs:
        for option, held in places.items():
            if getattr(spec, option) not in held:
                return option, spec
    precisions = {(spec.bits, spec.group_size, spec.sym): spec for spec in specs}
    return ("override", next(iter(precisions.values()))) if len(precisions) > 1 and not holds.mixed else None


def _holding(specs: Collection[QuantSpec], before: str, after: str) -> str:
    """The folders that have a place for codes of all these specs, between two texts; "" where none has."""
    held = [(row.one, row.holds) for row in CONTAINERS.values() if row.formats and row.holds]
    fitting = [one for one, holds in held if _first_unheld(holds, specs) is None]
    return f"{before}{' or '.join(fitting)}{after}" if fitting else ""


def check_own(formats: Collection[str], linears: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options of one container that its codes do not fit, and those of others that were given.

    Args:
        formats: of checkpoints that are written, or the name of a file's container.
        linears: a `quantkit.codes.Plan`.
        given: values of `own_options` by name.

    Raises:
        UsageError: names the option.
    """
    for row in CONTAINERS.values():
        for name, check in row.own.items():
            if not {row.name, *row.formats}.isdisjoint(formats):
                load(check)(linears, given[name])
            elif given[name] != Checkpoint.model_fields[name].default:
                option = f"--{name.replace('_', '-')} {given[name]}"
                raise UsageError(f"{option}: it is for {row.one}, and {' and '.join(formats)} is written; leave it out")


def own_options(format: str | None = None) -> set[str]:
    """Names of options that are of one container alone: of all, or of a format's."""
    return {name for row in CONTAINERS.values() if format is None or format in row.formats for name in row.own}


def _elsewhere(bits: int) -> str:
    """The containers that have a place for codes of so many bits, and what they are there."""
    own = [row.one for row in CONTAINERS.values() if row.formats and row.holds and bits in row.holds.bits]
    types: dict[str, list[str]] = {}
    for row in CONTAINERS.values():
        if row.holds and bits in row.holds.instead:
            types.setdefault(row.holds.instead[bits], []).append(row.word)
    return " or ".join([*own, *(f"{' or '.join(words)} as {held}" for held, words in types.items())])


def _either(values: Collection[object]) -> str:
    """2, 3 or 4."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
