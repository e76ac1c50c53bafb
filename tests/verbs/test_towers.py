"""Checkpoints of text and a vision tower: the text part is quantized, and the whole is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from safetensors.torch import load_file, save_file
from support import towers
from support.streamed import open_stream, streamed_logits
from support.zoo_record import loaded
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import quantkit
from quantkit.blocks.whole import load_model
from quantkit.errors import UsageError
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"device": "cpu", "evaluate": False, "group_size": 32}
FORMATS = ("gptq", "compressed-tensors", "awq", "mlx")


@pytest.fixture(scope="module")
def calibration() -> TokenMatrix:
    return token_matrix(4, 32)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: TokenMatrix
) -> dict[str, tuple[Path, Path]]:
    """Of each family the model and what `gptq` makes of it in each format."""
    found: dict[str, tuple[Path, Path]] = {}
    for kind in towers.KINDS:
        home = tmp_path_factory.mktemp(kind)
        model = towers.write(home / "model", kind, tokenizer)
        quantkit.gptq(model, home / "out", calibration=calibration, format=",".join(FORMATS), **OPTIONS)
        found[kind] = model, home / "out"
    return found


def is_tower(name: str) -> bool:
    return "visual" in name or "vision" in name or "projector" in name


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


def on_picture(model: Any, kind: str) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.float().eval()(**towers.picture(kind)).logits
    return logits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", towers.KINDS)
def test_everything_but_the_texts_linears_is_as_it_was(
    kind: str, format: str, made: dict[str, tuple[Path, Path]]
) -> None:
    """Byte for byte, under its own name; so are the files beside, and the config but for what it says of the codes."""
    model, out = made[kind]
    before, after = load_file(model / "model.safetensors"), load_file(out / format / "model.safetensors")
    codes = {name for name, own in before.items() if name not in after or after[name].shape != own.shape}
    assert {name.rpartition(".layers.")[2].split(".", 1)[1] for name in codes} == {
        f"{name}.weight"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }
    assert not any(is_tower(name) for name in codes)
    assert sum(map(is_tower, before)) > 20
    for name in before.keys() - codes:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    for name in (*towers.FILES, "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        if (model / name).exists():
            assert (out / format / name).read_bytes() == (model / name).read_bytes(), name
    told = config_of(out / format)
    assert told.pop("quantization_config", None) or told.pop("quantization")
    own = config_of(model)
    assert {key: told[key] for key in own} == own


@pytest.mark.parametrize("kind", towers.KINDS)
def test_transformers_class_gives_our_readers_logits_on_a_picture(
    kind: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Of the codes written as floats; and the source as it is comes back from `convert`."""
    model, out = made[kind]
    quantkit.convert(out / "gptq", tmp_path / "whole", dtype="float32")
    ours = load_model(open_source(out / "gptq"), CPU, torch.float32)
    theirs = on_picture(loaded(tmp_path / "whole"), kind)
    assert torch.equal(theirs, on_picture(ours, kind))
    assert torch.equal(theirs, on_picture(AutoModelForImageTextToText.from_pretrained(tmp_path / "whole"), kind))
    spread = float((theirs - on_picture(loaded(model), kind)).std() / theirs.std())
    assert 0.001 < spread < 0.5
    ids = towers.picture(kind)["input_ids"][:, -6:]
    with torch.inference_mode():
        text = loaded(tmp_path / "whole").float().eval()(input_ids=ids).logits
    streamed = streamed_logits(open_stream(out / "gptq"), [ids])[0]
    torch.testing.assert_close(streamed, text, rtol=0, atol=2e-5 * float(text.std()))


@pytest.mark.parametrize("kind", towers.KINDS)
def test_transformers_reads_compressed_tensors_of_a_whole(
    kind: str, made: dict[str, tuple[Path, Path]], calibration: TokenMatrix, tmp_path: Path
) -> None:
    """Its modules go by other names than some checkpoints' tensors; of one precision, and of two."""
    model, out = made[kind]
    override = {"*.down_proj": {"bits": 8}}
    quantkit.gptq(
        model, tmp_path / "two", calibration=calibration, format="compressed-tensors", override=override, **OPTIONS
    )
    for folder in (out / "compressed-tensors", tmp_path / "two"):
        ours = on_picture(load_model(open_source(folder), CPU, torch.float32), kind)
        with torch.inference_mode():
            theirs = loaded(folder, torch.float32).eval()(**towers.picture(kind)).logits
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", towers.KINDS)
def test_convert_writes_the_whole_again(
    kind: str, format: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, out = made[kind]
    quantkit.convert(out / format, tmp_path / "whole")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert after.keys() == before.keys()
    source = open_source(out / format)
    coded = set(open_stream(out / format).source.codes.quantized_names())  # type: ignore[union-attr]
    assert len(coded) == 14
    for name, values in after.items():
        expected = source.read(name).half() if name.removesuffix(".weight") in coded else before[name]
        assert torch.equal(values, expected), name
    own = config_of(model)
    assert {key: value for key, value in config_of(tmp_path / "whole").items() if key in own} == own


def test_a_pattern_that_reaches_into_a_tower_is_refused(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model, _ = made["qwen3_vl"]
    with pytest.raises(UsageError, match=r"model\.visual\.\*: model\.visual\.\S+ is no Linear of a decoder block"):
        quantkit.gptq(model, tmp_path / "out", include=["model.visual.*"], **OPTIONS)


def test_layers_that_predict_next_tokens_are_kept_or_dropped(
    make_model: MakeModel, calibration: TokenMatrix, tmp_path: Path
) -> None:
    """By name, or beyond the last; transformers' class passes them over."""
    model = shutil.copytree(make_model(), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    more = {
        f"{place}.{name}.weight": torch.full((64, 64), 0.5, dtype=torch.float16)
        for place in ("mtp.layers.0", "model.layers.2", "model.mtp_layers.0", "vision_tower.layers.7")
        for name in ("self_attn.q_proj", "eh_proj")
    }
    save_file({**tensors, **more}, model / "model.safetensors", {"format": "pt"})
    config = config_of(model) | {"num_nextn_predict_layers": 2, "parts": {"mtp_num_hidden_layers": 1}}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    quantkit.gptq(model, tmp_path / "kept", calibration=calibration, **OPTIONS)
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(kept[name], more[name]) for name in more)
    assert config_of(tmp_path / "kept")["num_nextn_predict_layers"] == 2
    progress = Recorder()
    quantkit.gptq(model, tmp_path / "dropped", calibration=calibration, mtp="drop", progress=progress, **OPTIONS)
    dropped = load_file(tmp_path / "dropped" / "model.safetensors")
    assert kept.keys() - dropped.keys() == {name for name in more if "vision" not in name}
    told = config_of(tmp_path / "dropped")
    assert (told["num_nextn_predict_layers"], told["parts"]["mtp_num_hidden_layers"]) == (0, 0)
    assert any(text.startswith("6 tensors are left out") for text in progress.warnings)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_the_verbs_take_source_and_quantized(
    kind: str, made: dict[str, tuple[Path, Path]], tmp_path: Path, recorder: Recorder
) -> None:
    model, out = made[kind]
    for folder in (model, out / "gptq"):
        assert quantkit.verify(folder, device="cpu").problems == [], folder
    assert quantkit.inspect(out / "gptq").kind == "gptq"
    few: dict[str, Any] = {"eval_tokens": 300, "device": "cpu", "progress": recorder}
    one = quantkit.perplexity(out / "gptq", **few)
    report = quantkit.compare(model, out / "gptq", out=tmp_path / "report", plots=False, **few)
    (found,) = report.models[1].texts.values()
    assert found.perplexity == pytest.approx(one.results[0].perplexity, rel=1e-4)
    assert 0 < report.models[1].mean_kl < 1
    assert recorder.warnings == []
