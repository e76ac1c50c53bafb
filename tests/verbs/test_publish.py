"""publish, with the real Hub client against a server on loopback: what it sends, and what happens when that fails."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKEN, MakeModel, Recorder
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled
from support.hub_server import HubServer
from support.hub_uploads import ATTRIBUTES

import quantkit
from quantkit.cli import app as cli
from quantkit.errors import OutputError, QuantkitError, UsageError
from quantkit.tokens import TokenMatrix
from quantkit.verbs.card import card
from quantkit.verbs.publish import PublishReport, branch_of, publish

# The client's own use of its HTTP library.
pytestmark = [
    pytest.mark.usefixtures("hub_client"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

REPO = "someone/tiny-GPTQ"
WEIGHTS = b"\0weights" * 40_000
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
FILES = {
    "README.md": b"---\ntags:\n- gptq\n---\n# tiny\n",
    "config.json": json.dumps({"model_type": "llama", "quantization_config": GPTQ}).encode(),
    "model-00001-of-00002.safetensors": WEIGHTS + b"1",
    "model-00002-of-00002.safetensors": WEIGHTS + b"2",
    "tiny.Q4_0.gguf": b"GGUF" + WEIGHTS,
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
}
BIG = [name for name in FILES if name.endswith(("safetensors", "gguf"))]
LITTER = (".cache/huggingface/x", "__pycache__/a", "b.pyc", ".out.abc.partial/model.safetensors", ".env", "x.lock")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    for name, content in FILES.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def send(folder: Path, repo: str = REPO, **options: Any) -> PublishReport:
    return publish(folder, repo, **{"verify": False, **options})


def states(report: PublishReport) -> dict[str, str]:
    return {change.path: change.state for change in report.changes}


def held(server: HubServer, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """A branch's files without the one that the server keeps."""
    repository = server.repository("model", repo)
    assert repository is not None
    files = repository.commits[repository.refs[branch]]
    return {path: content for path, content in files.items() if path != ATTRIBUTES}


def oid(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def commits(server: HubServer) -> int:
    return len([r for r in server.requests if r.method == "POST" and "/commit/" in r.path])


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_what_is_published_comes_back_to_the_byte(server: HubServer, folder: Path) -> None:
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"litter")
    report = send(folder)
    assert held(server) == FILES
    assert (report.repo, report.branch, report.created, report.private) == (REPO, "main", True, True)
    assert set(states(report).values()) == {"new"}
    assert report.bytes == sum(map(len, FILES.values()))
    assert sorted(server.stored) == sorted(oid(name) for name in BIG)
    got = Path(snapshot_download(REPO))
    assert got.name == report.commit
    found = {str(p.relative_to(got)): p.read_bytes() for p in got.rglob("*") if p.is_file()}
    attributes = found.pop(ATTRIBUTES).decode()
    assert found == FILES
    # The pattern that the Hub's own list lacks was added by the Hub.
    assert "\ntiny.Q4_0.gguf filter=lfs" in attributes


def test_private_is_for_those_with_a_token(server: HubServer, folder: Path, tmp_path: Path) -> None:
    send(folder)
    (tmp_path / "hf-home" / "token").unlink()
    with pytest.raises(Exception, match="Repository Not Found"):
        snapshot_download(REPO, cache_dir=tmp_path / "nobody")
    (tmp_path / "hf-home" / "token").write_text(TOKEN)
    assert not send(folder, "someone/open", public=True).private
    (tmp_path / "hf-home" / "token").unlink()
    assert snapshot_download("someone/open", cache_dir=tmp_path / "nobody")


def test_a_second_run_sends_nothing_and_makes_no_commit(server: HubServer, folder: Path) -> None:
    first = send(folder)
    stored = list(server.stored)
    again = send(folder)
    assert set(states(again).values()) == {"same", "kept"}  # kept: .gitattributes
    assert again.commit == first.commit
    assert again.bytes == 0
    assert commits(server) == 1
    assert server.stored == stored


def test_only_what_differs_is_sent(server: HubServer, folder: Path) -> None:
    send(folder)
    server.stored.clear()
    (folder / BIG[1]).write_bytes(WEIGHTS + b"3")  # of the same size
    (folder / "README.md").write_bytes(b"# tinx\n" + FILES["README.md"][7:])
    (folder / "new.txt").write_bytes(b"new")
    (folder / "config.json").unlink()
    report = send(folder)
    changed = {path: state for path, state in states(report).items() if state not in ("same",)}
    assert changed == {
        BIG[1]: "changed",
        "README.md": "changed",
        "new.txt": "new",
        "config.json": "kept",
        ATTRIBUTES: "kept",
    }
    assert server.stored == [hashlib.sha256(WEIGHTS + b"3").hexdigest()]
    assert held(server)[BIG[1]] == WEIGHTS + b"3"
    assert held(server)["config.json"] == FILES["config.json"]


def test_delete_removes_what_the_folder_lacks_and_no_hidden_file(server: HubServer, folder: Path) -> None:
    send(folder)
    (folder / "config.json").unlink()
    assert states(send(folder, delete=True))["config.json"] == "deleted"
    repository = server.repository("model", REPO)
    assert repository is not None
    now = repository.commits[repository.refs["main"]]
    assert "config.json" not in now
    assert ATTRIBUTES in now


def test_a_dry_run_changes_nothing(server: HubServer, folder: Path) -> None:
    report = send(folder, dry_run=True)
    assert report.dry_run
    assert report.commit is None
    assert report.created
    assert set(states(report).values()) == {"new"}
    assert server.repository("model", REPO) is None
    send(folder)
    (folder / "README.md").write_bytes(b"# other\n")
    report = send(folder, dry_run=True)
    assert states(report)["README.md"] == "changed"
    assert report.bytes == 8
    assert held(server)["README.md"] == FILES["README.md"]
    assert {r.method for r in server.requests[-3:]} == {"GET"}


def test_only_some_files(server: HubServer, folder: Path) -> None:
    send(folder, only=["*.gguf", "README.md"])
    assert set(held(server)) == {"tiny.Q4_0.gguf", "README.md"}
    with pytest.raises(UsageError, match=r"only=\*\.bin: no file of .* matches"):
        send(folder, only=["*.bin"])


@pytest.mark.parametrize("size", [1000, 320_000])
def test_a_store_that_asks_for_parts(server: HubServer, folder: Path, size: int) -> None:
    server.part_size = size
    send(folder)
    assert held(server) == FILES


# -- branches --------------------------------------------------------------------------------------------------------


def test_a_branch_holds_its_variant_and_nothing_of_main(server: HubServer, folder: Path) -> None:
    send(folder)
    (folder / BIG[0]).write_bytes(WEIGHTS + b"8")
    (folder / BIG[1]).unlink()
    report = send(folder, branch="auto")
    name = "gptq-4bit-32g-actorder_True"
    assert report.branch == name
    assert BIG[1] not in held(server, branch=name)
    assert held(server, branch=name)[BIG[0]] == WEIGHTS + b"8"
    assert held(server) == FILES
    assert send(folder, branch="auto").commit == report.commit
    got = Path(snapshot_download(REPO, revision=name))
    assert (got / BIG[0]).read_bytes() == WEIGHTS + b"8"


def test_a_branch_of_a_new_repository(server: HubServer, folder: Path) -> None:
    send(folder, branch="gptq-8bit--1g-actorder_False")
    assert held(server, branch="gptq-8bit--1g-actorder_False") == FILES
    assert held(server) == {}


def test_names_of_branches(folder: Path) -> None:
    assert branch_of(folder) == "gptq-4bit-32g-actorder_True"
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {**GPTQ, "group_size": -1, "desc_act": False}})
    )
    assert branch_of(folder) == "gptq-4bit--1g-actorder_False"
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no GPTQ folder"):
        send(folder, branch="auto")
    for bad in ("a..b", "/a", "a b", "a/", "x.lock", "-a"):
        with pytest.raises(UsageError, match="not a name for a branch"):
            send(folder, branch=bad)


# -- public and private ----------------------------------------------------------------------------------------------


def test_visibility_is_said_and_never_changed(server: HubServer, folder: Path, recorder: Recorder) -> None:
    server.commit("someone/open", {ATTRIBUTES: b""})
    server.commit("someone/closed", {ATTRIBUTES: b""}, private=True)
    assert not send(folder, "someone/open", progress=recorder).private
    assert "someone/open is public already" in recorder.warnings[0]
    assert send(folder, "someone/closed", public=True, progress=recorder).private
    assert "someone/closed is private and stays so" in recorder.warnings[1]
    private = [server.repository("model", f"someone/{name}").private for name in ("open", "closed")]  # type: ignore[union-attr]
    assert private == [False, True]
    send(folder, progress=recorder)
    assert any("will be private" in note for note in recorder.notes)


def test_a_name_without_owner_is_ones_own(server: HubServer, folder: Path) -> None:
    assert send(folder, "tiny-GPTQ").repo == REPO


# -- what goes wrong -------------------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[QuantkitError] = OutputError, **options: Any) -> str:
    with pytest.raises(kind) as error:
        send(folder, **options)
    assert TOKEN not in str(error.value)
    return str(error.value)


def test_a_wrong_token_is_one_line(server: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf-home" / "token").write_text("hf_wrong")
    message = refused(folder)
    assert message.startswith(f"{REPO}: the Hub does not accept the token")
    assert "\n" not in message
    assert "hf_wrong" not in message
    assert "does not accept the token" in refused(folder, repo="tiny")


def test_no_token_asks_for_one_before_any_request(server: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf-home" / "token").unlink()
    assert "hf auth login" in refused(folder)
    assert server.requests == []


def test_a_dry_run_needs_no_token(server: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf-home" / "token").unlink()
    report = send(folder, dry_run=True)
    assert set(states(report).values()) == {"new"}
    recorder = Recorder()
    report = send(folder, dry_run=True, repo="tiny", progress=recorder)
    assert (report.repo, report.looked) == ("tiny", False)
    assert "without a look at the Hub every file counts as new" in recorder.notes[0]


def test_somebody_elses_repository(server: HubServer, folder: Path, naps: list[float]) -> None:
    assert "may not write there" in refused(folder, repo="other/model")
    assert naps == []
    assert "OWNER/NAME" in refused(folder, UsageError, repo="a/b/c")


def test_offline(folder: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(folder)
    recorder = Recorder()
    report = send(folder, dry_run=True, progress=recorder)
    assert (report.looked, set(states(report).values()), naps) == (False, {"new"}, [])
    assert "not looked at" in next(iter(report.lines()))
    assert recorder.notes == ["HF_HUB_OFFLINE is set; without a look at the Hub every file counts as new"]


def test_a_connection_dropped_within_an_object_is_taken_up_again(server: HubServer, folder: Path) -> None:
    server.cut(oid(BIG[1]), after=1000)
    assert send(folder).commit
    assert held(server) == FILES
    assert server.stored.count(oid(BIG[0])) == 1


@pytest.mark.parametrize("fault", ["cut", "fail"])
def test_after_a_failure_the_same_command_sends_what_is_missing(server: HubServer, folder: Path, fault: str) -> None:
    last = BIG[2]
    if fault == "cut":
        server.cut(oid(last), after=1000, times=None)
    else:
        server.fail(oid(last), 503, times=None)
    message = refused(folder)
    assert "the same command goes on" in message
    assert "X-Amz-Signature" not in message
    assert sorted(server.stored) == sorted(oid(name) for name in BIG[:2])
    assert held(server) == {}
    server.heal()
    server.stored.clear()
    send(folder)
    assert server.stored == [oid(last)]
    assert held(server) == FILES


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_commit_that_fails_is_tried_again(server: HubServer, folder: Path, naps: list[float], status: int) -> None:
    server.fail("commit", status, times=2)
    send(folder)
    assert held(server) == FILES
    assert commits(server) == 3
    assert sorted(server.stored) == sorted(oid(name) for name in BIG)
    assert naps == [2, 8]


def test_attempts_end(server: HubServer, folder: Path, naps: list[float]) -> None:
    server.fail("commit", 503, times=None)
    message = refused(folder)
    assert "the same command goes on" in message
    assert naps == [2, 8, 30]
    assert commits(server) == 4


def test_a_commit_whose_answer_is_lost_is_not_made_twice(server: HubServer, folder: Path) -> None:
    server.cut("commit", after=0)
    report = send(folder)
    assert commits(server) == 1
    repository = server.repository("model", REPO)
    assert repository is not None
    assert report.commit == repository.refs["main"]
    assert held(server) == FILES


def test_nobodys_commit_is_overwritten(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(folder)
    (folder / "README.md").write_bytes(b"# mine\n")
    from quantkit.verbs.publish import remote

    look = remote.Remote.look

    def look_too_early(self: Any) -> Any:
        state = look(self)
        server.commit(REPO, {**held(server), "README.md": b"# theirs\n", ATTRIBUTES: b"*.bin filter=lfs"})
        return state

    monkeypatch.setattr(remote.Remote, "look", look_too_early)
    assert "somebody has committed" in refused(folder)
    assert held(server)["README.md"] == b"# theirs\n"


def test_a_server_that_is_gone(server: HubServer, folder: Path, naps: list[float]) -> None:
    server.stop()
    assert "cannot be reached" in refused(folder)
    assert [nap for nap in naps if nap in (2, 8, 30)][-1] == 30


def test_bars_of_the_client_are_left_as_they_were(folder: Path) -> None:
    before = are_progress_bars_disabled()
    send(folder)
    assert are_progress_bars_disabled() == before


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        send(tmp_path / "nothing")
    (tmp_path / "empty" / ".cache").mkdir(parents=True)
    (tmp_path / "empty" / ".cache" / "x").write_text("")
    with pytest.raises(UsageError, match="holds nothing to publish"):
        send(tmp_path / "empty")


# -- verifying first -------------------------------------------------------------------------------------------------


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for `quantkit.verbs.verify`: what it was asked, and the problems that it finds."""
    told: dict[str, Any] = {"problems": []}

    def verify(path: Path, *, trust_remote_code: bool, progress: Any) -> Any:
        told.update(path=path, trusted=trust_remote_code)
        return types.SimpleNamespace(problems=told["problems"])

    def glance(path: Path, trust_remote_code: bool, progress: Any) -> Any:
        told["glanced"] = path
        return types.SimpleNamespace(problems=told["problems"])

    stands_in: Any = types.SimpleNamespace(verify=verify, glance=glance)
    monkeypatch.setitem(sys.modules, "quantkit.verbs.verify", stands_in)
    return told


def test_a_folder_with_problems_is_not_published(server: HubServer, folder: Path, verified: dict[str, Any]) -> None:
    verified["problems"] = [f"tensor {i}: broken" for i in range(5)]
    message = refused(folder, verify=True)
    assert "tensor 0: broken; tensor 1: broken; tensor 2: broken; 2 more" in message
    assert server.repository("model", REPO) is None
    send(folder, verify=False)
    assert held(server) == FILES


def test_a_sound_folder_is_verified_and_published(server: HubServer, folder: Path, verified: dict[str, Any]) -> None:
    send(folder, verify=True, dry_run=True)
    assert verified == {"problems": [], "glanced": folder}
    send(folder, verify=True)
    assert verified == {"problems": [], "glanced": folder, "path": folder, "trusted": False}
    assert held(server) == FILES


def test_a_run_described_verified_published_and_pulled_back(
    server: HubServer, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    out = tmp_path / "tiny-GPTQ"
    quantkit.gptq(make_model("llama"), out, group_size=32, calibration=tiny_tokens, evaluate=False)
    card(out, repo=REPO, licence="mit", base_model=["someone/tiny"])
    publish(out, REPO)
    got = Path(snapshot_download(REPO))
    assert {p.name: p.read_bytes() for p in got.iterdir() if p.name != ATTRIBUTES} == {
        p.name: p.read_bytes() for p in out.iterdir()
    }
    assert quantkit.verify(got, generate=False).problems == []
    (out / "tokenizer.json").unlink()
    assert "not published, `quantkit verify` finds" in refused(out, verify=True)


# -- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; the token is in neither."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert "Bearer" not in out + err
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err


def test_the_command(server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "publish", folder, REPO, "--no-verify", "--dry-run")
    assert code == 0
    assert f"would send 6 files to {REPO}, branch main (private, new)" in out.splitlines()
    assert any(line.split() == ["new", "320.0", "kB", BIG[0]] for line in out.splitlines())
    code, out, _ = run(capsys, "publish", folder, REPO, "--no-verify", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"repo", "branch", "private", "created", "changes", "bytes", "commit", "dry_run", "looked"} == set(report)
    code, out, _ = run(capsys, "publish", folder, REPO, "--no-verify")
    assert code == 0
    assert f"{REPO}, branch main (private): nothing to send" in out


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_no_output_holds_the_token(
    server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str], debug: tuple[str, ...]
) -> None:
    """A server that quotes the request in its answer would have a traceback quote it."""
    server.commit(REPO, {ATTRIBUTES: b""})
    server.quoted = True
    server.fail("commit", 500, times=None)
    code, _, err = run(capsys, "publish", folder, REPO, "--no-verify", *debug)
    assert code == 1
    assert "the same command goes on" in err
    assert ("Traceback" in err) == bool(debug)
    server.heal()
    server.fail("", 500, times=None)
    code, _, err = run(capsys, "publish", folder, REPO, "--no-verify", *debug)
    assert code == 1
    assert "the same command goes on" in err


def test_no_option_takes_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "publish", "--help")
    assert code == 0
    assert "--token" not in out
