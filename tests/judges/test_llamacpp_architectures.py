"""Every row of the table of GGUF architectures before llama.cpp: what it computes, and what its converter writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, random_model
from support import zoo_record
from support.architectures import CONFIGS, PARTED, TIED
from support.judge_env import Judge
from support.llamacpp import converter_judge, floored, llama_logprobs, mean_kl, scored_rows
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.containers.gguf.architectures import WRITABLE
from quantkit.containers.gguf.file import GgufFile

TEXT = "the quick brown fox jumps over the lazy dog, and where does the answer to the question begin? " * 12
WINDOW = 32
_F32 = dict.fromkeys(("type", "embedding_type", "output_type"), "f32")

# Keys of the architecture, or of one family's files, that are not the same, by why.
DIFFERENT: dict[str | tuple[str, str], str] = {
    # What llama.cpp's loader finds by itself where the file does not say it.
    **dict.fromkeys(("vocab_size", "attention.key_length", "attention.value_length"), "said here of every model"),
    **dict.fromkeys(("rope.dimension_count", "rope.freq_base", "attention.head_count_kv"), "said here of every model"),
    "rope.scaling.type": "none there, of Cohere and Nemotron",
    ("mistral", "attention.sliding_window"): "no loader asks for it; said here so that it is read back",
    ("olmo3", "attention.sliding_window_pattern"): "left out here where it is the one that the loader takes",
    ("exaone4", "attention.sliding_window_pattern"): "the same",
    **dict.fromkeys(
        (("phi", "feed_forward_length"), ("gpt2", "feed_forward_length")),
        "four times the width there, whatever the config says",
    ),
    ("falcon", "feed_forward_length"): "the same",
    ("falcon", "context_length"): "2048 there, whatever the config says",
    ("granitemoehybrid", "context_length"): "2**20 there, whatever the config says",
    ("deepseek_v2", "expert_weights_norm"): "said here although there is none",
    ("nemotron", "attention.layer_norm_rms_epsilon"): "said there beside the other epsilon, which its norms have",
}
# What the converter asks for and published configs say, but transformers 5 reads as other fields.
AS_PUBLISHED = {
    **{"gpt2": {"n_ctx": 256}, "gpt_neox": {"rotary_pct": 0.5}},
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v2": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid"},
}


# The same of what it reads from the file.
IN_FILE = {"granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]}}


@pytest.fixture(scope="module")
def converter() -> Iterator[Judge]:
    judge = converter_judge()
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, float]]:
    """The largest difference of log-probabilities by model type; becomes the record where that is asked for."""
    found: dict[str, float] = {}
    yield found
    if os.environ.get("QUANTKIT_WRITE_GGUF"):
        zoo_record.write_gguf(found)


def folder_of(family: str, make_model: MakeModel, tmp_path: Path, tied: bool) -> Path:
    """A tiny model; where the name says Phi-3, llama.cpp looks up tokens that the tests' tokenizer does not have."""
    folder = make_model(family, tied=tied, dtype="float32", **CONFIGS[family])
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.mark.judges
@pytest.mark.parametrize(
    ("family", "tied"), [*((family, family in TIED) for family in CONFIGS), *((family, True) for family in PARTED)]
)
def test_llama_cpp_computes_the_model(
    family: str,
    tied: bool,
    measured: dict[str, float],
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    quantkit.ggml(folder_of(family, make_model, tmp_path, tied), tmp_path / "tiny.gguf", pre="gpt-2", **_F32)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids)
    tokens = ids[: 8 * WINDOW].reshape(8, WINDOW)
    theirs = llama_logprobs(tmp_path / "tiny.gguf", TEXT, tokens)
    model = random_model(family, tied=tied, dtype=torch.float32, seed=0, **CONFIGS[family])
    rows = scored_rows(WINDOW)
    with torch.inference_mode():
        ours = floored(model(input_ids=tokens).logits[:, rows.start : rows.stop].log_softmax(-1))
    assert mean_kl(ours, theirs) < 2e-5
    most = float((ours - theirs).abs().max())
    if "gelu" not in WRITABLE[family].activations[0]:  # a table of float16 there
        assert most < 2e-3
    measured[family] = max(float(f"{most:.0e}"), measured.get(family, 0.0))


@pytest.mark.judges
@pytest.mark.parametrize("family", CONFIGS)
def test_llama_cpps_converter_writes_the_same(
    family: str, converter: Judge, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = folder_of(family, make_model, tmp_path, family in TIED)
    quantkit.ggml(folder, tmp_path / "ours.gguf", pre="gpt-2", **_F32)
    out = tmp_path / "theirs.gguf"
    options = ["--no-nextn"] if WRITABLE[family].delta_net else []  # which it asks for else
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IN_FILE.get(family, {})))
    published = AS_PUBLISHED.get(family, {})
    converter.ask("convert", 300, folder=str(folder), out=str(out), config=published, options=options)
    ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(out)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert (ours.tensors[name].shape, ours.tensors[name].kind) == (tensor.shape, tensor.kind), name
        np.testing.assert_array_equal(ours.values(name), theirs.values(name), err_msg=name)
    said, meant = own_keys(ours, family), own_keys(theirs, family)
    other = {key for key in said.keys() | meant.keys() if said.get(key) != meant.get(key)}
    assert {key for key in other if key not in DIFFERENT and (family, key) not in DIFFERENT} == set()


def own_keys(file: GgufFile, family: str) -> dict[str, Any]:
    """A file's keys of the architecture, without its prefix."""
    prefix = f"{WRITABLE[family].name}."
    return {key.removeprefix(prefix): value for key, value in file.keys.items() if key.startswith(prefix)}
