"""llama-perplexity says of a GGUF file what `compare` says: perplexity, and divergence from the reference.

Its kernels of quantized types round activations, which is no property of the file: it gets the file's weights as
float32. It scores the second half of each window, so `compare` is made to score the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from support import llamacpp
from support.smollm2 import smollm2_gguf

import quantkit
from quantkit.tokens.text import EvaluationText, common_text

pytestmark = pytest.mark.judges

WINDOW = 128
WORDS = "the quick brown fox jumps over the lazy dog while the tides follow the moon and the sea follows the tides"


def second_halves(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], torch.Tensor]:
    """Let `compare` score the second half of the first `count` windows; returns what gives their tokens."""
    seen: list[torch.Tensor] = []

    def text(*arguments: Any) -> EvaluationText:
        found = common_text(*arguments)
        windows = found.windows
        first = torch.full((count,), llamacpp.scored_rows(WINDOW).start + 1)
        seen.append(windows.tokens[:count])
        return replace(found, windows=replace(windows, tokens=windows.tokens[:count], first_scored=first))

    monkeypatch.setattr("quantkit.verbs.compare.common_text", text)
    return lambda: seen[0]


def their_numbers(
    reference: Path, variant: Path, text: str, count: int, scratch: Path
) -> dict[str, tuple[float, float]]:
    """What llama-perplexity says of two float32 files: each number with its standard error."""
    file = scratch / "text.txt"
    file.write_text(text + "\n", encoding="utf-8")
    saved = scratch / "logits"
    windows: Sequence[str] = [*llamacpp._windows(WINDOW), "--chunks", str(count)]
    live = llamacpp.run("llama-perplexity", "-m", reference, "-f", file, "--save-all-logits", saved, *windows)
    said = llamacpp.run("llama-perplexity", "-m", variant, "--kl-divergence", "--kl-divergence-base", saved, *windows)
    estimate = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", live)
    assert estimate, live[-3000:]
    found = {"base": (float(estimate[1]), float(estimate[2]))}
    for key, pattern in (
        ("perplexity", r"Mean PPL\(Q\)"),
        ("kl", r"Mean\s+KLD"),
        ("top1", r"Same top p"),
    ):
        row = re.search(rf"^{pattern}\s*:\s*(\S+)\s*±\s*(\S+)", said, re.MULTILINE)
        assert row, (key, said[-3000:])
        found[key] = float(row[1]), float(row[2])
    return found


def compare_with_theirs(
    reference: Path, kind: str, text: str, count: int, tmp_path: Path, patch: Any, kl_bound: float
) -> None:
    """Perplexities are deterministic on both sides and agree to 2e-4 of themselves, hundredths of a standard error.

    Of the reference llama-perplexity keeps 16 bits a logit, those far below the largest raised: the divergence from it
    agrees to `kl_bound` nats.
    """
    variant = tmp_path / f"variant-{kind}.gguf"
    quantkit.ggml(reference, variant, type=kind, pre="smollm")
    quantkit.ggml(reference, tmp_path / "reference.gguf", type="f32", pre="smollm")
    (tmp_path / "text.md").write_text(text, encoding="utf-8")
    tokens = second_halves(patch, count)
    report = quantkit.compare(
        reference, [variant], out=tmp_path / "out", texts=[str(tmp_path / "text.md")], seq_len=WINDOW,
        template="none", device="cpu", dtype="float32", plots=False,
    )  # fmt: skip
    assert tokens().shape == (count, WINDOW)
    ours, base = (report.models[number].texts["text.md"] for number in (1, 0))
    float32 = llamacpp.to_f32(variant, tmp_path / "float32.gguf")
    theirs = their_numbers(tmp_path / "reference.gguf", float32, text, count, tmp_path)
    assert ours.kl_divergence is not None
    assert base.perplexity == pytest.approx(theirs["base"][0], rel=2e-4)
    assert ours.perplexity == pytest.approx(theirs["perplexity"][0], rel=2e-4)
    assert ours.stderr == pytest.approx(theirs["perplexity"][1], rel=0.02)
    ratio = math.log(theirs["perplexity"][0] / theirs["base"][0])
    assert ours.delta_ln_ppl == pytest.approx(ratio, abs=2e-4)
    assert ours.kl_divergence.mean == pytest.approx(theirs["kl"][0], abs=kl_bound)
    assert 100 * (ours.top1_agreement or 0) == pytest.approx(theirs["top1"][0], abs=0.5)
    assert abs(ours.perplexity - theirs["perplexity"][0]) < theirs["perplexity"][1] / 20
    assert abs(ours.kl_divergence.mean - theirs["kl"][0]) < theirs["kl"][1]
    assert theirs["kl"][0] > 1e-3


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_a_tiny_model(kind: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).choice(WORDS.split(), 1200)
    reference = make_model("llama", dtype="float32")
    compare_with_theirs(reference, kind, " ".join(words), 6, tmp_path, monkeypatch, 1e-4)


@pytest.mark.e2e
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "calibration" / "README.md").read_text(encoding="utf-8")
    folder = tmp_path / "SmolLM2"
    quantkit.convert(smollm2_gguf(), folder)
    compare_with_theirs(folder, "q4_k_m", text, 4, tmp_path, monkeypatch, 2e-3)
