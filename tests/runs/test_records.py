"""Records from anywhere: what is not as it was written is an error that names the key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import OutputError, SourceError
from quantkit.runs.atomic import read_json
from quantkit.runs.journal import Journal
from quantkit.runs.ledger import Ledger
from quantkit.runs.records import read_record
from quantkit.tokens import TokenMatrix


@pytest.mark.fast
@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"source": "x"}, "source is 'x', not an object"),
        ({"source": {"sha256": ["x"]}}, "source.sha256 is"),
        ({"source": {"base": 5}}, "source.base is 5"),
        ({"calibration": {"parts": "x"}}, "calibration.parts is 'x', not a list"),
        ({"calibration": {"parts": [None]}}, "calibration.parts[0] is null"),
        ({"calibration": {"template": {}}}, "calibration.template is {}"),
        ({"versions": "x"}, "versions is 'x'"),
        ({"versions": {"torch": 2}}, "versions.torch is 2"),
        ({"recipe": [1]}, "recipe is [1]"),
        ({"evaluation": {"results": [1, 2]}}, "evaluation.results[0] is 1"),
        ({"evaluation": {"seq_len": True}}, "evaluation.seq_len is True"),
        ({"files": {"a": {}}}, "files.a is {}"),
        ({"delta": "x"}, "delta is 'x'"),
        ({"layers": [{"loss": "x"}]}, "layers[0].loss is 'x'"),
        ({"evaluation": {"tokens": 10**30}}, "evaluation.tokens is a number of more than 64 bits"),
        ({"recipe": {"damp": -(10**400)}}, "recipe.damp is a number of more than 64 bits"),
        ({"variants": {"a": {"source": 1}}}, "variants.a.source is 1"),
    ],
)
def test_a_key_of_another_type_is_named(record: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / "quantkit.json").write_text(json.dumps(record))
    with pytest.raises(SourceError) as refused:
        read_record(tmp_path)
    assert key in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "quantkit.json"))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not readable as JSON"),
        (b'{"files":', "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"\xef\xbb\xbf{}", "not readable as JSON"),
        (b'{"a":' * 100_000, "not readable as JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b'{"a":"\\uD800"}', "not readable as JSON"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_a_file_that_is_no_object_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "quantkit.json").write_bytes(content)
    with pytest.raises(SourceError) as refused:
        read_record(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'quantkit.json'}: {said}")


@pytest.mark.fast
def test_pipes_and_folders_in_place_of_records_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(SourceError, match=f"{name}: is no file, so it is not opened"):
            read_json(tmp_path / name)
        assert Journal(tmp_path / name).damaged == 1


@pytest.mark.fast
def test_what_is_missing_or_null_is_no_damage(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {}
    record = {"source": None, "calibration": {"parts": None, "more": 5}, "anything": [{}], "evaluation": {}}
    (tmp_path / "quantkit.json").write_text(json.dumps(record))
    assert read_record(tmp_path) == record


@pytest.fixture(scope="module")
def quantized(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "model"
    quantkit.gptq(make_model("llama"), out, calibration=tiny_tokens, evaluate=False, group_size=32, device="cpu")
    return out


NAME = "model.layers.0.mlp.down_proj"


def _flat(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.qweight"] = tensors[f"{NAME}.qweight"].flatten()


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.qweight"] = tensors[f"{NAME}.qweight"][:, :0].clone()


def _beyond(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.g_idx"][5] = 77


@pytest.mark.parametrize("change", [_flat, _empty, _beyond])
def test_a_damaged_gptq_folder_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], quantized: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(quantized, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"{tmp_path}/model: {NAME}"):
        quantkit.convert(model, tmp_path / "out")


@pytest.mark.parametrize("layer", [5, {"loss": 1.0}, {"more": 1}])
def test_a_finished_run_with_a_damaged_record_is_named(
    layer: Any, quantized: Path, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    model = shutil.copytree(quantized, tmp_path / "model")
    record = json.loads((model / "quantkit.json").read_text())
    record["layers"][1] = layer
    (model / "quantkit.json").write_text(json.dumps(record))
    again = {"calibration": tiny_tokens, "evaluate": False, "group_size": 32, "device": "cpu", "resume": True}
    with pytest.raises(SourceError, match=r"quantkit\.json: layers"):
        quantkit.gptq(make_model("llama"), model, **again)


@pytest.mark.parametrize("meta", ["quantkit:0", {"quantizer": 5}, ["x"], None])
def test_a_label_of_odd_types_is_read(meta: Any, quantized: Path, tmp_path: Path) -> None:
    model = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["meta"] = meta
    (model / "config.json").write_text(json.dumps(config))
    assert quantkit.inspect(model)
    assert not [text for text in quantkit.verify(model, generate=False).problems if "Error" in text]


@pytest.mark.parametrize("model_type", [["llama"], {}, 5, None])
def test_a_config_whose_model_type_is_no_name(model_type: Any, quantized: Path, tmp_path: Path) -> None:
    model = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(SourceError, match=r"config\.json: (has no model_type|model_type is)"):
        quantkit.inspect(model)


@pytest.mark.fast
@pytest.mark.parametrize("content", ["[]", "{", '{"steps":[]}', '{"steps":{"fp16":5}}', "[" * 9999])
def test_a_damaged_ledger_of_an_older_version_counts_as_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / ".release").mkdir()
    (tmp_path / ".release" / "ledger.json").write_text(content)
    assert not Ledger(tmp_path).knows("fp16")
    (tmp_path / ".release" / "ledger.json").write_text('{"steps":{"fp16":{"fingerprint":"x"}}}')
    with pytest.raises(OutputError, match="older version"):
        Ledger(tmp_path)
