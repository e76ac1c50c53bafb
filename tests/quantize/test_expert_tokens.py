"""`--experts all`: an expert's Hessian is of all tokens of its block, and what the block hands on is of its routing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MakeModel, Recorder, token_matrix
from safetensors.torch import load_file, save_file
from support.failing import failing_at
from support.folders import contents
from support.replaying import replaying
from support.streamed import open_stream, streamed_logits
from support.tolerance import summed

import quantkit
from quantkit.blocks.budget import Budget
from quantkit.blocks.stream import ModelStream
from quantkit.errors import UsageError
from quantkit.options import QuantSpec
from quantkit.quantize import gptq
from quantkit.quantize.blockwise import StageWork, quantize_blocks
from quantkit.quantize.targets import plan_linears
from quantkit.quantize.token_weights import TokenWeights, weigh_tokens

OPTIONS: dict[str, Any] = {
    "calibration": token_matrix(6, 64),
    "group_size": 32,
    "evaluate": False,
    "device": "cpu",
    "effort": "fast",
}
FORSAKEN = 3
BLOCK = "model.layers.0.block_sparse_moe"


@pytest.fixture(scope="module")
def model(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose blocks send no token to their last expert: its logit is the mean of the others, and the highest
    has the token."""
    source = make_model("mixtral", dtype="float32", num_experts_per_tok=1)
    folder = tmp_path_factory.mktemp("forsaken") / "model"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("gate.weight")]:
        tensors[name][FORSAKEN] = tensors[name][:FORSAKEN].mean(dim=0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def gathered(stream: ModelStream, spec: QuantSpec, weights: TokenWeights | None = None) -> dict[str, torch.Tensor]:
    """The Hessian that each Linear was quantized by."""
    found: dict[str, torch.Tensor] = {}

    class Noting(StageWork):
        def _finished(self, stage: int) -> Any:
            result = super()._finished(stage)
            for name in result[0]:
                found[self._names[name]] = result[1].clone()
            return result

    tokens = OPTIONS["calibration"].tokens
    plan = plan_linears(stream, spec)
    quantize_blocks(stream, tokens, plan, lambda *_: None, Budget(10**10), weights=weights, work_of=Noting)
    return found


def codes(folder: Path, expert: int) -> dict[str, torch.Tensor]:
    """Of an expert of the first block."""
    tensors = load_file(folder / "model.safetensors")
    return {part: tensors[f"{BLOCK}.experts.{expert}.{part}.qweight"] for part in ("w1", "w2", "w3")}


def tokens_of(folder: Path, expert: int) -> set[int]:
    with (folder / "quant_log.csv").open() as file:
        return {int(row["tokens"]) for row in csv.DictReader(file) if f"{BLOCK}.experts.{expert}." in row["layer"]}


def test_an_expert_that_no_token_reaches_gets_a_hessian_of_all(model: Path, tmp_path: Path, recorder: Recorder) -> None:
    for name, options in {
        "routed": {},
        "all": {"experts": "all", "progress": recorder},
        "rounded": {"method": "round"},
    }.items():
        quantkit.gptq(model, tmp_path / name, **OPTIONS, **options)
    routed, shown, rounded = (codes(tmp_path / name, FORSAKEN) for name in ("routed", "all", "rounded"))
    for part in rounded:
        assert torch.equal(routed[part], rounded[part])
        assert not torch.equal(shown[part], rounded[part])
    assert (tokens_of(tmp_path / "routed", FORSAKEN), tokens_of(tmp_path / "all", FORSAKEN)) == ({0}, {6 * 64})
    assert 0 not in tokens_of(tmp_path / "routed", 0)
    recipes = [json.loads((tmp_path / name / "quantkit.json").read_text())["recipe"] for name in ("routed", "all")]
    assert "experts" not in recipes[0]
    assert recipes[1]["experts"] == "all"
    assert not [text for text in recorder.warnings if "fewer calibration tokens" in text]


@pytest.mark.parametrize("expert", [0, FORSAKEN])
def test_the_hessian_is_that_of_all_tokens(model: Path, expert: int) -> None:
    """Of one expert alone, so that it reads what the unquantized block does; transformers' own forward."""
    own = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    read: list[torch.Tensor] = []
    own.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        own(OPTIONS["calibration"].tokens)
    x = torch.cat(read).reshape(-1, own.config.hidden_size)
    experts = own.model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj[expert].chunk(2)
    between = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)

    names = {part: f"{BLOCK}.experts.{expert}.{part}" for part in ("w1", "w2", "w3")}
    for part, expected in {"w1": x, "w3": x, "w2": between}.items():
        found = gathered(open_stream(model), QuantSpec(group_size=32, experts="all", include=(names[part],)))
        by_hand = expected.T @ expected / len(x)
        close = summed(len(x) + 2 * own.config.hidden_size, scale=float(by_hand.detach().diagonal().max()))
        torch.testing.assert_close(found[names[part]], by_hand, **close)


def test_with_token_weights_the_others_count_as_the_mean_token(model: Path) -> None:
    name, stream, told = f"{BLOCK}.experts.0.w1", open_stream(model), dict[int, Any]()
    tokens = OPTIONS["calibration"].tokens
    weigh_tokens(stream, tokens, 0, stream.budget, told.__setitem__, quantkit.progress.SILENT)
    weights = TokenWeights(told.__getitem__)
    of_own = weights.of(0, name)
    assert of_own is not None
    assert of_own.tokens is not None
    assert 0 < len(of_own.tokens) < tokens.numel()
    counted = torch.ones(tokens.numel())
    counted[of_own.tokens.long()] = of_own.weights

    spec = QuantSpec(group_size=32, experts="all", token_weights=True, include=(name,))
    found = gathered(open_stream(model), spec, weights)[name]
    read: list[torch.Tensor] = []
    with torch.inference_mode(), stream.block(0) as block:
        block.mlp.experts.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        [hidden] = stream.embed([tokens])
        stream.call(0, block, 0, hidden)
    x = read[0]
    by_hand = (x * counted[:, None]).T @ x / counted.sum()
    torch.testing.assert_close(found, by_hand, **summed(len(x), scale=float(by_hand.diagonal().max())))
    assert of_own.effective(5) == pytest.approx(
        float((of_own.weights.sum() + 5) ** 2 / (of_own.weights.square().sum() + 5))
    )


@pytest.mark.parametrize("more", [{}, {"effort": "standard"}, {"effort": "best"}])
def test_stopped_or_short_of_memory_it_writes_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """A block that landed is run again by its routing alone: what it hands on is the same to the bit."""
    options = {**OPTIONS, "experts": "all", "checkpoint_every": "1", **more}
    quantkit.gptq(model, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 11))
        with pytest.raises(UsageError, match="1 of 2 blocks is kept"):
            quantkit.gptq(model, tmp_path / "out", **{**options, "checkpoint_every": "5"})
    quantkit.gptq(model, tmp_path / "out", resume=True, **{**options, "checkpoint_every": "5"})
    with replaying(monkeypatch):
        quantkit.gptq(model, tmp_path / "replayed", **options)
    whole, stopped, replayed = (contents(tmp_path / name) for name in ("whole", "out", "replayed"))
    assert whole == stopped == replayed


def test_a_model_without_experts_is_told_to_have_none(
    make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    quantkit.gptq(make_model(), tmp_path / "out", experts="all", progress=recorder, **OPTIONS)
    assert "its blocks have no experts to show all tokens to: experts=all changes nothing" in recorder.notes
    quantkit.gptq(make_model(), tmp_path / "plain", **OPTIONS)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(ours[name], own) for name, own in theirs.items())


def test_a_config_that_asks_for_routers_logits_is_run_without(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("mixtral", output_router_logits=True)
    tokens = OPTIONS["calibration"].tokens[:1]
    [found] = streamed_logits(open_stream(model), [tokens])
    [expected] = streamed_logits(open_stream(make_model("mixtral")), [tokens])
    assert torch.equal(found, expected)
    quantkit.gptq(model, tmp_path / "out", **OPTIONS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_router_logits"] is True
