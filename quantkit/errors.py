"""Exceptions of quantkit. Each message is one or two lines: what is wrong, where, and what to do about it."""

from __future__ import annotations


class QuantkitError(Exception):
    """The work failed. The command line exits with 1."""

    exit_code = 1


class UsageError(QuantkitError):
    """The request itself was wrong: an option, a combination, a path. The command line exits with 2."""

    exit_code = 2


class SourceError(QuantkitError):
    """A model could not be read, or is not what its config says."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation text could not be read, rendered or is too short."""


class NumericError(QuantkitError):
    """A weight, an activation or a scale is not a finite number that the format can hold."""


class OutputError(QuantkitError):
    """The output could not be written."""


class MissingPackageError(QuantkitError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package}: pip install 'quantkit[{extra}]'")


class Interrupted(KeyboardInterrupt):
    """An interrupt that did not cost the work done so far; says how far that went, and what goes on with it."""
