"""Dry runs on published models' configs and headers alone: sizes, memory and arithmetic, of 0.1B to 1T parameters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.published import MODELS, hollow_folder
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.containers.gguf import WRITABLE

ALL = "QUANTKIT_ALL_PUBLISHED"
# Of every kind one; a dry run takes a second for 500 Linears, and mixtures have tens of thousands.
SAMPLE = (
    "EleutherAI/pythia-12b",
    "HuggingFaceTB/SmolLM2-135M",
    "meta-llama/Llama-3.1-405B",
    "microsoft/phi-4",
    "mistralai/Mixtral-8x22B-v0.1",
    "openai-community/gpt2",
    "tiiuae/falcon-40b",
)


def test_there_are_forty_from_a_tenth_to_a_thousand() -> None:
    sizes = [size for size, _, _ in MODELS.values()]
    assert len(MODELS) >= 40
    assert (min(sizes) < 0.15, max(sizes) > 1000) == (True, True)
    assert {kind for _, kind, _ in MODELS.values()} <= set(WRITABLE)


@pytest.mark.parametrize("name", MODELS if os.environ.get(ALL) else SAMPLE)
def test_a_published_model_is_planned_of_its_headers(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, size = tmp_path / "model", MODELS[name][0] * 1e9
    assert hollow_folder(name, folder) == pytest.approx(size, rel=0.01)

    codes = quantkit.gptq(folder, tmp_path / "out", device="cpu", dry_run=True)
    assert 0.52 * size < codes.bytes < 1.5 * size  # 4 bits with their scales, and the embeddings' 16
    assert 2 * size / 200 < codes.memory_bytes < 2 * size + 10e9
    assert 100 * 2048 < codes.multiplications / size < 2 * 128 * 2048  # of every weight with every token, and more

    tokenizer.save_pretrained(folder)
    file = quantkit.ggml(folder, tmp_path / "x.gguf", type="q8_0", pre="gpt-2", dry_run=True)
    assert file.bytes == pytest.approx(size * 34 / 32, rel=0.03)
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob("*.gguf"))
