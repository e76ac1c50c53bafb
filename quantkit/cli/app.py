"""The `quantkit` command: options in, one library call, its result shown."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit.cli import console
from quantkit.cli.signals import farewell, heeded
from quantkit.cli.wrong import said
from quantkit.errors import QuantkitError, UsageError, describe, first_line, interrupt_came, meant, shortened
from quantkit.runs import ranks as parallel
from quantkit.runs.watch import RankError
from quantkit.version import __version__

_COMPLETING = "_QUANTKIT_COMPLETE"
_SETTINGS = {"help_option_names": ["-h", "--help"]}

# What the help says of each command, in its order.
COMMANDS = {
    "gptq": "Quantize a model with GPTQ into a folder that transformers, vLLM and others load, or into a GGUF file.",
    "ggml": "Write a model as a GGUF file for llama.cpp; codes of a GPTQ checkpoint go into it as they are.",
    "repack": "Write a model's codes into another container, as they are: GPTQ, compressed-tensors, AWQ, MLX, GGUF.",
    "convert": "Write a model as a Hugging Face folder of safetensors; a quantized one is dequantized.",
    "merge": "Add a delta to the base it was made from, tensor by tensor, into a Hugging Face folder of the tuned "
    "model.",
    "diff": "Write what a tuned model changed of its base: a delta, which merge adds to the base again.",
    "imatrix": "Write an importance matrix for llama.cpp: how much each input column matters on calibration text.",
    "samples": "Draw and show the text that a gptq run with the same options would calibrate on.",
    "perplexity": "Measure perplexity with its standard error, and divergence from a reference.",
    "compare": "Compare variants with the model they come from: size, accuracy, the worst tokens; "
    "as a report with plots.",
    "eval": "Measure a model on tasks of lm-evaluation-harness, such as those of the Open LLM Leaderboard.",
    "generate": "Answer the prompts of a file, in batches, into a file that a killed run goes on with.",
    "chat": "Talk with a model; a line of standard input is a message. Ctrl-C ends an answer, /quit the conversation.",
    "inspect": "Show what a model is made of: scheme, sizes, bits per weight, tensors. Reads headers only.",
    "verify": "Look at a folder or file as a downloader would: list what is wrong (exit code 1), and which programs "
    "load it.",
    "card": "Write a folder's model card, README.md, of measured facts only.",
    "publish": "Upload a folder to the Hugging Face Hub: only what differs, in one commit, by the Hub client's own "
    "token.",
    "release": "Make, compare, describe, verify and publish a family of variants; what is done already is not done "
    "again.",
}


class Verbs(TyperGroup):
    """All commands by what the help says of them; the options of one are made when it is called, which saves time."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise UsageError(f"{args[0]}: no such command{meant(args[0], COMMANDS) or '; see `quantkit --help`'}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else full_command(name), rest


def _typer(completion: bool = False, **settings: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=completion, pretty_exceptions_enable=False, context_settings=_SETTINGS, **settings
    )


app = _typer(
    completion=True,
    cls=Verbs,
    help="Make the variants of a language model that people publish, and measure what each one loses.",
    no_args_is_help=True,
)
for _name, _says in COMMANDS.items():
    app.command(_name, help=_says)(lambda: None)


def full_command(name: str) -> Any:
    """The command of this name, with its options, which take a tenth of a second to import."""
    from quantkit.cli.command import class_of, command_of

    of_one = _typer()
    of_one.command(name, help=COMMANDS[name], cls=class_of(name))(command_of(name))
    return typer.main.get_command(of_one)


def _version(asked: bool) -> None:
    if asked:
        console.show([__version__])
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    parallel.check_splits(context.invoked_subcommand)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the command was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parallel.exit_process(_run(arguments))


def _run(arguments: list[str]) -> int:
    _hush_libraries()
    command = typer.main.get_command(app)
    if _COMPLETING in os.environ:  # a shell asks, on <TAB>
        command.main(prog_name="quantkit")
    try:
        # Not app(): Typer would turn an interrupt into a silent exit of its own.
        with heeded(arguments), command.make_context("quantkit", list(arguments)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # `quantkit ... | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort) as stop:
        return _interrupted(stop, arguments)
    except RankError as error:  # a launcher that saw another process die sends this one a SIGTERM
        return _report(error, arguments)
    except Exception as error:
        return _interrupted(error, arguments) if interrupt_came() else _report(error, arguments)
    except BaseException as error:  # a panic of a library in Rust, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        failed = QuantkitError(f"the tokenizers library failed on this text: {shortened(first_line(error))}")
        return _report(failed, arguments)


def _interrupted(stop: BaseException, arguments: list[str]) -> int:
    if not parallel.mute():
        _tell(farewell(stop, arguments), "Interrupted", 1, arguments)
    return 1


def _report(error: Exception, arguments: list[str]) -> int:
    """Show an error in a line or two and return the exit code."""
    debug = "--debug" in arguments
    if parallel.mute() and not debug:
        return getattr(error, "exit_code", 1)
    if hasattr(error, "format_message"):  # Typer's own: click's, or those of the copy of click that newer Typers carry
        if message := said(error):
            _tell(message, UsageError.__name__, 2, arguments)
        return 2
    code = error.exit_code if isinstance(error, QuantkitError) else 1
    if debug:
        traceback.print_exception(error)
    hint = "" if debug or isinstance(error, QuantkitError) else " (--debug shows where)"
    _tell(f"{describe(error)}{hint}", type(error).__name__, code, arguments, on_screen=not debug)
    return code


def _tell(message: str, kind: str, code: int, arguments: list[str], on_screen: bool = True) -> None:
    """An error as a line on stderr, and with --json as an object on stdout too."""
    if on_screen:
        console.say(message if kind == "Interrupted" else f"error: {message}", "" if kind == "Interrupted" else "red")
    if "--json" in arguments:
        console.print_json({"error": message, "kind": kind, "exit_code": code})


def _hush_libraries() -> None:
    """Keep transformers' own bars and advice off stderr, before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a process that is lost we tell in one line
    if parallel.mute():
        warnings.simplefilter("ignore")
