"""`quantkit gptq --head N --embeddings N`: what is outside the blocks as codes, in each container that holds it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, MakeModel, Recorder, token_matrix
from support.coded import same
from support.folders import contents
from support.judge_env import GPTQMODEL, MLX, Judge, Program
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.blocks.budget import Budget
from quantkit.blocks.memory import plan_quantizing
from quantkit.codes import QuantizedLinear
from quantkit.errors import UsageError
from quantkit.options import QuantSpec
from quantkit.quantize import gptq
from quantkit.quantize.hessian import row_losses
from quantkit.quantize.rounding import rounded_on_fit
from quantkit.sources import open_source

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
TOKENS = token_matrix(8, 24)
OPTIONS: dict[str, Any] = {"calibration": TOKENS, "group_size": 32, "evaluate": False, "effort": "fast"}
FORMATS = {"gptq": ("head",), "gptq_v2": ("head",), "compressed-tensors": ("head",), "mlx": ("head", "embeddings")}


def codes_of(folder: Path, module: str) -> QuantizedLinear:
    codes = open_source(folder).codes
    assert codes is not None
    return codes.read_codes(module)


def label_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read_by_the_head(folder: Path, model: Path) -> torch.Tensor:
    """What the head of a quantized model reads of the calibration tokens, by transformers' own forward [tokens, in]."""
    from transformers import AutoModelForCausalLM

    source, whole = open_source(folder), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    own = whole.state_dict()
    with torch.inference_mode():
        for name in source.tensors:
            if name in own and name != f"{HEAD}.weight":
                own[name].copy_(source.read(name))
        return whole.model(TOKENS.tokens).last_hidden_state.reshape(-1, 64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.fast
def test_the_head_is_gptq_s_on_what_reaches_it(format: str, bits: int, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    report = quantkit.gptq(model, tmp_path / "out", format=format, head=bits, **OPTIONS)
    linear, W = codes_of(report.out, HEAD), open_source(model).read(f"{HEAD}.weight").float()
    assert linear.bits == bits
    source = open_source(report.out)
    assert torch.equal(source.read(f"{HEAD}.weight"), linear.dequantize())
    assert torch.equal(source.read_rows(f"{HEAD}.weight", 100, 107), linear.dequantize()[100:107])
    x = read_by_the_head(report.out, model)
    H = x.T @ x / len(x)
    spec = QuantSpec(bits=bits, group_size=32)
    (wanted,) = gptq.solve([W], H, spec)
    found = float(row_losses(W, linear, H).sum())
    assert found == pytest.approx(float(wanted.loss.sum()), rel=1e-3)
    assert found < 0.8 * float(row_losses(W, rounded_on_fit(W, spec), H).sum())
    (told,) = [layer for layer in report.layers if layer.name == HEAD]
    assert told.loss == pytest.approx(found, rel=1e-3)
    assert told.tokens == TOKENS.tokens.numel()
    assert report.end_bits == {"head": bits}
    assert json.loads((report.out / "quantkit.json").read_text())["recipe"]["head"] == bits
    assert quantkit.verify(report.out).ok
    assert quantkit.inspect(report.out).types[f"{open_source(report.out).stored_as}{bits}"] == 15 - 14 * (bits != 4)  # type: ignore[attr-defined]


@pytest.mark.fast
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_head_reads_is_found_in_every_family(family: str, make_model: MakeModel) -> None:
    """Logits are of it, but for what a model does to each of them: a scale, a cap."""
    stream = open_stream(make_model(family))
    with torch.inference_mode():
        (hidden,) = stream.embed([TOKENS.tokens[:1]])
        with stream.before_head() as reads:
            x = reads(hidden)
        with stream.head() as head:
            logits = head(hidden)
    made = x @ stream.weights.read(stream.ends[1]).float().T
    assert torch.equal(made.argmax(dim=-1), logits.argmax(dim=-1))
    assert float(torch.corrcoef(torch.stack([made.flatten(), logits.flatten()]))[0, 1]) > 0.98


@pytest.mark.fast
def test_without_it_nothing_changes(make_model: MakeModel, tmp_path: Path) -> None:
    for name, more in (("plain", {}), ("head", {"head": 8}), ("again", {"head": 8})):
        quantkit.gptq(make_model(), tmp_path / name, **more, **OPTIONS)
    plain, head = open_source(tmp_path / "plain"), open_source(tmp_path / "head")
    assert all(torch.equal(plain.read(name), head.read(name)) for name in plain.tensors if name != f"{HEAD}.weight")
    assert contents(tmp_path / "head") == contents(tmp_path / "again")
    assert label_of(tmp_path / "plain")["lm_head"] is False
    record = json.loads((tmp_path / "plain" / "quantkit.json").read_text())
    assert not {"head", "embeddings"} & record["recipe"].keys()


@pytest.mark.fast
def test_an_embedding_is_rounded_and_the_blocks_calibrated_on_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    report = quantkit.gptq(model, tmp_path / "out", format="mlx", embeddings=3, **OPTIONS)
    linear, W = codes_of(report.out, EMBEDDING), open_source(model).read(f"{EMBEDDING}.weight").float()
    assert same(linear, rounded_on_fit(W, QuantSpec(bits=3, group_size=32)))  # type: ignore[arg-type]
    error = (W - linear.dequantize())[TOKENS.tokens.reshape(-1)].square().sum(dim=1).mean()
    (told,) = [layer for layer in report.layers if layer.name == EMBEDDING]
    assert told.loss == pytest.approx(float(error), rel=1e-5)
    assert told.loss < told.rtn_loss
    # The same as a run on a model whose embedding has been rounded before.
    rounded = quantkit.convert(report.out, tmp_path / "rounded", dtype="float32").out
    whole = open_source(model)
    from safetensors.torch import load_file, save_file

    tensors = {name: whole.read(name).float() for name in load_file(rounded / "model.safetensors")}
    tensors[f"{EMBEDDING}.weight"] = linear.dequantize()
    save_file(tensors, rounded / "model.safetensors")
    again = quantkit.gptq(rounded, tmp_path / "again", format="mlx", **OPTIONS)
    first, second = open_source(report.out), open_source(again.out)
    for name in (f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")):
        assert torch.equal(first.read(name), second.read(name))


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"head": 8}, {"embeddings": 8}, {"head": 8, "embeddings": 8}], ids=str)
def test_a_tied_matrix_is_one_set_of_codes(options: dict[str, int], make_model: MakeModel, tmp_path: Path) -> None:
    report = quantkit.gptq(make_model(tied=True), tmp_path / "out", format="mlx", **options, **OPTIONS)
    source = open_source(report.out)
    assert report.end_bits == {"both": 8}
    assert {f"{EMBEDDING}.{part}" for part in ("weight", "scales", "biases")} < set(source.stored.tensors)  # type: ignore[attr-defined]
    assert not any(name.startswith(HEAD) for name in source.tensors)
    assert label_of(report.out)[EMBEDDING] == {"group_size": 32, "bits": 8, "mode": "affine"}
    stream = open_stream(report.out)
    assert stream.ends == (f"{EMBEDDING}.weight",) * 2
    rows = source.read_rows(f"{EMBEDDING}.weight", 100, 107)
    assert torch.equal(rows, source.read(f"{EMBEDDING}.weight")[100:107])
    assert quantkit.verify(report.out).ok


@pytest.mark.fast
def test_untied_a_head_gets_codes_of_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tied=True)
    out = quantkit.gptq(model, tmp_path / "out", head=8, untie=True, **OPTIONS).out
    source = open_source(out)
    assert codes_of(out, HEAD).bits == 8
    assert torch.equal(source.read(f"{EMBEDDING}.weight"), open_source(model).read(f"{EMBEDDING}.weight"))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    quantkit.card(out, base_model=["someone/tiny"], licence="mit")
    card = (out / "README.md").read_text()
    assert "| 4-bit symmetric, head 8-bit |" in card
    assert re.search(r"quantkit gptq \S+ .*--head 8 .*--untie", card)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("tied", "options", "line"),
    [
        (
            False,
            {"format": "awq", "head": 4},
            r"head=4: an AWQ folder has no place for codes of an output head; a GPTQ checkpoint or a "
            r"compressed-tensors folder or an MLX folder holds them$",
        ),
        (False, {"embeddings": 8}, "embeddings=8: a GPTQ checkpoint has no place for codes of an embedding; an MLX"),
        (False, {"head": 7}, "head=7: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; 7-bit codes fit into a compressed"),
        (False, {"format": "mlx,gptq", "embeddings": 8}, "embeddings=8: a GPTQ checkpoint has no place for"),
        (False, {"head": 9}, "head=9: give 2, 3, 4 or 8"),
        (
            True,
            {"head": 8},
            r"a matrix that is head and embedding \(tied\); an MLX folder holds them, or untie=True makes a head of",
        ),
        (
            True,
            {"format": "awq", "head": 4},
            r"a matrix that is head and embedding \(tied\); an MLX folder holds them$",
        ),
        (True, {"format": "mlx", "head": 8, "embeddings": 4}, "they are one matrix here .tied.: give one number"),
        (False, {"ggml": "q4_0", "group_size": None, "head": 8}, "for folders of codes: with ggml give output_type"),
        (False, {"ggml": "q4_0", "group_size": None, "embeddings": 8}, "with ggml give embedding_type"),
    ],
    ids=str,
)
def test_what_has_no_place_is_refused(
    tied: bool, options: dict[str, Any], line: str, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=line):
        quantkit.gptq(make_model(tied=tied), tmp_path / "out", **{**OPTIONS, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_labels_name_the_head(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()

    def made(name: str, **options: Any) -> Any:
        return label_of(quantkit.gptq(model, tmp_path / name, **{**OPTIONS, **options}).out)

    same_bits, other, narrow = made("a", head=4), made("b", head=8), made("c", head=4, include=["*.mlp.*"])
    assert (same_bits["lm_head"], "dynamic" in same_bits) == (True, False)
    assert same_bits["modules_in_block_to_quantize"][-1] == [HEAD]
    assert other["dynamic"] == {r"+:^lm_head$": {"bits": 8, "group_size": 32, "sym": True}}
    assert next(iter(narrow["dynamic"])) == r"+:^lm_head$"  # the rule that keeps what --include leaves would match too
    groups = made("d", format="compressed-tensors", head=4)
    assert [group["targets"] for group in groups["config_groups"].values()] == [["Linear", HEAD]]
    assert groups["ignore"] == []
    groups = made("e", format="compressed-tensors", head=8)
    assert [group["targets"] for group in groups["config_groups"].values()] == [["Linear"], [HEAD]]
    groups = made("f", format="compressed-tensors", head=8, override=["*.down_proj=bits:8"])
    first, second = (group["targets"] for group in groups["config_groups"].values())
    assert "Linear" not in first
    assert second == [r"re:^model\.layers\.\d+\.mlp\.down_proj$", HEAD]


def test_several_formats_and_the_way_through_all(make_model: MakeModel, tmp_path: Path) -> None:
    """The same codes in each, as a run of its own writes them, and by `repack` from one to another."""
    model = make_model()
    quantkit.gptq(model, tmp_path / "all", format=tuple(FORMATS), head=8, **OPTIONS)
    alone = quantkit.gptq(model, tmp_path / "one", format="mlx", head=8, **OPTIONS)
    assert contents(tmp_path / "all" / "mlx") == contents(alone.out)
    expected = codes_of(alone.out, HEAD)
    before = "mlx"
    for format in FORMATS:
        assert same(codes_of(tmp_path / "all" / format, HEAD), expected)
        source = tmp_path / "all" / "mlx" if before == "mlx" else tmp_path / f"by-{before}"
        assert quantkit.repack(source, tmp_path / f"by-{format}", to=format).linears == 15
        assert same(codes_of(tmp_path / f"by-{format}", HEAD), expected)
        for key in ("lm_head", "dynamic", "config_groups"):
            if key != "config_groups" or format != "compressed-tensors":
                own, direct = label_of(tmp_path / f"by-{format}"), label_of(tmp_path / "all" / format)
                assert own.get(key) == direct.get(key)
        before = format
    line = "^one has 8-bit codes of lm_head: an AWQ folder has no place for codes of an output head; a GPTQ "
    with pytest.raises(UsageError, match=line):
        quantkit.repack(alone.out, tmp_path / "awq", to="awq")


def test_embeddings_go_into_files_and_floats_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    for tied in (False, True):
        model = make_model(tied=tied, num_key_value_heads=4)
        out = quantkit.gptq(model, tmp_path / f"mlx{tied}", format="mlx", head=8, embeddings=8, **OPTIONS).out
        source = open_source(out)
        with pytest.raises(
            UsageError, match=r"a GPTQ checkpoint has no place for codes of (an embedding|a matrix that)"
        ):
            quantkit.repack(out, tmp_path / "gptq", to="gptq")
        again = quantkit.repack(out, tmp_path / f"again{tied}", to="mlx").out
        assert same(codes_of(again, EMBEDDING), codes_of(out, EMBEDDING))
        assert label_of(again) == label_of(out)
        made = quantkit.ggml(out, tmp_path / f"{tied}.gguf", pre="gpt-2")
        assert made.fidelity["exact"] == (15 if tied else 16)
        file = open_source(made.out)
        floats = open_source(quantkit.convert(out, tmp_path / f"floats{tied}", dtype="float32").out)
        for name in source.tensors:
            assert torch.equal(file.read(name).float(), source.read(name).float())
            assert torch.equal(floats.read(name), source.read(name).float())


def test_what_is_evaluated_is_what_was_written(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and asks a question " * 40)
    model = make_model(tied=True)
    judged = {**OPTIONS, "evaluate": True, "text": str(text), "eval_tokens": 64}
    out = quantkit.gptq(model, tmp_path / "out", format="mlx", head=8, **judged)
    assert out.evaluation is not None
    told = out.evaluation.results[-1].kl_divergence
    found = quantkit.perplexity([out.out], against=model, text=str(text), eval_tokens=64).results[-1].kl_divergence
    assert told is not None
    assert found is not None
    assert told.mean == pytest.approx(found.mean)
    report = quantkit.compare(model, [out.out], tmp_path / "report", texts=[str(text)], eval_tokens=64, plots=False)
    assert report.models[-1].mean_kl == pytest.approx(told.mean, rel=1e-3)


def test_a_dry_run_tells_sizes_and_memory(make_model: MakeModel, tmp_path: Path) -> None:
    model, dry = make_model(), {**OPTIONS, "format": "mlx", "dry_run": True}
    plain = quantkit.gptq(model, tmp_path / "out", **dry)
    planned = quantkit.gptq(model, tmp_path / "out", head=8, embeddings=8, **dry)
    made = quantkit.gptq(model, tmp_path / "out", head=8, embeddings=8, **{**dry, "dry_run": False})
    assert planned.bytes == made.bytes < plain.bytes
    assert planned.multiplications > plain.multiplications
    assert any("head 8-bit, embeddings 8-bit" in str(line) for line in planned.lines())
    plans = [
        plan_quantizing(open_stream(model), 192, 192, Budget(2**40), head=head).needed
        for head in (None, (128_000, 4096))
    ]
    assert plans[1] > plans[0] + 128_000 * 4096


def test_rows_of_the_log_are_those_of_the_plan(make_model: MakeModel, tmp_path: Path) -> None:
    out = quantkit.gptq(make_model(), tmp_path / "out", format="mlx", head=8, embeddings=8, **OPTIONS).out
    with (out / "quant_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows][-2:] == [HEAD, EMBEDDING]
    record = json.loads((out / "quantkit.json").read_text())
    assert [layer["name"] for layer in record["layers"]][-2:] == [HEAD, EMBEDDING]


class _Stopped(Recorder):
    """Stops a run when a phase begins."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self._phase = phase

    def phase(self, name: str, total: int) -> Any:
        if name == self._phase:
            raise KeyboardInterrupt
        return super().phase(name, total)


@pytest.mark.parametrize("at", ["quantizing the head", "writing"])
def test_a_run_that_was_stopped_goes_on(at: str, make_model: MakeModel, tmp_path: Path) -> None:
    options = {**OPTIONS, "format": "mlx", "head": 8, "embeddings": 8, "checkpoint_every": "1"}
    whole = quantkit.gptq(make_model(), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        quantkit.gptq(make_model(), tmp_path / "out", progress=_Stopped(at), **options)
    recorder = Recorder()
    quantkit.gptq(make_model(), tmp_path / "out", resume=True, progress=recorder, **options)
    assert contents(tmp_path / "out") == contents(whole.out)
    assert f"going on after block {2 if at == 'quantizing the head' else 3} of 3" in recorder.notes
    assert ("quantizing the head" in recorder.phases) == (at == "quantizing the head")


def test_refining_and_other_methods_leave_room_for_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    for name, more in (
        ("refined", {"refine": True}),
        ("rounded", {"method": "round"}),
        ("best", {"effort": "best"}),
        ("dynamic", {"act_order": "dynamic", "format": "gptq"}),
    ):
        out = quantkit.gptq(model, tmp_path / name, **{**OPTIONS, "format": "mlx", "head": 8, **more})
        assert codes_of(out.out, HEAD).bits == 8
        assert [layer.name for layer in out.layers][-1] == HEAD
        assert quantkit.verify(out.out, generate=False).ok


@pytest.mark.parametrize(("tied", "options"), [(False, {"head": 3, "embeddings": 3}), (True, {"head": 3})], ids=str)
def test_token_weights_predict_what_they_cost(
    tied: bool, options: dict[str, int], make_model: MakeModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(tied=tied)
    tokens = token_matrix(16, 256)
    settings = {**OPTIONS, "effort": "standard", "calibration": tokens, "format": "mlx", **options}
    report = quantkit.gptq(model, tmp_path / "out", **settings)
    found = {layer.name: layer.predicted for layer in report.layers}
    assert report.predicted == pytest.approx(sum(value or 0 for value in found.values()))
    source = open_source(report.out)
    for name in (EMBEDDING,) if tied else (HEAD, EMBEDDING):
        original, changed = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
        with torch.inference_mode():
            changed.get_parameter(f"{name}.weight").copy_(source.read(f"{name}.weight"))
            p, q = (one(tokens.tokens).logits.double().log_softmax(dim=-1) for one in (original, changed))
        measured = float((p.exp() * (p - q)).sum(dim=-1).mean())
        assert 0.6 < (found[name] or 0) / measured < 1.7, name


@pytest.mark.parametrize(
    ("format", "budget", "tied"),
    [("mlx", "5bpw", False), ("mlx", "5bpw", True), ("gptq", "120KB", False)],
)
def test_beside_a_budget_they_have_the_bits_that_were_asked_for(
    format: str, budget: str, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    """In groups that no choice moves; a budget that is a size counts their bytes, one in bits per weight does not."""
    options: dict[str, Any] = {"calibration": token_matrix(16, 64), "evaluate": False, "format": format}
    ends = {"head": 8} if format == "gptq" or tied else {"head": 8, "embeddings": 4}
    model, out = make_model(tied=tied, intermediate_size=128), tmp_path / "out"
    report = quantkit.gptq(model, out, budget=budget, **ends, **options)
    held = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    codes = open_source(out).codes
    assert codes is not None
    modules = {name: codes.read_codes(name) for name in codes.quantized_names()}
    own = {name: modules.pop(name) for name in (HEAD, EMBEDDING) if name in modules}
    assert sorted(one.bits for one in own.values()) == sorted(ends.values())
    assert all(one.scales.shape[1] == 1 for one in own.values())  # 64 wide, in groups of 64
    assert len({(one.bits, one.scales.shape[1] / one.shape[1]) for one in modules.values()}) > 1
    if budget.endswith("bpw"):
        assert 4 < report.bits_per_weight <= float(budget.removesuffix("bpw"))
    else:
        assert 110_000 < held <= 120_000
    with (out / "quant_log.csv").open() as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert {rows[name]["planned"] for name in own} == {""}
    assert all(int(rows[name]["bits"]) == one.bits for name, one in own.items())
    assert quantkit.verify(out, generate=False).ok
    again = quantkit.gptq(model, out, budget=budget, resume=True, **ends, **options)
    assert again.budget == report.budget


@pytest.mark.fast
def test_who_does_not_read_it_is_told(make_model: MakeModel, tmp_path: Path) -> None:
    out = quantkit.gptq(make_model(), tmp_path / "out", head=4, **OPTIONS).out
    (checked,) = quantkit.verify(out, generate=False).models
    loads = {load.program: load for load in checked.loads}
    assert not loads["transformers"].ok
    assert "leaves the codes of the output head unread" in loads["transformers"].why
    assert not loads["AutoGPTQ"].ok
    assert loads["GPTQModel"].ok
    assert loads["vLLM"].ok


# -- readers that are not ours -----------------------------------------------------------------------------------------


def difference(theirs: torch.Tensor, folder: Path) -> float:
    """Of logits, in parts of their spread."""
    ours = streamed_logits(open_stream(folder), [TOKENS.tokens])[0]
    return float((theirs - ours).abs().max() / ours.std())


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_reads_a_compressed_head(bits: int, make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = quantkit.gptq(make_model(), tmp_path / "out", format="compressed-tensors", head=bits, **OPTIONS).out
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert "weight_packed" in dict(model.lm_head.named_parameters())
    with torch.inference_mode():
        assert difference(model(TOKENS.tokens).logits, out) < 1e-4


@pytest.mark.judges
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lm_reads_head_and_embeddings(
    bits: int, tied: bool, ask: Callable[[Program], Judge], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(tied=tied)
    out = quantkit.gptq(model, tmp_path / "out", format="mlx", head=bits, embeddings=bits, **OPTIONS).out
    theirs, _, info = ask(MLX).logits(out, TOKENS.tokens)
    assert info["quantized"] == (15 if tied else 16)
    weights = ask(MLX).weights(out)
    assert torch.equal(weights[EMBEDDING], open_source(out).read(f"{EMBEDDING}.weight"))
    assert difference(theirs, out) < 1e-4


@pytest.mark.judges
@pytest.mark.parametrize(("bits", "tied"), [(4, False), (8, False), (8, True)])
def test_gptqmodel_reads_a_head_and_transformers_does_not(
    bits: int, tied: bool, ask: Callable[[Program], Judge], make_model: MakeModel, tmp_path: Path
) -> None:
    out = quantkit.gptq(make_model(tied=tied), tmp_path / "out", head=bits, untie=tied, **OPTIONS).out
    theirs, _, info = ask(GPTQMODEL).logits(out, TOKENS.tokens, loader="gptqmodel")
    assert info["quantized_linears"] == 15
    assert difference(theirs, out) < 1e-4
    _, _, info = ask(GPTQMODEL).logits(out, TOKENS.tokens, loader="transformers")
    assert info["plain_linears"] == [HEAD], "transformers reads it now: verify says that it does not"
