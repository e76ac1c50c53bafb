"""The verb `chat`: what it remembers, what it answers, and its command line with piped input and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, MakeModel

import quantkit
from quantkit.blocks.whole import load_model
from quantkit.errors import UsageError, visible
from quantkit.options import Decoding
from quantkit.sources import open_source
from quantkit.tokens import Record, Turn
from quantkit.verbs.chat import ChatReport, _Told
from quantkit.verbs.generate.speaker import Speaker


class Script:
    """A person who says what is written, and keeps what is answered."""

    def __init__(self, lines: Sequence[str], interrupt_after: int = 0) -> None:
        self._lines = iter(lines)
        self._interrupt = interrupt_after
        self.pieces: list[list[str]] = [[]]
        self.ends: list[str] = []
        self.notes: list[str] = []

    def hear(self) -> str | None:
        return next(self._lines, None)

    def say(self, piece: str) -> None:
        self.pieces[-1].append(piece)
        if len(self.pieces[-1]) == self._interrupt:
            raise KeyboardInterrupt

    def end(self, finish: str) -> None:
        self.ends.append(finish)
        self.pieces.append([])

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def answers(self) -> list[str]:
        return ["".join(pieces) for pieces in self.pieces[:-1]]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", dtype="float32")


def talk(model: Path, *lines: str, interrupt_after: int = 0, **options: Any) -> tuple[Script, ChatReport]:
    person = Script(lines, interrupt_after)
    return person, quantkit.chat(model, person, **{"device": "cpu", "max_new_tokens": 10, "greedy": True, **options})


def answer(model: Path, *turns: tuple[str, str], system: str | None = None) -> str:
    """The greedy answer to a conversation, outside of any chat."""
    speaker = Speaker.of(open_source(model), "auto", Decoding(greedy=True, max_new_tokens=10))
    record = Record("x", turns=tuple(Turn(role, text) for role, text in turns), system=system)  # type: ignore[arg-type]
    whole = load_model(open_source(model), torch.device("cpu"), torch.float32)
    return speaker.text(speaker.answer(whole, [speaker.request(record, "x", "x")])[0].ids, record)


def test_every_answer_follows_from_all_that_was_said(model: Path) -> None:
    person, report = talk(model, "the sea?", "  ", "and the moon?")
    first = answer(model, ("user", "the sea?"))
    second = answer(model, ("user", "the sea?"), ("assistant", first), ("user", "and the moon?"))
    assert person.answers == [first, second]
    assert second != answer(model, ("user", "and the moon?"))
    assert person.ends == ["length", "length"]
    assert report.as_dict() == {
        "model": "tiny-llama",
        "template": "chat",
        "system": None,
        "turns": [
            {"role": "user", "content": "the sea?"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and the moon?"},
            {"role": "assistant", "content": second},
        ],
    }


def test_answers_come_in_pieces(model: Path) -> None:
    person, _ = talk(model, "the sea?")
    assert len(person.pieces[0]) > 3
    assert all(person.pieces[0])


def test_half_characters_are_held_back(model: Path) -> None:
    speaker = Speaker.of(open_source(model), "auto", Decoding())
    person = Script([])
    told = _Told(speaker, person, Record("x", turns=(Turn("user", "x"),)))
    ids = speaker.tokenizer("\u00e9\u2192 x ", add_special_tokens=False).input_ids
    assert len(ids) > 5
    for token in [*ids, *speaker.stops]:
        told.add([token])
    told.flush()
    assert "\ufffd" not in "".join(person.pieces[0])
    assert told.text == "".join(person.pieces[0]) == "\u00e9\u2192 x"


def test_reset_and_the_system_message(model: Path) -> None:
    person, report = talk(model, "the sea?", "/reset", "and the moon?", "/system be brief", "and the moon?", "/system")
    alone = answer(model, ("user", "and the moon?"))
    brief = answer(model, ("user", "and the moon?"), system="be brief")
    assert person.answers[1:] == [alone, brief]
    assert alone != brief
    assert person.notes[0] == "forgotten"
    assert (report.system, report.turns) == (None, ())


def test_commands_and_what_only_looks_like_one(model: Path) -> None:
    person, report = talk(model, "/help", "/etc/hosts is what?", "/quit", "never heard")
    assert "/reset forgets" in person.notes[0]
    assert [turn.text for turn in report.turns[::2]] == ["/etc/hosts is what?"]


def test_an_interrupted_answer_is_kept_as_far_as_it_went(model: Path) -> None:
    person, report = talk(model, "the sea?", "/quit", interrupt_after=3)
    assert person.ends == ["interrupted"]
    assert report.turns[1].text == "".join(person.pieces[0][:3])
    assert answer(model, ("user", "the sea?")).startswith(report.turns[1].text)
    assert person.notes == []


def test_a_conversation_that_fills_the_context_goes_on_after_a_reset(model: Path) -> None:
    long = "the " * SIZES["max_position_embeddings"]
    person, report = talk(model, "the sea?", long, "/reset", "the sea?")
    assert re.match(r"the conversation: its prompt has \d+ tokens.*; /reset begins a new one", person.notes[0])
    assert person.answers == [answer(model, ("user", "the sea?"))] * 2
    assert len(report.turns) == 2


def test_drawn_answers_are_reproducible_and_differ_from_turn_to_turn(model: Path) -> None:
    lines = ("the sea?", "/reset", "the sea?")
    person, _ = talk(model, *lines, greedy=False)
    again, _ = talk(model, *lines, greedy=False)
    other, _ = talk(model, *lines, greedy=False, seed=1)
    assert person.answers == again.answers
    assert person.answers[0] != person.answers[1]
    assert person.answers[0] != other.answers[0]


def test_options_out_of_range(model: Path) -> None:
    with pytest.raises(UsageError, match=r"top_p="):
        talk(model, top_p=0.0)
    with pytest.raises(UsageError, match=r"no MODEL given"):
        quantkit.chat(None, Script([]))


# -- the command line ------------------------------------------------------------------------------------------------


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "quantkit", "chat", str(model), "--device", "cpu", *options]


def test_the_command_with_piped_input(model: Path) -> None:
    options = ["--greedy", "--max-new-tokens", "10"]
    said = "the sea?\n/reset\nand the moon?\n"  # no /quit: the end of the input ends it
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command(model, *options), input=said.encode(), capture_output=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    expected = [answer(model, ("user", text)) for text in ("the sea?", "and the moon?")]
    # A random model says anything: what would drive a terminal is written out.
    assert done.stdout.decode() == "".join(f"{visible(text, lines=True)}\n" for text in expected)
    assert b"template chat" in done.stderr
    printed = subprocess.run(
        command(model, *options, "--json", "--quiet"), input=b"the sea?", capture_output=True, timeout=120
    )
    assert printed.stderr == b""
    assert [turn["content"] for turn in json.loads(printed.stdout)["turns"]] == ["the sea?", expected[0]]


def _heed_interrupts() -> None:
    """Where the tests themselves run in the background, interrupts are ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_not_the_program(make_model: MakeModel) -> None:
    endless = make_model("llama", dtype="float32", max_position_embeddings=100_000)
    process = subprocess.Popen(
        command(endless, "--greedy", "--max-new-tokens", "90000"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_interrupts,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(b"the sea?\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # it is answering
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        while b"(interrupted)" not in process.stderr.readline():
            assert process.poll() is None
        process.stdin.write(b"/help\n/quit\n")
        process.stdin.close()
        process.stdout.read()
        assert b"/reset forgets" in process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
