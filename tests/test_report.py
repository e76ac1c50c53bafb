"""Reports: what their JSON is, what is shown of them, and what they are read back from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console
from support.reports import CASES, DISPLAY, OUT, SAID

from quantkit.cli import console
from quantkit.errors import QuantkitError
from quantkit.progress import counted
from quantkit.report import LEFT_OUT, Column, Line, Report, ReportError, Rule, Shown, Table, called
from quantkit.verbs.verify import Verified, VerifyReport

FIRST = [name for name, said in SAID.items() if "json" in said]


def kinds(of: type[Report] = Report) -> set[type[Report]]:
    return {of}.union(*map(kinds, of.__subclasses__()))


def test_one_is_counted_as_one() -> None:
    assert [counted(number, "answer") for number in (0, 1, 2)] == ["0 answers", "1 answer", "2 answers"]
    assert counted(1, "matrix is", "matrices are") == "1 matrix is"


# -- the reports of the verbs ----------------------------------------------------------------------------------------


def test_every_verb_s_report_is_here() -> None:
    parts = {"Numbers", "_Named", "ModelResult", "TextResult", "Harness", "Verified", "Spent"}
    theirs = {kind for kind in kinds() if kind.__module__.startswith("quantkit.") and kind.__name__ not in parts}
    assert {type(CASES[name]) for name in FIRST} == theirs - {Report}


@pytest.mark.parametrize("name", FIRST)
def test_json_has_these_keys_in_this_order(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json(CASES[name].as_dict())
    assert capsys.readouterr().out == json.dumps(SAID[name]["json"], ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_same_text_is_shown(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.results(), "width", 80)
    console.show(CASES[name].lines(**DISPLAY.get(name, {})))
    assert capsys.readouterr().out.splitlines() == SAID[name].get("text", [])


@pytest.mark.parametrize("name", [name for name in FIRST if not name.startswith("samples")])
def test_what_was_written_is_read_back(name: str) -> None:
    report, content = CASES[name], SAID[name]["json"]
    left_out = {"compare": {"out": OUT}, "verify": {"folder_problems": ("two models",)}}
    back = type(report).of(content, **left_out.get(name, {}))
    assert json.dumps(back.as_dict()) == json.dumps(content)
    assert back == report


def test_samples_lack_their_tokens() -> None:
    with pytest.raises(ReportError, match="dataset is unknown"):
        type(CASES["samples"]).of(SAID["samples"]["json"])


def test_problems_that_rest_on_what_is_left_out_are_kept() -> None:
    report = VerifyReport("two", (Verified("a", "gguf", ("bad",)), Verified("b", "gguf", ())), ("both",))
    assert (report.ok, report.problems) == (False, ["both", "a: bad"])
    assert VerifyReport.of(report.as_dict()).problems == ["both", "a: bad"]


# -- the base --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    name: str
    share: float
    kind: Literal["old", "new"] = "old"


@dataclass(frozen=True)
class Whole(Report):
    place: Path
    parts: tuple[Part, ...]
    best: Part | None
    counts: Mapping[int, list[int]]
    noted: dict[str, Any] = field(default_factory=dict)
    words: str = field(default="", metadata=called("text"))
    secret: str = field(default="none", metadata=LEFT_OUT)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.parts) + len(self.secret))


WHOLE = Whole(Path("/a/b"), (Part("x", 0.5), Part("y", 1, "new")), Part("x", 0.5), {4: [1, 2]}, {"k": None}, "hello")
WRITTEN: dict[str, Any] = {
    "place": "/a/b",
    "parts": [{"name": "x", "share": 0.5, "kind": "old"}, {"name": "y", "share": 1, "kind": "new"}],
    "best": {"name": "x", "share": 0.5, "kind": "old"},
    "counts": {"4": [1, 2]},
    "noted": {"k": None},
    "text": "hello",
    "size": 6,
}


def test_fields_of_every_kind_become_json_and_come_back() -> None:
    assert json.loads(json.dumps(WHOLE.as_dict())) == WRITTEN
    assert list(WHOLE.as_dict()) == list(WRITTEN)
    assert Whole.of(WRITTEN) == WHOLE
    assert Whole.of(WHOLE.as_dict()) == WHOLE  # which JSON was not made of


def test_keys_with_a_default_may_be_missing() -> None:
    least = {"place": "p", "parts": [], "best": None, "counts": {}}
    assert Whole.of(least) == Whole(Path("p"), (), None, {})
    assert Whole.of(least, secret="much").size == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "more is unknown"),
        ({"words": "hello"}, "words is unknown"),
        ({"secret": "none"}, "secret is unknown"),
        ({"place": 3}, "place is 3, not of type Path"),
        ({"size": "6"}, "size is '6', not of type int"),
        ({"size": True}, "size is True, not of type int"),
        ({"best": []}, "best is no object"),
        ({"best": {"name": "x"}}, "best.share is missing"),
        ({"parts": None}, "parts is None, not of type tuple"),
        (
            {"parts": [{"name": "x", "share": 1.5}, {"name": "y", "share": "1"}]},
            r"parts\[1\].share is '1', not of type f",
        ),
        ({"parts": [{"name": "x", "share": 1, "kind": "odd"}]}, r"parts\[0\].kind is 'odd', not one of old, new"),
        ({"parts": [{"name": "x", "share": 1, "weight": 1}]}, r"parts\[0\].weight is unknown"),
        ({"counts": {"4": [1, "2"]}}, r"counts.4\[1\] is '2', not of type int"),
        ({"counts": {"four": []}}, "counts.four is 'four', not of type int"),
        ({"counts": [4]}, r"counts is \[4\], not of type Mapping"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=f"^{message}") as error:
        Whole.of({**WRITTEN, **change})
    assert isinstance(error.value, QuantkitError)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ReportError, match=r"^parts is missing$"):
        Whole.of({key: value for key, value in WRITTEN.items() if key not in ("parts", "counts")})
    with pytest.raises(ReportError, match=r"^this is no object$"):
        Whole.of([WRITTEN])


# -- showing ---------------------------------------------------------------------------------------------------------


def shown(*lines: Shown, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a screen of 30 characters, or where there is none."""
    screen = StringIO()
    out = Console(
        file=screen,
        width=30,
        soft_wrap=True,
        emoji=False,
        highlight=False,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
    )
    monkeypatch.setattr(console, "results", lambda: out)
    console.show(lines)
    return screen.getvalue()


def test_lines_are_literal_and_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[red]:smile: /a/long/path/that/is/wider/than/the/screen 12"
    assert shown(text, terminal=False, monkeypatch=monkeypatch) == text + "\n"
    assert shown(Line(text, "red"), terminal=True, monkeypatch=monkeypatch) == f"\x1b[31m{text}\x1b[0m\n"
    assert shown(Rule("window 0"), terminal=False, monkeypatch=monkeypatch) == "window 0 " + "─" * 21 + "\n"


def test_tables_are_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a-model-of-a-long-name[1]", "1.00"], ["a-model-b", "20.00"]]
    console.show([Table([Column("model", "left"), Column("size", drop=1)], rows, short=True)])
    assert capsys.readouterr().out.splitlines() == [
        "model                       size",
        "─────────────────────────  ─────",
        "a-model-of-a-long-name[1]   1.00",
        "a-model-b                  20.00",
    ]
