"""Bits chosen by what they are worth: the program, the rules that are written, whole runs, and whatever stops them."""

from __future__ import annotations

import csv
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.failing import failing_at
from support.families import DISCOVERED
from support.folders import contents
from support.replaying import replaying
from support.streamed import open_stream

import quantkit
from quantkit.errors import MissingPackageError, QuantkitError, UsageError
from quantkit.options import QuantSpec
from quantkit.options.grid import Override, matches, pattern_regex
from quantkit.quantize import allocate, gptq, token_weights, trials
from quantkit.quantize.allocate import Allocator, folder_candidates, least_loss
from quantkit.quantize.holdout import HeldOutSums
from quantkit.quantize.targets import CheckpointTarget
from quantkit.runs.landing import choice_file
from quantkit.runs.places import folder_of
from quantkit.runs.shared_weights import keep_losses, sharing_weights, take_losses
from quantkit.sources import open_source
from quantkit.verbs.gptq import drawing

OPTIONS: dict[str, Any] = {"calibration": token_matrix(16, 256), "evaluate": False, "device": "cpu"}
BUDGET: dict[str, Any] = {**OPTIONS, "budget": "6bpw"}


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_program_finds_the_least(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.gamma(0.5, size=(5, 4)) * 10.0 ** rng.integers(-6, 0, size=(5, 1))
    sizes = 64 * rng.integers(1, 40, size=(5, 4))
    room = int(sizes.min(axis=1).sum() * 2)
    fitting = [
        (sum(losses[range(5), picked]), picked)
        for picked in product(range(4), repeat=5)
        if sizes[range(5), picked].sum() <= room
    ]
    chosen, gap = least_loss(losses.tolist(), sizes.tolist(), room)
    assert losses[range(5), chosen].sum() == pytest.approx(min(fitting)[0], rel=1e-4)
    assert 0 <= gap <= 1e-4


def test_where_nothing_loses_anything_the_room_holds_all_the_same() -> None:
    chosen, _ = least_loss([[0.0, 0.0], [0.0, 0.0]], [[64, 128], [64, 128]], 192)
    assert sum((64, 128)[number] for number in chosen) <= 192


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fits", "not_these"),
    [
        ("a.{0,17}.{q,kv}_x", ["a.0.q_x", "a.17.kv_x"], ["a.1.q_x", "a.0.q,kv_x", "a.0.q_xx"]),
        ("*{a,ab}c*", ["xabcy", "ac"], ["ab"]),
        ("{a.b,c}", ["a.b", "c"], ["axb"]),
        ("a{b", ["a{b"], ["ab"]),
        ("[a]{b}", ["[a]b"], ["ab"]),
    ],
)
def test_either_of_several_texts(pattern: str, fits: list[str], not_these: list[str]) -> None:
    for name in fits + not_these:
        assert matches(pattern, name) == (name in fits)
        assert bool(re.fullmatch(pattern_regex(pattern), name)) == (name in fits)


# -- what there is to choose from --------------------------------------------------------------------------------------


def allocator(model: Path, allowance: str, readers: str = "any", **options: Any) -> Allocator:
    stream, spec = open_stream(model), QuantSpec(**options)
    return Allocator(
        *(stream, spec, allowance, folder_candidates(stream, spec, "gptq", readers)),
        lambda own, _: CheckpointTarget(stream, own, "gptq", 10**9),
        readers,
    )


def test_units_are_what_readers_fuse(make_model: MakeModel) -> None:
    found = allocator(make_model(), "6bpw", "vllm").units
    assert [len(unit.names) for unit in found] == [3, 1, 2, 1] * 2
    assert found[0].pattern == ("model.layers.", ".self_attn.{q_proj,k_proj,v_proj,qkv_proj}")
    assert found[2].pattern == ("model.layers.", ".mlp.{gate_proj,up_proj,gate_up_proj}")
    groups = {unit.names[0].rpartition(".")[2]: {c.changes.group_size for c in unit.candidates} for unit in found}
    assert {c.changes.bits for unit in found for c in unit.candidates} == {4, 8}
    assert groups == {"q_proj": {32, 64}, "o_proj": {32, 64}, "gate_proj": {32, 64}, "down_proj": {32}}  # 64, 96 wide
    partly = allocator(make_model(), "6bpw", "vllm", exclude=("*.k_proj",)).units
    assert partly[0].pattern == ("model.layers.", ".self_attn.{q_proj,v_proj}")
    mixed = allocator(make_model("mixtral"), "6bpw", "vllm").units
    assert [len(unit.names) for unit in mixed[:3]] == [3, 1, 12]
    assert mixed[2].pattern == ("model.layers.", ".block_sparse_moe.experts*")
    apart = allocator(make_model("mixtral"), "6bpw").units
    assert [len(unit.names) for unit in apart[:5]] == [1, 1, 1, 1, 12]
    assert apart[1].pattern == ("model.layers.", ".self_attn.k_proj")


def test_widths_that_no_group_divides_get_whole_rows(make_model: MakeModel) -> None:
    found = allocator(make_model(intermediate_size=80), "6bpw", "vllm").units
    down = next(unit for unit in found if unit.names[0].endswith("down_proj"))
    assert {candidate.changes.group_size for candidate in down.candidates} == {-1}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_rules_say_what_was_chosen(make_model: MakeModel, family: str) -> None:
    one = allocator(make_model(family, num_hidden_layers=3), "6bpw", "vllm")
    rng = np.random.default_rng(0)
    chosen = [int(rng.integers(len(unit.candidates))) for unit in one.units]
    target = one.target_with(chosen)  # which looks at its own rules
    assert target.quantized_bytes == sum(u.bytes[n] for u, n in zip(one.units, chosen, strict=True))
    rules = target._quantization["dynamic"]
    assert all(rule.startswith("+:^") and rule.endswith("$") for rule in rules)
    for unit in one.units:  # vLLM asks for the fused names
        fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
        last = unit.names[0].rpartition(".")[2]
        asked = [*unit.names, unit.names[0].replace(last, fused.get(last, last))]
        found = [next((c for rule, c in rules.items() if re.match(rule[2:], name)), None) for name in asked]
        assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "2bpw"}, r"budget=2bpw: the smallest of the candidates take \d\.\d\dbpw; give at least that"),
        ({"budget": "12bpw"}, r"12bpw: the largest of the candidates take \d+\.\d\dbpw, so there is nothing to choose"),
        ({"budget": "1KB"}, r"1KB: the smallest of the candidates take [\d.]+ [kM]B; give at least that"),
        ({"budget": "1GB"}, r"1GB: the largest of the candidates take [\d.]+ [kM]B, so there is nothing to choose"),
        ({"budget": "some"}, "give bits per weight such as 4.5bpw, or a size such as 900MB"),
        ({"budget": "5bpw,some"}, "give bits per weight such as 4.5bpw, or a size such as 900MB"),
        ({"budget": "5bpw, 5.0 bpw"}, "the same budget is given twice"),
        ({"budget": "5bpw,12bpw"}, r"12bpw: the largest of the candidates take \d+\.\d\dbpw"),
        ({"bits": 4}, "chooses bits and groups: leave bits out"),
        ({"override": {"*.q_proj": Override(bits=8)}}, "leave override out"),
        ({"method": "round"}, "leave method=round out"),
        ({"ggml": "q4_0", "budget_for": "vllm"}, "leave ggml out"),
        ({"token_weights": False}, "budget chooses by token weights: leave .*token.weights[= ]false out"),
        ({"format": "awq"}, "an AWQ folder has one for all"),
        ({"budget_for": "all"}, "choose any, vllm"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    make_model: MakeModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantkitError, match=message) as caught:
        quantkit.gptq(make_model(), tmp_path / "out", **{**BUDGET, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_scipy_it_says_what_to_install(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocate, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"scipy: pip install 'quantkit\[budget\]'"):
        quantkit.gptq(make_model(), tmp_path / "out", **BUDGET)


def test_a_model_without_gradients_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("gemma3n_text", **DISCOVERED["gemma3n_text"])
    with pytest.raises(UsageError, match="without gradients nothing tells what bits are worth"):
        quantkit.gptq(model, tmp_path / "out", **BUDGET)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "format", "budget"),
    [
        ("llama", "gptq", "6bpw"),
        ("mixtral", "gptq_v2", "4.5bpw"),
        ("llama", "compressed-tensors", "5bpw"),
        ("llama", "mlx", "5.5bpw"),
        ("llama", "gptq", "130KB"),
    ],
)
def test_a_budget_is_kept_and_read(
    make_model: MakeModel, tmp_path: Path, family: str, format: str, budget: str
) -> None:
    model, out = make_model(family), tmp_path / "out"
    report = quantkit.gptq(model, out, **{**BUDGET, "budget": budget}, format=format)
    held = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if budget.endswith("bpw"):
        assert float(budget.removesuffix("bpw")) - 1 < report.bits_per_weight <= float(budget.removesuffix("bpw"))
    else:
        assert 120_000 < held <= 130_000
    assert report.bytes < held
    source = open_source(out)
    assert source.codes is not None
    rows_of = (source.codes.read_codes(name) for name in source.quantized_names())
    assert len({(own.bits, own.scales.shape[1] / own.shape[1]) for own in rows_of}) > 1
    with (out / "quant_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"]: int(row["bits"]) for row in rows} == {
        name: source.codes.bits(name) for name in source.quantized_names()
    }
    spent = json.loads((out / "quantkit.json").read_text())["spent"]
    assert spent == report.budget.as_dict()
    assert sum(float(row["planned"]) for row in rows) == pytest.approx(spent["predicted"], rel=1e-4)
    assert report.predicted == pytest.approx(spent["predicted"], rel=0.5)
    assert sum(share["weights"] for share in spent["shares"]) == pytest.approx(1)
    verified = quantkit.verify(out)
    assert verified.ok, verified.problems
    again = quantkit.gptq(model, out, **{**BUDGET, "budget": budget}, format=format, resume=True)
    assert again.budget == report.budget


@pytest.mark.parametrize(("family", "budget"), [("llama", "5.5bpw"), ("qwen3_moe", "5bpw"), ("llama", "100KB")])
def test_a_gguf_file_of_chosen_types(make_model: MakeModel, tmp_path: Path, family: str, budget: str) -> None:
    own = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    model, out = make_model(family, **own), tmp_path / "out"
    options: dict[str, Any] = {**BUDGET, "budget": budget, "ggml": "q4_0", "pre": "gpt-2"}
    planned = quantkit.gptq(model, out, dry_run=True, **options)
    report = quantkit.gptq(model, out, **options)
    held = report.model.stat().st_size
    if budget.endswith("bpw"):
        assert float(budget.removesuffix("bpw")) - 1 < report.bits_per_weight <= float(budget.removesuffix("bpw"))
    else:
        assert 95_000 < held <= 100_000
    assert planned.bytes >= report.bytes
    assert report.bytes < held
    types = {share.type for share in report.budget.shares if share.weights}
    assert len(types) > 1
    source = open_source(report.model)
    with (out / "quant_log.csv").open() as file:
        told = {row["layer"]: row["type"] for row in csv.DictReader(file)}
    assert set(told.values()) == types
    assert {source.tensors[f"{name}.weight"].stored_as for name in told} == types
    assert quantkit.verify(out, generate=False).ok
    lines = "\n".join(map(str, report.lines()))
    assert "chosen types" in lines
    assert "Q4_1" in "\n".join(map(str, planned.lines()))


def test_vllm_finds_the_rules(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.gptq(make_model(), tmp_path / "out", **BUDGET, budget_for="vllm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    [found] = quantkit.verify(tmp_path / "out", generate=False).models
    [load] = [one for one in found.loads if one.program == "vLLM"]
    assert load.ok, load.why


def test_too_few_tokens_to_hold_any_out_are_told(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    few = {**BUDGET, "calibration": token_matrix(4, 32)}
    quantkit.gptq(make_model(), tmp_path / "out", progress=recorder, **few)
    assert any(text.startswith("too few calibration tokens to hold any out") for text in recorder.warnings)


def test_it_is_better_than_one_precision_for_all(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=4)
    uniform = quantkit.gptq(model, tmp_path / "uniform", bits=4, group_size=32, token_weights=True, **OPTIONS)
    chosen = quantkit.gptq(model, tmp_path / "chosen", budget=f"{uniform.bits_per_weight:.4f}bpw", **OPTIONS)
    assert chosen.bits_per_weight <= uniform.bits_per_weight + 1e-3
    assert chosen.predicted < uniform.predicted


def test_a_dry_run_has_the_candidates(make_model: MakeModel, tmp_path: Path) -> None:
    report = quantkit.gptq(make_model(), tmp_path / "out", **{**BUDGET, "budget_for": "vllm"}, dry_run=True)
    assert {(share.bits, share.group_size) for share in report.budget.shares} == set(product((4, 8), (32, 64)))
    assert report.budget.least < report.bytes < report.budget.most
    assert report.bits_per_weight == pytest.approx(6, abs=0.1)
    told = "\n".join(map(str, report.lines()))
    assert "at most " in told
    assert "4, 8 bits in groups of 32, 64" in told
    assert not (tmp_path / "out").exists()


# -- several budgets ---------------------------------------------------------------------------------------------------


def test_several_budgets_of_one_pass(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_model(), []
    alone = quantkit.gptq(model, tmp_path / "alone", **BUDGET)
    weigh, pass_over = token_weights.weigh_tokens, trials.trial_losses
    monkeypatch.setattr(token_weights, "weigh_tokens", lambda *given: calls.append("weights") or weigh(*given))
    monkeypatch.setattr(trials, "trial_losses", lambda *given: calls.append("losses") or pass_over(*given))
    several = {**BUDGET, "budget": "5bpw,6bpw,130KB"}
    planned = quantkit.gptq(model, tmp_path / "out", dry_run=True, **several)
    assert [one.out.name for one in (planned, *planned.others)] == ["out-5bpw", "out-6bpw", "out-130KB"]
    told = "\n".join(map(str, planned.lines()))
    assert all(f"would write {tmp_path}/out-{budget}" in told for budget in ("5bpw", "6bpw", "130KB"))
    report = quantkit.gptq(model, tmp_path / "out", **several)
    assert calls == ["weights", "losses"]
    assert contents(tmp_path / "out-6bpw") == contents(tmp_path / "alone")
    assert report.others[0].budget == alone.budget
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "out-5bpw", "out-6bpw", "out-130KB"}
    with pytest.raises(UsageError, match="out-5bpw already exists"):
        quantkit.gptq(model, tmp_path / "out", **several)


def test_a_stopped_family_goes_on(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, several = make_model(), {**BUDGET, "budget": "5bpw,6bpw"}
    quantkit.gptq(model, tmp_path / "whole", **several)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 14 + 5))
        with pytest.raises(UsageError):
            quantkit.gptq(model, tmp_path / "out", **several)
    assert (tmp_path / "out-5bpw").is_dir()
    assert not (tmp_path / "out-6bpw").exists()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "trial_losses", lambda *_: pytest.fail("tried again"))
        patch.setattr(token_weights, "weigh_tokens", lambda *_: pytest.fail("weighed again"))
        quantkit.gptq(model, tmp_path / "out", resume=True, **several)
    for budget in ("5bpw", "6bpw"):
        assert contents(tmp_path / f"out-{budget}") == contents(tmp_path / f"whole-{budget}")
    assert not list(tmp_path.glob(".*"))


def test_losses_that_are_damaged_are_found_again(make_model: MakeModel, tmp_path: Path) -> None:
    with sharing_weights(tmp_path):
        assert take_losses("a") is None
        keep_losses("a", {"losses.x": torch.tensor([1.0, 2.0])})
        assert take_losses("a")["losses.x"].tolist() == [1, 2]
        path = tmp_path / "a" / "losses.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert take_losses("a") is None


# -- what stops or shares a run changes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_stopped_run_goes_on_with_its_choice(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    model, out = make_model(), tmp_path / "out"
    options = {**BUDGET, "budget_for": "vllm"}  # a stack for each stage
    quantkit.gptq(model, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 1 + 4 * blocks))
        with pytest.raises(UsageError, match=f"{blocks} of 2 blocks (is|are) kept"):
            quantkit.gptq(model, out, **options)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "trial_losses", lambda *_: pytest.fail("tried again"))
        patch.setattr(allocate, "least_loss", lambda *_: pytest.fail("chosen again"))
        quantkit.gptq(model, out, resume=True, **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert not folder_of(out).exists()


def test_a_pass_that_was_stopped_is_made_again(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    model, out = make_model(), tmp_path / "out"
    quantkit.gptq(model, tmp_path / "whole", **BUDGET)
    with monkeypatch.context() as patch:
        patch.setattr(gptq.SharedFactor, "solve", failing_at(gptq.SharedFactor.solve, 9))
        with pytest.raises(UsageError):
            quantkit.gptq(model, out, **BUDGET)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 6))
        with pytest.raises(UsageError):
            quantkit.gptq(model, out, resume=True, **BUDGET)
    path = choice_file(folder_of(out))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    quantkit.gptq(model, out, resume=True, progress=recorder, **BUDGET)
    assert any("the choice that the unfinished run made is damaged" in text for text in recorder.warnings)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_little_memory_changes_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    model = make_model("mixtral")
    quantkit.gptq(model, tmp_path / "whole", **BUDGET)
    with replaying(monkeypatch):
        quantkit.gptq(model, tmp_path / "replayed", **BUDGET)
    assert contents(tmp_path / "whole") == contents(tmp_path / "replayed")


def test_every_fourth_batch_is_held_out() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 20, 6)).astype(np.float32), rng.gamma(0.5, size=(3, 8, 20)).astype(np.float32)
    sums = HeldOutSums(6, torch.device("cpu"), 2)
    for number in range(8):
        part = HeldOutSums(6, torch.device("cpu"), 2)
        stage, *own = map(torch.from_numpy, w[:, number])
        part.add(torch.from_numpy(x[number]), stage, number, *own)
        sums.merge(part)
    again = HeldOutSums(6, torch.device("cpu"), 2)
    again.unpack(sums.packed())
    held = np.isin(np.arange(8), (3, 7))
    for one in (sums, again):
        H, judges = one.finish("x")
        for found, weights, mine in zip((H, *judges), w, (~held, held, held), strict=True):
            own = np.einsum("bt,bti,btj->ij", weights[mine].astype(float), x[mine], x[mine]) / weights[mine].sum()
            np.testing.assert_allclose(found.numpy(), own, rtol=1e-4, atol=1e-5)
    assert sums.tokens == 160


def test_too_few_batches_hold_nothing_out() -> None:
    sums = HeldOutSums(6, torch.device("cpu"), 1)
    sums.add(torch.ones(3, 6), None, 0, None)
    found = sums.finish("x")
    assert torch.equal(found.H, found.judges[0])
    assert float(found.H.sum()) == 36
    nothing = HeldOutSums(6, torch.device("cpu"), 1).finish("x")
    assert not nothing.H.any()


def test_a_dry_run_counts_what_trying_takes(make_model: MakeModel) -> None:
    options = {**OPTIONS, "dry_run": True, "memory": "2GB"}
    model = make_model(intermediate_size=2048)
    plain = quantkit.gptq(model, token_weights=True, **options).memory_bytes
    assert quantkit.gptq(model, budget="5bpw", **options).memory_bytes > plain + 3 * 4 * 2048**2


def test_one_factor_serves_all_candidates() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))).float()
    W, H = torch.from_numpy(rng.normal(size=(16, 64))).float(), x.T @ x / 200
    shared = gptq.SharedFactor()
    for bits, group_size in ((2, 32), (4, 64), (8, 32)):
        spec = QuantSpec(bits=bits, group_size=group_size)
        [own], [alone] = shared.solve([W], H, spec), gptq.solve([W], H, spec)
        assert torch.equal(own.linear.codes, alone.linear.codes)
        assert torch.equal(own.loss, alone.loss)


# -- the plot ----------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_choice_is_better_than(make_model: MakeModel) -> None:
    one = allocator(make_model(), "130KB")
    rng = np.random.default_rng(0)
    losses = {
        name: np.sort(rng.gamma(0.5, size=len(unit.candidates)))[::-1].tolist()
        for unit in one.units
        for name in unit.names
    }
    front = one.front(losses)
    sizes, lost = zip(*front, strict=True)
    assert len(front) > 10
    assert list(lost) == sorted(lost, reverse=True)
    least, most = (sum(choose(unit.bytes) for unit in one.units) for choose in (min, max))
    fixed = one.target.bytes - one.target.quantized_bytes
    assert sizes[0] == least + fixed
    assert sizes[-1] <= most + fixed
    for size, loss in front[:: len(front) // 4]:
        one.room = size - fixed
        chosen, _ = one.choose(losses)
        assert one.spent(chosen, 0.0, losses).predicted == pytest.approx(loss, rel=1e-3)
    chosen, _ = one.choose(losses)
    alike = one.alike(chosen, losses)
    assert set(alike) == {f"{bits}-bit group 32" for bits in (2, 3, 4, 8)}  # which divides all widths
    assert all(least + fixed <= size <= most + fixed for size, _ in alike.values())


def test_a_run_draws_what_was_chosen(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    model = make_model()
    quantkit.gptq(model, tmp_path / "out", **BUDGET)
    drawn = (tmp_path / "out" / "budget.svg").read_text()
    assert all(text in drawn for text in ("chosen for each size", "one for all", "4-bit group 32", "6bpw"))
    assert (tmp_path / "out" / "budget.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(drawing, "find_spec", lambda _: None)
    quantkit.gptq(model, tmp_path / "plain", progress=recorder, **BUDGET)
    assert not (tmp_path / "plain" / "budget.svg").exists()
    assert any(text.startswith("no plot of the budget: it needs matplotlib") for text in recorder.notes)
