"""transformers on GPTQModel's kernels reads whole checkpoints that we quantized, and sees a picture as we do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import token_matrix
from safetensors.torch import save_file
from support import towers
from support.judge_env import GPTQMODEL, Judge, Program
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.blocks.whole import load_model
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("kind", towers.KINDS)
def test_a_quantized_whole_gives_our_logits_on_a_picture(
    kind: str, ask: Callable[[Program], Judge], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    judge = ask(GPTQMODEL)
    model, out = towers.write(tmp_path / "model", kind, tokenizer), tmp_path / "out"
    quantkit.gptq(model, out, calibration=token_matrix(4, 32), device="cpu", evaluate=False, group_size=32)
    picture = towers.picture(kind)
    with torch.inference_mode():
        ours = load_model(open_source(out), torch.device("cpu"), torch.float32)(**picture).logits
    ids = picture.pop("input_ids")
    save_file(picture, tmp_path / "picture.safetensors")
    theirs, _, info = judge.logits(out, ids, beside=str(tmp_path / "picture.safetensors"))
    assert info["quantized_linears"] == 14, info
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.std()))
