"""Hugging Face folders by how their weights are stored: pytorch_model.bin, and the float types down to 8 bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.streamed import open_stream
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

import quantkit
from quantkit.containers.hf import pickled
from quantkit.containers.hf.fp8 import Fp8Source, dequantize
from quantkit.containers.hf.pickled import PickledFiles
from quantkit.containers.hf.read import open_weights
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.errors import SourceError
from quantkit.options import QuantSpec
from quantkit.quantize.targets import CheckpointTarget
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq.checks import check_finite
from quantkit.verbs.inspect import inspect

Tensors = dict[str, torch.Tensor]


def stored(model: Path) -> Tensors:
    """Every tensor of a folder's safetensors files."""
    return {name: value for path in sorted(model.glob("*.safetensors")) for name, value in load_file(path).items()}


def without_weights(model: Path, folder: Path) -> Path:
    """A copy of a model's folder with config and tokenizer only."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- pytorch_model.bin ---------------------------------------------------------------------------------------------


def save_zip(tensors: Mapping[str, Any], path: Path) -> None:
    torch.save(dict(tensors), path)


def save_legacy(tensors: Mapping[str, Any], path: Path) -> None:
    """The format before torch 1.6."""
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


def save_compressed(tensors: Mapping[str, Any], path: Path) -> None:
    """A zip whose members are deflated, as torch never writes it."""
    torch.save(dict(tensors), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def save_shards(tensors: Mapping[str, Any], path: Path) -> None:
    """Three shards with the names in turn, and their index."""
    names = list(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        torch.save({name: tensors[name] for name in held}, path.parent / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (path.parent / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_wrapped(tensors: Mapping[str, Any], path: Path) -> None:
    torch.save({"state_dict": dict(tensors), "epoch": 3}, path)


def save_parameters(tensors: Mapping[str, Any], path: Path) -> None:
    torch.save({name: torch.nn.Parameter(value) for name, value in tensors.items()}, path)


Save = Callable[[Mapping[str, Any], Path], None]
SAVES: list[Save] = [save_zip, save_legacy, save_shards, save_wrapped, save_parameters]


@pytest.mark.parametrize("save", SAVES, ids=lambda f: f.__name__)
def test_a_bin_folder_gives_what_a_safetensors_folder_gives(make_model: MakeModel, tmp_path: Path, save: Save) -> None:
    model = make_model("llama", dtype="bfloat16")
    folder = without_weights(model, tmp_path / model.name)
    save(stored(model), folder / "pytorch_model.bin")
    wanted, source = open_source(model), open_source(folder)
    assert dict(source.tensors) == dict(wanted.tensors)
    assert (source.kind, source.dtype) == ("hf", torch.bfloat16)
    assert [path.suffix for path in source.weight_files()] == [".bin"] * (3 if save is save_shards else 1)
    for name in wanted.tensors:
        assert torch.equal(source.read(name), wanted.read(name)), name


def test_a_bin_folder_quantizes_to_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    folder = without_weights(model, tmp_path / model.name)
    save_legacy(stored(model), folder / "pytorch_model.bin")
    written = []
    for name, source in (("a", model), ("b", folder)):
        out = tmp_path / name
        quantkit.gptq(source, out, calibration="evol-instruct-sample", samples=2, seq_len=16, evaluate=False)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_safetensors_are_preferred_to_a_bin_beside_them(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert [path.name for path in open_source(folder).weight_files()] == ["model.safetensors"]


def test_a_gptq_checkpoint_in_a_bin_has_the_same_codes(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.gptq(make_model("llama"), out, calibration="evol-instruct-sample", samples=2, seq_len=16, evaluate=False)
    folder = without_weights(out, tmp_path / "bin")
    save_zip(stored(out), folder / "gptq_model-4bit-128g.bin")
    wanted, source = open_source(out), open_source(folder)
    assert source.kind == "gptq"
    for name in wanted.tensors:
        assert torch.equal(source.read(name), wanted.read(name)), name


def test_tied_weights_in_one_storage_are_read_one_by_one(tmp_path: Path) -> None:
    embedding = torch.randn(8, 4)
    save_zip({"embed": embedding, "head": embedding, "part": embedding[2:4], "turned": embedding.T}, tmp_path / "p.bin")
    (tmp_path / "p.bin").rename(tmp_path / "pytorch_model.bin")
    files = PickledFiles(tmp_path)
    files.read("embed").zero_()  # a copy: nobody else sees it
    assert torch.equal(files.read("head"), embedding)
    assert torch.equal(files.read("part"), embedding[2:4])
    assert torch.equal(files.read("turned"), embedding.T)
    assert files.read("turned").is_contiguous()
    assert files.tensors["part"].bytes == 2 * 4 * 4


def test_headers_of_a_mapped_bin_cost_no_memory(tmp_path: Path) -> None:
    size = 256 * 2**20
    torch.save({"a": torch.zeros(size // 4)}, tmp_path / "pytorch_model.bin")
    before = resident_bytes()
    files = PickledFiles(tmp_path)
    assert files.tensors["a"].bytes == size
    assert resident_bytes() - before < size // 8


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_one_legacy_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, shard in enumerate(shards):
        save_legacy({f"t{number}": torch.full((4,), float(number))}, tmp_path / shard)
    held: list[weakref.ref[torch.Tensor]] = []
    load, tensors = pickled._load, pickled._tensors

    def loading(shard: Path) -> Any:
        assert [tensor for tensor in held if tensor() is not None] == [], "two shards would be in memory"
        return load(shard)

    def holding(shard: Path, content: Any) -> Tensors:
        found = tensors(shard, content)
        held.extend(weakref.ref(tensor) for tensor in found.values())
        return found

    monkeypatch.setattr(pickled, "_load", loading)
    monkeypatch.setattr(pickled, "_tensors", holding)
    files = PickledFiles(tmp_path)
    for number in (0, 1, 1, 0):
        assert files.read(f"t{number}").tolist() == [number] * 4
    assert len(held) == 5  # two for the headers; the second read of t1 needed no other


class Call:
    """What a pickle runs when it is loaded without care: it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def a_call(tmp_path: Path) -> Any:
    return {"a": torch.ones(2), "b": Call(tmp_path / "marker")}


def a_call_beside_the_weights(tmp_path: Path) -> Any:
    return {"state_dict": {"a": torch.ones(2)}, "args": Call(tmp_path / "marker")}


def a_list(_: Path) -> Any:
    return [torch.ones(2)]


def a_number(_: Path) -> Any:
    return {"a": torch.ones(2), "step": 5}


def numbered_tensors(_: Path) -> Any:
    return {0: torch.ones(2)}


def a_sparse_tensor(_: Path) -> Any:
    return {"a": torch.ones(2, 2).to_sparse()}


def a_complex_tensor(_: Path) -> Any:
    return {"a": torch.ones(2, dtype=torch.complex64)}


def nothing(_: Path) -> Any:
    return {}


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (a_call, r"holds more than tensors \(posix.mkdir\); refused"),
    (a_call_beside_the_weights, r"holds more than tensors \(posix.mkdir\); refused"),
    (a_list, "holds a list, not tensors by name"),
    (a_number, "'step' is a int, not a tensor"),
    (numbered_tensors, "0 is a Tensor"),
    (a_sparse_tensor, "a is a sparse"),
    (a_complex_tensor, "a is stored as torch.complex64"),
    (nothing, "hold no tensor"),
]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_a_bin_with_anything_but_tensors_is_refused_and_runs_nothing(
    tmp_path: Path, make: Callable[[Path], Any], message: str, legacy: bool
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(make(tmp_path), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SourceError, match=message) as error:
        PickledFiles(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]


@settings(max_examples=40, deadline=None)
@given(legacy=st.booleans(), part=st.floats(0, 0.999), flips=st.lists(st.integers(0, 10**6), max_size=3))
def test_a_damaged_bin_is_one_clear_error_or_still_tensors(
    tmp_path_factory: pytest.TempPathFactory, legacy: bool, part: float, flips: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3, 3)}, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    for place in flips:
        content[place % len(content)] ^= 0xFF
    path.write_bytes(content if flips else content[: int(part * len(content))])
    if not flips:
        with pytest.raises(SourceError, match=r"^[^\n]*pytorch_model\.bin[^\n]*$"):
            PickledFiles(folder)
        return
    with suppress(SourceError):  # a byte among the values does no harm that can be seen
        files = PickledFiles(folder)
        for name in files.tensors:
            files.read(name)


def test_a_bin_that_claims_more_values_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(60000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    claim = (60000).to_bytes(2, "little")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                assert content.count(b"M" + claim) == 2  # the storage's length and the tensor's
                content = content.replace(b"M" + claim, b"\x8a\x06" + (2**40).to_bytes(6, "little"))
            archive.writestr(name, content)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        PickledFiles(tmp_path)


# -- float types ---------------------------------------------------------------------------------------------------

PLAIN = {
    "float64": ("F64", torch.float16),
    "float32": ("F32", torch.float16),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float8_e4m3fn": ("F8_E4M3", torch.float16),
    "float8_e5m2": ("F8_E5M2", torch.float16),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", PLAIN)
def test_weights_of_every_float_type_are_read_exactly(
    make_model: MakeModel, tmp_path: Path, dtype: str, suffix: str
) -> None:
    model = make_model("llama", dtype="float32")
    folder = without_weights(model, tmp_path / "model")
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in stored(model).items()}
    if suffix == "bin":
        save_zip(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    stored_as, published = PLAIN[dtype]
    assert {info.stored_as for info in source.tensors.values()} == {stored_as}
    assert source.dtype == published
    for name, value in tensors.items():
        assert source.tensors[name].bytes == value.nbytes
        assert torch.equal(source.read(name).double(), value.to(torch.float64)), name
    stream = open_stream(folder)
    check_finite(stream, CheckpointTarget(stream, QuantSpec(group_size=32), "gptq", 10**9))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_was_read_can_be_changed_without_changing_the_next_reading(
    make_model: MakeModel, tmp_path: Path, suffix: str
) -> None:
    model = make_model("llama", dtype="float32")
    folder = without_weights(model, tmp_path / "model")
    tensors = stored(model)
    if suffix == "bin":
        save_zip(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    for name, value in tensors.items():
        source.read(name).zero_()
        assert torch.equal(source.read(name), value), name


@given(bits=st.integers(0, 255), dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
def test_float16_holds_every_8_bit_float(bits: int, dtype: torch.dtype) -> None:
    value = torch.tensor([bits], dtype=torch.uint8).view(dtype)
    assert torch.equal(value.half().float(), value.float()) or bool(value.float().isnan())


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.safetensors: a is stored as C64; read are F64, F32"):
        SafetensorsFiles(tmp_path)


# -- transformers' fp8 ---------------------------------------------------------------------------------------------


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats [out, in] and a float32 scale for each block of them, ragged ones at the edges included."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def fp8_folder(model: Path, folder: Path, block: tuple[int, int] = (32, 32), **quantization: Any) -> Path:
    """A model as an fp8 checkpoint: the Linears of its blocks in 8 bits, the rest in bfloat16."""
    without_weights(model, folder)
    tensors: Tensors = {}
    for name, value in stored(model).items():
        if name.endswith("proj.weight"):
            codes, tensors[f"{name}_scale_inv"] = to_fp8(value, block)
            tensors[name] = codes
        else:
            tensors[name] = value.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(folder, quantization_config={**settings, **quantization}, dtype="bfloat16")
    return folder


def test_an_fp8_folder_gives_what_transformers_dequantizes(make_model: MakeModel, tmp_path: Path) -> None:
    folder = fp8_folder(make_model("qwen3", dtype="float32"), tmp_path / "model")
    source = open_source(folder)
    assert isinstance(source, Fp8Source)
    assert (source.kind, source.dtype) == ("hf", torch.bfloat16)
    assert "quantization_config" not in source.config_dict()
    raw = load_file(folder / "model.safetensors")
    assert set(source.tensors) == {name for name in raw if not name.endswith("_scale_inv")}
    quantizer = AutoHfQuantizer.from_config(FineGrainedFP8Config(weight_block_size=(32, 32)))
    reference = Fp8Dequantize(quantizer)
    for name, value in raw.items():
        if name.endswith("proj.weight"):
            parts = {"weight": value, "weight_scale_inv": raw[f"{name}_scale_inv"]}
            assert torch.equal(source.read(name), reference.convert(parts)["weight"]), name
            assert source.tensors[name].bytes == value.nbytes + raw[f"{name}_scale_inv"].nbytes
        elif name in source.tensors:
            assert torch.equal(source.read(name), value), name


def test_an_fp8_folder_is_quantized_to_4_bits(make_model: MakeModel, tmp_path: Path) -> None:
    folder = fp8_folder(make_model("qwen3", dtype="float32"), tmp_path / "model")
    out = tmp_path / "out"
    quantkit.gptq(folder, out, calibration="evol-instruct-sample", samples=4, seq_len=32, bits=8, evaluate=False)
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization_config"]["quant_method"], config["dtype"]) == ("gptq", "bfloat16")
    source, written = open_source(folder), open_source(out)
    name = "model.layers.1.mlp.down_proj.weight"
    assert (source.read(name) - written.read(name)).abs().max() < 0.02 * source.read(name).abs().max()
    assert inspect(out).types == {"GPTQ8": 14, "BF16": 11}


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    seed=st.integers(0, 2**31),
)
def test_blocks_of_any_size_are_scaled_element_by_element(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale = to_fp8(weight, block)
    values = dequantize(codes, scale, block)
    for i in range(rows):
        for j in range(columns):
            assert values[i, j] == codes[i, j].float() * scale[i // block[0], j // block[1]]


def test_one_scale_for_a_whole_weight(make_model: MakeModel, tmp_path: Path) -> None:
    folder = fp8_folder(make_model("llama", dtype="float32"), tmp_path / "model", (96, 96), weight_block_size=None)
    name = "model.layers.0.mlp.up_proj.weight"
    raw = load_file(folder / "model.safetensors")
    raw[f"{name}_scale_inv"] = raw[f"{name}_scale_inv"].reshape(())
    save_file(raw, folder / "model.safetensors")
    assert torch.equal(open_source(folder).read(name), raw[name].float() * raw[f"{name}_scale_inv"])


@pytest.mark.parametrize("as_bytes", [False, True], ids=["F8_E8M0", "U8"])
def test_scales_that_are_powers_of_two(make_model: MakeModel, tmp_path: Path, as_bytes: bool) -> None:
    folder = fp8_folder(make_model("llama", dtype="float32"), tmp_path / "model", scale_fmt="ue8m0")
    name = "model.layers.0.mlp.up_proj.weight"
    raw = load_file(folder / "model.safetensors")
    exponents = torch.arange(120, 126, dtype=torch.uint8).reshape(3, 2)
    raw[f"{name}_scale_inv"] = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    save_file(raw, folder / "model.safetensors")
    values = open_source(folder).read(name)
    assert torch.equal(values[40:64, 40:], raw[name][40:64, 40:].float() * 2.0**-4)  # block (1, 1): 123 - 127


def scale_missing(tensors: Tensors, name: str) -> str:
    del tensors[f"{name}_scale_inv"]
    return f"{name} is stored as F8_E4M3, but {name}_scale_inv is missing"


def scale_of_other_shape(tensors: Tensors, name: str) -> str:
    tensors[f"{name}_scale_inv"] = torch.ones(2, 2)
    return rf"{name}_scale_inv is \[2, 2\], which does not fit blocks of 32 x 32"


def scaled_integers(tensors: Tensors, name: str) -> str:
    tensors[name] = torch.ones(96, 32, dtype=torch.int8)
    return rf"{name} has scales, but is I8 \[96, 32\]"


@pytest.mark.parametrize("spoil", [scale_missing, scale_of_other_shape, scaled_integers], ids=lambda f: f.__name__)
def test_an_fp8_folder_whose_parts_do_not_fit(
    make_model: MakeModel, tmp_path: Path, spoil: Callable[[Tensors, str], str]
) -> None:
    folder = fp8_folder(make_model("llama", dtype="float32"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    message = spoil(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        open_source(folder)


@pytest.mark.parametrize("size", [[32], [0, 32], "32", [32.0, 32]])
def test_a_block_size_that_is_none(make_model: MakeModel, tmp_path: Path, size: Any) -> None:
    folder = fp8_folder(make_model("llama", dtype="float32"), tmp_path / "model", weight_block_size=size)
    with pytest.raises(SourceError, match=r"config\.json"):
        open_source(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "fbgemm_fp8", "", None])
def test_other_quantizations_are_refused_by_name(make_model: MakeModel, tmp_path: Path, method: str | None) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(SourceError, match=f"quantized with {method!r}; full-precision, ") as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_half_of_a_character_in_a_config_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """JSON may escape what no file could hold again."""
    shutil.copytree(make_model("llama"), tmp_path / "half")
    path = tmp_path / "half" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "\ud800"}))
    with pytest.raises(SourceError, match=r"config\.json: not readable as JSON: .*surrogates"):
        open_source(tmp_path / "half")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": ["llama"]}, r"config\.json: model_type is \['llama'\], not a name"),
        ({"model_type": {"a": 1}}, "not a name"),
        ({"max_position_embeddings": -256}, r"context_length would be -256, which no GGUF file holds"),
        ({"max_position_embeddings": 2**40}, "which no GGUF file holds"),
        ({"head_dim": 2**38}, "has shape"),
    ],
)
def test_a_config_of_what_no_model_has(
    change: dict[str, Any], said: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError, match=said):
        quantkit.ggml(folder, out=tmp_path / "m.gguf", pre="gpt-2")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.bin"):
        torch.save({"lr": torch.ones(1)}, tmp_path / name)
    with pytest.raises(SourceError, match=r"no safetensors file, no pytorch_model\.bin"):
        open_weights(tmp_path)


def test_a_bin_file_that_unpacks_to_more_than_it_is_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = without_weights(make_model("llama"), tmp_path / "model")
    save_compressed({"a": torch.zeros(1000, 1000)}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin: .*\.pkl in it is compressed, which torch never does"):
        open_source(folder)
    torch.save({"a": torch.zeros(1).expand(10**12)}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"a has shape \[1000000000000\], of which the file holds a part"):
        open_source(folder)


# -- what lies beside weights ------------------------------------------------------------------------------------------


def test_code_that_comes_with_a_model_goes_with_it(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From reading to verifying, without a question, where code is trusted; no link is followed out of the folder."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    (tmp_path / "secret.py").write_text("key = 1")
    (model / "away.py").symlink_to(tmp_path / "secret.py")
    (model / "other.py").write_text("")
    (model / "helping_own.py").write_text("KIND = 'ownllama'\n")
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nfrom .helping_own import KIND\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = KIND\n"
    )
    (model / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "ownllama", "auto_map": classes | {"AutoTokenizer": ["away.Tokenizer", None]}}
    (model / "config.json").write_text(json.dumps(config))
    quantkit.convert(model, tmp_path / "half", trust_remote_code=True)
    quantkit.gptq(
        *(tmp_path / "half", tmp_path / "out"),
        calibration=tiny_tokens,
        trust_remote_code=True,
        evaluate=False,
        group_size=32,
    )
    for folder in (tmp_path / "half", tmp_path / "out"):
        code = {path.name for path in folder.glob("*.py")}
        assert code == {"configuration_own.py", "helping_own.py", "modeling_own.py"}
        assert quantkit.verify(folder, generate=False, trust_remote_code=True).problems == []
    with pytest.raises(SourceError, match="--trust-remote-code"):
        _ = open_source(tmp_path / "out").config
    (problem,) = quantkit.verify(tmp_path / "out", generate=False).problems
    assert "--trust-remote-code" in problem
    left_out = open_source(model, trust_remote_code=True).left_out
    assert [text.partition(":")[0] for text in left_out] == [str(model / "away.py")]


def test_companions_of_all_kinds_are_copied(make_model: MakeModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    names = ("vocab.txt", "spiece.model", "tekken.json", "qwen.tiktoken", "preprocessor_config.json")
    for name in names:
        (model / name).write_text('{"_name_or_path": "/home/somebody/model", "size": 1}')
    quantkit.convert(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= set(names)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"size": 1}


def test_a_template_that_only_processors_read(make_model: MakeModel, tmp_path: Path) -> None:
    """In chat_template.json; llama.cpp's converter takes it where the tokenizer has none of its own."""
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    for path in model.glob("chat_template*"):
        path.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not open_source(model).tokenizer().chat_template
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    quantkit.convert(model, tmp_path / "out")
    for folder in (model, tmp_path / "out"):
        assert open_source(folder).tokenizer().chat_template == "{{ messages }}"


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_no_model(with_config: bool, make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    if with_config:
        shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(SourceError, match=r"an adapter and no model of its own; merge it .*someone/base"):
        open_source(tmp_path)
    if with_config:
        assert "an adapter and no model of its own" in quantkit.verify(tmp_path, generate=False).problems[0]


def test_an_adapter_beside_a_model_is_left_out_with_a_warning(
    make_model: MakeModel, recorder: Recorder, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors")
    quantkit.convert(model, tmp_path / "out", progress=recorder)
    assert any("adapter" in text for text in recorder.warnings)
    (found,) = quantkit.verify(model, generate=False).models
    assert any("adapter" in text for text in found.notes)
    assert not any("adapter" in text for text in found.problems)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(model / "weights.safetensors"))


@pytest.mark.parametrize(("part", "wanted"), [("qweight", "quantize_config.json"), ("weight_scale_inv", "config.json")])
def test_codes_without_a_label_are_told(part: str, wanted: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    extra = {f"model.layers.0.mlp.up_proj.{part}": torch.ones(2, 2, dtype=torch.int32)}
    save_file({**load_file(model / "model.safetensors"), **extra}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"holds quantized weights \(.*{part}\).*{wanted}"):
        open_source(model)
    assert any("holds quantized weights" in text for text in quantkit.verify(model, generate=False).problems)


@pytest.mark.parametrize(
    ("renamed", "kind", "wanted"),
    [
        ("up_proj.W_q", torch.uint8, "holds quantized weights"),  # HQQ
        ("up_proj.weight._data", torch.int8, "holds quantized weights"),  # Quanto
        ("up_proj.weight", torch.int8, "holds quantized weights"),
        ("up_proj.base_layer.weight", torch.float16, "parts of an adapter.*merge"),  # PEFT, saved unmerged
        ("up_proj.lora_A.default.weight", torch.float16, "parts of an adapter.*merge"),
    ],
)
def test_a_folder_whose_weights_are_something_else_is_told_so(
    renamed: str, kind: torch.dtype, wanted: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """Whole numbers under a weight's name would be quantized as they are; of the others one is not missing."""
    model = Path(shutil.copytree(make_model(), tmp_path / "model"))
    tensors, prefix = load_file(model / "model.safetensors"), "model.layers.0.mlp."
    tensors[prefix + renamed] = tensors.pop(prefix + "up_proj.weight").to(kind)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=wanted):
        open_source(model)
    assert any(re.search(wanted, text) for text in quantkit.verify(model, generate=False).problems)
