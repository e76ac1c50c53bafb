"""Folders that other quantizers wrote (benchmarks/peers/environments.sh makes those), read with 0 weights differing.

Of the files that they become llama.cpp computes the logits that the peers' readers compute of the folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file
from support.judge_env import AUTO_ROUND, GPTQMODEL, LLM_COMPRESSOR, MLX, Judge, Program
from support.llamacpp import llama_kl, scored_rows, to_f32

import quantkit
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

SAMPLES = token_matrix(4, 32, seed=3).tokens
GROUP = 32
NEAR = 2e-5  # mean KL: llama.cpp gets logits as 16 bits, and Q4_1's scale and minimum are float16
Tensors = dict[str, torch.Tensor]


def nibbles(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [n, m] as codes of 4 bits [n, 8 m], along rows."""
    return torch.stack([(words >> (4 * place)) & 15 for place in order], 2).reshape(len(words), -1)


def of_gptq(tensors: Tensors, module: str) -> torch.Tensor:
    """AutoGPTQ's layout: codes along inputs, zeros less one."""
    words, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    group = tensors[f"{module}.g_idx"].long()
    return ((nibbles(words.T).T - (nibbles(zeros) + 1)[group]).float() * scales.float()[group]).T


def of_awq(tensors: Tensors, module: str) -> torch.Tensor:
    """AutoAWQ's layout, GEMM: codes along outputs, out of order."""
    words, zeros, scales = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    codes, group = nibbles(words, order), torch.arange(len(words)) // GROUP
    return ((codes - nibbles(zeros, order)[group]).float() * scales.float()[group]).T


def of_compressed(tensors: Tensors, module: str) -> torch.Tensor:
    """compressed-tensors' pack-quantized: codes along inputs, zeros along outputs."""
    scales, packed = tensors[f"{module}.weight_scale"].float(), tensors[f"{module}.weight_packed"]
    zeros = tensors.get(f"{module}.weight_zero_point")
    middle = torch.full(scales.shape, 8) if zeros is None else nibbles(zeros.T.contiguous()).T
    return (nibbles(packed) - middle.repeat_interleave(GROUP, 1)).float() * scales.repeat_interleave(GROUP, 1)


def logits_by(case: str, ask: Callable[[Program], Judge], folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """By the reader that the peer itself names for its folder, and that runs on a CPU."""
    if case.startswith("llm-compressor"):
        return ask(LLM_COMPRESSOR).logits(folder, tokens)[0]
    if "GPTQ" in case:  # GPTQModel's own loader takes asymmetric ones of no one else
        return ask(GPTQMODEL).logits(folder, tokens, loader="transformers")[0]
    return ask(MLX).logits(folder, tokens)[0]  # of AWQ's layout too


def llamas_divergence(file: Path, peers: torch.Tensor, tokens: torch.Tensor, scratch: Path) -> float:
    """Mean KL of llama.cpp, on the weights that it reads in a file, from a peer's logits."""
    rows = scored_rows(tokens.shape[1])
    ours = peers[:, rows.start : rows.stop].log_softmax(-1)
    return llama_kl(to_f32(file, scratch / "f32.gguf"), tokens, ours)


def asked_of(file: Path) -> torch.Tensor:
    """Token ids [windows, n], each window with the BOS that llama.cpp puts there, if it does."""
    tokens = token_matrix(4, 64, seed=9).tokens.clone()
    first = open_source(file).tokenizer().bos_token_id
    tokens[:, 0] = tokens[:, 0] if first is None else first
    return tokens


ROUND: dict[str, Any] = {"bits": 4, "group_size": GROUP}
PACKED: dict[str, Any] = {"num_bits": 4, "group_size": GROUP, "actorder": "weight"}
CASES: dict[str, tuple[Program, dict[str, Any], str, Callable[[Tensors, str], torch.Tensor]]] = {
    "auto-round GPTQ sym": (AUTO_ROUND, {**ROUND, "sym": True, "format": "auto_gptq"}, "gptq", of_gptq),
    "auto-round GPTQ asym": (AUTO_ROUND, {**ROUND, "sym": False, "format": "auto_gptq"}, "gptq", of_gptq),
    "auto-round AWQ sym": (AUTO_ROUND, {**ROUND, "sym": True, "format": "auto_awq"}, "awq", of_awq),
    "auto-round AWQ asym": (AUTO_ROUND, {**ROUND, "sym": False, "format": "auto_awq"}, "awq", of_awq),
    "llm-compressor sym": (
        *(LLM_COMPRESSOR, {**PACKED, "symmetric": True, "dtype": "float16"}),
        *("compressed-tensors", of_compressed),
    ),
    "llm-compressor asym": (
        *(LLM_COMPRESSOR, {**PACKED, "symmetric": False, "dtype": "bfloat16"}),
        *("compressed-tensors", of_compressed),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_its_weights_are_read_and_go_on_into_a_file(
    case: str, ask: Callable[[Program], Judge], make_model: MakeModel, tmp_path: Path
) -> None:
    program, options, kind, unpacked = CASES[case]
    ask(program).quantize(make_model(), tmp_path / "theirs", SAMPLES, timeout=1000, **options)
    source, tensors = open_source(tmp_path / "theirs"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert (source.kind, source.codes is not None) == (kind, True)
    modules = list(source.codes.quantized_names()) if source.codes is not None else []
    assert len(modules) == 14
    weights = {module: unpacked(tensors, module) for module in modules}
    assert all(torch.equal(source.read(f"{module}.weight"), weight) for module, weight in weights.items())
    made = quantkit.ggml(tmp_path / "theirs", tmp_path / "out.gguf", pre="gpt-2")
    if options.get("sym", options.get("symmetric")):  # Q4_0 holds them; Q4_1 rounds asymmetric minima
        assert made.fidelity["exact"] == len(modules)
        file = open_source(tmp_path / "out.gguf")
        assert all(torch.equal(file.read(f"{module}.weight"), weight) for module, weight in weights.items())
    tokens = asked_of(made.out)
    theirs = logits_by(case, ask, tmp_path / "theirs", tokens)
    assert llamas_divergence(made.out, theirs, tokens, tmp_path) < NEAR


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lm_s_own_folder_goes_on_into_a_file(
    bits: int, ask: Callable[[Program], Judge], make_model: MakeModel, tmp_path: Path
) -> None:
    """Its minima are of no whole zeros, so that its codes are no one's else: Q8_0 rounds what they stand for."""
    ask(MLX).quantize(make_model(), tmp_path / "theirs", SAMPLES, q_bits=bits, q_group_size=GROUP)
    source, weights = open_source(tmp_path / "theirs"), ask(MLX).weights(tmp_path / "theirs")
    assert len(weights) == 16  # embedding and head too
    assert all(torch.equal(source.read(f"{module}.weight"), weight) for module, weight in weights.items())
    made = quantkit.ggml(tmp_path / "theirs", tmp_path / "out.gguf", type="q8_0", requantize=True, pre="gpt-2")
    tokens = asked_of(made.out)
    theirs = ask(MLX).logits(tmp_path / "theirs", tokens)[0]
    assert llamas_divergence(made.out, theirs, tokens, tmp_path) < 1e-3
