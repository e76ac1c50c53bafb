"""The `quantkit` command."""

from __future__ import annotations

import gc
import os


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the command was wrong."""
    gc.disable()  # nothing that is imported is garbage; a verb that runs has it searched for again
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # none is used, and looking for them takes time
    from quantkit.cli.app import main as run

    run(arguments)
