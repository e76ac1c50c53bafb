"""The model that K-quants are judged on: a wider one with the same function."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "spread.py"))["spread"]
    sys.modules.pop("off_grid", None)


@pytest.fixture
def narrow() -> LlamaForCausalLM:
    """Two blocks, 6 heads of 4 on 2 keys, gains and epsilon that matter, embedding and output matrix one."""
    shape = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(
        **shape, num_hidden_layers=2, vocab_size=50, head_dim=4, rms_norm_eps=0.1, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2) if "norm" in name else torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def test_a_wider_llama_has_the_same_function(spread: Any, narrow: LlamaForCausalLM) -> None:
    wide = spread(narrow, 36)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-5)  # norms are float32
    assert wide.config.hidden_size == 36
    assert wide.model.embed_tokens.weight.shape == (50, 36)
    assert wide.model.layers[0].self_attn.k_proj.weight.shape == (12, 36)
    assert not torch.equal(wide.lm_head.weight, wide.model.embed_tokens.weight)
    assert all(bool((p == 1).all()) for name, p in wide.named_parameters() if "norm" in name)


def test_heads_that_are_added_are_zeros(spread: Any, narrow: LlamaForCausalLM) -> None:
    for layer in spread(narrow, 36).model.layers:
        attention = layer.self_attn
        weights = attention.q_proj.weight, attention.v_proj.weight, attention.o_proj.weight.T
        for weight, kept in zip(weights, (24, 8, 24), strict=True):
            assert weight[:kept].any()
            assert not weight[kept:].any()


@pytest.mark.parametrize("width", [12, 30])
def test_a_width_that_no_whole_groups_of_heads_make_is_refused(
    spread: Any, narrow: LlamaForCausalLM, width: int
) -> None:
    with pytest.raises(ValueError, match="no multiple of 12"):
        spread(narrow, width)
