"""vLLM's log-probabilities of what we write, on the CPU in float16, against our reader's in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeModel, token_matrix
from support.judge_env import VLLM, Judge, Program, judge_python
from support.llamacpp import mean_kl
from support.smollm2 import smollm2_checkpoint, smollm2_gguf
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

AskJudge = Callable[[Program], Judge]
IDS = token_matrix(4, 64, seed=5).tokens
FORMATS = ("gptq", "awq", "compressed-tensors")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def folders(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama in full precision, and at 4 bits in every container that vLLM reads, symmetric or not."""
    judge_python(VLLM)
    model, out = make_model(**SIZES), tmp_path_factory.mktemp("vllm")
    for name, sym, formats in (("sym", True, FORMATS), ("asym", False, FORMATS[1:])):
        quantkit.gptq(
            model, out / name, sym=sym, format=formats, group_size=64, calibration=token_matrix(8, 64), evaluate=False
        )
    made = {f"{kind} {name}": out / name / kind for name in ("sym", "asym") for kind in FORMATS}
    return {"full": model, **{case: folder for case, folder in made.items() if folder.exists()}}


def divergence(judge: Judge, folder: Path, ids: torch.Tensor, timeout: float = 300) -> tuple[float, int]:
    """Mean KL divergence of vLLM's predictions from our reader's, and how many of its Linears hold codes."""
    theirs, _, info = judge.logits(folder, ids, timeout)
    ours = torch.log_softmax(streamed_logits(open_stream(folder), [ids])[0], -1)[:, :-1]
    assert theirs.shape == ours.shape
    return mean_kl(ours, theirs), info["quantized"]


@pytest.fixture(scope="module")
def unquantized(ask: AskJudge, folders: dict[str, Path]) -> float:
    """What float16 costs vLLM without codes."""
    found, held = divergence(ask(VLLM), folders["full"], IDS)
    assert held == 0
    return found


@pytest.mark.parametrize("case", [*(f"{kind} sym" for kind in FORMATS), "awq asym", "compressed-tensors asym"])
def test_its_log_probabilities_are_our_readers(
    case: str, ask: AskJudge, folders: dict[str, Path], unquantized: float
) -> None:
    source = open_source(folders[case])
    assert source.codes is not None
    linears = [source.codes.read_codes(name) for name in source.codes.quantized_names()]
    assert any(bool((one.scales < 0).any()) for one in linears) == case.endswith(" sym")
    found, held = divergence(ask(VLLM), folders[case], IDS)
    assert held == 2 * 4  # a block's qkv, o, gate_up and down
    assert found <= 2 * unquantized


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_head_of_codes_is_read(format: str, ask: AskJudge, make_model: MakeModel, tmp_path: Path) -> None:
    options = {"group_size": 64, "calibration": token_matrix(8, 64), "evaluate": False, "effort": "fast"}
    out = quantkit.gptq(make_model(**SIZES), tmp_path / "out", format=format, head=4, **options).out
    assert "lm_head" in open_source(out).codes.quantized_names()
    found, _ = divergence(ask(VLLM), out, IDS)
    assert found < 1e-4  # of a head that is left unread it would be above 1


@pytest.mark.e2e
def test_smollm2s_log_probabilities_are_our_readers(ask: AskJudge, tmp_path: Path) -> None:
    """In groups of 64, which its 576 columns are a multiple of, as they are not of the default's 128."""
    judge = ask(VLLM)
    quantkit.convert(smollm2_gguf(), tmp_path / "full", dtype="float16")
    made = smollm2_checkpoint(tmp_path)
    tokens = open_source(made).tokenizer()("The capital of France is Paris, and the capital of Japan is Tokyo. " * 4)
    ids = torch.tensor([tokens["input_ids"][:48]])
    unquantized, _ = divergence(judge, tmp_path / "full", ids, 600)
    for kind in FORMATS:
        folder = tmp_path / kind
        quantkit.repack(made, to=kind, group_size=64, out=folder)
        found, held = divergence(judge, folder, ids, 600)
        assert held == 30 * 4
        assert found <= 2 * unquantized, kind
