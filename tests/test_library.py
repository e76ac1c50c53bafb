"""quantkit as a library: what a notebook's user types, and hears."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.cli import app as cli
from quantkit.cli.command import spec_of
from quantkit.errors import QuantkitError, QuantkitWarning, UsageError
from quantkit.verbs import _in_arguments

MakeModel = Callable[..., Path]
REPOSITORY = Path(__file__).parents[1]
TEXTS = [
    f"{number}: the quick brown fox jumps over the lazy dog while the user asks a question" for number in range(40)
]

NOTEBOOK = """
from pathlib import Path

import quantkit

folders: list[Path] = [Path("a"), Path("b")]
texts: list[str] = ["one text", "another"]


def notebook() -> float:
    made = quantkit.gptq(folders[0], "out", bits=4, group_size=64, calibration=texts, include="*.mlp.*", progress=True)
    rows = quantkit.perplexity(folders, against=made.out).results
    rows += quantkit.perplexity("out").results
    rows += quantkit.perplexity(Path("out")).results
    report = quantkit.compare(folders[0], folders, out="report", texts="text.txt")
    quantkit.card("out", reports=[report.out / "report.json"], branches={"other": Path("b")})
    quantkit.card("out", reports=report.out / "report.json", progress=False)
    quantkit.eval("out", out="results.json", task="arc_easy")
    return rows[0].perplexity
"""


def test_a_notebook_type_checks(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(script)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.fast
def test_names_are_listed_and_replace_nothing_of_python_s() -> None:
    shown = {name for name in dir(quantkit) if not name.startswith("__")}
    assert shown == {*cli.COMMANDS, "QuantkitError", "QuantkitWarning", "UsageError", "tune"}
    for name in cli.COMMANDS:
        text = re.sub(r"`[^`]*`", "", str(getattr(quantkit, name).__doc__))  # commands are to be typed
        assert re.search(r"(?<!\w)--[a-z]", text) is None, name
    assert callable(quantkit.eval)
    given: dict[str, Any] = {}
    exec("from quantkit import *", given)
    assert "gptq" in given
    assert [name for name in given if name in dir(__builtins__) and name != "__builtins__"] == []


@pytest.mark.fast
@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_docstrings_say_what_is_taken_returned_and_raised(verb: str) -> None:
    said = getattr(quantkit, verb).__doc__
    assert said.index("\nArgs:\n") < said.index("\nReturns:\n    ") < said.index("\nRaises:\n")
    own = [line for line in said.splitlines() if " --" in line and "`" not in line]
    spelled = {spec_of(verb).spelling(name) for name in spec_of(verb).model_fields}
    assert [line for line in own for word in line.split() if word.strip(".,;:)") in spelled] == []


@pytest.mark.fast
def test_messages_name_arguments() -> None:
    for call, said in (
        (
            lambda: quantkit.gptq("o/m", group_size=12),
            "group_size=12: give -1 (one group a row) or a positive multiple of 8",
        ),
        (lambda: quantkit.perplexity("o/m", stride=512), "stride=512: less than seq_len (512)"),
        (lambda: quantkit.gptq("o/m", act_order="yes"), "act_order=yes: choose static, dynamic, off"),  # type: ignore[arg-type]
        (
            lambda: quantkit.compare("o/m", "o/n", out="x", max_kl=-1),
            "max_kl=-1: give a divergence in nats, such as 0.05",
        ),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == said
    words = "--sym True; --force replaces it; --pre and --exclude; `quantkit gptq --bits 4` --no-eval --tasks-dir"
    assert _in_arguments(spec_of("gptq"), {"sym": True}, words) == (
        "sym=True; force=True replaces it; pre and exclude; `quantkit gptq --bits 4` evaluate=False --tasks-dir"
    )
    with pytest.raises(TypeError, match=r"'licens'; did you mean licence\?"):
        quantkit.card("d", licens="mit")  # type: ignore[call-arg]


def test_warnings_are_python_s_and_point_to_the_caller(make_model: MakeModel, tmp_path: Path) -> None:
    model, text = make_model(), tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    with pytest.warns(QuantkitWarning, match="windows of 300 tokens: tiny-llama is made for 256 at most") as heard:
        one = quantkit.perplexity(model, text=str(text), seq_len=300)
    assert [warning.filename for warning in heard] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantkit.perplexity([model], text=str(text), seq_len=32).results[0].model == one.results[0].model


def test_bars_and_notes_where_they_are_asked_for(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    quantkit.perplexity(make_model(), text=str(text), seq_len=300, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "evaluating: " in err
    assert "warning: windows of 300 tokens: tiny-llama is made for 256 at most" in err
    assert "seq_len=256 keeps within" in err


def test_texts_to_calibrate_on(make_model: MakeModel, tmp_path: Path) -> None:
    """A list of texts is a data set of plain records, drawn from as one of a file is."""
    given = {"samples": 4, "seq_len": 32, "evaluate": False}
    drawn = quantkit.samples(make_model(), calibration=TEXTS, **given).matrix
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    same = quantkit.samples(make_model(), calibration=str(tmp_path / "texts.jsonl"), **given).matrix
    assert drawn.provenance.tokens_sha256 == same.provenance.tokens_sha256
    assert drawn.provenance.dataset == "40 texts"
    for wrong in ([], ["", " "]):
        with pytest.raises(QuantkitError, match=r"0 texts|2 texts"):
            quantkit.samples(make_model(), calibration=wrong, **given)
    with pytest.raises(UsageError, match="calibration"):
        quantkit.samples(make_model(), calibration=[3], **given)  # type: ignore[list-item]
