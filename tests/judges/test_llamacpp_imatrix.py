"""Importance matrices against llama.cpp's own: llama-imatrix on the same tokens, and llama-quantize with either."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel
from support.imatrix_files import tiny
from support.llamacpp import imatrix, llama_logprobs, quantize, run
from support.smollm2 import smollm2_gguf

import quantkit
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.imatrix import Entry, read_imatrix, write_imatrix
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

pytestmark = pytest.mark.judges

TEXT = "the quick brown fox jumps over the lazy dog, and where does the answer to the question begin? " * 12
WINDOW = 32


def windows(model: Path, text: str, window: int) -> TokenMatrix:
    """The windows of a text that llama.cpp makes of it too, where the file wants no BOS; a rest is left out."""
    ids = torch.tensor(open_source(model).tokenizer()(text, add_special_tokens=False).input_ids)
    return TokenMatrix.of(ids[: len(ids) // window * window].reshape(-1, window), "the same text")


def both(make_model: MakeModel, case: str, folder: Path) -> tuple[Path, Path, Path]:
    """A float32 GGUF file of a tiny model, our matrix and llama-imatrix's, of the same tokens."""
    model = folder / "f32.gguf"
    # Where the name says Phi-3, llama.cpp looks up tokens that the tests' tokenizer does not have.
    source = shutil.copytree(tiny(make_model, case), folder / "tiny")
    quantkit.ggml(source, model, type="f32", embedding_type="f32", output_type="f32", pre="gpt-2")
    tokens = windows(model, TEXT, WINDOW)
    llama_logprobs(model, TEXT, tokens.tokens)  # an error where llama.cpp makes other tokens of the text
    quantkit.imatrix(model, folder / "ours.gguf", calibration=tokens, device="cpu")
    return model, folder / "ours.gguf", imatrix(model, folder / "theirs.gguf", TEXT, WINDOW)


def matrices(path: Path) -> dict[str, bytes]:
    return {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "gemma3", "phi3"])
def test_sums_and_counts_are_llama_imatrixs(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    _, ours, theirs = both(make_model, case, tmp_path)
    # Gemma's GELU is a table of float16 there.
    assert_same_sums(GgufFile(ours), GgufFile(theirs), 1e-2 if case == "gemma3" else 1e-5)


@pytest.mark.parametrize("case", ["llama", "qwen3moe"])
def test_llama_quantize_finds_an_entry_for_every_matrix_of_the_blocks(
    case: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model, ours, _ = both(make_model, case, tmp_path)
    said = run("llama-quantize", "--imatrix", ours, "--pure", model, tmp_path / "out.gguf", "Q4_0", "1")
    entries = len(read_imatrix(ours).names)
    assert f"have {entries} importance matrix entries" in said
    missed = [line for line in said.splitlines() if "did not find weights for" in line]
    assert all("token_embd.weight" in line or "output.weight" in line for line in missed), missed
    plain = matrices(quantize(model, tmp_path / "plain.gguf", "Q4_0", "--pure"))
    weighted = matrices(tmp_path / "out.gguf")
    assert all(plain[name] != weighted[name] for name in read_imatrix(ours).names)


@pytest.mark.parametrize("case", ["llama", "qwen3moe"])
def test_the_same_numbers_in_our_file_make_the_same_blocks(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    model, ours, theirs = both(make_model, case, tmp_path)
    stored = GgufFile(theirs)
    names = [name.removesuffix(".counts") for name in stored.tensors if name.endswith(".counts")]
    entries = {
        name: Entry(np.atleast_2d(stored.values(f"{name}.in_sum2")), stored.values(f"{name}.counts").reshape(-1, 1))
        for name in names
    }
    write_imatrix(tmp_path / "copied.gguf", entries, ["the same text"], 1, WINDOW, {})
    made = {
        which: matrices(quantize(model, tmp_path / f"{which}-q4.gguf", "Q4_0", "--pure", imatrix=matrix))
        for which, matrix in {"copied": tmp_path / "copied.gguf", "theirs": theirs, "ours": ours}.items()
    }
    assert made["copied"] == made["theirs"]
    # Our sums differ from theirs in the last digits: hardly a block may come out otherwise.
    ours_, theirs_ = (np.frombuffer(b"".join(made[which].values()), np.uint8) for which in ("ours", "theirs"))
    assert (ours_ != theirs_).mean() < 1e-3


@pytest.mark.parametrize("case", ["llama", "qwen3moe"])
def test_the_older_form_says_the_same_as_the_gguf_form(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    model, _, theirs = both(make_model, case, tmp_path)
    old = tmp_path / "old.dat"
    (tmp_path / "text.txt").write_bytes(TEXT.encode() + b"\n")
    run(
        *("llama-imatrix", "-m", model, "-f", tmp_path / "text.txt", "-o", old, "--output-format", "dat", "--no-ppl"),
        *("--ctx-size", str(WINDOW), "--batch-size", str(WINDOW), "--ubatch-size", str(WINDOW), "--threads", "1"),
        *("--no-repack", "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"),
    )
    read, expected = read_imatrix(old), read_imatrix(theirs)
    assert old.read_bytes()[:4] != b"GGUF"
    assert set(read.names) == set(expected.names)
    assert (read.chunks, read.datasets) == (expected.chunks, (str(tmp_path / "text.txt"),))
    for name in expected.names:
        mean = expected.importance(name)
        assert mean is not None
        shape = (*mean.shape[:1], 1, mean.shape[1]) if len(mean) > 1 else mean.shape
        np.testing.assert_allclose(read.importance(name, shape), mean, rtol=1e-6, err_msg=name)


@pytest.mark.e2e
def test_smollm2s_matrix_is_llama_imatrixs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")[:4000]
    model = quantize(smollm2_gguf(), tmp_path / "f32.gguf", "F32", "--allow-requantize")
    tokens = windows(model, text, 256)
    quantkit.imatrix(model, tmp_path / "ours.gguf", calibration=tokens, device="cpu")
    theirs = imatrix(model, tmp_path / "theirs.gguf", text, 256)
    assert_same_sums(GgufFile(tmp_path / "ours.gguf"), GgufFile(theirs))


def assert_same_sums(ours: GgufFile, theirs: GgufFile, within: float = 1e-5) -> None:
    """Equal to float32's rounding; only a router has no entry of ours, for nobody quantizes it."""
    wanted = {name for name in theirs.tensors if name.endswith((".in_sum2", ".counts")) and "ffn_gate_inp" not in name}
    assert ours.tensors.keys() == wanted
    for name in wanted:
        assert ours.tensors[name].shape == theirs.tensors[name].shape, name
        expected: Any = theirs.values(name)
        np.testing.assert_allclose(ours.values(name), expected, rtol=within, atol=1e-6 * expected.max(), err_msg=name)
    assert ours.keys["imatrix.chunk_count"] == theirs.keys["imatrix.chunk_count"]
    assert ours.keys["imatrix.chunk_size"] == theirs.keys["imatrix.chunk_size"]
