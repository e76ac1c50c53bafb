"""Steps of a release: what is done again replaces what the release wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Recorder

from quantkit.errors import OutputError, QuantkitError
from quantkit.runs.journal import Journal
from quantkit.runs.ledger import Ledger, locked
from quantkit.runs.outputs import staged_files, staged_folder
from quantkit.runs.steps import Step, run_steps


def steps(out: Path, text: str, fails: bool = False) -> list[Step]:
    """A variant of two files that holds this text, and its card."""

    def variant(_: frozenset[str], again: bool) -> None:
        with staged_folder(out / "variant", force=again) as folder:
            (folder / "model").write_text(text)
            (folder / "quantkit.json").write_text("{}")
            if fails:
                raise QuantkitError("no")

    def card(_: frozenset[str], again: bool) -> None:
        with staged_files(out / "variant" / "README.md", force=True) as folder:
            (folder / "README.md").write_text(f"of {text}")

    decides = {"text": text}
    return [
        Step("variant", out / "variant", variant, decides),
        Step("card", out / "variant" / "README.md", card, decides, ("variant",), by_hand=True),
    ]


def run(out: Path, text: str, recorder: Recorder, fails: bool = False) -> list[str]:
    with locked(out):
        return [outcome.status for outcome in run_steps(steps(out, text, fails), Ledger(out), recorder)]


def held(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_the_users_stays_however_often_a_step_is_done(tmp_path: Path, recorder: Recorder) -> None:
    assert run(tmp_path, "one", recorder) == ["done", "done"]
    assert run(tmp_path, "one", recorder) == ["unchanged", "unchanged"]
    (tmp_path / "variant" / "notes").mkdir()
    (tmp_path / "variant" / "notes" / "mine.md").write_text("mine")
    for text in ("two", "three", "four"):
        assert run(tmp_path, text, recorder) == ["done", "done"]
        own = {"model": text, "quantkit.json": "{}", "README.md": f"of {text}"}
        assert held(tmp_path / "variant") == own | {"notes/mine.md": "mine"}
    assert not recorder.warnings
    assert sorted(path.name for path in tmp_path.iterdir()) == [".release", "variant"]


def test_a_card_that_was_changed_by_hand_stays(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path, "one", recorder)
    (tmp_path / "variant" / "README.md").write_text("two hours of notes")
    for text in ("one", "two", "three"):
        recorder.warnings.clear()
        run(tmp_path, text, recorder)
        assert (tmp_path / "variant" / "README.md").read_text() == "two hours of notes"
        assert "README.md was not written by this release and stays as it is" in recorder.warnings[0]
    (tmp_path / "variant" / "README.md").unlink()
    run(tmp_path, "three", recorder)
    assert (tmp_path / "variant" / "README.md").read_text() == "of three"


def test_a_file_of_the_users_that_has_the_name_of_a_new_one_is_kept_beside(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path, "one", recorder)
    (tmp_path / "variant" / "model").write_text("patched by hand")
    run(tmp_path, "two", recorder)
    assert held(tmp_path / "variant")["model"] == "two"
    assert held(tmp_path / "variant")["model.old"] == "patched by hand"
    assert any("model.old" in text for text in recorder.warnings)


def test_a_file_on_the_way_that_was_spoilt_is_made_anew(tmp_path: Path, recorder: Recorder) -> None:
    hidden = tmp_path / ".release" / "files"

    def once(text: str) -> str:
        with locked(tmp_path):
            (outcome,) = run_steps(steps(hidden, text)[:1], Ledger(tmp_path), recorder)
        return outcome.status

    assert [once("one"), once("two")] == ["done", "done"]
    (hidden / "variant" / "model").write_text("spoilt")
    assert [once("two"), once("two")] == ["done", "unchanged"]
    assert held(hidden / "variant") == {"model": "two", "quantkit.json": "{}", "model.old": "spoilt"}


def test_the_old_one_stands_until_the_new_one_is_whole(tmp_path: Path, recorder: Recorder) -> None:
    run(tmp_path, "one", recorder)
    before = held(tmp_path / "variant")
    assert run(tmp_path, "two", recorder, fails=True) == ["failed", "skipped"]
    assert held(tmp_path / "variant") == before
    assert run(tmp_path, "two", recorder) == ["done", "done"]


def test_a_journal_of_a_stranger_and_one_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / ".release").mkdir()
    bad = {"step": "variant", "out": "../..", "fingerprint": "", "before": [], "output": {"home": ""}, "files": {}}
    Journal(tmp_path / ".release" / "journal").append(bad)
    with pytest.raises(OutputError, match=r"record 1 is damaged; remove .*release and the folders"):
        Ledger(tmp_path)
    (tmp_path / ".release" / "journal").unlink()
    (tmp_path / ".release" / "ledger.json").write_text(json.dumps({"steps": {"variant": {"fingerprint": "ab"}}}))
    with pytest.raises(OutputError, match="written by an older version; remove"):
        Ledger(tmp_path)
