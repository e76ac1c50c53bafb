"""lm-evaluation-harness with quantkit's models in it.

The harness finds a model class by its name in a registry that is filled by imports; it has no entry points. So
``python -m quantkit.harness`` is its own command line with the name ``quantkit`` filled in, and `register` does the
same for programs that call it as a library.
"""

from __future__ import annotations

import sys

from quantkit.errors import MissingPackageError, QuantkitError, visible

NAME = "quantkit"


def register() -> None:
    """Make ``--model quantkit`` known to the harness, in this process; once is as good as often.

    Raises:
        MissingPackageError: the harness is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  # fills the registry with the harness's own
        from lm_eval.api.registry import model_registry
    except ImportError:
        raise MissingPackageError("lm-eval", "eval", "evaluating on tasks") from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="quantkit.verbs.eval.model:QuantkitLM")


def run_harness() -> None:
    """Run the harness's own command line with this process's arguments."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except QuantkitError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
