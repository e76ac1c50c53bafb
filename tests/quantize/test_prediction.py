"""The divergence that a Linear's error is predicted to make: its formula, and the model's own divergence."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, token_matrix
from support.reports import COMPARED, GPTQ
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.quantize.layers import LayerStatistics, predicted_divergence
from quantkit.quantize.token_weights import TokenWeights, Weighing
from quantkit.sources import open_source

TOKENS = token_matrix(12, 256)
OPTIONS: dict[str, Any] = {"calibration": TOKENS, "group_size": 32, "evaluate": False, "token_weights": True}


def test_the_divergence_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    g, x, E = rng.normal(size=(50, 3)), rng.normal(size=(50, 6)), rng.normal(size=(3, 6))
    w = (g**2).sum(axis=1)
    H = (w[:, None] * x).T @ x / w.sum()
    tensors = {"0.weights": torch.from_numpy(w / w.mean()).float(), "0.rows.q": torch.from_numpy((g**2).sum(axis=0))}
    weighing = Weighing(TokenWeights(lambda _: tensors), 0, [50], 0, 50)
    losses = np.einsum("ji,ik,jk->j", E, H, E)
    expected = ((g**2).sum(axis=0) * losses).sum() / (2 * 50)
    assert weighing.divergence("q", torch.from_numpy(losses)) == pytest.approx(expected, rel=1e-6)
    assert weighing.divergence("other", torch.from_numpy(losses)) is None


@pytest.mark.parametrize(("family", "correct"), [("llama", 0.0), ("mixtral", 0.0), ("llama", 0.5)])
def test_it_is_near_what_the_model_diverges_by(
    make_model: MakeModel, tmp_path: Path, family: str, correct: float
) -> None:
    model = make_model(family)
    report = quantkit.gptq(model, tmp_path / "out", correct=correct, **OPTIONS)
    measured = divergence(model, tmp_path / "out")
    assert report.predicted is not None
    assert 0.5 < report.predicted / measured < 2
    with (tmp_path / "out" / "quant_log.csv").open() as file:
        told = [float(row["predicted"] or 0) for row in csv.DictReader(file)]
    assert sum(told) == pytest.approx(report.predicted, rel=1e-4)
    again = quantkit.gptq(model, tmp_path / "out", correct=correct, resume=True, **OPTIONS)
    assert again.predicted == pytest.approx(report.predicted)


def divergence(model: Path, written: Path) -> float:
    """The mean KL divergence over the calibration tokens, of a model and what was made of it, by transformers."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    source = open_source(written)
    assert source.codes is not None
    weights = {f"{name}.weight": source.codes.read_codes(name).dequantize() for name in source.quantized_names()}
    own = quantized.state_dict()
    for name in list(weights):
        if name not in own:  # transformers has experts in one tensor
            expert, part = name.split(".experts.")[1].split(".")[:2]
            place = f"{name.split('.experts.')[0].replace('block_sparse_moe', 'mlp')}.experts"
            stacked = own[f"{place}.{'down_proj' if part == 'w2' else 'gate_up_proj'}"][int(expert)]
            rows = weights[name].shape[0]
            stacked[rows if part == "w3" else 0 :][:rows] = weights.pop(name)
    quantized.load_state_dict(weights, strict=False)
    with torch.no_grad():
        p, q = (one(TOKENS.tokens).logits.double().log_softmax(dim=-1) for one in (original, quantized))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def test_without_token_weights_nothing_is_predicted(make_model: MakeModel, tmp_path: Path) -> None:
    report = quantkit.gptq(make_model(), tmp_path / "out", **{**OPTIONS, "token_weights": False})
    assert report.predicted is None
    with (tmp_path / "out" / "quant_log.csv").open() as file:
        assert {row["predicted"] for row in csv.DictReader(file)} == {""}


def test_an_expert_that_nothing_was_sent_to_predicts_nothing_and_spoils_nothing() -> None:
    seen = LayerStatistics("a", 1, 1, 0.1, "", 5, 0, predicted=0.25)
    idle = LayerStatistics("b", 0, 0, 0, "rounding", 0, 0)
    assert predicted_divergence([seen, idle]) == 0.25
    assert predicted_divergence([seen, replace(idle, tokens=3)]) is None
    assert predicted_divergence([idle]) is None


@pytest.mark.parametrize(("predicted", "far"), [(0.0124, False), (0.03, True), (0.006, True)])
def test_what_is_far_from_what_is_measured_is_said(predicted: float, far: bool) -> None:
    measured = replace(GPTQ, dry_run=False, evaluation=COMPARED)
    *before, last = replace(measured, predicted=predicted).lines()
    assert before == list(measured.lines())
    assert f"{predicted:.4f}" in str(last)
    assert ("times what was measured" in str(last)) == far
