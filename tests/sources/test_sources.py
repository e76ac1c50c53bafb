"""What a name on the command line stands for, and Hub ids through the real client's function."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from huggingface_hub.errors import LocalEntryNotFoundError

from quantkit.errors import SourceError, UsageError
from quantkit.sources import open_source, variant_name

pytestmark = pytest.mark.fast


@pytest.fixture
def asked(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A Hub whose every repository is a tiny Llama; what it was asked for."""
    requests: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        requests.append((repo_id, revision))
        return str(make_model("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return requests


def test_a_folder_of_models_names_them(make_model: MakeModel, tiny_gguf: Path, tmp_path: Path) -> None:
    shutil.copytree(make_model(), tmp_path / "tiny")
    shutil.copy(tiny_gguf, tmp_path / "tiny.gguf")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "text").mkdir()
    with pytest.raises(SourceError, match=r"no config\.json\); it holds models, name one of them: tiny, tiny\.gguf$"):
        open_source(tmp_path)
    for number in range(9):
        (tmp_path / f"other{number}.gguf").symlink_to("tiny.gguf")
    with pytest.raises(SourceError, match=r": other0\.gguf, .*, other5\.gguf and 5 more$"):
        open_source(tmp_path)


@pytest.mark.parametrize(("revision", "label"), [(None, "someone/Tiny-Llama"), ("v1.0", "someone/Tiny-Llama@v1.0")])
def test_a_hub_id_with_its_revision(asked: list[Any], revision: str | None, label: str) -> None:
    source = open_source("someone/Tiny-Llama", revision=revision)
    assert (source.kind, source.label) == ("hf", label)
    assert asked == [("someone/Tiny-Llama", revision)]
    assert variant_name(source.label) == "Tiny-Llama"


def test_a_local_path_never_asks_the_hub(
    asked: list[Any], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "model").symlink_to(make_model("llama"))
    monkeypatch.chdir(tmp_path)
    assert open_source("someone/model").kind == "hf"
    with pytest.raises(UsageError, match="--revision is for Hub ids"):
        open_source("someone/model", revision="main")
    for name in ("./missing", "/missing/model", "../x/y", "a/b/c", "missing folder"):
        with pytest.raises(UsageError, match="no such file or folder"):
            open_source(name)
    assert asked == []


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline mode is on\nlong advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SourceError) as error:
        open_source("someone/model")
    assert str(error.value).startswith("someone/model: not a local path, not in the Hub cache, and the Hub cannot be")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ("model-Q4_K_M", "model"),
        ("Llama-2-7b.fp16.gguf-F16", "Llama-2-7b.fp16.gguf"),
        ("owner/Qwen3-0.6B@main", "Qwen3-0.6B"),
        ("plain", "plain"),
    ],
)
def test_variants_are_named_after_the_model(label: str, name: str) -> None:
    assert variant_name(label) == name
