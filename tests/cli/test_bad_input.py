"""What a user can get wrong: one clear line, the right exit code, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.folders import contents
from transformers import AutoTokenizer

from quantkit.cli import app as cli
from quantkit.cli import console
from quantkit.containers.hf.write import ShardedWriter
from quantkit.quantize import token_weights
from quantkit.quantize.sharing import Sharing
from quantkit.runs import renames
from quantkit.runs.atomic import write_json
from quantkit.runs.outputs import staged_folder

MakeModel = Callable[..., Path]
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "write a short story about the sea",
    "explain how the tides follow the moon",
)
LAST_LINEAR = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line gave."""

    code: int
    out: str
    lines: list[str]


class Desk:
    """A folder to run commands in, with calibration data and copies of models."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], make_model: MakeModel) -> None:
        self.folder = folder
        self.out = folder / "out"
        self._capsys, self._make_model = capsys, make_model
        self.data = folder / "data.jsonl"
        records = [{"instruction": SENTENCES[i % 3], "output": SENTENCES[(i + 1) % 3] * 3} for i in range(12)]
        self.data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def model(self, family: str = "llama", **changes: Any) -> Path:
        """A tiny model that may be broken."""
        copy = self.folder / "model"
        shutil.copytree(self._make_model(family, **changes), copy)
        return copy

    def run(self, *arguments: str | Path) -> Outcome:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Outcome(int(exit.value.code or 0), captured.out, captured.err.splitlines())

    def gptq(self, model: str | Path, *options: str | Path, quiet: bool = True) -> Outcome:
        return self.run(*self.gptq_arguments(model, *options), *(["--quiet"] if quiet else []))

    def gptq_arguments(self, model: str | Path, *options: str | Path) -> list[str]:
        """Options that come later replace these."""
        usual = ["--out", self.out, "--calibration", self.data, "--samples", "4", "--seq-len", "32", "--no-eval"]
        usual += ["--effort", "fast"]  # nothing is kept before the first block
        return ["gptq", *map(str, [model, *usual, *options])]

    def refused(self, run: Callable[[], Outcome], code: int, *culprits: str) -> list[str]:
        """Run, and check that it ends as every refusal must: the code, one or two lines, nothing written."""
        before = contents(self.folder)
        outcome = run()
        assert contents(self.folder) == before
        assert_one_clear_error(outcome, code, *culprits)
        return outcome.lines


def assert_one_clear_error(outcome: Outcome, code: int, *culprits: str) -> None:
    text = "\n".join(outcome.lines)
    assert outcome.code == code, text
    assert 1 <= len(outcome.lines) <= 2, text
    assert outcome.lines[0].startswith("error: ")
    assert "Traceback" not in text
    assert "--debug shows where" not in text, "an exception that nobody foresaw"
    assert outcome.out == ""
    for culprit in culprits:
        assert culprit in text


@pytest.fixture
def desk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_model: MakeModel
) -> Desk:
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Desk(folder, capsys, make_model)


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# -- the model -----------------------------------------------------------------------------------------------------


def no_config(model: Path) -> list[str]:
    (model / "config.json").unlink()
    return [model.name, "config.json"]


def no_weights(model: Path) -> list[str]:
    (model / "model.safetensors").unlink()
    return [model.name, "no safetensors file"]


def only_gguf_files(model: Path) -> list[str]:
    (model / "config.json").unlink()
    (model / "tiny-Q4_0.gguf").write_bytes(b"GGUF")
    return [model.name, "tiny-Q4_0.gguf"]


def truncated_data(model: Path) -> list[str]:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100)
    return ["model.safetensors", "cut short"]


def truncated_header(model: Path) -> list[str]:
    os.truncate(model / "model.safetensors", 20)
    return ["model.safetensors", "cut short"]


def empty_weights(model: Path) -> list[str]:
    os.truncate(model / "model.safetensors", 0)
    return ["model.safetensors", "cut short"]


def absurd_header_length(model: Path) -> list[str]:
    path = model / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    return ["model.safetensors", "broken"]


def one_tensor_twice(model: Path) -> list[str]:
    name = "model.norm.weight"
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensors.pop(name).clone()}, model / "a.safetensors")
    save_file({name: torch.zeros(64), **tensors}, model / "b.safetensors")
    (model / "model.safetensors").unlink()
    return [name, "a.safetensors", "b.safetensors"]


def one_tensor_in_two_bins(model: Path) -> list[str]:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model-00001-of-00002.bin")
    torch.save({"model.norm.weight": torch.zeros(64)}, model / "pytorch_model-00002-of-00002.bin")
    return ["model.norm.weight", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


def truncated_bin(model: Path) -> list[str]:
    as_bin(model)
    os.truncate(model / "pytorch_model.bin", (model / "pytorch_model.bin").stat().st_size - 100)
    return ["pytorch_model.bin", "cut short"]


def truncated_legacy_bin(model: Path) -> list[str]:
    as_bin(model, _use_new_zipfile_serialization=False)
    os.truncate(model / "pytorch_model.bin", (model / "pytorch_model.bin").stat().st_size - 100)
    return ["pytorch_model.bin", "cut short"]


def bin_is_no_pickle(model: Path) -> list[str]:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return ["pytorch_model.bin"]


def as_bin(model: Path, extra: dict[str, Any] | None = None, **options: Any) -> None:
    """Store a folder's weights in a pickle instead."""
    path = model / "model.safetensors"
    torch.save({**load_file(path), **(extra or {})}, model / "pytorch_model.bin", **options)
    path.unlink()


def other_shape(model: Path) -> list[str]:
    edit_config(model, intermediate_size=128)
    return ["model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[128, 64]"]


def tensor_missing(model: Path) -> list[str]:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    return ["model.layers.1.mlp.up_proj.weight", "missing"]


def head_missing(model: Path) -> list[str]:
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    return ["lm_head.weight", "missing"]


def config_is_no_json(model: Path) -> list[str]:
    (model / "config.json").write_text("{'model_type': llama}")
    return ["config.json", "JSON"]


def config_is_a_list(model: Path) -> list[str]:
    (model / "config.json").write_text("[]")
    return ["config.json", "JSON object"]


def config_without_type(model: Path) -> list[str]:
    (model / "config.json").write_text('{"hidden_size": 64}')
    return ["config.json", "model_type"]


def config_with_nonsense(model: Path) -> list[str]:
    edit_config(model, num_hidden_layers="two")
    return ["config.json"]


def config_asks_for_code(model: Path) -> list[str]:
    leave_code(model, "configuration_own.py")
    edit_config(model, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    return ["config.json", "configuration_own.py", "was not run", "--trust-remote-code"]


def tokenizer_asks_for_code(model: Path) -> list[str]:
    leave_code(model, "tokenization_own.py")
    path = model / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return ["tokenizer_config.json", "tokenization_own.py", "was not run", "--trust-remote-code"]


def leave_code(model: Path, name: str) -> None:
    """Code that leaves a file beside it when it is run."""
    (model / name).write_text("import pathlib\npathlib.Path(__file__).with_name('marker').touch()\n")


def config_of_unknown_type(model: Path) -> list[str]:
    edit_config(model, model_type="frobnicate")
    return ["config.json", "frobnicate"]


def mamba(model: Path) -> list[str]:
    edit_config(model, model_type="mamba", architectures=["MambaForCausalLM"])
    return [model.name, "backbone.embeddings.weight", "missing"]


def bert(model: Path) -> list[str]:
    edit_config(model, model_type="bert", architectures=["BertModel"])
    return [model.name, "bert.embeddings.word_embeddings.weight", "missing"]


def other_quantization(model: Path) -> list[str]:
    edit_config(model, quantization_config={"quant_method": "mxfp4", "bits": 4})
    return [model.name, "mxfp4"]


def quantization_is_no_object(model: Path) -> list[str]:
    edit_config(model, quantization_config="int4")
    return [model.name, "int4"]


def tokenizer_missing(model: Path) -> list[str]:
    for path in model.glob("*token*"):
        path.unlink()
    return [model.name, "has no tokenizer", "tokenizer.json, tokenizer.model, vocab.json"]


def tokenizer_that_transformers_would_make_up(model: Path) -> list[str]:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return [model.name, "has no tokenizer"]


def merges_missing(model: Path) -> list[str]:
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return [model.name, "merges.txt"]


def tokenizer_is_no_json(model: Path) -> list[str]:
    (model / "tokenizer.json").write_text("{")
    return [model.name, "tokenizer"]


def template_raises(model: Path) -> list[str]:
    (model / "chat_template.jinja").write_text("{{ raise_exception('only even turns') }}")
    return ["record #", "only even turns"]


BROKEN_MODELS = [
    no_config,
    no_weights,
    only_gguf_files,
    truncated_data,
    truncated_header,
    empty_weights,
    absurd_header_length,
    one_tensor_twice,
    one_tensor_in_two_bins,
    truncated_bin,
    truncated_legacy_bin,
    bin_is_no_pickle,
    other_shape,
    tensor_missing,
    head_missing,
    config_is_no_json,
    config_is_a_list,
    config_without_type,
    config_with_nonsense,
    config_asks_for_code,
    config_of_unknown_type,
    mamba,
    bert,
    other_quantization,
    quantization_is_no_object,
    tokenizer_asks_for_code,
    tokenizer_missing,
    tokenizer_that_transformers_would_make_up,
    merges_missing,
    tokenizer_is_no_json,
    template_raises,
]


@pytest.mark.parametrize("spoil", BROKEN_MODELS, ids=lambda f: f.__name__)
def test_a_broken_model(desk: Desk, spoil: Callable[[Path], list[str]]) -> None:
    model = desk.model()
    culprits = spoil(model)
    desk.refused(lambda: desk.gptq(model), 1, *culprits)


class Call:
    """What a pickle runs when it is loaded without care: it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("verb", ["gptq", "perplexity", "inspect"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_call_in_a_bin_is_refused_and_not_made(desk: Desk, verb: str, legacy: bool) -> None:
    model = desk.model()
    as_bin(model, {"extra": Call(desk.folder / "marker")}, _use_new_zipfile_serialization=not legacy)
    run = (lambda: desk.gptq(model)) if verb == "gptq" else (lambda: desk.run(verb, model))
    desk.refused(run, 1, "pytorch_model.bin", "holds more than tensors (posix.mkdir)", "Nothing was run")
    assert not (desk.folder / "marker").exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (desk.folder / "marker").exists(), "the file holds no call that could have been made"


def test_an_absurd_header_takes_neither_memory_nor_time(desk: Desk) -> None:
    model = desk.model()
    path = model / "model.safetensors"
    path.write_bytes((6 * 10**9).to_bytes(8, "little"))
    os.truncate(path, 8 * 10**9)  # sparse: it takes no room
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert_one_clear_error(desk.run("inspect", model), 1, "model.safetensors", "broken")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("verb", ["perplexity", "samples", "inspect"])
@pytest.mark.parametrize("spoil", [no_config, config_is_no_json, truncated_data], ids=lambda f: f.__name__)
def test_every_command_refuses_a_broken_model(desk: Desk, verb: str, spoil: Callable[[Path], list[str]]) -> None:
    model = desk.model()
    culprits = spoil(model)
    desk.refused(lambda: desk.run(verb, model), 1, *culprits)


def test_no_such_path(desk: Desk) -> None:
    desk.refused(lambda: desk.gptq(desk.folder / "nowhere"), 2, "nowhere", "no such file or folder")


def shard_missing(model: Path) -> list[str]:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    return [shard.name, "missing"]


def shard_outside(model: Path) -> list[str]:
    shutil.copyfile(sorted(model.glob("*.safetensors"))[0], model.parent / "outside.safetensors")
    edit_index(model, {"model.norm.weight": "../outside.safetensors"})
    return ["model.safetensors.index.json", "../outside.safetensors"]


def shard_at_an_absolute_path(model: Path) -> list[str]:
    outside = shutil.copyfile(sorted(model.glob("*.safetensors"))[0], model.parent / "outside.safetensors")
    edit_index(model, {"model.norm.weight": str(outside)})
    return ["model.safetensors.index.json", "outside the folder", str(outside)]


def shard_in_a_folder(model: Path) -> list[str]:
    (model / "deep").mkdir()
    shutil.copyfile(sorted(model.glob("*.safetensors"))[0], model / "deep" / "a.safetensors")
    edit_index(model, {"model.norm.weight": "deep/a.safetensors"})
    return ["model.safetensors.index.json", "deep/a.safetensors"]


def shard_is_the_parent(model: Path) -> list[str]:
    edit_index(model, {"model.norm.weight": ".."})
    return [".."]


def empty_index(model: Path) -> list[str]:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return ["model.safetensors.index.json", "weight_map"]


def bin_shard_outside(model: Path) -> list[str]:
    torch.save({"a": Call(model.parent / "marker")}, model.parent / "outside.bin")
    return bin_index(model, "../outside.bin")


def bin_shard_at_an_absolute_path(model: Path) -> list[str]:
    torch.save({"a": Call(model.parent / "marker")}, model.parent / "outside.bin")
    return bin_index(model, str(model.parent / "outside.bin"))


def bin_shard_missing(model: Path) -> list[str]:
    return [bin_index(model, "pytorch_model-00002-of-00002.bin")[1], "missing"]


def bin_index(model: Path, other: str) -> list[str]:
    """Store a folder's weights in a pickle whose index names another file too."""
    tensors = {name: value for path in model.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in model.glob("*.safetensors*"):
        path.unlink()
    shard = "pytorch_model-00001-of-00002.bin"
    torch.save(tensors, model / shard)
    weight_map = {**dict.fromkeys(tensors, shard), "model.norm.weight": other}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ["pytorch_model.bin.index.json", other]


def index_promises_too_much(model: Path) -> list[str]:
    shard = sorted(model.glob("*.safetensors"))[0].name
    edit_index(model, {"model.extra.weight": shard})
    return [shard, "model.extra.weight"]


def index_is_no_json(model: Path) -> list[str]:
    (model / "model.safetensors.index.json").write_text("")
    return ["model.safetensors.index.json", "JSON"]


def index_without_map(model: Path) -> list[str]:
    (model / "model.safetensors.index.json").write_text("{}")
    return ["model.safetensors.index.json", "weight_map"]


def index_with_numbers(model: Path) -> list[str]:
    edit_index(model, {"model.norm.weight": 1})
    return ["model.safetensors.index.json", "weight_map"]


def edit_index(model: Path, changes: dict[str, Any]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


SHARD_TROUBLES = [
    shard_missing,
    shard_outside,
    shard_at_an_absolute_path,
    shard_in_a_folder,
    shard_is_the_parent,
    empty_index,
    bin_shard_outside,
    bin_shard_at_an_absolute_path,
    bin_shard_missing,
    index_promises_too_much,
    index_is_no_json,
    index_without_map,
    index_with_numbers,
]


@pytest.mark.parametrize("spoil", SHARD_TROUBLES, ids=lambda f: f.__name__)
def test_broken_shards(desk: Desk, spoil: Callable[[Path], list[str]]) -> None:
    model = desk.model(max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    culprits = spoil(model)
    desk.refused(lambda: desk.gptq(model), 1, *culprits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{LAST_LINEAR}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_found_before_the_work(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    model = desk.model()
    edit_tensor(model, name, lambda tensor: tensor.view(-1)[7:8].fill_(value))
    quantized: list[str] = []
    monkeypatch.setattr(Sharing, "solve", lambda *_: quantized.append("a stage"))
    desk.refused(lambda: desk.gptq(model), 1, name, "NaN or infinity")
    assert not quantized


def test_a_kept_weight_beyond_the_published_dtype_is_found_before_the_work(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = desk.model(dtype="float32")  # is published in float16
    edit_tensor(model, "model.norm.weight", lambda tensor: tensor.fill_(1e6))
    quantized: list[str] = []
    monkeypatch.setattr(Sharing, "solve", lambda *_: quantized.append("a stage"))
    desk.refused(lambda: desk.gptq(model), 1, "model.norm.weight", "float16")
    assert not quantized


def test_an_activation_overflow_names_the_layer(desk: Desk) -> None:
    model = desk.model(dtype="bfloat16")
    edit_tensor(model, "model.layers.1.input_layernorm.weight", lambda tensor: tensor.fill_(1e38))
    desk.refused(lambda: desk.gptq(model), 1, "model.layers.1.self_attn.q_proj", "activation is not finite")


def test_a_scale_overflow_names_the_layer(desk: Desk) -> None:
    model = desk.model(dtype="bfloat16")
    edit_tensor(model, f"{LAST_LINEAR}.weight", lambda tensor: tensor.fill_(1e9))
    desk.refused(lambda: desk.gptq(model), 1, LAST_LINEAR)


def test_ids_beyond_the_vocabulary(desk: Desk) -> None:
    model = desk.model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(model)
    desk.refused(lambda: desk.gptq(model), 1, model.name, "id 320", "only 320 ids")


# -- GGUF files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.999, 0.5, 0.02, 0.001])
def test_a_gguf_file_cut_short(desk: Desk, tiny_gguf: Path, part: float) -> None:
    whole = tiny_gguf.read_bytes()
    path = desk.folder / "cut.gguf"
    path.write_bytes(whole[: max(8, int(part * len(whole)))])
    desk.refused(lambda: desk.gptq(path), 1, "cut.gguf", "cut short")


def test_a_gguf_file_of_another_architecture(desk: Desk) -> None:
    path = desk.folder / "other.gguf"
    writer = gguf.GGUFWriter(path, "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    desk.refused(lambda: desk.gptq(path), 1, "other.gguf", "'bloom'", "docs/ggml.md")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a model at all", b"\x80\x02}q\x00."])
def test_a_file_of_another_kind(desk: Desk, content: bytes) -> None:
    path = desk.folder / "file.bin"
    path.write_bytes(content)
    desk.refused(lambda: desk.gptq(path), 1, "file.bin", "neither a GGUF file nor a folder")


# -- options -------------------------------------------------------------------------------------------------------

WRONG_OPTIONS = [
    (["--bits", "1"], ["--bits 1: give 2, 3, 4 or 8"]),
    (["--bits", "9"], ["--bits 9: give 2, 3, 4 or 8"]),
    (["--bits", "four"], ["--bits four: give a whole number"]),
    (["--bits", "5"], ["--bits 5: a GPTQ", "Q5_0", "Q5_1"]),
    (["--bits", "6"], ["--bits 6: a GPTQ", "Q6_K"]),
    (["--bits", "7"], ["--bits 7: a GPTQ", "Q8_0"]),
    (["--group-size", "0"], ["--group-size 0: give -1"]),
    (["--group-size", "12"], ["--group-size 12: give -1"]),
    (["--group-size", "-2"], ["--group-size -2: give -1"]),
    (["--group-size", "24"], ["--group-size 24", "16, 32, 64, 128"]),
    (["--damp", "0"], ["damp", "0"]),
    (["--damp", "1"], ["damp", "1"]),
    (["--damp", "nan"], ["damp", "nan"]),
    (["--samples", "0"], ["samples", "0"]),
    (["--seq-len", "0"], ["--seq-len 0: give at least 8"]),
    (["--seed", "-1"], ["seed", "-1"]),
    (["--act-order", "yes"], ["--act-order", "yes"]),
    (["--template", "chatml"], ["--template", "chatml"]),
    (["--format", "marlin"], ["--format", "marlin"]),
    (["--dtype", "float64"], ["--dtype", "float64"]),
    (["--dtype", "float16", "--device", "cpu"], ["--dtype float16", "CPU"]),
    (["--device", "nonsense"], ["--device nonsense"]),
    (["--device", "meta"], ["--device meta"]),
    (["--device", "cuda:x"], ["--device cuda:x"]),
    (["--max-shard-size", "big"], ["--max-shard-size big"]),
    (["--max-shard-size", "0"], ["--max-shard-size 0"]),
    (["--max-shard-size", "-5GB"], ["--max-shard-size -5GB"]),
    (["--max-shard-size", "inf"], ["--max-shard-size inf"]),
    (["--max-shard-size", "nan"], ["--max-shard-size nan"]),
    (["--max-shard-size", ""], ["--max-shard-size"]),
    (["--revision", "main"], ["--revision", "local path"]),
    (["--group", "64"], ["--group"]),
    (["second-model"], ["second-model"]),
]


@pytest.mark.parametrize(("options", "culprits"), WRONG_OPTIONS, ids=lambda value: " ".join(value))
def test_a_wrong_option(desk: Desk, options: list[str], culprits: list[str]) -> None:
    model = desk.model()
    desk.refused(lambda: desk.gptq(model, *options), 2, *culprits)


@pytest.mark.parametrize("options", [["--bits", "1"], ["--bits", "5"], ["--device", "nonsense"]], ids=" ".join)
def test_a_dry_run_refuses_the_same(desk: Desk, options: list[str]) -> None:
    model = desk.model()
    desk.refused(lambda: desk.gptq(model, *options, "--dry-run"), 2, options[0].strip("-"), options[1])


def test_a_gpu_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.options.values.has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = desk.model()
    desk.refused(lambda: desk.gptq(model, "--device", "cuda"), 2, "--device cuda", "--device cpu")


def test_a_gpu_number_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.options.values.has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model = desk.model()
    desk.refused(lambda: desk.gptq(model, "--device", "cuda:5"), 2, "--device cuda:5")


def test_a_width_that_cannot_be_packed(desk: Desk) -> None:
    model = desk.model(intermediate_size=80)
    desk.refused(lambda: desk.gptq(model, "--bits", "3"), 2, "mlp.gate_proj is 80 x 64", "multiples of 32")


WRONG_EVALUATIONS = [
    (["--text", "nowhere.txt"], 2, ["nowhere.txt"]),
    (["--text", "wikitext2:nowhere.raw"], 2, ["nowhere.raw"]),
    (["--text", "short.txt"], 1, ["short.txt", "too short"]),
    (["--text", "latin.txt"], 1, ["latin.txt", "UTF-8"]),
    (["--text", "data.jsonl", "--seq-len", "0"], 2, ["--seq-len 0: give at least 8"]),
    (["--text", "data.jsonl", "--seq-len", "32", "--stride", "0"], 2, ["stride", "0"]),
    (["--text", "data.jsonl", "--seq-len", "32", "--stride", "32"], 2, ["stride", "32"]),
]


@pytest.mark.parametrize(("options", "code", "culprits"), WRONG_EVALUATIONS, ids=lambda value: str(value))
def test_a_wrong_evaluation(desk: Desk, options: list[str], code: int, culprits: list[str]) -> None:
    model = desk.model()
    (desk.folder / "short.txt").write_text("too little")
    (desk.folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 400)
    desk.refused(lambda: desk.run("perplexity", model, *options, "--quiet"), code, *culprits)


# -- calibration data ----------------------------------------------------------------------------------------------

GOOD_LINE = '{"instruction": "explain the tides", "output": "they follow the moon"}\n'
WRONG_DATA = [
    ("empty.jsonl", "", ["empty.jsonl", "empty"]),
    ("blank.json", " \n\n", ["blank.json", "empty"]),
    ("none.json", "[]", ["none.json", "no record"]),
    ("short.jsonl", GOOD_LINE, ["short.jsonl", "too short"]),
    ("broken.jsonl", f"{GOOD_LINE}\n{{not json\n", ["broken.jsonl", "line 3", "JSON"]),
    ("broken.json", '[{"instruction": "x",\n "output": }]', ["broken.json", "line 2", "JSON"]),
    ("number.json", "7", ["number.json"]),
    ("strange.jsonl", '{"question": "a", "answer": "b"}\n', ["strange.jsonl", "question, answer", "unknown layout"]),
    ("lists.jsonl", "[1, 2]\n", ["lists.jsonl", "#0"]),
    ("fields.jsonl", '{"instruction": ["a"], "output": "b"}\n', ["fields.jsonl", "'instruction'"]),
    ("fake.parquet", "PAR1 but no more", ["fake.parquet", "parquet"]),
]


@pytest.mark.parametrize(("name", "content", "culprits"), WRONG_DATA, ids=[row[0] for row in WRONG_DATA])
@pytest.mark.parametrize("verb", ["gptq", "samples"])
def test_wrong_calibration_data(desk: Desk, verb: str, name: str, content: str, culprits: list[str]) -> None:
    model = desk.model()
    (desk.folder / name).write_text(content, encoding="utf-8")
    if verb == "gptq":
        desk.refused(lambda: desk.gptq(model, "--calibration", name), 1, *culprits)
    else:
        desk.refused(lambda: desk.run("samples", model, "--calibration", name, "--quiet"), 1, *culprits)


@pytest.mark.parametrize("name", ["nowhere.json", "evol-instruct-7k", "a/b/c/nowhere.jsonl", "model"])
def test_calibration_data_that_is_not_there(desk: Desk, name: str) -> None:
    model = desk.model()
    desk.refused(lambda: desk.gptq(model, "--calibration", name), 2, name)


def test_data_too_short_for_all_windows_is_said(desk: Desk) -> None:
    outcome = desk.gptq(desk.model(), "--samples", "4000")
    assert outcome.code == 0
    assert len(outcome.lines) == 1
    assert outcome.lines[0].startswith("warning: data.jsonl gives ")
    assert "not the 4000 asked for" in outcome.lines[0]


# -- the Hub -------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_network(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(desk.folder / "cache"))
    desk.refused(lambda: desk.gptq("some-owner/some-model"), 1, "some-owner/some-model", "not a local path")


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no route\nat all"), OSError("no route\nat all")], ids=["client", "system"]
)
def test_a_hub_that_cannot_be_reached(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    desk.refused(lambda: desk.gptq("owner/name", "--revision", "v1"), 1, "owner/name", "no route")


def test_a_local_path_never_reaches_for_the_hub(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    desk.refused(lambda: desk.gptq("./nowhere/model"), 2, "./nowhere/model")
    desk.refused(lambda: desk.gptq("../model"), 2, "../model")


# -- the output ----------------------------------------------------------------------------------------------------


def finished(desk: Desk, model: Path) -> dict[str, str]:
    """Quantize into desk.out; what it holds then."""
    assert desk.gptq(model).code == 0
    return contents(desk.out)


def test_an_output_that_exists(desk: Desk) -> None:
    model = desk.model()
    desk.out.mkdir()
    (desk.out / ".hidden").write_text("mine")
    desk.refused(lambda: desk.gptq(model), 2, str(desk.out), "--force")


def test_force_replaces_nothing_that_is_not_ours(desk: Desk) -> None:
    model = desk.model()
    desk.out.mkdir()
    (desk.out / "thesis.txt").write_text("mine")
    desk.refused(lambda: desk.gptq(model, "--force"), 2, str(desk.out), "not an output of quantkit")


def test_an_empty_folder_is_filled(desk: Desk) -> None:
    model = desk.model()
    desk.out.mkdir()
    assert "model.safetensors" in finished(desk, model)


def test_force_replaces_an_output(desk: Desk) -> None:
    model = desk.model()
    before = finished(desk, model)
    (desk.out / "stale.txt").write_text("of the old one")
    assert desk.gptq(model, "--bits", "8", "--force").code == 0
    after = contents(desk.out)
    assert after.keys() == before.keys()
    assert json.loads((desk.out / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert {path.name for path in desk.folder.iterdir()} == {"model", "out", "data.jsonl"}


def test_a_forced_run_that_fails_keeps_the_old_output(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    model = desk.model()
    finished(desk, model)
    fail_on_write(monkeypatch, 9)
    desk.refused(lambda: desk.gptq(model, "--bits", "8", "--force"), 1, str(desk.out), "No space left on device")


@pytest.mark.parametrize("moment", ["old aside", "new in place"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=["^C", "EIO"])
def test_a_replacement_that_is_stopped_keeps_the_old_output(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    model = desk.model()
    finished(desk, model)
    monkeypatch.setattr(renames, "_renameat2", lambda *_: False)  # else there is no moment between the two
    rename = os.rename

    def stopped(old: Path, new: Path) -> None:
        if (old == desk.out) == (moment == "old aside") and desk.out in (old, new):
            monkeypatch.setattr(os, "rename", rename)
            raise error
        rename(old, new)

    monkeypatch.setattr(os, "rename", stopped)
    before = contents(desk.folder)
    outcome = desk.gptq(model, "--bits", "8", "--force")
    assert contents(desk.folder) == before
    assert (outcome.code, len(outcome.lines)) == (1, 1)


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["plain", "force"])
def test_outputs_in_the_way(desk: Desk, options: list[str]) -> None:
    model = desk.model()
    file = desk.folder / "file"
    file.write_text("mine")
    dangling = desk.folder / "dangling"
    dangling.symlink_to(desk.folder / "gone")
    inside = desk.folder / "link"
    inside.symlink_to(model)
    for out, culprit in [
        (file, "is a file"),
        (dangling, "dangling"),
        (model, "is the source itself"),
        (model / "out", "inside the source"),
        (inside / "deep" / "out", "inside the source"),
        (desk.folder, "contains the source"),
        (desk.folder / "x" / "..", "contains the source"),
    ]:
        desk.refused(lambda out=out: desk.gptq(model, *options, "--out", out), 2, culprit)  # type: ignore[misc]


def test_an_output_that_contains_a_gguf_source(desk: Desk, tiny_gguf: Path) -> None:
    (desk.folder / "models").mkdir()
    source = shutil.copyfile(tiny_gguf, desk.folder / "models" / "tiny.gguf")
    desk.refused(lambda: desk.gptq(source, "--out", "models", "--force"), 2, "contains the source")


def test_an_output_below_a_file(desk: Desk) -> None:
    model = desk.model()
    (desk.folder / "file").write_text("mine")
    desk.refused(lambda: desk.gptq(model, "--out", "file/out"), 2, "file/out", "file is no folder")


def test_an_output_where_nobody_may_write(desk: Desk) -> None:
    model = desk.model()
    closed = Path("/proc")  # closed to root too, whom no mode stops
    if os.geteuid() != 0:
        closed = desk.folder / "closed"
        closed.mkdir(mode=0o555)
    desk.refused(lambda: desk.gptq(model, "--out", closed / "out"), 1, str(closed / "out"), "cannot write")


@pytest.mark.parametrize("command", ["gptq {} --dry-run", "convert {}", "merge {} {}", "ggml {}", "imatrix {}"])
def test_an_output_where_nobody_may_write_is_told_before_the_model_is_built(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (desk.folder / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # as for somebody but root
    monkeypatch.setattr("quantkit.blocks.stream.build_on_meta", None)
    words = command.replace("{}", str(desk.model())).split()
    desk.refused(lambda: desk.run(*words, "--out", "closed/new/out"), 1, "cannot write beside", "permission")


def test_a_failed_run_takes_the_folders_back_that_it_made(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    model = desk.model()
    monkeypatch.setattr(Sharing, "solve", disk_full)  # before anything is there to go on from
    desk.refused(lambda: desk.gptq(model, "--out", "new/deep/out"), 1, "new/deep/out")


# -- a disk that fills, an interrupt -------------------------------------------------------------------------------


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the `number`-th tensor that is written meet a full disk."""
    write = ShardedWriter.write
    written: list[str] = []

    def limited(self: ShardedWriter, name: str, *tensors: torch.Tensor) -> None:
        written.append(name)
        if len(written) == number:
            disk_full()
        write(self, name, *tensors)

    monkeypatch.setattr(ShardedWriter, "write", limited)


@pytest.mark.parametrize("number", [1, 20, 60])
def test_a_full_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    model = desk.model()
    fail_on_write(monkeypatch, number)
    desk.refused(lambda: desk.gptq(model), 1, str(desk.out), "No space left on device")


def test_a_disk_that_is_full_when_companions_are_copied(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    model = desk.model()

    def full(source: Path, target: Path) -> None:  # as shutil raises it: the file that is read comes first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    said = (str(desk.out), "No space left on device; nothing was left there")
    desk.refused(lambda: desk.run("convert", model, "--out", desk.out, "--quiet"), 1, *said)


def test_names_that_no_file_can_have(desk: Desk) -> None:
    model, long = desk.model(), "x" * 300
    for arguments in (
        ["inspect", long],
        ["verify", long],
        ["convert", model, "--out", desk.folder / long],
        ["convert", model, "--out", "~nobody-of-this-name/out"],
        ["generate", model, "--prompts", long, "--out", desk.out],
        ["card", model, "--report", long],
        ["release", long],
        ["convert", model, "--out", ""],
    ):
        desk.refused(lambda given=arguments: desk.run(*given), 2, "no file can have this name")
    for arguments in (
        ["convert", model, "--out", desk.folder / ("x" * 250)],  # the folder that is worked in has a longer one
        ["card", model, "--template", long],
        ["perplexity", model, "--text", long],
    ):
        desk.refused(lambda given=arguments: desk.run(*given), 2, "xxxx")


def test_a_json_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quantkit.json"
    write_json(path, {"evaluation": None})
    before = contents(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"evaluation": {"seq_len": 512}})
    assert contents(tmp_path) == before


def test_an_interrupted_folder_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "a" / "out") as folder:
            (folder / "config.json").write_text("{}")
            assert folder == tmp_path / "a" / ".out.unfinished" / "staged"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {}


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def test_a_file_size_limit_stops_like_a_full_disk(desk: Desk) -> None:
    model = desk.model()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    def run() -> Outcome:
        arguments = [*desk.gptq_arguments(model), "--quiet"]
        process = python("-m", "quantkit", *arguments, preexec_fn=limit)
        out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err.splitlines())

    desk.refused(run, 1, str(desk.out), "File too large")


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_control_c_in_the_middle(desk: Desk) -> None:
    model = desk.model(num_hidden_layers=48)  # seconds of work, so that the signal finds it at work
    before = contents(desk.folder)
    # Where the tests themselves run in the background, interrupts are ignored, and children inherit that.
    process = python("-u", "-m", "quantkit", *desk.gptq_arguments(model), preexec_fn=_heed_interrupts)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("capturing"):
            break
    time.sleep(0.1)  # into the blocks
    assert [path.suffix for path in desk.folder.glob(".out.*")] == [".unfinished"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert_interrupted(desk, Outcome(process.returncode, out, err.splitlines()))
    assert contents(desk.folder) == before


def assert_interrupted(desk: Desk, outcome: Outcome) -> None:
    """It says how to go on if and only if there is something to go on from."""
    landed = len(list(desk.folder.glob(".out.unfinished/blocks/*.safetensors")))
    said = rf"interrupted after block {landed} of \d+; go on with: quantkit gptq .* --resume"
    assert (outcome.code, outcome.out, len(outcome.lines)) == (1, "", 1)
    assert re.fullmatch(said if landed else "interrupted; no unfinished output was left", outcome.lines[0])
    assert landed or not list(desk.folder.glob(".out*"))


class Interrupting(console.Bars):
    """Bars that a user interrupts as soon as a phase has made its first step."""

    at = ""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(steps: int) -> None:
            if name == self.at:
                raise KeyboardInterrupt

        yield advance


BEFORE_THE_RENAME = ["calibration text", "checking weights", "capturing", "quantizing blocks", "writing"]


@pytest.mark.parametrize("phase", BEFORE_THE_RENAME)
def test_an_interrupt_leaves_only_what_a_run_can_go_on_from(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    model = desk.model()
    monkeypatch.setattr(Interrupting, "at", phase)
    monkeypatch.setattr(console, "Bars", Interrupting)
    before = contents(desk.folder)
    outcome = desk.gptq(model)
    assert_interrupted(desk, outcome)
    assert contents(desk.folder) == before


def test_an_interrupt_while_tokens_are_weighed_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    model = desk.model()
    monkeypatch.setattr(Interrupting, "at", "weighing tokens")
    monkeypatch.setattr(console, "Bars", Interrupting)
    before = contents(desk.folder)
    assert_interrupted(desk, desk.gptq(model, "--effort", "standard"))
    assert contents(desk.folder) == before


def test_weights_of_tokens_are_kept_when_a_run_is_stopped_before_its_first_block(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = desk.model()
    with monkeypatch.context() as patch:
        patch.setattr(Interrupting, "at", "quantizing blocks")
        patch.setattr(console, "Bars", Interrupting)
        stopped = desk.gptq(model, "--effort", "standard")
    assert stopped.code == 1
    assert "after block 0 of 2; go on with: " in stopped.lines[-1]
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "weigh_tokens", lambda *_: pytest.fail("made again"))
        assert desk.gptq(model, "--effort", "standard", "--resume").code == 0


def test_an_interrupt_while_evaluating_keeps_the_finished_checkpoint(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = desk.model()
    whole = finished(desk, model)
    monkeypatch.setattr(Interrupting, "at", "evaluating")
    monkeypatch.setattr(console, "Bars", Interrupting)
    (desk.folder / "text.txt").write_text(" ".join(SENTENCES) * 40)
    outcome = desk.gptq(model, "--force", "--eval", "--text", "text.txt")
    assert (outcome.code, len(outcome.lines)) == (1, 1)
    after = contents(desk.out)
    assert after == whole
    assert not list(desk.folder.glob(".*"))


def test_an_evaluation_that_fails_says_that_the_checkpoint_is_complete(desk: Desk) -> None:
    model = desk.model()
    (desk.folder / "short.txt").write_text("too little")
    outcome = desk.gptq(model, "--eval", "--text", "short.txt")
    assert_one_clear_error(outcome, 1, "short.txt", "is complete, only its evaluation failed")
    assert json.loads((desk.out / "quantkit.json").read_text())["evaluation"] is None
