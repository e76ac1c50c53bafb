"""Refining: its gradients, what it may change, and that it never makes held-out windows worse."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.failing import failing_at
from support.families import DISCOVERED
from support.folders import contents
from support.thread_ranks import together

import quantkit
from quantkit.blocks import backward
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes
from quantkit.codes.units import unit_gradients, units, with_units
from quantkit.errors import UsageError
from quantkit.evaluate.scores import score
from quantkit.evaluate.statistics import summarize
from quantkit.options import QuantSpec
from quantkit.quantize import gptq, tuning
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.refine import Course, Refining, Settings, Student
from quantkit.quantize.rounding import rounded as rounded_to
from quantkit.quantize.targets import on_grid_of
from quantkit.runs.places import folder_of
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.sources import open_source
from quantkit.tokens.windows import Windows

OPTIONS: dict[str, Any] = {
    "calibration": token_matrix(8, 256),
    "group_size": 32,
    "evaluate": False,
    "device": "cpu",
    "bits": 3,
}
REFINE: dict[str, Any] = {"refine": True, "refine_steps": 6}
WINDOWS, LENGTH = 4, 24
CPU = torch.device("cpu")


def open_in(model: Path, dtype: torch.dtype = torch.float64) -> ModelStream:
    return ModelStream(open_source(model), CPU, dtype)


def rounded(stream: ModelStream, bits: int = 3) -> list[list[tuple[str, Codes]]]:
    """Codes of all blocks, by plain rounding."""
    spec = QuantSpec(bits=bits, group_size=32)
    turned = stream.source.model_type == "gpt2"

    def codes(name: str) -> Codes:
        W = stream.weights.read(f"{name}.weight")
        return round_to_nearest(W.T if turned else W, spec)

    blocks = range(len(stream.blocks))
    return [[(name, codes(name)) for name, _ in stream.linears_in(index)] for index in blocks]


def windows(stream: ModelStream) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(stream.vocabulary, size=(WINDOWS, LENGTH)))


def naive(
    model: Path, codes: list[list[tuple[str, Codes]]], ids: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """(divergence summed over positions, its gradient by scales and gains) of the whole model at once, in float64."""
    taught = open_in(model).whole()(ids, use_cache=False).logits.log_softmax(-1).detach()
    stream = open_in(model)
    whole = stream.whole()
    names = {published: name for name, published in stream.weights.names.items()}
    leaves: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for block in codes:
        for name, linear in block:
            scales = leaves[f"{name}.scales"] = linear.scales.double().requires_grad_()
            at = linear.group.long()
            W = scales[:, at] * (linear.codes.double() - linear.zeros.double()[:, at])
            values[names[f"{name}.weight"]] = W.T if stream.source.model_type == "gpt2" else W
    for name, parameter in whole.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            values[name] = leaves[stream.weights.names[name]] = parameter.detach().clone().requires_grad_()
    output = torch.func.functional_call(whole, values, (ids,), {"use_cache": False}).logits.log_softmax(-1)
    loss = (taught.exp() * (taught - output)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text", "gpt2"])
def test_gradients_are_those_of_the_whole_model(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(backward, "SLICE", 100)
    monkeypatch.setattr(backward, "_POSITIONS", 7)
    model = make_model(family)
    stream = open_in(model)
    codes, ids = rounded(stream), windows(stream)
    student = Student(stream, codes.__getitem__, Settings(), lambda name: torch.float64)
    refining = Refining(stream, ids, student, MemoryPlan(), exact=True)
    found = refining.gradients([1, 3])
    loss, expected = naive(model, codes, ids[[1, 3]])
    assert refining.divergence([1, 3]) == pytest.approx(loss / (2 * LENGTH), rel=1e-6)
    assert found.keys() == expected.keys() == student.tuned.keys()
    for name, gradient in expected.items():
        own = gradient * student.tuned[name].unit
        torch.testing.assert_close(found[name].double(), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


@pytest.mark.usefixtures("one_thread")
def test_sums_have_the_same_bits_whoever_made_them(make_model: MakeModel) -> None:
    model = make_model("mixtral")
    codes = rounded(open_in(model, torch.float32))
    wanted = [3, 0, 2, 1]

    def found(ranks: Ranks, workers: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
        stream = open_in(model, torch.float32)
        student = Student(stream, codes.__getitem__, Settings(), lambda name: torch.float32)
        mine = range(WINDOWS)[ranks.rank :: ranks.size]
        refining = Refining(stream, windows(stream), student, MemoryPlan(), mine=mine, ranks=ranks)
        refining._workers = workers
        return refining.divergence(wanted[:3]), refining.gradients(wanted)

    divergence, gradients = found(ALONE)
    others = [found(ALONE, workers) for workers in (2, 4)]
    for size in (2, 3, 6):
        others += together(size, found)
    for other, own in others:
        assert other == divergence
        assert own.keys() == gradients.keys()
        assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("kind", ["gptq", "scattered", "Q4_0", "Q4_1", "Q4_K", "Q3_K"])
def test_a_weight_is_linear_in_its_units(kind: str) -> None:
    linear = some_codes(kind)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(linear.shape, generator=generator)
    found = unit_gradients(linear, gradient)
    assert found.keys() == units(linear).keys()
    for name, unit in units(linear).items():
        step = (unit.float() * torch.randn(unit.shape, generator=generator)).half()
        moved = with_units(linear, {name: (unit.float() + step.float()).half()})
        taken = units(moved)[name].float() - unit.float()
        change = ((moved.dequantize() - linear.dequantize()) * gradient).sum(dim=1)
        torch.testing.assert_close((found[name] * taken).sum(dim=1), change, rtol=1e-3, atol=1e-3)


def some_codes(kind: str) -> Codes:
    rng = np.random.default_rng(0)
    W = torch.from_numpy(rng.normal(size=(6, 512)).astype(np.float32))
    if kind in ("gptq", "scattered"):
        linear = round_to_nearest(W, QuantSpec(bits=4, group_size=48, sym=False))
        return linear if kind == "gptq" else replace(linear, group=linear.group[torch.from_numpy(rng.permutation(512))])
    return rounded_to(W, QuantSpec(**on_grid_of(kind)))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Settings", partial(Settings, every=2, gains=0.004, scales=0.002))


def test_held_out_windows_are_spread() -> None:
    assert tuning.held_out(24) == [4, 12, 20]
    assert tuning.held_out(1024) == [64 + 128 * i for i in range(8)]
    assert [tuning.held_out(count) for count in (1, 2, 8)] == [[0], [1], [4]]


def held_out(out: Path) -> tuple[float, float]:
    refined = json.loads((out / "quantkit.json").read_text())["refined"]
    return refined["before"], refined["after"]


def codes_in(out: Path) -> dict[str, torch.Tensor]:
    codes = open_source(out).codes
    assert codes is not None
    return {name: codes.read_codes(name).codes for name in codes.quantized_names()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_codes_stay_and_scales_and_gains_move(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    model = make_model(family)
    for name, more in (("plain", {}), ("refined", REFINE), ("again", REFINE)):
        report = quantkit.gptq(model, tmp_path / name, **OPTIONS, **more)
    plain, refined = (codes_in(tmp_path / name) for name in ("plain", "refined"))
    assert plain.keys() == refined.keys()
    assert all(torch.equal(plain[name], refined[name]) for name in plain)
    assert contents(tmp_path / "refined") == contents(tmp_path / "again")
    before, after = open_source(tmp_path / "plain"), open_source(tmp_path / "refined")
    moved = {n.rpartition(".")[2] for n in before.tensors if not torch.equal(before.read(n), after.read(n))}
    norms = [n for n in before.tensors if n.endswith("norm.weight")]
    assert moved == {"weight"}
    assert all(before.read(n).dtype == after.read(n).dtype for n in norms)
    assert any(not torch.equal(before.read(n), after.read(n)) for n in norms)
    assert held_out(tmp_path / "refined")[1] < held_out(tmp_path / "refined")[0]
    assert report.refined is not None
    assert report.refined.windows == 1
    recipe, usual = (json.loads((tmp_path / n / "quantkit.json").read_text())["recipe"] for n in ("refined", "plain"))
    assert recipe.keys() - usual.keys() == {"refine", "refine_steps"}
    assert report.refined.steps == recipe["refine_steps"] == 6


def test_what_is_written_is_what_was_judged(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    quantkit.gptq(model, tmp_path / "out", **REFINE, **OPTIONS)
    streams = [open_in(path, torch.float32) for path in (model, tmp_path / "out")]
    held = Windows(OPTIONS["calibration"].tokens[4:5], torch.ones(1, dtype=torch.int64))
    _, row = summarize(["a", "b"], score(streams, held, against=True))
    assert row.kl_divergence is not None
    assert row.kl_divergence.mean == pytest.approx(held_out(tmp_path / "out")[1], rel=1e-2)


def test_held_out_windows_never_get_worse(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "Settings", partial(Settings, every=1, gains=5.0, scales=5.0))
    model = make_model()
    report = quantkit.gptq(model, tmp_path / "out", **{**REFINE, "refine_steps": 3}, **OPTIONS)
    quantkit.gptq(model, tmp_path / "plain", **OPTIONS)
    assert report.refined is not None
    assert (report.refined.step, report.refined.steps) == (0, 3)
    assert report.refined.before == report.refined.after
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_stopped_run_goes_on(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder, after: int
) -> None:
    model, out = make_model(), tmp_path / "out"
    quantkit.gptq(model, tmp_path / "whole", **REFINE, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(Refining, "gradients", failing_at(Refining.gradients, after))
        with pytest.raises(UsageError, match="2 of 2 blocks are kept"):
            quantkit.gptq(model, out, **REFINE, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", lambda *_: pytest.fail("made again"))
        quantkit.gptq(model, out, resume=True, progress=recorder, **REFINE, **OPTIONS)
    assert ("refining goes on after step 2" in recorder.notes) == (after == 3)
    assert contents(out) == contents(tmp_path / "whole")
    assert not folder_of(out).exists()


def test_after_a_worse_judgement_it_goes_on_from_the_best_with_half_the_step(make_model: MakeModel) -> None:
    stream = open_in(make_model())
    student = Student(stream, rounded(stream).__getitem__, Settings(), lambda name: torch.float16)
    course = Course(student, Settings(steps=1000, every=1, gains=0.1, scales=0.1))
    gradients = {name: torch.ones_like(offset) for name, offset in student.offsets.items()}
    name = next(iter(gradients))
    moved = []
    for judged in (0.25, 0.2, 0.3, float("nan"), 0.1):
        course.judge(judged)
        before = student.offsets[name].clone()
        assert torch.equal(before, course.best[name])
        course.step(gradients)
        moved.append(float((before - student.offsets[name]).abs().max()) / Settings().scales)
    assert moved[:2] == pytest.approx([0.5, 0.5], rel=0.01)  # the square root of 0.25
    assert moved[2] < 0.25 / 2  # its momentum begins anew
    assert moved[3] < moved[2]
    assert (course.steps, course.judged[-1]) == (5, (4, 0.1))


def test_a_gguf_file_keeps_its_codes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    options = {key: value for key, value in OPTIONS.items() if key not in ("group_size", "bits")}
    for name, more in (("plain", {}), ("refined", REFINE)):
        quantkit.gptq(model, tmp_path / name, ggml="q4_0", pre="gpt-2", **options, **more)
    plain, refined = (gguf.GGUFReader(next((tmp_path / name).glob("*.gguf"))).tensors for name in ("plain", "refined"))
    moved = set()
    for one, other in zip(plain, refined, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        if not np.array_equal(one.data, other.data):
            moved.add(one.name.split(".")[-2])
        if one.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            blocks = [part.data.reshape(-1, 18)[:, 2:] for part in (one, other)]
            np.testing.assert_array_equal(*blocks)
    assert {"attn_norm", "ffn_norm", "output_norm", "attn_q", "ffn_down"} <= moved
    assert held_out(tmp_path / "refined")[1] < held_out(tmp_path / "refined")[0]


def test_what_has_no_gradient_is_left_and_said(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    model = make_model("gemma3n_text", **DISCOVERED["gemma3n_text"])
    report = quantkit.gptq(model, tmp_path / "out", **REFINE, progress=recorder, **OPTIONS)
    assert [text for text in recorder.notes if text.startswith("nothing is refined, since gemma3n_text")]
    assert report.refined is None


def test_one_window_leaves_nothing_to_hold_out(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    options = {**OPTIONS, "calibration": token_matrix(1, 256)}
    report = quantkit.gptq(make_model(), tmp_path / "out", **REFINE, progress=recorder, **options)
    assert report.refined is None
    assert [text for text in recorder.notes if text.startswith("nothing is refined: one calibration window")]


def test_a_dry_run_counts_what_waits(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=40)
    stream = open_in(model, torch.float32)
    needed = tuning.plan_refining_memory(stream, 1024, 256).needed
    assert needed >= 1024 * 256 * stream.source.config.hidden_size * (4 + 2)
    options = {**OPTIONS, "calibration": token_matrix(1024, 256), "dry_run": True}
    told = [quantkit.gptq(model, refine=True, refine_steps=steps, **options) for steps in (8, 32)]
    assert told[0].memory_bytes == told[1].memory_bytes >= needed
    assert quantkit.gptq(model, **options).multiplications < told[0].multiplications < told[1].multiplications


def test_steps_without_refining_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refine_steps 64 are of refine: turn it on"):
        quantkit.gptq(make_model(), tmp_path / "out", refine_steps=64, **OPTIONS)


def test_with_a_budget_the_chosen_codes_are_refined(make_model: MakeModel, tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key not in ("group_size", "bits")}
    report = quantkit.gptq(make_model(), tmp_path / "out", **REFINE, budget="5bpw", **options)
    assert report.budget is not None
    assert report.refined is not None
    assert held_out(tmp_path / "out") == (report.refined.before, report.refined.after)
