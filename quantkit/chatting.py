"""The old place of `quantkit.verbs.chat`, until the next release."""

from quantkit.verbs.chat import Person

__all__ = ["Person"]
