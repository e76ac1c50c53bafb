"""Mixtures of experts as GGUF files: the file holds all experts' matrices in one tensor, read expert by expert."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, token_matrix
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.containers.gguf.read import GgufSource
from quantkit.errors import SourceError
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

MOE = {"mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 12, "head_dim": 32}
EXPERT = "model.layers.1.mlp.experts.11"


@pytest.fixture(scope="module")
def folder(make_model: MakeModel) -> Path:
    return make_model("qwen3_moe", dtype="float32", **MOE)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as GGUF, by type."""
    out = tmp_path_factory.mktemp("moe")
    for kind in ("f32", "q8_0"):
        quantkit.ggml(folder, out / f"moe-{kind}.gguf", type=kind, embedding_type=kind, output_type=kind, pre="gpt-2")
    return {kind: out / f"moe-{kind}.gguf" for kind in ("f32", "q8_0")}


def logits(path: Path, tokens: TokenMatrix) -> torch.Tensor:
    return streamed_logits(open_stream(path), [tokens.tokens[:3]])[0]


def test_every_tensor_is_the_originals_under_the_originals_name(folder: Path, files: dict[str, Path]) -> None:
    ours, original = open_source(files["f32"]), open_source(folder)
    assert ours.tensors.keys() == original.tensors.keys()
    assert f"{EXPERT}.down_proj.weight" in ours.tensors
    for name, info in ours.tensors.items():
        assert (info.shape, info.bytes) == (original.tensors[name].shape, original.tensors[name].bytes), name
        assert torch.equal(ours.read(name), original.read(name)), name


def test_config_and_logits_are_the_originals(folder: Path, files: dict[str, Path], tiny_tokens: TokenMatrix) -> None:
    ours, theirs = (open_source(path).config.to_dict() for path in (files["f32"], folder))
    for key in ("dtype", "architectures", "transformers_version", "_name_or_path"):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
    assert ours["norm_topk_prob"] is True
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        whole = expected(input_ids=tiny_tokens.tokens[:3]).logits
    torch.testing.assert_close(logits(files["f32"], tiny_tokens), whole, **forward(whole))


def test_an_expert_is_read_from_its_own_bytes(files: dict[str, Path]) -> None:
    source = open_source(files["q8_0"])
    assert isinstance(source, GgufSource)
    stacks = {tensor.name: tensor for tensor in gguf.GGUFReader(files["q8_0"]).tensors}
    for part, stored in (("gate", "gate"), ("up", "up"), ("down", "down")):
        stack = stacks[f"blk.1.ffn_{stored}_exps.weight"].data
        for expert in range(12):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            kind, rows = source.blocks(name)
            assert (kind.name, source.tensors[name].stored_as) == ("Q8_0", "Q8_0")
            assert np.array_equal(rows, stack[expert])
            assert rows.nbytes == source.tensors[name].bytes
            assert not rows.flags.owndata
            assert np.array_equal(source.read(name).numpy(), gguf.quants.dequantize(stack[expert], kind))


def test_only_the_expert_that_is_asked_for_is_dequantized(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    dequantize = gguf.quants.dequantize

    def counted(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        seen.append(rows.nbytes)
        return dequantize(rows, kind)

    source = open_source(files["q8_0"])
    monkeypatch.setattr(gguf.quants, "dequantize", counted)
    source.read(f"{EXPERT}.up_proj.weight")
    assert seen == [source.tensors[f"{EXPERT}.up_proj.weight"].bytes]


def test_convert_gives_the_folder_back(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    quantkit.convert(files["f32"], tmp_path / "back", dtype="float32")
    back, original = open_source(tmp_path / "back"), open_source(folder)
    assert back.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(back.read(name), original.read(name)) for name in original.tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["norm_topk_prob"]) == ("qwen3_moe", True)
    assert config["num_experts"] == 12  # for readers that know it by its first name
    assert back.config.num_experts == 12


def test_gptq_and_perplexity_run_from_the_file(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "evaluate": False, "device": "cpu", "include": ["model.layers.1.*"]}
    for path, out in ((folder, "hf"), (files["f32"], "gguf")):
        quantkit.gptq(path, tmp_path / out, calibration=token_matrix(3, 32), **options)
    ours, theirs = open_source(tmp_path / "gguf"), open_source(tmp_path / "hf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.tensors[f"{EXPERT}.up_proj.weight"].stored_as.startswith("GPTQ")
    for name in (f"{EXPERT}.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(ours.read(name), theirs.read(name))
    (tmp_path / "text.txt").write_text("the sea was calm and the fox was quick\n" * 40, encoding="utf-8")
    report = quantkit.perplexity([files["f32"]], against=folder, text=str(tmp_path / "text.txt"), device="cpu")
    original, stored = report.results
    assert stored.perplexity == pytest.approx(original.perplexity, rel=1e-5)
    assert stored.kl_divergence is not None
    assert stored.kl_divergence.mean < 1e-9


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("expert_count", 11, r"blk.0.ffn_gate_inp.weight has shape \[12, 64\], but the file's keys ask for \[11, 64\]"),
        ("expert_count", 2**31 - 1, r"ffn_gate_inp.weight has shape \[12, 64\]"),
        ("expert_count", 0, "qwen3moe.expert_count is 0"),
        ("expert_used_count", 13, "13 of 12 experts"),
        ("expert_feed_forward_length", 16, r"ffn_gate_exps.weight has shape \[12, 32, 64\], .* \[12, 16, 64\]"),
    ],
)
def test_experts_that_the_file_has_not_are_named(
    key: str, value: int, said: str, files: dict[str, Path], tmp_path: Path
) -> None:
    name = f"qwen3moe.{key}".encode()
    data = bytearray(files["q8_0"].read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    data[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "changed.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=rf"changed\.gguf: .*{said}"):
        open_source(tmp_path / "changed.gguf")


def test_a_file_that_does_not_say_how_many_experts_it_has_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    data = files["q8_0"].read_bytes().replace(b"qwen3moe.expert_count", b"qwen3moe.expert_other")
    (tmp_path / "changed.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=r"changed\.gguf: key qwen3moe\.expert_count is missing"):
        open_source(tmp_path / "changed.gguf")
