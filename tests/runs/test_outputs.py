"""How outputs take their place: what is in the way, what is kept, what a kill leaves and who sweeps it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel

import quantkit
from quantkit.containers.gguf import GgufWriter
from quantkit.containers.hf.write import ShardedWriter
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.runs import renames
from quantkit.runs.journal import Journal
from quantkit.runs.keeping import Keeping, keeping
from quantkit.runs.outputs import check_output, settle, staged_files, staged_folder, staging_of
from quantkit.runs.places import folder_of, in_the_way
from quantkit.runs.record import check_unchanged, origin
from quantkit.sources import open_source


def write(out: Path, text: str = "new", force: bool = False) -> None:
    with staged_folder(out, force) as folder:
        (folder / "model").write_text(text)
        (folder / "quantkit.json").write_text("{}")


def write_files(out: Path, *names: str, force: bool = False) -> None:
    with staged_files(out, force, names) as folder:
        for name in names or (out.name,):
            (folder / name).write_text("new")


def tree(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones too; of links where they lead."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(params=["renameat2", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2(2), and as where the system or the file system has none."""
    if request.param == "plain":
        monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    return str(request.param)


# -- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either")
def test_what_appears_while_a_run_is_at_work_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run() -> None:
        with staged_folder(out) as folder:
            (folder / "model").write_text("hours of work")
            out.mkdir()
            (out / "thesis").write_text("years of work")

    with pytest.raises(OutputError, match=r"already exists, which it did not.*finished output is kept as .*staged$"):
        run()
    assert (out / "thesis").read_text() == "years of work"
    assert (folder_of(out) / "staged" / "model").read_text() == "hours of work"
    with pytest.raises(UsageError, match=r"what was there before is there; the finished output is kept as"):
        write(out)
    with pytest.raises(UsageError, match="is not an output of quantkit"):
        write(out, force=True)
    assert (folder_of(out) / "staged" / "model").read_text() == "hours of work"
    shutil.rmtree(out)
    (folder_of(out) / "staged").rename(out)  # as its user was told
    write(tmp_path / "other")
    settle(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.usefixtures("either")
def test_of_several_files_all_take_their_place_or_none(tmp_path: Path) -> None:
    out, names = tmp_path / "m.gguf", ("m-1.gguf", "m-2.gguf", "m-3.gguf")
    (tmp_path / "m-2.gguf").write_text("of another")
    with pytest.raises(UsageError, match=r"m-2\.gguf already exists; use --force to replace it"):
        write_files(out, *names)
    assert tree(tmp_path) == {"m-2.gguf": "of another"}
    (tmp_path / "m-2.gguf").unlink()

    def run() -> None:
        with staged_files(out, False, names) as folder:
            for name in names:
                (folder / name).write_text("new")
            (tmp_path / "m-3.gguf").write_text("mine")

    with pytest.raises(OutputError, match=r"m-3\.gguf already exists"):
        run()
    left = {name: text for name, text in tree(tmp_path).items() if "unfinished" not in name}
    assert left == {"m-3.gguf": "mine"}
    write_files(out, *names, force=True)
    assert tree(tmp_path) == dict.fromkeys(names, "new")


def test_what_comes_between_the_last_look_and_the_rename_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.runs import outputs

    move = outputs.move_to_free

    def late(staged: Path, target: Path) -> None:
        target.write_text("mine")
        move(staged, target)

    monkeypatch.setattr(outputs, "move_to_free", late)
    with pytest.raises(OutputError, match="already exists, which it did not"):
        write_files(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    assert (folder_of(tmp_path / "out") / "staged" / "out").read_text() == "new"


@pytest.mark.usefixtures("either")
def test_force_replaces_outputs_of_quantkit_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(UsageError, match="already exists; use --force"):
        write(out)
    write(out, force=True)
    assert tree(tmp_path) == {"out/model": "new", "out/quantkit.json": "{}"}
    out.joinpath("quantkit.json").unlink()
    with pytest.raises(UsageError, match="is not an output of quantkit"):
        write(out, force=True)
    shutil.rmtree(out)
    out.mkdir()  # an empty one is nobody's
    write(out)
    write_files(tmp_path / "file")
    write_files(tmp_path / "file", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


# -- where it lies ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either")
def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "old").mkdir(parents=True)
    (disk / "old" / "quantkit.json").write_text("{}")
    (tmp_path / "out").symlink_to(disk / "old")
    write(tmp_path / "out", force=True)
    assert tree(disk) == {"old/model": "new", "old/quantkit.json": "{}"}
    assert os.readlink(tmp_path / "out") == str(disk / "old")
    (tmp_path / "through").symlink_to(disk)
    write_files(tmp_path / "through" / "x.gguf")
    (tmp_path / "file").symlink_to(disk / "x.gguf")
    write_files(tmp_path / "file", force=True)
    assert sorted(path.name for path in disk.iterdir()) == ["old", "x.gguf"]
    assert (tmp_path / "file").is_symlink()
    with pytest.raises(UsageError, match="is a link, and what is written has a file beside it"):
        write_files(tmp_path / "file", "file", "file.json", force=True)
    for place in (tmp_path / "lost", tmp_path / "lost" / "out"):
        (tmp_path / "lost").unlink(missing_ok=True)
        (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
        for verb in (write, write_files):
            with pytest.raises(UsageError, match=r"leads nowhere: .* is a link to"):
                verb(place)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("/", True, "is a mount point"),
        ("/", False, "is a mount point"),
        ("/proc", True, "is a mount point"),
        (".", True, "is the folder that this runs in"),
        ("..", True, "is the folder that this runs in, or above it"),
        ("file", True, "is a file; name a folder"),
        ("file/out", True, "is no folder; name another"),
        ("file/out", False, "is no folder; name another"),
        ("folder", False, "is a folder; name a file"),
        ("/dev/null", False, "is no regular file"),
    ],
)
def test_places_that_no_output_can_take(
    name: str, folder: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd" / "folder").mkdir(parents=True)
    (tmp_path / "cwd" / "file").touch()
    monkeypatch.chdir(tmp_path / "cwd")
    found = in_the_way(Path(os.path.abspath(name)), folder, True)
    assert found is not None
    assert said in found


def test_something_mounted_of_the_same_file_system_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    line = f"36 35 0:3 / {str(tmp_path / 'a b').replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw\n".encode()
    monkeypatch.setattr(Path, "read_bytes", lambda path: line if "mountinfo" in str(path) else read(path))
    (tmp_path / "a b").mkdir()
    assert "is a mount point" in str(in_the_way(tmp_path / "a b", True, True))
    assert in_the_way(tmp_path / "c", True, True) is None


def test_a_file_whose_name_ends_as_a_folder(make_model: MakeModel, tmp_path: Path) -> None:
    for end in ("/", "/."):
        with pytest.raises(UsageError, match="is a folder; name a file"):
            quantkit.ggml(make_model("llama"), f"{tmp_path}/new{end}", type="q8_0", pre="gpt-2")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_ends_as_a_file(make_model: MakeModel, tmp_path: Path) -> None:
    """`gptq --ggml` writes a folder, with the file in it."""
    model, said = make_model("llama"), "is a file's name, and a folder is written; name a folder"
    with pytest.raises(UsageError, match=rf"^out={tmp_path}/model\.gguf {said}$"):
        quantkit.gptq(model, tmp_path / "model.gguf", ggml="q4_0", dry_run=True)
    with pytest.raises(UsageError, match=said):
        quantkit.convert(model, tmp_path / "model.safetensors", dry_run=True)
    with pytest.raises(UsageError, match=said):
        quantkit.compare(model, make_model("llama", seed=1), out=tmp_path / "report.html")
    with pytest.raises(UsageError, match=said):
        quantkit.repack(model, to="awq", out=tmp_path / "model.gguf")
    with pytest.raises(SourceError, match="no name for how this tokenizer cuts"):  # a file's name is right there
        quantkit.repack(model, to="gguf", out=tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_the_umask_counts(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
        write_files(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


# -- one run at a time -----------------------------------------------------------------------------------------------


def test_a_second_run_into_one_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with staged_folder(tmp_path / "out") as folder:
        (folder / "model").write_text("first")
        for second in (write, write_files):
            with pytest.raises(UsageError, match="another run is writing it; wait for it, or name another"):
                second(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == {"model": "first"}


@contextmanager
def no_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    def lock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lock)
        yield


def test_a_file_system_without_locks_is_no_lock_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with no_locks(monkeypatch, errno.EWOULDBLOCK), pytest.raises(UsageError, match="another run is writing it"):
        write(out)
    shutil.rmtree(folder_of(out))
    with no_locks(monkeypatch, errno.ENOLCK):
        with staged_folder(out) as folder:
            (folder / "model").write_text("first")
            with pytest.raises(UsageError, match=rf"another run is writing it; .* \(process {os.getpid()}\)"):
                write(out)
        folder_of(out).mkdir()
        gone = subprocess.Popen(["true"])
        gone.wait()
        lock = folder_of(out) / "lock"
        lock.write_text(f"made by quantkit\n{os.uname().nodename} {gone.pid}\n")
        settle(out)
        assert not folder_of(out).exists()
        folder_of(out).mkdir()
        lock.write_text("made by quantkit\nelsewhere 17\n")
        with pytest.raises(UsageError, match=r"process 17 on elsewhere; if it is gone, remove .*lock"):
            settle(out)


# -- what is swept ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from quantkit.runs.outputs import staged_folder\n"
        "try:\n"
        "    with staged_folder(Path(sys.argv[1])) as folder: (folder / 'model').write_text('x' * 5000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    for most, said in ((0, "cannot write beside"), (2000, "nothing was left there")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a" / "out")],
            preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.stdout.startswith("OutputError"), done
        assert said in done.stdout
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_swept_that_quantkit_did_not_make(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "lock").touch()
    (victim / "staged").write_text("mine")

    def planted(make: Callable[[], None], said: str) -> None:
        make()
        before = tree(tmp_path)
        for dry_run in (True, False):
            with pytest.raises(UsageError, match=said):
                check_output(out, tmp_path / "model", force=True, dry_run=dry_run)
        with pytest.raises(UsageError, match=said):
            write(out, force=True)
        assert tree(tmp_path) == before
        staging = folder_of(out)
        staging.unlink() if staging.is_symlink() else shutil.rmtree(staging)

    def folder(**files: str) -> None:
        folder_of(out).mkdir()
        for name, text in files.items():
            (folder_of(out) / name).write_text(text)

    def with_a_pipe() -> None:
        folder(staged="x")
        os.mkfifo(folder_of(out) / "lock")

    def with_a_link() -> None:
        folder(lock="")
        (folder_of(out) / "staged").symlink_to(victim)

    planted(lambda: folder_of(out).symlink_to(victim), "is a link; move it away")
    planted(lambda: folder(lock="", thesis="mine"), "holds thesis, which quantkit did not make")
    planted(lambda: folder(staged="mine"), "was not made by quantkit")
    planted(lambda: folder(lock="mine", staged="mine"), "was not made by quantkit")
    planted(with_a_pipe, "was not made by quantkit")
    planted(with_a_link, "holds staged, which quantkit did not make")


def test_a_dry_run_sweeps_nothing_and_the_next_run_what_a_kill_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder_of(out) / "staged").mkdir(parents=True)
    (folder_of(out) / "staged" / "model").write_text("half")
    for name in ("lock", ".DS_Store", "run.json"):
        (folder_of(out) / name).touch()
    before = tree(tmp_path)
    check_output(out, tmp_path / "model", force=False, dry_run=True)
    assert tree(tmp_path) == before
    write_files(out)  # of another verb
    assert tree(tmp_path) == {"out": "new"}


def test_what_older_versions_left_is_swept_and_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.ab12cd34.partial/model.safetensors", ".out.ab12cd35.old/out/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("old")
    mine = [
        ".out.ab12cd36.partial/thesis.txt",
        ".out.partial/x.json",
        ".out.mine.old/x.json",
        ".outs.ab12cd34.old/x.json",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        check_output(out, tmp_path / "model", force=False)
    assert tree(tmp_path) == {"out/config.json": "old"} | dict.fromkeys(mine, "mine")


@pytest.mark.parametrize("finished", [True, False])
def test_a_kill_between_the_two_renames_of_force(finished: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with staging_of(out) as staging:
        staging.staged.mkdir()
        (staging.staged / "model").write_text("new")
        (staging.folder / "replaced").mkdir()
        inode = staging.staged.stat().st_ino
        staging.journal.append({"placing": None, "of": "out", "inodes": [inode], "carries": None})
        out.rename(staging.folder / "replaced" / "out")
        if finished:
            staging.staged.rename(out)
        staging.keep = True
    if finished:
        with pytest.raises(UsageError, match="already exists"):
            check_output(out, tmp_path / "model", force=False)
        assert tree(tmp_path) == {"out/model": "new"}
        return
    for _ in range(2):
        with pytest.raises(UsageError, match=r"was stopped while its output took its place, and what was there before"):
            write(out)
        assert tree(out) == {"model": "old", "quantkit.json": "{}"}
        assert (folder_of(out) / "staged" / "model").read_text() == "new"
    write(out, "newer", force=True)
    assert tree(tmp_path) == {"out/model": "newer", "out/quantkit.json": "{}"}


def test_a_journal_leads_to_no_other_place(tmp_path: Path) -> None:
    """As a stranger's archive may bring one: checksums without a secret are no seal against its writer."""
    out = tmp_path / "home" / "out"
    (folder_of(out) / "replaced").mkdir(parents=True)
    (folder_of(out) / "replaced" / "profile").write_text("evil")
    (folder_of(out) / "lock").write_text("made by quantkit\n")
    journal = Journal(folder_of(out) / "journal")
    for names in (["../profile"], [str(tmp_path / "profile")], [".."]):
        journal.rewrite({"placing": names, "of": "out", "inodes": [1], "carries": None})
        assert Journal(journal.path).damaged == 1
        settle(out)
        assert not (tmp_path / "profile").exists()
        folder_of(out).mkdir()
        (folder_of(out) / "lock").touch()
    journal.rewrite({"kept": 3})
    assert Journal(journal.path).damaged == 1


def test_what_is_the_users_in_an_output_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    state = out.joinpath("model").stat()
    for name, text in (("notes/mine.md", "mine"), ("quantkit.json", '{"by": "hand"}')):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    kept = Keeping(out, {"model": [[state.st_size, state.st_mtime_ns, ""]]}, lambda staged: None)
    with keeping(kept):
        write(out, force=True)
    assert tree(tmp_path / "out") == {
        "model": "new",
        "notes/mine.md": "mine",
        "quantkit.json": "{}",
        "quantkit.json.old": '{"by": "hand"}',
    }
    assert kept.beside == [out / "quantkit.json.old"]


# -- kills -----------------------------------------------------------------------------------------------------------

KILLED = r"""
import os, random, shutil, signal, sys, time
from pathlib import Path
from quantkit.errors import UsageError
from quantkit.runs import renames
from quantkit.runs.outputs import check_output, staged_folder

place, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(3)
if sys.argv[3] == "plain":
    renames._renameat2 = lambda *_: False

def write(text):
    with staged_folder(place / "out", force=True) as folder:
        for name in ("quantkit.json", "a", "b", "c"):
            (folder / name).write_text(text)

def found():
    return {path.read_text() for path in (place / "out").iterdir()} if (place / "out").exists() else None

write("old")
began = time.monotonic()
write("old")
seconds, gone, new = time.monotonic() - began, 0, 0
while kills:
    child = os.fork()
    if child == 0:
        write("new")
        os._exit(0)
    time.sleep(chance.uniform(0, 1.2 * seconds))
    os.kill(child, signal.SIGKILL)
    kills -= os.waitpid(child, 0)[1] == signal.SIGKILL
    gone += found() is None
    assert found() in ({"old"}, {"new"}) or sys.argv[3] == "plain", found()
    try:
        check_output(place / "out", place / "model", False)
    except UsageError:
        pass
    assert found() in ({"old"}, {"new"}), found()
    new += found() == {"new"}
    write("old")
    assert [path.name for path in place.iterdir()] == ["out"], list(place.iterdir())
print(gone, new)
"""


@pytest.mark.parametrize("way", ["renameat2", "plain"])
def test_killed_at_any_moment_an_output_is_whole(way: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "40", way],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_verbs_are_killed_while_they_write(tmp_path: Path) -> None:
    """One verb, a few times: `tests/support/kills.py` does it to all of them, at length."""
    script = Path(__file__).parents[1] / "support" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "kills"), "--kills", "2", "--only", "convert", "--way", "force"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "convert force: 2 kills" in done.stdout


# -- sources ---------------------------------------------------------------------------------------------------------


def test_a_source_that_changes_while_it_is_read_is_an_error(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    for name in ("model.safetensors", "config.json"):
        source = open_source(folder)
        origin(source)
        os.utime(folder / name, ns=(1, 1))
        with pytest.raises(SourceError, match=rf"{name} has changed while it was read; start again"):
            origin(source)
    source = open_source(folder)
    (folder / "README.md").write_text("no part of it")
    check_unchanged(source)


@pytest.mark.parametrize("verb", ["convert", "ggml"])
def test_no_output_is_made_of_a_source_that_changes(
    verb: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    holder: Any = {"convert": ShardedWriter, "ggml": GgufWriter}[verb]
    finish = holder.finish

    def changing(*arguments: Any) -> Any:
        os.utime(folder / "model.safetensors", ns=(1, 1))
        return finish(*arguments)

    monkeypatch.setattr(holder, "finish", changing)
    options: dict[str, Any] = {"pre": "gpt-2", "type": "q8_0"} if verb == "ggml" else {}
    with pytest.raises(SourceError, match="has changed while it was read"):
        getattr(quantkit, verb)(folder, out=tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
