"""`quantkit repack`: codes from any container into any other, the same weights or a line that says why not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from support.coded import changed, label_of, same, write_codes

import quantkit
from quantkit.codes import QuantizedLinear, contiguous_groups
from quantkit.codes.regroup import places, regrouped, size_of
from quantkit.containers.source import HoldsCodes
from quantkit.errors import UsageError
from quantkit.options import QuantSpec
from quantkit.sources import open_source

pytestmark = pytest.mark.fast

FORMATS = ("gptq", "gptq_v2", "compressed-tensors", "awq")
Q = "model.layers.0.self_attn.q_proj"


def codes_of(folder: Path) -> HoldsCodes:
    codes = open_source(folder).codes
    assert codes is not None
    return codes


def all_same(folder: Path, expected: dict[str, QuantizedLinear]) -> bool:
    codes = codes_of(folder)
    assert sorted(codes.quantized_names()) == sorted(expected)
    return all(same(codes.read_codes(module), linear) for module, linear in expected.items())


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(FORMATS, 2)))
def test_any_two_containers_hold_each_other_s_codes(
    one: str, other: str, make_model: MakeModel, tmp_path: Path
) -> None:
    expected = write_codes(tmp_path / "one", make_model(), {"group_size": 32, "sym": False}, one)
    report = quantkit.repack(tmp_path / "one", tmp_path / "other", to=other)
    assert (report.to, report.linears) == (other, len(expected))
    assert all_same(tmp_path / "other", expected)
    again = quantkit.repack(tmp_path / "other", tmp_path / "again", to=one)
    assert again.bytes == sum(info.bytes for info in open_source(tmp_path / "one").stored.tensors.values())  # type: ignore[attr-defined]
    assert all_same(tmp_path / "again", expected)
    assert quantkit.verify(tmp_path / "other", generate=False).ok


CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"bits": 4, "group_size": 32}, FORMATS),
    ({"bits": 4, "group_size": -1, "sym": False}, FORMATS),
    ({"bits": 2, "group_size": 16}, FORMATS[:3]),
    ({"bits": 3, "group_size": 32, "sym": False}, FORMATS[:3]),
    ({"bits": 8, "group_size": 32, "sym": False}, FORMATS[:3]),
    ({"bits": 4, "group_size": 32, "overrides": (("*.down_proj", {"bits": 8, "sym": False}),)}, FORMATS[:3]),
    ({"bits": 4, "group_size": 32, "exclude": ("*.v_proj",)}, FORMATS),
    ({"bits": 4, "group_size": 64}, FORMATS[:2]),  # with a short last group
    ({"bits": 4, "group_size": 32, "act_order": "dynamic"}, FORMATS[:2]),
]


@pytest.mark.parametrize(("spec", "formats"), CASES, ids=str)
def test_codes_come_back_from_a_way_through_all(
    spec: dict[str, Any], formats: tuple[str, ...], make_model: MakeModel, tmp_path: Path
) -> None:
    expected = write_codes(tmp_path / formats[0], make_model(tied=True), spec, formats[0])
    for before, after in itertools.pairwise((*formats, "back")):
        quantkit.repack(tmp_path / before, tmp_path / after, to=formats[0] if after == "back" else after)
        assert all_same(tmp_path / after, expected)
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in (formats[0], "back"))
    same_keys = {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "modules_in_block_to_quantize"}
    assert {k: first["quantization_config"][k] for k in same_keys} == {
        k: last["quantization_config"][k] for k in same_keys
    }


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi3", "qwen3_moe"])
def test_families_keep_their_names(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    expected = write_codes(tmp_path / "one", make_model(family), {"group_size": 32}, "gptq")
    quantkit.repack(tmp_path / "one", tmp_path / "two", to="compressed-tensors")
    assert all_same(tmp_path / "two", expected)
    quantkit.repack(tmp_path / "two", tmp_path / "three", to="gptq")
    assert all_same(tmp_path / "three", expected)


def test_a_group_in_parts_repeats_its_scale(make_model: MakeModel, tmp_path: Path) -> None:
    spec = {"group_size": 64, "sym": False}  # 96 columns are a whole group and half of one
    expected = write_codes(tmp_path / "one", make_model(), spec, "gptq")
    with pytest.raises(UsageError, match=r"no multiple of 64: .* has no short groups; group_size=32 divides every"):
        quantkit.repack(tmp_path / "one", tmp_path / "two", to="compressed-tensors")
    quantkit.repack(tmp_path / "one", tmp_path / "two", to="compressed-tensors", group_size=32)
    codes = codes_of(tmp_path / "two")
    for module, linear in expected.items():
        found = codes.read_codes(module)
        assert torch.equal(found.dequantize(), linear.dequantize())
        assert found.scales.shape[1] == found.shape[1] // 32
    assert label_of(tmp_path / "two")["config_groups"]["group_0"]["weights"]["group_size"] == 32
    for size, line in ((48, "have no|no part of one|groups of other columns"), (128, "groups of other columns")):
        with pytest.raises(UsageError, match=line):
            quantkit.repack(tmp_path / "one", tmp_path / "three", to="gptq", group_size=size)
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("columns", [64, 96, 160])
@pytest.mark.parametrize("size", [16, 64, -1])
def test_parts_of_groups(columns: int, size: int) -> None:
    dice = torch.Generator().manual_seed(columns)
    group = contiguous_groups(columns, size)
    count = int(group[-1]) + 1
    scales = torch.rand((4, count), generator=dice).half()
    zeros = torch.randint(0, 16, (4, count), generator=dice, dtype=torch.uint8)
    codes = torch.randint(0, 16, (4, columns), generator=dice, dtype=torch.uint8)
    linear = QuantizedLinear(codes, scales, zeros, group, 4)
    assert size_of(group) == (size if size < columns and count > 1 else -1)
    for wanted in (8, 16, 32, 64, -1):
        new = contiguous_groups(columns, wanted).tolist()
        fits = all(len({int(group[i]) for i in range(columns) if new[i] == one}) == 1 for one in set(new))
        assert (places(group, wanted) is not None) == fits
        if fits:
            parts = regrouped(linear, wanted)
            assert torch.equal(parts.dequantize(), linear.dequantize())
            assert torch.equal(parts.group, contiguous_groups(columns, wanted))
    scattered = group[torch.randperm(columns, generator=dice)]
    assert count == 1 or size_of(scattered) is None


def test_a_file_takes_them_too(make_model: MakeModel, tmp_path: Path) -> None:
    expected = write_codes(tmp_path / "one", make_model(num_key_value_heads=4), {"group_size": 32}, "awq")
    report = quantkit.repack(tmp_path / "one", tmp_path / "two.gguf", to="gguf", pre="gpt-2", dry_run=True)
    made = quantkit.repack(tmp_path / "one", tmp_path / "three.gguf", to="gguf", pre="gpt-2")
    assert made.linears == len(expected)
    source = open_source(made.out)
    assert all(torch.equal(source.read(f"{name}.weight"), linear.dequantize()) for name, linear in expected.items())
    with pytest.raises(UsageError, match="pre=gpt-2 is for files: to=gguf"):
        quantkit.repack(tmp_path / "one", tmp_path / "two", to="gptq", pre="gpt-2")
    assert (report.linears, report.dry_run, (tmp_path / "two.gguf").exists()) == (len(expected), True, False)
    with pytest.raises(UsageError, match="groups of gguf files are their types' own"):
        quantkit.repack(tmp_path / "one", tmp_path / "two.gguf", to="gguf", group_size=32)


def test_what_does_not_fit_is_refused_before_the_work(make_model: MakeModel, tmp_path: Path) -> None:
    write_codes(tmp_path / "eight", make_model(), {"bits": 8, "group_size": 32}, "gptq")
    write_codes(tmp_path / "order", make_model(), {"group_size": 32, "act_order": "dynamic"}, "gptq")
    for folder, to, line in (
        (make_model(), "awq", "holds no codes that another container takes"),
        (tmp_path / "eight", "awq", "an AWQ folder holds 4 bits; 8-bit codes fit into a GPTQ checkpoint or "),
        (tmp_path / "order", "compressed-tensors", "a compressed-tensors folder cannot hold it"),
        (tmp_path / "order", "exl3", "to=exl3: choose gptq, gptq_v2, compressed-tensors, awq"),
    ):
        with pytest.raises(UsageError, match=line):
            quantkit.repack(folder, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_zeros_of_0_go_where_zeros_are_stored_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    spec = QuantSpec(group_size=32, sym=False)
    write_codes(tmp_path / "whole", make_model(), spec, "awq")

    def clear(tensors: dict[str, torch.Tensor], _: Any) -> None:
        tensors[f"{Q}.qzeros"][0, 0] = 0

    folder = changed(tmp_path / "whole", tmp_path / "zero", clear)
    with pytest.raises(UsageError, match="has zeros of 0, of which gptq stores one less: to=gptq_v2"):
        quantkit.repack(folder, tmp_path / "one", to="gptq")
    for to in ("gptq_v2", "compressed-tensors"):
        quantkit.repack(folder, tmp_path / to, to=to)
        assert same(codes_of(tmp_path / to).read_codes(Q), codes_of(folder).read_codes(Q))


def test_its_record_says_what_it_was_made_of(make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    write_codes(tmp_path / "one", make_model(), {"group_size": 32}, "gptq")
    monkeypatch.chdir(tmp_path)
    report = quantkit.repack(tmp_path / "one", to="compressed-tensors")
    assert report.out == tmp_path / "one-compressed-tensors-4bit-32g"
    record = json.loads((report.out / "quantkit.json").read_text())
    assert record["recipe"] == {"repack": "compressed-tensors", "group_size": None}
    assert set(record["files"]) >= {"config.json", "model.safetensors"}
    with pytest.raises(UsageError, match="force=True"):
        quantkit.repack(tmp_path / "one", to="compressed-tensors")
