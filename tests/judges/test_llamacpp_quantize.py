"""What `quantkit ggml` makes of full precision, against llama-quantize: types of every tensor, and their bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import MakeModel
from support.imatrix_files import random_imatrix
from support.llamacpp import imatrix, quantize, run, to_f32
from support.smollm2 import smollm2_gguf

import quantkit
from quantkit.codes import libggml
from quantkit.containers.gguf import GgufTensor
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.gguf.recipes import RECIPES, tensor_kinds
from quantkit.containers.imatrix import read_imatrix
from quantkit.sources import open_source

Kind = gguf.GGMLQuantizationType
# Of the same name, but with us no mixtures.
MIXTURES = [name for name in RECIPES if name not in ("q3_k", "q4_k", "q5_k")]
# llama-quantize spends seconds on the grids of the others, whose bytes are compared type by type.
QUICK = [name for name in MIXTURES if not name.startswith(("iq1", "iq2", "iq3"))]
SOME = ("q2_k", "q3_k_m", "q4_k_m", "iq2_m", "iq3_xxs", "iq4_xs", "tq1_0", "q8_0")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa 2": ("llama", {"tied": False}),
    "gqa 4, tied, widths of 32": ("llama", {"num_key_value_heads": 1, "tied": True, "intermediate_size": 352}),
    "no gqa, widths of 8": ("llama", {"num_key_value_heads": 4, "intermediate_size": 264}),
    "narrow embedding": ("llama", {"hidden_size": 160, "head_dim": 40}),
    "8 experts": ("qwen3_moe", {"num_experts": 8}),
    "4 experts": ("qwen3_moe", {"num_experts": 4}),
    "8 experts of Mixtral": ("mixtral", {"num_local_experts": 8}),
    "8 experts and a shared one": (
        "qwen2_moe",
        {
            **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "mlp_only_layers": []},
            "shared_expert_intermediate_size": 512,
        },
    ),
    "4 experts of Granite": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "fused heads": ("gpt_neox", {"num_key_value_heads": None}),
    "gemma3": ("gemma3_text", {"tied": True, "query_pre_attn_scalar": 64}),
    "phi3": ("phi3", {}),
}
ALL_RECIPES = ("gqa 2", "gqa 4, tied, widths of 32", "8 experts")

Made = tuple[Path, Path, Path]
"""A model's folder, its float32 GGUF file, and an importance matrix."""


@pytest.fixture(scope="module")
def made(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    def make(name: str, **config: Any) -> Made:
        family, own = MODELS[name]
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, **own, **config}
        if family == "qwen3_moe":
            sizes |= {"mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 256}
        folder = make_model(family, **sizes)
        out = tmp_path_factory.mktemp("made")
        quantkit.ggml(folder, out / "f32.gguf", type="f32", pre="gpt-2")
        return folder, out / "f32.gguf", random_imatrix(out / "imatrix.gguf", out / "f32.gguf")

    return make


def types_by_llama_quantize(model: Path, recipe: str, *options: str | Path) -> dict[str, str]:
    """What llama-quantize would make of every matrix; names of types in capitals."""
    said = run("llama-quantize", "--dry-run", *options, model, recipe, "1")
    lines = re.findall(r"^\[ *\d+/ *\d+\] +(\S+) +- .*type = +(\S+), size = .*?(?:\((\S+)\))?$", said, re.MULTILINE)
    return {name: (new or old).upper() for name, old, new in lines}


def types_here(model: Path, recipe: str, **options: Any) -> dict[str, str]:
    """What the recipe says of the tensors of a file, from its header alone."""
    source, reader = open_source(model), gguf.GGUFReader(model)
    plan = [
        GgufTensor(
            tensor.name,
            (),
            tuple(map(int, tensor.shape[::-1])),
            always_f32="_norm" in tensor.name or len(tensor.shape) == 1 or "gate_inp" in tensor.name,
        )
        for tensor in reader.tensors
    ]
    architecture = reader.fields["general.architecture"].contents()
    planned = tensor_kinds(recipe, plan, source.config, architecture, **options)
    return {tensor.name: found.kind.name for tensor, found in zip(plan, planned, strict=True)}


@pytest.mark.judges
@pytest.mark.parametrize("name", MODELS)
def test_recipes_have_llama_quantizes_types(name: str, made: Callable[..., Made]) -> None:
    """With 17 blocks an eighth, a sixteenth and every third of them are different ones."""
    _, model, matrix = made(name, num_hidden_layers=17, **({"layer_types": None} if name == "gemma3" else {}))
    for recipe in MIXTURES if name in ALL_RECIPES else SOME:
        asked: list[tuple[list[str | Path], dict[str, Any]]] = [
            ([], {}),
            (["--imatrix", matrix], {"importance": True}),
        ]
        if recipe in SOME:
            asked += [
                (["--pure"], {"pure": True}),
                (["--output-tensor-type", "q5_0"], {"output": Kind.Q5_0}),
                (["--token-embedding-type", "q5_0"], {"embedding": Kind.Q5_0}),
            ]
        for options, own in asked:
            theirs = types_by_llama_quantize(model, recipe, *options)
            assert types_here(model, recipe, **own) == theirs, (recipe, options)


@pytest.mark.judges
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_eighty_blocks_are_a_model_of_70b(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 80}
    sizes["num_attention_heads"], sizes["num_key_value_heads"] = 4, 2
    folder = make_model(family, **{**sizes, **({"head_dim": None} if family == "qwen2" else {})})
    quantkit.ggml(folder, tmp_path / "f32.gguf", type="f32", pre="gpt-2")
    for recipe in ("q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q2_k"):
        assert types_here(tmp_path / "f32.gguf", recipe) == types_by_llama_quantize(tmp_path / "f32.gguf", recipe)


def compare(model: Path, folder: Path, scratch: Path, recipe: str, theirs: list[str], **options: Any) -> None:
    """Both programs' files of a recipe: types and bytes of every tensor, and the file's type."""
    matrix = options.get("imatrix")
    quantize(model, scratch / "theirs.gguf", recipe, *theirs, imatrix=matrix)
    quantkit.ggml(folder, scratch / "ours.gguf", type=recipe, pre="gpt-2", force=True, **options)
    ours, other = (GgufFile(scratch / f"{name}.gguf") for name in ("ours", "theirs"))  # gguf-py does not know Q2_0
    assert set(ours.tensors) == set(other.tensors)
    for name in ours.tensors:
        (kind, packed), (expected, bytes_) = ours.blocks(name), other.blocks(name)
        assert kind == expected, name
        assert packed.tobytes() == bytes_.tobytes(), (name, kind.name)
    weighed = [key for key in other.keys if key.startswith("quantize.imatrix.")]
    if recipe in (
        "f32",
        "f16",
        "bf16",
    ):  # where importance counts for nothing, and llama-quantize names it all the same
        assert not any(key.startswith("quantize.imatrix.") for key in ours.keys)
        weighed = []
    keys = ["general.file_type", *weighed]
    for key in keys:
        if not key.endswith((".file", ".dataset")):  # of those we write the last part of the path
            assert ours.keys[key] == other.keys[key], key


@pytest.mark.judges
@pytest.mark.parametrize("recipe", QUICK)
def test_files_are_llama_quantizes_to_the_byte(recipe: str, made: Callable[..., Made], tmp_path: Path) -> None:
    folder, model, matrix = made("gqa 2")
    if recipe != "q2_k_s":  # which neither program makes without importance
        compare(model, folder, tmp_path, recipe, [])
    compare(model, folder, tmp_path, recipe, [], imatrix=matrix)


@pytest.mark.judges
@pytest.mark.parametrize("name", list(MODELS)[1:])
def test_other_models_are_llama_quantizes_to_the_byte(name: str, made: Callable[..., Made], tmp_path: Path) -> None:
    folder, model, matrix = made(name)
    compare(model, folder, tmp_path, "q4_k_m", [])
    compare(model, folder, tmp_path, "q2_k", [], imatrix=matrix)


@pytest.mark.judges
def test_types_that_are_asked_for_are_llama_quantizes_to_the_byte(made: Callable[..., Made], tmp_path: Path) -> None:
    folder, model, matrix = made("gqa 2")
    compare(model, folder, tmp_path, "q3_k_s", ["--pure"], imatrix=matrix, pure=True)
    theirs = ["--token-embedding-type", "q5_0", "--output-tensor-type", "q4_k"]
    compare(model, folder, tmp_path, "q5_k_m", theirs, embedding_type="q5_0", output_type="q4_k")


@pytest.mark.judges
def test_types_with_grids_are_llama_quantizes_to_the_byte(made: Callable[..., Made], tmp_path: Path) -> None:
    """One run of llama-quantize for all, since each type's grid takes seconds; a tensor each, with importance."""
    _, model, matrix = made("gqa 2")
    kinds = {"attn_q": Kind.IQ1_S, "attn_k": Kind.IQ2_XXS, "attn_output": Kind.IQ2_XS, "ffn_up": Kind.IQ2_S}
    kinds |= {"ffn_gate": Kind.IQ3_XXS, "ffn_down": Kind.IQ3_S}
    options = [part for name, kind in kinds.items() for part in ("--tensor-type", f"{name}={kind.name.lower()}")]
    quantize(model, tmp_path / "theirs.gguf", "Q8_0", *options, imatrix=matrix)
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    weights = read_imatrix(matrix)
    seen = set()
    for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors:
        kind = kinds.get(tensor.name.split(".")[-2])
        found = weights.importance(tensor.name)
        if kind is not None and found is not None:
            assert tensor.tensor_type == kind
            ours = libggml.round_to_blocks(np.array(values[tensor.name]), kind, found[0])
            assert ours.tobytes() == tensor.data.tobytes(), (tensor.name, kind.name)
            seen.add(kind)
    assert seen == set(kinds.values())


@pytest.mark.judges
def test_iq1_m_differs_where_two_ways_to_cut_a_block_are_as_good(made: Callable[..., Made], tmp_path: Path) -> None:
    """ggml 0.20 adds up each way to cut a block for itself, b11434 takes differences of running sums: near ties fall
    otherwise (compiled with the older loop, b11434 gives the older bytes)."""
    _, model, _ = made("gqa 2")
    weights = random_imatrix(tmp_path / "imatrix.gguf", model, zeros=False)  # zeros make exact ties
    quantize(model, tmp_path / "theirs.gguf", "Q8_0", "--tensor-type", "ffn_=iq1_m", imatrix=weights)
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    different = []
    for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors:
        if tensor.tensor_type == Kind.IQ1_M:
            found = read_imatrix(weights).importance(tensor.name)
            assert found is not None
            ours = libggml.round_to_blocks(np.array(values[tensor.name]), Kind.IQ1_M, found[0])
            size = gguf.GGML_QUANT_SIZES[Kind.IQ1_M][1]
            different += list((ours != tensor.data).reshape(-1, size).any(axis=1))
    assert len(different) == 2 * 3 * 512
    assert np.mean(different) < 0.03


@pytest.mark.e2e
@pytest.mark.judges
@pytest.mark.parametrize("recipe", ["q4_k_m", "q4_0"])
def test_smollm2_is_llama_quantizes_to_the_byte(recipe: str, smollm2: Made, tmp_path: Path) -> None:
    """Most of its matrices are 576 wide, so they fall back."""
    model, _, matrix = smollm2
    compare(model, model, tmp_path, recipe, [], imatrix=matrix)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("smollm2")
    model = to_f32(smollm2_gguf(), folder / "f32.gguf")
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")[:6000]
    return model, model, imatrix(model, folder / "imatrix.gguf", text, 256)
