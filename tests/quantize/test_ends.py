"""What a rounded embedding and output matrix are predicted to cost: the formula, the model's own divergence, and runs
that choose their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, token_matrix
from support.folders import contents
from support.streamed import open_stream
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.codes.kinds import Kind, dequantize
from quantkit.containers.gguf.types import rounded_blocks
from quantkit.progress import SILENT
from quantkit.quantize.ends import EndSums, end_losses, tensors_of
from quantkit.quantize.token_weights import weigh_tokens
from quantkit.sources import open_source

TOKENS = token_matrix(16, 256)
OPTIONS: dict[str, Any] = {"calibration": TOKENS, "evaluate": False, "device": "cpu", "pre": "gpt-2", "ggml": "q4_0"}


def known_of(stream: Any) -> dict[str, torch.Tensor]:
    found: list[Any] = []
    weigh_tokens(stream, TOKENS.tokens, 0, stream.budget, lambda *_: None, SILENT, on_ends=found.append)
    [known] = found
    return dict(known)


def test_sums_are_those_of_each_token() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 9, size=(8, 2, 10)))
    g, last = (torch.from_numpy(rng.normal(size=(8, 2, 10, 5))).float() for _ in range(2))
    parts = []
    for mine in (range(3), range(3, 3), range(3, 8)):
        sums = EndSums([ids[i] for i in mine], mine.start, 8)
        for i in range(len(mine)):
            sums.entering(i, g[mine[i]])
            sums.leaving(i, last[mine[i]])
        parts.append(sums.part())
    found = tensors_of(parts)
    assert found["tokens"].tolist() == sorted(set(ids.flatten().tolist()))
    for token, squares in zip(found["tokens"], found["squares"], strict=True):
        torch.testing.assert_close(squares, g[ids == token].square().sum(dim=0))
    assert torch.equal(found["last"], torch.cat([last[3].reshape(-1, 5), last[7].reshape(-1, 5)]))  # held out


@pytest.mark.parametrize(
    ("family", "tied", "kind"),
    [("llama", False, "Q4_0"), ("llama", True, "Q5_0"), ("gemma3_text", True, "Q4_0"), ("llama", False, "Q8_0")],
)
def test_it_is_near_what_the_model_diverges_by(make_model: MakeModel, family: str, tied: bool, kind: str) -> None:
    folder = make_model(family, tied=tied)
    stream = open_stream(folder)
    known = known_of(stream)
    names = list(dict.fromkeys(stream.ends))
    assert len(names) == (1 if tied else 2)
    before = stream.weights
    predicted = end_losses(stream, known, TOKENS.tokens.numel(), {name: [Kind[kind]] for name in names})
    assert stream.weights is before
    original, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for name in names:
        with torch.no_grad():
            changed.load_state_dict(original.state_dict())
            weight = changed.get_parameter(name)
            blocks = rounded_blocks(weight.numpy(), Kind[kind])
            weight.copy_(torch.from_numpy(dequantize(blocks, Kind[kind]).copy()))
            p, q = (one(TOKENS.tokens).logits.double().log_softmax(dim=-1) for one in (original, changed))
        measured = float((p.exp() * (p - q)).sum(dim=-1).mean())
        [loss] = predicted[name]
        assert 0.6 < loss / measured < 1.7, name
        if name == "lm_head.weight":  # which is no approximation, but of some positions
            assert loss == pytest.approx(measured, rel=0.1)


def test_gguf_runs_count_them(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = make_model(), tmp_path / "out"
    report = quantkit.gptq(model, out, token_weights=True, embedding_type="q4_0", **OPTIONS)
    record = json.loads((out / "quantkit.json").read_text())
    assert [(one["name"], one["type"]) for one in record["ends"]] == [
        ("model.embed_tokens.weight", "Q4_0"),
        ("lm_head.weight", "Q8_0"),
    ]
    assert record["ends"][0]["predicted"] > 10 * record["ends"][1]["predicted"] > 0
    linears = sum(layer["predicted"] for layer in record["layers"])
    assert report.predicted == pytest.approx(linears + sum(one["predicted"] for one in record["ends"]))
    assert any("of it of embedding and output matrix" in str(line) for line in report.lines())
    again = quantkit.gptq(model, out, token_weights=True, embedding_type="q4_0", resume=True, **OPTIONS)
    assert (again.ends, again.predicted) == (report.ends, report.predicted)
    kept = quantkit.gptq(model, tmp_path / "f", token_weights=True, embedding_type="f16", output_type="f32", **OPTIONS)
    assert kept.ends == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_size_chooses_their_types(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    model, budget = make_model(tied=tied), 90_000 if tied else 110_000
    planned = quantkit.gptq(model, tmp_path / "out", budget=budget, dry_run=True, **OPTIONS)
    assert set(planned.budget.ends) == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    report = quantkit.gptq(model, tmp_path / "out", budget=budget, **OPTIONS)
    held = report.model.stat().st_size
    assert 0.93 * budget < held <= budget
    source = open_source(report.model)
    assert {name: source.tensors[name].stored_as for name in report.budget.ends} == report.budget.ends
    assert report.budget.predicted == pytest.approx(report.predicted, rel=0.5)
    assert len(report.ends) == len(report.budget.ends)
    told = "\n".join(map(str, report.lines()))
    assert all(f"; {name} {kind}" in told for name, kind in report.budget.ends.items())
    assert quantkit.verify(tmp_path / "out", generate=False).ok


def test_what_is_asked_for_is_not_chosen(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    report = quantkit.gptq(model, budget=110_000, output_type="q5_0", dry_run=True, **OPTIONS)
    assert set(report.budget.ends) == {"model.embed_tokens.weight"}
    assert quantkit.gptq(model, budget="5bpw", dry_run=True, **OPTIONS).budget.ends == {}


def test_it_is_better_than_types_that_are_given(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    given = quantkit.gptq(model, tmp_path / "given", token_weights=True, **OPTIONS)
    chosen = quantkit.gptq(model, tmp_path / "chosen", budget=given.model.stat().st_size, **OPTIONS)
    assert chosen.model.stat().st_size <= given.model.stat().st_size
    assert chosen.predicted < given.predicted


def test_a_stopped_run_has_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    quantkit.gptq(model, tmp_path / "whole", token_weights=True, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.verbs.gptq.run.quantize_blocks", lambda *_: pytest.fail("stopped"))
        with pytest.raises(BaseException, match="stopped"):
            quantkit.gptq(model, tmp_path / "out", token_weights=True, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.quantize.token_weights.weigh_tokens", lambda *_: pytest.fail("weighed again"))
        quantkit.gptq(model, tmp_path / "out", token_weights=True, resume=True, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
