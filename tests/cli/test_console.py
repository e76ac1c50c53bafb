"""What reaches a terminal: text of files and of others drives none, and a line stays a line."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from quantkit.cli import console
from quantkit.cli.app import _run
from quantkit.errors import visible
from quantkit.report import Column, Line, Rule, Table, Text

pytestmark = pytest.mark.fast

HOSTILE = "name\x1b]0;title\x07\u202e\x9b2J\r\nerror: all is well\u2066"
SHOWN = "name\\x1b]0;title\\x07\\u202e\\x9b2J\\x0d\\x0aerror: all is well\\u2066"
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def drives(text: str) -> list[str]:
    return [one for one in text if one not in "\n\t" and (unicodedata.category(one) == "Cc" or one in BIDIRECTIONAL)]


def test_every_character_that_drives_a_terminal_is_written_out() -> None:
    every = "".join(map(chr, [*range(0x20, 0x300), *range(0x2000, 0x2100), *range(0x20)]))
    assert drives(visible(every, lines=True)) == []
    assert not {"\n", "\t"} & set(visible(every))
    assert visible("caf\u00e9 \u4f60\u597d \U0001f680 a\u200db") == "caf\u00e9 \u4f60\u597d \U0001f680 a\u200db"


def test_halves_of_characters_are_written_out_and_long_words_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with an escaped half of a surrogate pair is in no stream's encoding."""
    console.say("shard \ud800 is missing: " + "k" * 5000 + "; download it")
    console.show(["shard \udfff"])
    console.print_json({"shard": "\ud800"})
    out, err = capsys.readouterr()
    assert err.startswith("shard \\ud800 is missing: kkk")
    assert err.endswith("; download it\n")
    assert len(err) < 1000
    assert out.splitlines()[0] == "shard \\udfff"
    assert json.loads(out.splitlines()[1]) == {"shard": "\ud800"}


def test_notes_warnings_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bars = console.Bars(quiet=False)
    bars.note(HOSTILE)
    bars.warn(HOSTILE)
    with bars.phase(HOSTILE, 1) as advance:
        bars.detail(HOSTILE)
        advance(1)
    console.say("x" * 10**6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [SHOWN, f"warning: {SHOWN}"]
    assert lines[2].startswith(f"{SHOWN}: 1/1 in ")
    assert len(lines) == 4
    assert len(lines[3]) < 10_000


def test_results_and_tables_are_shown_and_drive_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table((Column(HOSTILE),), ((HOSTILE,),))
    console.show([HOSTILE, Line(HOSTILE, ""), Rule(HOSTILE), table, Text("a\n\tb\x07")])
    console.print_json({HOSTILE: [HOSTILE]})
    out = capsys.readouterr().out
    assert drives(out) == []
    assert not [line for line in out.splitlines() if line.startswith("error:")]
    assert "a\n        b\\x07\n" in out
    assert json.loads(out.splitlines()[-1]) == {HOSTILE: [HOSTILE]}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ('"\\e[31mkey": 1\nname: x\nvariants: []\n', "\\x1b[31mkey: no such key"),
        ("name: x\na: &a [1]\nvariants: *a\n", "an alias: write the value out"),
        ("name: x\nvariants: [{kind: gguf, type: q8_0}]\nevaluation: {texts: &t [*t]}\n", "an alias"),
        ("name: x\nsource: {model: " + "a" * 5000 + "}\nvariants: [{kind: gguf, type: q8_0}]\n", "aaaa"),
        ("name: x\nsource: {model: ~nouser/x}\nvariants: [{kind: gguf, type: q8_0}]\n", "nouser"),
        ("name: x\ncalibration: {samples: " + "9" * 5000 + "}\nvariants: []\n", "no YAML"),
        ("name: x\nvariants: !!bool maybe\n", "no YAML"),
        ("name: x\nvariants: []\ncalibration: {? " + "- " * 3000 + "a : 1}\n", "no YAML"),
        ("name: x\nvariants: []\ncalibration:\n  ? '" + "- " * 3000 + "'\n  : 1\n", "calibration: - - -"),
        ("name: x\nvariants: " + "x" * 10**5 + "\n", "variants: give a list (got 'xxx"),
    ],
    ids=["escape", "alias", "itself", "long", "home", "digits", "tag", "lists", "key", "value"],
)
def test_a_strangers_recipe_is_refused_in_one_short_line(
    recipe: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    assert _run(["release", str(tmp_path / "r.yaml"), "--dry-run", "--out", str(tmp_path / "out")]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < 2000
    assert drives(err) == []


def test_what_holds_of_several_models_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    bars = console.Bars(quiet=False)
    for _ in range(3):
        bars.note("a ggjt file says no context")
        bars.warn("windows are long")
    bars.note("windows are long")
    said = ["a ggjt file says no context", "warning: windows are long", "windows are long"]
    assert capsys.readouterr().err.splitlines() == said


def test_a_long_note_is_broken_at_words_and_an_error_stays_to_be_copied(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "quantkit.bars.log", lambda: Console(stderr=True, force_terminal=True, width=30, soft_wrap=True)
    )
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console.Bars(quiet=False).note("a ggjt file says neither the epsilon nor the base")
    console.say("interrupted; go on with: quantkit gptq model --resume")
    assert capsys.readouterr().err.splitlines() == [
        "a ggjt file says neither the",
        "epsilon nor the base",
        "interrupted; go on with: quantkit gptq model --resume",
    ]


def test_a_long_line_is_broken_at_words_and_a_path_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = "  take out80: of 2 variants within 2,000,000 bytes it diverges least: 1,343,808 bytes"
    path = "wrote /a/place/with/a/long/name/that/somebody/gave/it/for/reasons"
    lines = [shown, Line(shown, "red"), path]
    console.show(lines)
    assert capsys.readouterr().out.splitlines() == [shown, shown, path]  # where there is no terminal
    monkeypatch.setattr(console, "results", lambda: Console(force_terminal=True, width=40, soft_wrap=True))
    console.show(lines)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    broken = ["  take out80: of 2 variants within", "  2,000,000 bytes it diverges least:", "  1,343,808 bytes"]
    assert [line.rstrip() for line in out] == [*broken, *broken, path]
