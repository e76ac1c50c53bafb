"""What `verify` says of programs that load a GGUF file: the programs themselves, where they can be asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, random_model, token_matrix
from support.ggjt_models import LLAMA
from support.gguf_models import sentencepiece, write_model
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.verbs.verify import verify

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "head_dim": 32}),
        ("llama", {"rope_parameters": _LLAMA3}),
        ("llama", {"rope_parameters": _YARN}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"head_dim": None}),
        ("qwen2", {"head_dim": None, "rope_parameters": _YARN}),
        ("qwen3", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": True, "moe_intermediate_size": 768}),
        ("gemma2", {"tied": True}),
        ("gemma2", {"tied": True, "head_dim": 256, "query_pre_attn_scalar": 256}),
        ("phi3", {}),
        ("phi3", {"sliding_window": 16}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
)
def test_transformers_loads_the_gguf_files_that_are_said_to_be_loaded(
    family: str, config: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """transformers itself is asked: what it passes over it computes other numbers without."""
    folder = make_model(family, dtype="float32", **config)
    quantkit.ggml(folder, tmp_path / "m.gguf", type="f32", pre="gpt-2")
    (model,) = verify(tmp_path / "m.gguf", generate=False).models
    said = next(load for load in model.loads if load.program == "transformers")
    ids = token_matrix(1, 100).tokens
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    try:
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        off = float((read(ids).logits - logits).detach().abs().max())
    except RuntimeError:  # shapes that its class does not have
        off = math.inf
    assert said.ok == (off < 1e-4), (off, said)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, ""),
        ({"tie_word_embeddings": True}, "output matrix"),
        ({"attention_bias": True}, "biases"),
        ({"head_dim": 32}, "heads 16 wide"),
        ({"rope_parameters": _LLAMA3}, "rope scaling (llama3)"),
    ],
)
def test_ctransformers_has_no_place_for_much_of_a_llama(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = random_model("llama", tied=config.pop("tie_word_embeddings", False), dtype=torch.float32, seed=0, **config)
    model.resize_token_embeddings(len(LLAMA["tokens"]), mean_resizing=False)
    write_model(tmp_path / "spm.gguf", model, sentencepiece(LLAMA))
    found = next(
        load
        for load in verify(tmp_path / "spm.gguf", generate=False).models[0].loads
        if load.program == "ctransformers"
    )
    assert found.ok == (not why), found
    assert why in found.why
