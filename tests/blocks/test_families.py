"""Every family of the table, families that are not in it, mixtures of experts, and which modules are quantized."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, MakeModel, Recorder, random_model, token_matrix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import DISCOVERED
from support.streamed import greedy, open_stream, streamed_logits
from support.tolerance import forward
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import quantkit
from quantkit.blocks import weights
from quantkit.blocks.families import FAMILIES as TABLE
from quantkit.blocks.families import Family, discover_blocks
from quantkit.blocks.stream import ModelStream
from quantkit.errors import SourceError, UsageError
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.targets import plan_linears
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

IDS = token_matrix(2, 24, seed=5).tokens
OPTIONS: dict[str, Any] = {"device": "cpu", "evaluate": False, "group_size": 32}


def folder_of(family: str, make_model: MakeModel, **options: Any) -> Path:
    return make_model(family, **{**DISCOVERED.get(family, {}), **options})


def layer_error(folder: Path, losses: list[Any]) -> tuple[float, float]:
    return sum(layer.loss for layer in losses), sum(layer.rtn_loss for layer in losses)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_familys_blocks_is_in_its_row(family: str, make_model: MakeModel) -> None:
    """Routers of mixtures are no Linears in transformers."""
    stream = open_stream(make_model(family))
    block_linears = {
        f"{stream.blocks[index]}.{name}"
        for index, block in enumerate(stream.modules)
        for name, module in block.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
    }
    listed = {
        f"{stream.blocks[index]}.{name}"
        for index, block in enumerate(stream.modules)
        for name in stream.family.linears(block)
    }
    assert listed == block_linears


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_of_every_family_beats_plain_rounding(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model(family)
    report = quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    assert len(report.layers) == len(dict(open_stream(folder).linears()))
    for layer in report.layers:
        assert layer.tokens > 0
        assert layer.loss < layer.rtn_loss, layer.name

    batches = [tiny_tokens.tokens]  # the text it was calibrated on: at this size another text says nothing
    logits = [streamed_logits(open_stream(path), batches)[0] for path in (folder, tmp_path / "out")]
    rounded = streamed_logits(_rounded(folder), batches)[0]
    assert float((logits[1] - logits[0]).square().mean()) < float((rounded - logits[0]).square().mean())


def _rounded(folder: Path) -> ModelStream:
    """The model with every planned Linear plainly rounded when it is read."""
    stream = open_stream(folder)
    plan = plan_linears(stream, QuantSpec(group_size=32))
    transposed = {name for name in plan if stream.weights.tensors[f"{name}.weight"].shape != plan[name].shape}
    read = stream.weights.read

    def rounded(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if not (name.endswith(".weight") and module in plan):
            return read(name)
        weight = read(name).T if _is_turned(folder) else read(name)
        result = round_to_nearest(weight, plan[module].spec).dequantize()
        return result.T if _is_turned(folder) else result

    assert not transposed or _is_turned(folder)
    object.__setattr__(stream.weights, "read", rounded)
    return stream


def _is_turned(folder: Path) -> bool:
    return open_source(folder).config.model_type == "gpt2"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_writes_on_as_our_reader_does(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Of the dequantized checkpoint. GPTQ folders themselves are loaded by the judges' tests, in their environment."""
    quantkit.gptq(make_model(family), tmp_path / "gptq", calibration=tiny_tokens, **OPTIONS)
    quantkit.convert(tmp_path / "gptq", tmp_path / "whole", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    ids = IDS[:1]
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(streamed_logits(open_stream(tmp_path / "gptq"), [ids])[0], expected, **forward(expected))
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    ours = greedy(tmp_path / "gptq", ids[0].tolist(), 8)
    assert written[0, ids.shape[1] :].tolist() == ours[: written.shape[1] - ids.shape[1]]


@pytest.mark.parametrize("family", ["gpt2", *EXPERTS])
def test_a_quantized_folder_is_a_source_again(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder
) -> None:
    """Conv1D keeps its weight the other way round than codes; experts lie apart."""
    quantkit.gptq(make_model(family), tmp_path / "one", calibration=tiny_tokens, bits=8, **OPTIONS)
    with pytest.raises(UsageError, match=r"one is quantized already \(8-bit codes\).*requantize=True"):
        quantkit.gptq(tmp_path / "one", tmp_path / "two", calibration=tiny_tokens, bits=8, **OPTIONS)
    quantkit.gptq(tmp_path / "one", tmp_path / "two", calibration=tiny_tokens, bits=8, **OPTIONS, requantize=True)
    part = {"include": ["*.0.*"], "requantize": True, "dry_run": True, "progress": recorder}
    quantkit.gptq(tmp_path / "one", tmp_path / "part", calibration=tiny_tokens, bits=8, **OPTIONS, **part)
    said = [text for text in recorder.warnings if "and not quantized" in text]
    assert said == ["Linears that are GPTQ8 in one, and not quantized, become float16"]
    logits = [streamed_logits(open_stream(path), [IDS])[0] for path in (make_model(family), tmp_path / "two")]
    assert float((logits[0] - logits[1]).abs().mean()) < 0.05 * float(logits[0].std())


def test_blocks_without_experts_may_stand_beside_those_with(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model("qwen3_moe", mlp_only_layers=[0], dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(IDS).logits
    torch.testing.assert_close(streamed_logits(open_stream(folder), [IDS])[0], expected, **forward(expected))
    report = quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    names = [layer.name for layer in report.layers]
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.1.mlp.experts.3.gate_proj" in names
    assert len(names) == 7 + 4 + 4 * 3


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_base_models_checkpoint_is_published_as_the_whole_model(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """GPT-2 on the Hub: names without "transformer.", and masks stored as if they were weights."""
    folder = tmp_path / "gpt2"
    shutil.copytree(make_model("gpt2", tied=True), folder)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
    save_file({**weights, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, folder / "model.safetensors", {"format": "pt"})

    same = streamed_logits(open_stream(make_model("gpt2", tied=True)), [IDS])[0]
    assert torch.equal(streamed_logits(open_stream(folder), [IDS])[0], same)
    quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    assert "transformer.h.0.attn.c_attn.qweight" in names
    assert "transformer.wte.weight" in names
    assert not any(name.endswith(".attn.bias") for name in names)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1"),
        ("olmoe", "model.layers.1.mlp.experts.3.gate_proj"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj"),
    ],
)
def test_experts_are_published_under_the_names_that_readers_know(
    family: str, name: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    quantkit.gptq(make_model(family), tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stored:
        assert stored.get_slice(f"{name}.qweight").get_dtype() == "I32"
        routers = [key for key in stored.keys() if re.search(r"\.(gate)\.weight$", key)]  # noqa: SIM118
    assert routers, "the router stays as it is"


def test_names_that_gptqmodel_gives_are_understood(make_model: MakeModel, tmp_path: Path) -> None:
    """It calls the parts of Mixtral's experts as Llama's, and parts Phi-3's gate_up_proj."""
    shutil.copytree(make_model("mixtral"), tmp_path / "mixtral")
    renamed = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    weights = load_file(tmp_path / "mixtral" / "model.safetensors")
    for old, new in renamed.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "mixtral" / "model.safetensors", {"format": "pt"})

    shutil.copytree(make_model("phi3"), tmp_path / "phi3")
    weights = load_file(tmp_path / "phi3" / "model.safetensors")
    for name in [name for name in weights if "gate_up_proj" in name]:
        gate, up = weights.pop(name).chunk(2)
        weights[name.replace("gate_up_proj", "gate_proj")] = gate.contiguous()
        weights[name.replace("gate_up_proj", "up_proj")] = up.contiguous()
    save_file(weights, tmp_path / "phi3" / "model.safetensors", {"format": "pt"})

    for family in ("mixtral", "phi3"):
        theirs, ours = open_stream(tmp_path / family), open_stream(make_model(family))
        assert torch.equal(streamed_logits(theirs, [IDS])[0], streamed_logits(ours, [IDS])[0])
        counts = [sum(info.bytes for info in stream.weights.tensors.values()) for stream in (theirs, ours)]
        assert counts[0] == counts[1]


def test_an_untied_head_is_written_for_readers_that_look_for_it(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model("llama", tied=True)
    quantkit.gptq(folder, tmp_path / "tied", calibration=tiny_tokens, **OPTIONS)
    quantkit.gptq(folder, tmp_path / "untied", calibration=tiny_tokens, untie=True, **OPTIONS)
    tied, untied = (load_file(tmp_path / name / "model.safetensors") for name in ("tied", "untied"))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    logits = [streamed_logits(open_stream(tmp_path / name), [IDS])[0] for name in ("tied", "untied")]
    assert torch.equal(*logits)


def test_a_head_that_is_stored_beside_its_equal_is_published_once(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """torch.save lists both ends of a tie. A head that differs is a tensor of its own, whatever the config says."""
    for name, factor in (("equal", 1), ("other", 2)):
        folder = tmp_path / name
        shutil.copytree(make_model("llama", tied=True), folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * factor
        torch.save(weights, folder / "pytorch_model.bin")
        quantkit.gptq(folder, tmp_path / f"{name}-out", calibration=tiny_tokens, **OPTIONS)
    assert "lm_head.weight" not in load_file(tmp_path / "equal-out" / "model.safetensors")
    assert "lm_head.weight" in load_file(tmp_path / "other-out" / "model.safetensors")
    same, twice = (streamed_logits(open_stream(tmp_path / name), [IDS])[0] for name in ("equal", "other"))
    torch.testing.assert_close(twice, 2 * same, **forward(twice))


# -- discovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DISCOVERED)
def test_a_family_outside_the_table_is_discovered(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, recorder: Recorder, tmp_path: Path
) -> None:
    folder = folder_of(family, make_model, dtype="float32")
    model = random_model(family, tied=False, dtype=torch.float32, seed=0, **DISCOVERED[family])
    # Two batches of one shape, so that arguments which depend on the tokens cannot be taken from the wrong one.
    batches = [IDS, token_matrix(2, 24, seed=6).tokens]
    with torch.inference_mode():
        for ours, ids in zip(streamed_logits(open_stream(folder), batches), batches, strict=True):
            expected = model(ids).logits
            torch.testing.assert_close(ours, expected, **forward(expected))

    report = quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, progress=recorder, **OPTIONS)
    assert any(f"{family} is not in the table" in note for note in recorder.notes)
    assert sum(layer.loss for layer in report.layers) < sum(layer.rtn_loss for layer in report.layers)
    assert not any("router" in layer.name for layer in report.layers)
    # The written config means the same, and so is read by transformers.
    config, written = (AutoConfig.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert getattr(written, "rope_parameters", None) == getattr(config, "rope_parameters", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_discovery_finds_what_the_table_says(family: str, make_model: MakeModel) -> None:
    stream = open_stream(make_model(family))
    assert discover_blocks(stream._model) == TABLE[family].blocks
    table = stream.family
    with torch.inference_mode():
        hidden = stream.embed([IDS])
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                stream.family = Family(table.blocks, None)
                found = stream.stages(index, block, 0, hidden[0])
                hidden = [stream.call(index, block, 0, hidden[0])]
            expected = [set(stage) for stage in table.stages_in(block)]
            if family == "falcon":  # both read the same norm here; others of the family have two
                expected = [expected[0] | expected[2], expected[1], expected[3]]
            assert [set(stage) for stage in found] == expected


def test_linears_that_no_forward_calls_stay_as_they_are(
    make_model: MakeModel, tiny_tokens: TokenMatrix, recorder: Recorder, tmp_path: Path
) -> None:
    """Mamba's dt_proj: its weight is used, it is not called. Who excludes it gets the same."""
    folder, left = folder_of("jamba", make_model, dtype="float32"), "model.layers.0.mamba.dt_proj"
    report = quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, progress=recorder, **OPTIONS)
    assert left not in {layer.name for layer in report.layers}
    assert any("no forward calls them" in note and left in note for note in recorder.notes)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{left}.weight" in written
    assert quantkit.verify(tmp_path / "out", generate=False).problems == []
    excluded = quantkit.gptq(folder, exclude=["*.dt_proj"], dry_run=True, **OPTIONS)
    assert excluded.bytes == report.bytes


def test_a_linear_that_turns_out_not_to_be_called_is_named(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a forward without values could not show it."""
    monkeypatch.setattr(ModelStream, "uncalled", frozenset())
    folder, left = folder_of("jamba", make_model, dtype="float32"), "model.layers.0.mamba.dt_proj"
    with pytest.raises(SourceError, match=rf"never calls {re.escape(left)}; leave it out with exclude"):
        quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, exclude=["*.dt_proj"], **OPTIONS, force=True)


def llama_4(make_model: MakeModel) -> Path:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "moe_layers": [1]}
    return make_model("llama4_text", **moe, no_rope_layers=[1, 0], attention_chunk_size=32)


def test_llama_4_s_experts_are_quantized(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder
) -> None:
    """Stored as one tensor of all, [experts, in, out], and called with all tokens for each."""
    folder, ids = llama_4(make_model), tiny_tokens.tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(ids[:1]).logits
    torch.testing.assert_close(streamed_logits(open_stream(folder), [ids[:1]])[0], expected, **forward(expected))
    report = quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, progress=recorder, **OPTIONS)
    assert not any("stay as they are" in text for text in recorder.warnings)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 12
    assert 0 < sum(layer.tokens for layer in experts if layer.name.endswith("up_proj")) <= ids.numel()
    assert quantkit.verify(tmp_path / "out", generate=False).problems == []
    logits = [streamed_logits(open_stream(path), [ids])[0] for path in (folder, tmp_path / "out")]
    rounded = streamed_logits(_rounded(folder), [ids])[0]
    assert float((logits[1] - logits[0]).square().mean()) < float((rounded - logits[0]).square().mean())


def test_experts_that_are_not_taken_apart_are_said_with_their_share(
    make_model: MakeModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_LLAMA_4", "another")
    folder = llama_4(make_model)
    quantkit.gptq(folder, dry_run=True, progress=recorder, **OPTIONS)
    (warning,) = (text for text in recorder.warnings if "stay as they are" in text)
    held = load_file(folder / "model.safetensors")
    blocks = {name: tensor.numel() for name, tensor in held.items() if ".layers." in name and tensor.ndim > 1}
    share = sum(count for name, count in blocks.items() if "experts" in name or "router" in name) / sum(blocks.values())
    assert warning.startswith(f"{share:.0%} of the blocks' weights")
    assert "experts.gate_up_proj" in warning


def test_experts_that_are_not_taken_apart_are_put_together_as_transformers_does(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = streamed_logits(open_stream(make_model("mixtral")), [IDS])[0]
    monkeypatch.setattr(weights, "_is_fused", lambda module: False)
    stream = open_stream(make_model("mixtral"))
    assert not any("experts" in name for name, _ in stream.linears())
    torch.testing.assert_close(streamed_logits(stream, [IDS])[0], apart, **forward(apart))


def test_windows_longer_than_the_positions_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": None, "n_positions": 64}
    folder = make_model("gpt2", **sizes)
    assert open_stream(folder).longest == 64
    assert open_stream(make_model("opt")).longest == 256  # two rows of its table are for padding
    assert open_stream(make_model()).longest is None
    with pytest.raises(UsageError, match="windows of 96 tokens: tiny-gpt2 has 64 positions; give seq_len=64"):
        quantkit.gptq(folder, tmp_path / "out", calibration=token_matrix(2, 96), device="cpu")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20, encoding="utf-8")
    with pytest.raises(UsageError, match="windows of 96 tokens"):
        quantkit.perplexity([folder], text=str(text), seq_len=96)
    assert quantkit.perplexity([folder], text=str(text)).seq_len == 64  # of 512, which nobody asked for


def test_windows_that_nobody_asked_for_are_no_longer_than_a_model_is_made_for(
    make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    """Of a Llama, which reckons its positions, the config says how many it was trained on."""
    folder, other = make_model(), make_model(seed=1)
    said = "judging in windows of 256 tokens: tiny-llama is made for no more"
    assert quantkit.perplexity([folder], progress=recorder, eval_tokens=600).seq_len == 256
    assert recorder.notes.count(said) == 1
    recorder.notes.clear()
    compared = quantkit.compare(folder, other, out=tmp_path / "report", eval_tokens=600, plots=False, progress=recorder)
    assert [text.seq_len for text in compared.texts] == [256]
    assert recorder.notes[0].startswith("judging in windows of 256 tokens: ")
    recorder.notes.clear()
    made = quantkit.gptq(
        folder, tmp_path / "out", calibration=token_matrix(2, 64), eval_tokens=600, device="cpu", progress=recorder
    )
    assert made.evaluation is not None
    assert made.evaluation.seq_len == 256
    assert said in recorder.notes


def test_a_pictures_positions_limit_no_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Gemma 3 with its vision tower, whose patches have learned positions, four of them here."""
    tower = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text = random_model("gemma3_text", tied=True, dtype=torch.float16, seed=0).config.to_dict()
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "num_attention_heads": 2, **tower},
        mm_tokens_per_image=4,
    )
    AutoModelForImageTextToText.from_config(config).to(torch.float16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert open_stream(tmp_path / "model").longest is None
    assert quantkit.gptq(tmp_path / "model", tmp_path / "out", calibration=token_matrix(4, 32), **OPTIONS).layers


def test_a_model_that_cannot_be_run_block_by_block_is_refused(make_model: MakeModel) -> None:
    """Reformer's blocks have two streams of hidden states, of which one class takes each apart."""
    sizes = {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "feed_forward_size": 96, "is_decoder": True}
    stream = open_stream(make_model("reformer", **sizes, attention_head_size=16))
    with pytest.raises(SourceError, match="tiny-reformer: architecture reformer cannot be run block by block"):
        stream.embed([IDS])


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_see_what_is_routed_to_them(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    report = quantkit.gptq(make_model(family), tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    whole = tiny_tokens.tokens.numel()
    seen: dict[str, dict[str, int]] = {}
    for layer in report.layers:
        block, experts, rest = layer.name.partition(".experts.")
        if not experts:
            assert layer.tokens == whole
            continue
        number = rest.split(".")[0]
        assert seen.setdefault(block, {}).setdefault(number, layer.tokens) == layer.tokens
    for counts in seen.values():
        assert len(counts) == 4
        assert sum(counts.values()) == 2 * whole  # every token goes to two experts
        assert len(set(counts.values())) > 1
    with (tmp_path / "out" / "quant_log.csv").open() as file:
        assert [int(row["tokens"]) for row in csv.DictReader(file)] == [layer.tokens for layer in report.layers]


def test_an_expert_that_saw_too_little_is_reported_with_a_remedy(
    make_model: MakeModel, recorder: Recorder, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("olmoe"), folder)
    weights = load_file(folder / "model.safetensors")
    router = weights["model.layers.0.mlp.gate.weight"]
    router[3] = 0  # its logit is 0; others are random, so it is rarely among the first two ...
    router[2] = 50 * router[0]  # ... and never after these
    router[1] = -50 * router[0]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    report = quantkit.gptq(folder, tmp_path / "out", calibration=token_matrix(4, 32), progress=recorder, **OPTIONS)
    starved = {layer.name for layer in report.layers if layer.tokens < 64}
    assert starved
    assert all(".experts." in name for name in starved)
    (warning,) = [text for text in recorder.warnings if "experts saw fewer" in text]
    assert "samples=" in warning
    assert any(name in warning for name in starved)
    # An expert that nothing was routed to is rounded, and everything is still there to be read.
    assert streamed_logits(open_stream(tmp_path / "out"), [IDS])[0].isfinite().all()


def test_experts_of_all_kinds_are_taken_apart_alike(make_model: MakeModel) -> None:
    """Experts that a checkpoint stores fused are read as those of one that stores them apart."""
    folder = folder_of("gpt_oss", make_model, dtype="float32")
    stream = open_stream(folder)
    stored = load_file(folder / "model.safetensors")
    fused = stored["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        assert torch.equal(stream.weights.read(f"{prefix}.gate_proj.weight"), fused[expert, :, 0::2].T)
        assert torch.equal(stream.weights.read(f"{prefix}.up_proj.weight"), fused[expert, :, 1::2].T)
        down = stored["model.layers.0.mlp.experts.down_proj"][expert].T
        assert torch.equal(stream.weights.read(f"{prefix}.down_proj.weight"), down)
        bias = stored["model.layers.0.mlp.experts.gate_up_proj_bias"][expert, 1::2]
        assert torch.equal(stream.weights.read(f"{prefix}.up_proj.bias"), bias)


# -- which modules, and to what ---------------------------------------------------------------------------------------


def quantization(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert content == json.loads((folder / "quantize_config.json").read_text())
    return content


def first_rule(dynamic: dict[str, dict[str, Any]], module: str) -> tuple[str, dict[str, Any]] | None:
    """GPTQModel's reading of `dynamic`: the first rule whose expression matches at the name's beginning."""
    for rule, changes in dynamic.items():
        if re.match(rule[2:], module):
            return rule[:2], changes
    return None


def test_patterns_and_overrides_are_obeyed_and_written_as_dynamic(
    make_model: MakeModel, tiny_tokens: TokenMatrix, recorder: Recorder, tmp_path: Path
) -> None:
    report = quantkit.gptq(
        make_model("llama"),
        tmp_path / "out",
        calibration=tiny_tokens,
        include=["*.mlp.*", "*.q_proj", "*.v_proj"],
        exclude=["model.layers.1.mlp.gate_proj"],
        override={"*.down_proj": {"bits": 8, "group_size": 16}, "*.layers.0.*.v_proj": {"sym": False}},
        progress=recorder,
        **OPTIONS,
    )
    names = {layer.name for layer in report.layers}
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.1.mlp.gate_proj" not in names
    assert not any(name.endswith(("k_proj", "o_proj")) for name in names)
    assert any("5 Linears stay as they are" in note for note in recorder.notes)
    assert any("vLLM" in note for note in recorder.notes)

    dynamic = quantization(tmp_path / "out")["dynamic"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stored:
        keys = set(stored.keys())
        for name, (rows, columns) in open_stream(make_model("llama")).linears():
            rule = first_rule(dynamic, name)
            assert (f"{name}.weight" in keys) == (rule is not None and rule[0] == "-:")
            if f"{name}.qweight" in keys:
                bits, size = (8, 16) if name.endswith("down_proj") else (4, 32)
                changes = {} if rule is None else rule[1]
                assert (changes.get("bits", 4), changes.get("group_size", 32)) == (bits, size)
                assert stored.get_slice(f"{name}.qweight").get_shape() == [columns * bits // 32, rows]
                assert stored.get_slice(f"{name}.scales").get_shape() == [-(-columns // size), rows]
    assert first_rule(dynamic, "model.layers.0.self_attn.v_proj") == ("+:", {"sym": False})
    logits = [streamed_logits(open_stream(path), [IDS])[0] for path in (make_model("llama"), tmp_path / "out")]
    assert float((logits[0] - logits[1]).abs().mean()) < 0.5 * float(logits[0].std())


def test_without_patterns_nothing_is_dynamic(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    quantkit.gptq(make_model("llama"), tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    assert "dynamic" not in quantization(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["*.attn.*"]}, r"include=\*\.attn\.\*: no Linear has such a name; one is model\.layers\.0"),
        ({"exclude": ["down_proj"]}, "exclude=down_proj: no Linear"),
        ({"override": {"*.foo": {"bits": 8}}}, r"override=\*\.foo: no Linear"),
        ({"exclude": ["*"]}, "leave no Linear"),
        ({"override": {"*.down_proj": {}}}, "needs bits, group_size, sym or ggml"),
        ({"override": {"*.down_proj": {"bits": 5}}}, "bits=5: a GPTQ checkpoint holds"),
        ({"override": {"*.down_proj": {"group_size": 7}}}, "group_size: give -1"),
        ({"override": {"*.down_proj": {"damp": 0.1}}}, "damp"),
    ],
)
def test_patterns_that_cannot_work_are_refused_before_any_work(
    options: dict[str, Any], message: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        quantkit.gptq(make_model("llama"), tmp_path / "out", calibration=tiny_tokens, **options, **OPTIONS)
    assert not (tmp_path / "out").exists()
