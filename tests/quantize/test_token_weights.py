"""Token weights in a run: what they change, and that whatever stops or shares a run changes nothing."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.failing import failing_at
from support.families import DISCOVERED
from support.folders import contents
from support.streamed import open_stream

import quantkit
from quantkit.blocks import memory
from quantkit.blocks.memory import MemoryPlan
from quantkit.blocks.stream import ModelStream
from quantkit.errors import UsageError
from quantkit.options.values import Every
from quantkit.progress import SILENT
from quantkit.quantize import gptq, token_weights
from quantkit.quantize.hessian import HessianAccumulator
from quantkit.quantize.token_weights import StageWeights, weigh_tokens
from quantkit.runs.places import folder_of
from quantkit.runs.shared_weights import sharing_weights
from quantkit.runs.weighing import weights_file
from quantkit.sources import open_source

OPTIONS: dict[str, Any] = {
    "calibration": token_matrix(12, 256),
    "group_size": 32,
    "evaluate": False,
    "device": "cpu",
    "effort": "fast",
}
WEIGHTED: dict[str, Any] = {**OPTIONS, "token_weights": True}
BY_BLOCK = MemoryPlan()


def test_a_weighted_hessian_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 50, 12)).astype(np.float32), rng.gamma(0.3, size=(3, 50)).astype(np.float32)
    sums = HessianAccumulator(12, torch.device("cpu"))
    for part, weight in zip(x, w, strict=True):
        sums.add(torch.from_numpy(part), torch.from_numpy(weight))
    expected = np.einsum("bt,bti,btj->ij", w.astype(float), x, x) / w.sum()
    assert sums.tokens == 150
    again = HessianAccumulator(12, torch.device("cpu"))
    again.unpack(sums.packed())
    for one in (sums, again):
        np.testing.assert_allclose(one.finish("x").numpy(), expected, rtol=1e-4, atol=1e-5)


def test_experts_find_their_tokens_weights() -> None:
    found = StageWeights(torch.tensor([3.0, 0.5, 2.0]), torch.tensor([1, 6, 9], dtype=torch.int32))
    assert found.of(5, 5, torch.tensor([0, 1, 4])).tolist() == [
        1.0,
        0.5,
        2.0,
    ]  # 5 went elsewhere: it counts as the mean
    assert found.of(0, 5, torch.tensor([], dtype=torch.int64)).tolist() == []
    whole = StageWeights(torch.arange(10.0))
    assert whole.of(5, 3, None).tolist() == [5.0, 6.0, 7.0]
    assert StageWeights(torch.tensor([1.0, 1.0, 0.0, 0.0])).effective() == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_of_each_linear_add_up_to_the_stages(make_model: MakeModel, family: str) -> None:
    stream, found = open_stream(make_model(family)), dict[int, Any]()
    weigh_tokens(stream, token_matrix(4, 64).tokens, 0, stream.budget, found.__setitem__, SILENT)
    for tensors in found.values():
        for stage in {key.partition(".")[0] for key in tensors}:
            rows = {key.split(".", 2)[2]: own for key, own in tensors.items() if key.startswith(f"{stage}.rows.")}
            own = {name: tensors[f"{stage}.own.{name}"] for name in rows if f"{stage}.own.{name}" in tensors}
            assert own.keys() == rows.keys()
            if own:
                total = sum(rows[name].sum() * weights for name, weights in own.items()) ** token_weights._POWER
                torch.testing.assert_close(tensors[f"{stage}.weights"], total / total.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_equal_runs_write_equal_bytes_and_their_own(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    model = make_model(family)
    for name, options in (("one", WEIGHTED), ("two", WEIGHTED), ("plain", OPTIONS), ("other", {**WEIGHTED, "seed": 1})):
        quantkit.gptq(model, tmp_path / name, **options)
    one, two, plain, other = (contents(tmp_path / name) for name in ("one", "two", "plain", "other"))
    assert one == two
    assert one["model.safetensors"] not in (plain["model.safetensors"], other["model.safetensors"])
    recipe, usual = (json.loads((tmp_path / name / "quantkit.json").read_text())["recipe"] for name in ("one", "plain"))
    assert (recipe["token_weights"], recipe["seed"]) == (True, 0)
    assert recipe.keys() - usual.keys() == {"token_weights", "seed"}
    with (tmp_path / "one" / "quant_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["n_eff"]) <= int(row["tokens"]) for row in rows if int(row["tokens"]))
    assert any(float(row["n_eff"]) < 0.9 * int(row["tokens"]) for row in rows)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_stopped_run_goes_on_with_its_weights(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    model, out = make_model("mixtral"), tmp_path / "out"
    quantkit.gptq(model, tmp_path / "whole", **WEIGHTED)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 1 + 10 * blocks))
        with pytest.raises(UsageError, match=f"{blocks} of 2 blocks (is|are) kept: resume=True goes on with (it|them)"):
            quantkit.gptq(model, out, **WEIGHTED)
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "weigh_tokens", lambda *_: pytest.fail("made again"))
        quantkit.gptq(model, out, resume=True, **WEIGHTED)
    assert contents(out) == contents(tmp_path / "whole")
    assert not folder_of(out).exists()


@pytest.mark.parametrize("kind", ["folder", "experts", "file"])
@pytest.mark.parametrize("often", [False, True])
def test_a_stopped_pass_goes_on_with_the_block_before(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder, kind: str, often: bool
) -> None:
    """Again and again; with experts' weights, products of rows, and what tells of a file's ends. Where the head took
    long, with the last block too."""
    model, out = make_model("mixtral" if kind == "experts" else "llama", num_hidden_layers=4), tmp_path / "out"
    options = {**WEIGHTED, "checkpoint_every": "1", "row_feedback": kind == "folder"}
    if kind == "file":
        options = {key: value for key, value in options.items() if key != "group_size"}
        options |= {"ggml": "q4_0", "pre": "gpt-2"}
    monkeypatch.setattr(token_weights, "plan_weighing", lambda *_: BY_BLOCK)
    quantkit.gptq(model, tmp_path / "whole", **options)
    kept = []
    for done in (0, 1, 0) if often else (1, 1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(token_weights, "_tensors", failing_at(token_weights._tensors, 1 + done))
            if often:
                patch.setattr(Every, "due", lambda *_: True)
            with pytest.raises(UsageError, match="a part of the token weights, 0 of 4 blocks are kept"):
                quantkit.gptq(model, out, resume=True, **options)
        kept.append([path.name for path in (folder_of(out) / "weights" / "gradients").iterdir()])
    assert kept == ([["00004"], ["00003"], ["00003"]] if often else [["00003"], ["00002"], ["00002"]])
    quantkit.gptq(model, out, resume=True, progress=recorder, **options)
    first = 4 if often else 3
    assert f"token weights of blocks {first} to 4 are kept: weighing goes on" in recorder.notes
    assert contents(out) == contents(tmp_path / "whole")
    assert not folder_of(out).exists()


@pytest.mark.parametrize("damaged", ["00003.safetensors", "gradients/00003/batch-00002.safetensors"])
def test_a_damaged_part_of_the_weights_is_made_anew(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder, damaged: str
) -> None:
    model, out = make_model(num_hidden_layers=4), tmp_path / "out"
    options = {**WEIGHTED, "checkpoint_every": "1"}
    monkeypatch.setattr(token_weights, "plan_weighing", lambda *_: BY_BLOCK)
    quantkit.gptq(model, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "_tensors", failing_at(token_weights._tensors, 2))
        with pytest.raises(UsageError):
            quantkit.gptq(model, out, **options)
    path = folder_of(out) / "weights" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    quantkit.gptq(model, out, resume=True, progress=recorder, **options)
    assert [text for text in recorder.warnings if text.startswith("token weights of the unfinished run are damaged")]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_pass_that_goes_on_does_not_hold_all_blocks(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are known between blocks; a run without any may do either."""
    model, out, plan = make_model(num_hidden_layers=4), tmp_path / "out", token_weights.plan_weighing
    options = {**WEIGHTED, "checkpoint_every": "1", "calibration": token_matrix(64, 256)}
    plans = []
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "plan_weighing", lambda *_: BY_BLOCK)
        patch.setattr(token_weights, "_tensors", failing_at(token_weights._tensors, 2))
        with pytest.raises(UsageError):
            quantkit.gptq(model, out, **options)
    monkeypatch.setattr(token_weights, "plan_weighing", lambda *given: plans.append(plan(*given)) or plans[-1])
    quantkit.gptq(model, out, resume=True, **options)
    quantkit.gptq(model, tmp_path / "whole", **options)
    assert [one.at_once for one in plans[1::2]] == [False, True]  # the others only tell how large the run is
    assert contents(out) == contents(tmp_path / "whole")


def test_what_tells_of_the_ends_is_made_where_something_may_round_them(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By GGUF files, and by runs whose weights one may take."""
    seen: list[bool] = []
    weigh = token_weights.weigh_tokens
    monkeypatch.setattr(
        token_weights, "weigh_tokens", lambda *given: seen.append(given[8] is not None) or weigh(*given)
    )
    model = make_model()
    quantkit.gptq(model, tmp_path / "folder", **WEIGHTED)
    with sharing_weights(tmp_path / "kept"):
        quantkit.gptq(model, tmp_path / "shared", **WEIGHTED)
    of_file = {name: value for name, value in WEIGHTED.items() if name not in ("bits", "group_size")}
    made = quantkit.gptq(model, tmp_path / "file", ggml="q4_0", pre="gpt-2", **of_file)
    assert seen == [False, True, True]
    assert made.ends
    assert contents(tmp_path / "folder") == contents(tmp_path / "shared")


def test_damaged_weights_are_made_anew(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    model, out = make_model(), tmp_path / "out"
    quantkit.gptq(model, tmp_path / "whole", **WEIGHTED)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 6))
        with pytest.raises(UsageError):
            quantkit.gptq(model, out, **WEIGHTED)
    path = weights_file(folder_of(out), 1)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    quantkit.gptq(model, out, resume=True, progress=recorder, **WEIGHTED)
    assert any("token weights" in text for text in recorder.warnings)
    assert contents(out) == contents(tmp_path / "whole")


def test_runs_that_share_weights_make_them_once(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever codes they are for; another seed or text has others, and what is damaged is made anew."""
    model, kept, made = make_model(), tmp_path / "kept", []
    weigh = token_weights.weigh_tokens
    monkeypatch.setattr(token_weights, "weigh_tokens", lambda *given: made.append(given[2]) or weigh(*given))
    options = {
        "four": WEIGHTED,
        "three": {**WEIGHTED, "bits": 3, "correct": "auto"},
        "seed": {**WEIGHTED, "seed": 1},
        "text": {**WEIGHTED, "calibration": token_matrix(12, 256, seed=1)},
    }
    for name, given in options.items():
        quantkit.gptq(model, tmp_path / f"{name} alone", **given)
    assert made == [0, 0, 1, 0]
    made.clear()
    with sharing_weights(kept):
        for name, given in options.items():
            quantkit.gptq(model, tmp_path / name, **given)
            assert contents(tmp_path / name) == contents(tmp_path / f"{name} alone")
        assert made == [0, 1, 0]
        for path in kept.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"\1")
        quantkit.gptq(model, tmp_path / "again", **WEIGHTED)
        quantkit.gptq(model, tmp_path / "once more", **WEIGHTED)
    assert made == [0, 1, 0, 0]
    assert contents(tmp_path / "again") == contents(tmp_path / "once more") == contents(tmp_path / "four")


def test_what_cannot_be_weighed_says_so(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    model = make_model("gemma3n_text", **DISCOVERED["gemma3n_text"])
    quantkit.gptq(model, tmp_path / "out", progress=recorder, **WEIGHTED)
    assert [text for text in recorder.notes if text.startswith("every token counts the same, since gemma3n_text")]
    quantkit.gptq(model, tmp_path / "plain", **OPTIONS)
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]


def test_a_kind_of_block_without_a_gradient_is_found_before_the_pass(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """Mixtures begin with dense blocks, hybrids with others: the first block does not speak for all."""
    model = make_model("qwen3_moe", mlp_only_layers=[0])
    call = ModelStream.call

    def without(stream: ModelStream, index: int, *given: Any) -> torch.Tensor:
        output = call(stream, index, *given)
        return output.detach() if index else output

    monkeypatch.setattr(ModelStream, "call", without)
    quantkit.gptq(model, tmp_path / "out", progress=recorder, **WEIGHTED)
    assert [text for text in recorder.notes if "qwen3_moe has a forward without a gradient" in text]


def test_states_that_no_disk_has_room_for_are_told(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    model, usage = make_model(), shutil.disk_usage(tmp_path)
    plan, rooms = MemoryPlan(kept="disk", head_rows=memory.SLICE), []
    monkeypatch.setattr(token_weights, "plan_weighing", lambda *given: rooms.append(given[7]) or plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    quantkit.gptq(model, tmp_path / "out", progress=recorder, **WEIGHTED)
    assert [text for text in recorder.warnings if "has 1.0 kB left: name another by TMPDIR" in text]
    assert rooms == [1000, 1000]  # of the plan that is told, and of that which is kept to
    quantkit.gptq(model, tmp_path / "plain", **OPTIONS)
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]


def test_plain_rounding_has_no_weights(make_model: MakeModel, tmp_path: Path) -> None:
    for name, options in (("one", WEIGHTED), ("two", OPTIONS)):
        quantkit.gptq(make_model(), tmp_path / name, method="round", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_plan_changes_the_bytes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = make_model(family)
    for name, plan in (("at-once", MemoryPlan(at_once=True)), ("by-block", MemoryPlan(head_rows=memory.SLICE))):
        monkeypatch.setattr(token_weights, "plan_weighing", lambda *_, plan=plan: plan)
        quantkit.gptq(model, tmp_path / name, **WEIGHTED)
    assert contents(tmp_path / "at-once") == contents(tmp_path / "by-block")


def test_a_dry_run_counts_the_states(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model none are kept, for all of it is held with a batch's graph; else each block's in half."""
    options = {**OPTIONS, "calibration": token_matrix(1024, 256), "dry_run": True}
    model = make_model(num_hidden_layers=40)
    states = 40 * 1024 * 256 * open_source(model).config.hidden_size * 2
    plain, weighted = (quantkit.gptq(model, **{**options, "token_weights": on}).memory_bytes for on in (False, True))
    assert plain <= weighted < states
    monkeypatch.setattr(memory, "_SMALL", 0)
    weighted = quantkit.gptq(model, **{**options, "token_weights": True}).memory_bytes
    assert states < weighted < 1.5 * states
