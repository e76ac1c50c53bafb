"""The MLX container: its layout, what mlx-lm computes from it and writes itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file, save_file
from support.coded import Tensors, drop, put, same, write_codes
from support.judge_env import MLX, Judge, Program
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.codes import LinearPlan, QuantizedLinear
from quantkit.containers.mlx.write import MlxWriter, check
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.options import QuantSpec
from quantkit.sources import open_source
from quantkit.verbs.publish import branch_of

pytestmark = pytest.mark.fast

Q = "model.layers.0.self_attn.q_proj"
OPTIONS: dict[str, Any] = {"calibration": token_matrix(4, 16), "group_size": 32, "evaluate": False, "effort": "fast"}


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of rows of words, as mlx has them: a row is a number of many digits, the lowest first."""
    rows = []
    for row in words.view(torch.int32).tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([(whole >> (bits * place)) & (2**bits - 1) for place in range(len(row) * 32 // bits)])
    return torch.tensor(rows)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_folder_holds_the_codes_in_the_layout(bits: int, sym: bool, make_model: MakeModel, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "out", make_model(), {"bits": bits, "group_size": 32, "sym": sym}, "mlx")
    tensors, source = load_file(tmp_path / "out" / "model.safetensors"), open_source(tmp_path / "out")
    assert source.codes is not None
    for module, linear in codes.items():
        assert torch.equal(unpacked(tensors[f"{module}.weight"], bits), linear.codes.long())
        assert torch.equal(tensors[f"{module}.scales"], linear.scales)
        biases = tensors[f"{module}.biases"]
        assert biases.dtype == (torch.float16 if sym else torch.float32)
        assert torch.equal(biases.double(), -linear.scales.double() * linear.zeros.double())
        assert same(source.codes.read_codes(module), linear)
        assert torch.equal(source.read(f"{module}.weight"), linear.dequantize())
    told = {"group_size": 32, "bits": bits, "mode": "affine"}  # as mlx-lm's convert writes it
    config = config_of(tmp_path / "out")
    assert (config["quantization"], config["quantization_config"]) == (told, told)
    assert source.scheme == f"MLX {bits}-bit, group 32"
    assert source.settings == {"bits": bits, "group_size": 32, "sym": sym, "desc_act": False}


def test_linears_of_other_bits_have_entries_of_their_own(make_model: MakeModel, tmp_path: Path) -> None:
    spec = {"group_size": 32, "overrides": (("*.down_proj", {"bits": 8}), ("*.1.*.v_proj", {"group_size": 64}))}
    codes = write_codes(tmp_path / "out", make_model(), spec, "mlx")
    assert config_of(tmp_path / "out")["quantization"] == {
        **{"group_size": 32, "bits": 4, "mode": "affine"},
        **{f"model.layers.{n}.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"} for n in (0, 1)},
        "model.layers.1.self_attn.v_proj": {"group_size": 64, "bits": 4, "mode": "affine"},
    }
    source = open_source(tmp_path / "out")
    assert source.codes is not None
    assert all(same(source.codes.read_codes(module), linear) for module, linear in codes.items())
    assert source.scheme == "MLX 4-bit, group 32 and 8-bit, group 32 and 4-bit, group 64"


def test_a_run_writes_it_and_every_verb_takes_it(make_model: MakeModel, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "mlx"
    text.write_text("the quick brown fox jumps over the lazy dog and asks a question " * 40)
    model, found = make_model(num_key_value_heads=4), {}
    for name in ("gptq", "mlx"):
        quantkit.gptq(model, tmp_path / name, format=name, **OPTIONS)
        found[name] = quantkit.perplexity([tmp_path / name], text=str(text), seq_len=16, eval_tokens=64).results[0]
    assert found["gptq"].perplexity == found["mlx"].perplexity
    assert quantkit.inspect(folder).types["MLX4"] == 14
    assert quantkit.inspect(folder).bytes == sum(
        tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
    )
    (checked,) = quantkit.verify(folder, device="cpu").models
    assert (checked.problems, checked.kind) == ((), "mlx")
    assert {one.program for one in checked.loads if one.ok} == {"mlx-lm"}
    assert quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2").fidelity["exact"] == 14
    assert branch_of(folder) == "mlx-4bit-32g-actorder_False"
    quantkit.card(folder, base_model=["someone/tiny"], licence="mit")
    card = (folder / "README.md").read_text()
    assert "MLX folders made from [someone/tiny]" in card
    assert "from mlx_lm import generate, load" in card
    assert "library_name: mlx\n" in card
    # A folder in floats of it says nothing of codes any more.
    quantkit.convert(folder, tmp_path / "floats")
    assert "quantization" not in config_of(tmp_path / "floats")
    assert torch.equal(
        open_source(tmp_path / "floats").read(f"{Q}.weight"), open_source(folder).read(f"{Q}.weight").half()
    )


def test_asymmetric_codes_need_wider_biases(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(UsageError, match=r"q_proj is asymmetric: .* mlx_bias=float32 holds them"):
        quantkit.gptq(model, tmp_path / "out", format="mlx", sym=False, **OPTIONS)
    with pytest.raises(UsageError, match=r"mlx_bias=float32: it is for an MLX folder, and gptq is written"):
        quantkit.gptq(model, tmp_path / "out", mlx_bias="float32", **OPTIONS)
    assert not (tmp_path / "out").exists()
    report = quantkit.gptq(model, tmp_path / "out", format="mlx", sym=False, mlx_bias="float32", **OPTIONS)
    record = json.loads((report.out / "quantkit.json").read_text())
    assert (record["recipe"]["format"], record["recipe"]["mlx_bias"]) == ("mlx", "float32")
    with pytest.raises(UsageError, match=r"mlx_bias=float32: it is for an MLX folder, and gguf is written"):
        quantkit.repack(report.out, tmp_path / "two.gguf", to="gguf", mlx_bias="float32")


def test_what_it_has_no_place_for_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    for spec, columns, line in (
        ({"bits": 7}, 128, "an MLX folder holds 2, 3, 4, 5, 6 or 8 bits; 7-bit codes fit into a compressed-tensors"),
        ({"group_size": 16}, 128, "of 32, 64, 128; a GPTQ checkpoint or a compressed-tensors folder holds them"),
        ({"group_size": -1}, 128, "MLX readers load groups of 32, 64, 128; a GPTQ"),
        ({"act_order": "dynamic"}, 128, "cannot hold it; use static or off"),
        ({"group_size": 64}, 96, "has no short groups; --group-size 32 divides every width"),
    ):
        with pytest.raises(UsageError, match=line):
            check({"one": LinearPlan((64, columns), QuantSpec(**spec))})
    plan = LinearPlan((8, 32), QuantSpec(bits=8, group_size=32))
    ones = torch.ones((8, 1))
    large = QuantizedLinear(
        ones.byte().expand(8, 32), (ones * 600).half(), (ones * 128).byte(), torch.zeros(32).int(), 8
    )
    with pytest.raises(NumericError, match="a scale times its zero is beyond float16"):
        list(MlxWriter.pack(None, large, plan.spec))  # type: ignore[arg-type]


# -- folders made wrong ------------------------------------------------------------------------------------------------

Change = Callable[[Tensors, Any], None]


def say(**fields: Any) -> Change:
    return lambda _, config: config["quantization"].update(fields)


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy with other tensors or another config."""
    shutil.copytree(folder, out)
    tensors, config = load_file(folder / "model.safetensors"), config_of(folder)
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    write_codes(tmp_path / "whole", make_model(), {"group_size": 32, "sym": False}, "mlx")
    return tmp_path / "whole"


WRONG: dict[str, tuple[Change, str]] = {
    "bits": (say(bits=8), r"weight is \[\d+, (8|12)\], but 8 bits in groups of 32, as config.json says, make it"),
    "group": (say(group_size=64), r"weight is \[\d+, (8|12)\], but 4 bits in groups of 64"),
    "bits it has not": (say(bits=7), "bits 7: MLX has 2, 3, 4, 5, 6, 8"),
    "bits of another type": (say(bits="4"), "bits '4': MLX has"),
    "no group": (say(group_size=None), "group_size None: MLX has 32, 64, 128"),
    "mode": (say(mode="mxfp4"), "mode 'mxfp4' of MLX is not read, only affine"),
    "mode of one": (say(**{Q: {"mode": "nvfp4"}}), r"mode 'nvfp4' of model\.layers\.0\.\S+ of MLX is not read"),
    "bits of one": (say(**{Q: {"bits": 8}}), r"q_proj\.weight is \[64, 8\], but 8 bits in groups of 32"),
    "said to be plain": (say(**{Q: False}), "q_proj is not quantized, but it has scales"),
    "no biases": (drop(f"{Q}.biases"), "q_proj has scales but no biases"),
    "no weight": (drop(f"{Q}.weight"), "q_proj has scales but no weight"),
    "short": (put(f"{Q}.weight", lambda t: t[:, :-1]), r"weight is \[64, 7\], but 4 bits in groups of 32"),
    "fewer rows": (put(f"{Q}.biases", lambda t: t[:-1]), r"biases is \[63, 2\], but"),
    "words of another type": (
        put(f"{Q}.weight", torch.Tensor.float),
        r"weight is F32 \[64, 8\]: not MLX's affine layout",
    ),
    "a vector": (put(f"{Q}.scales", torch.Tensor.flatten), r"scales is F16 \[128\]: not MLX's affine layout"),
    "experts": (put(f"{Q}.weight", lambda t: t[None]), "q_proj holds a stack of experts, which is not read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_told(case: str, folder: Path, tmp_path: Path) -> None:
    change, line = WRONG[case]
    with pytest.raises(SourceError, match=line):
        open_source(changed(folder, tmp_path / "wrong", change))


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_damage_within_tensors_is_told(part: str, folder: Path, tmp_path: Path) -> None:
    nan = put(f"{Q}.{part}", lambda t: t.index_fill(0, torch.tensor(3), float("nan")))
    with pytest.raises(SourceError, match=rf"q_proj\.{part} hold NaN or infinity"):
        open_source(changed(folder, tmp_path / "nan", nan)).read(f"{Q}.weight")


def test_biases_that_are_no_whole_zeros_make_weights_and_no_codes(folder: Path, tmp_path: Path) -> None:
    half = put(f"{Q}.biases", lambda t: t * 1.01)
    source = open_source(changed(folder, tmp_path / "half", half))
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert source.codes is None
    scales, biases = (tensors[f"{Q}.{part}"].float().repeat_interleave(32, 1) for part in ("scales", "biases"))
    assert torch.equal(source.read(f"{Q}.weight"), unpacked(tensors[f"{Q}.weight"], 4).float() * scales + biases)
    with pytest.raises(UsageError, match="holds no codes that another container takes"):
        quantkit.repack(tmp_path / "half", tmp_path / "out", to="gptq_v2")


# -- mlx-lm itself -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(ask: Callable[[Program], Judge]) -> Judge:
    return ask(MLX)


# What mlx-lm's classes take for given: no head beside a tied one, an inner width of four times the outer, and so on.
FAMILIES: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            *("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "smollm3", "phi3", "starcoder2"),
            *("mixtral", "olmoe"),
        )
    },
    "gemma2": {"tied": True},
    "gemma3_text": {
        **{"tied": True, "num_hidden_layers": 6},
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
    "gpt_neox": {"intermediate_size": 256},
}


def difference(judge: Judge, folder: Path) -> float:
    """Of logits, in parts of their spread."""
    ids = token_matrix(2, 16).tokens
    theirs, _, _ = judge.logits(folder, ids)
    ours = streamed_logits(open_stream(folder), [ids])[0]
    return float((theirs - ours).abs().max() / ours.std())


@pytest.mark.judges
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_the_same(family: str, judge: Judge, make_model: MakeModel, tmp_path: Path) -> None:
    write_codes(tmp_path / "out", make_model(family, **FAMILIES[family]), {"group_size": 32}, "mlx")
    # Of two families it approximates the activation that transformers has exactly, or the other way round.
    assert difference(judge, tmp_path / "out") < (1e-3 if family in ("starcoder2", "gpt_neox") else 1e-4)


@pytest.mark.judges
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_mlx_lm_has_the_same_weights(bits: int, sym: bool, judge: Judge, make_model: MakeModel, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "out", make_model(), {"bits": bits, "group_size": 32, "sym": sym}, "mlx")
    weights = judge.weights(tmp_path / "out")
    assert sorted(weights) == sorted(codes)
    assert all(torch.equal(weights[module], linear.dequantize()) for module, linear in codes.items())
    # scale * code and bias are 128 times what is left of them, and it sums each alone.
    assert difference(judge, tmp_path / "out") < (1e-3 if bits == 8 else 1e-4)


@pytest.mark.judges
@pytest.mark.parametrize("sym", [True, False])
def test_mlx_lm_reads_awq_folders(sym: bool, judge: Judge, make_model: MakeModel, tmp_path: Path) -> None:
    write_codes(tmp_path / "out", make_model(), {"group_size": 32, "sym": sym}, "awq")
    assert difference(judge, tmp_path / "out") < (1e-4 if sym else 1e-2)  # it rounds biases to float16


@pytest.mark.judges
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_mlx_lm_converts_is_read(
    bits: int, dtype: str, judge: Judge, make_model: MakeModel, tmp_path: Path
) -> None:
    """Embeddings and head are codes there too."""
    judge.quantize(make_model(dtype=dtype), tmp_path / "out", torch.zeros(1, 1), q_bits=bits, q_group_size=32)
    source = open_source(tmp_path / "out")
    weights = judge.weights(tmp_path / "out")
    assert {"lm_head", "model.embed_tokens"} < set(weights)
    assert all(torch.equal(source.read(f"{module}.weight"), weight) for module, weight in weights.items())
    assert difference(judge, tmp_path / "out") < 1e-4
    assert quantkit.verify(tmp_path / "out", generate=False).ok


@pytest.mark.judges
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_what_verify_says_that_it_does_not_load_it_does_not(
    family: str, judge: Judge, make_model: MakeModel, tmp_path: Path
) -> None:
    write_codes(tmp_path / "out", make_model(family), {"group_size": 32}, "mlx")
    (checked,) = quantkit.verify(tmp_path / "out", generate=False).models
    assert not next(one for one in checked.loads if one.program == "mlx-lm").ok
    with pytest.raises(AssertionError, match="mlx-lm: logits"):
        judge.logits(tmp_path / "out", token_matrix(1, 4).tokens)
