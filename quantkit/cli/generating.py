"""generate and chat: what a model answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import (
    BaseOption,
    Debug,
    DeltaOption,
    Device,
    Dtype,
    DtypeOption,
    Json,
    Quiet,
    Revision,
    Template,
    TemplateOption,
    Trust,
)
from quantkit.errors import OutputError

Answering = Annotated[str | None, typer.Argument(help="Folder, GGUF or ggjt file, or Hub id.", show_default=False)]
System = Annotated[str | None, typer.Option(help="System message, in place of the template's own.", show_default=False)]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of drawing one.")]
Temperature = Annotated[float, typer.Option(help="Flattens (above 1) or sharpens what is drawn from.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: makes tokens that were there less likely.")]
DrawSeed = Annotated[int, typer.Option(help="Decides what is drawn.")]


def generate(
    prompts: Annotated[
        Path,
        typer.Option(
            help="JSON lines with Instruction, instruction (and input), prompt, text, messages or conversations.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of answers to write, JSON lines.", show_default=False)],
    model: Answering = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    template: TemplateOption = Template.auto,
    system: System = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    greedy: Greedy = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    num_beams: Annotated[int, typer.Option(help="More than 1: beam search, one prompt at a time.")] = 1,
    max_new_tokens: MaxNewTokens = 2048,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: DrawSeed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out; answers in it stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check the prompts; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer the prompts of a file, in batches, into a file that a killed run goes on with."""
    from quantkit.verbs.generate import generate as answer_all

    try:
        report = answer_all(
            model,
            prompts=prompts,
            out=out,
            base=base,
            delta=delta,
            template=template.value,
            system=system,
            batch_size=batch_size,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            seed=seed,
            device=device,
            dtype=dtype.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
            resume=resume,
            dry_run=dry_run,
            force=force,
            progress=console.Bars(quiet),
        )
    except KeyboardInterrupt:
        raise OutputError(f"interrupted; --resume goes on with the answers that are in {out}") from None
    console.print_json(report.as_dict()) if json else console.show(report.lines())


def chat(
    model: Answering = None,
    base: BaseOption = None,
    delta: DeltaOption = None,
    template: TemplateOption = Template.auto,
    system: System = None,
    greedy: Greedy = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 40,
    max_new_tokens: MaxNewTokens = 2048,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: DrawSeed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.auto,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print the conversation at its end, as JSON.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model; a line of standard input is a message. Ctrl-C ends an answer, /quit the conversation."""
    from quantkit.verbs.chat import chat as talk

    report = talk(
        model,
        _Terminal(silent=json, quiet=quiet),
        base=base,
        delta=delta,
        template=template.value,
        system=system,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        seed=seed,
        device=device,
        dtype=dtype.value,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=console.Bars(quiet),
    )
    if json:
        console.print_json(report.as_dict())


class _Terminal:
    """A person at a terminal, or what is piped in: there no prompt is shown."""

    def __init__(self, silent: bool, quiet: bool) -> None:
        self._silent, self._quiet = silent, quiet
        self._asks = sys.stdin.isatty()
        if self._asks:
            import readline  # noqa: F401  # gives input() its editing and history

    def hear(self) -> str | None:
        while True:
            try:
                return input("> ") if self._asks else self._line()
            except KeyboardInterrupt:  # at the prompt it drops what was typed
                if not self._asks:
                    raise
                print(file=sys.stderr)
                self.note("/quit ends the conversation")
            except EOFError:
                return None

    def say(self, piece: str) -> None:
        if not self._silent:
            print(piece, end="", flush=True)

    def end(self, finish: str) -> None:
        if not self._silent:
            print(flush=True)
        if finish != "eos":
            self.note({"length": "(no more room)", "interrupted": "(interrupted)"}[finish])

    def note(self, text: str) -> None:
        if not self._quiet:
            console.log.print(text, markup=False, style="dim")

    @staticmethod
    def _line() -> str | None:
        return sys.stdin.readline() or None
