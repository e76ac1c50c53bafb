"""The old place of `quantkit.blocks.whole`, until the next release."""

from quantkit.blocks.whole import load_model

__all__ = ["load_model"]
