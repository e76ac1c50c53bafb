"""`quantkit gptq --ggml`: GPTQ on the grids of GGML's types, straight into a file for llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import MakeModel, Recorder, token_matrix
from safetensors.torch import load_file, save_file
from support.gguf_models import WIDE, types_of
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.cli.app import main
from quantkit.containers.gguf.file import GgufFile
from quantkit.errors import UsageError
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq import GptqReport

IDS = token_matrix(2, 24, seed=5).tokens
CONFIG = {"llama": WIDE, "qwen3_moe": {"norm_topk_prob": True}}


def run(folder: Path, out: Path, tokens: TokenMatrix, ggml: str, **options: Any) -> GptqReport:
    fixed = {"calibration": tokens, "evaluate": False, "device": "cpu", "pre": "gpt-2"}
    return quantkit.gptq(folder, out, ggml=ggml, **{**fixed, **options})


def stored(path: Path) -> dict[str, np.ndarray]:
    file = GgufFile(path)
    return {name: file.blocks(name)[1] for name in file.tensors}


@pytest.mark.parametrize(
    ("family", "ggml", "bits"),
    [
        ("llama", "q2_0", 2),
        *((family, *of) for family in ("llama", "qwen3_moe", "gemma3_text") for of in (("q4_0", 4), ("q8_0", 8))),
    ],
)
def test_symmetric_blocks_are_those_of_a_checkpoint_with_groups_of_a_block(
    family: str, ggml: str, bits: int, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model(family, **CONFIG.get(family, {}))
    straight = run(folder, tmp_path / "straight", tiny_tokens, ggml)
    size = 64 if ggml == "q2_0" else 32
    quantkit.gptq(
        folder, tmp_path / "gptq", calibration=tiny_tokens, bits=bits, group_size=size, evaluate=False, device="cpu"
    )
    quantkit.ggml(tmp_path / "gptq", tmp_path / "x.gguf", type=ggml, pre="gpt-2")
    expected, found = stored(tmp_path / "x.gguf"), stored(straight.model)
    blocks = [name for name, kind in types_of(straight.model).items() if name.startswith("blk.") and kind != "F32"]
    assert len(blocks) >= 14
    for name in blocks:
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    "ggml",
    ["q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q3_k_m", "q4_k_m", "iq4_nl", "iq4_xs", "q2_0"],
)
def test_what_is_in_the_file_is_what_was_optimised(
    ggml: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """The loss of every Linear, from the file by gguf's dequantizer, against its weight's distance from the source."""
    folder = make_model("llama", **WIDE)
    report = run(folder, tmp_path / "out", tiny_tokens, ggml)
    assert [layer.fallback for layer in report.layers] == [""] * 14
    assert sum(layer.loss for layer in report.layers) < 0.8 * sum(layer.rtn_loss for layer in report.layers)
    base = ggml.rpartition("_")[0].upper() if ggml.endswith(("_m", "_s")) else ggml.upper()
    types = types_of(report.model)
    assert types["blk.1.ffn_up.weight"] == base
    assert report.model.stat().st_size > report.bytes == sum(t.nbytes for t in stored(report.model).values())
    weights = {n: i for n, i in open_stream(report.model).weights.tensors.items() if n.endswith("_proj.weight")}
    size = 8 * sum(i.bytes for i in weights.values()) / sum(i.shape[0] * i.shape[1] for i in weights.values())
    assert report.bits_per_weight == pytest.approx(size)
    record = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert (record["recipe"]["ggml"], record["recipe"]["pre"]) == (ggml, "gpt-2")
    assert len(record["layers"]) == 14
    assert GgufFile(report.model).keys["quantkit.weights"] == "GPTQ codes"


def test_a_file_of_rounded_codes_does_not_say_that_gptq_made_them(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    first = run(make_model("llama", **WIDE), tmp_path / "out", tiny_tokens, "q4_0", method="round").model
    quantkit.ggml(first, tmp_path / "copy.gguf", output_type="f16")
    for path in (first, tmp_path / "copy.gguf"):
        fields = gguf.GGUFReader(path).fields
        assert "quantkit.version" in fields
        assert "quantkit.weights" not in fields


def test_a_copy_of_the_file_still_says_where_its_codes_come_from(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    first = run(make_model("llama", **WIDE), tmp_path / "out", tiny_tokens, "q4_0").model
    report = quantkit.ggml(first, tmp_path / "copy.gguf", output_type="f16")
    assert report.fidelity == {"exact": 15, "rounded": 1}
    assert gguf.GGUFReader(tmp_path / "copy.gguf").fields["quantkit.weights"].contents() == "GPTQ codes"
    rounded = quantkit.ggml(first, tmp_path / "r.gguf", type="q8_0", pure=True, requantize=True)
    assert "exact" not in rounded.fidelity
    assert "quantkit.weights" not in gguf.GGUFReader(tmp_path / "r.gguf").fields


def test_the_mixture_is_llama_cpps(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder
) -> None:
    """Also of a fused q/k/v, and of widths that no super-block divides."""
    folder = make_model("llama", num_hidden_layers=8, **WIDE)
    types = types_of(run(folder, tmp_path / "m", tiny_tokens, "q4_k_m", dry_run=False).model)
    more = {f"blk.{i}.{role}.weight" for i in (0, 3, 6, 7) for role in ("attn_v", "ffn_down")}
    assert {name for name, kind in types.items() if kind == "Q6_K"} == {*more, "output.weight"}
    mixed = types_of(run(folder, tmp_path / "i", tiny_tokens, "iq4_xs").model)
    assert {name for name, kind in mixed.items() if kind == "Q5_K"} == {"blk.0.ffn_down.weight"}
    assert mixed["blk.1.ffn_down.weight"] == mixed["blk.0.attn_q.weight"] == "IQ4_XS"
    narrow = types_of(run(make_model("phi3"), tmp_path / "x", tiny_tokens, "iq4_xs").model)
    assert {kind for name, kind in narrow.items() if name.startswith("blk.1.") and "norm" not in name} == {"IQ4_NL"}
    narrow = types_of(run(make_model("phi3"), tmp_path / "n", tiny_tokens, "q4_k_m", progress=recorder).model)
    assert any(note.startswith("9 matrices are no whole number of blocks wide") for note in recorder.notes)
    assert [narrow[f"blk.{i}.attn_qkv.weight"] for i in (0, 1)] == ["Q5_0", "Q8_0"]
    assert [narrow[f"blk.{i}.ffn_up.weight"] for i in (0, 1)] == ["Q5_0", "Q5_0"]


@pytest.mark.parametrize("ggml", ["q3_k", "iq4_nl", "iq4_xs", "q2_0"])
def test_the_files_logits_are_nearer_than_those_of_rounding(ggml: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama", **WIDE)
    tokens = token_matrix(24, 64, seed=2)
    reference = streamed_logits(open_stream(folder), [IDS])[0]
    ends = {"embedding_type": "f16", "output_type": "f16"}
    ours = run(folder, tmp_path / "out", tokens, ggml, **ends).model
    quantkit.ggml(folder, tmp_path / "r.gguf", type=ggml, pre="gpt-2", **ends)
    assert types_of(ours) == types_of(tmp_path / "r.gguf")
    far = [
        float((streamed_logits(open_stream(path), [IDS])[0] - reference).square().mean())
        for path in (ours, tmp_path / "r.gguf")
    ]
    assert far[0] < 0.9 * far[1]


def test_some_modules_stay_and_some_have_other_types(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model("llama", **WIDE)
    report = run(
        *(folder, tmp_path / "out", tiny_tokens, "q4_k"),
        exclude=["*.o_proj"],
        override={"*.down_proj": {"ggml": "q6_k"}, "*.v_proj": {"ggml": "Q8_0"}},
        embedding_type="q8_0",
    )
    types = types_of(report.model)
    found = [types[f"blk.0.{role}.weight"] for role in ("attn_q", "attn_v", "attn_output", "ffn_down")]
    assert found == ["Q4_K", "Q8_0", "F16", "Q6_K"]
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q8_0", "Q6_K")
    assert len(report.layers) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ggml": "iq3_xs"}, "GPTQ goes to .*q4_k_m.*`quantkit ggml --type iq3_xs` rounds to it"),
        ({"ggml": "q9_9"}, "ggml=q9_9: GPTQ goes to"),
        ({"ggml": "q5_0", "bits": 4}, "bits=4: Q5_0 has bits 5 of its own; leave bits out"),
        ({"ggml": "q4_k_m", "group_size": 128}, "group_size=128: Q4_K has group_size 32"),
        ({"ggml": "q4_1", "sym": True}, "sym=True: Q4_1 has sym False"),
        ({"ggml": "q4_0", "act_order": "dynamic"}, "act_order=dynamic scatters groups"),
        ({"ggml": "q4_0", "override": {"*.o_proj": {"bits": 8}}}, "takes types, such as"),
        ({"ggml": None, "pre": None, "output_type": "q6_k"}, "output_type=q6_k is for a GGUF file: add ggml"),
        ({"ggml": None, "pre": "gpt-2"}, "pre=gpt-2 is for a GGUF file: add ggml"),
        ({"ggml": None, "pre": None, "override": {"*.o_proj": {"ggml": "q8_0"}}}, "is for runs with ggml"),
        ({"ggml": "q4_0", "embedding_type": "q9"}, "embedding_type=q9: choose"),
        ({"ggml": "q4_0", "pre": None}, "no name for how this tokenizer cuts"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_work(
    options: dict[str, Any], message: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    with pytest.raises(quantkit.QuantkitError, match=message):
        run(make_model("llama"), tmp_path / "out", tiny_tokens, **options)
    assert not (tmp_path / "out").exists()


def test_experts_of_one_tensor_are_treated_alike(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    folder = make_model("qwen3_moe", **CONFIG["qwen3_moe"])
    with pytest.raises(UsageError, match=r"ffn_down_exps.weight holds . modules .* must treat them alike"):
        run(folder, tmp_path / "out", tiny_tokens, "q8_0", exclude=["*.experts.0.down_proj"])


def test_five_bits_from_the_command_line(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is evaluated is the file, and the folder is one that --force replaces."""
    folder = make_model("llama", **WIDE)
    command = ["gptq", str(folder), "--bits", "5", "--ggml", "q5_0", "--pre", "gpt-2", "--out", str(tmp_path / "out")]
    command += ["--samples", "4", "--seq-len", "32", "--device", "cpu", "--json", "--quiet"]
    for options in ([], ["--force", "--no-eval"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert ended.value.code == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["model"] == str(tmp_path / "out" / "tiny-llama-GPTQ-Q5_0.gguf")
    assert [row["model"] for row in first["evaluation"]["results"]] == ["tiny-llama", "tiny-llama-GPTQ-Q5_0"]
    assert second["bits_per_weight"] == 5.5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("quant_log.csv", "quantkit.json", "tiny-llama-GPTQ-Q5_0.gguf")
    ]


def test_a_kept_tensor_that_cannot_be_written_is_found_before_the_work(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder
) -> None:
    """An embedding that float16 cannot hold."""
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", dtype="float32"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] = 1e6
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(quantkit.QuantkitError, match=r"embed_tokens.weight: a value is beyond float16"):
        run(folder, tmp_path / "out", tiny_tokens, "q4_0", embedding_type="f16", progress=recorder)
    assert "quantizing blocks" not in recorder.phases
