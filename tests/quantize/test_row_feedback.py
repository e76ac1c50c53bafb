"""Rows that make up for the errors of rows before them, by what the model's output feels of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from support.failing import failing_at
from support.folders import contents
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.blocks import probes
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.errors import UsageError
from quantkit.options import QuantSpec
from quantkit.progress import SILENT
from quantkit.quantize import gptq, row_feedback, token_weights
from quantkit.sources import open_source

OPTIONS: dict[str, Any] = {"calibration": token_matrix(12, 64), "group_size": 32, "evaluate": False, "device": "cpu"}
FED: dict[str, Any] = {**OPTIONS, "row_feedback": True}


def correlated(size: int, seed: int) -> torch.Tensor:
    """A mean of products, of few directions that count more than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return x.T @ x / len(x)


def felt(W: torch.Tensor, linear: Codes, A: torch.Tensor, H: torch.Tensor) -> float:
    error = W - linear.dequantize()
    return float(((A @ error @ H) * error).sum())


@pytest.mark.parametrize("spec", [{"bits": 4, "group_size": 32}, {"bits": 3, "sym": False}, {"ggml": "q4_k"}])
def test_what_the_output_feels_is_less(spec: dict[str, Any]) -> None:
    W, A, H = torch.randn(72, 256, generator=torch.Generator().manual_seed(1)), correlated(72, 2), correlated(256, 3)
    of_type = {"bits": 4, "group_size": 32, "sym": False} if "ggml" in spec else {}
    own = QuantSpec(**spec, **of_type)
    plain = gptq.solve([W], H, own)[0]
    fed = row_feedback.solve([W], [A], H, own)
    assert felt(W, fed.linear, A, H) < 0.6 * felt(W, plain.linear, A, H)
    assert float(fed.loss.sum()) > float(plain.loss.sum())  # which is what that costs


def test_independent_rows_are_quantized_as_ever() -> None:
    """Each Linear of a stack by itself; without products and with a diagonal of them."""
    W, H = torch.randn(40, 64, generator=torch.Generator().manual_seed(4)), correlated(64, 5)
    spec = QuantSpec(bits=4, group_size=32)
    plain = gptq.solve([W], H, spec)[0]
    for products in ([None, None], [torch.diag(torch.rand(24) + 0.5), None]):
        fed = row_feedback.solve([W[:24], W[24:]], products, H, spec)
        assert torch.equal(fed.linear.codes, plain.linear.codes)
        torch.testing.assert_close(fed.rtn_loss, plain.rtn_loss)
    broken = row_feedback.solve([W], [correlated(40, 6)], torch.zeros(64, 64), spec)
    assert broken.fallback == "rounding"


def test_cosines_are_those_of_the_whole_models_gradients(make_model: MakeModel) -> None:
    path = make_model()
    stream = ModelStream(open_source(path), torch.device("cpu"), torch.float32)
    tokens, blocks = token_matrix(4, 32).tokens, {}
    with torch.inference_mode(False):
        token_weights.weigh_tokens(stream, tokens, 3, stream.budget, blocks.__setitem__, SILENT, products=True)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    wanted = "model.layers.1.self_attn.k_proj"
    seen: list[torch.Tensor] = []
    whole.get_submodule(wanted).register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    logits = whole(tokens).logits
    own, seeds = logits.detach().flatten(0, 1), probes.sign_seeds(tokens.shape, 3).flatten()
    whole_vocabulary = probes.Probe([probes.slice_sums(own, 0, seeds)], seeds)
    logits.backward(whole_vocabulary.gradient(own, 0).view_as(logits))
    g = seen[0].flatten(0, 1)
    expected = g.T @ g
    found = token_weights.TokenWeights(blocks.__getitem__, True).products(1, wanted)
    assert found is not None
    lengths = expected.diagonal().sqrt()
    scale = lengths[:, None] * lengths
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=2e-3)
    assert token_weights.TokenWeights(blocks.__getitem__, True).products(1, "model.layers.1.mlp.up_proj") is None


def test_equal_runs_and_stopped_ones_write_equal_bytes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    quantkit.gptq(model, tmp_path / "plain", **OPTIONS)
    for name in ("one", "two"):
        quantkit.gptq(model, tmp_path / name, **FED)
    one, two, plain = (contents(tmp_path / name) for name in ("one", "two", "plain"))
    assert one == two
    assert one["model.safetensors"] != plain["model.safetensors"]
    assert json.loads((tmp_path / "one" / "quantkit.json").read_text())["recipe"]["row_feedback"] is True
    with monkeypatch.context() as patch:
        patch.setattr(row_feedback, "solve", failing_at(row_feedback.solve, 4))
        with pytest.raises(UsageError):
            quantkit.gptq(model, tmp_path / "stopped", **FED)
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "weigh_tokens", lambda *_: pytest.fail("made again"))
        quantkit.gptq(model, tmp_path / "stopped", resume=True, **FED)
    assert contents(tmp_path / "stopped") == one


def test_it_needs_gradients(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row_feedback goes by the gradients"):
        quantkit.gptq(make_model(), tmp_path / "out", effort="fast", **FED)
