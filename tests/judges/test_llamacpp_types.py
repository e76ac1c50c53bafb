"""llama.cpp loads files of every type that quantkit writes, and computes what quantkit's own reader computes of them.

Directly its kernels round activations to 8 bits, which no file can help; `llama-quantize ... F32` takes that away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, random_model, token_matrix
from support.gguf_models import sentencepiece, write_model
from support.llamacpp import floored, llama_kl, llama_logprobs, mean_kl, quantize, scored_rows, to_f32
from support.smollm2 import smollm2_gguf
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.recipes import RECIPES, base_kind

pytestmark = pytest.mark.judges

SENTENCEPIECE = json.loads(
    (Path(__file__).parents[1] / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8")
)["llama"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
FAMILIES = {"llama": WIDE, "qwen2": WIDE, "gemma3_text": {**WIDE, "query_pre_attn_scalar": 64}}
# By GPTQ, so that none of them needs another program to be made.
CALIBRATED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
CALIBRATED += ("q2_0", "iq4_nl", "iq4_xs")
WEIGHED = ("q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs")
# To round a whole model to the others takes ggml minutes each; the tiny models have them all.
QUICK = [name for name in RECIPES if not name.startswith(("iq1", "iq2", "iq3"))]
WINDOW = 256


def divergence(path: Path, tokens: torch.Tensor, scratch: Path, text: str = "") -> tuple[float, float]:
    """Mean KL of llama.cpp from our reader: of the file turned to float32 by llama-quantize, and of the file itself.

    With the text that the tokens are of it is computed here; else by llama.cpp, from ours as 16 bits, which a large
    vocabulary shows at 2e-5.
    """
    rows = scored_rows(tokens.shape[1])
    ours = streamed_logits(open_stream(path), [tokens])[0][:, rows.start : rows.stop].log_softmax(-1)
    files = to_f32(path, scratch / "f32.gguf"), path
    if text:
        first, second = (mean_kl(floored(ours), llama_logprobs(file, text, tokens)) for file in files)
    else:
        first, second = (llama_kl(file, tokens, ours) for file in files)
    return first, second


def is_of(path: Path, recipe: str) -> bool:
    return base_kind(recipe) in {tensor.kind for tensor in GgufFile(path).tensors.values()}


def imatrix_for(model: Path, recipe: str, scratch: Path) -> Path | None:
    """An importance matrix of random tokens, for types that are not written without one."""
    if recipe not in WEIGHED:
        return None
    quantkit.imatrix(model, scratch / "imatrix.gguf", calibration=token_matrix(4, 64))
    return scratch / "imatrix.gguf"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model with a SentencePiece vocabulary, as a float32 GGUF file."""
    made: dict[str, Path] = {}
    kept = {
        key: SENTENCEPIECE[key][: VOCABULARY - 46] + SENTENCEPIECE[key][-46:] for key in ("tokens", "scores", "types")
    }

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("sentencepiece") / f"tiny-{family}.gguf"
            model = random_model(family, tied=family == "gemma3_text", dtype=torch.float32, seed=5, **FAMILIES[family])
            # What rounded activations cost goes with the square of the logits, which chance makes too large.
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(0.25)
            write_model(made[family], model, sentencepiece({**SENTENCEPIECE, **kept}))
        return made[family]

    return make


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_of_tiny_models(
    family: str, recipe: str, sentencepiece_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    source = sentencepiece_model(family)
    if recipe in CALIBRATED:
        tokens = token_matrix(8, 64)
        path = quantkit.gptq(source, tmp_path / "out", ggml=recipe, calibration=tokens, evaluate=False).model
    else:
        quantkit.ggml(source, path, type=recipe, imatrix=imatrix_for(source, recipe, tmp_path))
    assert is_of(path, recipe)
    tokens = token_matrix(2, WINDOW, seed=9).tokens
    tokens[:, 0] = open_stream(path).source.tokenizer().bos_token_id  # llama.cpp puts it there
    as_float, directly = divergence(path, tokens, tmp_path)
    assert as_float < 1e-5
    assert directly < 3e-3  # what its rounded activations cost: 0.0021 at most was seen, of Gemma 3 in Q3_K_M


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, str]:
    """SmolLM2 as a folder, and the first windows of a text."""
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2"
    quantkit.convert(smollm2_gguf(), folder)
    text = (Path(__file__).parents[2] / "calibration" / "README.md").read_text(encoding="utf-8")
    ids = open_stream(folder).source.tokenizer()(text, return_tensors="pt").input_ids[0]
    return folder, ids[: 2 * WINDOW].reshape(2, WINDOW), text


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", QUICK)
def test_every_type_of_smollm2(recipe: str, smollm2: tuple[Path, torch.Tensor, str], tmp_path: Path) -> None:
    """Its large activations lose more than a tiny model's where kernels round them: as much in any file."""
    folder, tokens, text = smollm2
    matrix = imatrix_for(folder, recipe, tmp_path)
    quantkit.ggml(folder, tmp_path / "smol.gguf", type=recipe, imatrix=matrix)
    as_float, directly = divergence(tmp_path / "smol.gguf", tokens, tmp_path, text)
    assert as_float < 1e-5
    # Two bits and ternary values break a model that was not trained with them: then any rounding changes everything.
    assert directly < 8e-3 or recipe in ("q2_0", "tq1_0", "tq2_0")


@pytest.mark.e2e
def test_gptq_of_smollm2_loses_no_more_in_llama_cpps_kernels_than_its_own_files(
    smollm2: tuple[Path, torch.Tensor, str], tmp_path: Path
) -> None:
    folder, tokens, text = smollm2
    ours = quantkit.gptq(folder, tmp_path / "out", ggml="q4_0", samples=4, seq_len=128, evaluate=False).model
    quantkit.ggml(folder, tmp_path / "f32.gguf", type="f32")
    theirs = quantize(tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", "Q8_0")
    as_float, directly = divergence(ours, tokens, tmp_path / "out", text)
    assert as_float < 1e-5
    assert directly < 2 * divergence(theirs, tokens, tmp_path, text)[1]
