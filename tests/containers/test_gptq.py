"""The GPTQ container: what is in the folder, who can read it, and that the same run gives the same bytes."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from safetensors import safe_open
from safetensors.torch import save_file
from support.streamed import open_writer
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import get_checkpoint_shard_files

import quantkit
from quantkit.blocks.budget import Budget
from quantkit.blocks.families import FAMILIES as FAMILIES_TABLE
from quantkit.blocks.stream import ModelStream
from quantkit.codes import LinearPlan, QuantizedLinear, contiguous_groups
from quantkit.containers.gptq.read import GptqSource
from quantkit.containers.gptq.write import check
from quantkit.containers.hf.write import ShardedWriter
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.options import QuantSpec
from quantkit.quantize.blockwise import quantize_blocks
from quantkit.quantize.targets import plan_linears
from quantkit.runs.tensorfile import TensorPlan
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

pytestmark = pytest.mark.fast

LINEARS = [name for stage in FAMILIES_TABLE["llama"].stages or () for name in stage]
OPTIONS: dict[str, Any] = {"device": "cpu", "evaluate": False, "effort": "fast"}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, by safetensors' own reader."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


def codes_of(folder: Path, tokens: torch.Tensor, spec: QuantSpec) -> dict[str, QuantizedLinear]:
    """The codes that a run on the CPU makes, never written."""
    codes: dict[str, QuantizedLinear] = {}
    stream = ModelStream(open_source(folder), torch.device("cpu"), torch.float32)
    quantize_blocks(
        stream, tokens, plan_linears(stream, spec), lambda name, linear, _: codes.update({name: linear}), Budget(10**12)
    )
    return codes


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def same(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    parts = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros), (one.group, other.group))
    return one.bits == other.bits and all(torch.equal(a, b) for a, b in parts)


CASES = [
    # family, bits, group size (64 and 128 leave short groups of 96 and 64), sym, act-order, format
    ("llama", 4, 128, True, "static", "gptq"),
    ("llama", 4, 64, True, "static", "gptq_v2"),
    ("llama", 4, 32, False, "dynamic", "gptq"),
    ("mistral", 2, 64, False, "off", "gptq"),
    ("qwen2", 2, 16, True, "dynamic", "gptq_v2"),
    ("qwen2", 3, 64, False, "static", "gptq"),
    ("qwen3", 3, -1, True, "off", "gptq_v2"),
    ("llama", 8, 64, False, "dynamic", "gptq_v2"),
    ("qwen2", 8, -1, True, "static", "gptq"),
]


@pytest.mark.parametrize(("family", "bits", "group_size", "sym", "act_order", "checkpoint_format"), CASES)
def test_folder_holds_the_codes_in_the_layout(
    family: str,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: str,
    checkpoint_format: str,
    make_model: MakeModel,
    tiny_tokens: TokenMatrix,
    tmp_path: Path,
) -> None:
    source, out = make_model(family), tmp_path / "out"
    recipe = {"bits": bits, "group_size": group_size, "sym": sym, "act_order": act_order}
    quantkit.gptq(source, out, **recipe, format=checkpoint_format, calibration=tiny_tokens, **OPTIONS)
    expected = codes_of(source, tiny_tokens.tokens, QuantSpec(**recipe))
    tensors, original, reader = stored_tensors(out), stored_tensors(source), GptqSource(out)

    names = set()
    for name, tensor in original.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in expected:
            names.add(name)  # embeddings, norms, head and biases: untouched
            assert tensors[name].dtype == torch.float16
            assert torch.equal(tensors[name], tensor)
            continue
        rows, columns = tensor.shape
        size = columns if group_size == -1 else group_size
        groups = -(-columns // size)
        layout = {
            "qweight": (torch.int32, (columns * bits // 32, rows)),
            "qzeros": (torch.int32, (groups, rows * bits // 32)),
            "scales": (torch.float16, (groups, rows)),
            "g_idx": (torch.int32, (columns,)),
        }
        for part, (dtype, shape) in layout.items():
            names.add(f"{module}.{part}")
            assert (tensors[f"{module}.{part}"].dtype, tuple(tensors[f"{module}.{part}"].shape)) == (dtype, shape)
        assert same(reader.read_codes(module), expected[module])
        assert torch.equal(reader.read(name), expected[module].dequantize())
        counts = tensors[f"{module}.g_idx"].bincount().tolist()
        assert counts == [min(size, columns - start) for start in range(0, columns, size)]
        if act_order != "dynamic":
            assert tensors[f"{module}.g_idx"].tolist() == [i // size for i in range(columns)]
        if sym and bits != 3:
            word = {("gptq", 2): 0x55, ("gptq", 4): 0x77, ("gptq", 8): 0x7F}
            word |= {("gptq_v2", 2): 0xAA, ("gptq_v2", 4): 0x88, ("gptq_v2", 8): 0x80}
            zeros = tensors[f"{module}.qzeros"].contiguous().view(torch.uint8)
            assert set(zeros.flatten().tolist()) == {word[checkpoint_format, bits]}
    assert set(tensors) == names
    assert set(reader.quantized_names()) == set(expected)
    if family == "qwen2":
        assert float(tensors["model.layers.0.self_attn.q_proj.bias"].abs().max()) > 0
    if act_order == "dynamic":
        assert any(linear.group.diff().lt(0).any() for linear in expected.values())

    quantization = read_json(out / "config.json")["quantization_config"]
    assert read_json(out / "quantize_config.json") == quantization
    assert quantization == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": act_order == "dynamic",
        "static_groups": act_order == "static",
        "true_sequential": True,
        "damp_percent": 0.1,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "modules_in_block_to_quantize": [list(stage) for stage in FAMILIES_TABLE[family].stages or ()],
        "meta": {"quantizer": [f"quantkit:{quantkit.__version__}"]},
    }


@pytest.fixture(scope="module")
def written(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit checkpoint of make_model("llama")."""
    out = tmp_path_factory.mktemp("written") / "tiny-llama-GPTQ"
    quantkit.gptq(make_model("llama"), out, group_size=32, calibration=tiny_tokens, **OPTIONS)
    return out


def test_files_of_the_folder(written: Path, make_model: MakeModel) -> None:
    assert {path.name for path in written.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quant_log.csv",
        "quantize_config.json",
        "quantkit.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    # Readable as any folder is: mkdtemp alone would leave it to its owner.
    assert written.stat().st_mode & 0o777 == 0o755


def test_config_is_the_sources_and_readable_by_older_transformers(written: Path, make_model: MakeModel) -> None:
    config, original = read_json(written / "config.json"), read_json(make_model("llama") / "config.json")
    assert config["rope_theta"] == original["rope_parameters"]["rope_theta"]
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    for key, value in original.items():
        if key not in ("_name_or_path", "dtype"):
            assert config[key] == value, key


@pytest.mark.parametrize(("dtype", "published"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F16")])
def test_other_tensors_have_the_publishing_dtype(
    dtype: str, published: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    quantkit.gptq(make_model("qwen2", dtype=dtype), tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    source = GptqSource(tmp_path / "out")
    kept = {
        info.stored_as
        for name, info in source.stored.tensors.items()
        if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert kept == {published}
    assert source.stored.tensors["model.layers.0.mlp.up_proj.scales"].stored_as == "F16"
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == {"F16": "float16", "BF16": "bfloat16"}[published]


@pytest.mark.parametrize("limit", [2000, 60_000])
def test_shards_and_their_index(
    limit: int, written: Path, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantkit.gptq(
        make_model("llama"), out, group_size=32, calibration=tiny_tokens, max_shard_size=limit, **OPTIONS
    )
    index = read_json(out / "model.safetensors.index.json")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = 0
    for shard in shards:
        with safe_open(out / shard, framework="pt") as opened:
            names = list(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert {index["weight_map"][name] for name in names} == {shard}
        assert sum(sizes) <= limit or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total == report.bytes
    assert not (out / "model.safetensors").exists()

    files, metadata = get_checkpoint_shard_files(str(out), str(out / "model.safetensors.index.json"))
    assert sorted(Path(file).name for file in files) == shards
    whole = stored_tensors(written)
    assert sorted(metadata["all_checkpoint_keys"]) == sorted(whole)
    parts = stored_tensors(out)
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_shards_are_read_as_one_file_is(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    """A sharded source gives the same checkpoint as the same model in one file."""
    one, many = make_model("llama"), make_model("llama", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    for name, folder in (("one", one), ("many", many)):
        quantkit.gptq(folder, tmp_path / name, calibration=tiny_tokens, **OPTIONS)
    first, second = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_embeddings_stay_tied(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    for tied in (True, False):
        out = tmp_path / str(tied)
        quantkit.gptq(make_model("qwen2", tied=tied), out, calibration=tiny_tokens, **OPTIONS)
        assert ("lm_head.weight" in stored_tensors(out)) is not tied
        assert read_json(out / "config.json")["tie_word_embeddings"] is tied


def test_tokenizer_gives_the_sources_ids(written: Path, make_model: MakeModel) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(written), AutoTokenizer.from_pretrained(make_model("llama"))
    text = "<|im_start|>user\nwhat is the answer?<|im_end|>\n  Größe, 東京"
    assert ours(text).input_ids == theirs(text).input_ids
    messages = [{"role": "user", "content": "the fox"}]
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<pad>")


def test_gguf_source_gives_a_whole_folder(tiny_gguf: Path, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.gptq(tiny_gguf, out, group_size=32, calibration=tiny_tokens, **OPTIONS)
    text = "<|im_start|>user\nwhat is the answer?<|im_end|>\n"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == open_source(tiny_gguf).tokenizer()(text).input_ids
    assert AutoTokenizer.from_pretrained(out).chat_template == open_source(tiny_gguf).tokenizer().chat_template
    config = read_json(out / "config.json")
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert read_json(out / "quantkit.json")["source"]["kind"] == "gguf"
    assert "rope_theta" in config
    check_no_paths(out, [str(tiny_gguf.parent), str(tmp_path)])


LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "config", "keys"),
    [
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE},
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        ),
        ("gemma3_text", {}, {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}),
        ("gpt_neox", {}, {"rotary_emb_base": 10000.0, "rotary_pct": 0.5, "rope_theta": 10000.0}),
    ],
)
def test_rotary_settings_stand_where_transformers_4_looks_for_them(
    family: str,
    config: dict[str, Any],
    keys: dict[str, Any],
    make_model: MakeModel,
    tiny_tokens: TokenMatrix,
    tmp_path: Path,
) -> None:
    folder = make_model(family, **config)
    quantkit.gptq(folder, tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    written = read_json(tmp_path / "out" / "config.json")
    assert {key: written.get(key) for key in keys} == keys
    both = [AutoConfig.from_pretrained(path).rope_parameters for path in (folder, tmp_path / "out")]
    assert both[0] == both[1]


def check_no_paths(folder: Path, paths: Sequence[str]) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        for local in paths:
            assert local.encode() not in content, (path.name, local)
            assert json.dumps(local)[1:-1].encode() not in content, (path.name, local)


def test_no_local_path_anywhere(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    source = tmp_path / "a source" / "model"
    shutil.copytree(make_model("llama"), source)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = read_json(source / name) | {key: str(source)}
        (source / name).write_text(json.dumps(content), encoding="utf-8")
    out = tmp_path / "b output" / "model"
    quantkit.gptq(source, out, calibration=tiny_tokens, **OPTIONS)
    check_no_paths(out, [str(tmp_path), "a source", "b output", str(Path.home()) + "/"])


def test_equal_runs_give_equal_bytes(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    first = make_model("qwen2")
    second = tmp_path / "elsewhere" / first.name
    shutil.copytree(first, second)
    options = {**OPTIONS, "group_size": 64, "sym": False, "calibration": tiny_tokens, "max_shard_size": "100KB"}
    quantkit.gptq(first, tmp_path / "one", **options)
    torch.rand(3)  # the global generator's state decides nothing
    quantkit.gptq(second, tmp_path / "two", **options)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_equal_runs_from_a_gguf_give_equal_bytes(tiny_gguf: Path, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantkit.gptq(tiny_gguf, tmp_path / name, group_size=32, calibration=tiny_tokens, **OPTIONS)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_another_recipe_gives_other_weights(
    written: Path, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """Else the test of equal bytes would pass on a writer that ignores its input."""
    quantkit.gptq(make_model("llama"), tmp_path / "out", group_size=32, damp=0.5, calibration=tiny_tokens, **OPTIONS)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != (written / "model.safetensors").read_bytes()


def test_record_of_the_run(written: Path, make_model: MakeModel, tiny_tokens: TokenMatrix) -> None:
    record = read_json(written / "quantkit.json")
    assert record["recipe"] == {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "act_order": "static",
        "damp": 0.1,
        "include": [],
        "exclude": [],
        "overrides": [],
        "format": "gptq",
    }
    weights = make_model("llama") / "model.safetensors"
    assert record["source"] == {
        "model": "tiny-llama",
        "precision": "float16",
        "kind": "hf",
        "sha256": {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()},
    }
    assert record["calibration"] == tiny_tokens.provenance.model_dump(mode="json")
    assert set(record["versions"]) == {"quantkit", "torch", "transformers", "python"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["evaluation"] is None
    names = [f"model.layers.{block}.{linear}" for block in range(2) for linear in LINEARS]
    assert [layer["name"] for layer in record["layers"]] == names
    with (written / "quant_log.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["layer"] for row in table] == names
    for row, layer in zip(table, record["layers"], strict=True):
        assert 0 < layer["loss"] < layer["rtn_loss"]
        assert float(row["loss"]) == pytest.approx(layer["loss"], rel=1e-5)
        assert float(row["loss_over_rtn"]) == pytest.approx(layer["loss"] / layer["rtn_loss"], rel=1e-5)


def test_reported_sizes_are_those_on_disk(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    report = quantkit.gptq(make_model("qwen2"), tmp_path / "out", calibration=tiny_tokens, **OPTIONS)
    tensors = stored_tensors(tmp_path / "out")
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    parts = [t for n, t in tensors.items() if n.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    weights = sum(t.numel() * 8 for n, t in tensors.items() if n.endswith(".qweight"))
    assert report.bits_per_weight == pytest.approx(8 * sum(t.nbytes for t in parts) / weights)


def older(folder: Path, out: Path, drop: str = "", **changes: Any) -> Path:
    """A copy of a checkpoint without the tensors that end with `drop`, its quantization where it stood before 2024."""
    shutil.copytree(folder, out)
    tensors = {n: t for n, t in stored_tensors(folder).items() if not (drop and n.endswith(drop))}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = read_json(out / "config.json")
    quantization = {**config.pop("quantization_config"), **changes}
    for key in ("quant_method", "checkpoint_format"):
        quantization.pop(key)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "quantize_config.json").write_text(json.dumps(quantization), encoding="utf-8")
    return out


def test_a_checkpoint_of_2023_is_read(written: Path, tmp_path: Path) -> None:
    """Its quantization in quantize_config.json only, a name of its own, and no g_idx, which the codes do not need."""
    source = open_source(written)
    assert isinstance(source, GptqSource)
    folder = older(written, tmp_path / "old", drop=".g_idx")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    found = open_source(folder)
    assert isinstance(found, GptqSource)
    for module in found.quantized_names():
        assert torch.equal(found.read(f"{module}.weight"), source.read(f"{module}.weight"))


def test_without_g_idx_act_order_cannot_be_read(written: Path, tmp_path: Path) -> None:
    found = open_source(older(written, tmp_path / "old", drop=".g_idx", desc_act=True))
    with pytest.raises(SourceError, match=r"q_proj has no g_idx"):
        found.read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_v1_field_of_all_ones_is_a_zero_of_zero(
    bits: int, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """AutoGPTQ masks the sum; its packing of a group without negative weights makes such fields."""
    quantkit.gptq(make_model("llama"), tmp_path / "out", bits=bits, calibration=tiny_tokens, **OPTIONS)
    tensors = stored_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.qzeros"][0, 0] = -1
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path / "out")
    assert isinstance(source, GptqSource)
    zeros = source.read_codes(name).zeros
    assert (zeros[: 32 // bits, 0] == 0).all()
    assert (zeros[32 // bits :] == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodels_borrowed_zeros_are_read_as_it_reads_them(
    bits: int, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """It subtracts one from every field of a word at once: a zero of 0 borrows from the field above."""
    folder = tmp_path / "out"
    quantkit.gptq(make_model("llama"), folder, bits=bits, calibration=tiny_tokens, **OPTIONS)
    name, per_word = "model.layers.0.self_attn.q_proj", 32 // bits
    tensors = stored_tensors(folder)
    zeros = torch.arange(64 * tensors[f"{name}.scales"].shape[0]).reshape(-1, 64) % 2**bits
    zeros[:, ::3] = 0
    shifts = (torch.arange(per_word) * bits)[None, None]
    words = (zeros.reshape(zeros.shape[0], -1, per_word) << shifts).sum(-1)
    borrowed = (words - sum(1 << shift for shift in range(0, 32, bits))) & 0xFFFFFFFF
    tensors[f"{name}.qzeros"] = torch.where(borrowed >= 2**31, borrowed - 2**32, borrowed).int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = open_source(folder)
    assert isinstance(source, GptqSource)
    assert torch.equal(source.read_zeros(name).long(), zeros.T)


def test_scales_of_more_than_float16_are_read_but_codes_are_not_taken(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "wide")
    tensors = stored_tensors(written)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.scales"] = tensors[f"{name}.scales"].float() * (1 + 2**-15)
    save_file(tensors, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    source, before = open_source(tmp_path / "wide"), open_source(written)
    assert isinstance(source, GptqSource)
    wide, narrow = (found.read(f"{name}.weight") for found in (source, before))
    torch.testing.assert_close(wide, narrow * (1 + 2**-15), rtol=1e-6, atol=0)
    for take in (source.read_codes, source.read_scales):
        with pytest.raises(SourceError, match="hold more than float16"):
            take(name)


def test_a_group_that_there_is_not_is_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "damaged")
    tensors = stored_tensors(written)
    name = "model.layers.0.self_attn.q_proj"
    groups = len(tensors[f"{name}.scales"])
    tensors[f"{name}.g_idx"] = torch.zeros(64, dtype=torch.int32)
    for wrong in (groups, -1):
        tensors[f"{name}.g_idx"][3] = wrong
        save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
        source = open_source(tmp_path / "damaged")
        with pytest.raises(SourceError, match=f"q_proj.g_idx names groups beyond its {groups}"):
            source.read(f"{name}.weight")


@pytest.mark.parametrize("meta", ["gptqmodel", ["gptqmodel:7.7"], {"quantizer": 7}, {"quantizer": {"a": 1}}])
def test_a_label_of_another_shape_tells_no_writer(written: Path, tmp_path: Path, meta: Any) -> None:
    shutil.copytree(written, tmp_path / "other")
    config = read_json(written / "config.json")
    config["quantization_config"]["meta"] = meta
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert open_source(tmp_path / "other").read(name).shape == open_source(written).read(name).shape


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "cut")
    source = open_source(tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot read .*: the file has become shorter"):
        all(source.read(name).numel() for name in source.tensors)
    path.unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot read .*: .*No such file"):
        source.read("model.norm.weight")


def test_a_gptq_folder_can_be_quantized_again(written: Path, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    source = open_source(written)
    assert isinstance(source, GptqSource)
    module = "model.layers.1.mlp.down_proj"
    assert torch.equal(source.read(f"{module}.weight"), source.read_codes(module).dequantize())
    quantkit.gptq(written, tmp_path / "out", bits=8, group_size=32, calibration=tiny_tokens, requantize=True, **OPTIONS)
    again = open_source(tmp_path / "out")
    assert (again.bits(module), again.quantization["bits"]) == (8, 8)
    assert read_json(tmp_path / "out" / "quantkit.json")["source"]["kind"] == "gptq"
    error = again.read(f"{module}.weight") - source.read(f"{module}.weight")
    assert float(error.norm() / source.read(f"{module}.weight").norm()) < 0.02


# -- the writers themselves ------------------------------------------------------------------------------------------

PLAN = [
    TensorPlan("a", torch.float16, (2, 3)),
    TensorPlan("b", torch.int32, (4,)),
    TensorPlan("c", torch.uint8, (0, 5)),
]
TENSORS = {
    "a": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b": torch.tensor([1, -2, 3, -(2**31)], dtype=torch.int32),
    "c": torch.empty(0, 5, dtype=torch.uint8),
}


@pytest.mark.parametrize("limit", [1, 14, 10**6])
@pytest.mark.parametrize("order", ["abc", "cba"])
def test_sharded_writer_in_any_order(limit: int, order: str, tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN, limit)
    for name in order:
        writer.write(name, TENSORS[name] if name != "a" else TENSORS["a"].T.contiguous().T)  # strided too
    writer.finish()
    tensors = stored_tensors(tmp_path)
    assert {name: (t.dtype, t.tolist()) for name, t in tensors.items()} == {
        name: (t.dtype, t.tolist()) for name, t in TENSORS.items()
    }
    assert (tmp_path / "model.safetensors.index.json").exists() is (limit < 10**6)


def test_sharded_writer_refuses_misuse(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN, 10**6)
    with pytest.raises(KeyError):
        writer.write("d", TENSORS["a"])
    writer.write("a", TENSORS["a"])
    with pytest.raises(KeyError):
        writer.write("a", TENSORS["a"])
    with pytest.raises(OutputError, match="2 planned tensors were not written, such as b"):
        writer.finish()
    with pytest.raises(AssertionError):
        writer.write("b", TENSORS["b"].long())
    writer.close()


@pytest.mark.parametrize("tensor", [TENSORS["a"].float(), TENSORS["a"].T, TENSORS["a"][:1]])
def test_sharded_writer_refuses_another_tensor_than_planned(tensor: torch.Tensor, tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, PLAN, 10**6)
    with pytest.raises(AssertionError):
        writer.write("a", tensor)
    writer.close()


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_disk_that_changes_a_bit_is_noticed(part: str, make_model: MakeModel, tmp_path: Path) -> None:
    writer, plan = open_writer(tmp_path, make_model("llama"), QuantSpec(group_size=32))
    with writer:
        for module, (rows, columns) in ((name, linear.shape) for name, linear in plan.items()):
            zeros = torch.full((rows, columns // 32), 8, dtype=torch.uint8)
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
            scales = torch.ones(zeros.shape, dtype=torch.float16)
            writer.add_linear(module, QuantizedLinear(codes, scales, zeros, contiguous_groups(columns, 32), 4))
        writer.add_others()
        writer._tensors.close()
        path = tmp_path / "model.safetensors"
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        at = 8 + length + header[f"model.layers.0.mlp.up_proj.{part}"]["data_offsets"][0]
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(
            OutputError, match=rf"^model\.safetensors: model\.layers\.0\.mlp\.up_proj\.{part}: .*read back"
        ):
            writer.finish()


@pytest.mark.parametrize(
    ("recipe", "shape", "message"),
    [
        ({"bits": 5}, (64, 64), "--bits 5.*Q5_0"),
        ({"bits": 6}, (64, 64), "--bits 6.*Q6_K"),
        ({"bits": 7}, (64, 64), "--bits 7.*Q8_0"),
        ({"group_size": 8}, (64, 64), "--group-size 8"),
        ({"group_size": 48}, (64, 64), "--group-size 48"),
        ({"bits": 3}, (64, 80), "down_proj is 64 x 80: 3-bit packing needs multiples of 32"),
        ({"bits": 2}, (72, 64), "down_proj is 72 x 64: 2-bit packing needs multiples of 16"),
        ({"bits": 4}, (64, 68), "multiples of 8"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(recipe: dict[str, Any], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check({"down_proj": LinearPlan(shape, QuantSpec(**recipe))})


def test_what_the_layout_holds_is_accepted() -> None:
    for bits in (2, 3, 4, 8):
        for group_size in (-1, 16, 32, 64, 128, 1024):
            check({"down_proj": LinearPlan((64, 96), QuantSpec(bits=bits, group_size=group_size))})
