"""Our checkpoints in GPTQModel and transformers, in an environment of their own (`make judges`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, MakeModel, token_matrix
from judge_env import gptqmodel_python, run_gptqmodel
from smollm2 import smollm2_checkpoint, smollm2_gguf
from streamed import greedy, open_stream, streamed_logits

import quantkit
from quantkit.calibration import TokenMatrix
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

IDS = token_matrix(2, 24, seed=5).tokens
VARIANTS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 64, "act_order": "dynamic"},  # 96 columns: a short last group
    {"bits": 4, "group_size": 32, "sym": False},
    {"bits": 8, "group_size": -1, "act_order": "off"},
    {"bits": 3, "group_size": 32},
    {"bits": 2, "group_size": 16, "sym": False, "format": "gptq_v2"},
]


def _name(variant: dict[str, Any]) -> str:
    return "-".join(str(value) for value in variant.values())


def _compare(folder: Path, ids: torch.Tensor, tolerance: float) -> None:
    ours = streamed_logits(open_stream(folder), [ids])[0]
    theirs, _, info = run_gptqmodel(folder, ids)
    assert info["quantized_linears"] > 0
    assert info["plain_linears"] == ["lm_head"]
    spread = float(ours.std())
    assert float((ours - theirs).abs().max()) < tolerance * spread


@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
def test_gptqmodel_gives_our_readers_logits(
    variant: dict[str, Any], make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    gptqmodel_python()
    quantkit.gptq(make_model("llama"), tmp_path / "out", calibration=tiny_tokens, evaluate=False, **variant)
    _compare(tmp_path / "out", IDS, 1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_gptqmodel_reads_every_family(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    gptqmodel_python()
    quantkit.gptq(make_model(family), tmp_path / "out", group_size=32, calibration=tiny_tokens, evaluate=False)
    _compare(tmp_path / "out", IDS, 1e-4)


@pytest.mark.e2e
def test_smollm2_loads_in_transformers_and_writes_as_fp16_does(tmp_path: Path) -> None:
    gptqmodel_python()
    checkpoint = smollm2_checkpoint(tmp_path)
    tokenizer = open_source(checkpoint).tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    theirs, generated, info = run_gptqmodel(checkpoint, [ids], generate=12, backend="auto", exact=False)
    ours = streamed_logits(open_stream(checkpoint), [torch.tensor([ids])])[0]
    assert info["quantized_linears"] == 30 * 7
    # GPTQModel rounds the weights, or with some kernels the activations too, to half precision.
    ours, theirs = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 2e-3

    said = tokenizer.decode(generated, skip_special_tokens=True)
    fp16 = tokenizer.decode(greedy(smollm2_gguf(), ids, 12), skip_special_tokens=True)
    assert "Paris" in fp16
    assert "Paris" in said
