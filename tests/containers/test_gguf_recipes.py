"""Which types a recipe gives, in cases worked out by hand; llama-quantize's own are in test_llamacpp_quantize.py."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from quantkit.codes.kinds import SIZES, Kind
from quantkit.containers.gguf import GgufTensor
from quantkit.containers.gguf.recipes import (
    RECIPES,
    Planned,
    base_kind,
    file_type,
    fitting,
    needs_importance,
    recipe_of,
    tensor_kinds,
)

pytestmark = pytest.mark.fast

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ENDS = ("token_embd.weight", "output.weight")


def config(blocks: int = 16, keys: int = 4) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=keys)


def plan(blocks: int = 16, width: int = 256, tied: bool = False, down: int = 512) -> list[GgufTensor]:
    """A Llama's tensors, all as wide but what `ffn_down` reads."""
    tensors = [GgufTensor(name, (name,), (300, width)) for name in ENDS[: 1 if tied else 2]]
    for block in range(blocks):
        tensors.append(GgufTensor(f"blk.{block}.attn_norm.weight", ("norm",), (width,), always_f32=True))
        for part in PARTS:
            shape = (256, down if part == "ffn_down" else width)
            tensors.append(GgufTensor(f"blk.{block}.{part}.weight", (part,), shape))
    return tensors


def kinds(
    name: str, tensors: list[GgufTensor], of: PretrainedConfig | None = None, **options: object
) -> dict[str, str]:
    planned = tensor_kinds(name, tensors, of or config(), "llama", **options)  # type: ignore[arg-type]
    return {tensor.name: found.kind.name for tensor, found in zip(tensors, planned, strict=True)}


def test_q4_k_m_gives_more_bits_to_some_values_and_downs() -> None:
    """Of 16 blocks: the first two, the last two, and every third between."""
    found = kinds("q4_k_m", plan())
    more = {0, 1, 4, 7, 10, 13, 14, 15}
    for block in range(16):
        expected = "Q6_K" if block in more else "Q4_K"
        assert found[f"blk.{block}.attn_v.weight"] == found[f"blk.{block}.ffn_down.weight"] == expected
        assert found[f"blk.{block}.attn_q.weight"] == "Q4_K"
        assert found[f"blk.{block}.attn_norm.weight"] == "F32"
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q4_K", "Q6_K")


def test_an_embedding_that_is_the_output_is_treated_as_one() -> None:
    assert kinds("q4_k_m", plan(tied=True))["token_embd.weight"] == "Q6_K"
    assert kinds("iq2_xs", plan())["token_embd.weight"] == "Q2_K"
    assert kinds("iq2_xs", plan(tied=True))["token_embd.weight"] == "Q5_K"
    assert kinds("q4_k_m", plan(tied=True), output=Kind.Q8_0)["token_embd.weight"] == "Q8_0"
    assert kinds("q4_k_m", plan(tied=True), embedding=Kind.F16, output=Kind.Q8_0)["token_embd.weight"] == "F16"


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "q5_k"])
def test_a_type_that_is_no_file_type_is_one_type(name: str) -> None:
    found = kinds(name, plan())
    assert {kind for tensor, kind in found.items() if tensor not in ENDS and "norm" not in tensor} == {name.upper()}
    assert (found["token_embd.weight"], found["output.weight"]) == (name.upper(), "Q6_K")


def test_values_that_many_heads_share_get_more_bits() -> None:
    assert kinds("q2_k", plan())["blk.5.attn_v.weight"] == "Q3_K"
    assert kinds("q2_k", plan(), config(keys=2))["blk.5.attn_v.weight"] == "Q4_K"


def test_a_matrix_of_importance_spares_bits() -> None:
    assert kinds("iq3_xxs", plan())["blk.5.ffn_down.weight"] == "Q3_K"
    assert kinds("iq3_xxs", plan(), importance=True)["blk.5.ffn_down.weight"] == "IQ3_XXS"
    assert kinds("q4_0", plan())["blk.1.ffn_down.weight"] == "Q4_0"
    assert kinds("q4_0", plan(), importance=True)["blk.1.ffn_down.weight"] == "Q4_1"


def test_eight_experts_get_better_attention() -> None:
    tensors = [GgufTensor(f"blk.0.{part}.weight", (part,), (256, 256)) for part in PARTS[:4]]
    tensors.append(GgufTensor("blk.0.ffn_down_exps.weight", ("down",), (8, 256, 256)))
    of = Qwen3MoeConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, num_experts=8)
    found = [planned.kind.name for planned in tensor_kinds("q4_k_s", tensors, of, "qwen3moe")]
    assert found == ["Q4_K", "Q8_0", "Q8_0", "Q5_K", "Q4_K"]


def test_a_pure_file_is_of_one_type() -> None:
    found = kinds("q4_k_m", plan(), pure=True)
    assert {kind for name, kind in found.items() if "norm" not in name} == {"Q4_K"}


@pytest.mark.parametrize(
    ("wanted", "of_32", "of_8"),
    [
        ("Q4_K", "Q5_0", "F16"),
        ("Q5_K", "Q5_1", "F16"),
        ("Q6_K", "Q8_0", "F16"),
        ("Q3_K", "Q4_0", "F16"),
        ("TQ1_0", "Q4_0", "F16"),
        ("IQ1_S", "IQ4_NL", "F16"),
        ("IQ4_XS", "IQ4_NL", "F16"),
        ("Q2_0", "Q4_0", "F16"),
        ("Q8_0", "Q8_0", "F16"),
        ("F32", "F32", "F32"),
        ("BF16", "BF16", "BF16"),
    ],
)
def test_widths_fall_back_as_in_llama_cpp(wanted: str, of_32: str, of_8: str) -> None:
    kind = Kind[wanted]
    assert [fitting(kind, width).name for width in (512, 288, 264)] == [wanted, of_32, of_8]


def test_what_fell_back_says_what_it_would_be() -> None:
    tensors = plan(blocks=1, down=288)
    planned = dict(
        zip((tensor.name for tensor in tensors), tensor_kinds("q4_k_m", tensors, config(1), "llama"), strict=True)
    )
    assert planned["blk.0.ffn_down.weight"] == Planned(Kind.Q8_0, Kind.Q6_K)
    assert planned["blk.0.attn_q.weight"] == Planned(Kind.Q4_K, Kind.Q4_K)


@given(
    name=st.sampled_from(RECIPES),
    blocks=st.integers(1, 20),
    keys=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(1, 80).map(lambda eighths: 8 * eighths),
    importance=st.booleans(),
    pure=st.booleans(),
    tied=st.booleans(),
)
def test_every_type_fits_its_width(
    name: str, blocks: int, keys: int, width: int, importance: bool, pure: bool, tied: bool
) -> None:
    tensors = plan(blocks, width, tied, down=2 * width)
    found = tensor_kinds(name, tensors, config(blocks, keys), "llama", importance=importance, pure=pure)
    for tensor, planned in zip(tensors, found, strict=True):
        assert tensor.shape[-1] % SIZES[planned.kind][0] == 0
        assert planned.kind == planned.wanted or tensor.shape[-1] % SIZES[planned.wanted][0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_known_by_its_types(name: str) -> None:
    """Or another one is, that gives the same."""
    tensors = plan()
    types = [planned.kind for planned in tensor_kinds(name, tensors, config(), "llama")]
    found = recipe_of(types, tensors, config(), "llama")
    assert found is not None
    assert any(
        types == [planned.kind for planned in tensor_kinds(found, tensors, config(), "llama", importance=weighed)]
        for weighed in (False, True)
    )
    assert file_type(found) == file_type(name)


def test_types_of_no_recipe_are_named_by_the_most_frequent() -> None:
    tensors = plan()
    types = [Kind.F32 if tensor.always_f32 else Kind.Q5_1 for tensor in tensors]
    types[0] = Kind.IQ1_M
    assert recipe_of(types, tensors, config(), "llama") == "q5_1"
    mxfp4 = [Kind.F32 if tensor.always_f32 else Kind.MXFP4 for tensor in tensors]
    assert recipe_of(mxfp4, tensors, config(), "llama") is None


def test_some_types_need_importance() -> None:
    assert needs_importance("iq2_xs", "blk.0.attn_q.weight", Kind.IQ2_XS)
    assert not needs_importance("iq2_xs", "token_embd.weight", Kind.IQ2_XS)
    assert needs_importance("q2_k_s", "blk.0.attn_q.weight", Kind.Q2_K)
    assert not needs_importance("q2_k", "blk.0.attn_q.weight", Kind.Q2_K)
    assert not needs_importance("iq4_xs", "blk.0.attn_q.weight", Kind.IQ4_XS)


def test_every_recipe_has_its_number() -> None:
    assert file_type("q4_k_m") == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert (base_kind("iq2_s"), base_kind("iq2_m"), base_kind("iq3_m")) == (Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_S)
    for name in RECIPES:
        assert (
            file_type(name).name.removeprefix("MOSTLY_").removeprefix("ALL_").startswith(name.upper()[:4].rstrip("_"))
        )
