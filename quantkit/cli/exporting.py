"""ggml and imatrix: what llama.cpp reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    BaseOption,
    Calibration,
    Container,
    Debug,
    DeltaOption,
    Device,
    DryRun,
    Dtype,
    DtypeOption,
    ForceFile,
    Json,
    Memory,
    OutFile,
    Quiet,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Template,
    TemplateOption,
    Trust,
)


def ggml(
    model: Annotated[
        str | None, typer.Argument(help="Folder (GPTQ or full precision), GGUF file or Hub id.", show_default=False)
    ] = None,
    out: OutFile = None,
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
    dry_run: DryRun = False,
    force: ForceFile = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp; codes of a GPTQ checkpoint go into it as they are."""
    from quantkit.verbs.ggml import ggml as write_ggml

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
    console.print_json(report.as_dict()) if json else console.show(report.lines())


def imatrix(
    model: Annotated[
        str | None, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)
    ] = None,
    out: OutFile = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    calibration: Calibration = "evol-instruct-sample",
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    template: TemplateOption = Template.auto,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    memory: Memory = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
    force: ForceFile = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an importance matrix for llama.cpp: how much each input column matters on calibration text."""
    from quantkit.verbs.imatrix import imatrix as write_imatrix

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
        memory=memory,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        force=force,
        progress=console.Bars(quiet),
    )
    console.print_json(report.as_dict()) if json else console.show(report.lines())
