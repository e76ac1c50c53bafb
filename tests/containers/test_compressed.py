"""The compressed-tensors container: its layout, its label, what the library itself reads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, MakeModel, token_matrix
from safetensors.torch import load_file
from support.coded import Tensors, changed, drop, label_of, put, same, say, write_codes
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.codes import LinearPlan
from quantkit.containers.compressed.write import check, patterns
from quantkit.errors import SourceError, UsageError
from quantkit.options import QuantSpec
from quantkit.sources import open_source
from quantkit.verbs.publish import branch_of

pytestmark = pytest.mark.fast

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
PARTS = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
CASES = [(2, 32, True), (3, 32, False), (4, 32, True), (4, 16, False), (5, 32, True), (6, -1, False), (7, 32, False)]
CASES += [(8, -1, True), (8, 32, False)]


def words_of(codes: list[int], bits: int) -> list[int]:
    """Codes as one number, little end first, cut into 32-bit words, the last one filled with zeros."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [(number >> shift) & 0xFFFFFFFF for shift in range(0, bits * len(codes), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize(("bits", "group_size", "sym"), CASES)
def test_a_folder_holds_the_codes_in_the_layout(
    bits: int, group_size: int, sym: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    model, folder = make_model(), tmp_path / "out"
    codes = write_codes(folder, model, {"bits": bits, "group_size": group_size, "sym": sym}, "compressed-tensors")
    tensors, source = load_file(folder / "model.safetensors"), open_source(folder)
    for module, linear in codes.items():
        rows, columns = linear.shape
        assert tensors[f"{module}.weight_packed"].tolist() == [words_of(line, bits) for line in linear.codes.tolist()]
        assert torch.equal(tensors[f"{module}.weight_scale"], linear.scales)
        assert tensors[f"{module}.weight_shape"].tolist() == [rows, columns]
        zeros = tensors.get(f"{module}.weight_zero_point")
        assert (zeros is None) == sym
        if zeros is not None:
            assert zeros.T.tolist() == [words_of(line, bits) for line in linear.zeros.T.tolist()]
        assert source.codes is not None
        assert same(source.codes.read_codes(module), linear)
        assert torch.equal(source.read(f"{module}.weight"), linear.dequantize())
    found = {name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] in codes}
    assert found == (PARTS if not sym else PARTS - {"weight_zero_point"})
    label = label_of(folder)
    assert (label["quant_method"], label["format"], label["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    assert label["ignore"] == ["lm_head"]
    (group,) = label["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = {"num_bits": bits, "symmetric": sym, "type": "int", "actorder": "weight", "dynamic": False}
    weights |= {"strategy": "channel" if group_size == -1 else "group"}
    weights |= {"group_size": None if group_size == -1 else group_size, "observer": None}
    assert group["weights"] == weights


def test_a_run_writes_it_and_every_verb_takes_it(make_model: MakeModel, tmp_path: Path) -> None:
    model, text = make_model(num_key_value_heads=4), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and asks a question " * 40)
    options: dict[str, Any] = {"calibration": token_matrix(4, 16), "group_size": 32, "evaluate": False}
    twins = {}
    for name in ("gptq", "compressed-tensors"):
        made = quantkit.gptq(model, tmp_path / name, format=name, **options)
        assert made.model == tmp_path / name
        twins[name] = quantkit.perplexity([tmp_path / name], text=str(text), seq_len=16, eval_tokens=64).results[0]
    folder = tmp_path / "compressed-tensors"
    assert twins["gptq"].perplexity == twins["compressed-tensors"].perplexity
    seen = quantkit.inspect(folder)
    assert (seen.kind, seen.scheme) == ("compressed-tensors", "compressed-tensors 4-bit symmetric, group 32")
    assert (seen.types["INT4"], seen.quantization) == (14, label_of(folder))
    (checked,) = quantkit.verify(folder, device="cpu").models
    assert (checked.problems, checked.kind) == ((), "compressed-tensors")
    loads = {one.program: (one.ok, one.why) for one in checked.loads}
    assert loads["transformers"] == (True, "with compressed-tensors")
    assert loads["vLLM"] == (True, "")
    assert loads["AutoGPTQ"][0] is loads["llama.cpp"][0] is False
    report = quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2")
    assert report.fidelity["exact"] == 14
    quantkit.convert(folder, tmp_path / "floats", dtype="float32")
    source, written = open_source(folder), open_source(tmp_path / "out.gguf")
    floats = open_source(tmp_path / "floats")
    for module in source.codes.quantized_names() if source.codes else ():
        expected = source.read(f"{module}.weight")
        assert torch.equal(written.read(f"{module}.weight"), expected)
        assert torch.equal(floats.read(f"{module}.weight"), expected)
    assert branch_of(folder) == "compressed-tensors-4bit-32g-actorder_False"
    quantkit.card(folder, base_model=["someone/tiny"], licence="mit")
    card = (folder / "README.md").read_text()
    assert "compressed-tensors folders made from [someone/tiny]" in card
    assert "- compressed-tensors\n" in card
    assert "vllm serve" in card
    with pytest.raises(UsageError, match="quantized already"):
        quantkit.gptq(folder, tmp_path / "twice", **options)


def test_its_default_name_says_what_it_is(make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"calibration": token_matrix(4, 16), "evaluate": False, "dry_run": True}
    report = quantkit.gptq(make_model(), bits=6, group_size=32, format="compressed-tensors", **options)
    assert report.out.name == "tiny-llama-compressed-tensors-6bit-32g"


def test_several_precisions_are_several_groups(make_model: MakeModel, tmp_path: Path) -> None:
    overrides = {"*.down_proj": {"bits": 8, "sym": False}, "*.0.self_attn.o_proj": {"group_size": 16}}
    spec = QuantSpec(group_size=32, overrides=tuple(overrides.items()), exclude=("*.1.self_attn.v_proj",))
    codes = write_codes(tmp_path / "out", make_model(), spec, "compressed-tensors", shard=20_000)
    source, label = open_source(tmp_path / "out"), label_of(tmp_path / "out")
    assert source.codes is not None
    assert all(same(source.codes.read_codes(module), linear) for module, linear in codes.items())
    groups = [(g["weights"]["num_bits"], g["targets"]) for g in label["config_groups"].values()]
    assert groups[1:] == [
        (4, ["model.layers.0.self_attn.o_proj"]),
        (8, [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]),
    ]
    assert {"model.layers.1.self_attn.o_proj", r"re:^model\.layers\.\d+\.self_attn\.q_proj$"} <= set(groups[0][1])
    assert sorted(label["ignore"]) == ["lm_head", "model.layers.1.self_attn.v_proj"]
    assert source.scheme == (
        "compressed-tensors 4-bit symmetric, group 32 and 8-bit asymmetric, group 32 and 4-bit symmetric, group 16"
    )
    (facts,) = quantkit.verify(tmp_path / "out", generate=False).models
    assert "differ in precision" in next(one.why for one in facts.loads if one.program == "vLLM")


def test_patterns_stand_for_their_modules_and_for_no_others() -> None:
    layers = [f"model.layers.{n}.mlp" for n in range(3)]
    assert patterns([f"{one}.up" for one in layers], [f"{one}.down" for one in layers]) == [
        r"re:^model\.layers\.\d+\.mlp\.up$"
    ]
    assert patterns([f"{one}.up" for one in layers[:2]], [f"{layers[2]}.up"]) == [f"{one}.up" for one in layers[:2]]
    assert patterns(["lm_head"], []) == ["lm_head"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_codes_and_routers_are_not(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "out", make_model(family), {"group_size": 32}, "compressed-tensors")
    assert any(".experts." in module for module in codes)
    source = open_source(tmp_path / "out")
    for module, linear in codes.items():
        assert torch.equal(source.read(f"{module}.weight"), linear.dequantize())
    assert any(re_target.endswith(r"gate$") for re_target in label_of(tmp_path / "out")["ignore"])


def test_what_it_has_no_place_for_is_refused() -> None:
    for spec, shape, line in (
        ({"act_order": "dynamic"}, (64, 128), "cannot hold it; use static or off"),
        (
            {"group_size": 64},
            (64, 96),
            "is 96 wide, no multiple of 64: .* has no short groups; --group-size 32 divides",
        ),
        ({"group_size": 32}, (64, 40), "has no short groups; use --group-size -1"),
    ):
        with pytest.raises(UsageError, match=line):
            check({"one": LinearPlan(shape, QuantSpec(**spec))})


# -- folders of others -----------------------------------------------------------------------------------------------


def weights_of(label: Any) -> Any:
    return label["config_groups"]["group_0"]["weights"]


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    write_codes(tmp_path / "whole", make_model(), {"group_size": 32, "sym": False}, "compressed-tensors")
    return tmp_path / "whole"


def test_groups_of_scattered_columns_are_read(folder: Path, tmp_path: Path) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    def scatter(tensors: Tensors, label: Any) -> None:
        weights_of(label)["actorder"] = "group"
        tensors[f"{Q}.weight_g_idx"] = (order // 32).int()

    before, after = open_source(folder), open_source(changed(folder, tmp_path / "older", scatter))
    assert before.codes is not None
    assert after.codes is not None
    codes = after.codes.read_codes(Q)
    assert torch.equal(codes.group, (order // 32).int())
    assert torch.equal(codes.codes, before.codes.read_codes(Q).codes)
    assert torch.equal(after.read(f"{Q}.weight"), codes.dequantize())
    assert after.settings["desc_act"] is True


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_codes_of_a_byte_each_are_read(strategy: str, folder: Path, tmp_path: Path) -> None:
    expected: Tensors = {}

    def unpacked(tensors: Tensors, label: Any) -> None:
        label["format"] = "int-quantized"
        weights_of(label).update(num_bits=8, strategy=strategy, group_size=32 if strategy == "group" else None)
        dice = torch.Generator().manual_seed(3)
        for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")]:
            rows, columns = tensors.pop(f"{module}.weight_shape").tolist()
            del tensors[f"{module}.weight_packed"]
            grid = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // 32)}[strategy]
            codes = torch.randint(-128, 128, (rows, columns), generator=dice, dtype=torch.int8)
            zeros = torch.randint(-128, 128, grid, generator=dice, dtype=torch.int8)
            scales = (torch.rand(grid, generator=dice) * 0.01 + 1e-3).bfloat16()
            named = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
            tensors |= {f"{module}.{part}": tensor for part, tensor in named.items()}
            wide = [
                part.float().reshape(-1, grid[-1]).repeat_interleave(columns // grid[-1], 1) for part in (zeros, scales)
            ]
            expected[module] = (codes.float() - wide[0]) * wide[1]

    out = changed(folder, tmp_path / "naive", unpacked)
    source = open_source(out)
    assert source.codes is not None
    assert source.tensors[f"{Q}.weight"].stored_as == "INT8"
    for module, weight in expected.items():
        assert torch.equal(source.read(f"{module}.weight"), weight)
        assert torch.equal(source.codes.read_codes(module).dequantize(), weight)
    quantkit.convert(out, tmp_path / "floats")


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_weights_in_8_bit_floats_are_read(strategy: str, folder: Path, tmp_path: Path) -> None:
    expected: Tensors = {}

    def floats(tensors: Tensors, label: Any) -> None:
        label["format"] = "float-quantized"
        label["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
        block = [16, 32] if strategy == "block" else None
        weights_of(label).update(num_bits=8, type="float", symmetric=True, group_size=None)
        weights_of(label).update(strategy=strategy, block_structure=block)
        dice = torch.Generator().manual_seed(3)
        for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")]:
            rows, columns = tensors.pop(f"{module}.weight_shape").tolist()
            del tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_zero_point"]
            grid = {"tensor": (1,), "channel": (rows, 1), "block": (rows // 16, columns // 32)}[strategy]
            values = torch.randn(rows, columns, generator=dice).to(torch.float8_e4m3fn)
            scales = torch.rand(grid, generator=dice) + 0.5
            tensors |= {f"{module}.weight": values, f"{module}.weight_scale": scales}
            tall = scales.reshape(-1, grid[-1]).repeat_interleave(rows // grid[0], 0) if len(grid) == 2 else scales
            expected[module] = values.float() * tall.repeat_interleave(columns // grid[-1], -1)

    out = changed(folder, tmp_path / "fp8", floats)
    source = open_source(out)
    assert (source.codes, source.scheme) == (None, "compressed-tensors fp8")
    assert source.remarks == ("fp8: its config has activations in 8-bit floats too; here only its weights are",)
    for module, weight in expected.items():
        assert torch.equal(source.read(f"{module}.weight"), weight)
    assert source.tensors[f"{Q}.weight"].stored_as == "F8_E4M3"
    quantkit.gptq(out, tmp_path / "again", calibration=token_matrix(4, 16), group_size=32, evaluate=False)


def of_weights(**fields: Any) -> Callable[[Tensors, Any], None]:
    return lambda _, label: weights_of(label).update(fields)


def of_group(**fields: Any) -> Callable[[Tensors, Any], None]:
    return lambda _, label: label["config_groups"]["group_0"].update(fields)


WRONG: dict[str, tuple[Callable[[Tensors, Any], None], str]] = {
    "bits": (
        of_weights(num_bits=8),
        r"weight_shape says \d+ x \d+, but weight_packed has \d+ rows of (8|12) words, for (32|48) columns",
    ),
    "fewer bits": (
        of_weights(num_bits=3),
        r"weight_packed is \[\d+, (8|12)\], but \d+ x \d+ of 3-bit .* \[\d+, (6|9)\]",
    ),
    "group": (
        of_weights(group_size=16),
        r"weight_scale is \[\d+, (2|3)\], but .*group 16, as config.json says, make it \[\d+, (4|6)\]",
    ),
    "symmetry": (of_weights(symmetric=True), "has weight_zero_point, but config.json says 4-bit symmetric"),
    "short": (
        put(f"{Q}.weight_packed", lambda t: t[:, :-1]),
        "weight_shape says 64 x 64, but weight_packed has 64 rows of 7",
    ),
    "rows": (put(f"{Q}.weight_packed", lambda t: t[:-1]), "weight_shape says 64 x 64, but weight_packed has 63 rows"),
    "shape": (put(f"{Q}.weight_shape", lambda t: t * 2), "weight_shape says 128 x 128, but"),
    "shape below": (put(f"{Q}.weight_shape", lambda t: t - 1), "weight_shape says 63 x 63, but"),
    "shape of columns": (
        put(f"{Q}.weight_shape", lambda t: t - torch.tensor([0, 20])),
        r"weight_packed is \[64, 8\], but 64 x 44 of 4-bit",
    ),
    "no scale": (
        drop(f"{Q}.weight_scale"),
        "has no weight_scale, which config.json's 4-bit asymmetric, group 32 needs",
    ),
    "no zero": (drop(f"{Q}.weight_zero_point"), "has no weight_zero_point"),
    "scale of whole numbers": (put(f"{Q}.weight_scale", torch.Tensor.int), "weight_scale is I32; read are"),
    "words of another type": (
        put(f"{Q}.weight_packed", torch.Tensor.float),
        "weight_packed is F32, but config.json says",
    ),
    "format": (say(format="zipped"), "format 'zipped' is not one of pack-quantized, "),
    "no format": (say(format=None), "format None is not one of"),
    "floats of 4 bits": (say(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not one of"),
    "sparse format": (say(format="marlin-24"), r"its weights are sparse \('marlin-24'\), which is not read"),
    "sparse": (say(sparsity_config={"format": "sparse-24-bitmask"}), r"its weights are sparse \('sparse-24-bitmask'\)"),
    "rotated": (say(transform_config={"config_groups": {}}), "its transform_config rotates weights"),
    "activations": (
        of_group(input_activations={"num_bits": 8}),
        r"group_0: quantizes activations too \(input_activations\)",
    ),
    "output": (of_group(output_activations={"num_bits": 8}), r"quantizes activations too \(output_activations\)"),
    "no groups": (say(config_groups={}), "its quantization_config has no config_groups"),
    "no weights": (of_group(weights=None), "group_0 of config_groups says nothing of weights"),
    "no targets": (of_group(targets="Linear"), "group_0: targets are not a list of names"),
    "16 bits": (of_weights(num_bits=16), "weights of 16 bits, 'int'; integers of 2 to 8 are read"),
    "strategy": (of_weights(strategy="token"), "strategy 'token' is not one of tensor, channel, group"),
    "size": (of_weights(group_size="32"), "group_size '32' is no number of columns"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_told(case: str, folder: Path, tmp_path: Path) -> None:
    change, line = WRONG[case]
    with pytest.raises(SourceError, match=line):
        open_source(changed(folder, tmp_path / "wrong", change))


def test_damage_within_tensors_is_told(folder: Path, tmp_path: Path) -> None:
    nan = put(f"{Q}.weight_scale", lambda t: t.index_fill(0, torch.tensor(3), float("nan")))
    source = open_source(changed(folder, tmp_path / "nan", nan))
    with pytest.raises(SourceError, match=r"q_proj\.weight_scale hold NaN or infinity"):
        source.read(f"{Q}.weight")
    assert any("NaN" in text for text in quantkit.verify(tmp_path / "nan", generate=False).problems)
    source = open_source(
        changed(
            folder,
            tmp_path / "far",
            lambda t, _: t.update({f"{Q}.weight_g_idx": torch.full((64,), 9, dtype=torch.int32)}),
        )
    )
    with pytest.raises(SourceError, match="weight_g_idx names groups beyond its 2"):
        source.read(f"{Q}.weight")


def test_scales_that_float16_does_not_hold_are_read_but_not_taken(folder: Path, tmp_path: Path) -> None:
    wide = put(f"{Q}.weight_scale", lambda t: t.bfloat16() * 2**-20)
    source = open_source(changed(folder, tmp_path / "wide", wide))
    assert source.codes is not None
    assert source.read(f"{Q}.weight").abs().max() > 0
    with pytest.raises(SourceError, match="weight_scale hold more than float16; its codes cannot be taken"):
        source.codes.read_codes(Q)


# -- the library itself ----------------------------------------------------------------------------------------------

library = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")


@library
@pytest.mark.parametrize(("bits", "group_size", "sym"), CASES)
def test_the_library_reads_the_same_weights(
    bits: int, group_size: int, sym: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    spec = {"bits": bits, "group_size": group_size, "sym": sym}
    codes = write_codes(tmp_path / "out", make_model("mixtral"), spec, "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    (scheme,) = QuantizationConfig.model_validate(label_of(tmp_path / "out")).config_groups.values()
    for module, linear in codes.items():
        parts = {name: tensors.get(f"{module}.{name}") for name in PARTS}
        held = {name: part for name, part in parts.items() if part is not None}
        held["weight_scale"] = held["weight_scale"].float()
        weight = PackedQuantizationCompressor.decompress(held, scheme)["weight"]
        assert torch.equal(weight.float(), linear.dequantize()), module


@library
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"falcon", "gpt2"}))
def test_transformers_computes_the_same(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    overrides = {"*.1.*": {"bits": 8}} if family == "llama" else {}
    spec = QuantSpec(group_size=32, overrides=tuple(overrides.items()))
    write_codes(tmp_path / "out", make_model(family, tied=family == "qwen2"), spec, "compressed-tensors")
    ids = token_matrix(2, 16).tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(ids).logits
    ours = streamed_logits(open_stream(tmp_path / "out"), [ids])[0]
    most = 1e-3 if family in EXPERTS else 1e-4  # of experts it multiplies codes and scales in float16
    assert float((theirs - ours).abs().max()) < most * float(ours.std())


@library
@pytest.mark.parametrize("case", ["falcon", "gpt2", "asymmetric"])
def test_what_transformers_does_not_load_verify_says(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = {"group_size": 32, "sym": case != "asymmetric"}
    write_codes(tmp_path / "out", make_model("llama" if case == "asymmetric" else case), spec, "compressed-tensors")
    ids = token_matrix(2, 16).tokens
    with suppress(AttributeError, RuntimeError), torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        assert case == "gpt2"  # which it loads without a word, with random numbers for what it did not read
        assert float((theirs - streamed_logits(open_stream(tmp_path / "out"), [ids])[0]).abs().max()) > 0.1
    (facts,) = quantkit.verify(tmp_path / "out", generate=False).models
    assert not next(load.ok for load in facts.loads if load.program == "transformers")
