"""Panics of the tokenizers library, which is written in Rust: no Exceptions, and told on stderr past Python."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from quantkit.errors import QuantkitError, first_line, shortened

_stderr = RLock()


@contextmanager
def panics_as(kind: type[QuantkitError], what: str) -> Iterator[None]:
    """Raise a panic of the library inside, or its bare Exception, as an error of this kind, about `what`.

    What it prints of a panic is left out; what anybody else writes to stderr meanwhile appears at the end.
    """
    with _stderr, tempfile.TemporaryFile() as held:
        kept, panicked = _held(held.fileno()), False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"  # pyo3 has it in no module that could be imported
            if not panicked and type(error) is not Exception:
                raise
            raise kind(f"{what}: its tokenizer gives up ({shortened(first_line(error))}); it is damaged") from error
        finally:
            if kept is not None:
                os.dup2(kept, 2)
                os.close(kept)
                held.seek(0)
                said = b"" if panicked else held.read()
                if said:
                    os.write(2, said)


def _held(file: int) -> int | None:
    """Turn stderr to this file; what it was before, None where it is closed."""
    try:
        kept = os.dup(2)
    except OSError:
        return None
    os.dup2(file, 2)
    return kept
