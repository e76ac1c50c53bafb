"""`quantkit verify`: what it finds in damaged models, that it finds all of it, and nothing in sound ones."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.ggjt_models import LLAMA, tiny
from support.gguf_models import sentencepiece, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.cli import app as cli
from quantkit.codes.packing import pack, unpack
from quantkit.containers.hf.header import examine_header
from quantkit.errors import SourceError, UsageError
from quantkit.runs.links import is_foreign
from quantkit.tokens import TokenMatrix
from quantkit.verbs.verify import Verified, verify
from quantkit.verbs.verify.companions import check_strings
from quantkit.verbs.verify.findings import Findings
from quantkit.verbs.verify.programs import Linear, tensor_parallel
from quantkit.verbs.verify.stored import check_weights

Edit = Callable[[dict[str, Any]], None]
Q = "model.layers.0.self_attn.q_proj"
SMALL: dict[str, Any] = {"device": "cpu", "evaluate": False, "group_size": 32}


def problems(path: Path, generate: bool = False) -> list[str]:
    return verify(path, generate=generate, device="cpu").problems


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder's only weight file."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def forget(folder: Path) -> Path:
    """Without what quantkit noted, as another program's folder."""
    for name in ("quantkit.json", "SHA256SUMS"):
        (folder / name).unlink(missing_ok=True)
    return folder


def only(found: list[str], *parts: str) -> None:
    """One problem, which says all of `parts`."""
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0], found[0]


@pytest.fixture(scope="module")
def made(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """made(model options, **gptq options) -> a checkpoint, made once for the same ones."""
    folders: dict[str, Path] = {}

    def make(model: dict[str, Any] | None = None, **options: Any) -> Path:
        key = repr((model, sorted(options.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made") / "checkpoint"
            quantkit.gptq(make_model(**(model or {})), folders[key], calibration=tiny_tokens, **{**SMALL, **options})
        return folders[key]

    return make


@pytest.fixture
def checkpoint(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A 4-bit checkpoint in one file, to be damaged."""
    return Path(shutil.copytree(made(), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(made: Callable[..., Path], tmp_path: Path) -> Path:
    """The same in several shards."""
    return Path(shutil.copytree(made(max_shard_size="60KB"), tmp_path / "sharded"))


@pytest.fixture
def spm(tmp_path: Path) -> Path:
    """A Llama with a SentencePiece vocabulary, as GGUF."""
    write_model(tmp_path / "spm.gguf", tiny(), sentencepiece(LLAMA))
    return tmp_path / "spm.gguf"


# -- sound models ----------------------------------------------------------------------------------------------------

CLEAN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"max_shard_size": "60KB"}),
    ({"tied": True}, {"format": "gptq_v2"}),
    ({"tied": True}, {"untie": True}),
    ({}, {"sym": False}),
    ({}, {"sym": False, "format": "gptq_v2", "act_order": "dynamic"}),
    ({}, {"bits": 3, "group_size": -1, "sym": False}),
    ({}, {"bits": 8, "group_size": 64, "act_order": "dynamic"}),
    ({}, {"bits": 2, "override": {"*.down_proj": {"bits": 8}}, "exclude": ["*.k_proj"]}),
    ({}, {"override": {"*.up_proj": {"sym": False}}}),
    ({"family": "gpt2"}, {}),
    ({"family": "mixtral"}, {}),
    ({"family": "gemma3_text", "dtype": "bfloat16", "tied": True}, {}),
]


@pytest.mark.parametrize(("model", "options"), CLEAN)
def test_a_checkpoint_that_quantkit_wrote(
    model: dict[str, Any], options: dict[str, Any], made: Callable[..., Path]
) -> None:
    report = verify(made(model, **options), device="cpu")
    assert report.problems == []
    (found,) = report.models
    assert found.kind == "gptq"
    assert found.sentence is not None
    assert found.sentence.startswith("The capital of France is")


def test_what_is_named_as_quantized_linears_and_stays_is_labelled(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    """A vision tower's Linears, those of layers beyond the last, and of a module beside the blocks."""
    model = shutil.copytree(make_model(), tmp_path / "model")
    more = {
        f"{place}.{name}.weight": torch.ones(64, 64)
        for place in ("vision_tower.layers.0", "vision_tower.layers.1", "model.layers.2", "mtp")
        for name in ("self_attn.q_proj", "other.q_proj")
    }
    edit_tensors(model, lambda tensors: tensors.update(more))
    quantkit.gptq(model, tmp_path / "out", calibration=tiny_tokens, override={"*.q_proj": {"bits": 8}}, **SMALL)
    assert problems(tmp_path / "out") == []
    label = json.loads((tmp_path / "out" / "quantize_config.json").read_text(encoding="utf-8"))
    *rules, _ = label["dynamic"]
    assert sorted(rules) == [r"-:^model\.layers\.2\.", r"-:^mtp\.", r"-:^vision_tower\."]


def test_zeros_that_vary_are_told_by_each_linears_own_label(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made(override={"*.up_proj": {"sym": False}}), tmp_path / "checkpoint")
    for name in ("config.json", "quantize_config.json"):
        edit_json(folder / name, lambda content: content.get("quantization_config", content).pop("dynamic"))
    only(problems(forget(folder)), "up_proj", "zeros vary", "set sym to false")


@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_folders_of_the_other_verbs(
    shards: str, make_model: MakeModel, made: Callable[..., Path], tmp_path: Path
) -> None:
    base, tuned = make_model("llama"), make_model("llama", seed=1)
    quantkit.convert(made(), tmp_path / "converted", max_shard_size=shards)
    quantkit.diff(base, tuned, tmp_path / "delta", max_shard_size=shards)
    quantkit.merge(base, tmp_path / "delta", tmp_path / "merged", max_shard_size=shards)
    for name in ("converted", "delta", "merged"):
        report = verify(tmp_path / name, device="cpu")
        assert report.problems == [], name
        assert not any("no checksums" in note for note in report.models[0].notes)
        assert (report.models[0].sentence is None) == (name == "delta")


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "falcon", "phi3", "mixtral", "gpt2"])
def test_folders_that_transformers_wrote(family: str, make_model: MakeModel) -> None:
    assert problems(make_model(family, tied=family == "falcon")) == []


def test_files_for_llama_cpp(made: Callable[..., Path], spm: Path, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    quantkit.ggml(made(), folder / "codes.gguf", pre="smollm")
    quantkit.ggml(spm, folder / "whole.gguf", type="q8_0")
    quantkit.ggml(spm, folder / "parts.gguf", type="f16", split_max_size="60KB")
    quantkit.ggml(spm, folder / "old.ggjt.bin", type="q5_1", container="ggjt")
    report = verify(folder, device="cpu")
    assert report.problems == []
    assert [(model.name.split("-0")[0], model.kind) for model in report.models] == [
        ("codes.gguf", "gguf"),
        ("old.ggjt.bin", "ggjt"),
        ("parts", "gguf"),
        ("whole.gguf", "gguf"),
    ]
    answers = {model.name.split("-0")[0]: {load.program: load.ok for load in model.loads} for model in report.models}
    assert all(answers[name]["llama.cpp"] for name in ("codes.gguf", "parts", "whole.gguf"))
    assert [answers[name]["ctransformers"] for name in answers] == [False, True, False, True]
    assert [answers[name]["transformers"] for name in answers] == [True, False, False, True]


def test_a_folder_of_a_gguf_run(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {key: value for key, value in SMALL.items() if key != "group_size"}
    report = quantkit.gptq(make_model("llama"), out, ggml="q4_0", pre="smollm", calibration=tiny_tokens, **options)
    assert problems(out, generate=True) == []
    data = bytearray(report.model.read_bytes())
    data[-3] ^= 1
    report.model.write_bytes(bytes(data))
    for path in (out, report.model):
        only(problems(path), report.model.name, "SHA-256", "quantkit.json")


# -- headers ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_header_shows(checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint / "model.safetensors"
    with safe_open(source, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())[:3]}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    sound = examine_header(path)
    assert sound.problems == ()
    assert sound.entries.keys() == tensors.keys()
    for bit in range(length * 8):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(spoiled))
        found = Findings(tmp_path)
        table = check_weights(tmp_path, found)
        # A bit of a tensor's name makes another sound name, which the model has no place for.
        assert found.problems or table.entries.keys() != tensors.keys(), (bit, spoiled[:length])


def test_tensors_that_share_a_place(tmp_path: Path) -> None:
    """One tensor twice and nothing of another: every entry alone is sound, and so is the size of the file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(4, 4), "c": torch.ones(4, 4)}, path, {"format": "pt"})
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"data_offsets":[64,128]', b'"data_offsets":[000,64]'.replace(b"000", b"  0")))
    (text,) = examine_header(path).problems
    assert "begins at byte" in text


def test_a_key_twice_in_a_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, path, {"format": "pt"})
    path.write_bytes(path.read_bytes().replace(b'"b":', b'"a":'))
    assert "its header has 'a' twice" in examine_header(path).problems[0]


def spoil_header(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Change a header's text and its length, not the data behind it."""
    raw = path.read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    text = edit(raw[8:stop])
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[stop:])


@pytest.mark.parametrize(
    "edit",
    [lambda text: b" \n\t" + text, lambda text: text.replace(b'"dtype":', b'"crc":[1,{}],"dtype":')],
    ids=["white space before it", "one more key in every entry"],
)
def test_headers_that_safetensors_reads_are_sound(
    edit: Callable[[bytes], bytes], make_model: MakeModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    spoil_header(folder / "model.safetensors", edit)
    assert problems(folder) == []


def test_a_type_that_is_not_read_is_no_damage(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.update(phase=torch.ones(4, dtype=torch.complex64)))
    (model,) = verify(folder, generate=False, device="cpu").models
    assert model.problems == ()
    assert "values stored as C64 are not looked at: phase" in model.notes


def test_an_offset_of_minus_zero_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    spoil_header(folder / "model.safetensors", lambda text: text.replace(b'"data_offsets":[0,', b'"data_offsets":[-0,'))
    assert any("place [-0.0, " in text for text in problems(folder))
    with pytest.raises(SourceError, match=r"place \[-0\.0, "):
        quantkit.convert(folder, tmp_path / "converted")


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 30, 60, 61, 77, 100, 124, 150, 199, 256, 300, 411])
def test_a_flipped_bit_in_a_shards_header(at: int, sharded: Path) -> None:
    path = sorted(forget(sharded).glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 7
    path.write_bytes(bytes(data))
    found = problems(sharded)
    assert any(path.name in text or "index.json" in text for text in found), found


def test_a_flipped_bit_of_the_weights_shows_against_the_record(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    only(problems(checkpoint), "model.safetensors", "SHA-256", "quantkit.json")


def test_a_file_cut_short(checkpoint: Path) -> None:
    path = forget(checkpoint) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = problems(checkpoint, generate=True)
    assert any("its tensors end at" in text for text in found), found


@pytest.mark.parametrize("seed", range(40))
def test_damage_of_any_kind_is_reported_and_nothing_is_raised(seed: int, checkpoint: Path, spm: Path) -> None:
    """Bytes changed, cut off or doubled in a file of the folder, or in a file for llama.cpp."""
    chance = random.Random(seed)
    recorded = [path for path in sorted(checkpoint.iterdir()) if path.name != "quantkit.json"]
    path = chance.choice([*recorded, checkpoint / "model.safetensors"])
    for target in (path, spm):
        before = target.read_bytes()
        data = bytearray(before)
        at = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 2000))
        kind = chance.choice(("byte", "bytes", "cut", "double"))
        if kind == "byte":
            data[at] ^= chance.randrange(1, 256)
        elif kind == "bytes":
            data[at : at + 8] = chance.randbytes(8)
        else:
            data[at:] = b"" if kind == "cut" else data[at:] * 2
        target.write_bytes(bytes(data))
    assert any(path.name in text for text in problems(checkpoint, generate=True))
    problems(spm, generate=True)
    problems(forget(checkpoint), generate=True)


def test_an_empty_file_and_no_file(checkpoint: Path) -> None:
    path = forget(checkpoint) / "model.safetensors"
    path.write_bytes(b"")
    assert any("its header would be 0 bytes of a file of 0" in text for text in problems(checkpoint))
    path.unlink()
    assert any("no weights here" in text for text in problems(checkpoint, generate=True))


# -- shards and index ------------------------------------------------------------------------------------------------


def test_a_missing_shard(sharded: Path) -> None:
    path = sorted(forget(sharded).glob("*.safetensors"))[1]
    path.unlink()
    only(problems(sharded, generate=True), f"shard {path.name} is missing, with", "download it")


def test_an_index_that_is_missing(sharded: Path) -> None:
    (forget(sharded) / "model.safetensors.index.json").unlink()
    count = len(list(sharded.glob("*.safetensors")))
    only(problems(sharded), f"model.safetensors.index.json is missing beside {count} shards")


def test_a_shard_that_the_index_does_not_name(sharded: Path) -> None:
    first = sorted(forget(sharded).glob("*.safetensors"))[0]
    shutil.copy(first, sharded / "model-00009-of-00009.safetensors")
    only(problems(sharded), "model-00009-of-00009.safetensors is not in model.safetensors.index.json")


def _move(index: dict[str, Any]) -> None:
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]


INDEX: list[tuple[Edit, str]] = [
    (lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + 2), "total_size is"),
    (lambda index: index["metadata"].clear(), "has no total_size that is a number"),
    (_move, "puts model.norm.weight into model-00001-of-"),
    (lambda index: index["weight_map"].pop("model.norm.weight"), "does not list model.norm.weight"),
    (
        lambda index: index["weight_map"].update(other=index["weight_map"]["lm_head.weight"]),
        "lists what no shard holds: other",
    ),
    (lambda index: index.update(weight_map=[1]), "has no weight_map"),
]


@pytest.mark.parametrize(("edit", "says"), INDEX)
def test_an_index_that_disagrees(edit: Edit, says: str, sharded: Path) -> None:
    edit_json(forget(sharded) / "model.safetensors.index.json", edit)
    only(problems(sharded), "model.safetensors.index.json", says)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = sorted(forget(sharded).glob("*.safetensors"))[:2]
    with safe_open(one, framework="pt") as first, safe_open(two, framework="pt") as second:
        name = next(iter(first.keys()))
        tensors = {key: second.get_tensor(key) for key in second.keys()} | {name: first.get_tensor(name)}  # noqa: SIM118
    save_file(tensors, two, {"format": "pt"})
    assert any(f"{two.name}: {name} is also in {one.name}" in text for text in problems(sharded))


# -- labels and codes ------------------------------------------------------------------------------------------------


def relabel(folder: Path, **changes: Any) -> Path:
    forget(folder)
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(changes))
    edit_json(folder / "quantize_config.json", lambda config: config.update(changes))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_symmetric_file_of_one_version_labelled_as_the_other(
    bits: int, written: str, label: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made(bits=bits, format=written), tmp_path / "out"))
    relabel(folder, checkpoint_format=label)
    only(problems(folder), f"symmetric {written} file, the label says {label}", "set checkpoint_format to")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_an_asymmetric_file_of_one_version_labelled_as_the_other(
    bits: int, written: str, label: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made(bits=bits, format=written, sym=False), tmp_path / "out"))
    relabel(folder, checkpoint_format=label)
    only(problems(folder), "off by one step of their grids", f"those of a {written} file labelled {label}")


def test_eight_bits_asymmetric_leave_the_version_open(made: Callable[..., Path]) -> None:
    (found,) = verify(made(bits=8, sym=False), generate=False).models
    assert found.problems == ()
    assert any("zeros do not tell" in note for note in found.notes)


LABELS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 8}, "its tensors are of 4 bits, the label in config.json says 8"),
    ({"group_size": 64}, "4 bits in groups of 64, as config.json says, make it"),
    ({"bits": 5}, "quantization_config says bits 5"),
    ({"group_size": 0}, "quantization_config says group_size 0"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"sym": None}, "sym None"),
    ({"modules_in_block_to_quantize": 7}, "modules_in_block_to_quantize is no list of names"),
    ({"dynamic": {r"-:.*q_proj": {}}}, "a `dynamic` rule in config.json says that it is not"),
]


@pytest.mark.parametrize(("changes", "says"), LABELS)
def test_a_label_of_other_tensors(changes: dict[str, Any], says: str, checkpoint: Path) -> None:
    found = problems(relabel(checkpoint, **changes))
    assert any(says in text for text in found), found


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_zeros_under_a_symmetric_label(bits: int, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made(bits=bits, sym=False), tmp_path / "out"))
    assert any("their zeros vary, the label says sym true" in text for text in problems(relabel(folder, sym=True)))


def _plain(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{Q}.{part}"]
    tensors[f"{Q}.weight"] = torch.ones(64, 64).half()


def _put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return put


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


TENSORS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (_put(f"{Q}.scales", torch.inf), f"{Q}.scales: 1 are infinity, the first at [0, 7]"),
    (_put(f"{Q}.scales", torch.nan), f"{Q}.scales: 1 are NaN"),
    (_put(f"{Q}.scales", 6000.0), f"{Q}.scales: one is 6000, where"),
    (_put(f"{Q}.scales", -6000.0), f"{Q}.scales: one is 6000, where"),
    (_changed(f"{Q}.scales", torch.zeros_like), f"{Q}.scales: all are 0"),
    (_put("model.norm.weight", torch.nan), "model.norm.weight: 1 values are NaN"),
    (_put("lm_head.weight", -torch.inf), "lm_head.weight: 1 values are infinity"),
    (_changed("lm_head.weight", torch.zeros_like), "lm_head.weight: all values are 0"),
    (
        _changed(f"{Q}.g_idx", lambda g: torch.cat([g[:-1], g[-1:] + 1])),
        f"{Q}.g_idx: holds groups 0 to 2, there are 0 to 1",
    ),
    (_changed(f"{Q}.g_idx", lambda g: g.flip(0)), f"{Q}.g_idx: groups are not in the order of the columns"),
    (_changed(f"{Q}.g_idx", torch.zeros_like), f"{Q}.g_idx: a group has more than 32 columns"),
    (
        _changed(f"{Q}.scales", lambda s: s[:, :-1]),
        f"{Q}.scales is [2, 63]; 4 bits in groups of 32, as config.json says, make it [2, 64]",
    ),
    (
        _changed("model.norm.weight", lambda n: n[:-1]),
        "model.norm.weight has shape [63], the config asks for [64]",
    ),
    (_changed(f"{Q}.g_idx", torch.Tensor.float), f"{Q}.g_idx is stored as F32, which must be I32"),
    (
        lambda tensors: tensors.update({f"{Q}.weight": torch.ones(64, 64).half()}),
        f"{Q} is stored as codes and as a weight too",
    ),
    (_plain, f"{Q}: stored as weights, where the label has them as codes"),
    (lambda tensors: tensors.pop(f"{Q}.qzeros"), f"{Q} has no qzeros"),
    (lambda tensors: tensors.pop(f"{Q}.g_idx"), f"{Q} has no g_idx"),
    (lambda tensors: tensors.pop("lm_head.weight"), "1 tensors are missing: lm_head.weight"),
]


@pytest.mark.parametrize(("edit", "says"), TENSORS)
def test_tensors_that_are_wrong(edit: Callable[[Any], None], says: str, checkpoint: Path) -> None:
    edit_tensors(forget(checkpoint), edit)
    found = problems(checkpoint)
    assert any(says in text for text in found), found


def test_a_scale_that_is_large_for_its_matrix_but_no_damage(checkpoint: Path) -> None:
    edit_tensors(forget(checkpoint), _put(f"{Q}.scales", 1.0))
    assert problems(checkpoint) == []
    edit_tensors(checkpoint, lambda tensors: tensors[f"{Q}.scales"].mul_(1000))
    assert problems(checkpoint) == []


def test_zeros_of_a_delta_are_what_did_not_change(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.diff(make_model("llama"), make_model("llama"), tmp_path / "delta")
    assert problems(tmp_path / "delta", generate=True) == []


def test_the_sentence_is_what_transformers_writes(make_model: MakeModel) -> None:
    folder = make_model("llama")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    for _ in range(24):
        ids = torch.cat([ids, model.float()(ids).logits[:, -1:].argmax(-1)], dim=1)
    (found,) = verify(folder, device="cpu").models
    assert found.sentence == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_all_of_several_faults_are_listed(checkpoint: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for spoil, _ in (TENSORS[0], TENSORS[5], TENSORS[9]):
            spoil(tensors)

    edit_tensors(forget(checkpoint), edit)
    (checkpoint / "tokenizer.json").unlink()
    edit_json(checkpoint / "quantize_config.json", lambda config: config.update(bits=8))
    found = problems(checkpoint, generate=True)
    for text in (*(says for _, says in (TENSORS[0], TENSORS[5], TENSORS[9])), "has no tokenizer", "bits is 4"):
        assert any(text in line for line in found), (text, found)


# -- tensors swapped -------------------------------------------------------------------------------------------------


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    one, other = "lm_head.weight", "model.embed_tokens.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def test_tensors_swapped_show_against_the_record(checkpoint: Path) -> None:
    edit_tensors(checkpoint, _swap)
    only(problems(checkpoint), "model.safetensors is not the file that was written")


def test_tensors_swapped_show_in_what_the_model_says(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without checksums, whose evaluation was of the whole text that is scored again."""
    monkeypatch.setattr("quantkit.verbs.verify.behaviour._SCORED_TOKENS", 10**9)
    result = quantkit.perplexity([checkpoint], seq_len=256, device="cpu")
    edit_json(forget_sums(checkpoint), lambda record: record.update(evaluation=result.as_dict()))
    assert problems(checkpoint, generate=True) == []
    edit_tensors(checkpoint, _swap)
    only(
        problems(checkpoint, generate=True), "perplexity of", "quantkit.json says", "other weights than were evaluated"
    )


def forget_sums(folder: Path) -> Path:
    edit_json(folder / "quantkit.json", lambda record: record.pop("files"))
    return folder / "quantkit.json"


def test_the_first_windows_agree_with_the_whole_text(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = quantkit.perplexity([checkpoint], seq_len=256, device="cpu").as_dict()
    path = forget_sums(checkpoint)
    edit_json(path, lambda record: record.update(evaluation=result))
    assert problems(checkpoint, generate=True) == []
    result["results"][-1]["perplexity"] *= 2
    result["results"][-1]["stderr"] *= 2
    edit_json(path, lambda record: record.update(evaluation=result))
    only(problems(checkpoint, generate=True), "quantkit.json says")


def test_a_large_model_that_guesses_is_a_problem(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(checkpoint, generate=True) == []
    monkeypatch.setattr("quantkit.verbs.verify.behaviour._TOO_SMALL", 0)
    only(problems(checkpoint, generate=True), "hardly better than guessing")


# -- companions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bits", "group_size", "desc_act", "sym", "checkpoint_format", "damp_percent"])
def test_config_copies_that_differ(key: str, checkpoint: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config[key] = {"bits": 8, "group_size": 64, "desc_act": True, "sym": False}.get(key, "gptq_v2")

    edit_json(forget(checkpoint) / "quantize_config.json", edit)
    only(problems(checkpoint), f"{key} is", "in config.json's quantization_config and", "make both the same")


def test_a_config_copy_that_is_missing(checkpoint: Path) -> None:
    (forget(checkpoint) / "quantize_config.json").unlink()
    only(problems(checkpoint), "quantize_config.json is missing")


def test_a_copy_in_quantize_config_only(checkpoint: Path) -> None:
    edit_json(forget(checkpoint) / "config.json", lambda config: config.pop("quantization_config"))
    only(problems(checkpoint), "config.json has no quantization_config")


def test_a_tokenizer_left_out(checkpoint: Path) -> None:
    for path in forget(checkpoint).glob("tokenizer*"):
        path.unlink()
    only(problems(checkpoint, generate=True), "has no tokenizer")


def test_a_tokenizer_of_another_model(checkpoint: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        token = {**content["added_tokens"][0], "id": 999, "content": "extra", "special": False}
        content["added_tokens"].append(token)

    edit_json(forget(checkpoint) / "tokenizer.json", edit)
    assert any("the tokenizer has ids up to" in text for text in problems(checkpoint))


def test_a_chat_template_that_does_not_render(checkpoint: Path) -> None:
    path = forget(checkpoint) / "chat_template.jinja"
    path.write_text("{{ raise_exception('no') }}")
    only(problems(checkpoint), "the chat template cannot be rendered: no")
    path.write_text("hello")
    only(problems(checkpoint), "leaves the user's words out")


def test_links_into_a_cache_and_pickled_weights(checkpoint: Path, make_model: MakeModel, tmp_path: Path) -> None:
    linked, pickled = tmp_path / "linked", tmp_path / "pickled"
    linked.mkdir()
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    others = [path.name for path in sorted(checkpoint.iterdir()) if is_foreign(linked / path.name, linked)]
    assert "chat_template.jinja" in others
    assert not {"config.json", "model.safetensors", "tokenizer.json"} & set(others)
    assert [text.partition(" is a link to outside the folder")[0] for text in problems(linked)] == others
    cache = tmp_path / "models--a--b"
    shutil.copytree(checkpoint, cache / "blobs")
    (cache / "snapshots" / "0").mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (cache / "snapshots" / "0" / path.name).symlink_to(path)
    assert problems(cache / "snapshots" / "0") == []
    shutil.copytree(make_model("llama"), pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(make_model("llama") / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert problems(pickled, generate=True) == []
    tensors.pop("model.norm.weight")
    tensors["lm_head.weight"][3, 3] = torch.inf
    torch.save(tensors, pickled / "pytorch_model.bin")
    missing, infinite = problems(pickled, generate=True)
    assert "1 tensors are missing: model.norm.weight" in missing
    assert "lm_head.weight: 1 values are infinity" in infinite


def test_special_ids_out_of_range(checkpoint: Path) -> None:
    edit_json(forget(checkpoint) / "config.json", lambda config: config.update(eos_token_id=[2, 320]))
    only(problems(checkpoint), "config.json: eos_token_id is 320, the model has ids 0 to 319")


def test_a_head_that_a_tied_config_passes_over(make_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    only(problems(folder), "config.json says tie_word_embeddings, but lm_head.weight is stored")


def test_outputs_of_such_a_model_say_that_it_is_not_tied(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder
) -> None:
    folder = Path(shutil.copytree(make_model("llama"), tmp_path / "model"))
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    quantkit.convert(folder, tmp_path / "out", progress=recorder)
    quantkit.gptq(folder, tmp_path / "gptq", calibration=tiny_tokens, group_size=32, evaluate=False, progress=recorder)
    said = "lm_head.weight is stored and is not the input's embedding: it is taken as it is"
    assert sum(said in text for text in recorder.warnings) == 2
    for made in ("out", "gptq"):
        assert not problems(tmp_path / made)
        assert json.loads((tmp_path / made / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("cut", ["config.json", "tokenizer_config.json", "quantkit.json", "generation_config.json"])
def test_a_json_file_cut_short(cut: str, checkpoint: Path) -> None:
    if cut != "quantkit.json":
        forget(checkpoint)
    path = checkpoint / cut
    path.write_bytes(path.read_bytes()[:-10])
    found = problems(checkpoint, generate=True)
    assert any(cut in text for text in found), found


# -- local paths -----------------------------------------------------------------------------------------------------


def strings(*texts: str) -> list[str]:
    found = Findings(Path("/nowhere"))
    check_strings("config.json", iter([("key", text) for text in texts]), found)
    return list(found.problems)


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/models/llama",
        "made from /Users/ann/llama",
        "/root/.cache/huggingface",
        "/tmp/out/model.safetensors",
        "/mnt/d/models",
        "~/models/llama",
        r"C:\Users\ann\llama",
        "D:/models/llama",
        "file:///home/ann/x",
        r"\\server\share\llama",
    ],
)
def test_what_is_a_local_path(text: str) -> None:
    only(strings(text), "config.json: key holds", "a local path or user name")


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/ann/model",
        "meta-llama/Llama-2-7b-hf",
        "gpt-4/tmp",
        "see https://huggingface.co/docs",
        "one/two or three /root of evil",
        "a ratio of 1/2: and/or",
        "model-00001-of-00002.safetensors",
        "https://c.org:8080/x",
        "C: the language",
        "../tmp/out and ./home/ann",
    ],
)
def test_what_is_no_local_path(text: str) -> None:
    assert strings(text) == []


def test_the_users_own_name_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "annabel")
    monkeypatch.setattr(Path, "home", lambda: Path("/export/people/annabel"))
    assert len(strings("by annabel on Monday", "/export/people/annabel/x")) == 2
    assert strings("annabel/Llama-7B", "annabelle", "https://huggingface.co/annabel") == []


def _in_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, path, {"format": "pt", "source": "/home/ann/llama"})


PLACES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: edit_json(f / "config.json", lambda c: c.update(_name_or_path="/home/ann/llama")), "config.json: _name"),
    (lambda f: edit_json(f / "config.json", lambda c: c.update(_name_or_path="../llama")), "config.json: _name"),
    (lambda f: edit_json(f / "generation_config.json", lambda c: c.update(x={"/home/ann/x": 1})), "generation_config"),
    (
        lambda f: (f / "quantkit.json").write_text('{"source": {"model": "/home/ann/llama"}}'),
        "quantkit.json: source.model",
    ),
    (lambda f: (f / "quant_log.csv").write_text("layer\n/home/ann/llama\n"), "quant_log.csv: line 2"),
    (lambda f: (f / "README.md").write_text("Made from `/home/ann/llama`."), "README.md: line 1"),
    (_in_file, "model.safetensors: source"),
]


@pytest.mark.parametrize(("edit", "where"), PLACES)
def test_a_local_path_in_metadata(edit: Callable[[Path], Any], where: str, checkpoint: Path) -> None:
    edit(forget(checkpoint))
    only(problems(checkpoint), where, "a local path or user name; remove it before publishing")


def test_a_chat_template_is_text_of_the_model(checkpoint: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %} /home/ann/x"

    edit_json(forget(checkpoint) / "tokenizer_config.json", edit)
    assert problems(checkpoint) == []


def test_a_card_may_say_where_to_put_things(checkpoint: Path) -> None:
    text = "Put it below ~/models, or /opt/models. See https://example.org/home/ann."
    (forget(checkpoint) / "README.md").write_text(text)
    assert problems(checkpoint) == []


def test_a_local_path_in_a_gguf_file(spm: Path) -> None:
    write_model(spm, tiny(), sentencepiece(LLAMA), keys={"general.description": "from /home/ann/llama"})
    only(problems(spm), "spm.gguf: general.description holds '/home/ann/llama'")


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_with_damage(spm: Path, tmp_path: Path) -> None:
    data = spm.read_bytes()
    spm.write_bytes(data[:-50])
    only(problems(spm), "spm.gguf: broken or cut short GGUF file (it ends before the end of")
    spm.write_bytes(b"GGUX" + data[4:])
    only(problems(spm), "spm.gguf: begins with b'GGUX'")


def test_a_gguf_part_that_is_missing(spm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    quantkit.ggml(spm, folder / "x.gguf", type="f16", split_max_size="60KB")
    parts = sorted(folder.iterdir())
    parts[1].unlink()
    for path in (folder, parts[0]):
        only(problems(path), f"{parts[1].name}: this part of x is missing")


@pytest.mark.parametrize(("name", "leave_out"), [("missing", "blk.1.ffn_up.weight"), ("whole", "")])
def test_a_gguf_tensor_that_is_missing_or_no_number(name: str, leave_out: str, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / f"{name}.gguf"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    write_model(path, model, sentencepiece(LLAMA), leave_out=leave_out)
    found = problems(path)
    assert any("model.layers.0.mlp.down_proj.weight: 1 values are NaN" in text for text in found), found
    missing = "1 tensors are missing: model.layers.1.mlp.up_proj.weight"
    assert any(missing in text for text in found) == bool(leave_out)


# -- which programs --------------------------------------------------------------------------------------------------


def answers(model: Verified) -> dict[str, tuple[bool, str]]:
    return {load.program: (load.ok, load.why) for load in model.loads}


PROGRAMS: list[tuple[dict[str, Any], dict[str, Any], str, bool, str]] = [
    ({}, {}, "transformers", True, "gptqmodel"),
    ({}, {}, "vLLM", True, "Marlin"),
    ({}, {}, "AutoGPTQ", True, "transformers 4"),
    ({}, {}, "ExLlama", True, ""),
    ({}, {}, "ExLlamaV2", True, ""),
    ({}, {}, "llama.cpp", False, "quantkit ggml"),
    ({"tied": True}, {}, "AutoGPTQ", False, "--untie"),
    ({"tied": True}, {"untie": True}, "AutoGPTQ", True, ""),
    ({}, {"format": "gptq_v2"}, "AutoGPTQ", False, "does not know gptq_v2"),
    ({}, {"format": "gptq_v2"}, "ExLlamaV2", False, "adds one to every zero"),
    ({}, {"sym": False}, "vLLM", False, "symmetric codes only"),
    ({}, {"sym": False}, "GPTQModel", False, "--format gptq_v2"),
    ({}, {"sym": False, "format": "gptq_v2"}, "GPTQModel", True, ""),
    ({}, {"bits": 3}, "vLLM", False, "4 and 8 bits, not 3"),
    ({}, {"bits": 8}, "ExLlamaV2", False, "4 bits only"),
    ({}, {"group_size": 64}, "vLLM", False, "is 96 wide, no multiple of its group of 64"),
    ({}, {"group_size": 64}, "AutoGPTQ", False, "no short last group"),
    ({}, {"group_size": 64, "act_order": "dynamic"}, "AutoGPTQ", True, ""),
    ({}, {"group_size": 16}, "vLLM", False, "not 16"),
    ({}, {"act_order": "dynamic"}, "vLLM", False, "no groups in dynamic order"),
    ({}, {"act_order": "dynamic", "group_size": -1}, "vLLM", True, ""),
    ({}, {"exclude": ["*.k_proj"]}, "vLLM", False, "differ in precision"),
    ({}, {"override": ["*.{q,k,v}_proj=bits:8"]}, "vLLM", False, "it looks up model.layers.0.self_attn.qkv_proj"),
    ({}, {"override": ["*.{q,k,v,qkv}_proj=bits:8"]}, "vLLM", True, ""),
    ({}, {"format": "compressed-tensors", "bits": 3, "sym": False}, "vLLM", True, ""),
    ({"family": "mixtral"}, {"format": "compressed-tensors", "sym": False}, "vLLM", True, ""),
    (
        *({"family": "mixtral"}, {"format": "compressed-tensors", "sym": False, "bits": 8}, "vLLM"),
        *(False, "of experts' asymmetric codes its kernels take 4 bits, not 8"),
    ),
    ({"family": "mixtral"}, {}, "transformers", False, "experts unquantized"),
    ({"family": "mixtral"}, {}, "GPTQModel", False, "Mixtral's experts"),
    (
        {"family": "gemma3_text", "dtype": "bfloat16", "tied": True},
        {},
        "AutoGPTQ",
        False,
        "has no class for gemma3_text",
    ),
    ({"family": "gpt2"}, {}, "ExLlama", False, "Llamas only"),
]


@pytest.mark.parametrize(("model", "options", "program", "ok", "why"), PROGRAMS)
def test_which_programs_load_a_checkpoint(
    model: dict[str, Any], options: dict[str, Any], program: str, ok: bool, why: str, made: Callable[..., Path]
) -> None:
    (found,) = verify(made(model, **options), generate=False).models
    assert answers(found)[program][0] == ok
    assert why in answers(found)[program][1]


def test_programs_that_load_no_quantized_head(checkpoint: Path) -> None:
    codes = torch.randint(16, (64, 320), dtype=torch.uint8)
    head = {"qweight": pack(codes, 4), "qzeros": pack(torch.full((2, 320), 7, dtype=torch.uint8), 4, axis=1)}
    head |= {"scales": torch.full((2, 320), 0.01).half(), "g_idx": (torch.arange(64) // 32).int()}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors.update({f"lm_head.{part}": tensor for part, tensor in head.items()})

    edit_tensors(forget(checkpoint), quantize)
    for name in ("config.json", "quantize_config.json"):
        edit_json(checkpoint / name, lambda content: content.get("quantization_config", content).update(lm_head=True))
    (found,) = verify(checkpoint, generate=False).models
    assert found.problems == ()
    loads = answers(found)
    assert (loads["GPTQModel"][0], loads["ExLlamaV2"][0]) == (True, True)
    for program in ("AutoGPTQ", "ExLlama"):
        assert "the head is quantized" in loads[program][1]


def test_autogptq_and_a_rotary_base_it_does_not_find(checkpoint: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
        config.pop("rope_theta", None)

    edit_json(forget(checkpoint) / "config.json", edit)
    (found,) = verify(checkpoint, generate=False).models
    assert "takes 10000, not 500000" in answers(found)["AutoGPTQ"][1]


class Sizes:
    """As much of a config as sharing out needs."""

    def __init__(self, heads: int, keys: int) -> None:
        self.num_attention_heads, self.num_key_value_heads = heads, keys

    def get_text_config(self) -> Sizes:
        return self


def llama(heads: int, keys: int, width: int, inner: int, group: int, bits: int = 4) -> list[Linear]:
    """A block's Linears."""
    head = width // heads
    shapes = {
        "q_proj": (width, width),
        "k_proj": (head * keys, width),
        "v_proj": (head * keys, width),
        "o_proj": (width, width),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    return [Linear(f"m.{name}", rows, columns, bits, group) for name, (rows, columns) in shapes.items()]


SHARED: list[tuple[tuple[int, ...], tuple[int, ...], str]] = [
    # heads, keys, width, inner, group (Llama-2-7B; 13B; Qwen2.5-7B's 28 heads; Llama-3-8B; TinyLlama)
    (
        (32, 32, 4096, 11008, 128),
        (1, 2),
        "m.down_proj: 11008 columns over 4 are 2752, no multiple of the group of 128",
    ),
    ((32, 32, 4096, 11008, 64), (1, 2, 4), "11008 columns over 8 are 1376, no multiple of the group of 64"),
    ((32, 32, 4096, 11008, 32), (1, 2, 4, 8), ""),
    ((40, 40, 5120, 13824, 128), (1, 2, 4), "13824 columns over 8 are 1728, no multiple of the group of 128"),
    ((28, 4, 3584, 18944, 128), (1, 2, 4), "28 attention heads cannot be shared by 8"),
    ((32, 8, 4096, 14336, 128), (1, 2, 4, 8), ""),
    ((32, 4, 2048, 5632, 64), (1, 2, 4, 8), ""),
    ((24, 3, 3072, 8192, -1), (1,), "3 heads of keys and values cannot be shared by 2"),
]


def test_keys_that_every_gpu_has_whole() -> None:
    found, _ = tensor_parallel(Sizes(8, 1), llama(8, 1, 32, 64, -1, bits=8))  # type: ignore[arg-type]
    assert found == (1, 2, 4, 8)


def test_the_blocks_of_a_gguf_file_are_not_cut(spm: Path, tmp_path: Path) -> None:
    quantkit.ggml(spm, tmp_path / "whole.gguf", type="q8_0")
    loads = {load.program: load for load in verify(tmp_path / "whole.gguf", generate=False).models[0].loads}
    assert loads["vLLM"].tensor_parallel == (1, 2)
    assert loads["vLLM"].limits[4].endswith("64 columns over 4 are 16, no multiple of the block of 32")


@pytest.mark.parametrize(("sizes", "wanted", "why"), SHARED)
def test_tensor_parallel_sizes(sizes: tuple[int, ...], wanted: tuple[int, ...], why: str) -> None:
    found, limits = tensor_parallel(Sizes(*sizes[:2]), llama(*sizes))  # type: ignore[arg-type]
    assert found == wanted
    assert set(found) | set(limits) == {1, 2, 4, 8}
    assert not why or any(why in text for text in limits.values()), limits


# -- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            cli.main([str(argument) for argument in arguments])
        return int(done.value.code or 0), capsys.readouterr().out

    return call


def test_the_command_exits_with_1_and_lists_problems(checkpoint: Path, run: Callable[..., tuple[int, str]]) -> None:
    code, out = run("verify", checkpoint, "--no-generate", "--quiet")
    assert code == 0
    assert "no problems" in out
    assert "vLLM           yes  with its Marlin kernels, on a CPU 4 bits; tensor parallel 1 (not 2: model.lay" in out
    forget(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    code, out = run("verify", checkpoint, "--no-generate", "--quiet")
    assert code == 1
    assert "  problem: checkpoint: has no tokenizer" in out
    assert out.endswith("1 problem\n")


def test_the_object_of_json(checkpoint: Path, run: Callable[..., tuple[int, str]]) -> None:
    code, out = run("verify", checkpoint, "--json", "--quiet", "--device", "cpu")
    content = json.loads(out)
    assert (code, content["ok"], content["path"], content["problems"]) == (0, True, "checkpoint", [])
    (model,) = content["models"]
    assert model["sentence"].startswith("The capital of France is")
    assert {load["program"] for load in model["loads"]} >= {"transformers", "vLLM", "AutoGPTQ", "ExLlama", "llama.cpp"}


def test_nothing_there_is_a_wrong_command(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    assert run("verify", tmp_path / "none")[0] == 2
    with pytest.raises(UsageError, match="not a device to run on"):
        verify(tmp_path, device="tpu")
    assert any("config.json" in text for text in problems(tmp_path))


def test_zeros_that_no_field_borrowed_from(checkpoint: Path) -> None:
    """One word of zeros in which a v1 zero of 0 borrowed from its neighbour is no longer the pattern."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        raw = unpack(tensors[f"{Q}.qzeros"], 4, axis=1).contiguous()
        raw[0, 0] = 15
        tensors[f"{Q}.qzeros"] = pack(raw, 4, axis=1)

    edit_tensors(forget(checkpoint), edit)
    only(problems(checkpoint), f"{Q}: their zeros vary, the label says sym true")


# -- tokens that the model does not embed ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<image_soft_token>", "<|im_start|>assistant"])
def test_a_special_token_beyond_the_embedding(
    token: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Gemma 3's text models, where nothing gives it; a fault where the chat template writes it."""
    folder = Path(shutil.copytree(make_model(), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    unused = token.startswith("<image")
    if not unused:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", token)
    tokenizer.save_pretrained(folder)
    (found,) = verify(folder, generate=False).models
    write = {"type": "f16", "pre": "smollm"}
    if unused:
        assert found.problems == ()
        assert any(token in note for note in found.notes)
        quantkit.ggml(folder, tmp_path / "out.gguf", **write)
        assert verify(tmp_path / "out.gguf", generate=False).problems == []
    else:
        assert any("the model embeds 320" in problem for problem in found.problems)
        with pytest.raises(SourceError, match="has the id 320"):
            quantkit.ggml(folder, tmp_path / "out.gguf", **write)
