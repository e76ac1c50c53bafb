"""``python -m quantkit``."""

from quantkit.cli.app import main

main()
