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
from quantkit.cli.command import command_of, described, name_of
from quantkit.cli.process import settled
from quantkit.cli.signals import farewell, heeded
from quantkit.errors import QuantkitError, describe, interrupt_came
from quantkit.options import Options
from quantkit.options.verbs import (
    Card,
    Chat,
    Compare,
    Convert,
    Diff,
    Eval,
    Generate,
    Ggml,
    Gptq,
    Imatrix,
    Inspect,
    Merge,
    Perplexity,
    Publish,
    Release,
    Samples,
    Verify,
)
from quantkit.runs import ranks as parallel
from quantkit.runs.watch import RankError
from quantkit.version import __version__

_SETTINGS = {"help_option_names": ["-h", "--help"]}


class Verbs(TyperGroup):
    """All commands by what the help says of them; the options of one are made when it is called, which saves time."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else full_command(name), rest


app = typer.Typer(
    cls=Verbs,
    help="Make the variants of a language model that people publish, and measure what each one loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)

# In the order of the help, each with what of its report tells of a failure.
COMMANDS: tuple[tuple[type[Options], str], ...] = (
    (Gptq, ""),
    (Ggml, ""),
    (Convert, ""),
    (Merge, ""),
    (Diff, ""),
    (Imatrix, ""),
    (Samples, ""),
    (Perplexity, ""),
    (Compare, "unmet"),
    (Eval, ""),
    (Generate, ""),
    (Chat, ""),
    (Inspect, ""),
    (Verify, "problems"),
    (Card, ""),
    (Publish, ""),
    (Release, "failures"),
)
for spec, _ in COMMANDS:
    app.command()(described(spec))


def full_command(name: str) -> Any:
    """The command of this name, with its options."""
    of_one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_SETTINGS)
    of_one.command()(next(command_of(*row) for row in COMMANDS if name_of(row[0]) == name))
    return typer.main.get_command(of_one)


def _version(asked: bool) -> None:
    if asked:
        console.results.print(__version__)
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
    try:
        # Not app(): Typer would turn an interrupt into a silent exit of its own.
        with (
            settled(arguments),
            heeded(arguments),
            command.make_context("quantkit", list(arguments)) as context,
        ):
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
        return _report(error, "--debug" in arguments)
    except Exception as error:
        return _interrupted(error, arguments) if interrupt_came() else _report(error, "--debug" in arguments)


def _interrupted(stop: BaseException, arguments: list[str]) -> int:
    if not parallel.mute():
        console.log.print(farewell(stop, arguments), markup=False)
    return 1


def _report(error: Exception, debug: bool) -> int:
    """Show an error in a line or two and return the exit code."""
    if parallel.mute() and not debug:
        return getattr(error, "exit_code", 1)
    parse_message = getattr(error, "format_message", None)
    if parse_message is not None:  # Typer's own: click's, or those of the copy of click that newer Typers carry
        if parse_message():  # empty where the help has been shown instead
            console.log.print(f"error: {parse_message()}", markup=False, style="red")
        return 2
    if debug:
        traceback.print_exception(error)
    else:
        hint = "" if isinstance(error, QuantkitError) else " (--debug shows where)"
        console.log.print(f"error: {describe(error)}{hint}", markup=False, style="red")
    return error.exit_code if isinstance(error, QuantkitError) else 1


def _hush_libraries() -> None:
    """Keep transformers' own bars and advice off stderr, before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a process that is lost we tell in one line
    if parallel.mute():
        warnings.simplefilter("ignore")
