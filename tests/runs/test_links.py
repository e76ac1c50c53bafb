"""Links in a folder of somebody else: parts of a model are taken from anywhere, nothing else leaves with an output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, MakeModel, Recorder
from support.hub_server import HubServer

import quantkit
from quantkit.errors import SourceError, UsageError
from quantkit.runs.links import is_foreign, lies_within

SECRET = "PRIVATE KEY of nobody's business"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path, secret: Path) -> Path:
    """A model with links to a private file, under names that outputs and uploads take along."""
    made: Path = shutil.copytree(make_model("llama"), tmp_path / "model")
    names = ("LICENSE", "merges.txt", "chat_template.jinja", "README.md")
    (made / "additional_chat_templates").mkdir()
    for name in (*names, "additional_chat_templates/tool_use.jinja"):
        (made / name).unlink(missing_ok=True)
        (made / name).symlink_to(secret)
    return made


def leaks(place: Path) -> list[str]:
    return [path.name for path in place.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_no_output_holds_what_a_link_leads_to(folder: Path, tmp_path: Path, recorder: Recorder) -> None:
    out = quantkit.convert(folder, tmp_path / "out", progress=recorder).out
    assert not leaks(out)
    left = [text for text in recorder.warnings if "is a link to outside the folder, and is left out" in text]
    said = {Path(text.partition(":")[0]).name for text in left}
    assert said == {"LICENSE", "merges.txt", "chat_template.jinja", "tool_use.jinja"}
    quantkit.ggml(folder, tmp_path / "out.gguf", type="f16", pre="gpt-2")
    assert SECRET.encode() not in (tmp_path / "out.gguf").read_bytes()
    with pytest.raises(UsageError, match=r"its README\.md is a link to outside the folder; name that file itself"):
        quantkit.card(out, original=folder)
    (out / "notes").symlink_to(tmp_path)
    (out / "notes.txt").symlink_to(tmp_path / "secret")
    problems = quantkit.verify(out, generate=False).problems
    assert [text.partition(" is a link to outside the folder")[0] for text in problems] == ["notes", "notes.txt"]
    (out / "SHA256SUMS").symlink_to(tmp_path / "secret")
    assert not any(SECRET.split()[-1] in text for text in quantkit.verify(out, generate=False).problems)


@pytest.mark.usefixtures("hub_client")
def test_no_upload_holds_it(server: HubServer, folder: Path, tmp_path: Path, recorder: Recorder) -> None:
    (folder / "inside.txt").symlink_to(folder / "config.json")
    report = quantkit.publish(folder, "someone/model", verify=False, progress=recorder)
    sent = {change.path for change in report.changes if change.state == "new"}
    assert "LICENSE" not in sent
    assert {"inside.txt", "config.json", "tokenizer.json", "model.safetensors"} <= sent
    assert f"LICENSE is a link to outside {folder}, and is not sent" in recorder.warnings


def test_a_model_of_links_is_a_model(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    """As people keep them, and as the Hub's cache lays them out."""
    model = make_model("llama")
    linked = tmp_path / "linked"
    snapshot = tmp_path / "models--me--it" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--me--it" / "blobs"
    for place in (linked, snapshot, blobs):
        place.mkdir(parents=True)
    for path in model.iterdir():
        if path.name != "chat_template.jinja":
            (linked / path.name).symlink_to(path)
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    for number, place in enumerate((linked, snapshot)):
        out = quantkit.convert(place, tmp_path / str(number), progress=recorder).out
        assert {path.name for path in place.iterdir()} <= {path.name for path in out.iterdir()}
        assert not quantkit.verify(out, generate=False).problems
    assert (tmp_path / "1" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert not recorder.warnings


def test_a_links_content_is_what_its_name_says(secret: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "other.json").write_text('{"auths": {"registry": "token"}}')
    names = ("model.safetensors", "model.gguf", "pytorch_model.bin", "tokenizer.model", "vocab.txt", "a.tiktoken")
    objects = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "model.safetensors.index.json")
    objects += ("tekken.json",)
    targets = dict.fromkeys((*names, *objects), secret), dict.fromkeys(objects, tmp_path / "other.json")
    for name, target in (pair for linked in targets for pair in linked.items()):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        assert is_foreign(folder / name, folder), name
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"pattern": "."}, "vocab": [{"rank": 0}]}))
    (folder / "tekken.json").unlink()
    (folder / "tekken.json").symlink_to(tmp_path / "tekken.json")
    assert not is_foreign(folder / "tekken.json", folder)
    (tmp_path / "real.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "model.gguf").unlink()
    (folder / "model.gguf").symlink_to(tmp_path / "real.gguf")
    assert not is_foreign(folder / "model.gguf", folder)
    # A folder that only looks like the Hub's cache, with a link in the place of its files.
    fake = tmp_path / "models--a--b"
    (fake / "snapshots" / "c0ffee").mkdir(parents=True)
    (fake / "blobs").symlink_to(tmp_path)
    (fake / "snapshots" / "c0ffee" / "LICENSE").symlink_to("../../blobs/secret")
    assert not lies_within(fake / "snapshots" / "c0ffee" / "LICENSE", fake / "snapshots" / "c0ffee")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "extra.safetensors", "README.md"])
def test_a_pipe_is_never_opened(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    quantkit.verify(folder, generate=False)
    with pytest.raises(SourceError, match=rf"{name}: is no file, so it is not opened"):
        quantkit.samples(folder)
