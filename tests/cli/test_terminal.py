"""What a terminal of 80, 100 and 120 columns shows: names whole, numbers whole, and how long it takes."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from subprocess import Popen

import pytest
from rich.console import Console
from support.reports import CASES, DISPLAY

from quantkit import bars
from quantkit.cli.tables import lines_of
from quantkit.evaluate.statistics import KlDivergence, Numbers, heads
from quantkit.report import Column, Table

FAMILY = "WizardLM-13B-V1.2-"


def measured(kl: float, agreed: float, error: float) -> Numbers:
    divergence = KlDivergence(kl, kl / 3, 3 * kl, 16 * kl, 40 * kl, 100 * kl)
    errors = {"kl_divergence_stderr": error, "top1_agreement_stderr": 0.0044 if agreed < 0.9 else 0.0001}
    return Numbers(13.0, 0.26, divergence, agreed, 0.0517, 0.0021, **errors)


ROWS = {
    "fp16": ("26.0 GB", Numbers(12.345678, 0.25, None, None, None, None)),
    "GPTQ-4bit-128g-actorder_True": ("7.3 GB", measured(0.1765, 0.7754, 0.0019)),
    "Q8_0": ("13.8 GB", measured(0.00021, 0.9954, 0.00004)),
}
TABLE = Table(
    [Column("model", "left"), Column("size"), Column("bits/w", drop=4), *heads(True)],
    [[FAMILY + name, bytes, "4.00", *numbers.cells(True)] for name, (bytes, numbers) in ROWS.items()],
    short=True,
)
SHOWN = {
    80: """
names without their common beginning, WizardLM-13B-V1.2-
model                            size             KL mean     same top-1
────────────────────────────  ───────  ──────────────────  ─────────────
fp16                          26.0 GB
GPTQ-4bit-128g-actorder_True   7.3 GB     0.1765 ± 0.0019   77.5 ± 0.4 %
Q8_0                          13.8 GB  0.00021 ± 0.000040  99.5 ± 0.01 %
""",
    100: """
names without their common beginning, WizardLM-13B-V1.2-
model                            size      perplexity             KL mean     same top-1
────────────────────────────  ───────  ──────────────  ──────────────────  ─────────────
fp16                          26.0 GB  12.346 ± 0.250
GPTQ-4bit-128g-actorder_True   7.3 GB  13.000 ± 0.260     0.1765 ± 0.0019   77.5 ± 0.4 %
Q8_0                          13.8 GB  13.000 ± 0.260  0.00021 ± 0.000040  99.5 ± 0.01 %
""",
    120: """
names without their common beginning, WizardLM-13B-V1.2-
model                            size  bits/w      perplexity          Δ ln ppl             KL mean     same top-1
────────────────────────────  ───────  ──────  ──────────────  ────────────────  ──────────────────  ─────────────
fp16                          26.0 GB    4.00  12.346 ± 0.250
GPTQ-4bit-128g-actorder_True   7.3 GB    4.00  13.000 ± 0.260  +0.0517 ± 0.0021     0.1765 ± 0.0019   77.5 ± 0.4 %
Q8_0                          13.8 GB    4.00  13.000 ± 0.260  +0.0517 ± 0.0021  0.00021 ± 0.000040  99.5 ± 0.01 %
""",
}


@pytest.mark.fast
@pytest.mark.parametrize("width", SHOWN)
def test_a_family_s_table(width: int) -> None:
    assert "\n".join(lines_of(TABLE, width)) == SHOWN[width].strip()


@pytest.mark.fast
@pytest.mark.parametrize("width", [10, 30, 60, 80, 100, 120])
@pytest.mark.parametrize("name", CASES)
def test_no_report_s_table_is_wider_or_loses_anything(name: str, width: int) -> None:
    for table in CASES[name].lines(**DISPLAY.get(name, {})):
        if not isinstance(table, Table):
            continue
        lines = list(lines_of(table, width))
        assert "…" not in "".join(lines)
        if width >= 60:
            assert max(map(len, lines)) <= width
        if width >= 80:
            last = [row[0].rsplit("-", 1)[-1] for row in table.rows]
            assert [text for text in last if not any(text in line for line in lines)] == []
            kept = [number for number, column in enumerate(table.columns) if not (column.drop or column.wraps)][1:]
            assert [row[n] for row in table.rows for n in kept if not any(row[n] in line for line in lines)] == []


@pytest.mark.fast
def test_names_are_folded_and_text_is_wrapped_where_nothing_else_gives_way() -> None:
    columns = [Column("program", "left"), Column("loads", "left"), Column("why", "left", wraps=True)]
    table = Table(columns, [["vLLM", "no", "its kernels want groups of 128 columns"]], heads=False, indent=2)
    assert list(lines_of(table, 30)) == [
        "  vLLM  no  its kernels want",
        "            groups of 128",
        "            columns",
    ]
    assert list(lines_of(table, None)) == ["  vLLM  no  its kernels want groups of 128 columns"]
    names = Table([Column("model", "left"), Column("size")], [["模型" * 4, "1.00"], ["a" * 20, "22.00"]], heads=False)
    assert list(lines_of(names, 16)) == ["模型模型    1.00", "模型模型", "aaaaaaaaa  22.00", "aaaaaaaaa", "aa"]


@pytest.mark.fast
@pytest.mark.parametrize("width", range(24, 60))
def test_short_names_take_no_more_than_they_need(width: int) -> None:
    columns = [Column("model", "left"), Column("perplexity", drop=1), Column("KL mean")]
    table = Table(columns, [["out", "13.000 ± 0.260", "0.1765 ± 0.0019"]])
    lines = list(lines_of(table, width))
    assert max(map(len, lines)) <= width
    assert ("13.000 ± 0.260" in lines[-1]) == (width >= 38)


@pytest.mark.fast
@pytest.mark.parametrize("terminal", [True, False])
def test_a_phase_that_ends_early_is_done(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a text as much is read as is wanted."""
    monkeypatch.setattr(bars, "log", lambda: Console(stderr=True, force_terminal=terminal, width=80))
    with bars.Bars(quiet=False).phase("evaluation text", 72) as advance:
        advance(6)
    assert re.search(r"evaluation text:? .*6/6 .*(0 s left|in \d\.\d s)\s*$", plain(capsys.readouterr().err))


@pytest.mark.fast
def test_time_left_follows_the_work_and_runs_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    clock = bars.Clock(10)
    assert str(clock) == ""
    now = 130.0
    clock.advance(1)
    assert str(clock) == "4 min left"
    now = 340.0
    assert str(clock) == "60 s left"
    now = 900.0
    assert str(clock) == "0 s left"


# -- a real one --------------------------------------------------------------------------------------------------------

# One process, for its imports: the terminal's width is set before each command.
RUNNER = """
import struct, sys, termios
from fcntl import ioctl
from quantkit.cli import console
from quantkit.cli.app import _run
for width, arguments in {commands!r}:
    ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    for made in (console.log, console.results):
        made.cache_clear()
    print("@@", width, arguments[0], flush=True)
    print("@@", _run(arguments), flush=True)
"""


def on_a_terminal(commands: list[tuple[int, list[str]]], folder: Path) -> str:
    """What a pseudo-terminal receives of quantkit's commands."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    code = RUNNER.format(commands=commands)
    child = Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert child.wait(60) == 0, seen.decode()
    return plain(seen.decode())


def plain(drawn: str) -> str:
    """Without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn)


def test_long_work_and_its_results_at_80_100_and_120_columns(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Bars keep what is done, how much and how long yet; tables keep names and numbers."""
    text = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
    records = [{"id": f"r{i}", "instruction": text[i:], "output": text * 2} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "text.txt").write_text((" ".join(reversed(text.split())) + " ") * 60)
    model = shutil.copytree(make_model(), tmp_path / "Wizard-Tiny-Instruct-fp16")
    drawn = ["--calibration", "data.jsonl", "--samples", "4", "--seq-len", "32", "--text", "text.txt"]
    made = "Wizard-Tiny-Instruct-GPTQ-4bit-32g"
    (tmp_path / "recipe.yaml").write_text(
        f"name: Wizard-Tiny-Instruct\nsource: {{model: {model.name}}}\n"
        "calibration: {data: data.jsonl, samples: 4, seq_len: 32}\nevaluation: {texts: [text.txt]}\n"
        "variants: [{kind: gptq, bits: 4, group_size: 32}]\ncard: {licence: mit}\n"
    )
    commands = [(80, ["gptq", str(model), *drawn, "--group-size", "32", "--out", made])]
    for width in (80, 100, 120):
        commands += [
            (width, ["release", "recipe.yaml", "--dry-run"]),
            (width, ["release", "recipe.yaml", "--out", f"release{width}"]),
            (width, ["perplexity", made, "--against", str(model), "--text", "text.txt"]),
            (width, ["compare", str(model), made, "--text", "text.txt", "--no-plots", "--out", f"cmp{width}"]),
            (width, ["verify", made, "--no-generate"]),
        ]
    seen = on_a_terminal(commands, tmp_path)
    parts = re.findall(r"@@ (\d+) (\w+)\r\n(.*?)@@ (\d+)\r\n", seen, flags=re.DOTALL)
    assert [(int(width), verb) for width, verb, _, _ in parts] == [(width, given[0]) for width, given in commands]
    for given, verb, shown, code in parts:
        assert code == "0", shown
        width, lines = int(given), [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
        drawn = [line for line in lines if "━" in line]
        assert all(len(line) <= width for line in drawn)
        for line in drawn:
            assert re.match(r"[a-z ]+ [━╸╺]+ *\d+/\d+ +\d+:\d\d:\d\d", line), line
        if verb in ("gptq", "perplexity", "compare"):
            assert any(re.search(r"evaluating [━╸╺]+ *\d+/\d+ \d:\d\d:\d\d \d+ s left", line) for line in drawn)
            at = next(number for number, line in enumerate(lines) if line.startswith("model "))
            heads, row = lines[at], lines[at + 3]
            assert max(len(line) for line in lines[at : at + 4]) <= width
            assert {"KL mean", "same top-1"} <= set(re.split("  +", heads))
            assert re.search(r"GPTQ-4bit-32g .*\d\.\d{4} ± [\d.]+ .*\d\d\.\d ± [\d.]+ %", row), row
        assert not [line for line in lines if len(line) > width and " " in line and "/" not in line]
        if verb == "release":
            assert any(re.match(r"(gptq 4bit-32g  .*done|gptq 4bit-32g  +[\d.]+ [kM]B )", line) for line in lines), (
                shown
            )
        if verb == "verify":
            table = [line for line in lines if re.match(r"  \S.*  (yes|no) ", line)]
            assert len(table) > 3
            assert max(map(len, lines)) <= width
