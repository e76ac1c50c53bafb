"""``python -m quantkit.harness``: the command line of lm-evaluation-harness, which then knows ``--model quantkit``."""

import sys

from quantkit.errors import QuantkitError
from quantkit.verbs.eval.register import register


def main() -> None:
    """Run the harness's own command line with this process's arguments."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except QuantkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
