"""The old place of `quantkit.runs.ranks`, until the next release."""

from quantkit.runs.ranks import joined

__all__ = ["joined"]
