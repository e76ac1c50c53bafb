"""Models and data sets from a Hub of one's own, through the real client: revisions, its cache, networks that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.hub_server import HubServer

import quantkit
from quantkit.cli import app as cli
from quantkit.errors import SourceError
from quantkit.options.values import looks_like_id
from quantkit.sources import open_source

NORM = "model.norm.weight"
RECORDS = [
    {"instruction": f"explain number {i} to a child", "output": f"{i} is one more than {i - 1}. " * 4}
    for i in range(24)
]


@dataclass
class Client:
    """A machine whose Hub is `server`, with a cache of its own and no token."""

    server: HubServer
    home: Path
    patch: pytest.MonkeyPatch

    def offline(self, on: bool = True) -> None:
        """What HF_HUB_OFFLINE=1 does in a process that starts."""
        self.patch.setattr(constants, "HF_HUB_OFFLINE", on)

    def blobs(self) -> list[Path]:
        """The cache's files that hold content, whole or not."""
        return [path for path in self.home.rglob("blobs/*") if path.is_file()]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def client(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The client reads its environment when it is imported, so its constants are set; processes get the variables."""
    home = tmp_path / "hf-home"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return Client(server, home, monkeypatch)


def with_norm(model: Path, folder: Path, value: float) -> Path:
    """A copy of a model that its final norm tells from others."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def repository(server: HubServer, make_model: MakeModel, tmp_path: Path) -> tuple[str, str]:
    """someone/tiny with two commits: the norm is 1 at the tag v1, and 2 on main. Gives both commits."""
    model = make_model("llama")
    first = server.commit("someone/tiny", with_norm(model, tmp_path / "one", 1), tags=["v1"])
    return first, server.commit("someone/tiny", with_norm(model, tmp_path / "two", 2))


def norm(revision: str | None = None) -> float:
    return float(open_source("someone/tiny", revision).read(NORM)[0])


# -- models ----------------------------------------------------------------------------------------------------------


def test_revisions_give_the_weights_of_their_commit(client: Client, repository: tuple[str, str]) -> None:
    assert [norm(), norm("main"), norm("v1"), norm(repository[0]), norm(repository[1])] == [2, 2, 1, 1, 2]
    assert open_source("someone/tiny", "v1").label == "someone/tiny@v1"
    # Two contents were asked for five times, and downloaded once each.
    assert len(client.server.asked("model.safetensors")) == 2


def test_weights_behind_the_links_of_the_cache_are_read(client: Client, repository: tuple[str, str]) -> None:
    source = open_source("someone/tiny")
    assert all(path.is_symlink() for path in source.weight_files())
    assert all("blobs" in path.resolve().parts for path in source.weight_files())


@pytest.mark.usefixtures("client")
def test_shards_behind_the_links_of_the_cache_are_read(server: HubServer, make_model: MakeModel) -> None:
    model = make_model("llama", max_shard_size="100KB")
    server.commit("someone/tiny", model)
    source = open_source("someone/tiny")
    assert len(source.weight_files()) > 1
    assert torch.equal(source.read(NORM), open_source(model).read(NORM))


def as_bin(model: Path, folder: Path, keep_safetensors: bool = False) -> Path:
    shutil.copytree(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if not keep_safetensors:
        (folder / "model.safetensors").unlink()
    return folder


def test_a_bin_is_downloaded_only_where_there_is_no_safetensors_file(
    client: Client, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("llama")
    client.server.commit("someone/both", as_bin(model, tmp_path / "both", keep_safetensors=True))
    client.server.commit("someone/old", as_bin(model, tmp_path / "old"))
    assert [path.name for path in open_source("someone/both").weight_files()] == ["model.safetensors"]
    assert client.server.asked("pytorch_model.bin") == []
    source = open_source("someone/old")
    assert [path.name for path in source.weight_files()] == ["pytorch_model.bin"]
    assert torch.equal(source.read(NORM), open_source(model).read(NORM))
    client.offline()
    assert open_source("someone/old").kind == "hf"


def test_nothing_is_downloaded_that_is_not_needed(client: Client, make_model: MakeModel) -> None:
    model = make_model("llama")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    unwanted = {
        "onnx/model.safetensors": b"for another program",
        "consolidated.safetensors": b"the weights once more",
        "training_args.bin": b"a pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "model.gguf": b"GGUF",
    }
    template = {"additional_chat_templates/tool_use.jinja": b"{{ messages }}"}
    client.server.commit("someone/tiny", {**files, **unwanted, **template})
    folder = open_source("someone/tiny").path
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {*template, "model.safetensors", "config.json", "tokenizer.json"} <= found
    assert not found & set(unwanted)
    assert "modeling_tiny.py" in os.listdir(open_source("someone/tiny", trust_remote_code=True).path)


@pytest.mark.usefixtures("client")
def test_a_gptq_repository_with_its_file_names_of_2023(
    server: HubServer, make_model: MakeModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantkit.gptq(make_model("llama"), out, calibration="evol-instruct-sample", samples=2, seq_len=16, evaluate=False)
    (out / "model.safetensors").rename(out / "gptq_model-4bit-128g.safetensors")
    server.commit("someone/tiny-GPTQ", out, branch="gptq-4bit-128g")
    source = open_source("someone/tiny-GPTQ", "gptq-4bit-128g")
    assert source.kind == "gptq"
    assert (source.path / "quantize_config.json").is_file()


@pytest.mark.usefixtures("client")
def test_a_base_and_a_delta_by_their_revisions(server: HubServer, make_model: MakeModel, tmp_path: Path) -> None:
    base, tuned = make_model("llama"), with_norm(make_model("llama"), tmp_path / "tuned", 2)
    quantkit.diff(base, tuned, tmp_path / "delta")
    server.commit("someone/tiny", make_model("qwen2"))
    server.commit("someone/tiny", base, branch="base")
    server.commit("someone/tiny", tmp_path / "delta", branch="delta")
    tiny = "someone/tiny"
    report = quantkit.merge(tiny, tiny, tmp_path / "out", base_revision="base", revision="delta")
    assert report.dtype == "float16"  # which the delta's quantkit.json says, and it alone
    assert torch.equal(open_source(tmp_path / "out").read(NORM), open_source(tuned).read(NORM))
    with pytest.raises(SourceError, match=r"no such revision of it: check revision"):
        quantkit.merge(tiny, tiny, tmp_path / "no", base_revision="nothing", revision="delta")


# -- offline -----------------------------------------------------------------------------------------------------------


def refusal(revision: str | None = None, name: str = "someone/tiny") -> str:
    """What `open_source` says: one line that names the model."""
    with pytest.raises(SourceError) as error:
        open_source(name, revision)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(name)
    return message


def test_offline_a_cached_copy_serves_without_a_request(client: Client, repository: tuple[str, str]) -> None:
    assert (norm(), norm("v1")) == (2, 1)
    client.offline()
    client.server.requests.clear()
    assert [norm(), norm("main"), norm("v1"), norm(repository[0])] == [2, 2, 1, 1]
    assert client.server.requests == []


def test_offline_without_a_cached_copy_is_one_clear_line(client: Client, repository: tuple[str, str]) -> None:
    client.offline()
    assert "not in the Hub cache; HF_HUB_OFFLINE is set: unset it" in refusal()
    client.offline(False)
    assert norm() == 2
    client.offline()
    assert "not in the Hub cache; HF_HUB_OFFLINE is set" in refusal("v1")  # another revision than the cached one


def test_a_hub_that_is_gone_leaves_the_cached_copy(client: Client, repository: tuple[str, str]) -> None:
    assert norm() == 2
    client.server.stop()
    assert norm() == 2
    assert "not in the Hub cache, and the Hub cannot be reached" in refusal("v1")


# -- a network that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second before each of its five retries."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_waiting")
def test_a_connection_that_drops_once_is_taken_up_where_it_was(
    client: Client, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    client.server.commit("someone/tiny", make_model("llama"))
    client.server.cut("model.safetensors", after=20_500)
    source = open_source("someone/tiny")
    assert torch.equal(source.read(NORM), open_source(make_model("llama")).read(NORM))
    assert [request.span for request in client.server.asked("model.safetensors")] == [None, "bytes=20000-"]


@pytest.mark.usefixtures("no_waiting")
def test_a_network_gone_in_the_middle_leaves_nothing_that_looks_whole(
    client: Client, repository: tuple[str, str]
) -> None:
    client.server.cut("model.safetensors", after=20_500, times=None)
    assert "the Hub did not give all of it" in refusal()
    assert list(client.home.rglob("model.safetensors")) == []
    assert [path for path in client.blobs() if path.name.endswith(".incomplete")] == []
    client.offline()
    assert "the cached copy is incomplete; HF_HUB_OFFLINE is set" in refusal()
    client.offline(False)
    client.server.heal()
    client.server.requests.clear()
    assert norm() == 2
    assert [
        request.path.rsplit("/", 1)[1] for request in client.server.asked("", "GET") if "resolve" in request.path
    ] == ["model.safetensors"]


@pytest.mark.usefixtures("no_waiting")
def test_a_second_shard_that_never_came_is_missed_offline(client: Client, make_model: MakeModel) -> None:
    model = make_model("llama", max_shard_size="100KB")
    shard = sorted(path.name for path in model.glob("*.safetensors"))[1]
    client.server.commit("someone/tiny", model)
    client.server.fail(shard, 503, times=None)
    assert "503" in refusal()
    client.offline()
    assert "incomplete" in refusal()


def test_a_server_out_of_order_is_one_clear_line_and_a_cached_copy_serves(
    client: Client, repository: tuple[str, str]
) -> None:
    client.server.fail("", 503, times=None)
    assert "503" in refusal()
    client.server.heal()
    assert norm() == 2
    client.server.fail("", 503, times=None)
    assert norm() == 2


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("someone/nothing", None, "the Hub has no such model, or it is private"),
        ("someone/tiny", "v9", "the Hub has no such revision of it: check --revision"),
        ("someone/tiny", "0123456789" * 4, "the Hub has no such revision of it: check --revision"),
        ("someone/gated", None, "access is restricted: accept its terms on the Hub"),
        ("someone/tiny--x", None, "not a name that the Hub accepts"),
    ],
)
@pytest.mark.usefixtures("client", "repository")
def test_what_the_hub_does_not_give_is_one_clear_line(
    server: HubServer, name: str, revision: str | None, reason: str
) -> None:
    server.commit("someone/gated", {"config.json": b"{}"}, gated=True)
    assert reason in refusal(revision, name)


# -- data sets ---------------------------------------------------------------------------------------------------------


def data_file(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def data(server: HubServer) -> tuple[str, str]:
    """someone/data: twelve records at the tag v1, twelve others on main. Gives both commits."""
    card = {"README.md": b"---\nlicense: cc0-1.0\n---\n"}
    first = server.commit("someone/data", {"d.jsonl": data_file(RECORDS[:12]), **card}, kind="dataset", tags=["v1"])
    return first, server.commit("someone/data", {"d.jsonl": data_file(RECORDS[12:]), **card}, kind="dataset")


def numbers(report: Any) -> set[int]:
    """Which records the windows hold."""
    text = " ".join(report.windows)
    return {i for i in range(24) if f"explain number {i} to" in text}


@pytest.mark.parametrize("file", ["", ":d.jsonl"])
@pytest.mark.usefixtures("client")
def test_a_data_set_by_id_and_revision(make_model: MakeModel, data: tuple[str, str], file: str) -> None:
    drawn = {}
    for revision in ("", "@main", "@v1", f"@{data[0]}"):
        name = f"someone/data{revision}{file}"
        drawn[revision] = quantkit.samples(make_model("llama"), calibration=name, samples=8, seq_len=64)
    for revision, report in drawn.items():
        found = numbers(report)
        assert found
        assert found <= (set(range(12, 24)) if revision in ("", "@main") else set(range(12)))
    assert drawn[""].windows == drawn["@main"].windows
    assert drawn["@v1"].windows == drawn[f"@{data[0]}"].windows


@pytest.fixture
def samples(make_model: MakeModel, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, list[str]]]:
    """samples(data set) -> exit code and lines on stderr of the command of that name."""

    def run(name: str) -> tuple[int, list[str]]:
        arguments = ["samples", str(make_model("llama")), "--calibration", name, "--samples", "4", "--seq-len", "32"]
        with pytest.raises(SystemExit) as exit:
            cli.main([*arguments, "--quiet"])
        return int(exit.value.code or 0), capsys.readouterr().err.splitlines()

    return run


@pytest.mark.usefixtures("data")
def test_a_data_set_offline_with_and_without_a_cached_copy(
    client: Client, samples: Callable[[str], tuple[int, list[str]]]
) -> None:
    assert samples("someone/data@v1:d.jsonl")[0] == 0
    client.offline()
    client.server.requests.clear()
    assert samples("someone/data@v1:d.jsonl") == (0, [])
    code, lines = samples("someone/data:d.jsonl")
    assert (code, len(lines)) == (1, 1)
    assert "someone/data:d.jsonl: HF_HUB_OFFLINE is set and the data is not cached" in lines[0]
    assert client.server.requests == []


@pytest.mark.usefixtures("data", "no_waiting")
def test_a_data_set_whose_download_breaks_off(client: Client, samples: Callable[[str], tuple[int, list[str]]]) -> None:
    client.server.cut("d.jsonl", after=100, times=None)
    code, lines = samples("someone/data:d.jsonl")
    assert code == 1
    assert lines[-1].startswith("error: someone/data:d.jsonl: the Hub did not give it")
    assert list(client.home.rglob("d.jsonl")) == []
    client.server.heal()
    assert samples("someone/data:d.jsonl")[0] == 0


# -- whole processes ---------------------------------------------------------------------------------------------------


def command(client: Client, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with the environment variables that a user sets."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": client.server.url,
        "HF_HOME": str(client.home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environment,
    }
    words = [sys.executable, "-m", "quantkit", *arguments]
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_downloads_by_revision_and_then_works_offline(client: Client, repository: tuple[str, str]) -> None:
    arguments = ["inspect", "someone/tiny", "--revision", "v1", "--json"]
    online = command(client, *arguments)
    assert (online.returncode, online.stderr) == (0, "")
    assert json.loads(online.stdout)["model"] == "someone/tiny@v1"
    client.server.stop()
    offline = command(client, *arguments, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout, offline.stderr) == (0, online.stdout, "")


def test_the_command_says_in_one_line_that_the_network_went_away(client: Client, repository: tuple[str, str]) -> None:
    client.server.cut("model.safetensors", after=1000, times=None)
    broken = command(client, "inspect", "someone/tiny")
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (1, "", 1), broken.stderr
    assert broken.stderr.startswith("error: someone/tiny: not a local path, and the Hub did not give all of it")


@pytest.mark.parametrize("name", ["a/b", "Qwen/Qwen3-0.6B", "TheBloke/WizardLM-7B-GPTQ"])
def test_ids_look_like_ids(name: str) -> None:
    assert looks_like_id(name)


@pytest.mark.parametrize(
    "name", ["gpt2", "secret.gguf", "models/secret.safetensors", "secret.BIN", "secret.ggml", "a.pth"]
)
def test_a_bare_name_and_that_of_a_file_are_never_asked_for(name: str) -> None:
    assert not looks_like_id(name)
