"""The `quantkit` command."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the command was wrong."""
    from quantkit.cli.app import main as run

    run(arguments)
