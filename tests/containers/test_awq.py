"""The AWQ container: its layout, what a judge computes from it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file
from support.coded import Change, changed, drop, label_of, put, same, say, write_codes
from support.judge_env import GPTQMODEL, Judge, judge_python
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.codes import LinearPlan
from quantkit.containers.awq.write import check, plan
from quantkit.containers.source import TensorInfo
from quantkit.errors import SourceError, UsageError
from quantkit.options import QuantSpec
from quantkit.sources import open_source
from quantkit.verbs.publish import branch_of

pytestmark = pytest.mark.fast

Q = "model.layers.0.self_attn.q_proj"
# Of AutoAWQ's own unpacking (`reverse_awq_order`): where each of eight neighbours lies in a word.
SHIFTS = [4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)]


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """[n, out / 8] as [n, out], by plain arithmetic on the layout's own table."""
    return torch.stack([(words.long() >> shift) & 15 for shift in SHIFTS], dim=2).flatten(1)


@pytest.mark.parametrize(("group_size", "sym"), [(32, True), (32, False), (-1, False)])
def test_a_folder_holds_the_codes_in_the_layout(
    group_size: int, sym: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    codes = write_codes(tmp_path / "out", make_model(), {"group_size": group_size, "sym": sym}, "awq")
    tensors, source = load_file(tmp_path / "out" / "model.safetensors"), open_source(tmp_path / "out")
    for module, linear in codes.items():
        assert torch.equal(nibbles(tensors[f"{module}.qweight"]).T, linear.codes.long())
        assert torch.equal(nibbles(tensors[f"{module}.qzeros"]).T, linear.zeros.long())
        assert torch.equal(tensors[f"{module}.scales"].T, linear.scales)
        assert source.codes is not None
        assert same(source.codes.read_codes(module), linear)
        assert torch.equal(source.read(f"{module}.weight"), linear.dequantize())
    assert label_of(tmp_path / "out") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    group = "whole rows" if group_size == -1 else f"group {group_size}"
    assert source.scheme == f"AWQ 4-bit {'symmetric' if sym else 'asymmetric'}, {group}"


def test_a_run_writes_it_and_every_verb_takes_it(make_model: MakeModel, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "awq"
    text.write_text("the quick brown fox jumps over the lazy dog and asks a question " * 40)
    options: dict[str, Any] = {"calibration": token_matrix(4, 16), "group_size": 32, "evaluate": False}
    found = {}
    for name in ("gptq", "awq"):
        quantkit.gptq(make_model(num_key_value_heads=4), tmp_path / name, format=name, **options)
        found[name] = quantkit.perplexity([tmp_path / name], text=str(text), seq_len=16, eval_tokens=64).results[0]
    assert found["gptq"].perplexity == found["awq"].perplexity
    assert quantkit.inspect(folder).types["AWQ4"] == 14
    (checked,) = quantkit.verify(folder, device="cpu").models
    assert (checked.problems, checked.kind) == ((), "awq")
    assert {one.program for one in checked.loads if one.ok} == {"transformers", "vLLM", "mlx-lm"}
    assert quantkit.ggml(folder, tmp_path / "out.gguf", pre="gpt-2").fidelity["exact"] == 14
    source, written = open_source(folder), open_source(tmp_path / "out.gguf")
    assert torch.equal(written.read(f"{Q}.weight"), source.read(f"{Q}.weight"))
    assert branch_of(folder) == "awq-4bit-32g-actorder_False"
    quantkit.card(folder, base_model=["someone/tiny"], licence="mit")
    assert "AWQ folders made from [someone/tiny]" in (folder / "README.md").read_text()


def test_experts_are_codes_and_routers_are_not(make_model: MakeModel, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "out", make_model("qwen3_moe"), {"group_size": 32, "sym": False}, "awq")
    source = open_source(tmp_path / "out")
    assert all(torch.equal(source.read(f"{module}.weight"), linear.dequantize()) for module, linear in codes.items())
    kept = label_of(tmp_path / "out")["modules_to_not_convert"]
    assert sorted(kept) == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert not any(name in module for name in kept for module in codes)


def test_what_it_has_no_place_for_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    for spec, shape, line in (
        ({"bits": 3}, (64, 128), "an AWQ folder holds 4 bits; 3-bit codes fit into a GPTQ checkpoint or "),
        ({"group_size": 16}, (64, 128), "AWQ readers load groups of 32, 64, 128, or -1 for whole rows"),
        ({"act_order": "dynamic"}, (64, 128), "cannot hold it; use static or off"),
        ({"group_size": 64}, (64, 96), "has no short groups; --group-size 32 divides every width"),
        ({"group_size": 64}, (60, 64), "has 60 rows: AWQ packs 8 of them into a word"),
    ):
        with pytest.raises(UsageError, match=line):
            check({"one": LinearPlan(shape, QuantSpec(**spec))})
    spec = QuantSpec(group_size=32, overrides=(("*.1.*", {"group_size": 64}),))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--override: an AWQ folder holds one precision"):
        write_codes(tmp_path / "mixed", make_model(intermediate_size=128), spec, "awq")
    linears = {f"mlp.{name}": LinearPlan((64, 64), QuantSpec(group_size=32)) for name in ("gate_proj", "up_proj")}
    tensors = {f"{name}.weight": TensorInfo((64, 64), "F16", 0) for name in ("mlp.gate", *linears)}
    weights: Any = SimpleNamespace(tensors=tensors, names={}, dtype=lambda name: torch.float16)
    with pytest.raises(UsageError, match=r"mlp\.gate stays as it is, and AWQ readers would leave mlp\.gate_proj too"):
        plan(weights, weights, linears)


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    write_codes(tmp_path / "whole", make_model(), {"group_size": 32, "sym": False}, "awq")
    return tmp_path / "whole"


WRONG: dict[str, tuple[Change, str]] = {
    "bits": (say(bits=3), "bits 3: AWQ's GEMM layout has 4"),
    "group": (say(group_size=16), r"qzeros is \[\d+, \d+\], but \d+ x \d+ in groups of 16, as config.json says"),
    "no group": (say(group_size=None), "group_size None is no number of columns"),
    "layout": (say(version="gemv"), "version 'gemv' of AWQ is not read, only gemm"),
    "no zeros": (drop(f"{Q}.qzeros"), "q_proj has qweight but no qzeros"),
    "no scales": (drop(f"{Q}.scales"), "q_proj has qweight but no scales"),
    "short": (put(f"{Q}.qweight", lambda t: t[:-1]), "q_proj is 63 columns wide, no multiple of its group of 32"),
    "fewer rows": (put(f"{Q}.qweight", lambda t: t[:, :-1]), r"qzeros is \[2, 8\], but 56 x 64 in groups of 32"),
    "scales of whole numbers": (
        put(f"{Q}.scales", torch.Tensor.int),
        r"scales is I32 \[2, 64\]: not AWQ's GEMM layout",
    ),
    "a vector": (put(f"{Q}.qzeros", torch.Tensor.flatten), r"qzeros is I32 \[16\]: not AWQ's GEMM layout"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_told(case: str, folder: Path, tmp_path: Path) -> None:
    change, line = WRONG[case]
    with pytest.raises(SourceError, match=line):
        open_source(changed(folder, tmp_path / "wrong", change))


def test_older_keys_and_zeros_that_are_left_out_are_read(make_model: MakeModel, tmp_path: Path) -> None:
    codes = write_codes(tmp_path / "whole", make_model(), {"group_size": 32}, "awq")

    def older(tensors: dict[str, torch.Tensor], label: Any) -> None:
        label.update(w_bit=label.pop("bits"), q_group_size=label.pop("group_size"), zero_point=False, version="GEMM")
        for module in codes:
            del tensors[f"{module}.qzeros"]

    source = open_source(changed(tmp_path / "whole", tmp_path / "older", older))
    assert torch.equal(source.read(f"{Q}.weight"), codes[Q].dequantize())
    assert source.settings["sym"] is True


@pytest.mark.judges
@pytest.mark.parametrize("sym", [True, False])
def test_transformers_with_gptqmodel_computes_the_same(sym: bool, make_model: MakeModel, tmp_path: Path) -> None:
    judge_python(GPTQMODEL)
    ids = token_matrix(2, 16).tokens
    write_codes(tmp_path / "out", make_model(), {"group_size": 32, "sym": sym}, "awq")
    judge = Judge(GPTQMODEL)
    try:
        theirs, _, _ = judge.logits(tmp_path / "out", ids, loader="transformers", backend="auto")
    finally:
        judge.close()
    ours = streamed_logits(open_stream(tmp_path / "out"), [ids])[0]
    assert float((theirs - ours).abs().max()) < 1e-4 * float(ours.std())
